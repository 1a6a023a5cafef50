'''Rules of relative LRP, compared with naive implementations by dense matrices in float64, and the laws they keep.

Numbers of equations, definitions and propositions are those of Nyiri & Gibaru, R-LRP.
'''
import functools
import math

import pytest
import torch
from helpers.layers import LAYERS, assert_close, attribute, connections, make_input, matrix, with_weight
from helpers.networks import Function
from helpers.relative import composite_attribute, explain, naive_counts, naive_max_pool, naive_relative
from torch import nn
from torch.nn import functional as F
from zennit.composites import COMPOSITES

from zennit_resnet.composites import RelativeLRP
from zennit_resnet.rules import Relative, RelativeMaxPool
from zennit_resnet.rules import _linear_maps as maps

LAYERS = {
    **LAYERS,
    'conv1d dilated stride': (lambda: nn.Conv1d(2, 3, 3, stride=3, padding=2, dilation=2), (2, 11)),
    'conv1d circular': (lambda: nn.Conv1d(2, 3, 4, stride=2, padding=3, padding_mode='circular'), (2, 6)),
    'conv1d replicate same': (lambda: nn.Conv1d(2, 3, 4, padding='same', padding_mode='replicate'), (2, 6)),
    'conv2d 7x7': (lambda: nn.Conv2d(2, 3, 7, stride=2, padding=3), (2, 9, 8)),
    'conv2d projection': (lambda: nn.Conv2d(3, 2, 1, stride=2, bias=False), (3, 5, 4)),
    'conv2d gap': (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 8, 7)),
    'conv2d valid dilation': (lambda: nn.Conv2d(2, 3, (2, 3), padding='valid', dilation=(3, 2)), (2, 7, 6)),
    'conv2d multiplier': (lambda: nn.Conv2d(2, 6, 3, stride=(2, 1), padding=(0, 2), groups=2), (2, 5, 4)),
    'conv2d reflect same': (lambda: nn.Conv2d(2, 2, (2, 5), padding='same', padding_mode='reflect'), (2, 4, 5)),
    'conv2d replicate dilated': (
        lambda: nn.Conv2d(2, 2, 3, stride=2, padding=3, dilation=2, padding_mode='replicate'), (2, 5, 4)
    ),
    'conv3d circular': (lambda: nn.Conv3d(1, 2, 3, padding=(1, 0, 1), padding_mode='circular'), (1, 3, 3, 4)),
    'conv3d dilated same': (lambda: nn.Conv3d(1, 2, (2, 1, 3), padding='same', dilation=(1, 1, 2)), (1, 3, 2, 5)),
    'transposed 1d groups': (
        lambda: nn.ConvTranspose1d(4, 6, 5, stride=3, padding=2, output_padding=2, groups=2, dilation=2), (4, 4)
    ),
    'transposed 2d uneven': (
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(3, 1), padding=(1, 0), output_padding=(2, 0)), (2, 3, 4)
    ),
    'transposed 2d padding': (lambda: nn.ConvTranspose2d(2, 3, 4, stride=2, padding=(1, 2)), (2, 3, 4)),
    'transposed 3d padding': (
        lambda: nn.ConvTranspose3d(1, 2, 3, stride=2, padding=1, output_padding=1), (1, 2, 3, 2)
    ),
    'average 1d ceil padding': (lambda: nn.AvgPool1d(4, 3, 2, ceil_mode=True), (2, 8)),
    'average 2d included': (lambda: nn.AvgPool2d((3, 2), (1, 2), (1, 1), count_include_pad=True), (2, 4, 5)),
    'average 2d ceil excluded': (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 6, 5)
    ),
    'average 2d divisor': (lambda: nn.AvgPool2d(3, 2, divisor_override=4), (2, 5, 6)),
    'average 3d padding': (lambda: nn.AvgPool3d((2, 3, 1), (1, 2, 1), (1, 1, 0)), (1, 3, 5, 2)),
    'adaptive 2d overlapping': (lambda: nn.AdaptiveAvgPool2d((4, 5)), (2, 5, 7)),
    'adaptive 2d larger': (lambda: nn.AdaptiveAvgPool2d((5, 3)), (2, 3, 2)),
    'adaptive 2d none': (lambda: nn.AdaptiveAvgPool2d((None, 2)), (2, 3, 5)),
    'adaptive 3d': (lambda: nn.AdaptiveAvgPool3d((2, 1, 3)), (1, 3, 2, 4)),
}
MAX_POOLS = {
    'disjoint': (lambda: nn.MaxPool2d(2), (2, 4, 6)),
    'remainder': (lambda: nn.MaxPool2d(2), (2, 5, 7)),
    'overlapping': (lambda: nn.MaxPool2d(3, 2), (2, 7, 6)),
    'resnet': (lambda: nn.MaxPool2d(3, 2, 1), (2, 6, 7)),
    'stride one': (lambda: nn.MaxPool2d((2, 3), 1, (1, 0)), (2, 4, 5)),
    'gap': (lambda: nn.MaxPool2d(2, 3), (2, 8, 7)),
    'dilated': (lambda: nn.MaxPool2d(3, 1, 1, dilation=2), (2, 6, 7)),
    'dilated uneven': (lambda: nn.MaxPool2d((2, 3), (2, 1), (1, 1), dilation=(3, 1)), (1, 7, 4)),
    'ceil': (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (2, 6, 6)),
    'ceil padding': (lambda: nn.MaxPool2d(2, 2, 1, ceil_mode=True), (2, 5, 4)),
    'ceil dilated': (lambda: nn.MaxPool2d(2, 3, 1, dilation=2, ceil_mode=True), (1, 6, 7)),
    'indices': (lambda: nn.MaxPool2d(3, 2, 1, return_indices=True), (2, 5, 6)),
    '1d': (lambda: nn.MaxPool1d(3, 2, 1), (3, 8)),
    '1d dilated': (lambda: nn.MaxPool1d(3, 1, 0, 3, return_indices=True), (2, 9)),
    '3d': (lambda: nn.MaxPool3d((2, 3, 2), (1, 2, 2), (1, 1, 0)), (1, 3, 4, 5)),
    '3d ceil': (lambda: nn.MaxPool3d(2, ceil_mode=True), (1, 3, 3, 4)),
    'adaptive': (lambda: nn.AdaptiveMaxPool2d((2, 3)), (2, 5, 7)),
    'adaptive overlapping': (lambda: nn.AdaptiveMaxPool2d((4, 5), return_indices=True), (2, 5, 7)),
    'adaptive none': (lambda: nn.AdaptiveMaxPool2d((None, 2)), (2, 3, 5)),
    'adaptive 1d': (lambda: nn.AdaptiveMaxPool1d(3), (2, 7)),
    'adaptive 3d': (lambda: nn.AdaptiveMaxPool3d(2), (1, 3, 4, 3)),
}
both_cardinalities = pytest.mark.parametrize('cardinality', ['constant', 'per_position'])


# -- naive implementations ---------------------------------------------------------------------------------------------

def pool_attribute(module, input, relevance=None, **kwargs):
    '''Contributions of the inputs of a max pooling. Returns (relevance, lower).'''
    class First(nn.Module):
        '''The module without indices.'''
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, input):
            '''Maxima.'''
            output = self.inner(input)
            return output[0] if isinstance(output, tuple) else output

    model, input = First(), input.clone().requires_grad_()
    handles = RelativeMaxPool(**kwargs).register(module)
    output = model(input)
    handles.remove()
    assert torch.equal(output, model(input))
    relevance = torch.randn_like(output) if relevance is None else relevance
    return relevance, torch.autograd.grad(output, input, relevance)[0]


# -- layers ------------------------------------------------------------------------------------------------------------

@both_cardinalities
@pytest.mark.parametrize('name', LAYERS)
def test_relative(name, cardinality):
    '''Definition 9 with Eqs. (8) and (12) for each layer.'''
    build, shape = LAYERS[name]
    module, input = build().double(), make_input((2, *shape), 'signed')
    expected_output = module(input)
    relevance = torch.randn_like(expected_output)
    output, _, lower = attribute(Relative(cardinality), module, input, relevance=relevance)
    assert torch.equal(output, expected_output)
    assert_close(lower, naive_relative(module, input, relevance, cardinality), 1e-12)


@both_cardinalities
@pytest.mark.parametrize('name', LAYERS)
def test_layer_identity(name, cardinality):
    '''Of each example, the sum of z_i N / Card(J_i) is that of a0_j z_j / M_j, with outputs a0 without bias.'''
    build, shape = LAYERS[name]
    module, input = build().double(), make_input((3, *shape), 'signed')
    output, relevance, lower = attribute(Relative(cardinality), module, input)
    if getattr(module, 'bias', None) is not None:
        output = output - module.bias.detach().view(-1, *(1,) * (output.ndim - 2))
    edges = connections(module, shape)
    fan_in, fan_out = naive_counts(module, shape, cardinality, edges)
    # inputs that no output reads have no contribution
    assert bool((lower.flatten(1)[:, edges.sum(1) == 0] == 0).all())
    fan_out = torch.as_tensor(fan_out).double().expand(edges.shape[0]).masked_fill(edges.sum(1) == 0, 1.)
    left = (lower.flatten(1) / fan_out).sum(1) * relevance[0].numel()
    right = (output.flatten(1) * relevance.flatten(1) / fan_in).sum(1)
    assert_close(left, right, 1e-12)


def test_cardinality_counts():
    '''Per position, a 3 x 3 kernel of stride 2 has 1, 2 or 4 windows; the constant is that without stride.'''
    module = nn.Conv2d(1, 5, 3, stride=2, padding=1, bias=False).double()
    input, relevance = torch.ones(1, 1, 8, 8).double(), torch.ones(1, 5, 4, 4).double()
    lower = {name: attribute(Relative(name), module, input, relevance=relevance)[2] for name in (
        'constant', 'per_position'
    )}
    row = torch.tensor([1., 2., 1., 2., 1., 2., 1., 1.]).double()
    assert_close(lower['per_position'] / lower['constant'], (row * row[:, None])[None, None] / 9)


@pytest.mark.parametrize('shape', [(2, 7), (2, 3, 7), (2, 3, 2, 7)])
def test_linear_dimensions(shape):
    '''Linear layers take any number of dimensions, all outputs of an example are neurons of the next layer.'''
    module, input = nn.Linear(7, 5).double(), make_input(shape, 'signed')
    _, relevance, lower = attribute(Relative(), module, input)
    num_outputs = relevance[0].numel()
    expected = 5 / (num_outputs * 7) * input * (relevance @ module.weight.detach())
    assert_close(lower, expected, 1e-12)
    if len(shape) == 2:
        # Eq. (8)
        assert_close(lower, input * (relevance @ module.weight.detach()) / 7, 1e-12)


def test_bias_has_no_part():
    '''Biases change the output only.'''
    module, input = nn.Conv2d(2, 3, 3).double(), make_input((1, 2, 5, 5), 'signed')
    _, relevance, lower = attribute(Relative(), module, input)
    module.bias.data += 10.
    assert torch.equal(attribute(Relative(), module, input, relevance=relevance)[2], lower)


@pytest.mark.parametrize('name', ['linear', 'conv2d reflect', 'transposed 2d', 'adaptive 2d', 'average 2d ceil'])
def test_single_precision(name):
    '''Single precision, and another memory format.'''
    build, shape = LAYERS[name]
    module, input = build(), make_input((2, *shape), 'signed').float()
    _, relevance, lower = attribute(Relative('per_position'), module, input)
    expected = naive_relative(module.double(), input.double(), relevance.double(), 'per_position')
    assert lower.dtype == torch.float32
    assert_close(lower.double(), expected, 1e-5)
    if input.ndim == 4:
        module, input = (elem.to(memory_format=torch.channels_last) for elem in (module.float(), input))
        actual = attribute(Relative('per_position'), module, input, relevance=relevance)[2]
        assert_close(actual.double(), expected, 1e-5)


def test_input_is_kept():
    '''Neither the input nor the relevance of the output is overwritten, and one layer may be called twice.'''
    module = nn.Linear(4, 4).double()
    input, relevance = (torch.randn(2, 4).double() for _ in range(2))
    copies = input.clone(), relevance.clone()
    handles = Relative().register(module)
    input.requires_grad_()
    hidden = module(input)
    middle, lower = torch.autograd.grad(module(hidden), (hidden, input), relevance)
    handles.remove()
    assert torch.equal(input, copies[0]) and torch.equal(relevance, copies[1])
    assert_close(middle, naive_relative(module, hidden.detach(), relevance), 1e-12)
    assert_close(lower, naive_relative(module, input.detach(), middle), 1e-12)


# -- max pooling -------------------------------------------------------------------------------------------------------

@both_cardinalities
@pytest.mark.parametrize('kind', ['distinct', 'ties', 'relu', 'negative'])
@pytest.mark.parametrize('name', MAX_POOLS)
def test_max_pool(name, kind, cardinality):
    '''Proposition 13 and the identity of the layer's sums. Padding is never a maximum, even below all elements.'''
    build, shape = MAX_POOLS[name]
    module = build()
    input = {
        'distinct': lambda: torch.randn(2, *shape),
        'ties': lambda: torch.randint(-2, 3, (2, *shape)),
        'relu': lambda: torch.randn(2, *shape).clamp(min=0),
        'negative': lambda: -1e30 * torch.randint(1, 3, (2, *shape)),
    }[kind]().double()
    relevance, lower = pool_attribute(module, input, cardinality=cardinality)
    expected, counts, identity = naive_max_pool(module, input, relevance, cardinality)
    assert_close(lower, expected, 1e-12)
    # inputs that no window reads have no contribution
    counts = counts.where(counts > 0, torch.ones_like(counts))
    assert_close((lower / counts).flatten(1).sum(1) * relevance[0].numel(), identity, 1e-12)


def test_max_pool_ties():
    '''Each maximum of a window is credited in full, where the gradient only has the first.'''
    input = torch.tensor([[3., 1., 3.], [2., 3., 2.], [0., 0., 0.]]).double()[None, None]
    _, lower = pool_attribute(nn.MaxPool2d(2, 1), input, torch.tensor([[1., 10.], [100., 1000.]]).double()[None, None])
    # windows have 4 elements, there are 4 windows, and the constant cardinality is 4
    expected = torch.tensor([[1., 0., 10.], [0., 1111., 0.], [0., 0., 0.]]).double()[None, None] * 3 / 4
    assert_close(lower, expected, 1e-12)


def test_max_pool_is_one_average():
    '''Where all elements are equal, a max pooling is an average pooling without its 1 / n.'''
    for settings in ((2,), (3, 2, 1), (3, 1, 0)):
        input = torch.full((1, 2, 6, 5), 1.5).double()
        relevance, lower = pool_attribute(nn.MaxPool2d(*settings), input)
        # torch divides by the whole window with count_include_pad
        average = attribute(Relative(), nn.AvgPool2d(*settings), input, relevance=relevance)[2]
        assert_close(lower, average * settings[0] ** 2, 1e-12)


def test_max_pool_half():
    '''Ties in half precision remain ties in the single precision of relevance.'''
    input = torch.tensor([[.1, .1], [.05, .1]], dtype=torch.bfloat16)[None, None].requires_grad_()
    module = nn.MaxPool2d(2)
    handles = RelativeMaxPool().register(module)
    lower, = torch.autograd.grad(module(input), input, torch.ones(1, 1, 1, 1))
    handles.remove()
    assert_close(lower.float(), input.detach().float() * torch.tensor([[1., 1.], [0., 1.]]), 1e-2)


# -- functional operations, through the canonizer ----------------------------------------------------------------------

FUNCTIONAL = {
    'max_pool2d': (lambda m, x: F.max_pool2d(x, 3, 2, 1), lambda: nn.MaxPool2d(3, 2, 1)),
    'max_pool2d keywords': (
        lambda m, x: F.max_pool2d(x, kernel_size=(2, 3), stride=1, dilation=2, ceil_mode=True),
        lambda: nn.MaxPool2d((2, 3), 1, dilation=2, ceil_mode=True),
    ),
    'max_pool2d default stride': (lambda m, x: F.max_pool2d(x, (2, 3)), lambda: nn.MaxPool2d((2, 3))),
    'max_pool2d indices': (
        lambda m, x: F.max_pool2d(x, 3, 1, return_indices=True)[0], lambda: nn.MaxPool2d(3, 1)
    ),
    'torch.max_pool2d': (lambda m, x: torch.max_pool2d(x, 3), lambda: nn.MaxPool2d(3)),
    'torch.max_pool2d positional': (
        lambda m, x: torch.max_pool2d(x, [3, 2], [2, 1], [1, 0], [1, 2], True),
        lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True),
    ),
    'max_pool1d': (lambda m, x: F.max_pool1d(x.flatten(2), 3, 2), lambda: nn.MaxPool1d(3, 2)),
    'max_pool3d': (lambda m, x: F.max_pool3d(x[:, None], 2, 1), lambda: nn.MaxPool3d(2, 1)),
    'adaptive_max_pool2d': (lambda m, x: F.adaptive_max_pool2d(x, (2, 4)), lambda: nn.AdaptiveMaxPool2d((2, 4))),
    'avg_pool2d': (lambda m, x: F.avg_pool2d(x, 3, 2, 1), lambda: nn.AvgPool2d(3, 2, 1)),
    'avg_pool2d positional': (
        lambda m, x: F.avg_pool2d(x, 3, 2, 1, False, False), lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    'avg_pool2d size': (lambda m, x: F.avg_pool2d(x, x.size()[2]), lambda: nn.AvgPool2d(5)),
    'avg_pool2d keywords': (
        lambda m, x: F.avg_pool2d(x, (2, 3), stride=(1, 2), padding=(1, 1), ceil_mode=True, count_include_pad=False),
        lambda: nn.AvgPool2d((2, 3), (1, 2), 1, ceil_mode=True, count_include_pad=False),
    ),
    'avg_pool1d': (lambda m, x: F.avg_pool1d(x.flatten(2), 4), lambda: nn.AvgPool1d(4)),
    'avg_pool3d': (lambda m, x: F.avg_pool3d(x[:, None], 2, 1), lambda: nn.AvgPool3d(2, 1)),
    'adaptive_avg_pool2d': (lambda m, x: F.adaptive_avg_pool2d(x, (4, 5)), lambda: nn.AdaptiveAvgPool2d((4, 5))),
    'adaptive_avg_pool2d global': (lambda m, x: F.adaptive_avg_pool2d(x, 1), lambda: nn.AdaptiveAvgPool2d(1)),
    'mean': (lambda m, x: x.mean((2, 3), keepdim=True), lambda: nn.AdaptiveAvgPool2d(1)),
    'torch.mean': (lambda m, x: torch.mean(x, dim=(-2, -1), keepdim=True), lambda: nn.AdaptiveAvgPool2d(1)),
    'amax': (lambda m, x: x.amax((2, 3), keepdim=True), lambda: nn.AdaptiveMaxPool2d(1)),
    'torch.amax': (lambda m, x: torch.amax(x, (2, 3), True), lambda: nn.AdaptiveMaxPool2d(1)),
    'max': (lambda m, x: x.flatten(2).max(2, keepdim=True)[0], lambda: nn.AdaptiveMaxPool1d(1)),
    'torch.max': (lambda m, x: torch.max(x.flatten(2), dim=-1, keepdim=True)[0], lambda: nn.AdaptiveMaxPool1d(1)),
    'conv2d': (
        lambda m, x: F.conv2d(x, m.layer.weight, m.layer.bias, 2, 1), lambda: nn.Conv2d(3, 4, 3, 2, 1)
    ),
    'conv2d keywords': (
        lambda m, x: F.conv2d(x, bias=m.layer.bias, weight=m.layer.weight, padding='same', dilation=(1, 2), groups=3),
        lambda: nn.Conv2d(3, 6, (2, 3), padding='same', dilation=(1, 2), groups=3),
    ),
    'conv1d': (
        lambda m, x: F.conv1d(x.flatten(2), m.layer.weight, stride=3), lambda: nn.Conv1d(3, 2, 4, 3, bias=False)
    ),
    'linear': (lambda m, x: F.linear(x, m.layer.weight, m.layer.bias), lambda: nn.Linear(6, 4)),
}
SHAPES = {
    'max_pool1d': (2, 3, 30), 'max_pool3d': (2, 1, 3, 5, 6), 'avg_pool1d': (2, 3, 30), 'avg_pool3d': (2, 1, 3, 5, 6),
    'max': (2, 3, 30), 'torch.max': (2, 3, 30), 'conv1d': (2, 3, 30),
}


@both_cardinalities
@pytest.mark.parametrize('name', FUNCTIONAL)
def test_functional(name, cardinality):
    '''Functional operations are the same as modules.'''
    function, build = FUNCTIONAL[name]
    layer, input = build().double(), torch.randint(-3, 5, (2, 3, 5, 6)).double()
    if name in ('max', 'torch.max'):
        # ties have a test of their own
        input = torch.randperm(input.numel()).view(input.shape).double()
    # as the only child, it is not called
    model = Function(function, layer=layer)
    relevance, lower = composite_attribute(model, input, cardinality=cardinality)
    shaped = input.view(SHAPES.get(name, input.shape))
    if isinstance(layer, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) or 'Max' in type(layer).__name__:
        expected = naive_max_pool(layer, shaped, relevance, cardinality)[0]
    else:
        expected = naive_relative(layer, shaped, relevance, cardinality)
    assert_close(lower, expected.view(input.shape), 1e-12)


@pytest.mark.parametrize('name', ['amax', 'max'])
def test_functional_ties(name):
    '''Maxima over whole dimensions: all of them are credited.'''
    input = torch.tensor([[2., 5., 5., 1., 5.], [7., 0., 3., 7., 7.]]).double()[None]
    function = {'amax': lambda m, x: x.amax(2), 'max': lambda m, x: x.max(2)[0]}[name]
    _, lower = composite_attribute(Function(function), input, relevance=torch.tensor([[1., 10.]]).double())
    expected = torch.tensor([[0., 5., 5., 0., 5.], [70., 0., 0., 70., 70.]]).double()[None] / 10
    assert_close(lower, expected, 1e-12)


def test_functional_values():
    '''The result of a maximum along a dimension keeps its names.'''
    input = torch.randn(2, 3, 7).double()
    relevance, lower = composite_attribute(Function(lambda m, x: x.max(dim=2, keepdim=True).values), input)
    assert_close(lower, naive_max_pool(nn.AdaptiveMaxPool1d(1), input, relevance)[0], 1e-12)


def test_functional_indices():
    '''Functional adaptive pooling which returns indices as well.'''
    input = torch.randn(2, 3, 5, 6).double()
    model = Function(lambda m, x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0])
    relevance, lower = composite_attribute(model, input)
    assert_close(lower, naive_max_pool(nn.AdaptiveMaxPool2d(2), input, relevance)[0], 1e-12)


@pytest.mark.parametrize('name', ['max_pool2d', 'avg_pool2d', 'conv2d'])
def test_functional_single_setting(name):
    '''Settings in a tuple of one element are for all dimensions.'''
    functions = {
        'max_pool2d': (lambda m, x: F.max_pool2d(x, (2,), (1,)), nn.MaxPool2d(2, 1)),
        'avg_pool2d': (lambda m, x: F.avg_pool2d(x, (2,), (1,)), nn.AvgPool2d(2, 1)),
        'conv2d': (lambda m, x: F.conv2d(x, m.layer.weight, m.layer.bias, (2,), (1,)), nn.Conv2d(3, 4, 3, 2, 1)),
    }
    function, layer = functions[name]
    input = torch.randn(2, 3, 5, 6).double()
    relevance, lower = composite_attribute(Function(function, layer=layer.double()), input, cardinality='per_position')
    if name == 'max_pool2d':
        expected = naive_max_pool(layer, input, relevance, 'per_position')[0]
    else:
        expected = naive_relative(layer, input, relevance, 'per_position')
    assert_close(lower, expected, 1e-12)


@pytest.mark.parametrize('number', [1, 2])
def test_functional_maximum_of_two(number):
    '''Like the maximum of two tensors by another name, that of torch.max passes contributions to the larger one.'''
    inputs, zero = torch.randn(2, 2, 3, 4).double()[:number], torch.zeros(()).double()
    expected = composite_attribute(Function(lambda m, a, b=zero: torch.maximum(a, b)), *inputs)
    actual = composite_attribute(Function(lambda m, a, b=zero: torch.max(a, b)), *inputs, relevance=expected[0])
    for pair in zip(actual, expected):
        assert_close(*pair)


def test_functional_sizes():
    '''State belongs to a call: functional windows may depend on the size of the input.'''
    model = Function(lambda m, x: F.avg_pool2d(m.conv(x), x.shape[3]).flatten(1), conv=nn.Conv2d(3, 2, 3, padding=1))
    inputs = [torch.randn(1, 3, size, size).double() for size in (4, 8)]
    model = model.double()
    expected = [composite_attribute(model, elem, relevance=torch.ones(1, 2).double())[1] for elem in inputs]
    with RelativeLRP().context(model):
        inputs = [elem.requires_grad_() for elem in inputs]
        outputs = [model(elem) for elem in inputs]
        for input, output, single in zip(inputs, outputs, expected):
            lower, = torch.autograd.grad(output, input, torch.ones_like(output))
            # up to the scale
            assert_close(lower / lower.abs().max(), single / single.abs().max(), 1e-12)


def test_same_padding_subclass():
    '''Convolutions of a class of their own, which pad by themselves, as in EfficientNet.'''
    class SameConv(nn.Conv2d):
        '''Pads more after than before.'''
        def forward(self, input):
            '''Convolution.'''
            return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    module, input = SameConv(2, 3, 3, stride=2).double(), torch.randn(2, 2, 6, 6).double()
    relevance, lower = composite_attribute(Function(lambda m, x: m.conv(x), conv=module), input)
    plain = nn.Conv2d(2, 3, 3, stride=2).double()
    plain.load_state_dict(module.state_dict())
    expected = naive_relative(plain, F.pad(input, (0, 1, 0, 1)), relevance)[..., :-1, :-1]
    assert_close(lower, expected, 1e-12)


# -- laws of plain networks --------------------------------------------------------------------------------------------

class Factor(torch.autograd.Function):
    '''The identity, whose gradient is multiplied with its value.'''
    # pylint: disable=abstract-method,arguments-differ
    @staticmethod
    def forward(ctx, value):
        '''Identity.'''
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        '''Product.'''
        return grad * ctx.saved_tensors[0]


def plain_network(bias=True, width=4, depth=2):
    '''A convolutional network without skip connections, with all kinds of layers, in evaluation mode.'''
    layers = [nn.Conv2d(3, width, 5, 2, 2, bias=bias), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=bias), nn.ReLU(inplace=True)]
    layers += [
        nn.AvgPool2d(2), nn.ConvTranspose2d(width, 3, 2, 2, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(12, 6, bias=bias), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4, bias=bias),
    ]
    return nn.Sequential(*layers).double().eval()


def closed_form(model, input, start=None):
    '''Contributions of a plain network: its backward pass with each layer's input as a factor, and log C.'''
    input, log_constant = input.clone().requires_grad_(), 0.
    value = input
    for layer in model:
        if isinstance(layer, (nn.ReLU, nn.Dropout, nn.Flatten)):
            value = layer(value.clone())
            continue
        shape = value.shape[1:]
        value = layer(Factor.apply(value))
        fan_in, fan_out = naive_counts(layer, shape, 'constant', torch.zeros(1, 1)) if not hasattr(
            layer, 'output_size'
        ) else (math.prod(shape[1:]) / math.prod(value.shape[2:]), 1)
        log_constant += math.log(fan_out / (value[0].numel() * fan_in))
    start = torch.eye(value.shape[1]).to(value)[[1] * len(value)] * value if start is None else start
    return torch.autograd.grad(value, input, start.detach())[0], log_constant


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize('depth, width', [(0, 4), (2, 4), (30, 16)])
def test_closed_form(depth, width, dtype, tolerance):
    '''z = C y_k x times a backward pass, with C = prod Card / (N M). The logarithm of the scale makes it exact.'''
    model, input = plain_network(depth=depth, width=width), torch.randn(2, 3, 32, 32).double()
    expected, log_constant = closed_form(model, input)
    lower, log_scale = explain(model.to(dtype), input.to(dtype))
    magnitude, reference = (elem.double().abs().amax((1, 2, 3)) for elem in (lower, expected))
    assert bool((reference > 0).all())
    difference = magnitude.log() + log_scale - reference.log() - log_constant
    assert float(difference.abs().max()) < max(tolerance, abs(log_constant) * 1e-9)
    assert_close(lower.double() / magnitude.view(-1, 1, 1, 1), expected / reference.view(-1, 1, 1, 1), tolerance)
    # beyond single precision
    assert depth < 30 or log_constant < -100


def test_closed_form_merge():
    '''Batch normalization is folded into the layer before it by default, and passes otherwise.'''
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    folded = nn.Conv2d(3, 4, 3).double()
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    folded.weight.data = conv.weight.data * scale.view(-1, 1, 1, 1)
    folded.bias.data = norm.bias - norm.running_mean * scale
    input = torch.randn(2, 3, 6, 6).double()
    reference = nn.Sequential(folded, *model[2:])
    assert_close(reference(input).detach(), model(input).detach(), 1e-12)
    expected, _ = explain(reference, input)
    actual, _ = explain(model, input)
    assert_close(actual, expected, 1e-12)
    passed, _ = explain(model, input, batch_norm='pass')
    middle = explain(nn.Sequential(nn.ReLU(), *model[3:]), model[:2](input).detach())[0]
    assert_close(passed, naive_relative(conv, input, middle), 1e-12)
    assert float((passed - actual).abs().max()) > 1e-3 * float(actual.abs().max())


@pytest.mark.parametrize('groups', [1, 2])
def test_merge_transposed(groups):
    '''Batch normalization is folded into a transposed convolution, whose weight has its outputs second.'''
    conv, norm = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False), nn.BatchNorm2d(6)
    norm.running_mean.normal_(), norm.running_var.uniform_(.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 3))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), conv, norm, *head).double().eval()
    folded = nn.ConvTranspose2d(4, 6, 3, groups=groups).double()
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    for channel in range(4):
        for output in range(6 // groups):
            index = channel * groups // 4 * (6 // groups) + output
            folded.weight.data[channel, output] = conv.weight.data[channel, output] * scale[index]
    folded.bias.data = norm.bias.data - norm.running_mean * scale
    input = torch.randn(2, 4, 4, 4).double()
    reference = nn.Sequential(model[0], folded, *head)
    assert_close(reference(input).detach(), model(input).detach(), 1e-12)
    assert_close(explain(model, input)[0], explain(reference, input)[0], 1e-12)


@both_cardinalities
def test_permuted_inputs(cardinality):
    '''Permuting inputs along with weights permutes contributions: pixels of a dense network, channels, and sides.'''
    dense = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    input, order = torch.randn(4, 12).double(), torch.randperm(12)
    expected, _ = explain(dense, input, cardinality=cardinality)
    dense[0].weight.data = dense[0].weight.data[:, order]
    assert_close(explain(dense, input[:, order], cardinality=cardinality)[0], expected[:, order], 1e-12)
    # hidden neurons
    order = torch.randperm(8)
    before, _ = explain(dense, input, cardinality=cardinality)
    for param, dim in ((dense[0].weight, 0), (dense[0].bias, 0), (dense[2].weight, 1)):
        param.data = param.data.index_select(dim, order)
    assert_close(explain(dense, input, cardinality=cardinality)[0], before, 1e-12)

    model, images = plain_network(), torch.randn(2, 3, 17, 17).double()
    expected, _ = explain(model, images, cardinality=cardinality)
    model[0].weight.data = model[0].weight.data[:, [2, 0, 1]]
    assert_close(explain(model, images[:, [2, 0, 1]], cardinality=cardinality)[0], expected[:, [2, 0, 1]], 1e-12)

    # with an odd size, the windows of a mirrored image are those of the image
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    ).double()
    expected, _ = explain(model, images, cardinality=cardinality)
    model[0].weight.data = model[0].weight.data.flip(3)
    assert_close(explain(model, images.flip(3), cardinality=cardinality)[0], expected.flip(3), 1e-12)


@both_cardinalities
@pytest.mark.parametrize('factor', [1e-3, .5, 7., 1e3])
def test_scaled_inputs(factor, cardinality):
    '''Without biases, z(s x) = s^(T + 1) z(x) for T layers, poolings included.'''
    model, input = plain_network(bias=False), torch.randn(2, 3, 16, 16).double()
    num_layers = sum(not isinstance(layer, (nn.ReLU, nn.Flatten, nn.Dropout)) for layer in model)
    (first, first_log), (second, second_log) = (
        explain(model, elem, cardinality=cardinality) for elem in (input, input * factor)
    )
    shift = (num_layers + 1) * math.log(factor) + first_log - second_log
    assert_close(second, first * shift.exp().view(-1, 1, 1, 1), 1e-10)


def test_linear_in_relevance():
    '''Contributions in a plain network are linear in what they start from.'''
    model, input = plain_network(), torch.randn(3, 3, 16, 16).double()
    starts = [torch.randn(3, 4).double() for _ in range(2)]
    results = []
    for start in (*starts, 2e20 * starts[0] - 3e20 * starts[1]):
        lower, log_scale = explain(model, input, start)
        results.append(lower * log_scale.exp().view(-1, 1, 1, 1))
    assert_close(results[2], 2e20 * results[0] - 3e20 * results[1], 1e-10)


def test_zero_inputs():
    '''Where the input is zero, there is no contribution, and none for nothing.'''
    model, input = plain_network(), torch.randn(2, 3, 16, 16).double()
    mask = torch.rand(input.shape) < .5
    input[mask] = 0.
    lower, _ = explain(model, input)
    assert bool((lower[mask] == 0).all()) and bool((lower[~mask] != 0).any())
    lower, log_scale = explain(model, input, torch.zeros(2, 4).double())
    assert bool((lower == 0).all()) and bool(log_scale.isfinite().all())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_batch_independence(dtype, tolerance):
    '''An example is the same alone and in a batch, where others are rescaled or have no contributions.'''
    model = plain_network(depth=6).to(dtype)
    input = torch.randn(5, 3, 16, 16).to(dtype) * torch.tensor([1e-3, 1., 1e3, 0., 1e5]).view(-1, 1, 1, 1).to(dtype)
    lower, log_scale = explain(model, input)
    # some are rescaled, some are not or less so
    assert len(set(log_scale.tolist())) > 2
    for num in range(5):
        alone, alone_log = explain(model, input[num:num + 1])
        assert float((log_scale[num] - alone_log[0]).abs()) < 1e-12
        if num == 3:
            assert bool((lower[num] == 0).all()) and bool((alone == 0).all())
            continue
        assert_close(lower[num:num + 1].double(), alone.double(), tolerance)


def test_number_of_neurons_is_a_constant():
    '''Definition 9 in closed form for two dense layers: no sum over outputs is proportional to the output.'''
    first, second = nn.Linear(5, 4, bias=False).double(), nn.Linear(4, 3, bias=False).double()
    input = torch.rand(1, 5).double()
    lower, log_scale = explain(nn.Sequential(first, second), input)
    hidden, output = first(input).detach(), second(first(input)).detach()
    expected = output[0, 1] / (5 * 4) * (second.weight.detach()[1] * hidden ** 2).sum()
    assert float(lower.sum() * log_scale.exp()) == pytest.approx(float(expected), rel=1e-12)


# -- arguments, errors -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('build', [Relative, RelativeMaxPool, RelativeLRP])
def test_unknown_cardinality(build):
    '''Names of choices are listed.'''
    with pytest.raises(ValueError, match="cardinality='position' is not one of 'constant', 'per_position'"):
        build(cardinality='position')


@pytest.mark.parametrize('name, value', [('normalization', 'l2'), ('batch_norm', 'fold')])
def test_unknown_arguments(name, value):
    '''The argument is named.'''
    with pytest.raises(ValueError, match=f"{name}='{value}' is not one of"):
        RelativeLRP(**{name: value})
    with pytest.raises(TypeError):
        RelativeLRP(epsilon=1e-6)


def test_registered():
    '''The composite is known by its name, and has no hyper-parameters.'''
    assert COMPOSITES['relative_lrp'] is RelativeLRP


def test_copies_keep_arguments():
    '''Composites copy rules for each module.'''
    rule = RelativeMaxPool('per_position')
    assert type(rule.copy()) is RelativeMaxPool and rule.copy().cardinality == 'per_position'
    model, input = plain_network(), torch.randn(1, 3, 16, 16).double()
    constant, counted = (explain(model, input, cardinality=name)[0] for name in ('constant', 'per_position'))
    assert float((constant - counted).abs().max()) > 1e-3 * float(constant.abs().max())


@pytest.mark.parametrize('build, shape', [
    (lambda: nn.Linear(7, 5), (7,)),
    (lambda: nn.Conv2d(3, 2, 3), (3, 5, 5)),
    (lambda: nn.Conv1d(3, 2, 3), (3, 5)),
    (lambda: nn.ConvTranspose2d(3, 2, 3), (3, 5, 5)),
    (lambda: nn.AvgPool2d(2), (3, 6, 6)),
    (lambda: nn.AdaptiveAvgPool2d(2), (3, 6, 6)),
    (lambda: nn.MaxPool2d(2), (3, 6, 6)),
    (lambda: nn.MaxPool1d(2), (3, 6)),
])
def test_unbatched(build, shape):
    '''Examples without a batch: the layer, the shape, and what to do.'''
    module = build()
    with pytest.raises(ValueError) as info:
        explain(nn.Sequential(module), torch.randn(shape), 1.)
    for part in (str(module), str(tuple(shape)), 'batch', 'add a first dimension'):
        assert part in str(info.value)


@pytest.mark.parametrize('build, shape', [
    (lambda: nn.Linear(7, 5), (0, 7)), (lambda: nn.Conv2d(3, 2, 3), (0, 3, 5, 5)),
    (lambda: nn.MaxPool2d(2), (0, 3, 6, 6)), (lambda: nn.AdaptiveAvgPool2d(2), (0, 3, 6, 6)),
])
def test_empty_batch(build, shape):
    '''Batches of nothing.'''
    module = build()
    with pytest.raises(ValueError) as info:
        explain(nn.Sequential(module), torch.randn(shape))
    assert str(module) in str(info.value) and f'empty batch of shape {shape}' in str(info.value)
    assert torch.is_grad_enabled()


def test_unsupported_layer():
    '''Layers without a rule: the error names the layer and the reason, and the model is left as it was.'''
    layer = Function(lambda m, x: m.linear(x).cumprod(1), linear=nn.Linear(6, 4))
    model = Function(lambda m, x: m.body.layer(x), body=nn.ModuleDict({'layer': layer})).double().eval()
    params = [(id(param), param.requires_grad) for param in model.parameters()]
    with pytest.raises(RuntimeError) as info:
        explain(model, torch.randn(2, 3, 6).double(), 1.)
    for part in ('body.layer', 'Function', "'cumprod'", 'no rule covers it'):
        assert part in str(info.value)
    assert [(id(param), param.requires_grad) for param in model.parameters()] == params
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('function', [lambda x: x.cumprod(1), lambda x: x.prod(1)])
def test_unsupported_function(function):
    '''Functions without a rule.'''
    with pytest.raises(RuntimeError, match='no rule covers it'):
        composite_attribute(Function(lambda m, x: function(x)), torch.randn(2, 3, 6, 6).double())


# -- windows -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', LAYERS)
def test_windows(name):
    '''Transposed maps and counts of windows, which are the products of those of each dimension.'''
    build, shape = LAYERS[name]
    module, input = build().double(), torch.randn(2, *shape).double()
    if isinstance(module, nn.Linear):
        return
    output = module(input)
    counts = connections(module, shape).sum(1).view(shape)
    if hasattr(module, 'weight'):
        weight = torch.randn_like(module.weight)
        expected = output.flatten(1) @ matrix(with_weight(module, weight), shape).T
        actual = maps.convolve_transposed(module, input, weight, output)
        assert_close(actual.detach(), expected.view(input.shape).detach(), 1e-12)
        counts = counts / (module.out_channels // module.groups)
    assert torch.equal(maps.count_uses(module, input, output).expand(1, *shape)[0], counts)


@pytest.mark.parametrize('length, out', [(7, 3), (5, 4), (3, 5), (6, 6), (1, 1), (224, 7), (13, 6)])
def test_adaptive_bounds(length, out):
    '''Windows of adaptive poolings, as torch has them.'''
    weights = matrix(functools.partial(F.adaptive_avg_pool1d, output_size=out), (1, length)) > 0
    bounds = maps.adaptive_bounds(length, out)
    assert [list(range(*bound)) for bound in bounds] == [column.nonzero()[:, 0].tolist() for column in weights.T]
    sizes = maps.adaptive_sizes(torch.zeros(1, 1, length), torch.zeros(1, 1, out))
    assert sizes.flatten().tolist() == weights.sum(0).tolist()
