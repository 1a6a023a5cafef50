'''Tests of rules that pass relevance on.'''
import itertools

import pytest
import torch
from helpers.layers import assert_close, assert_conserved, attribute
from torch.nn import functional as F

from zennit_resnet.layer import Addition, Gate, Padding
from zennit_resnet.rules import (
    PassThrough,
    SignalTakesAll,
    Uncrop,
)

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
