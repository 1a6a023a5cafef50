'''Several targets by one forward pass, in Captum.'''
import pytest
import torch
from helpers.networks import UserNetwork, randomize
from helpers.state import Snapshot
from zennit.composites import EpsilonPlus

from captum_adapters.attr import C3LRP, CompositeAttribution, LayerRelevance, RelativeLRP, ResNetLRP
from zennit_resnet import with_splitting

TARGETS = [0, [3, 1], torch.tensor([2, 4]), lambda output: output[:, :2].sum(1)]


def build():
    '''A network in double precision.'''
    torch.manual_seed(0)
    return randomize(UserNetwork()).double().eval()


def images(num=2):
    '''Inputs.'''
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize('create', [
    ResNetLRP, lambda model: ResNetLRP(model, contrast='centred', classifier='epsilon'),
    lambda model: ResNetLRP(model, splitting='symmetric', contrast=torch.tensor([[0], [3]])),
    RelativeLRP, C3LRP, lambda model: CompositeAttribution(model, with_splitting(EpsilonPlus()), 'one'),
], ids=['ratio', 'centred', 'contrasts of each', 'relative', 'c3', 'zennit'])
@pytest.mark.parametrize('size', [None, 1])
def test_one_by_one(create, size):
    '''They are the attributions of one target after the other, also for parts of the batch.'''
    model, calls = build(), []
    before = Snapshot(model)
    method = create(model)
    # functions have no contrast
    targets = TARGETS if method.contrast is None else TARGETS[1:3]
    expected = torch.stack([method.attribute(images(), target) for target in targets])
    handle = model.register_forward_hook(lambda *args: calls.append(1) and None)
    actual = method.attribute_targets(images(), targets, internal_batch_size=size)
    handle.remove()
    assert actual.shape == (len(targets), 2, 3, 16, 16) and len(calls) == (1 if size is None else 2)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    if not isinstance(method.composite, type(with_splitting(EpsilonPlus()))):
        before.check()


def test_inputs():
    '''A tuple of inputs gives a tuple, further arguments are given to the network, and no gradients are needed.'''
    class Two(torch.nn.Module):
        '''Two images and a factor.'''
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, first, second, factor):
            '''Logits.'''
            return self.net(first + second) * factor

    method = ResNetLRP(Two().eval())
    inputs = images(), images().flip(0)
    with torch.no_grad():
        actual = method.attribute_targets(inputs, [1, 2], 2.)
    assert isinstance(actual, tuple) and len(actual) == 2
    for num in range(2):
        for index, target in enumerate((1, 2)):
            assert torch.equal(actual[num][index], method.attribute(inputs, target, 2.)[num])


@pytest.mark.parametrize('targets, error, match', [
    (3, ValueError, 'targets=3'), ([], ValueError, r'targets=\[\]'), ([0, 5], ValueError, '5'),
    ([0, 'cat'], TypeError, 'cat'),
])
def test_errors(targets, error, match):
    '''What is wrong is named, and the network is as it was.'''
    model = build()
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        ResNetLRP(model).attribute_targets(images(), targets)
    before.check()


def test_layers():
    '''The relevance of layers is of one target at a time.'''
    with pytest.raises(NotImplementedError, match='attribute'):
        LayerRelevance(build(), 'block').attribute_targets(images(), [0, 1])
