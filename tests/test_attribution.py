'''What relevance starts from.'''
import pytest
import torch
from torchvision.models import resnet18
from zennit.attribution import Gradient

from zennit_resnet import initial_relevance as exported
from zennit_resnet.attribution import initial_relevance
from zennit_resnet.composites import ResNetLRP

OUTPUT = torch.tensor([[1., 2., 3.], [-4., 0., 4.], [0., 0., 0.], [-1., -5., 2.]], dtype=torch.float64)


def naive(output, targets, value):
    '''One-hot at each sample's own target, times a value.'''
    relevance = torch.zeros_like(output)
    for num, target in enumerate(targets):
        relevance[num, target] = {
            'logit': output[num, target],
            'softmax': output[num, target].exp() / output[num].exp().sum(),
            'one': 1.,
        }[value]
    return relevance


def test_exported():
    '''The name is available from the package.'''
    assert exported is initial_relevance


@pytest.mark.parametrize('value', ['logit', 'softmax', 'one'])
@pytest.mark.parametrize('target, targets', [
    (1, [1, 1, 1, 1]), (torch.tensor(2), [2, 2, 2, 2]), ([0, 2, 1, 1], [0, 2, 1, 1]), ((2, 1, 0, 0), [2, 1, 0, 0]),
    (torch.tensor([1, 0, 2, 0]), [1, 0, 2, 0]), (torch.tensor([2, 2, 0, 1], dtype=torch.int32), [2, 2, 0, 1]),
], ids=str)
def test_values(target, targets, value):
    '''Each sample has its own target and value.'''
    relevance = initial_relevance(target, value)(OUTPUT)
    assert torch.allclose(relevance, naive(OUTPUT, targets, value), rtol=1e-12)
    assert relevance.dtype == OUTPUT.dtype


def test_default_is_logit():
    '''The logit is what relevance starts from by default.'''
    assert torch.equal(initial_relevance(0)(OUTPUT), initial_relevance(0, 'logit')(OUTPUT))
    assert float(initial_relevance(0)(OUTPUT)[1, 0]) == -4.


def test_reused_for_batches():
    '''One target serves batches of any size, and outputs are not changed or connected.'''
    function = initial_relevance(1)
    output = OUTPUT.clone().requires_grad_()
    for num in (1, 4):
        relevance = function(output[:num])
        assert relevance.shape == (num, 3) and not relevance.requires_grad
    assert torch.equal(output, OUTPUT)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    '''Relevance starts in single precision.'''
    relevance = initial_relevance([0, 1, 2, 2], 'softmax')(OUTPUT.to(dtype))
    assert relevance.dtype == torch.float32
    assert torch.allclose(relevance, naive(OUTPUT, [0, 1, 2, 2], 'softmax').float(), rtol=1e-5)


@pytest.mark.parametrize('value', ['logits', 'Softmax', None, 1])
def test_unknown_value(value):
    '''The error names the value and the choices.'''
    with pytest.raises(ValueError, match='value=') as info:
        initial_relevance(0, value)
    assert all(repr(elem) in str(info.value) for elem in (value, 'logit', 'softmax', 'one'))


@pytest.mark.parametrize('target', [1., [0., 1.], torch.eye(3), torch.eye(3, dtype=torch.int64), True, [True, False]])
def test_target_type(target):
    '''Targets are indices, and not one-hot vectors.'''
    with pytest.raises(TypeError, match='class indices'):
        initial_relevance(target)


@pytest.mark.parametrize('targets', [[0], [0, 1, 2], [0] * 5, []])
def test_number_of_targets(targets):
    '''There is one target for each sample.'''
    with pytest.raises((ValueError, TypeError)) as info:
        initial_relevance(targets)(OUTPUT)
    assert not targets or f'{len(targets)} targets for a batch of 4' in str(info.value)


@pytest.mark.parametrize('target', [3, -4, [0, 1, 2, 3], [0, -2, 0, 0], [-1] * 4])
def test_target_outside_of_classes(target):
    '''Targets count from zero, and only a single one from the end.'''
    with pytest.raises(IndexError, match='3 classes'):
        initial_relevance(target)(OUTPUT)


@pytest.mark.parametrize('shape', [(), (2, 3, 1), (2, 3, 4, 4)])
def test_output_shape(shape):
    '''Outputs of anything but classifiers give an error with their shape.'''
    with pytest.raises(ValueError, match='batch, classes') as info:
        initial_relevance(0)(torch.zeros(shape))
    assert str(tuple(shape)) in str(info.value)


@pytest.mark.parametrize('value', ['logit', 'softmax', 'one'])
def test_attributor(value):
    '''It is used as the output relevance of Zennit's attributors, each sample with its own target.'''
    model = resnet18(num_classes=5).eval()
    input = torch.randn(3, 3, 32, 32)
    targets = [3, 0, 4]
    with Gradient(model, ResNetLRP()) as attributor:
        output, relevance = attributor(input, initial_relevance(targets, value))
        for num, target in enumerate(targets):
            single = attributor(input[num:num + 1], initial_relevance(target, value))[1][0]
            assert float((relevance[num] - single).abs().max()) < 1e-4 * float(single.abs().max())
    with Gradient(model, ResNetLRP(), initial_relevance(targets, value)) as attributor:
        assert torch.equal(attributor(input)[1], relevance)
    expected = naive(output.detach().double(), targets, value).sum(1)
    assert torch.allclose(relevance.double().sum((1, 2, 3)), expected, rtol=1e-3)
