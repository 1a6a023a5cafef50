'''Rules of single layers, compared with naive implementations by dense matrices in float64, and the laws they keep.

Numbers of equations are those of Otsuki et al. 2024. Each matrix is built by pushing unit vectors through the layer.
'''
import copy
import itertools

import pytest
import torch
import zennit.rules
from torch.nn import functional as F

from zennit_resnet.layer import Addition, Gate, Padding, Subsampling
from zennit_resnet.rules import (
    PassThrough,
    RatioSplit,
    ResidualOnly,
    SignalTakesAll,
    SinglePass,
    SymmetricSplit,
    Uncrop,
    ZPlus,
    zplus,
)
from zennit_resnet.rules import _linear_maps as maps


def attribute(rule, module, *inputs, relevance=None):
    '''Lower relevance for each input, by a rule on its own. Returns (output, relevance, *lower).'''
    # the inputs of layers have been computed from others
    sources = [elem.clone().requires_grad_() for elem in inputs]
    handles = rule.register(module)
    try:
        output = module(*sources)
        if relevance is None:
            relevance = torch.rand_like(output)
        lower = torch.autograd.grad(output, sources, relevance, allow_unused=True)
    finally:
        handles.remove()
    return (output.detach(), relevance, *lower)


def matrix(function, shape):
    '''The dense matrix (input, output) of a linear function, of which the inputs have a shape without batch.'''
    size = torch.Size(shape).numel()
    with torch.no_grad():
        return function(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1)


def with_weight(module, weight):
    '''The module with another weight, and without bias.'''
    module = copy.deepcopy(module)
    module.weight.data = weight
    module.bias = None
    return module


def positive_negative(module, shape):
    '''Matrices of a layer's positive and negative weights. Each tap counts on its own, even if padding repeats it.'''
    if not hasattr(module, 'weight'):
        weights = matrix(module, shape)
        return weights, torch.zeros_like(weights)
    weight = module.weight.detach()
    return tuple(matrix(with_weight(module, elem), shape) for elem in (weight.clamp(min=0), weight.clamp(max=0)))


def connections(module, shape):
    '''How often an input is connected to each output.'''
    if not hasattr(module, 'weight'):
        return (matrix(module, shape) > 0).double()
    return matrix(with_weight(module, torch.ones_like(module.weight)), shape)


def distribute(contributions, relevance, spread=None):
    '''Relevance R_j over contributions z_ij of shape (batch, input, output): R'_i = sum_j z_ij / sum_k z_kj R_j.

    Relevance of units without any contribution is spread by another matrix, if any.
    '''
    total = contributions.sum(1, keepdim=True)
    shares = torch.where(total == 0, torch.zeros_like(contributions), contributions / total)
    if spread is not None:
        shares = torch.where(total == 0, (spread / spread.sum(0))[None], shares)
    return torch.einsum('bij,bj->bi', shares, relevance.flatten(1))


def naive_zplus(module, input, relevance, dead_units='spread'):
    '''Eq. (2) with contributions (w h)+.'''
    shape = input.shape[1:]
    positive, negative = positive_negative(module, shape)
    flat = input.flatten(1)[:, :, None]
    contributions = flat.clamp(min=0) * positive + flat.clamp(max=0) * negative
    spread = connections(module, shape) if dead_units == 'spread' else None
    return distribute(contributions, relevance, spread).view(input.shape)


def assert_close(actual, expected, tolerance=1e-10):
    '''Compare, relative to the largest value.'''
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((actual - expected).abs().max()) <= tolerance * scale


def assert_conserved(lower, relevance, tolerance=1e-10):
    '''Compare the sum of relevance for each sample.'''
    lower, relevance = (elem.double().flatten(1).sum(1) for elem in (lower, relevance))
    assert float(((lower - relevance) / relevance).abs().max()) <= tolerance


def make_input(shape, sign, dtype=torch.float64):
    '''Input with values of both signs, or after a ReLU.'''
    input = torch.randn(shape, dtype=dtype)
    return {'positive': input.clamp(min=0), 'signed': input, 'negative': -input.abs()}[sign]


LAYERS = {
    'linear': (lambda: torch.nn.Linear(7, 5), (7,)),
    'conv1d': (lambda: torch.nn.Conv1d(3, 4, 3), (3, 9)),
    'conv1d stride padding': (lambda: torch.nn.Conv1d(2, 4, 5, stride=2, padding=2), (2, 9)),
    'conv1d reflect': (lambda: torch.nn.Conv1d(2, 3, 5, padding=2, padding_mode='reflect'), (2, 7)),
    'conv2d': (lambda: torch.nn.Conv2d(3, 4, 3), (3, 5, 6)),
    'conv2d stride padding': (lambda: torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 6)),
    'conv2d same': (lambda: torch.nn.Conv2d(2, 3, 3, padding='same'), (2, 5, 4)),
    'conv2d same even dilated': (lambda: torch.nn.Conv2d(2, 3, (2, 4), padding='same', dilation=(1, 2)), (2, 5, 7)),
    'conv2d valid': (lambda: torch.nn.Conv2d(2, 3, 3, padding='valid', stride=2), (2, 5, 6)),
    'conv2d dilation': (lambda: torch.nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 6, 5)),
    'conv2d groups': (lambda: torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 5)),
    'conv2d depthwise': (lambda: torch.nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 5, 4)),
    'conv2d circular': (lambda: torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode='circular'), (2, 4, 5)),
    'conv2d circular stride': (
        lambda: torch.nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode='circular'), (2, 5, 5)
    ),
    'conv2d reflect': (lambda: torch.nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode='reflect'), (2, 4, 5)),
    'conv2d replicate': (lambda: torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode='replicate'), (2, 4, 5)),
    'conv2d circular same': (
        lambda: torch.nn.Conv2d(2, 3, (2, 3), padding='same', padding_mode='circular'), (2, 4, 5)
    ),
    'conv2d rectangular': (lambda: torch.nn.Conv2d(2, 3, (1, 3), stride=(1, 2), padding=(0, 1)), (2, 4, 7)),
    'conv3d': (lambda: torch.nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 3)),
    'conv3d groups': (lambda: torch.nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 0), groups=2), (2, 2, 4, 3)),
    'transposed 1d': (lambda: torch.nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 5)),
    'transposed 2d': (lambda: torch.nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 3)),
    'transposed 2d groups': (lambda: torch.nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), (4, 3, 3)),
    'transposed 3d': (lambda: torch.nn.ConvTranspose3d(2, 2, 2, dilation=(1, 2, 1)), (2, 2, 3, 2)),
    'average 1d': (lambda: torch.nn.AvgPool1d(3, stride=2, padding=1), (2, 7)),
    'average 2d': (lambda: torch.nn.AvgPool2d(2), (3, 5, 6)),
    'average 2d padding': (lambda: torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 5, 6)),
    'average 2d ceil': (lambda: torch.nn.AvgPool2d(3, 2, ceil_mode=True), (2, 6, 6)),
    'average 3d': (lambda: torch.nn.AvgPool3d(2, stride=1), (1, 3, 4, 3)),
    'adaptive 1d': (lambda: torch.nn.AdaptiveAvgPool1d(3), (2, 7)),
    'adaptive 2d': (lambda: torch.nn.AdaptiveAvgPool2d((2, 3)), (3, 5, 7)),
    'adaptive 2d global': (lambda: torch.nn.AdaptiveAvgPool2d(1), (3, 4, 5)),
}
CONVOLUTIONS = [name for name in LAYERS if name.startswith('conv')]


# -- z+ ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('sign', ['positive', 'signed', 'negative'])
@pytest.mark.parametrize('name', LAYERS)
def test_zplus(name, sign):
    '''Eq. (2) for each layer, which conserves relevance.'''
    build, shape = LAYERS[name]
    module = build().double()
    input = make_input((2, *shape), sign)
    expected_output = module(input)
    output, relevance, lower = attribute(ZPlus(), module, input)
    assert torch.equal(output, expected_output)
    assert_close(lower, naive_zplus(module, input, relevance))
    assert_conserved(lower, relevance)
    assert float(lower.min()) >= 0


@pytest.mark.parametrize('shape', [(7,), (2, 7), (2, 3, 7)])
def test_zplus_linear_dimensions(shape):
    '''Linear layers take any number of dimensions, even none for the batch.'''
    module = torch.nn.Linear(7, 5).double()
    input = make_input(shape, 'signed')
    _, relevance, lower = attribute(ZPlus(), module, input)
    expected = naive_zplus(module, input.reshape(-1, 7), relevance.reshape(-1, 5))
    assert_close(lower, expected.view(shape))


@pytest.mark.parametrize('sign', ['positive', 'signed'])
@pytest.mark.parametrize('name', ['linear', *CONVOLUTIONS, 'transposed 2d'])
def test_zplus_zennit(name, sign):
    '''Zennit's rule of the same name, without bias.'''
    build, shape = LAYERS[name]
    module = build().double()
    input = make_input((2, *shape), sign) + .1
    _, relevance, lower = attribute(ZPlus(dead_units='drop'), module, input)
    _, _, expected = attribute(zennit.rules.ZPlus(1e-12, zero_params='bias'), module, input, relevance=relevance)
    assert_close(lower, expected, 1e-6)


def test_zplus_ignores_bias():
    '''The bias has no part in the rule.'''
    module = torch.nn.Conv2d(2, 3, 3).double()
    input = make_input((1, 2, 5, 5), 'signed')
    _, relevance, lower = attribute(ZPlus(), module, input)
    module.bias.data += 10.
    assert torch.equal(attribute(ZPlus(), module, input, relevance=relevance)[2], lower)


def test_zplus_after_relu():
    '''The input is known to be non-negative after a ReLU, which is not to change the rule.'''
    module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(2, 3, 3)).double()
    input = make_input((2, 2, 5, 5), 'signed')
    handles = [PassThrough().register(module[0]), ZPlus().register(module[1])]
    source = input.clone().requires_grad_()
    output = module(source)
    relevance = torch.rand_like(output)
    lower, = torch.autograd.grad(output, source, relevance)
    for handle in handles:
        handle.remove()
    assert_close(lower, naive_zplus(module[1], input.clamp(min=0), relevance))


@pytest.mark.parametrize('module', [
    torch.nn.MaxPool1d(2), torch.nn.MaxPool1d(3, 2, 1), torch.nn.MaxPool2d(2), torch.nn.MaxPool2d(3, 2, 1),
    torch.nn.MaxPool2d(3, 2, 1, dilation=2), torch.nn.MaxPool2d(2, 2, ceil_mode=True), torch.nn.MaxPool2d((1, 3), 2),
    torch.nn.MaxPool3d(2, 1), torch.nn.AdaptiveMaxPool2d((2, 3)),
], ids=str)
@pytest.mark.parametrize('dead_units', ['spread', 'drop'])
@pytest.mark.parametrize('ties', [False, True])
def test_maxpool_winner(module, dead_units, ties):
    '''The first maximum of each window in row-major order takes all.'''
    num = int(type(module).__name__[-2])
    shape = (2, 2, *(4, 7, 6)[3 - num:])
    # with ties, all values are integers: many windows have several maxima, and some have none above zero
    input = torch.randint(3, shape).double() if ties else torch.rand(shape, dtype=torch.float64)
    _, relevance, lower = attribute(ZPlus(dead_units=dead_units), module, input)
    output, indices = copy.copy(module), None
    output.return_indices = True
    value, indices = output(input)
    share = relevance * (value > 0) if dead_units == 'drop' else relevance
    expected = torch.zeros_like(input).flatten(2)
    for key in itertools.product(range(2), range(2)):
        for index, part in zip(indices[key].flatten().tolist(), share[key].flatten().tolist()):
            expected[(*key, index)] += part
    assert_close(lower, expected.view(shape))
    # torch itself has the first one
    if ties and isinstance(module, torch.nn.MaxPool2d) and module.padding == 0 and module.kernel_size == 2:
        window = input[0, 0, :2, :2].flatten()
        assert indices[0, 0, 0, 0] == [0, 1, 7 - 1, 7][[num for num in range(4) if window[num] == window.max()][0]]


@pytest.mark.parametrize('module', [
    torch.nn.MaxPool1d(3, 2, 1), torch.nn.MaxPool2d(2), torch.nn.MaxPool2d(3, 2, 1), torch.nn.MaxPool2d((1, 3), (2, 1)),
    torch.nn.MaxPool2d(2, 2, ceil_mode=True), torch.nn.MaxPool3d(2, 1),
], ids=str)
def test_maxpool_average(module):
    '''An average pooling with kernel, stride and padding of the max pooling.'''
    num = int(type(module).__name__[-2])
    kind = {1: torch.nn.AvgPool1d, 2: torch.nn.AvgPool2d, 3: torch.nn.AvgPool3d}[num]
    average = kind(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    input = make_input((2, 2, *(4, 7, 6)[3 - num:]), 'positive')
    _, relevance, lower = attribute(ZPlus(maxpool='average'), module, input)
    assert_close(lower, naive_zplus(average, input, relevance))
    assert_conserved(lower, relevance)


def test_maxpool_avg2x2():
    '''An average over 2 x 2 with stride 2, whatever the max pooling (the published code).'''
    module = torch.nn.MaxPool2d(3, 2, 1)
    input = make_input((2, 2, 8, 6), 'positive')
    _, relevance, lower = attribute(ZPlus(maxpool='avg2x2'), module, input)
    assert_close(lower, naive_zplus(torch.nn.AvgPool2d(2), input, relevance))


@pytest.mark.parametrize('module', [torch.nn.AdaptiveMaxPool2d(2), torch.nn.MaxPool2d(2, dilation=2)], ids=str)
def test_maxpool_average_without_window(module):
    '''There is a clear error if there is no window to average over.'''
    with pytest.raises(ValueError, match='winner'):
        attribute(ZPlus(maxpool='average'), module, make_input((1, 1, 6, 6), 'positive'))


@pytest.mark.parametrize('maxpool', ['winner', 'average'])
def test_maxpool_negative(maxpool):
    '''Below a max pooling without a ReLU before it, relevance is conserved as well.'''
    input = make_input((2, 2, 7, 7), 'negative')
    _, relevance, lower = attribute(ZPlus(maxpool=maxpool), torch.nn.MaxPool2d(3, 2, 1), input)
    assert_conserved(lower, relevance)


# -- first layer -------------------------------------------------------------------------------------------------------

def box():
    '''Lowest and highest values of normalized photographs.'''
    low = torch.tensor([-2.2, -2.0, -1.8], dtype=torch.float64).view(1, 3, 1, 1)
    return low, low + 4.5


def first_contributions(variant, module, input):
    '''Contributions of shape (batch, input, output) to the first layer.'''
    shape = input.shape[1:]
    flat = input.flatten(1)[:, :, None]
    positive, negative = positive_negative(module, shape)
    low, high = (elem.expand(input.shape).flatten(1)[:, :, None] for elem in box())
    return {
        'zplus': lambda: flat.clamp(min=0) * positive + flat.clamp(max=0) * negative,
        'literal': lambda: flat * positive,
        'ones': lambda: torch.ones_like(flat) * positive,
        'zbox': lambda: flat * (positive + negative) - low * positive - high * negative,
        'wsquare': lambda: torch.ones_like(flat) * matrix(with_weight(module, module.weight.detach() ** 2), shape),
        'flat': lambda: torch.ones_like(flat) * connections(module, shape),
    }[variant]()


def first_rule(variant, **kwargs):
    '''The rule with a variant for the first layer.'''
    if variant == 'zbox':
        kwargs['low'], kwargs['high'] = box()
    return ZPlus(first_layer=variant, **kwargs)


@pytest.mark.parametrize('module', [
    torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
    torch.nn.Conv2d(3, 6, 3, padding=1, groups=3, padding_mode='circular'), torch.nn.Conv2d(3, 4, (1, 3), dilation=2),
], ids=str)
@pytest.mark.parametrize('variant', ['zplus', 'literal', 'ones', 'zbox', 'wsquare', 'flat'])
def test_first_layer(module, variant):
    '''Each variant of the first layer has its contributions, of which the shares distribute relevance.'''
    module = copy.deepcopy(module).double()
    input = make_input((2, 3, 6, 5), 'signed').clamp(-1.8, 2.3)
    _, relevance, lower = attribute(first_rule(variant), module, input)
    expected = distribute(first_contributions(variant, module, input), relevance, connections(module, (3, 6, 5)))
    assert_close(lower, expected.view(input.shape), 1e-8)
    assert_conserved(lower, relevance, 1e-8)


@pytest.mark.parametrize('variant, zennit_rule', [
    ('zbox', lambda: zennit.rules.ZBox(*box(), stabilizer=1e-12, zero_params='bias')),
    ('wsquare', lambda: zennit.rules.WSquare(stabilizer=1e-12, zero_params='bias')),
    ('flat', lambda: zennit.rules.Flat(stabilizer=1e-12)),
], ids=['zbox', 'wsquare', 'flat'])
@pytest.mark.parametrize('stride, padding', [(1, 0), (2, 1)])
def test_first_layer_zennit(variant, zennit_rule, stride, padding):
    '''Zennit's rules of the same names.'''
    module = torch.nn.Conv2d(3, 4, 3, stride, padding).double()
    input = make_input((2, 3, 6, 5), 'signed').clamp(-1.8, 2.3)
    _, relevance, lower = attribute(first_rule(variant), module, input)
    _, _, expected = attribute(zennit_rule(), module, input, relevance=relevance)
    assert_close(lower, expected, 1e-6)


@pytest.mark.parametrize('variant', ['literal', 'ones', 'zbox', 'wsquare', 'flat'])
def test_first_layer_linear(variant):
    '''A linear layer can be the first one as well.'''
    module = torch.nn.Linear(6, 4).double()
    input = make_input((2, 6), 'signed')
    rule = ZPlus(first_layer=variant, **({'low': -3., 'high': 3.} if variant == 'zbox' else {}))
    _, relevance, lower = attribute(rule, module, input)
    weight = module.weight.detach().t()
    flat = input[:, :, None]
    contributions = {
        'literal': flat * weight.clamp(min=0),
        'ones': weight.clamp(min=0).expand(2, -1, -1),
        'zbox': flat * weight + 3. * weight.clamp(min=0) - 3. * weight.clamp(max=0),
        'wsquare': (weight ** 2).expand(2, -1, -1),
        'flat': torch.ones_like(weight).expand(2, -1, -1),
    }[variant]
    assert_close(lower, distribute(contributions, relevance, torch.ones_like(weight)), 1e-8)


def network_relevance(modules, rules, input):
    '''Relevance at the input of each of a sequence of modules, and at the output.'''
    handles = [rule.register(module) for rule, module in zip(rules, modules) if rule is not None]
    values = [input.clone().requires_grad_()]
    for module in modules:
        values.append(module(values[-1]))
    relevance = torch.rand_like(values[-1])
    lower = torch.autograd.grad(values[-1], values[:-1], relevance)
    for handle in handles:
        handle.remove()
    return [elem.detach() for elem in values], [*lower, relevance]


@pytest.mark.parametrize('variant', ['flat', 'ones', 'wsquare', 'zbox'])
def test_first_layer_by_data_flow(variant):
    '''A convolution after another one is not the first, whatever is between them, and in whichever order they run.'''
    modules = [
        torch.nn.Conv2d(3, 3, 3).double(), torch.nn.BatchNorm2d(3).double().eval(), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Conv2d(3, 2, 3).double(), torch.nn.Flatten(), torch.nn.Linear(8, 3).double(),
    ]
    rules = [first_rule(variant), PassThrough(), PassThrough(), ZPlus(), first_rule(variant), None, first_rule(variant)]
    values, relevance = network_relevance(modules, rules, make_input((2, 3, 11, 11), 'signed').clamp(-1.8, 2.3))
    for num in (4, 6):
        assert_close(relevance[num], naive_zplus(modules[num], values[num], relevance[num + 1]))
    expected = distribute(first_contributions(variant, modules[0], values[0]), relevance[1])
    assert_close(relevance[0], expected.view(values[0].shape))


@pytest.mark.parametrize('before', [
    torch.nn.BatchNorm2d(3).double().eval(), torch.nn.ZeroPad2d(1), torch.nn.Identity(), torch.nn.AvgPool2d(2),
], ids=lambda module: type(module).__name__)
def test_first_layer_after_preprocessing(before):
    '''The first convolution is the first, even if the input is normalized, padded or pooled before.'''
    modules = [before, torch.nn.Conv2d(3, 4, 3).double()]
    rule = PassThrough() if isinstance(before, torch.nn.BatchNorm2d) else ZPlus() if hasattr(before, 'stride') else None
    input = make_input((2, 3, 8, 8), 'signed')
    values, relevance = network_relevance(modules, [rule, ZPlus(first_layer='flat')], input)
    expected = distribute(first_contributions('flat', modules[1], values[1]), relevance[2])
    assert_close(relevance[1], expected.view(values[1].shape))


def test_first_layer_two_inputs_of_network():
    '''Two convolutions may both be first.'''
    module = torch.nn.Conv2d(3, 4, 3).double()
    left, right = (make_input((1, 3, 5, 5), 'signed').requires_grad_() for _ in range(2))
    handles = ZPlus(first_layer='flat').register(module)
    output = module(left) + module(right)
    relevance = torch.rand_like(output)
    lower = torch.autograd.grad(output, (left, right), relevance)
    handles.remove()
    assert torch.equal(*lower)
    assert_close(lower[0].flatten(1), distribute(first_contributions('flat', module, left.detach()), relevance))


# -- dead units and stabilizer -----------------------------------------------------------------------------------------

DEAD = ['linear', 'conv1d stride padding', 'conv2d', 'conv2d stride padding', 'conv2d same', 'conv2d dilation',
        'conv2d groups', 'conv2d circular', 'conv3d', 'transposed 2d', 'transposed 2d groups', 'average 2d padding',
        'average 2d ceil', 'adaptive 2d']


def with_dead_units(name):
    '''A layer and non-negative input in which some of the units have no positive contribution.'''
    build, shape = LAYERS[name]
    module = build().double()
    if hasattr(module, 'weight'):
        # one filter without positive weights
        module.weight.data[0] = -module.weight.data[0].abs()
    input = make_input((2, *shape), 'positive')
    # an empty region in one of the samples
    input[0, ..., :3] = 0.
    if name == 'linear':
        input[0] = 0.
    return module, input


@pytest.mark.parametrize('dead_units', ['spread', 'drop'])
@pytest.mark.parametrize('name', DEAD)
def test_dead_units(name, dead_units):
    '''Relevance of dead units is spread evenly over their inputs, or dropped.'''
    module, input = with_dead_units(name)
    _, relevance, lower = attribute(ZPlus(dead_units=dead_units), module, input)
    assert_close(lower, naive_zplus(module, input, relevance, dead_units))
    positive, _ = positive_negative(module, input.shape[1:])
    dead = (input.flatten(1) @ positive) == 0
    assert bool(dead.any()) and not bool(dead.all())
    lost = (relevance.flatten(1) * dead).sum(1) if dead_units == 'drop' else 0
    assert torch.allclose(lower.flatten(1).sum(1) + lost, relevance.flatten(1).sum(1), rtol=1e-12)


def test_dead_units_only():
    '''Spreading does not change the relevance of other units, and no relevance goes to the padding.'''
    module = torch.nn.Conv2d(1, 2, 3, padding=1, bias=False).double()
    module.weight.data[0] = -1.
    module.weight.data[1] = 1.
    input = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    relevance = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    relevance[0, 1, 2, 2] = 1.
    _, _, alive = attribute(ZPlus(), module, input, relevance=relevance)
    relevance[0, 0, 0, 0] = 8.
    _, _, lower = attribute(ZPlus(), module, input, relevance=relevance)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    # the unit in the corner has four inputs inside the image
    expected[:2, :2] = 2.
    assert torch.allclose((lower - alive)[0, 0], expected)


@pytest.mark.parametrize('projection', ['spread', 'literal'])
def test_dead_units_projection(projection):
    '''Dead units of a strided projection are spread over the stride cell as well.'''
    module = torch.nn.Conv2d(2, 1, 1, stride=2, bias=False).double()
    input = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
    relevance = torch.arange(1, 7, dtype=torch.float64).view(1, 1, 2, 3)
    _, _, lower = attribute(ZPlus(projection=projection), module, input, relevance=relevance)
    expected = torch.zeros_like(input)
    for row, col in itertools.product(range(2), range(3)):
        cell = (..., slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2)) if projection == 'spread' else (
            ..., 2 * row, 2 * col
        )
        expected[cell] = relevance[0, 0, row, col] / expected[cell].numel()
    assert_close(lower, expected)


def test_dead_units_per_sample():
    '''Which units are dead is decided for each sample on its own, whatever the scale of others.'''
    module = torch.nn.Conv2d(2, 3, 3, padding=1).double()
    input = make_input((2, 2, 5, 5), 'positive')
    input[1] *= 1e-30
    _, relevance, lower = attribute(ZPlus(), module, input)
    assert_close(lower[1:], naive_zplus(module, input[1:] * 1e30, relevance[1:]))


@pytest.mark.parametrize('dead_units', ['spread', 'drop'])
@pytest.mark.parametrize('sign', ['positive', 'signed'])
def test_stabilizer(sign, dead_units):
    '''A float is added with the sign of the denominator, a callable is applied as it is.'''
    module = torch.nn.Conv2d(2, 3, 3, padding=1).double()
    module.weight.data[:, 0].abs_()
    input = make_input((2, 2, 5, 5), sign) + .1
    positive, negative = positive_negative(module, input.shape[1:])
    flat = input.flatten(1)[:, :, None]
    contributions = flat.clamp(min=0) * positive + flat.clamp(max=0) * negative
    total = contributions.sum(1)
    assert float(total.min()) > 0
    relevance = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    for stabilizer, stabilized in ((.5, total + .5), (lambda value: 2. * value + 1., 2. * total + 1.)):
        rule = ZPlus(stabilizer=stabilizer, dead_units=dead_units)
        lower = attribute(rule, module, input, relevance=relevance)[2]
        expected = torch.einsum('bij,bj->bi', contributions, relevance.flatten(1) / stabilized)
        assert_close(lower, expected.view(input.shape))


def test_stabilizer_negative_denominator():
    '''The stabilizer has the sign of the denominator, where contributions are signed.'''
    module = torch.nn.Conv2d(3, 3, 3, padding=1).double()
    input = make_input((1, 3, 5, 5), 'negative')
    contributions = first_contributions('literal', module, input)
    total = contributions.sum(1)
    assert float(total.max()) < 0
    _, relevance, lower = attribute(ZPlus(stabilizer=.5, first_layer='literal'), module, input)
    expected = torch.einsum('bij,bj->bi', contributions, relevance.flatten(1) / (total - .5))
    assert_close(lower, expected.view(input.shape))


# -- strided projections -----------------------------------------------------------------------------------------------

def average_cells(length, step):
    '''Matrix (input, cell) of averages over cells, of which the last may be incomplete.'''
    average = torch.zeros(length, (length - 1) // step + 1, dtype=torch.float64)
    for start in range(0, length, step):
        average[start:start + step, start // step] = 1 / len(average[start:start + step])
    return average


@pytest.mark.parametrize('size', [(4, 6), (5, 7), (7, 4), (2, 9), (1, 1)])
@pytest.mark.parametrize('stride', [2, 3, (2, 1), (1, 3)])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('sign', ['positive', 'signed'])
def test_projection_spread(size, stride, groups, sign):
    '''z = w+ * avgpool_s(h), R' = h avgpool_s^T(w+^T (R / z)).'''
    module = torch.nn.Conv2d(4, 6, 1, stride=stride, groups=groups).double()
    steps = (stride,) * 2 if isinstance(stride, int) else stride
    input = make_input((2, 4, *size), sign) + (.01 if sign == 'positive' else 0.)
    _, relevance, lower = attribute(ZPlus(), module, input)

    average = torch.kron(*(average_cells(length, step) for length, step in zip(size, steps)))
    weight = torch.zeros(6, 4, dtype=torch.float64)
    for num in range(6):
        start = num // (6 // groups) * (4 // groups)
        weight[num, start:start + 4 // groups] = module.weight.detach()[num, :, 0, 0]
    positive, negative = (
        torch.kron(elem.t().contiguous(), average) for elem in (weight.clamp(min=0), weight.clamp(max=0))
    )
    flat = input.flatten(1)[:, :, None]
    contributions = flat.clamp(min=0) * positive + flat.clamp(max=0) * negative
    spread = torch.kron((weight != 0).double().t().contiguous(), average)
    assert_close(lower, distribute(contributions, relevance, spread).view(input.shape))
    assert_conserved(lower, relevance)
    # no gaps are left
    assert sign == 'signed' or bool((lower.sum(1) > 0).all())


@pytest.mark.parametrize('size', [(4, 6), (5, 7)])
def test_projection_literal(size):
    '''Literally, only the positions which are read receive relevance.'''
    module = torch.nn.Conv2d(4, 6, 1, stride=2).double()
    input = make_input((2, 4, *size), 'positive')
    _, relevance, lower = attribute(ZPlus(projection='literal'), module, input)
    assert_close(lower, naive_zplus(module, input, relevance))
    read = torch.zeros(size, dtype=torch.bool)
    read[::2, ::2] = True
    assert float(lower[..., ~read].abs().max()) == 0


SPREADING = [
    {'kernel_size': 1, 'stride': 2, 'padding': 1}, {'kernel_size': 1, 'stride': 3, 'padding': 1},
    {'kernel_size': 2, 'stride': 3}, {'kernel_size': 2, 'stride': 3, 'padding': 1}, {'kernel_size': 2, 'stride': 5},
    {'kernel_size': 3, 'stride': 4, 'padding': 1}, {'kernel_size': (1, 3), 'stride': 2},
    {'kernel_size': (1, 3), 'stride': 2, 'padding': (0, 1)}, {'kernel_size': (3, 1), 'stride': (2, 3)},
    {'kernel_size': (1, 3), 'stride': 2, 'groups': 2}, {'kernel_size': 2, 'stride': 3, 'groups': 2},
    {'kernel_size': 2, 'stride': 3, 'dilation': 2}, {'kernel_size': 1, 'stride': 2, 'padding': (0, 2)},
    {'kernel_size': (1, 2), 'stride': 3, 'dilation': (1, 2), 'padding': (0, 1)},
    {'kernel_size': 1, 'stride': 2, 'padding': 1, 'padding_mode': 'reflect'},
    {'kernel_size': 2, 'stride': 3, 'padding': 1, 'padding_mode': 'circular'},
]


@pytest.mark.parametrize('size', [(7, 7), (8, 9), (9, 8), (10, 11)])
@pytest.mark.parametrize('settings', SPREADING, ids=str)
@pytest.mark.parametrize('coverage', ['literal', 'even'])
def test_projection_spread_conserves(settings, size, coverage):
    '''Relevance is conserved for all strides beyond the kernel, with odd sizes, padding, groups and dilation.'''
    module = torch.nn.Conv2d(2, 4, **settings).double()
    input = make_input((2, 2, *size), 'positive')
    relevance = torch.rand_like(module(input).detach())
    if module.padding_mode == 'zeros':
        # there is nowhere to go for the relevance of units which see only padding, see below
        for dim, (length, kernel, step, dil, pad) in enumerate(zip(
            size, module.kernel_size, module.stride, module.dilation, module.padding
        ), 2):
            starts = [num * step - pad for num in range(relevance.shape[dim])]
            seen = [start < length and start + max(step, (kernel - 1) * dil + 1) > 0 for start in starts]
            relevance *= torch.tensor(seen).double().view(-1, *(1,) * (3 - dim))
    _, _, lower = attribute(ZPlus(coverage=coverage), module, input, relevance=relevance)
    assert lower.shape == input.shape
    assert_conserved(lower, relevance)
    assert float(lower.min()) >= 0


@pytest.mark.parametrize('projection', ['spread', 'literal'])
def test_units_without_inputs(projection):
    '''Units which see nothing but padding have no inputs to give relevance to. Nothing else is lost.'''
    module = torch.nn.Conv2d(1, 1, 1, stride=2, padding=1).double()
    module.weight.data.abs_()
    input = torch.rand(1, 1, 4, 4, dtype=torch.float64) + .1
    _, relevance, lower = attribute(ZPlus(projection=projection), module, input)
    # with cells of two positions, only the first positions of the last cells are read, which are inside
    seen = relevance if projection == 'spread' else relevance[..., 1:, 1:]
    assert bool(lower.isfinite().all())
    assert_conserved(lower, seen)


@pytest.mark.parametrize('settings, size', [
    ({'kernel_size': (1, 3), 'stride': 2}, (6, 7)), ({'kernel_size': (3, 1), 'stride': (2, 3)}, (7, 6)),
    ({'kernel_size': 2, 'stride': 3}, (9, 6)), ({'kernel_size': 2, 'stride': 5}, (10, 5)),
], ids=str)
def test_projection_spread_leaves_no_gaps(settings, size):
    '''Each position which is in a stride cell of the kernel receives relevance.'''
    module = torch.nn.Conv2d(2, 4, **settings).double()
    module.weight.data.abs_()
    input = torch.rand(1, 2, *size, dtype=torch.float64) + .1
    _, _, lower = attribute(ZPlus(), module, input)
    assert bool((lower > 0).all())


def test_projection_spread_parts():
    '''Each tap of a kernel of two with stride three reads the average of its part of the cell.'''
    module = torch.nn.Conv1d(1, 1, 2, stride=3, bias=False).double()
    module.weight.data = torch.tensor([[[1., 3.]]], dtype=torch.float64)
    input = torch.tensor([[[1., 3., 2., 0., 4., 1.]]], dtype=torch.float64)
    relevance = torch.tensor([[[8., 5.]]], dtype=torch.float64)
    _, _, lower = attribute(ZPlus(), module, input, relevance=relevance)
    # denominators (1 + 3) / 2 + 3 * 2 and (0 + 4) / 2 + 3 * 1
    assert torch.allclose(lower, torch.tensor([[[.5, 1.5, 6., 0., 2., 3.]]], dtype=torch.float64))


@pytest.mark.parametrize('name', LAYERS)
def test_projection_spread_changes_nothing_else(name):
    '''Layers of which the stride does not exceed the kernel are not changed, not even in rounding.'''
    build, shape = LAYERS[name]
    module = build().double()
    input = make_input((2, *shape), 'signed')
    _, relevance, lower = attribute(ZPlus(projection='spread'), module, input)
    assert torch.equal(attribute(ZPlus(projection='literal'), module, input, relevance=relevance)[2], lower)


def test_subsampling():
    '''Indexing with a step is spread over cells like a projection.'''
    module = Subsampling()
    module.steps = (2, 2)
    module.function = lambda tensor: tensor[:, :, ::2, ::2]
    input = make_input((2, 3, 5, 6), 'positive') + .01
    _, relevance, lower = attribute(ZPlus(), module, input)
    average = torch.kron(average_cells(5, 2), average_cells(6, 2))
    weight = torch.kron(torch.eye(3, dtype=torch.float64), average)
    assert_close(lower, distribute(input.flatten(1)[:, :, None] * weight, relevance).view(input.shape))


# -- even coverage -----------------------------------------------------------------------------------------------------

OVERLAPS = [(7, 2, 3), (3, 2, 1), (5, 3, 2), (4, 2, 1), (2, 2, 0), (3, 3, 0), ((3, 5), (2, 3), 1), (3, (1, 2), 1)]


def interior(relevance, margin=8):
    '''Relevance away from the border.'''
    return relevance[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize('settings', OVERLAPS, ids=str)
def test_coverage_even_convolution(settings):
    '''A uniform input has the same relevance everywhere, whatever the filters, instead of a lattice of the stride.'''
    module = torch.nn.Conv2d(3, 5, *settings).double()
    # where a filter has no positive weight at all, nothing can be scaled
    module.weight.data[:, 0].abs_()
    input = torch.ones(1, 3, 40, 41, dtype=torch.float64)
    relevance = torch.ones_like(module(input).detach())
    lower = {
        coverage: attribute(ZPlus(coverage=coverage), module, input, relevance=relevance)[2]
        for coverage in ('even', 'literal')
    }
    for elem in lower.values():
        assert_conserved(elem, relevance)
    heatmap = interior(lower['even'].sum(1))
    assert float(heatmap.max() / heatmap.min()) - 1 < 1e-10
    heatmap = interior(lower['literal'].sum(1))
    assert float(heatmap.max() / heatmap.min()) - 1 > 1e-2


@pytest.mark.parametrize('variant', ['zplus', 'ones', 'wsquare', 'flat'])
def test_coverage_even_first_layer(variant):
    '''The same holds for variants of the first layer.'''
    module = torch.nn.Conv2d(3, 5, 7, 2, 3).double()
    input = torch.ones(1, 3, 40, 40, dtype=torch.float64)
    relevance = torch.ones_like(module(input).detach())
    lower = attribute(first_rule(variant, coverage='even'), module, input, relevance=relevance)[2]
    assert_conserved(lower, relevance)
    heatmap = interior(lower.sum(1))
    assert float(heatmap.max() / heatmap.min()) - 1 < 1e-10


@pytest.mark.parametrize('settings', [elem for elem in OVERLAPS if elem[:2] not in ((2, 2), (3, 3))], ids=str)
@pytest.mark.parametrize('maxpool', ['winner', 'average'])
@pytest.mark.parametrize('dead_units', ['spread', 'drop'])
def test_coverage_even_maxpool(settings, maxpool, dead_units):
    '''The same holds for max pooling.'''
    module = torch.nn.MaxPool2d(*settings)
    input = torch.ones(1, 2, 40, 41, dtype=torch.float64)
    relevance = torch.ones_like(module(input))
    rule = ZPlus(coverage='even', maxpool=maxpool, dead_units=dead_units)
    lower = attribute(rule, module, input, relevance=relevance)[2]
    assert_conserved(lower, relevance)
    heatmap = interior(lower)
    assert float(heatmap.max() / heatmap.min()) - 1 < 1e-10
    rule = ZPlus(coverage='literal', maxpool=maxpool, dead_units=dead_units)
    heatmap = interior(attribute(rule, module, input, relevance=relevance)[2])
    # the average over a window which is a multiple of the stride is even already
    assert maxpool == 'average' and settings[0] == 4 or float(heatmap.max()) > 1.2 * float(heatmap.min())


@pytest.mark.parametrize('name', [name for name in LAYERS if name != 'linear'])
@pytest.mark.parametrize('sign', ['positive', 'signed'])
def test_coverage_even_conserves(name, sign):
    '''Relevance is conserved for each layer, for random inputs as well.'''
    build, shape = LAYERS[name]
    module = build().double()
    _, relevance, lower = attribute(ZPlus(coverage='even'), module, make_input((2, *shape), sign))
    assert_conserved(lower, relevance)


@pytest.mark.parametrize('module, shape', [
    (torch.nn.Conv2d(2, 3, 3, padding=1), (2, 6, 6)), (torch.nn.Conv2d(2, 3, 3, padding='same', dilation=2), (2, 6, 6)),
    (torch.nn.Conv2d(2, 3, 1, stride=2), (2, 5, 6)), (torch.nn.Linear(5, 4), (5,)), (torch.nn.MaxPool2d(2), (2, 6, 6)),
    (torch.nn.MaxPool2d(3, 1, 1), (2, 6, 6)), (torch.nn.AvgPool2d(3, 2), (2, 7, 7)),
    (torch.nn.AdaptiveMaxPool2d(2), (2, 6, 6)), (torch.nn.ConvTranspose2d(2, 3, 3, 2), (2, 4, 4)),
], ids=lambda value: str(value) if isinstance(value, torch.nn.Module) else '')
def test_coverage_even_changes_nothing_else(module, shape):
    '''Windows without overlap or stride are not changed.'''
    module = copy.deepcopy(module).double()
    input = make_input((2, *shape), 'positive')
    _, relevance, lower = attribute(ZPlus(coverage='even'), module, input)
    assert_close(attribute(ZPlus(coverage='literal'), module, input, relevance=relevance)[2], lower)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('kernel, stride', [((7, 7), (2, 2)), ((3, 5), (2, 3)), ((4, 3), (4, 1))])
def test_even_weight(kernel, stride, groups):
    '''The weights of each filter sum to the same at all positions modulo the stride, and to the same as before.'''
    module = torch.nn.Conv2d(4, 6, kernel, stride, groups=groups).double()
    weight = torch.rand_like(module.weight)
    scaled = maps.even_weight(module, weight.clone())
    phases = torch.stack([
        scaled[:, :, row::stride[0], col::stride[1]].sum((1, 2, 3))
        for row, col in itertools.product(*map(range, stride))
    ])
    assert torch.allclose(phases, phases[:1].expand_as(phases))
    assert torch.allclose(scaled.sum((1, 2, 3)), weight.sum((1, 2, 3)))


def test_even_weight_empty_phase():
    '''Positions without weight receive none, nor do filters without any weight break.'''
    module = torch.nn.Conv1d(1, 2, 4, 2).double()
    weight = torch.tensor([[[1., 0., 3., 0.]], [[0., 0., 0., 0.]]], dtype=torch.float64)
    scaled = maps.even_weight(module, weight.clone())
    assert torch.equal(scaled, weight)


@pytest.mark.parametrize('first_layer', ['zplus', 'ones', 'wsquare', 'flat'])
def test_large_linear(monkeypatch, first_layer):
    '''A large weight is used in parts.'''
    module, input = torch.nn.Linear(300, 70).double(), make_input((4, 300), 'signed')
    rule = ZPlus(first_layer=first_layer)
    _, relevance, expected = attribute(rule, module, input)
    sizes, linear = [], F.linear

    def spy(input, weight, bias=None):
        sizes.extend([len(weight)] if bias is None else [])
        return linear(input, weight, bias)

    monkeypatch.setattr(maps, 'LARGE', 10000)
    monkeypatch.setattr(zplus.F, 'linear', spy)
    assert_close(attribute(rule, copy.deepcopy(module), input, relevance=relevance)[2], expected)
    assert sizes[:3] == [33, 33, 4]


@pytest.mark.parametrize('kind, stride, size, is_whole', [
    (torch.nn.Conv1d, (3,), (9,), True), (torch.nn.Conv2d, (2, 2), (6, 8), True),
    (torch.nn.Conv2d, (1, 3), (5, 6), True), (torch.nn.Conv3d, (2, 1, 2), (4, 3, 2), True),
    (torch.nn.Conv2d, (2, 2), (6, 7), False),
])
@pytest.mark.parametrize('groups', [1, 2])
def test_convolve_cells(kind, stride, size, is_whole, groups):
    '''Averages of whole cells are the same as by average pooling, and so is the transposed map.'''
    module = kind(4, 6, 1, stride, groups=groups).double()
    input = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    assert maps.is_sparse(module)
    assert maps.whole_cells(module, input) == (stride if is_whole else None)
    padded = kind(4, 6, 1, stride, padding=1)
    assert maps.whole_cells(padded, input) is None
    if is_whole:
        shape = [length // step for length, step in zip(size, stride)]
        expected = maps.convolve(module, input, module.weight, shape, spread=True)
        output, transpose = maps.convolve_cells(module, input.detach(), module.weight.detach(), stride)
        assert_close(output, expected.detach())
        upper = torch.randn_like(output)
        assert_close(transpose(upper), torch.autograd.grad(expected, input, upper)[0])


@pytest.mark.parametrize('size', [(12, 15), (7, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize('stride', [(2, 2), (3, 2), (1, 4), (4, 3)])
def test_smooth_conserves(size, stride):
    '''Smoothing conserves relevance and its sign, also in images smaller than the filter.'''
    relevance = torch.rand(2, 3, *size, dtype=torch.float64)
    smooth = maps.smooth(relevance, stride)
    assert smooth.shape == relevance.shape
    assert torch.allclose(smooth.sum((2, 3)), relevance.sum((2, 3)), rtol=1e-12)
    assert float(smooth.min()) >= 0
    if max(size) > 1:
        assert not torch.allclose(smooth, relevance)


@pytest.mark.parametrize('stride', [2, 3, 4])
def test_smooth_removes_harmonics(stride):
    '''A lattice of dots becomes uniform, as the filter has zeros at all harmonics of the stride.'''
    relevance = torch.zeros(1, 1, 12 * stride, 12 * stride, dtype=torch.float64)
    relevance[..., ::stride, 1::stride] = stride ** 2
    heatmap = interior(maps.smooth(relevance, (stride, stride)), 2 * stride)
    assert torch.allclose(heatmap, torch.ones_like(heatmap))


def test_smooth_filter():
    '''The filter is triangular and keeps to the dimensions with a stride.'''
    relevance = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    relevance[..., 4, 4] = 1.
    expected = torch.zeros_like(relevance)
    expected[..., 2:7, 4] = torch.tensor([1., 2., 3., 2., 1.], dtype=torch.float64) / 9
    assert torch.allclose(maps.smooth(relevance, (3, 1)), expected)


# -- splitting ---------------------------------------------------------------------------------------------------------

def naive_shares(rule, *addends):
    '''Eqs. (5) to (7), element by element.'''
    addends = torch.broadcast_tensors(*addends)
    shares = [torch.empty_like(addends[0]) for _ in addends]
    for key in itertools.product(*map(range, addends[0].shape)):
        values = [abs(float(elem[key])) for elem in addends]
        total = sum(values)
        for share, value in zip(shares, values):
            is_equal = isinstance(rule, SymmetricSplit) or total == 0
            share[key] = 1 / len(values) if is_equal else value / total
    return shares


def make_addends(num, shape=(2, 3, 4, 2)):
    '''Addends of both signs, with elements at which some or all are zero.'''
    addends = [torch.randn(shape, dtype=torch.float64) for _ in range(num)]
    for elem in addends:
        elem[0, 0] = 0.
    addends[0][0, 1] = 0.
    addends[-1][1, 1] = 0.
    return addends


@pytest.mark.parametrize('rule', [RatioSplit(), SymmetricSplit(), ResidualOnly()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize('num', [2, 3, 4])
def test_split(rule, num):
    '''Shares of unrelated addends, which sum to the relevance element by element, Eq. (4).'''
    addends = make_addends(num)
    relevance = torch.randn(addends[0].shape, dtype=torch.float64)
    output, _, *lower = attribute(rule, Addition(), *addends, relevance=relevance)
    assert torch.allclose(output, sum(addends))
    assert torch.allclose(sum(lower), relevance, rtol=1e-15, atol=1e-15)
    for actual, share in zip(lower, naive_shares(rule, *addends)):
        assert torch.allclose(actual, relevance * share, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('rule', [RatioSplit(), SymmetricSplit()], ids=lambda rule: type(rule).__name__)
def test_split_laws(rule):
    '''Swapping branches swaps shares, and neither signs nor a common scale matter.'''
    skip, main = make_addends(2)
    relevance = torch.randn(skip.shape, dtype=torch.float64)

    def split(*addends):
        return attribute(rule, Addition(), *addends, relevance=relevance)[2:]

    expected = split(skip, main)
    for actual in (split(main, skip)[::-1], split(-skip, main), split(skip, -main), split(skip * 1e-9, main * 1e-9)):
        for one, other in zip(actual, expected):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_split_zero():
    '''Where all addends are zero, each has an equal part, and it is never NaN.'''
    zero = torch.zeros(1, 4)
    for num in (2, 3, 5):
        lower = attribute(RatioSplit(), Addition(), *[zero] * num, relevance=torch.ones(1, 4))[2:]
        for elem in lower:
            assert torch.allclose(elem, torch.full((1, 4), 1 / num))


def test_split_tiny():
    '''Magnitudes close to the smallest number are split by ratio as well.'''
    skip, main = torch.full((1, 1), 3e-38), torch.full((1, 1), 1e-38)
    lower = attribute(RatioSplit(), Addition(), skip, main, relevance=torch.ones(1, 1))[2:]
    assert float(lower[0]) == pytest.approx(.75, rel=1e-5)


@pytest.mark.parametrize('shapes', [
    ((2, 3, 1, 1), (2, 3, 4, 2)), ((2, 3, 4, 2), (2, 1, 4, 2)), ((2, 3, 4, 1), (2, 1, 1, 2)),
])
@pytest.mark.parametrize('rule', [RatioSplit(), SymmetricSplit()], ids=lambda rule: type(rule).__name__)
def test_split_broadcast(rule, shapes):
    '''An addend that is broadcast receives the sum of its parts.'''
    addends = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    output, relevance, *lower = attribute(rule, Addition(), *addends)
    assert torch.allclose(output, sum(addends))
    for elem, actual, share in zip(addends, lower, naive_shares(rule, *addends)):
        assert actual.shape == elem.shape
        assert torch.allclose(actual, (relevance * share).sum_to_size(elem.shape))


def test_split_alpha():
    '''Factors of addends, such as those of a subtraction or of alpha, are part of the addends.'''
    addends = make_addends(2)
    module = Addition()
    module.factors = (1., -.25)
    module.function = lambda skip, main: torch.sub(skip, main, alpha=.25)
    output, relevance, *lower = attribute(RatioSplit(), module, *addends)
    assert torch.allclose(output, addends[0] - .25 * addends[1])
    for actual, share in zip(lower, naive_shares(RatioSplit(), addends[0], .25 * addends[1])):
        assert torch.allclose(actual, relevance * share)


def test_split_inplace():
    '''An addition which overwrites its first addend has the shares of before.'''
    skip, main = make_addends(2)
    relevance = torch.randn(skip.shape, dtype=torch.float64)
    expected = attribute(RatioSplit(), Addition(), skip, main, relevance=relevance)[2:]
    module = Addition()
    module.function = lambda skip, main: skip.add_(main)
    sources = [elem.clone().requires_grad_() for elem in (skip, main)]
    handles = RatioSplit().register(module)
    first = sources[0] * 1
    output = module(first, sources[1])
    lower = torch.autograd.grad(output, sources, relevance)
    handles.remove()
    assert output is first
    assert torch.allclose(output, skip + main)
    for actual, elem in zip(lower, expected):
        assert torch.allclose(actual, elem)


@pytest.mark.parametrize('dtype, is_exact', [(torch.float16, False), (torch.bfloat16, False), (torch.float32, True)])
def test_split_precision(dtype, is_exact):
    '''In half precision, the shares are computed in single precision.'''
    skip, main = (elem.to(dtype) for elem in make_addends(2))
    _, relevance, *lower = attribute(RatioSplit(), Addition(), skip, main)
    for actual, share in zip(lower, naive_shares(RatioSplit(), skip.double(), main.double())):
        tolerance = 1e-6 if is_exact else 1e-2
        assert torch.allclose(actual.double(), relevance.double() * share, rtol=tolerance, atol=1e-7)


def test_split_method():
    '''Rules can split relevance without modules.'''
    skip, main = make_addends(2)
    relevance = torch.randn(skip.shape, dtype=torch.float64)
    for rule in (RatioSplit(), SymmetricSplit()):
        parts = rule.split(relevance, skip, main)
        for part, share in zip(parts, naive_shares(rule, skip, main)):
            assert torch.allclose(part, relevance * share)


def residual_only(rule, connect):
    '''Relevance of addends of which the first is the input of others, by (input) -> list of addends.'''
    input = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    addends = connect(input)
    module = Addition()
    handles = rule.register(module)
    output = module(*addends)
    relevance = torch.rand_like(output)
    # what each of the addends receives from the addition, without what it receives through the others
    received = []
    hook = output.grad_fn.register_hook(lambda gradients, _: received.extend(gradients[-len(addends):]))
    torch.autograd.grad(output, input, relevance)
    hook.remove()
    handles.remove()
    return relevance, addends, received


@pytest.mark.parametrize('inner', [RatioSplit, SymmetricSplit])
def test_residual_only_identity(inner):
    '''An identity skip connection receives nothing, in whichever order the addends are.'''
    for order in (1, -1):
        relevance, _, lower = residual_only(
            ResidualOnly(inner()), lambda input: [(elem := input * 1), torch.tanh(elem) * 2][::order]
        )
        skip, main = lower[::order]
        assert float(skip.abs().max()) == 0
        assert torch.equal(main, relevance)


@pytest.mark.parametrize('inner', [RatioSplit, SymmetricSplit])
def test_residual_only_projection(inner):
    '''A projection is computed from the same input as the residual branch, but neither from the other.'''
    relevance, addends, lower = residual_only(ResidualOnly(inner()), lambda input: [input * 3, torch.tanh(input)])
    for actual, share in zip(lower, naive_shares(inner(), *(elem.detach() for elem in addends))):
        assert torch.allclose(actual, relevance * share)


@pytest.mark.parametrize('position', [0, 1, 2])
@pytest.mark.parametrize('inner', [RatioSplit, SymmetricSplit])
def test_residual_only_several_branches(inner, position):
    '''Among several residual branches of an identity skip connection, relevance is split by the rule.'''
    def connect(input):
        skip = input * 1
        branches = [torch.tanh(skip), skip.exp()]
        branches.insert(position, skip)
        return branches

    relevance, addends, lower = residual_only(ResidualOnly(inner()), connect)
    assert float(lower.pop(position).abs().max()) < 1e-15
    del addends[position]
    for actual, share in zip(lower, naive_shares(inner(), *(elem.detach() for elem in addends))):
        assert torch.allclose(actual, relevance * share)


def test_residual_only_input():
    '''The skip connection may be the input of the network itself.'''
    input = torch.randn(2, 3, requires_grad=True)
    main = torch.tanh(input) * 1
    module = Addition()
    handles = ResidualOnly().register(module)
    output = module(input, main)
    relevance = torch.rand_like(output)
    lower = torch.autograd.grad(output, (input, main), relevance)
    handles.remove()
    assert torch.equal(lower[1], relevance)
    # only through the branch
    assert torch.allclose(lower[0], relevance * (1 - torch.tanh(input.detach()) ** 2))


def test_residual_only_nested():
    '''In a sequence of blocks, the skip connection of each is the output of the one before.'''
    modules = [Addition(), Addition()]
    rule = ResidualOnly()
    handles = [rule.copy().register(module) for module in modules]
    input = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    first = modules[0](input * 1, input * 2)
    second = modules[1](first, first * 3)
    relevance = torch.rand_like(second)
    at_first, at_input = torch.autograd.grad(second, (first, input), relevance)
    for handle in handles:
        handle.remove()
    assert torch.allclose(at_first, 3 * relevance)
    # both addends are computed from the input, so the ratio of magnitudes holds
    assert torch.allclose(at_input, at_first / 3 + at_first * 2 / 3 * 2)


# -- other rules -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('module', [
    torch.nn.ReLU(), torch.nn.ReLU(inplace=True), torch.nn.GELU(), torch.nn.Sigmoid(),
    torch.nn.BatchNorm2d(3).eval(), torch.nn.Identity(), torch.nn.GroupNorm(3, 3),
], ids=str)
def test_pass_through(module):
    '''R' = R, bit for bit.'''
    input = torch.randn(2, 3, 4, 4)
    expected = module(input.clone())
    source = input.clone().requires_grad_()
    handles = PassThrough().register(module)
    output = module(source * 1)
    relevance = torch.randn(output.shape)
    lower, = torch.autograd.grad(output, source, relevance)
    handles.remove()
    assert torch.equal(output, expected)
    assert torch.equal(lower, relevance)


def test_pass_through_two_inputs():
    '''Only one input can receive all relevance.'''
    with pytest.raises(ValueError, match='PassThrough is for one input'):
        attribute(PassThrough(), Addition(), torch.ones(1), torch.ones(1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('shape', [(2, 3, 4, 4), (2, 3, 1, 1)])
def test_signal_takes_all(shape):
    '''All relevance of a product follows the signal, also if that is broadcast.'''
    module, gate = Gate(), torch.rand(2, 3, 4, 4)
    module.function = lambda signal: signal * gate
    signal = torch.randn(shape)
    output, relevance, lower = attribute(SignalTakesAll(), module, signal)
    assert torch.equal(output, signal * gate)
    torch.testing.assert_close(lower, relevance.sum_to_size(shape))


@pytest.mark.parametrize('amounts', [
    {3: (1, 2)}, {2: (2, 0), 3: (1, 1)}, {1: (2, 1)}, {1: (0, 2), 3: (1, 0)}, {3: (-1, 2)}, {2: (-1, -1), 3: (2, 0)},
], ids=str)
def test_uncrop(amounts):
    '''Relevance of padding goes to the nearest element, or to all channels alike, and none is lost.'''
    module = Padding()
    module.amounts = amounts
    pad = [value for dim in (3, 2, 1) for value in amounts.get(dim, (0, 0))]
    module.function = lambda tensor: F.pad(tensor, pad)
    input = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    _, relevance, lower = attribute(Uncrop(), module, input)
    expected = torch.zeros_like(input)
    for key in itertools.product(*map(range, relevance.shape)):
        position = [index - amounts.get(dim, (0, 0))[0] for dim, index in enumerate(key)]
        channels = [position[1]] if 0 <= position[1] < 3 else range(3)
        row, col = (
            # the nearest one among those which were not cropped
            min(max(position[dim], max(-amounts.get(dim, (0, 0))[0], 0)),
                input.shape[dim] - 1 - max(-amounts.get(dim, (0, 0))[1], 0)) for dim in (2, 3)
        )
        for channel in channels:
            expected[key[0], channel, row, col] += relevance[key] / len(channels)
    assert_close(lower, expected)
    assert_conserved(lower, relevance)


# -- behaviour of single-pass rules ------------------------------------------------------------------------------------

def hooks_of(module):
    '''All hooks of a module.'''
    return [hook for key, value in vars(module).items() if key.endswith('_hooks') for hook in value.values()]


RULES = [
    (ZPlus(), torch.nn.Conv2d(2, 3, 3, 2), 1), (ZPlus(), torch.nn.Linear(5, 4), 1), (ZPlus(), torch.nn.AvgPool2d(2), 1),
    (ZPlus(coverage='even'), torch.nn.MaxPool2d(3, 2), 1), (ZPlus(dead_units='drop'), torch.nn.MaxPool2d(3, 2), 1),
    (ZPlus(maxpool='average'), torch.nn.MaxPool2d(3, 2), 1), (PassThrough(), torch.nn.ReLU(), 1),
    (RatioSplit(), Addition(), 2), (SymmetricSplit(), Addition(), 2), (ResidualOnly(), Addition(), 2),
]
RULE_IDS = [f'{type(rule).__name__}-{type(module).__name__}-{num}' for num, (rule, module, _) in enumerate(RULES)]


@pytest.mark.parametrize('rule, module, num', RULES, ids=RULE_IDS)
def test_remove(rule, module, num):
    '''After the handles are removed, the module has no hooks, and its own gradient.'''
    inputs = [torch.randn(2, 2, 6, 5, requires_grad=True) for _ in range(num)]
    before = module(*inputs)
    gradients = torch.autograd.grad(before.sum(), inputs)
    rule = rule.copy()
    handles = rule.register(module)
    during = module(*inputs)
    torch.autograd.grad(during.sum(), inputs)
    handles.remove()
    assert hooks_of(module) == []
    after = module(*inputs)
    assert torch.equal(before, during) and torch.equal(before, after)
    for actual, expected in zip(torch.autograd.grad(after.sum(), inputs), gradients):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('rule, module, num', RULES, ids=RULE_IDS)
def test_no_grad(rule, module, num):
    '''Without gradients, and for inputs which require none, nothing happens.'''
    inputs = [torch.randn(2, 2, 6, 5, requires_grad=True) for _ in range(num)]
    handles = rule.copy().register(module)
    with torch.no_grad():
        output = module(*inputs)
        assert not torch.is_grad_enabled()
    assert output.grad_fn is None and not output.requires_grad
    assert torch.is_grad_enabled()
    detached = module(*(elem.detach() for elem in inputs))
    assert torch.equal(detached, output)
    handles.remove()
    with torch.no_grad():
        assert torch.equal(module(*inputs), output)


def test_exception_in_layer():
    '''If the layer raises, gradients are enabled again, and the next call works.'''
    module = torch.nn.Conv2d(2, 3, 3).double()
    handles = ZPlus().register(module)
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 7, 5, 5, dtype=torch.float64, requires_grad=True))
    assert torch.is_grad_enabled()
    input = make_input((1, 2, 5, 5), 'positive').requires_grad_()
    output = module(input)
    lower, = torch.autograd.grad(output, input, torch.ones_like(output))
    handles.remove()
    assert_close(lower, naive_zplus(module, input.detach(), torch.ones_like(output)))


def test_called_twice():
    '''A module which is called several times keeps the state of each call.'''
    module = torch.nn.Linear(4, 4).double()
    left, right = (make_input((2, 4), sign).requires_grad_() for sign in ('positive', 'signed'))
    handles = ZPlus().register(module)
    outputs = module(left), module(right)
    relevance = [torch.rand(2, 4, dtype=torch.float64) for _ in range(2)]
    # the first call is asked first, which is not the reverse order
    for input, output, upper in zip((left, right), outputs, relevance):
        lower, = torch.autograd.grad(output, input, upper)
        assert_close(lower, naive_zplus(module, input.detach(), upper))
    nested = module(left)
    output = module(nested)
    middle, lower = torch.autograd.grad(output, (nested, left), relevance[0])
    handles.remove()
    assert_close(middle, naive_zplus(module, nested.detach(), relevance[0]))
    assert_close(lower, naive_zplus(module, left.detach(), middle))


def test_backward_twice():
    '''Relevance of several outputs can be computed from the same graph.'''
    module = torch.nn.Conv2d(2, 3, 3, padding=1).double()
    input = make_input((1, 2, 4, 4), 'signed').requires_grad_()
    handles = ZPlus().register(module)
    output = module(input)
    for _ in range(2):
        relevance = torch.rand_like(output)
        lower, = torch.autograd.grad(output, input, relevance, retain_graph=True)
        assert_close(lower, naive_zplus(module, input.detach(), relevance))
    handles.remove()


@pytest.mark.parametrize('kind', [torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Hardtanh])
def test_inplace_activation(kind):
    '''Activations which overwrite their input do not disturb rules before or after them.'''
    convs = [torch.nn.Conv2d(2, 3, 3).double(), torch.nn.Conv2d(3, 2, 3).double()]
    input = make_input((2, 2, 7, 7), 'signed')
    lower = []
    for inplace in (False, True):
        modules = [convs[0], kind(inplace=inplace), convs[1]]
        handles = [rule.register(elem) for rule, elem in zip((ZPlus(), PassThrough(), ZPlus()), modules)]
        source = input.clone().requires_grad_()
        output = torch.nn.Sequential(*modules)(source)
        lower.append(torch.autograd.grad(output, source, torch.ones_like(output))[0])
        for handle in handles:
            handle.remove()
    assert torch.equal(*lower)


def test_inplace_after_projection():
    '''An in-place ReLU on the output of a layer does not change what the layer keeps.'''
    module = torch.nn.Linear(4, 3).double()
    input = make_input((2, 4), 'signed').requires_grad_()
    handles = ZPlus().register(module)
    output = module(input).relu_()
    relevance = torch.rand_like(output) * (output.detach() > 0) + 0.
    lower, = torch.autograd.grad(output, input, relevance)
    handles.remove()
    assert_close(lower, naive_zplus(module, input.detach(), relevance))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['linear', 'conv2d stride padding', 'average 2d', 'adaptive 2d global'])
def test_half_precision(name, dtype):
    '''Half precision inputs have half precision relevance, which is computed in single precision.'''
    build, shape = LAYERS[name]
    module = build().to(dtype)
    input = make_input((2, *shape), 'signed').to(dtype)
    output, relevance, lower = attribute(ZPlus(), module, input)
    assert output.dtype == dtype and lower.dtype == dtype
    expected = naive_zplus(copy.deepcopy(module).double(), input.double(), relevance.double())
    assert_close(lower.double(), expected, 2e-2)


@pytest.mark.skipif(
    not hasattr(torch.autograd.function.FunctionCtx, 'set_output_grad_dtype'),
    reason='this version of torch rounds gradients to the precision of the output',
)
def test_half_precision_small_relevance():
    '''Relevance between layers which is too small for half precision survives in single precision.'''
    modules = [torch.nn.Linear(1, 2048).half(), torch.nn.Linear(2048, 1).half()]
    for module in modules:
        module.weight.data.abs_()
    input = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    handles = [ZPlus().register(module) for module in modules]
    output = modules[1](modules[0](input)).float()
    # each of the units between the layers has about 5e-9
    relevance = torch.full((1, 1), 1e-5)
    lower, = torch.autograd.grad(output, input, relevance)
    for handle in handles:
        handle.remove()
    assert_conserved(lower, relevance, .02)


def test_single_precision():
    '''Single precision conserves relevance up to rounding.'''
    module = torch.nn.Conv2d(8, 16, 3, 2, 1)
    input = torch.randn(2, 8, 17, 17).clamp(min=0)
    for rule in (ZPlus(), ZPlus(coverage='even')):
        _, relevance, lower = attribute(rule, module, input)
        assert lower.dtype == torch.float32
        assert_conserved(lower, relevance, 1e-5)


@pytest.mark.parametrize('coverage', ['literal', 'even'])
@pytest.mark.parametrize('name', ['linear', 'conv2d', 'conv2d stride padding', 'average 2d', 'average 2d ceil'])
def test_batch(name, coverage):
    '''Samples do not depend on each other, also if only some of them have negative values.'''
    build, shape = LAYERS[name]
    module = build().double()
    input = torch.cat([make_input((1, *shape), sign) for sign in ('positive', 'signed', 'negative')])
    _, relevance, lower = attribute(ZPlus(coverage=coverage), module, input)
    for num in range(3):
        single = (elem[num:num + 1] for elem in (input, relevance))
        expected = attribute(ZPlus(coverage=coverage), module, next(single), relevance=next(single))[2]
        assert_close(lower[num:num + 1], expected, 1e-12)


def test_zero_relevance():
    '''No relevance stays none, also at dead units.'''
    module, input = with_dead_units('conv2d')
    _, _, lower = attribute(ZPlus(), module, input, relevance=torch.zeros_like(module(input).detach()))
    assert float(lower.abs().max()) == 0


def test_subclass_with_own_forward():
    '''A convolution which does not compute what its class does is left alone.'''
    class Standardized(torch.nn.Conv2d):
        '''A convolution with weights of zero mean.'''
        def forward(self, input):
            '''Convolve.'''
            return F.conv2d(input, self.weight - self.weight.mean(), self.bias)

    class Named(torch.nn.Conv2d):
        '''A convolution of another name.'''

    handles = ZPlus().register(Standardized(2, 3, 3))
    handles.remove()
    module = Standardized(2, 3, 3).double()
    handles = ZPlus().register(module)
    assert hooks_of(module) == []
    handles.remove()
    module = Named(2, 3, 3).double()
    input = make_input((1, 2, 5, 5), 'signed')
    _, relevance, lower = attribute(ZPlus(), module, input)
    assert_close(lower, naive_zplus(module, input, relevance))


def test_copy():
    '''A copy has all settings, but no state of its original.'''
    low, high = box()
    settings = {
        'stabilizer': .25, 'first_layer': 'zbox', 'low': low, 'high': high, 'projection': 'literal',
        'dead_units': 'drop', 'maxpool': 'average', 'coverage': 'even',
    }
    rule = ZPlus(**settings)
    duplicate = rule.copy()
    assert type(duplicate) is ZPlus and duplicate is not rule
    for key, value in settings.items():
        if key == 'stabilizer':
            assert float(duplicate.stabilizer(torch.zeros(1))) == .25
        else:
            assert getattr(duplicate, key) is value
    mutable = [key for key, value in vars(rule).items() if isinstance(value, (dict, list))]
    assert mutable and all(getattr(rule, key) is not getattr(duplicate, key) for key in mutable)
    assert type(ResidualOnly(SymmetricSplit()).copy().rule) is SymmetricSplit
    for rule in (RatioSplit(), SymmetricSplit(), PassThrough(), SignalTakesAll(), Uncrop()):
        assert type(rule.copy()) is type(rule) and rule.copy() is not rule


def test_copy_is_independent():
    '''To deactivate a copy does not deactivate its original.'''
    rule = ZPlus()
    duplicate = rule.copy()
    duplicate.active = False
    assert rule.active
    assert rule.copy().active


@pytest.mark.parametrize('name, value', [
    ('first_layer', 'z+'), ('projection', 'spred'), ('dead_units', None), ('maxpool', 'max'), ('coverage', True),
])
def test_bad_arguments(name, value):
    '''Errors name the argument, its value and the choices.'''
    with pytest.raises(ValueError, match=name) as info:
        ZPlus(**{name: value})
    choices = {
        'first_layer': ('zplus', 'literal', 'ones', 'zbox', 'wsquare', 'flat'), 'projection': ('spread', 'literal'),
        'dead_units': ('spread', 'drop'), 'maxpool': ('winner', 'average', 'avg2x2'), 'coverage': ('literal', 'even'),
    }[name]
    assert all(repr(elem) in str(info.value) for elem in (value, *choices))


@pytest.mark.parametrize('bounds', [{}, {'low': -1.}, {'high': 1.}])
def test_zbox_needs_bounds(bounds):
    '''The box needs both of its bounds.'''
    with pytest.raises(ValueError, match='low and high'):
        ZPlus(first_layer='zbox', **bounds)


def test_needs_tensor():
    '''A module which returns something else gives a clear error.'''
    module = Gate()
    module.function = lambda tensor: {'output': tensor}
    with pytest.raises(TypeError, match='PassThrough.*Gate'):
        attribute(PassThrough(), module, torch.ones(1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('part', [None, 'shape'])
def test_input_without_relevance(part):
    '''Rules may leave out an input, and give relevance of the shape of a broadcast one.'''
    class Second(SinglePass):
        '''The second input takes all.'''
        def propagate(self, module, stored, relevance):
            '''Leave out the first.'''
            return (None if part is None else torch.zeros_like(relevance)), relevance

    first, second = torch.rand(2, 3, 4), torch.rand(1, 4)
    _, relevance, *lower = attribute(Second(), Addition(), first, second)
    assert lower[0] is None if part is None else not lower[0].any()
    assert_close(lower[1], relevance.sum((0, 1))[None])
