'''Canaries for what captum_adapters needs of other packages beyond what they promise.

Checked with Captum 0.9.0 and torch-cam 0.5.0. Those for PyTorch and Zennit are in test_compat.py and test_autograd.py.
Where one fails, maps would be wrong without an error, or calls fail: see the docstring of captum_adapters/_compat.py.
'''
import re
import typing
from pathlib import Path

import pytest
import torch
from captum._utils import common
from captum._utils import typing as captum_typing
from captum.attr import InputXGradient, NoiseTunnel
from captum.log import log_usage

import captum_adapters
from captum_adapters import _compat, _validation

PRIVATE = re.compile(r'\bcaptum\.(?:\w+\.)*_\w+|from torch\._\w+|torch\._C|_sequence_nr|hook_a\b|_orig_mod')


def test_private_names_are_fenced():
    '''No other module uses private names of Captum, PyTorch and torch-cam.'''
    found = []
    for path in Path(captum_adapters.__file__).parent.rglob('*.py'):
        if path.name != '_compat.py':
            found += [(path.name, match[0]) for match in PRIVATE.finditer(path.read_text(encoding='utf-8'))]
    assert found == []


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
