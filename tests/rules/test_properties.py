'''Laws that hold for all layers and networks, checked on random ones.

HYPOTHESIS_PROFILE=thorough tries more examples, and others each time.
'''
import contextlib
import copy
import operator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import attribute
from helpers.ledger import check_sums
from helpers.networks import randomize
from helpers.profile import PROFILE
from helpers.state import Snapshot
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from zennit.composites import EpsilonPlusFlat

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.rules import Relative, RelativeMaxPool, ZPlus

pytestmark = pytest.mark.once

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
DTYPES = st.sampled_from([torch.float64, torch.float64, torch.float32])


def assert_equal(actual, expected, dtype, scale=None):
    '''Compare up to rounding, relative to the largest value.'''
    assert actual.shape == expected.shape and actual.isfinite().all()
    scale = float(expected.abs().max()) if scale is None else float(scale)
    assert float((actual - expected).abs().max()) <= TOLERANCE[dtype] * scale


# -- layers ------------------------------------------------------------------------------------------------------------

CONV = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
TRANSPOSED = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
AVERAGE = {1: torch.nn.AvgPool1d, 2: torch.nn.AvgPool2d, 3: torch.nn.AvgPool3d}
MAXIMUM = {1: torch.nn.MaxPool1d, 2: torch.nn.MaxPool2d, 3: torch.nn.MaxPool3d}
ADAPTIVE = {
    'average': {1: torch.nn.AdaptiveAvgPool1d, 2: torch.nn.AdaptiveAvgPool2d, 3: torch.nn.AdaptiveAvgPool3d},
    'max': {1: torch.nn.AdaptiveMaxPool1d, 2: torch.nn.AdaptiveMaxPool2d, 3: torch.nn.AdaptiveMaxPool3d},
}
LINEAR_KINDS = ('linear', 'conv', 'transposed', 'average', 'adaptive average')
KINDS = (*LINEAR_KINDS, 'max', 'adaptive max')


@dataclass
class Layer:
    '''A layer with an input.'''
    module: torch.nn.Module
    shape: tuple
    sign: str
    seed: int
    dtype: torch.dtype = torch.float64

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.module = self.module.to(self.dtype)
        for param in self.module.parameters():
            # an entry of zero now and then
            value = torch.randn(param.shape, generator=generator) * (torch.rand(param.shape, generator=generator) > .1)
            param.data = value.to(self.dtype)
        input = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.sign == 'positive':
            input = input.abs() + .1
        if self.sign == 'dead':
            # most is zero, and all of the first sample
            input = input.clamp(min=0) * (torch.rand(self.shape, generator=generator) > .6)
            input[0] = 0.
        self.input = input.clamp(-4, 4).to(self.dtype)
        output = self.module(self.input).detach()
        self.relevance = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def apply(self, rule, index=slice(None), relevance=None, first=True, convert=lambda tensor: tensor):
        '''Lower relevance, of the first layer of a network or of another.'''
        relevance = convert(self.relevance if relevance is None else relevance)[index]
        input = convert(self.input)[index]
        if first:
            return attribute(rule, self.module, input, relevance=relevance)[2]
        # the identity as a layer before
        before = torch.nn.Linear(input.shape[-1], input.shape[-1], bias=False).to(input)
        torch.nn.init.eye_(before.weight)
        handles = ZPlus().register(before), rule.register(self.module)
        inner = before(input.clone().requires_grad_())
        lower, = torch.autograd.grad(self.module(inner), inner, relevance)
        for handle in handles:
            handle.remove()
        return lower


@st.composite
def layers(draw, kinds=KINDS, signs=('positive', 'signed', 'dead'), dtypes=DTYPES):
    '''Layers of all settings for which there is an output.'''
    kind, batch, seed = draw(st.sampled_from(kinds)), draw(st.integers(1, 3)), draw(st.integers(0, 2 ** 16))
    sign, dtype, small = draw(st.sampled_from(signs)), draw(dtypes), st.integers(1, 3)
    if kind == 'linear':
        shape = (batch, *draw(st.lists(small, max_size=2)), draw(st.integers(1, 6)))
        module = torch.nn.Linear(shape[-1], draw(st.integers(1, 5)), bias=draw(st.booleans()))
        return Layer(module, shape, sign, seed, dtype)
    num = draw(st.sampled_from([1, 2, 2, 3]))

    def each(strategy):
        return tuple(draw(strategy) for _ in range(num))

    groups, channels, extra = draw(small), draw(small), each(st.integers(0, 6 if num < 3 else 2))
    if kind.startswith('adaptive'):
        shape = (batch, channels, *(elem + 1 for elem in extra))
        return Layer(ADAPTIVE[kind.split()[1]][num](each(small)), shape, sign, seed, dtype)
    kernel, stride, dilation = each(small), each(st.integers(1, 4)), each(st.integers(1, 2))
    if kind == 'average':
        padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
        # in three dimensions, PyTorch insists on inputs of the size of the kernel
        sizes = tuple(
            max(size - 2 * pad * (num < 3), 1) + more for size, pad, more in zip(kernel, padding, extra)
        )
        module = AVERAGE[num](kernel, stride, padding, draw(st.booleans()), draw(st.booleans()))
        return Layer(module, (batch, channels, *sizes), sign, seed, dtype)
    spans = tuple((size - 1) * dil + 1 for size, dil in zip(kernel, dilation))
    if kind == 'max':
        padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
        module = MAXIMUM[num](kernel, stride, padding, dilation, ceil_mode=draw(st.booleans()))
        shape = (batch, channels, *(span + more for span, more in zip(spans, extra)))
        return Layer(module, shape, sign, seed, dtype)
    widths = channels * groups, draw(small) * groups
    options = {'groups': groups, 'bias': draw(st.booleans()), 'dilation': dilation}
    if kind == 'transposed':
        output_padding = tuple(draw(st.integers(0, max(step, dil) - 1)) for step, dil in zip(stride, dilation))
        # at least one position of the output is left
        padding = tuple(draw(st.integers(0, (span - 1) // 2)) for span in spans)
        module = TRANSPOSED[num](*widths, kernel, stride, padding, output_padding, **options)
        return Layer(module, (batch, widths[0], *(elem + 1 for elem in extra)), sign, seed, dtype)
    mode = draw(st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']))
    if draw(st.integers(0, 5)) == 5:
        padding, stride, total = 'same', (1,) * num, spans
    else:
        padding = tuple(draw(st.integers(0, span)) for span in spans)
        total = tuple(2 * pad for pad in padding)
    sizes = tuple(
        # padding with what is there cannot be wider than that
        max(span - pads, 1 if mode == 'zeros' else span + 1) + more for span, pads, more in zip(spans, total, extra)
    )
    module = CONV[num](*widths, kernel, stride, padding, padding_mode=mode, **options)
    return Layer(module, (batch, widths[0], *sizes), sign, seed, dtype)


@st.composite
def zplus(draw, layer):
    '''Settings of the z+ rule with which it conserves relevance.'''
    maxpool = ['winner']
    if isinstance(layer.module, tuple(MAXIMUM.values())):
        kernel, dilation = layer.module.kernel_size, layer.module.dilation
        maxpool += ['average'] * (set(dilation) == {1})
        outputs = tuple(length // 2 for length in layer.shape[2:])
        maxpool += ['avg2x2'] * (len(kernel) == 2 and outputs == layer.relevance.shape[2:] and min(outputs) > 0)
    # denominators of the literal rule vanish where inputs are negative
    variants = ['zplus', 'ones', 'zbox', 'wsquare', 'flat'] + ['literal'] * (layer.sign != 'signed')
    variant, bound = draw(st.sampled_from(variants)), float(layer.input.abs().max()) + 1
    return {
        'first_layer': variant, 'projection': draw(st.sampled_from(['spread', 'literal'])),
        'coverage': draw(st.sampled_from(['literal', 'even'])), 'maxpool': draw(st.sampled_from(maxpool)),
        **({'low': -bound, 'high': bound} if variant == 'zbox' else {}),
    }


def reads_input(module, input):
    '''Which outputs read anything but zeros of the padding, of the shape of the output.'''
    if not hasattr(module, 'weight') or isinstance(module, torch.nn.Linear):
        return torch.ones_like(module(input).detach(), dtype=torch.bool)
    module = copy.deepcopy(module)
    module.bias = None
    module.weight.data.fill_(1.)
    return module(torch.ones_like(input)).detach() > 0


@PROFILE
@given(layers(), st.booleans(), st.data())
def test_zplus_conserves(layer, first, data):
    '''z+ with all its settings: relevance is conserved for each sample, and is not negative.'''
    options = data.draw(zplus(layer), 'options')
    # relevance of units which see nothing but padding has nowhere to go
    relevance = layer.relevance * reads_input(layer.module, layer.input)
    lower = layer.apply(ZPlus(**options), relevance=relevance, first=first)
    sums, expected = (elem.double().flatten(1).sum(1) for elem in (lower, relevance))
    assert_equal(sums, expected, layer.dtype, expected.max())
    if not isinstance(layer.module, (*MAXIMUM.values(), *ADAPTIVE['max'].values())) or layer.sign != 'signed':
        assert float(lower.min()) >= 0


@pytest.mark.parametrize('shape', [(1, 2, 1, 1, 1), (1, 2, 1, 5, 2)])
def test_projection_of_short_videos(shape):
    '''Strides may be longer than a video, for which PyTorch has no pooling in three dimensions.'''
    layer = Layer(torch.nn.Conv3d(2, 3, 1, stride=3), shape, 'positive', 0)
    lower = layer.apply(ZPlus())
    assert_equal(lower.sum(), layer.relevance.sum(), layer.dtype)


def rules(layer, data):
    '''All rules for a layer.'''
    is_max = isinstance(layer.module, (*MAXIMUM.values(), *ADAPTIVE['max'].values()))
    kind = data.draw(st.sampled_from(['ZPlus', 'constant', 'per_position']), 'rule')
    if kind == 'ZPlus':
        return ZPlus(**data.draw(zplus(layer), 'options'))
    return (RelativeMaxPool if is_max else Relative)(kind)


@PROFILE
@given(layers(dtypes=st.just(torch.float64)), st.booleans(), st.data())
def test_layer_is_linear(layer, first, data):
    '''A rule is linear in the relevance.'''
    rule, second = rules(layer, data), torch.cos(1e4 * layer.relevance)
    results = [layer.apply(rule, relevance=elem, first=first) for elem in (
        layer.relevance, second, 2 * layer.relevance - 3 * second
    )]
    scale = max(float(elem.abs().max()) for elem in results)
    assert_equal(results[2], 2 * results[0] - 3 * results[1], layer.dtype, scale)


@PROFILE
@given(layers(), st.booleans(), st.data())
def test_layer_batch(layer, first, data):
    '''Each sample alone gives what it gives in the batch.'''
    rule = rules(layer, data)
    together = layer.apply(rule, first=first)
    alone = [layer.apply(rule, slice(num, num + 1), first=first) for num in range(len(layer.input))]
    assert_equal(torch.cat(alone), together, layer.dtype)


@PROFILE
@given(layers(), st.booleans(), st.data())
def test_layer_memory_format(layer, first, data):
    '''How tensors lie in memory makes no difference.'''
    def convert(tensor):
        if tensor.ndim in (4, 5):
            return tensor.to(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    rule = rules(layer, data)
    assert_equal(layer.apply(rule, first=first, convert=convert), layer.apply(rule, first=first), layer.dtype)


def connections(module, input):
    '''Number of outputs that each input is connected to, of the shape of the input.'''
    module = copy.deepcopy(module)
    input = torch.ones_like(input).requires_grad_()
    if hasattr(module, 'weight'):
        module.weight.data.fill_(1.)
        return torch.autograd.grad(module(input).sum(), input)[0]
    output = module(input)
    # each window on its own, as poolings have different weights
    rows = [torch.autograd.grad(elem, input, retain_graph=True)[0] != 0 for elem in output.flatten()]
    return torch.stack(rows).sum(0)


@PROFILE
@given(
    layers(LINEAR_KINDS, ('positive', 'signed'), st.just(torch.float64)), st.sampled_from(['constant', 'per_position'])
)
# an output padding beyond the stride
@example(Layer(torch.nn.ConvTranspose1d(1, 1, 2, dilation=3, output_padding=2), (1, 1, 4), 'positive', 0), 'constant')
def test_relative_identity(layer, cardinality):
    '''Definition 9 of R-LRP: sum_i z_i N / Card(J_i) = sum_j a_j z_j / M_j, with outputs a_j without bias.'''
    module, input, relevance = layer.module, layer.input, layer.relevance
    lower = layer.apply(Relative(cardinality))
    plain = copy.deepcopy(module)
    plain.bias = None
    output = plain(input).detach()
    number = connections(module, input) if cardinality == 'per_position' or hasattr(module, 'output_size') else None
    if isinstance(module, torch.nn.Linear):
        fan_in, fan_out = module.in_features, module.out_features
    elif hasattr(module, 'output_size'):
        # the sizes of windows, which are all inside
        ones = torch.ones_like(input)
        fan_in = (1 / torch.autograd.functional.jacobian(lambda x: module(x), ones).flatten(output.ndim).amax(-1))
        fan_out = 1
    else:
        positions = torch.tensor(module.kernel_size).prod()
        fan_in = positions * (getattr(module, 'in_channels', 1) // getattr(module, 'groups', 1))
        fan_out = positions * (getattr(module, 'out_channels', 1) // getattr(module, 'groups', 1))
    if cardinality == 'per_position' and not isinstance(module, torch.nn.Linear):
        fan_out = number
        assert not lower[number == 0].any()
        fan_out = torch.where(number == 0, 1, number)
    left = (lower / fan_out).flatten(1).sum(1) * relevance[0].numel()
    right = (output * relevance / fan_in).flatten(1).sum(1)
    assert_equal(left, right, layer.dtype, (output * relevance / fan_in).abs().sum() + 1e-300)


@PROFILE
@given(layers(('max', 'adaptive max'), dtypes=st.just(torch.float64)))
def test_relative_max_pool_identity(layer):
    '''The same for the max pooling, where each maximum of a window has a weight of one (Proposition 13).'''
    assume(layer.sign != 'dead')
    lower = layer.apply(RelativeMaxPool())
    module, output = layer.module, layer.module(layer.input)
    fan_in = fan_out = getattr(module, 'kernel_size', None)
    if fan_in is None:
        average = ADAPTIVE['average'][output.ndim - 2](module.output_size)
        weights = torch.autograd.functional.jacobian(lambda x: average(x), torch.ones_like(layer.input))
        fan_in, fan_out = 1 / weights.flatten(output.ndim).amax(-1), torch.tensor(1)
    else:
        fan_in = fan_out = torch.tensor(fan_in).prod()
    terms = output * layer.relevance / fan_in
    assert_equal(lower.sum() / fan_out * layer.relevance[0].numel(), terms.sum(), layer.dtype, terms.abs().sum())


# -- networks ----------------------------------------------------------------------------------------------------------

class Node(torch.nn.Module):
    '''A part of a network. If it is flat, its operations are those of the part it is in.'''
    flat = False
    text = ''

    def extra_repr(self):
        '''Say in one word what it does.'''
        return self.text


def run(module, x):
    '''Run a module, or only what it does.'''
    return module.forward(x) if isinstance(module, Node) and module.flat else module(x)


class Sequence(Node):
    '''Parts that follow each other.'''
    def __init__(self, parts, times=1):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.times, self.text = times, f'times={times}' if times > 1 else ''

    def forward(self, x):
        '''Run all parts, possibly several times.'''
        for _ in range(self.times):
            for part in self.parts:
                x = run(part, x)
        return x


class Function(Node):
    '''A function, with modules.'''
    def __init__(self, text, function, **modules):
        super().__init__()
        self.text, self.function = text, function
        for key, value in modules.items():
            setattr(self, key, value)

    def forward(self, x):
        '''Run the function.'''
        return self.function(self, x)


class Interrupt(Node):
    '''The identity, which raises in the forward or backward pass on demand.'''
    def __init__(self, kind):
        super().__init__()
        self.kind, self.where = kind, []

    def forward(self, x):
        '''A copy, which may be overwritten.'''
        x = x.clone()
        if 'forward' in self.where or 'layer' in self.where:
            raise self.kind('on purpose')
        if 'backward' in self.where:
            x.register_hook(self.fail)
        return x

    def fail(self, relevance):
        '''Raise.'''
        raise self.kind('on purpose')


class InterruptLayer(Interrupt, torch.nn.ReLU):
    '''The same as a layer which has a rule.'''


class Residual(Node):
    '''A residual block.'''
    def __init__(self, addition, body, skip):
        super().__init__()
        self.text, self.body, self.skip = addition, body, skip

    def forward(self, x):
        '''Sum of both.'''
        return ADDITIONS[self.text](run(self.body, x), x if self.skip is None else run(self.skip, x))


class Branches(Node):
    '''Branches side by side.'''
    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        '''Concatenate.'''
        return torch.cat([run(part, x) for part in self.parts], 1)


class Network(Node):
    '''A network for one or two images.'''
    def __init__(self, stems, addition, body, head, size):
        super().__init__()
        self.stems, self.addition = torch.nn.ModuleList(stems), addition
        self.body, self.head = body, head
        self.size = (2, 3, *size)
        self.text = f'images {tuple(self.size)}, {addition!r}'

    def forward(self, *images):
        '''Logits.'''
        x = run(self.stems[0], images[0])
        for stem, image in zip(self.stems[1:], images[1:]):
            x = ADDITIONS[self.addition](x, run(stem, image))
        return run(self.head, run(self.body, x))


ADDITIONS = {
    '+': operator.add, '+=': operator.iadd, 'torch.add': torch.add, 'add_': lambda a, b: a.add_(b),
    'right': lambda a, b: b + a, 'alpha': lambda a, b: torch.add(a, b, alpha=.5), '-': operator.sub,
    'keywords': lambda a, b: torch.add(input=a, other=b), 'sum': lambda a, b: sum((a, b)),
    'stack': lambda a, b: torch.stack((a, b), 1).sum(1), 'statement': lambda a, b: (a.add_(b), a)[1],
    'iadd': lambda a, b: a.__iadd__(b), 'out of three': lambda a, b: a + b + b,
}
ACTIVATIONS = {
    'F.relu': lambda m, x: F.relu(x), 'F.relu_': lambda m, x: F.relu(x, inplace=True), 'relu': lambda m, x: x.relu(),
    'relu_': lambda m, x: x.relu_(), 'clamp': lambda m, x: x.clamp(min=0), 'silu': lambda m, x: F.silu(x),
    'swish': lambda m, x: x * x.sigmoid(), 'hardswish': lambda m, x: F.hardswish(x), 'gelu': lambda m, x: F.gelu(x),
}
MODULES = (
    torch.nn.ReLU, lambda: torch.nn.ReLU(inplace=True), torch.nn.GELU, torch.nn.LeakyReLU, torch.nn.Identity,
    lambda: torch.nn.Dropout(.5), lambda: torch.nn.Dropout2d(.5, inplace=True), lambda: torch.nn.MaxPool2d(3, 1, 1),
    lambda: torch.nn.AvgPool2d(3, 1, 1),
)
MOVES = {
    'dropout': lambda m, x: F.dropout(x, .5, m.training), 'clone': lambda m, x: x.clone(),
    'shuffle': lambda m, x: x.flip(1).contiguous(), 'cat': lambda m, x: torch.cat(x.split(1, 1)[::-1], 1),
    'layout': lambda m, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    'pad': lambda m, x: F.pad(x, (1, 0, 0, 1))[..., :-1, 1:], 'number': lambda m, x: 2 * x + 1,
    'avg_pool2d': lambda m, x: F.avg_pool2d(x, 3, 1, 1),
    'max_pool2d': lambda m, x: F.max_pool2d(x, 2, 1, 1)[..., 1:, 1:],
}
GATES = {
    'x * gate': lambda x, gate: x * gate, 'gate * x': lambda x, gate: gate * x,
    'mul': lambda x, gate: torch.mul(x, gate), 'mul_': lambda x, gate: x.mul_(gate),
    '*=': operator.imul, 'expand': lambda x, gate: gate.expand_as(x).mul(x),
}
HALVES = {
    'MaxPool2d': lambda: torch.nn.MaxPool2d(2), 'AvgPool2d': lambda: torch.nn.AvgPool2d(2, ceil_mode=True),
    'F.max_pool2d': lambda: Function('F.max_pool2d', lambda m, x: F.max_pool2d(x, 3, 2, 1)),
    'F.avg_pool2d': lambda: Function('F.avg_pool2d', lambda m, x: F.avg_pool2d(x, 2)),
    'slice': lambda: Function('slice', lambda m, x: x[:, :, ::2, ::2]),
}
HEADS = {
    'adaptive': lambda m, x: m.linear(F.adaptive_avg_pool2d(x, 1).flatten(1)),
    'mean': lambda m, x: m.linear(x.mean((2, 3))), 'mean twice': lambda m, x: m.linear(x.mean(3).mean(2)),
    'view': lambda m, x: m.linear(F.avg_pool2d(x, x.shape[2:]).view(len(x), -1)),
    'max': lambda m, x: m.linear(x.amax((2, 3))),
    'F.linear': lambda m, x: F.linear(x.mean((2, 3)), m.linear.weight, m.linear.bias),
}


def convolution(draw, in_channels, out_channels, kernel=None, stride=1):
    '''A convolution which keeps the size, as a module or a function.'''
    kernel = draw(st.sampled_from([1, 3])) if kernel is None else kernel
    bias, is_function = draw(st.booleans()), draw(st.booleans())
    conv = torch.nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
    if not is_function:
        return conv
    return Function('F.conv2d', lambda m, x: F.conv2d(
        x, m.conv.weight, m.conv.bias, m.conv.stride, m.conv.padding
    ), conv=conv)


def gate(draw, channels):
    '''Squeeze-and-excitation, or layer scale.'''
    key = draw(st.sampled_from([*GATES, 'scale']))
    if key == 'scale':
        scale = torch.nn.Parameter(torch.ones(channels, 1, 1))
        return Function(key, lambda m, x: x * m.layer_scale, layer_scale=scale)
    conv = torch.nn.Conv2d(channels, channels, 1)
    return Function(key, lambda m, x: GATES[key](x, m.conv(x.mean((2, 3), keepdim=True)).sigmoid()), conv=conv)


@st.composite
def parts(draw, channels, depth, max_size=4):
    '''Parts which keep the number of channels and the size.'''
    result = []
    for _ in range(draw(st.integers(1, max_size))):
        kinds = ['conv', 'norm', 'relu', 'module', 'activation', 'move', 'gate']
        kind = draw(st.sampled_from(kinds + ['residual', 'branches', 'twice'] * (depth > 0)))
        if kind == 'conv':
            result.append(convolution(draw, channels, channels))
        elif kind == 'norm':
            is_batch = draw(st.booleans())
            result.append(torch.nn.BatchNorm2d(channels) if is_batch else torch.nn.GroupNorm(1, channels))
        elif kind in ('module', 'relu'):
            result.append(draw(st.sampled_from(MODULES if kind == 'module' else MODULES[:2]))())
        elif kind in ('activation', 'move'):
            functions = {'activation': ACTIVATIONS, 'move': MOVES}[kind]
            key = draw(st.sampled_from(list(functions)))
            result.append(Function(key, functions[key]))
        elif kind == 'gate':
            result.append(gate(draw, channels))
        elif kind == 'residual':
            skip = draw(st.sampled_from([None, None, 'projection', 'parts']))
            skip = Sequence(draw(parts(channels, 0, 2))) if skip == 'parts' else skip and Sequence(
                [convolution(draw, channels, channels, 1), torch.nn.BatchNorm2d(channels)]
            )
            body = Sequence(draw(parts(channels, depth - 1)))
            result.append(Residual(draw(st.sampled_from(list(ADDITIONS))), body, skip))
        elif kind == 'branches':
            # as many channels as before
            first = draw(st.integers(1, channels))
            widths = [first, channels - first] if channels > first else [channels]
            result.append(Branches([
                Sequence([convolution(draw, channels, width), *draw(parts(width, depth - 1, 2))]) for width in widths
            ]))
        else:
            result.append(Sequence(draw(parts(channels, depth - 1, 3)), times=2))
    return result


@st.composite
def stages(draw, channels, size):
    '''A stage which may halve the size: by a block whose skip connection does so, too, or by a pooling.'''
    width, kind = draw(st.integers(1, 4)), draw(st.sampled_from(['pool', 'projection', 'option A']))
    if kind == 'pool' or min(size) < 3:
        key = draw(st.sampled_from(['none', *HALVES] if min(size) > 2 else ['none']))
        return ([] if key == 'none' else [HALVES[key]()]) + [convolution(draw, channels, width)], width
    if kind == 'option A':
        width = channels + draw(st.integers(0, 3))
    body = Sequence([convolution(draw, channels, width, 3, 2), *draw(parts(width, 0))])
    if kind == 'projection':
        skip = Sequence([convolution(draw, channels, width, 1, 2), torch.nn.BatchNorm2d(width)])
    else:
        before = draw(st.integers(0, width - channels))
        amounts = (0, 0, 0, 0, before, width - channels - before)
        skip = Function(f'option A {amounts}', lambda m, x: F.pad(x[:, :, ::2, ::2], amounts))
    return [Residual(draw(st.sampled_from(list(ADDITIONS))), body, skip), torch.nn.ReLU()], width


@st.composite
def networks(draw, max_images=2):
    '''Residual networks that PyTorch can differentiate.'''
    channels, size = draw(st.integers(1, 4)), draw(st.sampled_from([(6, 6), (5, 7), (8, 5)]))
    stems = [convolution(draw, 3, channels) for _ in range(draw(st.integers(1, max_images)))]
    body, last = list(draw(parts(channels, 2))), channels
    for _ in range(draw(st.integers(0, 1))):
        stage, last = draw(stages(channels, size))
        body += stage + draw(parts(last, 1, 2))
    key = draw(st.sampled_from(list(HEADS)))
    head = Function(key, HEADS[key], linear=torch.nn.Linear(last, 3, bias=draw(st.booleans())))
    network = Network(stems, draw(st.sampled_from(list(ADDITIONS))), Sequence(body), head, size)
    flat = draw(st.booleans())
    seed = draw(st.integers(0, 2 ** 16))
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, Node):
            module.flat = flat and module is not network
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.reset_parameters()
    network = randomize(network.double().eval())
    try:
        # in-place operations must not overwrite what others need
        gradients = explain(network, None, images(network))[2]
    except RuntimeError as error:
        assume('in-place' not in str(error) and 'inplace' not in str(error))
        raise
    assume(all(elem.isfinite().all() for elem in gradients))
    return network


def images(network, dtype=torch.float64):
    '''Random images.'''
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(network.size, generator=generator, dtype=torch.float64).to(dtype) for _ in network.stems]


def explain(network, composite, inputs, value='one'):
    '''Output, initial relevance, and relevance of each input. The gradient without a composite.'''
    inputs = [elem.clone().requires_grad_() for elem in inputs]
    with contextlib.nullcontext() if composite is None else composite.context(network):
        output = network(*inputs)
        start = initial_relevance(1, value)(output)
        lower = torch.autograd.grad(output, inputs, start)
    return output.detach(), start.sum(1), lower


def total(tensors):
    '''Sum of each sample.'''
    return sum(elem.double().flatten(1).sum(1) for elem in tensors)


@PROFILE
@given(
    networks(), st.sampled_from(['ratio', 'symmetric']), st.sampled_from(['pass', 'merge']),
    st.sampled_from([{}, {'projection': 'literal'}, {'first_layer': 'wsquare', 'maxpool': 'winner'}]), DTYPES,
)
def test_network_conserves(network, splitting, batch_norm, options, dtype):
    '''The input relevance sums to the initial relevance, is not negative, and the forward pass is the same.'''
    network, inputs = network.to(dtype), images(network, dtype)
    with torch.no_grad():
        plain = network(*inputs)
    output, start, lower = explain(network, ResNetLRP(splitting, batch_norm=batch_norm, **options), inputs)
    assert torch.equal(output, plain)
    assert_equal(total(lower), start.double(), dtype)
    assert all(float(elem.min()) >= 0 for elem in lower)


COMPOSITES = {
    'ratio': ResNetLRP, 'symmetric, merge': lambda: ResNetLRP('symmetric', batch_norm='merge'),
    'relative': RelativeLRP, 'block': BlockLRP, 'zennit': lambda: with_splitting(EpsilonPlusFlat()),
}


@PROFILE
@given(networks(), st.sampled_from(list(COMPOSITES)))
def test_network_unchanged(network, name):
    '''The model is bit for bit the same, so are the forward pass inside and the relevance the next time.'''
    inputs = images(network)
    with torch.no_grad():
        plain = network(*inputs)
    snapshot = Snapshot(network)
    first, second = (explain(network, COMPOSITES[name](), inputs) for _ in range(2))
    snapshot.check()
    # hooks of Zennit copy their inputs, so that in-place activations do not change what others see
    assert torch.equal(first[0], plain) or name == 'zennit'
    assert all(torch.equal(*pair) for pair in zip(first[2], second[2]))
    with COMPOSITES[name]().context(network), torch.no_grad():
        assert torch.equal(network(*inputs), plain)
    snapshot.check()


@pytest.mark.parametrize('kind', [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['forward', 'layer', 'backward'])
@settings(PROFILE, max_examples=PROFILE.max_examples // 2)
@given(networks(), st.sampled_from(list(COMPOSITES)), st.integers(0, 99), st.integers(0, 99))
def test_network_unchanged_after_errors(where, kind, network, name, number, position):
    '''So it is after an exception at any place of the forward or backward pass.'''
    sequences = [module for module in network.modules() if isinstance(module, Sequence)]
    interrupt = (InterruptLayer if where == 'layer' else Interrupt)(kind)
    chosen = sequences[number % len(sequences)]
    chosen.parts.insert(position % (len(chosen.parts) + 1), interrupt)
    inputs = images(network)
    expected = explain(network, COMPOSITES[name](), inputs)
    snapshot = Snapshot(network)
    interrupt.where.append(where)
    with pytest.raises(kind, match='on purpose'):
        explain(network, COMPOSITES[name](), inputs)
    interrupt.where.clear()
    snapshot.check()
    again = explain(network, COMPOSITES[name](), inputs)
    assert torch.equal(again[0], expected[0]) and all(map(torch.equal, again[2], expected[2]))
    snapshot.check()


@PROFILE
@given(networks(), st.sampled_from(list(COMPOSITES)))
def test_network_batch(network, name):
    '''Each sample alone gives what it gives in the batch.'''
    inputs = images(network)
    together = explain(network, COMPOSITES[name](), inputs)[2]
    for num in range(len(inputs[0])):
        alone = explain(network, COMPOSITES[name](), [elem[num:num + 1] for elem in inputs])[2]
        scale = max(float(elem[num].abs().max()) for elem in together)
        for actual, expected in zip(alone, together):
            assert float((actual - expected[num:num + 1]).abs().max()) <= 1e-6 * scale


@PROFILE
@given(networks(), st.sampled_from(['signed', 'l1']), st.sampled_from(['constant', 'per_position']))
def test_network_relative(network, normalization, cardinality):
    '''Relative contributions are finite, and not all zero wherever the gradient is not.'''
    inputs, composite = images(network), RelativeLRP(normalization=normalization, cardinality=cardinality)
    _, _, gradients = explain(network, None, inputs)
    _, _, lower = explain(network, composite, inputs, 'logit')
    assert all(elem.isfinite().all() for elem in lower)
    assert composite.log_scale.shape == (2,) and composite.log_scale.isfinite().all()
    # gradients of gates and group normalizations go to elements that have no contribution
    mixes = any(
        isinstance(elem, torch.nn.GroupNorm) or getattr(elem, 'text', '') in GATES for elem in network.modules()
    )
    for num in range(2):
        if not mixes and any(elem[num].any() for elem in gradients):
            assert any(elem[num].any() for elem in lower)


@PROFILE
@given(networks())
def test_network_block(network):
    '''Blocks as layers are Gradient x Input up to the factor R / (y - b), whatever the blocks.'''
    # the output of a layer is looked at when it was overwritten, which is not what a gate was computed from
    assume(not any(module.text in ('mul_', '*=') for module in network.modules() if isinstance(module, Node)))
    inputs = images(network)
    output, _, gradients = explain(network, None, inputs)
    _, _, lower = explain(network, BlockLRP(epsilon=1e-13), inputs, 'one')
    bias = network.head.linear.bias
    factor = output[:, 1]
    if bias is not None and network.head.text != 'F.linear':
        factor = factor - bias.detach()[1]
    assume(float(factor.abs().min()) > 1e-6)
    scale = max(float((elem * grad).abs().max()) for elem, grad in zip(inputs, gradients))
    # what is normalized and then averaged may not depend on the input but for rounding
    assume(scale > 1e-9)
    for actual, elem, grad in zip(lower, inputs, gradients):
        actual = actual * factor.view(-1, 1, 1, 1)
        assert float((actual - elem * grad).abs().max()) <= 1e-5 * scale


@PROFILE
@given(networks(max_images=1), st.sampled_from(list(COMPOSITES)))
def test_network_ledger(network, name):
    '''Layers lose what is lost between output and input, and with the papers' rules none of them loses anything.'''
    ledger = conservation_ledger(network, *images(network), COMPOSITES[name](), target=1, value='one')
    check_sums(ledger, 1e-8)
    if name in ('ratio', 'symmetric, merge'):
        assert float(ledger.deviation().max()) <= 1e-8
