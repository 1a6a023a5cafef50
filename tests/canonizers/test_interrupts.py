'''Exceptions that are not errors, for which PyTorch runs no hooks, leave nothing behind.'''
import pytest
import torch
from helpers.networks import randomize
from helpers.state import Snapshot
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlusFlat

import captum_adapters.attr as adapters
from zennit_resnet import BlockEpsilon, BlockLRP, ResNetLRP, _inplace, with_splitting
from zennit_resnet.canonizers import residual
from zennit_resnet.composites import RelativeLRP
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.rules import block

pytestmark = pytest.mark.once

PLACES = ('forward', 'backward', 'layer', 'forward hook', 'forward pre-hook', 'hook of activation')
COMPOSITES = {
    'resnet': ResNetLRP, 'merge': lambda: ResNetLRP(batch_norm='merge'), 'relative': RelativeLRP, 'block': BlockLRP,
    'splitting': lambda: with_splitting(EpsilonPlusFlat()),
    'block-layers': lambda: ResNetLRP(layer_map=[(nn.Conv2d, BlockEpsilon())]),
}
every_composite = pytest.mark.parametrize('build', [pytest.param(build, id=name) for name, build in COMPOSITES.items()])


class Stop:
    '''Raises an exception at a place.'''
    def __init__(self):
        self.place = self.error = None

    def __call__(self, *args):
        raise self.error

    def at(self, place, x):
        '''Raise if this is the place.'''
        if place == self.place:
            self()
        if self.place == 'backward' and x.requires_grad:
            x.register_hook(self)


class Model(nn.Module):
    '''A residual network with a gate, which can be stopped.'''
    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.relu, self.fc = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.stop = Stop()

    def forward(self, x):
        '''Run the network.'''
        x = self.relu(self.bn(self.conv(x)))
        h = self.other(x)
        self.stop.at('forward', h)
        h = F.relu(h + x)
        h = h * torch.sigmoid(h.mean((2, 3), keepdim=True))
        return self.fc(h.mean((2, 3)))

    def interrupt(self, place, error, function):
        '''Run a function that is interrupted.'''
        self.stop.place, self.stop.error = place, error
        handles = [
            *([self.other.register_forward_hook(self.stop)] if place == 'forward hook' else []),
            *([self.other.register_forward_pre_hook(self.stop)] if place == 'forward pre-hook' else []),
            *([self.relu.register_forward_hook(self.stop)] if place == 'hook of activation' else []),
        ]
        if place == 'layer':
            self.other._conv_forward = self.stop
        try:
            with pytest.raises(type(error)):
                function()
        finally:
            self.stop.place = self.stop.error = None
            vars(self.other).pop('_conv_forward', None)
            for handle in handles:
                handle.remove()


@pytest.fixture(name='model')
def model_fixture():
    '''A model with some frozen parameters.'''
    model = randomize(Model()).eval()
    model.conv.weight.requires_grad_(False)
    return model


@pytest.fixture(autouse=True)
def clean_state():
    '''Nothing of what is global may change.'''
    yield
    modes, is_enabled = torch.overrides._get_current_function_mode_stack(), torch.is_grad_enabled()
    for _ in modes:
        torch.overrides._pop_mode()
    torch.set_grad_enabled(True)
    assert not modes and is_enabled and not residual.REGISTERED
    assert not block._CALLS.__dict__.get('stack') and not _inplace._STATE.replaced


def explain(model):
    '''Relevance of the input of a model with rules.'''
    x = torch.linspace(-1, 1, 216).view(2, 3, 6, 6).requires_grad_()
    return torch.autograd.grad(model(x), x, torch.eye(3)[[0, 1]])[0]


@every_composite
@pytest.mark.parametrize('place', PLACES)
def test_same_context(model, build, place):
    '''Relevance is right after an interrupt in the same context.'''
    with build().context(model):
        expected = explain(model)
    with build().context(model):
        model.interrupt(place, KeyboardInterrupt(), lambda: explain(model))
        assert torch.equal(explain(model), expected)
        assert torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize('name', COMPOSITES)
def test_new_context(model, name):
    '''The model is as before, and relevance in another context is right, for each kind of error at each place.'''
    build, number = COMPOSITES[name], list(COMPOSITES).index(name)
    errors = KeyboardInterrupt(), SystemExit(), GeneratorExit(), ValueError()

    def attribute():
        with build().context(model):
            return explain(model)

    def ledger():
        return conservation_ledger(model, torch.linspace(-1, 1, 216).view(2, 3, 6, 6), build(), target=1).relevance

    snapshot, expected = Snapshot(model), (attribute(), ledger())
    for row, place in enumerate(PLACES):
        for column, function in enumerate((attribute, ledger)):
            model.interrupt(place, errors[(number + row + 2 * column) % 4], function)
            snapshot.check()
            assert torch.equal(attribute(), expected[0]) and torch.equal(ledger(), expected[1])


@pytest.mark.parametrize('build', [
    adapters.ResNetLRP, adapters.RelativeLRP, lambda model: adapters.C3LRP(model, postprocess=None),
    lambda model: adapters.CompositeAttribution(model, with_splitting(EpsilonPlusFlat())),
    lambda model: adapters.LayerRelevance(model, 'conv'),
], ids=['resnet', 'relative', 'c3', 'composite', 'layer'])
def test_captum(model, build):
    '''Classes of Captum can be used again.'''
    method, x, snapshot = build(model), torch.linspace(-1, 1, 216).view(2, 3, 6, 6), Snapshot(model)
    expected = method.attribute(x, target=1)
    for place in PLACES:
        model.interrupt(place, KeyboardInterrupt(), lambda: method.attribute(x, target=1))
        snapshot.check()
        assert torch.equal(method.attribute(x, target=1), expected)
