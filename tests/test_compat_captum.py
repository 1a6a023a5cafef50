'''Canaries for what captum_adapters needs of other packages beyond what they promise.

Checked with torch 2.14, captum 0.9.0 and torch-cam 0.5.0. Where one fails, maps would be wrong without an error, or
calls fail: look at `captum_adapters/_compat.py` and at the places that use it.
'''
import typing

import pytest
import torch
from captum._utils import common
from captum._utils import typing as captum_typing
from captum.attr import InputXGradient, NoiseTunnel
from captum.log import log_usage
from torch.overrides import TorchFunctionMode

from captum_adapters import _compat, _validation


def test_sequence_numbers():
    '''A thread numbers operations in the order in which it runs them, by which calls of layers are known.'''
    x = torch.rand(2, requires_grad=True)
    begin = _compat.next_sequence_nr()
    first = x * 2
    middle = _compat.next_sequence_nr()
    second = first.exp()
    end = _compat.next_sequence_nr()
    assert begin <= _compat.sequence_nr(first.grad_fn) < middle <= _compat.sequence_nr(second.grad_fn) < end
    # views and copies are operations too
    assert end <= _compat.sequence_nr(second.view(1, 2).grad_fn) < _compat.next_sequence_nr()
    with torch.no_grad():
        before = _compat.next_sequence_nr()
        second + 1
        assert _compat.next_sequence_nr() == before


def test_torch_function():
    '''What reads off the places of relevance is not seen by modes, which would run it by surrogates.'''
    seen = []

    class Mode(TorchFunctionMode):
        '''Takes down functions.'''
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        with _compat.DisableTorchFunction():
            torch.rand(1) + 1
        assert not seen
        torch.rand(1) + 1
    assert seen


def test_types():
    '''Captum has no other forms of targets and baselines than those that are checked here.'''
    for name in ('TargetType', 'BaselineType'):
        ours, theirs = (
            set(map(str, typing.get_args(getattr(module, name)))) for module in (_validation, captum_typing)
        )
        assert {text.lower().replace('typing.', '') for text in theirs} == {
            text.lower().replace('typing.', '') for text in ours
        }


@pytest.mark.parametrize('target, shape', [
    (None, (3, 1)), (1, (3, 4)), (-1, (3, 4)), (torch.tensor(2), (3, 4)), (torch.tensor([2]), (3, 4)),
    ([0, 3, 1], (3, 4)), (torch.tensor([0, 3, 1]), (3, 4)), ((1, 2), (3, 4, 5)), ((1, -2), (3, 4, 5)),
    ([(0, 1), (3, 4), (1, 2)], (3, 4, 5)),
])
def test_targets(target, shape):
    '''Captum selects the same of an output.'''
    output = torch.rand(shape)
    index = _validation.check_target(target, len(output), allow_negative=True)
    theirs = common._select_targets(output, target)
    assert torch.equal(_validation.select_target(output, index), theirs.reshape(-1))


def test_log_usage():
    '''The decorator keeps the method, which NoiseTunnel and others call by `__wrapped__`.'''
    def attribute(self):
        '''A method.'''

    assert log_usage()(attribute).__wrapped__ is attribute
    assert hasattr(InputXGradient.attribute, '__wrapped__') and hasattr(NoiseTunnel.attribute, '__wrapped__')


def test_noise_tunnel():
    '''NoiseTunnel gives an attribution one call for all samples, with expanded targets and arguments.'''
    calls = []

    class Method(InputXGradient):
        '''Takes down arguments.'''
        def attribute(self, inputs, target=None, additional_forward_args=None):
            '''Inputs.'''
            calls.append((inputs.shape, target, additional_forward_args[0].shape))
            return inputs

        attribute = log_usage()(attribute)

    NoiseTunnel(Method(torch.nn.Identity())).attribute(
        torch.rand(2, 3), nt_samples=4, target=[0, 1], additional_forward_args=(torch.rand(2, 5),)
    )
    assert calls == [((8, 3), [0, 0, 0, 0, 1, 1, 1, 1], (8, 5))]


def test_torch_cam():
    '''torch-cam keeps the activation of its only layer in a list, and computes the map from what is there.'''
    methods = pytest.importorskip('torchcam.methods')
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 6 * 6, 4)
    ).eval()
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad(), methods.ScoreCAM(model, model[1]) as extractor:
        assert _compat.cam_activation(extractor) is None
        model(image)
        activation = _compat.cam_activation(extractor)
        assert torch.equal(activation, model[:2](image))
        _compat.set_cam_activation(extractor, torch.zeros_like(activation))
        assert not extractor(0, normalized=False)[0].any()
