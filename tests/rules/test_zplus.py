'''Tests of the z+ rule against dense matrices.

Numbers of equations are those of Otsuki et al. 2024. Each matrix is built by pushing unit vectors through the layer.
'''
import copy
import itertools

import pytest
import torch
import zennit.rules
from helpers.layers import (
    LAYERS,
    Products,
    assert_close,
    assert_conserved,
    attribute,
    box,
    connections,
    distribute,
    make_input,
    matrix,
    naive_zplus,
    positive_negative,
    with_dead_units,
    with_weight,
)
from torch.nn import functional as F
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP
from zennit_resnet.layer import Subsampling
from zennit_resnet.rules import (
    GeneralizedGamma,
    PassThrough,
    Relative,
    ZPlus,
    zplus,
)
from zennit_resnet.rules import _linear_maps as maps

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


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize('case', ['as it is', 'queries', 'negative', 'changed'])
def test_zplus_tokens(monkeypatch, case, dtype, tolerance):
    '''Of tokens of both signs, one product gives the denominators, unless it would be inexact or is outdated.'''
    module, input = torch.nn.Linear(40, 30).to(dtype), make_input((5, 6, 40), 'signed', dtype)
    relevance, products, linear = torch.rand(5, 6, 30, dtype=dtype), [], F.linear
    if case == 'queries':
        relevance[..., :20] = 0
    if case == 'negative':
        # units with a thousandth of positive contributions, with none at all, and behind a large bias
        module.weight.data[:3] = -.1 * input[0, 0].sign()
        module.weight.data[0, 0] *= -1e-3 / input[0, 0, 0].abs()
        module.bias.data[3] = 1e6
    network = torch.nn.Sequential(module, torch.nn.ReLU(inplace=True)) if case == 'changed' else module

    def spy(input, weight, bias=None):
        # those of the backward pass have the transposed weight
        products.extend([len(weight)] if bias is None and weight.shape[1] == 40 else [])
        return linear(input, weight, bias)

    leaf, rule = input.clone().requires_grad_(), ZPlus()
    handles = rule.register(module)
    output = network(leaf)
    monkeypatch.setattr(zplus.F, 'linear', spy)
    if case == 'changed':
        output = output.clone()
        relevance = relevance * (output > 0)
    lower, = torch.autograd.grad(output, leaf, relevance)
    handles.remove()
    sizes = {'as it is': [30], 'queries': [10], 'negative': [30] * 3, 'changed': [30] * 2}[case]
    assert products == sizes
    module, input, relevance = module.double(), input.double().view(-1, 40), relevance.double().view(-1, 30)
    expected = naive_zplus(module, input, relevance).view(5, 6, 40)
    assert torch.allclose(lower.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


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


@pytest.mark.parametrize('function', [
    lambda h: torch.nn.MaxPool2d(2, return_indices=True)(h)[0], lambda h: h.max(3)[0].max(2).values,
    lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
])
def test_maxpool_with_indices(function):
    '''Poolings that return indices as well have the same rule.'''
    class Network(torch.nn.Module):
        '''A single function.'''
        def forward(self, x):
            '''Pool.'''
            return function(x.relu())

    x, results = torch.rand(2, 3, 4, 4) + .1, []
    for dead_units in ('spread', 'drop'):
        with Gradient(model=Network().eval(), composite=ResNetLRP(dead_units=dead_units)) as attributor:
            results.append(attributor(x, torch.ones_like)[1])
    assert torch.allclose(*results) and float(results[0].sum()) > 0


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
    '''Each variant of the first layer has its contributions, whose shares distribute relevance.'''
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
    '''Matrix (input, cell) of averages over cells. The last may be incomplete.'''
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
    '''Layers whose stride does not exceed the kernel are not changed, not even in rounding.'''
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

    monkeypatch.setattr(zplus, 'LARGE', 10000)
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


# -- tokens that receive nothing ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('create', [ZPlus, lambda: GeneralizedGamma(.25), lambda: ZPlus(stabilizer=.1)])
@pytest.mark.parametrize('is_changed', [False, True])
@pytest.mark.parametrize('shape', [(2, 9, 6), (3, 4, 5, 6)])
@pytest.mark.parametrize('sign', ['positive', 'signed', 'dead'])
def test_few_tokens(shape, sign, is_changed, create):
    '''Relevance of a few tokens is what it would be with that of all others, which is left out of the products.'''
    module = torch.nn.Linear(6, 7, bias=create is ZPlus).double()
    input = make_input(shape, 'positive' if sign == 'dead' else sign)
    if sign == 'dead':
        module.weight.data[2] = -1.
    leaf = input.clone().requires_grad_()
    handles = create().register(module)
    output = module(leaf)
    if is_changed:
        output.mul_(2)
    few = torch.rand(output.shape, dtype=output.dtype)
    few.flatten(1, -2)[:, 2:] = 0
    few[1] = 0
    rest = torch.rand_like(few)
    found, others, both = (
        torch.autograd.grad(output, leaf, elem / (2 if is_changed else 1), retain_graph=True)[0]
        for elem in (few, rest, few + rest)
    )
    nothing, = torch.autograd.grad(output, leaf, torch.zeros_like(output))
    handles.remove()
    assert not bool(found.flatten(1, -2)[:, 2:].any() or found[1].any() or nothing.any())
    assert_close(found + others, both)
    if create is ZPlus:
        assert_close(found.sum(), few.sum())


@pytest.mark.parametrize('create', [ZPlus, lambda: GeneralizedGamma(.25), Relative])
def test_one_product_for_all_rows(create):
    '''Of inputs that are not contiguous, PyTorch makes one product for each row if the weight needs no gradient.'''
    module = torch.nn.Linear(6, 7).double().requires_grad_(False)
    found = []
    for input in (make_input((5, 3, 6), 'signed'), make_input((3, 5, 6), 'signed').transpose(0, 1)):
        leaf = input.requires_grad_()
        handles = create().register(module)
        with Products() as products:
            output = module(leaf)
            torch.autograd.grad(output, leaf, torch.rand(3, 5, 7, dtype=output.dtype).transpose(0, 1))
        handles.remove()
        found.append(products.repeated)
    # the layer itself is that of the network
    assert found[0] == 0 and found[1] <= 1
