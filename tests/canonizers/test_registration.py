'''A composite is for one network at a time, and undoes what it did to it, also if it is lost.'''
import copy
import gc
import warnings

import pytest
import torch
from helpers.networks import UserNetwork, narrow_resnet18, randomize
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, MixedComposite, NameMapComposite

from zennit_resnet import BlockLRP, RelativeLRP, ResidualCanonizer, ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.canonizers.residual import REGISTERED

OURS = {
    'ratio': ResNetLRP, 'merge': lambda: ResNetLRP(batch_norm='merge'), 'relative': RelativeLRP, 'block': BlockLRP,
    'splitting': lambda: with_splitting(EpsilonPlus()),
}
COMPOSITES = {
    **OURS, 'zennit': lambda: EpsilonPlus(canonizers=[ResidualCanonizer()]),
    'mixed': lambda: MixedComposite([NameMapComposite([]), ResNetLRP()]),
}


def network():
    '''A small network.'''
    torch.manual_seed(0)
    return randomize(UserNetwork()).eval()


def images():
    '''One image.'''
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def explain(model, composite):
    '''Relevance of the image.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(images(), initial_relevance(1))[1]


def hooks(model):
    '''Number of hooks of all modules.'''
    return sum(len(elem._forward_hooks) + len(elem._forward_pre_hooks) for elem in model.modules())


def assert_clean(*models):
    '''No trace of any composite.'''
    for model in models:
        assert not hooks(model)
        assert all(param.requires_grad for param in model.parameters())
    assert not REGISTERED
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize('same', [True, False])
@pytest.mark.parametrize('name', COMPOSITES)
def test_twice(name, same):
    '''The second registration is an error, whether for the same network or another.'''
    model, composite = network(), COMPOSITES[name]()
    other = model if same else network()
    expected = explain(model, COMPOSITES[name]())
    with pytest.raises(RuntimeError, match=f'{type(composite).__name__}.*in use'):
        with composite.context(model), composite.context(other):
            raise AssertionError('not reached')
    composite.remove()
    assert_clean(model, other)
    assert torch.equal(explain(model, composite), expected)
    assert torch.equal(explain(other, composite), expected)
    assert_clean(model, other)


@pytest.mark.parametrize('name', OURS)
def test_first_registration_stays(name):
    '''The network for which a composite is in use keeps its relevance.'''
    model, composite = network(), COMPOSITES[name]()
    expected = explain(model, COMPOSITES[name]())
    with Gradient(model=model, composite=composite) as attributor:
        with pytest.raises(RuntimeError, match='in use'):
            composite.register(network())
        assert torch.equal(attributor(images(), initial_relevance(1))[1], expected)
    assert_clean(model)


@pytest.mark.parametrize('name', COMPOSITES)
def test_lost(name):
    '''A network whose composite was lost is as before, and says so.'''
    model = network()
    expected = explain(model, COMPOSITES[name]())
    with pytest.warns(UserWarning, match='lost while it was registered'):
        composite = COMPOSITES[name]()
        composite.register(model)
        model(images())
        del composite
        gc.collect()
    assert_clean(model)
    assert torch.equal(explain(model, COMPOSITES[name]()), expected)


@pytest.mark.parametrize('name', COMPOSITES)
def test_lost_in_a_cycle(name):
    '''The next registration collects what was lost, whatever refers to itself.'''
    model = network()
    expected = explain(model, COMPOSITES[name]())
    gc.disable()
    try:
        composite = COMPOSITES[name]()
        composite.itself = composite
        composite.register(model)
        del composite
        assert hooks(model)
        with pytest.warns(UserWarning, match='lost'):
            assert torch.equal(explain(model, COMPOSITES[name]()), expected)
    finally:
        gc.enable()
    assert_clean(model)


@pytest.mark.parametrize('name', COMPOSITES)
def test_lost_with_an_exception(name):
    '''A composite that an exception leaves registered is lost with it.'''
    def cell(model):
        composite = COMPOSITES[name]()
        composite.register(model)
        raise ZeroDivisionError

    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ZeroDivisionError):
            cell(model)
        gc.collect()
    assert_clean(model)


def test_not_lost():
    '''No warning if it is removed, and none if network and composite are lost together.'''
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for create in COMPOSITES.values():
            model, composite = network(), create()
            explain(model, composite)
            composite.register(model)
            composite.remove()
            del composite
            gc.collect()
            assert_clean(model)


def test_copy_made_inside():
    '''Copies that were made within a context have its hooks, but run, and cannot be explained.'''
    model = network()
    expected = model(images())
    with ResNetLRP().context(model):
        duplicate = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(duplicate(images()), expected)
    with pytest.raises(RuntimeError, match='copy'):
        explain(duplicate, ResNetLRP())
    assert_clean(model)


@pytest.mark.parametrize('name', ['ratio', 'merge', 'relative', 'block'])
def test_composite_of_zennit_inside(name):
    '''Another composite's rules in between are an error that names a layer.'''
    model = network()
    expected = explain(model, COMPOSITES[name]())
    with COMPOSITES[name]().context(model):
        with pytest.raises(RuntimeError, match=r'\(Conv2d\).*Epsilon|ZPlus'):
            explain(model, EpsilonPlus())
    assert_clean(model)
    assert torch.equal(explain(model, COMPOSITES[name]()), expected)


@pytest.mark.parametrize('name', COMPOSITES)
def test_hooks_of_users(name):
    '''Hooks that were there before see outputs with a graph, can read relevance there and change the output.'''
    class Net(nn.Sequential):
        '''Two layers.'''

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    model = Net(*layers)
    model.eval()
    seen, kept = {}, []

    def record(layer, args, output):
        output.retain_grad()
        kept.append(output)
        output.register_hook(lambda relevance: seen.__setitem__(layer, relevance.sum().item()))

    handles = [layer.register_forward_hook(record) for layer in model]
    explain(model, COMPOSITES[name]())
    assert len(seen) == len(model) and all(output.grad is not None for output in kept)
    if name in ('ratio', 'merge', 'mixed'):
        assert all(abs(value - kept[-1][0, 1].item()) < 1e-5 for value in seen.values())
    for handle in handles:
        handle.remove()

    class Doubled(Net):
        '''What a hook does, written in the network.'''
        def forward(self, x):
            '''Logits.'''
            for num, layer in enumerate(self):
                x = layer(x) * 2 if num == 0 else layer(x)
            return x

    twin = Doubled(*model).eval()
    expected = explain(twin, COMPOSITES[name]())
    handle = model[0].register_forward_hook(lambda layer, args, output: output * 2)
    if name == 'block':
        # there, a layer is what its module returns
        assert bool(explain(model, COMPOSITES[name]()).isfinite().all())
    else:
        torch.testing.assert_close(explain(model, COMPOSITES[name]()), expected)
    handle.remove()


def test_crp():
    '''Concept relevance: relevance of layers under conditions, for all composites.'''
    attribution = pytest.importorskip('crp.attribution')
    model, layer = narrow_resnet18(num_classes=4).eval(), 'layer3.1.conv2'
    for create in (ResNetLRP, lambda: with_splitting(EpsilonPlus())):
        def run(*conditions, create=create):
            return attribution.CondAttribution(model)(
                images().requires_grad_(), list(conditions), create(), record_layer=[layer]
            )

        total = run({'y': [1]})
        relevance = total.relevances[layer]
        some = [{'y': [1], layer: [0, 5]}, {'y': [1], layer: list(range(1, 5)) + list(range(6, relevance.shape[1]))}]
        parts = [run(condition).heatmap for condition in some]
        whole = run({'y': [1], layer: list(range(relevance.shape[1]))}).heatmap
        torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)
        assert (parts[0] - whole).abs().max() > 1e-3 * whole.abs().max()
