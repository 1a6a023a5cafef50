'''Tests of relevance splitting at additions.'''
import itertools

import pytest
import torch
from helpers.layers import attribute

from zennit_resnet.layer import Addition
from zennit_resnet.rules import (
    RatioSplit,
    ResidualOnly,
    SymmetricSplit,
)

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
    '''Relevance of addends, by (input) -> list of addends. The first is the input of others.'''
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


@pytest.mark.parametrize('move', [
    lambda h: h.flatten(1), lambda h: h.mT, lambda h: h.permute(1, 0), lambda h: h.reshape(3, 2), lambda h: h[:, :3],
    lambda h: 0 + h, lambda h: (0 + h).clone().view(6), lambda h: h.double().unsqueeze(0),
], ids=('flatten', 'mT', 'permute', 'reshape', 'slice', 'sum', 'several', 'unsqueeze'))
def test_residual_only_moved(move):
    '''It is one in another shape and order, too, and as Python's sum has it.'''
    relevance, _, (skip, main) = residual_only(
        ResidualOnly(), lambda input: [move(elem := input * 1), move(torch.tanh(elem) * 2)]
    )
    assert not skip.any() and torch.equal(main, relevance)


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
