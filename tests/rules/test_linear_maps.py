'''Tests for functions that go through a batch example by example.'''
import pytest
import torch
from helpers.networks import narrow_resnet18
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, initial_relevance
from zennit_resnet.rules import _linear_maps as maps


@pytest.fixture(name='calls')
def fixture_calls(monkeypatch):
    '''Go through all tensors example by example. Sizes of the batches a function was called with.'''
    monkeypatch.setattr(maps, 'LARGE', 1)
    return []


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_by_example(calls, memory_format):
    '''The result is that of the whole batch, in the same memory format.'''
    first, second = (torch.randn(5, 3, 4, 6).contiguous(memory_format=memory_format) for _ in range(2))

    def function(*tensors):
        calls.append(len(tensors[0]))
        return sum(tensors).abs()

    result = maps.by_example(function, first, second)
    assert torch.equal(result, (first + second).abs()) and calls == [1] * 5
    assert result.is_contiguous(memory_format=memory_format)
    # another type, and fewer dimensions
    result = maps.by_example(lambda elem: elem.double().sum((2, 3)), first)
    assert result.dtype == torch.float64 and torch.equal(result, first.double().sum((2, 3)))


@pytest.mark.parametrize('shapes', [
    [(5, 5, 3), (5, 3)], [(5, 3), (1, 3)], [(5, 3), (3,)], [(1, 3), (1, 3)], [(0, 3), (0, 3)], [(), ()],
])
def test_by_example_whole(calls, shapes):
    '''What is broadcast along the batch, or is a single example, or none, is not taken apart.'''
    tensors = [torch.randn(shape) for shape in shapes]

    def function(first, second):
        calls.append(first.shape)
        return first + second

    assert torch.equal(maps.by_example(function, *tensors), tensors[0] + tensors[1])
    assert calls == [tensors[0].shape]


@pytest.mark.parametrize('composite', [ResNetLRP, BlockLRP, RelativeLRP])
def test_composites(monkeypatch, composite):
    '''Relevance is the same to the last digit.'''
    torch.manual_seed(0)
    model, input = narrow_resnet18(num_classes=5).double().eval(), torch.randn(3, 3, 40, 40, dtype=torch.float64)

    def attribute():
        with Gradient(model=model, composite=composite()) as attributor:
            return attributor(input, initial_relevance([0, 2, 4]))[1]

    whole = attribute()
    monkeypatch.setattr(maps, 'LARGE', 1)
    assert torch.equal(attribute(), whole) and float(whole.abs().sum()) > 0
