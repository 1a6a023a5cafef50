'''Relative LRP of whole networks: branches, range, networks of all kinds, and what is left behind.

Propositions and equations are those of Nyiri & Gibaru, R-LRP. Networks made of :py:class:`Block` are compared with a
literal implementation, in which all branches of a block start from all of its contributions.
'''
import functools
import gc
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from helpers.layers import assert_close
from helpers.networks import CifarResNet, Function, UserNetwork, build_timm, build_torchvision, prepare, randomize
from helpers.relative import composite_attribute, explain, naive_max_pool, naive_relative
from helpers.state import Snapshot
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.composites import RelativeLRP
from zennit_resnet.layer import Operation
from zennit_resnet.rules.branch_scaling import Contributions, branch_factor

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def clean_state():
    '''Nothing of what is global may change.'''
    yield
    assert torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack()


# -- a literal implementation ------------------------------------------------------------------------------------------

class Block(nn.Module):
    '''Branches whose outputs are added or concatenated.'''
    def __init__(self, *branches, join='add'):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.join = {
            'add': lambda *values: functools.reduce(torch.add, values),
            'iadd': lambda value, *others: functools.reduce(torch.Tensor.add_, others, value.clone()),
            'reversed': lambda *values: functools.reduce(lambda left, right: right + left, values),
            'sub': lambda left, right: left - right,
            'rsub': lambda left, right: torch.rsub(left, right),
            'alpha': lambda left, right: torch.add(left, right, alpha=-3),
            'cat': lambda *values: torch.cat(values, 1),
        }[join]
        self.is_sum = join != 'cat'

    def forward(self, x):
        '''Join the branches.'''
        return self.join(*(branch(x) for branch in self.branches))


class Squeeze(nn.Module):
    '''Squeeze and excitation.'''
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        '''Gate the input.'''
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class OptionA(nn.Module):
    '''Subsampling with channels of zeros.'''
    def forward(self, x):
        '''Parameter-free projection.'''
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))


class Shuffle(nn.Module):
    '''Unit of a ShuffleNet: one half of the channels is kept.'''
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        '''Concatenate the halves and shuffle channels.'''
        first, second = x.chunk(2, dim=1)
        x = torch.cat([first, self.branch(second)], 1)
        return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def total(value, function=lambda value: value):
    '''Sum of each example, which can be broadcast.'''
    return function(value).flatten(1).sum(1).view(-1, *(1,) * (value.ndim - 1))


def rescaled(begin, end, norm='signed'):
    '''Eq. (13) for one branch: the sum of a branch's contributions at its begin becomes that at its end.'''
    function = torch.abs if norm == 'l1' else torch.Tensor.clone
    return begin * total(end, function).view(-1, *(1,) * (begin.ndim - 1)) / total(begin, function)


def literal(module, input, norm='signed'):
    '''The output of a network, and a function from contributions of its output to contributions of its input.'''
    if isinstance(module, nn.Sequential):
        functions = []
        for layer in module:
            input, function = literal(layer, input, norm)
            functions.append(function)
        return input, lambda z: functools.reduce(lambda value, function: function(value), reversed(functions), z)
    output = module(input).detach()
    if isinstance(module, Block):
        values, functions = zip(*(literal(branch, input, norm) for branch in module.branches))

        def lower(z):
            '''Prop. 14, or slices of a concatenation.'''
            parts = [z] * len(values) if module.is_sum else z.split([elem.shape[1] for elem in values], 1)
            begins = [function(part) for function, part in zip(functions, parts)]
            return sum(begin if begin is part else rescaled(begin, part, norm) for begin, part in zip(begins, parts))
    elif isinstance(module, OptionA):
        def lower(z):
            '''The places that values came from.'''
            result = torch.zeros_like(input)
            result[:, :, ::2, ::2] = z[:, 1:-2]
            return result
    elif isinstance(module, Shuffle):
        _, function = literal(module.branch, input.chunk(2, 1)[1], norm)

        def lower(z):
            '''Undo the shuffling.'''
            first, second = z[:, ::2], z[:, 1::2]
            return torch.cat([first, rescaled(function(second), second, norm)], 1)
    elif isinstance(module, (nn.ReLU, nn.BatchNorm2d, Squeeze)):
        def lower(z):
            '''Contributions pass.'''
            return z
    elif isinstance(module, nn.Flatten):
        def lower(z):
            '''Shape of the input.'''
            return z.view(input.shape)
    elif isinstance(module, nn.MaxPool2d):
        def lower(z):
            '''Prop. 13.'''
            return naive_max_pool(module, input, z)[0]
    else:
        def lower(z):
            '''Definition 9.'''
            return naive_relative(module, input, z)
    return output, lower


def conv(in_channels, out_channels, size=3, stride=1):
    '''A convolution that keeps the size, with weights large enough for skip connections not to dominate.'''
    layer = nn.Conv2d(in_channels, out_channels, size, stride, size // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(in_channels) / size)
    return layer


def norm(channels):
    '''Batch normalization with random statistics.'''
    return randomize(nn.BatchNorm2d(channels))


def seq(*layers):
    '''A branch; the identity if it has no layers.'''
    return nn.Sequential(*layers)


def relu_conv(in_channels, out_channels, size=3):
    '''Activation and convolution.'''
    return seq(nn.ReLU(), conv(in_channels, out_channels, size))


# (network for three channels, factor between it and the literal implementation: addends at each addition of the trunk)
BLOCKS = {
    'basic': (lambda: seq(Block(seq(), seq(conv(3, 3), nn.ReLU(), conv(3, 3))), nn.ReLU()), 2),
    'basic in place': (
        lambda: seq(Block(seq(), seq(conv(3, 3), nn.ReLU(True), conv(3, 3)), join='iadd'), nn.ReLU(True)), 2
    ),
    'two basic': (
        lambda: seq(*(Block(relu_conv(3, 3), seq(), join='reversed') for _ in range(2)), nn.ReLU()), 4
    ),
    'bottleneck': (
        lambda: seq(Block(seq(conv(3, 2, 1), nn.ReLU(), conv(2, 2), nn.ReLU(), conv(2, 3, 1)), seq())), 2
    ),
    'projection': (
        lambda: seq(Block(seq(conv(3, 4, 3, 2), nn.ReLU(), conv(4, 4)), seq(conv(3, 4, 1, 2))), nn.ReLU()), 2
    ),
    'projection pooled': (
        lambda: seq(Block(seq(conv(3, 4, 3, 2)), seq(nn.AvgPool2d(2, 2, ceil_mode=True), conv(3, 4, 1)))), 2
    ),
    'pre-activation': (
        lambda: seq(*(Block(seq(), seq(norm(3), nn.ReLU(), conv(3, 4), nn.ReLU(), conv(4, 3))) for _ in range(2))), 4
    ),
    'stem and head': (
        lambda: seq(conv(3, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(seq(), seq(conv(4, 4))), nn.ReLU(),
                    conv(4, 4), Block(seq(), seq(conv(4, 4))), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(4, 3)), 4
    ),
    'nested': (
        lambda: seq(Block(seq(), seq(conv(3, 3), nn.ReLU(), Block(seq(), relu_conv(3, 3)), nn.ReLU(), conv(3, 3)))), 2
    ),
    'nested twice': (
        lambda: seq(Block(seq(conv(3, 3, 1)), seq(
            conv(3, 4), Block(seq(), seq(relu_conv(4, 4), Block(seq(), relu_conv(4, 4)), conv(4, 4))),
            Block(seq(conv(4, 4, 1)), relu_conv(4, 4)), conv(4, 3)
        ))), 2
    ),
    'nested directly': (lambda: seq(Block(seq(), Block(seq(conv(3, 3)), seq(conv(3, 3, 1))))), 2),
    'nested head': (lambda: seq(Block(seq(), seq(Block(seq(), relu_conv(3, 3)), conv(3, 3)))), 2),
    'concatenation': (lambda: seq(Block(seq(), relu_conv(3, 2), join='cat'), relu_conv(5, 2)), 1),
    'concatenated concatenations': (
        lambda: seq(*(
            Block(seq(), seq(nn.ReLU(), conv(num, 4, 1), relu_conv(4, 2)), join='cat') for num in (3, 5, 7)
        )), 1
    ),
    'inception': (
        lambda: seq(conv(3, 4), nn.ReLU(), Block(
            seq(conv(4, 2, 1), nn.ReLU()), seq(conv(4, 3, 1), nn.ReLU(), conv(3, 2), nn.ReLU()),
            seq(conv(4, 1, 1), nn.ReLU(), conv(1, 2, 5), nn.ReLU()), seq(nn.MaxPool2d(3, 1, 1), conv(4, 1, 1)),
            join='cat',
        ), conv(7, 2)), 1
    ),
    'concatenation in a branch': (
        lambda: seq(Block(seq(), seq(conv(3, 2), Block(seq(), relu_conv(2, 2), join='cat'), conv(4, 3)))), 2
    ),
    'addition in a concatenation': (
        lambda: seq(Block(seq(conv(3, 2), Block(seq(), relu_conv(2, 2))), relu_conv(3, 2), join='cat'), conv(4, 2)), 1
    ),
    'shuffle': (lambda: seq(conv(3, 4), *(Shuffle(seq(conv(2, 2), nn.ReLU())) for _ in range(3)), conv(4, 3)), 1),
    'subtraction': (lambda: seq(Block(seq(), relu_conv(3, 3), join='sub')), 2),
    'reversed subtraction': (lambda: seq(Block(seq(), relu_conv(3, 3), join='rsub')), 2),
    'factor': (lambda: seq(Block(seq(), relu_conv(3, 3), join='alpha')), 2),
    'squeeze and excitation': (
        lambda: seq(
            Block(seq(), seq(conv(3, 3), nn.ReLU(), conv(3, 3), Squeeze(3))), nn.ReLU(), Squeeze(3), conv(3, 2)
        ), 2
    ),
    'option A': (
        lambda: seq(Block(OptionA(), seq(conv(3, 6, 3, 2), nn.ReLU(), conv(6, 6))), nn.ReLU(), conv(6, 2)), 2
    ),
}
NESTED = (
    'nested', 'nested twice', 'nested directly', 'nested head', 'concatenation in a branch',
    'addition in a concatenation',
)


def build_block(name):
    '''A network and the factor of the literal implementation.'''
    build, factor = BLOCKS[name]
    return build().double().eval(), factor


def block_input(batch=2, size=6):
    '''Positive images, so that sums do not vanish.'''
    return torch.rand(batch, 3, size, size).double() + .1


# -- Proposition 14 ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, norm', [
    # sums of magnitudes do not add up where the branches of an inner block meet
    *((name, norm) for name in BLOCKS for norm in ('signed', 'l1') if norm == 'signed' or name not in NESTED)
])
def test_literal(name, norm):
    '''Whole networks and Prop. 14 word by word, up to one power of two for each block on the way.'''
    (model, factor), input = build_block(name), block_input()
    output, function = literal(model, input, norm)
    relevance, lower = composite_attribute(model, input, relevance=output, normalization=norm)
    # the conditioning of signed sums
    assert_close(lower * factor, function(relevance), 1e-9)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
@pytest.mark.parametrize('name', [
    'two basic', 'stem and head', 'nested', 'nested twice', 'concatenated concatenations', 'inception',
    'concatenation in a branch', 'addition in a concatenation', 'shuffle',
])
def test_literal_rescaled(name, scale):
    '''The same where contributions are rescaled on the way.'''
    (model, factor), input = build_block(name), block_input() * scale
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.mul_(scale)
    output, function = literal(model, input)
    composite, leaf = RelativeLRP(), input.clone().requires_grad_()
    with composite.context(model):
        lower, = torch.autograd.grad(model(leaf), leaf, output)
    assert bool((composite.log_scale != 0).all())
    assert_close(lower * composite.log_scale.exp().view(-1, 1, 1, 1) * factor, function(output), 1e-9)


@pytest.mark.parametrize('name', [name for name in BLOCKS if name not in (
    # what is before the first and after the last addition changes sums
    'stem and head', 'concatenation', 'inception', 'addition in a concatenation', 'shuffle', 'squeeze and excitation',
    'option A',
)])
def test_total_is_kept(name):
    '''Blocks have the same sum of contributions at their begin and end.'''
    (model, _), input = build_block(name), block_input()
    relevance, lower = composite_attribute(model, input)
    assert_close(total(lower), total(relevance).view(total(lower).shape), 1e-9)


@pytest.mark.parametrize('name', [name for name in BLOCKS if name != 'shuffle'])
def test_branches(name):
    '''The contributions of each branch at the begin of a block sum to what its addend started with at the end.'''
    (model, _), input = build_block(name), block_input()
    block = next(elem for elem in model if isinstance(elem, Block))
    with torch.no_grad():
        input = model[:list(model).index(block)](input)
        parts = [branch(input) for branch in block.branches]
    # with an input of its own for each branch, all of them are seen
    split = Function(lambda m, *inputs: m.block.join(*(
        branch(elem) for branch, elem in zip(m.block.branches, inputs)
    )), block=block)
    relevance, *lower = composite_attribute(split, *(input.clone() for _ in parts))
    for num, elem in enumerate(lower):
        if block.is_sum:
            expected = relevance / len(parts)
        else:
            expected = relevance.split([part.shape[1] for part in parts], 1)[num]
        assert_close(total(elem), total(expected), 1e-10)
        if block.is_sum and isinstance(block.branches[num], nn.Sequential) and not len(block.branches[num]):
            assert torch.equal(elem, relevance / 2)
    _, together = composite_attribute(seq(block), input, relevance=relevance)
    assert_close(together, sum(lower), 1e-12)


def test_three_addends():
    '''Of a sum of three, written as two additions, the addends of each start with equal parts.'''
    layers = [conv(3, 3).double() for _ in range(3)]
    model = Function(lambda m, a, b, c: m.a(a) + m.b(b) + m.c(c), **dict(zip('abc', layers)))
    relevance, *lower = composite_attribute(model, *(block_input() for _ in range(3)))
    for elem, share in zip(lower, (.25, .25, .5)):
        assert_close(total(elem), total(relevance) * share, 1e-10)


REORDERED = {
    'stack': lambda m, x: torch.stack([x, m.conv(x)]).sum(0),
    'cat': lambda m, x: sum(torch.cat([x, m.conv(x)]).chunk(2)),
    'transpose': lambda m, x: x.transpose(0, 1).relu().transpose(0, 1) + m.conv(x),
    'permute': lambda m, x: m.conv(x).permute(1, 0, 2, 3).relu().movedim(1, 0) + x,
    'index': lambda m, x: x + m.conv(x[torch.arange(len(x)).flip(0)]),
    'flip': lambda m, x: x + m.conv(x).flip(0),
}


@pytest.mark.parametrize('name', REORDERED)
def test_reordered_batch(name):
    '''Functions that move the examples of a batch are refused, and those of a single example are not.'''
    model = Function(REORDERED[name], conv=conv(3, 3)).double()
    plain = Function(lambda m, x: (m.conv(x).relu() if name == 'permute' else m.conv(x)) + (
        x.relu() if name == 'transpose' else x
    ), conv=model.conv)
    for batch in (1, 2, 3):
        input, start = block_input(batch), torch.rand(batch, 3, 6, 6).double()
        # nothing is rescaled between the two transpositions
        if batch > 1 and name not in ('transpose', 'stack'):
            with pytest.raises((ValueError, RuntimeError), match=': explain one (example |image )?at a time'):
                composite_attribute(model, input, relevance=start)
            continue
        _, lower = composite_attribute(model, input, relevance=start)
        assert_close(lower, composite_attribute(plain, input, relevance=start)[1], 1e-10)


def test_other_dimensions():
    '''The same functions along other dimensions leave each example what it has alone.'''
    def forward(m, x):
        halves = torch.stack([x, m.conv(x)], -1).unbind(-1)
        x = torch.cat([halves[0].transpose(1, 2).mT.mT.transpose(1, 2), halves[1].flip(3)], 1)[:, [3, 0, 1, 4, 5, 2]]
        return x[:, 1:4].permute(0, 2, 3, 1).roll(1, 2).permute(0, 3, 1, 2) + x[:, :3]

    model = Function(forward, conv=conv(3, 3)).double()
    input, start = block_input(3), torch.rand(3, 3, 6, 6).double()
    _, lower = composite_attribute(model, input, relevance=start)
    for num in range(3):
        _, alone = composite_attribute(model, input[num:num + 1], relevance=start[num:num + 1])
        assert_close(lower[num:num + 1], alone, 1e-10)


def test_dense_connections():
    '''Concatenations of concatenations, as in a DenseNet, whose inputs are used several times.'''
    model = Function(lambda m, x: m.forward_dense(x), first=relu_conv(3, 2), second=relu_conv(5, 2)).double()

    def forward(x):
        '''Features of all layers.'''
        first = model.first(x)
        return torch.cat([x, first, model.second(torch.cat([x, first], 1))], 1)

    model.forward_dense = forward
    input = block_input()
    relevance, lower = composite_attribute(model, input)
    start = relevance.split([3, 2, 2], 1)
    first, first_function = literal(model.first, input)
    _, second_function = literal(model.second, torch.cat([input, first], 1))
    begin = rescaled(second_function(start[2]), start[2]).split([3, 2], 1)
    middle = start[1] + begin[1]
    assert_close(lower, start[0] + begin[0] + rescaled(first_function(middle), middle), 1e-10)
    assert_close(total(lower), total(relevance), 1e-10)


def test_two_inputs():
    '''Several inputs are compared with each other.'''
    model = Function(
        lambda m, a, b: m.head(torch.cat([m.a(a), m.b(b)], 1)), a=relu_conv(3, 2), b=relu_conv(3, 4),
        head=relu_conv(6, 2),
    ).double()
    inputs = block_input(), block_input()
    relevance, *lower = composite_attribute(model, *inputs)
    hidden = [layer(input).detach() for layer, input in zip((model.a, model.b), inputs)]
    parts = literal(model.head, torch.cat(hidden, 1))[1](relevance).split([2, 4], 1)
    for elem, layer, input, part in zip(lower, (model.a, model.b), inputs, parts):
        assert_close(elem, rescaled(literal(layer, input)[1](part), part), 1e-10)
    # one of them alone
    composite, first = RelativeLRP(), inputs[0].clone().requires_grad_()
    with composite.context(model):
        output = model(first, inputs[1].clone().requires_grad_())
        alone, = torch.autograd.grad(output, first, relevance)
    assert_close(alone * composite.log_scale.exp().view(-1, 1, 1, 1), lower[0], 1e-12)


def residual(branch, skip=None):
    '''A single block.'''
    return seq(Block(seq() if skip is None else skip, branch)).double()


def test_identity_skip_bit_for_bit():
    '''Identity skip connections change no bit, whatever the other branch propagates, and whatever is moved about.'''
    layer = nn.Conv2d(3, 3, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    for build in (
        lambda x: x + layer(x), lambda x: layer(x).add_(x), lambda x: F.relu(layer(x) + x), lambda x: x - layer(x),
        lambda x: x.flatten(2).view_as(x) + layer(x), lambda x: x.permute(2, 3, 0, 1).permute(2, 3, 0, 1) + layer(x),
        lambda x: F.dropout(x, training=False).contiguous() + layer(x),
    ):
        input = torch.randn(2, 3, 4, 4).double()
        for magnitude in (1e-40, 1., 1e40):
            start = torch.randn(2, 3, 4, 4).double() * magnitude
            composite, leaf = RelativeLRP(), input.clone().requires_grad_()
            model = Function(lambda m, x, build=build: build(x), layer=layer)
            with composite.context(model):
                lower, = torch.autograd.grad(model(leaf), leaf, start)
            exponent = (composite.log_scale / math.log(2)).round().view(-1, 1, 1, 1)
            assert torch.equal(lower * torch.exp2(exponent), start / 2)
            assert composite.num_replaced.tolist() == [0, 0]
    # nor are its sums compared
    start = torch.tensor([1., -1.]).double().repeat(2, 3, 4, 2)
    composite, leaf = RelativeLRP(), input.clone().requires_grad_()
    model = Function(lambda m, x: x.relu() + layer(x), layer=layer)
    with composite.context(model):
        lower, = torch.autograd.grad(model(leaf), leaf, start)
    assert torch.equal(lower, start / 2)
    assert composite.num_replaced.tolist() == [0, 0]


def test_same_tensor_twice():
    '''One tensor may be added to or concatenated with itself.'''
    input, layer = block_input(), conv(3, 3).double()
    for build in (lambda m, x: x + x, lambda m, x: torch.cat([x, x], 1)):
        relevance, lower = composite_attribute(Function(build), input)
        assert_close(lower, relevance if relevance.shape == lower.shape else sum(relevance.chunk(2, 1)), 1e-12)
    relevance, lower = composite_attribute(Function(lambda m, x: m.layer(x) + m.layer(x), layer=layer), input)
    assert_close(lower, rescaled(naive_relative(layer, input, relevance), relevance), 1e-10)


def test_zero_branch():
    '''A branch without contributions adds none, in one example of a batch or in all.'''
    model, input = residual(seq(conv(3, 3), nn.ReLU(), conv(3, 3))), block_input()
    start = torch.randn(2, 3, 6, 6).double()
    nn.init.constant_(model[0].branches[1][0].bias, -100.)
    _, lower = composite_attribute(model, input, relevance=start)
    assert torch.equal(lower, start / 2)
    # no contribution at all of one example
    start[0] = 0.
    _, lower = composite_attribute(residual(relu_conv(3, 3)), input, relevance=start)
    assert bool((lower[0] == 0).all()) and bool((lower[1] != 0).any()) and bool(lower.isfinite().all())


@pytest.mark.parametrize('factor', [1e-5, -1., 1e5, -1e12, 1e-200])
def test_scale_of_branch(factor):
    '''The scale and sign of a branch have no effect.'''
    for skip in (None, seq(conv(3, 3, 1))):
        model, input = residual(relu_conv(3, 3), skip), block_input()
        relevance, expected = composite_attribute(model, input)
        layer = model[0].branches[1][1]
        # without an effect on what follows
        layer.weight.data *= factor
        _, lower = composite_attribute(model, input, relevance=relevance)
        assert_close(lower, expected, 1e-9)


def test_opposite_signs():
    '''A branch whose sum has the opposite sign changes its sign, and keeps the law.'''
    layer = nn.Conv2d(3, 3, 1, bias=False).double()
    layer.weight.data.fill_(-1.)
    input, start = block_input(), torch.rand(2, 3, 6, 6).double()
    model = Function(lambda m, a, b: a + m.layer(b), layer=layer)
    _, skip, branch = composite_attribute(model, input, input, relevance=start)
    assert torch.equal(skip, start / 2)
    # all of its contributions are negative before
    assert bool((branch > 0).all())
    assert_close(total(branch), total(start) / 2, 1e-12)
    # and the sum at the end may be the negative one
    layer.weight.data.neg_()
    _, _, branch = composite_attribute(model, input, input, relevance=-start)
    assert bool((branch < 0).all())


@pytest.mark.parametrize('scale', [1e-5, 1e5])
def test_large_factors(scale):
    '''Factors of 1e5, by sums that nearly vanish compared with magnitudes.'''
    layer = nn.Conv2d(2, 2, 1, bias=False, groups=2).double()
    layer.weight.data.copy_(torch.tensor([1., -1. + 2e-5], dtype=torch.float64).view(2, 1, 1, 1) * scale)
    input, start = torch.ones(1, 2, 3, 3).double(), torch.ones(1, 2, 3, 3).double()
    composite, leaves = RelativeLRP(), [input.clone().requires_grad_() for _ in range(2)]
    model = Function(lambda m, a, b: a + m.layer(b), layer=layer)
    with composite.context(model):
        _, branch = torch.autograd.grad(model(*leaves), leaves, start)
    assert composite.num_replaced.tolist() == [0]
    assert_close(branch, .5 * layer.weight.detach().view(1, 2, 1, 1).expand_as(branch) / (1e-5 * scale), 1e-6)
    assert float(branch.abs().max()) > 4e4


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_vanishing_sum(dtype):
    '''Where a sum vanishes, the sum of magnitudes is used in its place, which is counted for each example.'''
    layer = nn.Conv2d(2, 2, 1, bias=False).to(dtype)
    layer.weight.data.copy_(torch.tensor([[1., 0.], [0., -1.]]).view(2, 2, 1, 1))
    input, start = torch.rand(3, 1, 5, 5).to(dtype).expand(3, 2, 5, 5).clone(), torch.ones(3, 2, 5, 5).to(dtype)
    input[1, 1] *= 2
    # below the resolution of single precision
    input[2, 1] *= 1 + 1e-7
    model = Function(lambda m, a, b: a + m.layer(b), layer=layer)
    results = {}
    for norm in ('signed', 'l1'):
        composite, leaves = RelativeLRP(normalization=norm), [input.clone().requires_grad_() for _ in range(2)]
        with composite.context(model):
            skip, results[norm] = torch.autograd.grad(model(*leaves), leaves, start)
        assert torch.equal(skip, start / 2)
        assert composite.num_replaced.tolist() == ([1, 0, 1] if norm == 'signed' else [0, 0, 0])
    assert_close(results['signed'][::2].double(), results['l1'][::2].double(), 1e-6)
    assert_close(total(results['l1'].abs()), total(start) / 2, 1e-5)
    assert_close(total(results['signed'])[1:2], total(start)[1:2] / 2, 1e-5)
    # two blocks, both counted
    composite, leaf = RelativeLRP(), input.clone().requires_grad_()
    model = Function(lambda m, x: m.layer(x) + m.other(x), layer=layer, other=layer)
    with composite.context(model):
        torch.autograd.grad(model(leaf), leaf, start)
    assert composite.num_replaced.tolist() == [2, 0, 2]


def test_branch_factor():
    '''The factor itself.'''
    begin = torch.tensor([[2., 4.], [0., 4.], [-1., 5.], [0., 0.], [1e-7, 1.]]).double()
    end = torch.tensor([[6., 8.], [3., 8.], [3., 4.], [1., 1.], [2., 3.]]).double()
    arguments = begin.T.unbind(), end.T.unbind()
    factor, replaced = branch_factor(*arguments)
    assert factor.tolist() == pytest.approx([3., 2., -3., 0., 3.])
    assert replaced.tolist() == [False, True, False, False, True]
    factor, replaced = branch_factor(*arguments, tolerance=1e-8)
    assert factor.tolist() == pytest.approx([3., 2., -3., 0., 2e7])
    assert replaced.tolist() == [False, True, False, False, False]
    factor, replaced = branch_factor(*arguments, normalization='l1')
    assert factor.tolist() == pytest.approx([2., 2., .8, 0., 3.])
    assert not bool(replaced.any())
    for build in (functools.partial(branch_factor, *arguments), Contributions):
        with pytest.raises(ValueError, match="normalization='l2' is not one of 'signed', 'l1'"):
            build(normalization='l2')


def test_batch_independence():
    '''An example is the same alone and in a batch, where others are rescaled or have vanishing sums.'''
    model = seq(conv(3, 4), nn.ReLU(), *(
        Block(seq(), seq(conv(4, 4), nn.ReLU(), conv(4, 4))) for _ in range(3)
    ), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).double()
    input = block_input(4) * torch.tensor([1e-20, 1., 1e20, 0.]).double().view(-1, 1, 1, 1)
    lower, log_scale = explain(model, input)
    assert len(set(log_scale.tolist())) > 2
    for num in range(4):
        alone, alone_log = explain(model, input[num:num + 1])
        if num < 3:
            assert_close(lower[num:num + 1], alone, 1e-10)
        assert float((log_scale[num] - alone_log[0]).abs()) < 1e-12
    assert bool((lower[3] == 0).all())


# -- range -------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def deep_network(name):
    '''A deep network with random weights.'''
    torch.manual_seed(0)
    if name == 'vgg19':
        # without the 120 million weights of the first dense layer
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs['E'])
        head = nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 5)
        return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).eval()
    if name == 'resnet152':
        return randomize(torchvision.models.resnet152(num_classes=5).eval())
    layers = [nn.Flatten(), nn.Linear(3 * 8 * 8, 50), nn.ReLU()]
    for _ in range(48):
        layers += [nn.Linear(50, 50), nn.ReLU()]
        if name == 'dense':
            # activations neither vanish nor explode
            nn.init.kaiming_normal_(layers[-2].weight)
    return nn.Sequential(*layers, nn.Linear(50, 5)).eval()


def deep_input(name, scale=1.):
    '''Random images.'''
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, *((8, 8) if 'dense' in name else (64, 64)), generator=generator) * scale


@pytest.mark.parametrize('precision', ['single', 'autocast'])
@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
@pytest.mark.parametrize('name', ['vgg19', 'resnet152', 'dense', 'dense vanishing'])
def test_range(name, scale, precision):
    '''Deep networks have finite contributions which are not all zero.'''
    model, input = deep_network(name), deep_input(name, scale)
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
        lower, log_scale = explain(model, input)
    assert lower.dtype == torch.float32 and lower.shape == input.shape
    assert bool(lower.isfinite().all()) and bool(log_scale.isfinite().all())
    # not only a few
    assert float((lower != 0).double().mean()) > .5
    # in the middle of what single precision can represent
    assert 1e-25 < float(lower.abs().mean()) < 1e25
    if name != 'resnet152':
        # far beyond single precision
        assert float(log_scale) < -100 or name == 'dense' and scale == 1e3


@pytest.mark.parametrize('name', ['vgg19', 'resnet152', 'dense', 'dense vanishing'])
def test_single_precision(name):
    '''Single precision is close to double precision.'''
    model, input = deep_network(name), deep_input(name)
    lower, log_scale = explain(model, input)
    expected, expected_log = explain(model.double(), input.double())
    model.float()
    assert float(F.cosine_similarity(lower.double().flatten(), expected.flatten(), 0)) > 1 - 1e-6
    assert float((lower.double() - expected).abs().max()) < 1e-2 * float(expected.abs().max())
    assert float((log_scale - expected_log).abs().max()) < 1e-12


def test_half_precision_model():
    '''A model whose parameters are in half precision.'''
    model = UserNetwork().to(torch.bfloat16).eval()
    lower, _ = explain(model, torch.randn(2, 3, 16, 16, dtype=torch.bfloat16))
    assert bool(lower.isfinite().all()) and bool((lower != 0).any())


def test_photograph():
    '''The embedded ResNet-50 and a photograph: single precision, and the sums of all blocks.'''
    pytest.importorskip('safetensors')
    from pathlib import Path

    from zennit_resnet.models import load_classifier
    assets = Path(__file__).parents[2] / 'examples' / 'assets'
    if not (assets / 'photos').is_dir():
        pytest.skip('photographs only come with a checkout of the project')
    from zennit_resnet.image import read_image
    classifier = load_classifier()
    model = classifier.model.eval()
    input = classifier.transform(read_image(assets / 'photos' / 'gc_dog.jpg'))[None]
    target = int(model(input).argmax())
    tensors = {}
    handles = [model.get_submodule(name).register_forward_hook(
        lambda module, args, output, name=name: tensors.__setitem__(name, output)
    ) for name in ('maxpool', *(f'layer{num}' for num in range(1, 5)))]
    results = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        composite, leaf = RelativeLRP(), input.to(dtype).requires_grad_()
        with composite.context(model):
            output = model(leaf)
            lower, *middle = torch.autograd.grad(
                output, (leaf, *tensors.values()), initial_relevance(target)(output)
            )
        results.append(lower.double())
        # one power of two for each time contributions were rescaled
        powers = [float(total(elem.double()).abs().log2()) for elem in middle]
        assert all(abs((elem - powers[0]) % 1 - .5) > .5 - 1e-2 for elem in powers)
        assert int(composite.num_replaced) == 0
    for handle in handles:
        handle.remove()
    single, double = results
    assert float(F.cosine_similarity(single.flatten(), double.flatten(), 0)) > 1 - 1e-4
    # the dog is in the image's middle, contributions are not at the border
    heatmap = double.sum(1).abs()[0]
    assert float(heatmap[28:-28, 28:-28].sum() / heatmap.sum()) > .6


# -- networks ----------------------------------------------------------------------------------------------------------

# names of networks, and of blocks in them that begin with several uses of a tensor and end with a sum or concatenation
TORCHVISION = {
    'resnet18': ('layer1', 'layer2'), 'regnet_y_400mf': ('trunk_output.block2',), 'mobilenet_v3_small': ('features.3',),
    'efficientnet_b0': ('features.2.1', 'features.3.1'), 'googlenet': ('inception3a', 'inception5b'),
    'densenet121': tuple(f'features.denseblock{num}' for num in range(1, 5)), 'squeezenet1_0': (),
    'shufflenet_v2_x0_5': ('stage2.1', 'stage2', 'stage3'),
}
TIMM = {
    'seresnet18': ('layer2',), 'resnetv2_50': ('stages.1',), 'convnext_atto': ('stages.0.blocks',),
    'res2net50_26w_4s': ('layer1',), 'skresnet18': ('layer1', 'layer2'), 'nf_resnet26': ('stages.1',), 'dla34': (),
}


@pytest.mark.parametrize('name', (*TORCHVISION, *TIMM))
def test_networks(name):
    '''Nothing changes in the forward pass, the model is left as found, and contributions are finite.

    The sums of contributions at the begin and end of blocks differ by powers of two, by which they were rescaled.
    '''
    model = prepare((build_torchvision if name in TORCHVISION else build_timm)(name))
    tensors, input = [], torch.randn(1, 3, 64, 64).double()
    for path in {**TORCHVISION, **TIMM}[name]:
        model.get_submodule(path).register_forward_hook(lambda module, args, output: tensors.extend((args[0], output)))
    with torch.no_grad():
        plain = model(input)
    snapshot, composite, leaf = Snapshot(model), RelativeLRP(), input.clone().requires_grad_()
    tensors.clear()
    with composite.context(model):
        output = model(leaf)
        assert torch.equal(output, plain)
        start = initial_relevance(1)(output)
        lower, *middle = torch.autograd.grad(output, (leaf, *tensors), start)
    snapshot.check()
    assert not any(isinstance(module, Operation) for module in model.modules())
    assert lower.shape == input.shape and bool(lower.isfinite().all())
    assert float((lower != 0).double().mean()) > .5
    assert composite.log_scale.shape == (1,) and bool(composite.log_scale.isfinite().all())
    assert composite.num_replaced.tolist() == [0]
    for begin, end in zip(middle[::2], middle[1::2]):
        power = float((begin.sum() / end.sum()).log2())
        assert abs(power - round(power)) < 1e-6


def test_cifar():
    '''Shortcuts of option A, functional activations and poolings.'''
    model, input = prepare(CifarResNet(1)), torch.randn(2, 3, 32, 32).double()
    snapshot = Snapshot(model)
    lower, _ = explain(model, input)
    assert bool(lower.isfinite().all()) and bool((lower != 0).any(1).all())
    snapshot.check()


def test_zennit_composite():
    '''The composite goes with Zennit's attributor, by its name.'''
    from zennit.composites import COMPOSITES
    model, input = prepare(UserNetwork()), torch.randn(2, 3, 16, 16).double()
    with Gradient(model=model, composite=COMPOSITES['relative_lrp']()) as attributor:
        _, actual = attributor(input, initial_relevance(1))
    assert torch.equal(actual, explain(model, input)[0])


def test_user_rules():
    '''Rules of the user come first.'''
    from zennit_resnet.rules import PassThrough
    model, input = prepare(UserNetwork()), torch.randn(2, 3, 16, 16).double()
    expected, _ = explain(model, input)
    passing = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    relevance = torch.randn(2, 3, 16, 16).double()
    _, lower = composite_attribute(passing, input, relevance=relevance, layer_map=[(nn.Conv2d, PassThrough())])
    assert torch.equal(lower, relevance)
    assert torch.equal(explain(model, input, layer_map=[(nn.Conv3d, PassThrough())])[0], expected)


# -- integrity ---------------------------------------------------------------------------------------------------------

def integrity_model():
    '''A model with all kinds of operations.'''
    torch.manual_seed(1)
    layers = CifarResNet(1), nn.Unflatten(1, (10, 1, 1)), UserBlocks(), nn.Flatten(), nn.Linear(25, 4)
    return prepare(nn.Sequential(*layers))


class UserBlocks(nn.Module):
    '''Blocks of several kinds.'''
    def __init__(self):
        super().__init__()
        self.block = BasicBlock(10, 10)
        self.bottleneck = Bottleneck(10, 5, downsample=nn.Sequential(conv1x1(10, 20), nn.BatchNorm2d(20)))
        self.dense = nn.Conv2d(20, 5, 1)

    def forward(self, x):
        '''Features.'''
        x = self.bottleneck(self.block(x))
        return torch.cat([x, F.relu(self.dense(x))], 1)


def images(batch=2):
    '''Random images.'''
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize('has_backward', [True, False])
def test_no_reference_cycles(has_backward):
    '''Activations are gone with the output, with no help of the garbage collector.'''
    model, alive = integrity_model(), []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, BasicBlock)):
            module.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    composite = RelativeLRP()
    gc.collect()
    gc.disable()
    try:
        with composite.context(model):
            for _ in range(2):
                input = images().requires_grad_()
                output = model(input)
                assert any(elem() is not None for elem in alive)
                if has_backward:
                    lower, = torch.autograd.grad(output, input, torch.ones_like(output))
                    del lower
                del output
                assert not any(elem() is not None for elem in alive)
                alive.clear()
    finally:
        gc.enable()


@pytest.mark.parametrize('build', [UserNetwork, functools.partial(CifarResNet, 1)])
def test_memory(build):
    '''Calls leave nothing behind, within one context and over many.'''
    model, composite = build().double().eval(), RelativeLRP()

    def count(number, attribute):
        for _ in range(number):
            attribute()
        gc.collect()
        return len(gc.get_objects())

    def inside():
        input = images(1).requires_grad_()
        output = model(input)
        torch.autograd.grad(output, input, torch.ones_like(output))

    def outside():
        with composite.context(model):
            inside()

    with composite.context(model):
        before = count(3, inside)
        assert count(10, inside) - before < 10
    before = count(3, outside)
    assert count(10, outside) - before < 10


def test_retained_graph():
    '''Two backward passes over one graph give the same, also if they start from something else in between.'''
    model, composite, input = integrity_model(), RelativeLRP(), images().requires_grad_()
    with composite.context(model):
        output = model(input)
        starts = [torch.rand_like(output), torch.rand_like(output) * 1e25]
        results = []
        for start in (starts[0], starts[0], starts[1], starts[0]):
            lower, = torch.autograd.grad(output, input, start, retain_graph=True)
            results.append((lower, composite.log_scale, composite.num_replaced))
    for num in (1, 3):
        assert torch.equal(results[num][0], results[0][0]) and torch.equal(results[num][1], results[0][1])
        assert torch.equal(results[num][2], results[0][2])
    fresh, log_scale = explain(model, images(), starts[1])
    scale = (results[2][1] - log_scale).exp().view(-1, 1, 1, 1)
    assert_close(results[2][0] * scale, fresh, 1e-9)


def test_intermediate_tensors():
    '''Contributions of tensors inside of the network, together and one by one.'''
    model, tensors = integrity_model(), {}
    for name in ('0.layer1', '0.layer2.0.conv1', '0.layer3.0', '2.block', '2.bottleneck.downsample'):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: tensors.__setitem__(name, output)
        )
    with RelativeLRP().context(model):
        input = images().requires_grad_()
        output = model(input)
        start = torch.rand_like(output)
        everything = torch.autograd.grad(output, (input, *tensors.values()), start, retain_graph=True)
        for elem, expected in zip((input, *tensors.values()), everything):
            actual, = torch.autograd.grad(output, elem, start, retain_graph=True)
            assert torch.equal(actual, expected)
            assert actual.shape == elem.shape and bool((actual != 0).any())


def test_from_intermediate_tensors():
    '''Contributions may start from a tensor inside of the network.'''
    model, tensors = integrity_model(), []
    model[0].layer2.register_forward_hook(lambda module, args, output: tensors.append(output))
    with RelativeLRP().context(model):
        input = images().requires_grad_()
        model(input)
        start = torch.rand_like(tensors[0])
        lower, = torch.autograd.grad(tensors[0], input, start)
    part = CifarResNet(1)
    part.layer3, part.linear = nn.Identity(), nn.Identity()
    model[0].layer3, model[0].linear = nn.Identity(), nn.Identity()
    body = Function(lambda m, x: m.model.layer2(m.model.layer1(F.relu(m.model.bn1(m.model.conv1(x))))), model=model[0])
    expected, _ = explain(body.eval(), images(), start)
    assert_close(lower / lower.abs().max(), expected / expected.abs().max(), 1e-9)


def test_scale_is_unknown():
    '''The logarithm of the scale belongs to a backward pass.'''
    model, composite = nn.Linear(3, 2), RelativeLRP()
    with composite.context(model):
        output = model(torch.rand(1, 3).requires_grad_())
        with pytest.raises(RuntimeError, match='known after a backward pass'):
            float(composite.log_scale)
        output.sum().backward()
        assert composite.log_scale.shape == (1,)


def test_exceptions():
    '''After an exception in the forward or backward pass, all is as before.'''
    model, broken = integrity_model(), [False, False]

    def fail(grad):
        raise ZeroDivisionError('backward')

    def hook(module, args, output):
        if broken[0]:
            raise ZeroDivisionError('forward')
        if broken[1]:
            output.register_hook(fail)

    model[0].layer2.register_forward_hook(hook)
    snapshot, composite = Snapshot(model), RelativeLRP()
    expected, _ = explain(model, images())
    for num, name in enumerate(('forward', 'backward')):
        with Gradient(model=model, composite=composite) as attributor:
            broken[num] = True
            with pytest.raises(ZeroDivisionError, match=name):
                attributor(images(), initial_relevance(1))
            broken[num] = False
            assert torch.equal(attributor(images(), initial_relevance(1))[1], expected)
        snapshot.check()
        broken[num] = True
        with pytest.raises(ZeroDivisionError, match=name), Gradient(model=model, composite=composite) as attributor:
            attributor(images(), initial_relevance(1))
        broken[num] = False
        snapshot.check()


def test_no_grad():
    '''Without gradients, nothing is done.'''
    model, composite = integrity_model(), RelativeLRP()
    plain = model(images()).detach()
    with composite.context(model):
        with torch.no_grad():
            assert torch.equal(model(images()), plain)
        assert torch.equal(model(images()), plain)


def test_reuse_of_composite():
    '''One composite, several models one after another, in any order.'''
    models, composite = [integrity_model(), prepare(UserNetwork()), residual(relu_conv(3, 3))], RelativeLRP()
    starts = [1., 1., 1.]
    expected = [explain(model, images(), start) for model, start in zip(models, starts)]
    for num in (0, 1, 2, 2, 0, 1):
        input = images().requires_grad_()
        with composite.context(models[num]):
            output = models[num](input)
            lower, = torch.autograd.grad(output, input, torch.ones_like(output))
        assert torch.equal(lower, expected[num][0]) and torch.equal(composite.log_scale, expected[num][1])


def test_threads():
    '''Two composites in two threads at the same time.'''
    models = [integrity_model(), integrity_model()]
    inputs = [images(), images() * 3]
    expected = [explain(model, input)[0] for model, input in zip(models, inputs)]
    barrier = threading.Barrier(2)

    def run(model, input):
        barrier.wait(10)
        return [explain(model, input)[0] for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for results, single in zip(pool.map(run, models, inputs), expected):
            assert all(torch.equal(elem, single) for elem in results)


@pytest.mark.parametrize('outer, inner', [
    (ResNetLRP, RelativeLRP), (RelativeLRP, ResNetLRP), (RelativeLRP, RelativeLRP),
])
def test_nested_contexts(outer, inner):
    '''The inner one of nested contexts wins, the outer one works after it.'''
    model, input, start = prepare(UserNetwork()), images() * 1e30, initial_relevance(1)
    results, scales = {}, {}
    for kind in (outer, inner):
        composite = kind()
        with Gradient(model=model, composite=composite) as attributor:
            results[kind] = attributor(input, start)[1]
        scales[kind] = getattr(composite, 'log_scale', torch.zeros(()))
    composites = outer(), inner()
    with Gradient(model=model, composite=composites[0]) as attributor:
        with Gradient(model=model, composite=composites[1]) as other:
            assert_close(other(input, start)[1], results[inner], 1e-12)
            assert torch.equal(getattr(composites[1], 'log_scale', torch.zeros(())), scales[inner])
        assert_close(attributor(input, start)[1], results[outer], 1e-12)
        assert torch.equal(getattr(composites[0], 'log_scale', torch.zeros(())), scales[outer])


@pytest.mark.parametrize('build', [
    lambda: nn.Conv2d(3, 2, 3), lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2), lambda: nn.ReLU(),
    lambda: nn.Sequential(nn.Conv2d(3, 2, 3)), lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU()),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), nn.Identity, nn.Sequential,
])
def test_root(build):
    '''A model may be a single layer.'''
    model, input = build().double(), block_input()
    output, function = literal(model, input) if not isinstance(model, nn.Identity) else (input, lambda z: z)
    relevance, lower = composite_attribute(model, input, relevance=output)
    assert_close(lower, function(relevance), 1e-12)


@pytest.mark.parametrize('kind', ['tuple', 'dict', 'nested'])
def test_several_outputs(kind):
    '''Several outputs are like slices of one, each of them alone is as if there was no other.'''
    first, second = relu_conv(4, 2).double(), seq(relu_conv(4, 3), relu_conv(3, 2)).double()
    body = seq(conv(3, 4), nn.ReLU()).double()
    build = {
        'tuple': lambda *values: values, 'dict': lambda a, b: {'a': a, 'b': b},
        'nested': lambda a, b: [a, {'b': (b, 3)}],
    }[kind]

    def forward(model, x):
        '''Two heads, one in between of the steps of the other.'''
        x = model.body(x)
        value, other = model.first[0](x), model.second(x)
        return build(model.first[1](value), other)

    model = Function(forward, body=body, first=first, second=second)
    joined = seq(*body, Block(first, second, join='cat'))
    input = block_input()
    output, function = literal(joined, input)
    starts = torch.rand_like(output).split(2, 1)

    def run(*indices):
        composite, leaf = RelativeLRP(), input.clone().requires_grad_()
        with composite.context(model):
            outputs = model(leaf)
            outputs = {
                'tuple': lambda: outputs, 'dict': lambda: list(outputs.values()),
                'nested': lambda: (outputs[0], outputs[1]['b'][0]),
            }[kind]()
            lower, = torch.autograd.grad([outputs[num] for num in indices], leaf, [starts[num] for num in indices])
        return lower * composite.log_scale.exp().view(-1, 1, 1, 1)

    assert_close(run(0, 1), function(torch.cat(starts, 1)), 1e-10)
    for num, branch in enumerate((first, second)):
        single, alone = run(num), literal(seq(*body, branch), input)[1](starts[num])
        ratio = total(single) / total(alone)
        assert_close(single, alone * ratio, 1e-10)


def test_outputs_inside_of_each_other():
    '''Features along with what is computed from them.'''
    features, head = residual(relu_conv(3, 3)), relu_conv(3, 2).double()
    model, input = Function(lambda m, x: (lambda h: (h, m.head(h)))(m.body(x)), body=features, head=head), block_input()
    leaf = input.clone().requires_grad_()
    starts = torch.rand(2, 3, 6, 6).double(), torch.rand(2, 2, 6, 6).double()
    hidden, function = literal(features, input)
    composite = RelativeLRP()
    with composite.context(model):
        lower, = torch.autograd.grad(model(leaf), leaf, starts)
    assert_close(hidden, features(input).detach())
    expected = function(starts[0] + rescaled(literal(head, hidden)[1](starts[1]), starts[1])) / 2
    assert_close(lower * composite.log_scale.exp().view(-1, 1, 1, 1), expected, 1e-10)
    with composite.context(nn.ModuleList([model])[0]):
        output, _ = model(leaf)
        lower, = torch.autograd.grad((output, output), leaf, (starts[0] / 2, starts[0] / 2))
    assert_close(lower, function(starts[0]) / 2, 1e-10)


def test_part_of_a_model():
    '''A context for a part of a model has no effect on the gradients of what is before.'''
    body, head = seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh()).double(), nn.Linear(6, 3).double()
    input = torch.rand(2, 4).double().requires_grad_()
    with RelativeLRP().context(head):
        hidden = body(input)
        output = head(hidden)
        middle, = torch.autograd.grad(output, hidden, torch.ones_like(output), retain_graph=True)
        actual = torch.autograd.grad(output, (input, *body.parameters()), torch.ones_like(output))
    assert_close(middle, naive_relative(head, hidden.detach(), torch.ones(2, 3).double()), 1e-12)
    for pair in zip(actual, torch.autograd.grad(body(input), (input, *body.parameters()), middle)):
        assert torch.equal(*pair)


def test_preprocessing():
    '''What is computed before the model only receives the gradient.'''
    model, image = integrity_model(), images().requires_grad_()
    expected, _ = explain(model, images() * 2 - .5)
    with RelativeLRP().context(model):
        input = image * 2 - .5
        output = model(input)
        lower, gradient = torch.autograd.grad(output, (input, image), initial_relevance(1)(output))
    assert torch.equal(lower, expected) and torch.equal(gradient, lower * 2)


def test_checkpointing():
    '''Activations may be computed again in the backward pass.'''
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        '''A module whose activations are not kept.'''
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            '''Run the module.'''
            return checkpoint(self.module, x, use_reentrant=False)

    model = prepare(UserNetwork())
    expected, _ = explain(model, images())
    model.block = Checkpointed(model.block)
    assert_close(explain(model, images())[0], expected, 1e-12)
