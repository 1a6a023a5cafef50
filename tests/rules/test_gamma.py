'''The generalized gamma rule, LRP-epsilon at additions, products and normalizations, and the composite of these.'''
import math

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative_error
from helpers import layers
from helpers.layers import matrix, with_weight
from helpers.networks import randomize
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet
from zennit.attribution import Gradient
from zennit.rules import Epsilon, Gamma

from zennit_resnet import GammaLRP, ManyTargets, UnsupportedOperation, initial_relevance
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.methods import Method
from zennit_resnet.rules import EpsilonNormalization, EpsilonSplit, GeneralizedGamma, HalfEach, ZPlus
from zennit_resnet.tracing import trace

pytestmark = pytest.mark.once

LAYERS = {
    'linear': (lambda: nn.Linear(6, 5), (2, 6)),
    'tokens': (lambda: nn.Linear(6, 5), (2, 3, 6)),
    'conv': (lambda: nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 7, 7)),
    'groups': (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 6)),
    'pointwise': (lambda: nn.Conv1d(4, 6, 1), (2, 4, 6)),
    'transposed': (lambda: nn.ConvTranspose2d(4, 3, 3, 2), (2, 4, 3, 3)),
}


def attribute(layer, rule, x, relevance):
    '''Relevance of an input.'''
    return layers.attribute(rule, layer, x, relevance=relevance)[2]


def layer_of(name):
    '''A layer with inputs of both signs, and relevance of its output.'''
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape).double()
    return layer, x, torch.randn_like(layer(x))


@pytest.mark.parametrize('gamma', [0., 0.05, 0.25, 3.])
@pytest.mark.parametrize('name', LAYERS)
def test_gamma(name, gamma):
    '''The equation, connection by connection, and Zennit's rules.'''
    layer, x, relevance = layer_of(name)
    actual = attribute(layer, GeneralizedGamma(gamma), x, relevance)
    rule = Gamma(gamma) if gamma else Epsilon()
    assert relative_error(actual, attribute(layer, rule, x, relevance)) < 1e-9
    if name in ('tokens', 'transposed'):
        return
    weights = matrix(with_weight(layer, layer.weight.detach()), x.shape[1:])
    bias = (layer(torch.zeros_like(x[:1])).flatten(1)[0] if layer.bias is not None else x.new_zeros(1)).detach()
    bias = bias.expand(weights.shape[1])
    expected = torch.zeros(x[0].numel()).double()
    contributions = (weights * x[0].flatten()[:, None]).T.tolist()
    for parts, share, constant in zip(contributions, relevance[0].flatten().tolist(), bias.tolist()):
        sign = 1 if sum(parts) + constant >= 0 else -1
        same = [sign * max(sign * part, 0.) for part in (*parts, constant)]
        divisor = sum(parts) + constant + gamma * sum(same) + sign * 1e-6
        for i, part in enumerate(parts):
            expected[i] += (part + gamma * same[i]) * share / divisor
    assert relative_error(actual[0].flatten(), expected) < 1e-9


@pytest.mark.parametrize('name', ['linear', 'tokens', 'conv', 'transposed'])
@pytest.mark.parametrize('is_changed', [False, True])
def test_kept_output(monkeypatch, name, is_changed):
    '''The output of a layer spares a product with its weight, unless the network has changed it in place.'''
    layer, x, relevance = layer_of(name)
    expected, maps = attribute(layer, GeneralizedGamma(), x, relevance), []
    linear = GeneralizedGamma._map
    monkeypatch.setattr(GeneralizedGamma, '_map', lambda *args: maps.append(args) or linear(*args))
    leaf, rule = x.clone().requires_grad_(), GeneralizedGamma()
    handles = rule.register(layer)
    output = layer(leaf)
    if is_changed:
        output = output.mul_(2)
    lower, = torch.autograd.grad(output, leaf, relevance / 2 if is_changed else relevance)
    handles.remove()
    assert relative_error(lower, expected) < 1e-12
    assert len(maps) == 1 + (is_changed or name == 'transposed')


def test_first_layer():
    '''The first layer may have a rule of z+, and max poolings give all to the maximum.'''
    layer, x, relevance = layer_of('conv')
    x = x.clamp(-1, 1)
    bounds = {'first_layer': 'zbox', 'low': -1., 'high': 1.}
    for settings in (bounds, {'first_layer': 'zplus'}):
        expected = attribute(layer, ZPlus(coverage='even', **settings), x, relevance)
        assert torch.equal(attribute(layer, GeneralizedGamma(**settings), x, relevance), expected)
    pool = nn.MaxPool2d(2)
    lower = attribute(pool, GeneralizedGamma(), x, torch.ones_like(pool(x)))
    assert torch.equal(lower, F.max_unpool2d(*(
        torch.ones_like(elem) if num == 0 else elem for num, elem in enumerate(F.max_pool2d(x, 2, return_indices=True))
    ), 2, output_size=x.shape[2:]))


NORMS = {
    'layer': (lambda: nn.LayerNorm(6), (2, 5, 6), lambda m, x: F.layer_norm(x, (6,), m.weight, m.bias)),
    'layer of images': (
        lambda: nn.LayerNorm((3, 4, 4)), (2, 3, 4, 4), lambda m, x: F.layer_norm(x, (3, 4, 4), m.weight, m.bias)
    ),
    'group': (lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4), lambda m, x: F.group_norm(x, 2, m.weight, m.bias)),
    'group without weights': (lambda: nn.GroupNorm(3, 6, affine=False), (2, 6, 4), lambda m, x: F.group_norm(x, 3)),
    'instance': (
        lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4),
        lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias)
    ),
    'instance of torch': (
        lambda: nn.InstanceNorm1d(3), (2, 3, 7),
        lambda m, x: torch.instance_norm(x, None, None, None, None, True, 0., 1e-5, False)
    ),
    'native layer': (
        lambda: nn.LayerNorm(6), (2, 5, 6), lambda m, x: torch.native_layer_norm(x, (6,), m.weight, m.bias, 1e-5)[0]
    ),
    'native group': (
        lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4),
        lambda m, x: torch.native_group_norm(x, m.weight, m.bias, len(x), 6, 16, 2, 1e-5)[0]
    ),
    'native group by keywords': (
        lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4), lambda m, x: torch.native_group_norm(
            x, m.weight, m.bias, N=len(x), C=6, HxW=16, group=2, eps=1e-5
        )[0]
    ),
}


class Normalized(nn.Module):
    '''A normalization as a function between two layers.'''
    def __init__(self, norm, function, channels):
        super().__init__()
        self.norm, self.function = norm, function
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        '''Outputs.'''
        return self.head(self.function(self.norm, 2 * x).flatten(1))


@pytest.mark.parametrize('name', NORMS)
def test_normalization(name):
    '''It is Gradient x Input with a constant deviation, divided by the output, as a module and as a function.'''
    torch.manual_seed(0)
    build, shape, function = NORMS[name]
    norm, x = build().double(), torch.randn(shape).double() + .5
    for param in norm.parameters():
        nn.init.normal_(param)
    relevance = torch.randn_like(x)
    actual = attribute(norm, EpsilonNormalization(1e-12), x, relevance)
    output = norm(x).detach()
    # zeros are normalized to zeros, to which the bias is added
    blank, weight = norm(torch.zeros_like(x)).detach(), torch.ones(()).double()
    if isinstance(norm, nn.LayerNorm):
        size, weight = math.prod(norm.normalized_shape), norm.weight.detach()
    else:
        size = x[0].numel() // getattr(norm, 'num_groups', x.shape[1])
        if norm.weight is not None:
            weight = norm.weight.detach().view(-1, *(1,) * (x.ndim - 2))
    leaf = x.clone().requires_grad_()
    grouped = leaf.reshape(-1, size)
    deviation = (grouped.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt().detach()
    linear = ((grouped - grouped.mean(1, keepdim=True)) / deviation).view_as(x) * weight + blank
    assert relative_error(linear.detach(), output) < 1e-9
    expected, = torch.autograd.grad(linear, leaf, relevance / output)
    assert relative_error(actual, x * expected) < 1e-6
    maps = []
    for run in (function, lambda module, input: module(input)):
        torch.manual_seed(1)
        model = Normalized(norm, run, x[0].numel()).double().eval()
        with Gradient(model=model, composite=GammaLRP()) as attributor:
            maps.append(attributor(x, initial_relevance([1, 2]))[1])
    assert relative_error(*maps) < 1e-12


def test_other_normalization():
    '''Normalization without a mean of the input passes relevance on, and an input without a batch is an error.'''
    x = torch.randn(2, 3, 4, 4)
    for norm in (nn.RMSNorm(4), nn.BatchNorm2d(3).eval(), nn.LocalResponseNorm(2)):
        assert torch.equal(attribute(norm, EpsilonNormalization(), x, x + 1), x + 1)
    with pytest.raises(ValueError, match='needs a batch'):
        attribute(nn.InstanceNorm2d(3), EpsilonNormalization(), x[0], x[0])


def test_additions_and_products():
    '''LRP-epsilon for sums and for products of two signals, which it divides by.'''
    torch.manual_seed(0)
    addends, relevance = torch.randn(3, 2, 5).double(), torch.randn(2, 5).double()
    parts = EpsilonSplit(0.).split(relevance, *addends)
    for part, addend in zip(parts, addends):
        assert relative_error(part, relevance * addend / addends.sum(0)) < 1e-9
    assert relative_error(sum(EpsilonSplit(.1).split(relevance, *addends)), relevance) < 1e-12

    class Product(nn.Module):
        '''A product of matrices.'''
        def forward(self, left, right):
            '''Matrix product.'''
            return left @ right

    left, right = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 4, 5).double().requires_grad_()
    model, upper = Product(), torch.randn(2, 3, 5).double()
    handles = HalfEach(0.).register(model)
    actual = torch.autograd.grad(model(left, right), (left, right), upper)
    handles.remove()
    share = upper / (left @ right).detach() / 2
    assert relative_error(actual[0], left.detach() * (share @ right.detach().mT)) < 1e-9
    assert relative_error(actual[1], right.detach() * (left.detach().mT @ share)) < 1e-9


@pytest.mark.parametrize('build, message', [
    (lambda: GammaLRP(-1), 'conv_gamma=-1 is out of range'),
    (lambda: GammaLRP(linear_gamma=float('nan')), 'linear_gamma=nan'),
    (lambda: GammaLRP(addition='duplicate'), "addition='duplicate' is not one of 'epsilon', 'ratio', 'symmetric'"),
    (lambda: GammaLRP(first_layer='ones'), "first_layer='ones' is not one of 'gamma'"),
    (lambda: GammaLRP(first_layer='zbox'), 'needs the lowest and highest'),
    (lambda: GammaLRP(low=0., high=1.), "low=0.0 and high=1.0 are for first_layer='zbox', but first_layer='gamma'"),
    (lambda: GammaLRP(epsilon=-1.), 'epsilon=-1.0 is out of range'),
    (lambda: GammaLRP(epsilon=0.), 'epsilon=0.0: relevance of outputs of zero'),
    (lambda: EpsilonSplit(-1.), 'epsilon=-1.0 is out of range'),
    (lambda: HalfEach(-1.), 'epsilon=-1.0 is out of range'),
    (lambda: EpsilonNormalization(-1.), 'epsilon=-1.0 is out of range'),
])
def test_wrong_arguments(build, message):
    '''The error names the argument and its value.'''
    with pytest.raises(ValueError, match=message):
        build()


# -- networks ----------------------------------------------------------------------------------------------------------

def transformer(seed=0):
    '''A small vision transformer with random parameters.'''
    torch.manual_seed(seed)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).double().eval()
    for param in model.parameters():
        if param.ndim < 3:
            nn.init.normal_(param, std=.3)
    return model, torch.randn(2, 3, 32, 32).double()


class ConstantNorm(nn.LayerNorm):
    '''Layer normalization with a constant deviation.'''
    def forward(self, input):
        '''Normalize.'''
        deviation = (input.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt().detach()
        return (input - input.mean(-1, keepdim=True)) / deviation * self.weight + self.bias


class ConstantGate(nn.GELU):
    '''An activation whose gradient is its output by its input.'''
    def forward(self, input):
        '''Activate.'''
        return input * (F.gelu(input) / input).detach()


class ConstantWeights(nn.MultiheadAttention):
    '''Attention with constant weights.'''
    def forward(self, query, key, value, **settings):
        '''Attend.'''
        return super().forward(query.detach(), key.detach(), value, **settings)


@pytest.mark.parametrize('seed', range(3))
def test_gradient_times_input(seed):
    '''Without gamma, it is Gradient x Input of the network with constants in place of what is not linear.'''
    model, x = transformer(seed)
    composite = GammaLRP(0., 0., epsilon=1e-12, parameters='sink')
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(x, initial_relevance([1, 2]))
    kinds = {nn.LayerNorm: ConstantNorm, nn.GELU: ConstantGate, nn.MultiheadAttention: ConstantWeights}
    for module in model.modules():
        for kind, constant in kinds.items():
            if isinstance(module, kind):
                module.__class__ = constant
    leaf = x.clone().requires_grad_()
    constants = model(leaf)
    assert relative_error(constants.detach(), output.detach()) < 1e-9
    gradient, = torch.autograd.grad(constants[[0, 1], [1, 2]].sum(), leaf)
    assert relative_error(relevance, x * gradient) < 1e-5


@pytest.mark.parametrize('settings', [
    {}, {'attention': 'half'}, {'addition': 'ratio', 'parameters': 'sink'}, {'batch_norm': 'merge'}
], ids=str)
@pytest.mark.parametrize('build', [transformer, lambda: (
    randomize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).double().eval(), torch.rand(2, 3, 32, 32).double()
)], ids=['transformer', 'resnet'])
def test_networks(build, settings):
    '''What biases and constants keep is known, several targets and the graph have the same, and all are sums.'''
    model, x = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    composite = GammaLRP(**settings)
    starts = [initial_relevance([1, 2]), initial_relevance([3, 0])]
    with Gradient(model=model, composite=composite) as attributor:
        _, relevance = attributor(x, starts[0])
    with ManyTargets(model, GammaLRP(**settings)) as attributor:
        parts = attributor(x.clone(), starts)[1]
        both, = attributor(x.clone(), [lambda output: sum(start(output) for start in starts)])[1]
    assert relative_error(parts[0], relevance) < 1e-9
    assert relative_error(both, parts.sum(0)) < 1e-9
    if settings.get('batch_norm') != 'merge':
        graph = trace(model, GammaLRP(**settings), x)
        assert relative_error(graph(x, starts[0])[1], relevance) < 1e-7
    ledger = conservation_ledger(model, x, GammaLRP(**settings), starts[0])
    assert relative_error(ledger.relevance, relevance) < 1e-9
    unexplained = sum(row.lost_by['unexplained'] for row in ledger.rows if 'attention' not in row.name)
    assert float(unexplained.abs().max()) < 1e-6 * float(ledger.initial.abs().max() + relevance.abs().sum())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Heads(nn.Module):
    '''Two classifiers of one signal, whose logits are joined.'''
    def __init__(self, join):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.join = join

    def forward(self, x):
        '''Logits.'''
        h = self.body(x)
        return self.join(*(head(h) for head in self.heads))


@pytest.mark.parametrize('join', [
    lambda a, b: (a + b) / 2, lambda a, b: torch.stack([a, b]).mean(0), lambda a, b: a - b,
], ids=['sum', 'mean', 'difference'])
def test_joined_heads(join):
    '''Logits that are sums of those of several heads are explained as the one linear layer that these are.'''
    torch.manual_seed(0)
    model, x = Heads(join).double(), torch.randn(3, 6).double()
    for head in model.heads:
        nn.init.zeros_(head.bias)
    joined = nn.Linear(8, 4, bias=False).double()
    joined.weight = nn.Parameter(join(*(head.weight for head in model.heads)).detach())
    maps = []
    for network in (model, nn.Sequential(model.body, joined)):
        with Gradient(model=network, composite=GammaLRP(epsilon=1e-12)) as attributor:
            maps.append(attributor(x, initial_relevance([0, 1, 2], contrast='softmax', contrast_weight=.5))[1])
    assert relative_error(*maps) < 1e-7


@pytest.mark.parametrize('tail', [nn.BatchNorm1d(4), nn.GELU(), nn.Sigmoid()], ids=str)
def test_tail(tail):
    '''After the classifier, relevance is in proportion to its outputs, or there is an error.'''
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), randomize(tail)).eval()
    with pytest.raises(UnsupportedOperation, match='and with GammaLRP, relevance is divided by the outputs'):
        with Gradient(model=model, composite=GammaLRP()) as attributor:
            attributor(torch.randn(2, 6), initial_relevance([1, 2]))


def test_subsampling():
    '''Indexing with a step has the same rule as a first layer and after others: zeros receive nothing.'''
    class Model(nn.Module):
        '''Every other position.'''
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            '''Logits.'''
            return self.head(x[:, :, ::2, ::2].flatten(1))

    torch.manual_seed(0)
    x = torch.rand(2, 1, 4, 4)
    x[:, :, :, 1] = 0
    with Gradient(model=Model().eval(), composite=GammaLRP()) as attributor:
        _, relevance = attributor(x, initial_relevance([1, 2]))
    assert (relevance[x == 0] == 0).all() and (relevance[x != 0] != 0).all()


def test_half_precision():
    '''Relevance of a network in half precision is in single precision.'''
    model, x = transformer()
    with Gradient(model=model, composite=GammaLRP()) as attributor:
        _, expected = attributor(x, initial_relevance([1, 2]))
    with Gradient(model=model.bfloat16(), composite=GammaLRP()) as attributor:
        _, relevance = attributor(x.bfloat16(), initial_relevance([1, 2]))
    assert relevance.isfinite().all()
    assert torch.corrcoef(torch.stack([relevance.double().flatten(), expected.flatten()]))[0, 1] > 0.9


def test_method():
    '''Its name starts from the logit, so that negative ones turn no map over, and contrasts have their sign.'''
    method = Method('gamma_lrp:attention=half,contrast=softmax,contrast_weight=0.5')
    assert method.kind == 'ours' and method.composite(None).attention == 'half'
    model, x = transformer()
    with torch.no_grad():
        model.heads.head.bias.sub_(100.)

    class Subject:
        '''A classifier. Only its network is used.'''

    Subject.model = model
    for text in ('gamma_lrp', 'gamma_lrp:contrast=runner_up'):
        found = Method(text).attribute(Subject, x, [1, 2])
        assert found.value == 'logit' and found.signs == [1, 1]
