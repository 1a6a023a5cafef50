'''The classic rules of LRP, against golden cases, naive implementations by dense matrices in float64, and closed forms.

Numbers of equations are those of Nyiri and Gibaru.
'''
import pytest
import torch
from golden_cases import golden_cases, relative_error, tensor
from helpers.golden import build_layer
from helpers.layers import attribute, matrix, with_weight
from helpers.networks import randomize
from torchvision.models import resnet18
from zennit.attribution import Gradient
from zennit.rules import AlphaBeta, Epsilon, Gamma, WSquare

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.classic import ADDITION, SETTINGS, ClassicLRP, drop_zero
from zennit_resnet.layer import Addition
from zennit_resnet.rules import Duplicate, LinearSum, SignedAlphaBeta


def stabilizer(eps, mode='sign'):
    '''The stabilizer of a golden case. Contributions to denominators that are still zero are zero.'''
    def stabilize(value):
        sign = 1 if mode == 'plus' else (value >= 0).to(value) * 2 - 1
        return drop_zero(value + eps * sign)

    return stabilize


def propagate(module, input, relevance, **settings):
    '''Relevance of the input of a single layer.'''
    with Gradient(model=torch.nn.Sequential(module).eval(), composite=ClassicLRP(**settings)) as attributor:
        return attributor(input, lambda output: relevance)[1]


def dense(module, input):
    '''Contributions w_ij x_i of shape (batch, input, output), and the bias of each output, of a linear layer.'''
    shape = input.shape[1:]
    weights = matrix(with_weight(module, module.weight.detach()), shape)
    bias = module(torch.zeros_like(input[:1])).flatten(1) if module.bias is not None else weights.new_zeros(1, 1)
    return weights, weights * input.flatten(1)[..., None], bias.detach()


def divide(contributions, denominator, relevance):
    '''sum_j z_ij / d_j R_j with x / 0 = 0.'''
    return (contributions / drop_zero(denominator)[:, None] * relevance.flatten(1)[:, None]).sum(2)


@pytest.mark.parametrize('arrays, settings, case', golden_cases('layer_*', 'lrp0'))
def test_golden_lrp0(arrays, settings, case):
    '''LRP-0, Eq. (1), with and without bias. Poolings have no bias.'''
    module = build_layer(arrays, settings['layer'])
    input, relevance = (tensor(arrays, case['inputs'][key]) for key in ('input', 'relevance'))
    actual = propagate(module, input, relevance, rule='lrp0', with_bias=case['arguments']['include_bias'])
    if isinstance(module, torch.nn.MaxPool2d):
        # a maximum of zero receives relevance, which the layer below drops
        actual = actual * (input != 0)
    assert relative_error(actual, tensor(arrays, case['expected']['input_relevance'])) < 1e-9


LINEAR = [
    param for param in golden_cases('layer_*', 'epsilon') if param.values[1]['layer']['type'] in ('dense', 'conv2d')
]


@pytest.mark.parametrize('arrays, settings, case', LINEAR)
def test_golden_epsilon(arrays, settings, case):
    '''LRP-epsilon, Eq. (4): epsilon as printed by a callable, or with the sign of the denominator by a number.'''
    arguments = case['arguments']
    is_plain = arguments['eps_mode'] == 'sign' and arguments['eps'] > 0
    epsilon = arguments['eps'] if is_plain else stabilizer(arguments['eps'], arguments['eps_mode'])
    module = build_layer(arrays, settings['layer'])
    input, relevance = (tensor(arrays, case['inputs'][key]) for key in ('input', 'relevance'))
    actual = propagate(
        module, input, relevance, rule='epsilon', epsilon=epsilon, with_bias=arguments['include_bias']
    )
    assert relative_error(actual, tensor(arrays, case['expected']['input_relevance'])) < 1e-9


@pytest.mark.parametrize('arrays, settings, case', golden_cases('layer_*', 'alpha_beta'))
def test_golden_alpha_beta(arrays, settings, case):
    '''LRP-alpha-beta, Eq. (5), by Zennit's rule and by ours.'''
    arguments = case['arguments']
    module = build_layer(arrays, settings['layer'])
    input, relevance = (tensor(arrays, case['inputs'][key]) for key in ('input', 'relevance'))
    expected = tensor(arrays, case['expected']['input_relevance'])
    kwargs = {'alpha': arguments['alpha'], 'beta': arguments['beta'], 'stabilizer': stabilizer(arguments['eps'])}
    assert relative_error(propagate(module, input, relevance, rule='alpha_beta', **kwargs), expected) < 1e-9
    lower = attribute(SignedAlphaBeta(**kwargs, zero_params='bias'), module, input, relevance=relevance)[-1]
    assert relative_error(lower, expected) < 1e-9


@pytest.mark.parametrize('arrays, settings, case', golden_cases('layer_*', 'gamma'))
def test_golden_gamma(arrays, settings, case):
    '''LRP-gamma, Eq. (3): Zennit's rule is the same for inputs and outputs that are not negative, and only there.'''
    arguments = case['arguments']
    gamma, eps = arguments['gamma'], stabilizer(arguments['eps'], arguments['eps_mode'])
    module = build_layer(arrays, settings['layer'])
    input, relevance = (tensor(arrays, case['inputs'][key]) for key in ('input', 'relevance'))
    weights, contributions, bias = dense(module, input)

    def printed(relevance):
        enlarged = (weights + gamma * weights.clamp(min=0)) * input.flatten(1)[..., None]
        return divide(enlarged, eps(enlarged.sum(1)), relevance).view_as(input)

    def generalized(relevance):
        total, relevance = contributions.sum(1) + bias, relevance.flatten(1)
        parts = []
        for sign in (1, -1):
            enlarged = contributions + gamma * (sign * contributions).clamp(min=0) * sign
            parts.append(divide(enlarged, eps(enlarged.sum(1)), relevance * (sign * total > 0)))
        return sum(parts).view_as(input)

    assert relative_error(printed(relevance), tensor(arrays, case['expected']['input_relevance'])) < 1e-9
    settings = {'rule': 'gamma', 'gamma': gamma, 'stabilizer': eps}
    assert relative_error(propagate(module, input, relevance, **settings), generalized(relevance)) < 1e-9
    if (input >= 0).all():
        positive = relevance * (module(input).detach() > 0)
        assert positive.any()
        assert relative_error(propagate(module, input, positive, **settings), printed(positive)) < 1e-9
    else:
        assert relative_error(generalized(relevance), printed(relevance)) > 1e-3


@pytest.mark.parametrize('rule, contributions', [
    ('zplus', lambda weights, input: (weights * input[..., None]).clamp(min=0)),
    ('wsquare', lambda weights, input: (weights ** 2).expand(len(input), -1, -1)),
])
@pytest.mark.parametrize('kind, arguments, shape', [
    (torch.nn.Linear, (6, 4), (6,)), (torch.nn.Conv2d, (2, 3, 3, 2, 1), (2, 5, 6)),
])
def test_positive_rules(rule, contributions, kind, arguments, shape):
    '''LRP-z+ and LRP-w^2 without bias, which conserve the relevance of units that have a positive contribution.'''
    module, input = kind(*arguments).double(), torch.randn(3, *shape, dtype=torch.float64)
    relevance = torch.randn_like(module(input)).detach()
    contributions = contributions(dense(module, input)[0], input.flatten(1))
    relevance = relevance * (contributions.sum(1) > 0).view_as(relevance)
    expected = divide(contributions, contributions.sum(1), relevance).view_as(input)
    actual = propagate(module, input, relevance, rule=rule)
    assert relative_error(actual, expected) < 1e-9
    torch.testing.assert_close(actual.flatten(1).sum(1), relevance.flatten(1).sum(1))


@pytest.mark.parametrize('alpha, beta', [(2., -1.), (1., 0.), (1.5, -.5)])
def test_signed_alpha_beta_is_zennits(alpha, beta):
    '''With beta of the opposite sign, this is Zennit's rule, biases included.'''
    module, input = torch.nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)
    relevance = torch.randn(2, 4, 5, 5)
    ours, zennits = (
        attribute(rule, module, input, relevance=relevance)[-1]
        for rule in (SignedAlphaBeta(alpha, beta), AlphaBeta(alpha, -beta))
    )
    torch.testing.assert_close(ours, zennits)


def test_alpha_beta_sum():
    '''A unit passes on alpha R for its positive contributions and beta R for its negative ones, if there are any.'''
    module = torch.nn.Linear(3, 3, bias=False).double()
    module.weight.data = torch.tensor([[1., 2., 3.], [-1., -2., -3.], [1., -2., 3.]]).double()
    input, relevance = torch.ones(1, 3).double(), torch.tensor([[1., 10., 100.]]).double()
    lower = propagate(module, input, relevance, rule='alpha_beta', alpha=.5, beta=.5)
    torch.testing.assert_close(lower.sum(), torch.tensor(.5 * 1 + .5 * 10 + 100).double())


@pytest.mark.parametrize('rule, expected', [
    (Epsilon(.5), lambda left, right: left / (left + right + .5 * (left + right).sign())),
    (AlphaBeta(2., 1.), lambda left, right: (
        2 * left.clamp(min=0) / (left.clamp(min=0) + right.clamp(min=0) + 1e-6)
        - left.clamp(max=0) / (left.clamp(max=0) + right.clamp(max=0) - 1e-6)
    )),
    (WSquare(0.), lambda left, right: torch.full_like(left, .5)),
    (Gamma(1., 0.), lambda left, right: torch.where(
        left + right > 0, (left + left.clamp(min=0)) / (left + left.clamp(min=0) + right + right.clamp(min=0)),
        (left + left.clamp(max=0)) / (left + left.clamp(max=0) + right + right.clamp(max=0)),
    )),
])
def test_linear_sum(rule, expected):
    '''An addition is a neuron whose weights are all one.'''
    left, right = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    _, relevance, *lower = attribute(LinearSum(rule), Addition(), left, right)
    torch.testing.assert_close(lower[0], relevance * expected(left, right), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lower[1], relevance * expected(right, left), rtol=1e-6, atol=1e-9)


def test_linear_sum_of_factors():
    '''Addends may have factors, be broadcast, and be more than two.'''
    class Difference(torch.nn.Module):
        '''Additions only.'''
        def forward(self, x):
            '''x - 2 m with the mean m of each row, then in-place.'''
            y = torch.sub(x, x.mean(1, keepdim=True), alpha=2)
            y += x
            return y

    input = torch.rand(2, 5, dtype=torch.float64) + 1
    relevance = torch.rand(2, 5, dtype=torch.float64)
    composite = ClassicLRP('lrp0', with_bias=True)
    with Gradient(model=Difference(), composite=composite) as attributor:
        _, actual = attributor(input, lambda output: relevance)
    mean = input.mean(1, keepdim=True)
    output = 2 * input - 2 * mean
    share = -2 * (relevance / output).sum(1, keepdim=True) * input / 5
    torch.testing.assert_close(actual, relevance * 2 * input / output + share)


def test_linear_sum_needs_hook():
    '''A class is not a rule.'''
    with pytest.raises(TypeError, match='rule=.*Epsilon'):
        LinearSum(Epsilon)


def test_duplicate():
    '''Each addend receives everything.'''
    _, relevance, *lower = attribute(Duplicate(), Addition(), torch.randn(2, 3), torch.randn(2, 3))
    assert all(torch.equal(elem, relevance) for elem in lower)


class Network(torch.nn.Module):
    '''A small residual network, with additions in-place, of three branches, and broadcast.'''
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.branches = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(8, 8, size, padding=size // 2), torch.nn.BatchNorm2d(8))
            for size in (1, 3, 3)
        )
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        '''Logits.'''
        x = self.stem(x)
        out = self.branches[0](x)
        out += x
        x = torch.nn.functional.relu(out)
        x = x + self.branches[1](x) + torch.nn.functional.adaptive_avg_pool2d(self.branches[2](x), 1)
        return self.head(torch.relu(x).mean((2, 3)))


@pytest.mark.parametrize('network, size', [(Network, 12), (resnet18, 40)])
def test_closed_form(network, size):
    '''LRP-0 with biases in the denominators, additions included, is Gradient x Input times R_k / y_k.'''
    model = randomize(network()).double().eval()
    input, target = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([1, 3])
    source = input.clone().requires_grad_()
    logit = model(source).gather(1, target[:, None])
    gradient, = torch.autograd.grad(logit.sum(), source)
    with Gradient(model=model, composite=ClassicLRP('lrp0', with_bias=True)) as attributor:
        _, actual = attributor(input, initial_relevance(target, 'one'))
    assert relative_error(actual, input * gradient / logit.detach()[..., None, None]) < 1e-7


@pytest.mark.parametrize('addition', ADDITION)
@pytest.mark.parametrize('name', SETTINGS)
def test_network(name, addition):
    '''All settings work on a residual network, and leave it as it was.'''
    model = randomize(Network()).double().eval()
    state = {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    input = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with Gradient(model=model, composite=ClassicLRP(**SETTINGS[name], addition=addition)) as attributor:
        output, relevance = attributor(input, initial_relevance([0, 4], 'one'))
    assert torch.isfinite(relevance).all() and (relevance != 0).flatten(1).any(1).all()
    assert torch.equal(output.detach(), model(input).detach())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(id(after[key]) == ident and torch.equal(after[key], value) for key, (ident, value) in state.items())
    assert all(param.requires_grad for param in model.parameters())
    if addition != 'duplicate' and SETTINGS[name]['rule'] in ('lrp0', 'gamma'):
        # there is no unit without any contribution here
        torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.ones(2).double(), rtol=1e-6, atol=0)


class SamePadding(torch.nn.Conv2d):
    '''A convolution with a forward of its own.'''
    def __init__(self, *args):
        super().__init__(*args)
        self.pad = torch.nn.ZeroPad2d(1)

    def forward(self, input):
        '''Convolution of the padded input.'''
        return torch.nn.functional.conv2d(self.pad(input), self.weight, self.bias, self.stride)


@pytest.mark.parametrize('name', SETTINGS)
def test_own_forward(name):
    '''Convolutions with a forward of their own are treated as those with the same padding.'''
    if name == 'lrp_wsquare':
        pytest.skip('what the padding receives is lost or goes to the border')
    networks = []
    for kind, padding in ((torch.nn.Conv2d, 1), (SamePadding, 0)):
        torch.manual_seed(0)
        networks.append(randomize(torch.nn.Sequential(
            kind(3, 4, 3, 2, padding), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), kind(4, 4, 3, 1, padding),
            torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(100, 3),
        )).double().eval())
    input, relevance = torch.randn(2, 3, 10, 10).double(), []
    for network in networks:
        with Gradient(model=network, composite=ClassicLRP(**SETTINGS[name])) as attributor:
            relevance.append(attributor(input, initial_relevance([0, 2]))[1])
    assert relative_error(*relevance) < 1e-9


def test_zplus_is_ours():
    '''Zennit's z+ rule with our splitting is the single-pass rule, as printed.'''
    # all poolings have inputs which are not negative here
    model, input = randomize(resnet18()).double().eval(), torch.randn(2, 3, 40, 40).double()
    relevance = []
    for composite in (
        ClassicLRP('zplus', addition='ratio', batch_norm='pass'),
        ResNetLRP(projection='literal', coverage='literal', dead_units='drop'),
    ):
        with Gradient(model=model, composite=composite) as attributor:
            relevance.append(attributor(input, initial_relevance([0, 2]))[1])
    assert relative_error(*relevance) < 1e-9


def test_additions_differ():
    '''Of a block y = x + f(x), with f(x) = -3 x / 4 + 1 here, each choice gives its own relevance to the identity.'''
    class Block(torch.nn.Module):
        '''A residual block.'''
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)
            self.linear.weight.data.fill_(-.75)
            self.linear.bias.data.fill_(1.)

        def forward(self, x):
            '''Residual block.'''
            return x + self.linear(x)

    input, sums = torch.full((1, 1), 4.), {}
    for addition in ADDITION:
        # batch normalization is absent and the bias is excluded, so the branch passes on what it gets
        with Gradient(model=Block(), composite=ClassicLRP('lrp0', addition=addition)) as attributor:
            sums[addition] = float(attributor(input, torch.ones(1, 1))[1])
    assert sums == pytest.approx({'rule': 1., 'ratio': 1., 'symmetric': 1., 'duplicate': 2.})
    parts = {}
    for addition in ADDITION:
        # z+ passes nothing on through a negative weight, what remains is the share of the skip connection
        with Gradient(model=Block(), composite=ClassicLRP('zplus', addition=addition)) as attributor:
            parts[addition] = float(attributor(input, torch.ones(1, 1))[1])
    # the addends are 4 and -2
    assert parts == pytest.approx({'rule': 1., 'ratio': 4 / 6, 'symmetric': .5, 'duplicate': 1.})


def test_black_image():
    '''Denominators of zero receive nothing, and leave no NaN.'''
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.AvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    ).eval()
    model[0].bias.data.fill_(1.)
    for settings in SETTINGS.values():
        with Gradient(model=model, composite=ClassicLRP(**settings)) as attributor:
            _, relevance = attributor(torch.zeros(1, 1, 6, 6), torch.ones(1, 2))
        assert torch.isfinite(relevance).all(), settings
        assert settings['rule'] == 'wsquare' or not relevance.any()


def test_cancellation():
    '''Contributions that sum to zero, or to what is too small to be inverted, receive nothing.'''
    module = torch.nn.Linear(2, 3, bias=False)
    module.weight.data = torch.tensor([[1., -1.], [1e-40, 0.], [1., 1.]])
    lower = propagate(module, torch.ones(1, 2), torch.tensor([[1., 10., 100.]]), rule='lrp0')
    torch.testing.assert_close(lower, torch.tensor([[50., 50.]]))


def test_settings_are_the_papers():
    '''Each setting is one rule with the printed parameters.'''
    module, input, relevance = torch.nn.Linear(5, 4).double(), torch.rand(1, 5).double(), torch.rand(1, 4).double()
    weights, contributions, _ = dense(module, input)
    total, positive, negative = contributions.sum(1), contributions.clamp(min=0), contributions.clamp(max=0)
    shares = {
        'lrp_0': (contributions, total),
        **{f'lrp_epsilon_{eps:g}': (contributions, total + eps * total.sign()) for eps in (.01, .001, 1)},
        'lrp_zplus': (positive, positive.sum(1)),
        'lrp_wsquare': (weights[None] ** 2, (weights[None] ** 2).sum(1)),
    }
    expected = {name: divide(*pair, relevance) for name, pair in shares.items()}
    for name, alpha in (('lrp_alpha_beta_2_-1', 2), ('lrp_alpha_beta_0.5_0.5', .5)):
        expected[name] = alpha * divide(positive, positive.sum(1), relevance) + (1 - alpha) * divide(
            negative, negative.sum(1), relevance
        )
    output = module(input).detach()
    enlarged = [contributions + .25 * elem for elem in (positive, negative)]
    expected['lrp_gamma_0.25'] = sum(
        divide(elem, elem.sum(1), relevance * (sign * output > 0)) for elem, sign in zip(enlarged, (1, -1))
    )
    assert set(expected) == set(SETTINGS)
    for name, settings in SETTINGS.items():
        torch.testing.assert_close(propagate(module, input, relevance, **settings), expected[name], msg=name)


@pytest.mark.parametrize('settings, message', [
    ({'rule': 'gama'}, "rule='gama' is not one of 'lrp0'"),
    ({'addition': 'none'}, "addition='none' is not one of 'rule'"),
    ({'batch_norm': 'fold'}, "batch_norm='fold'"),
    ({'rule': 'alpha_beta', 'alpha': 2., 'beta': 1.}, 'alpha=2.0 and beta=1.0 do not sum to one'),
])
def test_bad_arguments(settings, message):
    '''Errors name the argument and its value.'''
    with pytest.raises(ValueError, match=message):
        ClassicLRP(**settings)
