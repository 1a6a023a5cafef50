'''Attribution classes behave as Captum's own do, and give what Zennit's route gives.'''
import copy
import gc
import inspect
import threading
import weakref
from functools import partial

import captum.metrics
import numpy as np
import pytest
import torch
import zennit.composites
from captum._utils.common import _select_targets
from captum.attr import LRP, GradientAttribution, NoiseTunnel
from captum.attr import visualization as viz
from captum.attr._utils.lrp_rules import EpsilonRule
from helpers.networks import UserNetwork, narrow_resnet18, randomize
from helpers.state import assert_state, in_threads, resident, state_of
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, LayerMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon, Pass
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation

from captum_adapters.attr import C3LRP, RISE, CompositeAttribution, RelativeLRP, ResNetLRP, ScoreCAM
from zennit_resnet import UnsupportedOperation, composites, initial_relevance, registration, with_splitting
from zennit_resnet.postprocess import c1c, c3, heat_quantization, sum_channels
from zennit_resnet.registration import exclusive, parts_of, unwrap

# Name, class or factory, composite for Zennit's route, and post-processing
METHODS = [
    ('composite', CompositeAttribution, composites.ResNetLRP, None),
    ('epsilon_plus', lambda model, **kwargs: CompositeAttribution(
        model, with_splitting(zennit.composites.EpsilonPlus()), **kwargs
    ), lambda: with_splitting(zennit.composites.EpsilonPlus()), None),
    ('ratio', ResNetLRP, composites.ResNetLRP, None),
    ('symmetric', partial(ResNetLRP, splitting='symmetric'), partial(composites.ResNetLRP, 'symmetric'), None),
    ('relative', RelativeLRP, composites.RelativeLRP, None),
    ('block', partial(C3LRP, postprocess=None), composites.BlockLRP, None),
    ('c3', C3LRP, composites.BlockLRP, c3),
]
each_method = pytest.mark.parametrize('method', [
    pytest.param(elem[1], id=elem[0]) for elem in METHODS if elem[0] not in ('composite', 'symmetric')
])
each_route = pytest.mark.parametrize(
    'method, composite, postprocess', [pytest.param(*elem[1:], id=elem[0]) for elem in METHODS]
)
pytestmark = pytest.mark.filterwarnings('ignore:Nothing is left')


def network(double=True):
    '''A residual network with in-place operations, and parameters that require gradients.'''
    model = randomize(UserNetwork()).eval()
    return model.double() if double else model


def images(batch=3):
    '''A batch of inputs.'''
    return torch.randn(batch, 3, 12, 12, dtype=torch.float64)


class TwoInputs(torch.nn.Module):
    '''A network of two images of different size and further arguments, which changes the first in place.'''
    def __init__(self, inplace=True):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.other = torch.nn.Conv2d(2, 4, 1)
        self.pool = torch.nn.AvgPool2d(2)
        self.relu = torch.nn.ReLU(inplace=inplace)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, first, second, scale=None, name='none'):
        '''Logits.'''
        assert name in ('none', 'some')
        first = self.relu(first)
        x = self.relu(self.conv(first) + self.pool(self.other(second)))
        if scale is not None:
            scale = scale.view(-1, 1, 1, 1)
            x = x * scale + scale
        return self.head(x.mean((2, 3)))


def two_inputs(method):
    '''A network of two inputs, in place if the method can.'''
    return TwoInputs(inplace=not is_block(method)).double()


def is_block(method):
    '''Whether a method has the block rule, which keeps the network's input and not a copy of it.'''
    return isinstance(method(torch.nn.Identity()).composite, composites.BlockLRP)


class Pixels(torch.nn.Module):
    '''A network with an output of four dimensions.'''
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        '''Logits of each pixel.'''
        return self.conv(x)


class Single(torch.nn.Module):
    '''A network with a single output, with or without a dimension for it.'''
    def __init__(self, ndim):
        super().__init__()
        self.model = network()
        self.ndim = ndim

    def forward(self, x):
        '''Logit of the first class.'''
        x = self.model(x)
        return x[:, :1] if self.ndim == 2 else x[:, 0]


def route(model, composite, x, value, postprocess=None):
    '''Zennit's route, with a composite and initial relevance or a function for it.'''
    with Gradient(model=model, composite=composite) as attributor:
        _, relevance = attributor(x.clone(), value)
    if postprocess is None:
        return relevance.detach()
    return (postprocess(sum_channels(relevance.detach()))[:, None] / x.shape[1]).expand_as(x)


# -- results -----------------------------------------------------------------------------------------------------------

@each_route
@pytest.mark.parametrize('value', ['logit', 'softmax', 'one'])
def test_route(method, composite, postprocess, value):
    '''Results are those of Zennit's route, bit for bit.'''
    model, x = network(), images()
    attributions = method(model, initial_relevance=value).attribute(x, target=[1, 0, 4])
    expected = route(model, composite(), x, initial_relevance([1, 0, 4], value), postprocess)
    assert torch.equal(attributions, expected) and attributions.abs().sum() > 0
    assert not attributions.requires_grad and attributions.dtype == x.dtype


@each_method
def test_repeated(method):
    '''A second call gives the same.'''
    model, x = network(), images()
    instance = method(model)
    first = instance.attribute(x, target=1)
    instance.attribute(x[:2] + 1, target=2)
    assert torch.equal(instance.attribute(x, target=1), first)


def test_input_used_twice():
    '''An input with several uses.'''
    class Model(torch.nn.Module):
        '''Adds its input.'''
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            '''Logits.'''
            return self.head((self.conv(x) + x).mean((2, 3)))

    model, x = Model().double(), images()
    for method, composite in ((ResNetLRP, composites.ResNetLRP), (RelativeLRP, composites.RelativeLRP)):
        expected = route(model, composite(), x, initial_relevance([1, 2, 3]))
        assert torch.equal(method(model).attribute(x, target=[1, 2, 3]), expected)


def test_against_captum():
    '''The epsilon rule gives what Captum's LRP gives, on a network which it supports.'''
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5)
    ).double()
    x = images()
    ours = CompositeAttribution(model, LayerMapComposite([
        (Activation, Pass()), ((torch.nn.Conv2d, torch.nn.Linear, torch.nn.AdaptiveAvgPool2d), Epsilon(1e-9)),
    ]))
    attributions, delta = ours.attribute(x, target=[1, 2, 3], return_convergence_delta=True)
    for layer in (0, 2, 4, 6):
        model[layer].rule = EpsilonRule(1e-9)
    # Flatten has no rule in Captum
    model[5] = torch.nn.Identity()
    model[5].rule = EpsilonRule(1e-9)
    wrapped = torch.nn.Sequential(*model[:5], torch.nn.Conv2d(4, 5, 1).double())
    wrapped[5].weight.data, wrapped[5].bias.data = model[6].weight.data[..., None, None], model[6].bias.data
    wrapped[5].rule = EpsilonRule(1e-9)
    expected, captum_delta = LRP(wrapped).attribute(
        x, target=[(1, 0, 0), (2, 0, 0), (3, 0, 0)], return_convergence_delta=True
    )
    assert torch.allclose(attributions, expected.detach(), rtol=1e-6, atol=1e-9)
    assert torch.allclose(delta, captum_delta.detach(), rtol=1e-6, atol=1e-9)


# -- targets, inputs, arguments ----------------------------------------------------------------------------------------

@each_method
@pytest.mark.parametrize('target, classes', [
    (2, [2, 2, 2]), (torch.tensor(2), [2, 2, 2]), (torch.tensor([2]), [2, 2, 2]), (np.int64(2), [2, 2, 2]),
    ((2,), [2, 2, 2]), ([1, 0, 4], [1, 0, 4]), (torch.tensor([1, 0, 4]), [1, 0, 4]),
    (torch.tensor([1, 0, 4], dtype=torch.int32), [1, 0, 4]), ([(1,), (0,), (4,)], [1, 0, 4]),
], ids=str)
def test_targets(method, target, classes):
    '''Each form of a target, against one example at a time.'''
    model, x = network(), images()
    instance = method(model)
    attributions = instance.attribute(x, target=target)
    expected = [instance.attribute(x[num:num + 1], target=index) for num, index in enumerate(classes)]
    # single examples may run through other kernels
    assert torch.allclose(attributions, torch.cat(expected), rtol=1e-6, atol=1e-12)


@each_method
@pytest.mark.parametrize('ndim', [1, 2])
def test_single_output(method, ndim):
    '''A single output needs no target.'''
    model, x = Single(ndim).eval(), images()
    attributions, delta = method(model).attribute(x, return_convergence_delta=True)
    assert torch.equal(attributions, method(model).attribute(x, target=0) if ndim == 2 else attributions)
    initial = model(x).detach().flatten()
    assert torch.allclose(attributions.sum((1, 2, 3)) + delta, initial) and delta.shape == (3,)
    if method is ResNetLRP:
        assert delta.abs().max() < 1e-12


@each_method
def test_targets_of_pixels(method):
    '''Tuples choose from an output of several dimensions.'''
    model, x = Pixels().double(), images(2)
    instance = method(model)
    attributions = instance.attribute(x, target=(1, 5, 6))
    assert torch.equal(attributions, instance.attribute(x, target=[(1, 5, 6), (1, 5, 6)]))
    mixed = instance.attribute(x, target=[(1, 5, 6), (3, 0, 0)])
    assert torch.equal(mixed[0], attributions[0]) and not torch.equal(mixed[1], attributions[1])
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[4:7, 5:8] = True
    if method is not C3LRP:
        assert attributions[:, :, inside].any() and not attributions[:, :, ~inside].any()


@each_method
def test_tuples(method):
    '''A tuple is returned for a tuple, of any length.'''
    model, x = network(), images()
    single = method(model).attribute(x, target=1)
    result = method(model).attribute((x,), target=1)
    assert isinstance(result, tuple) and len(result) == 1 and torch.equal(result[0], single)
    pair, delta = method(model).attribute((x,), target=1, return_convergence_delta=True)
    assert isinstance(pair, tuple) and delta.shape == (3,)


@each_method
def test_several_inputs(method):
    '''Several inputs share relevance, and are not changed by a model that works in place.'''
    model = two_inputs(method)
    first, second = images(), torch.randn(3, 2, 24, 24, dtype=torch.float64)
    copies = first.clone(), second.clone()
    attributions, delta = method(model).attribute((first, second), target=[1, 2, 3], return_convergence_delta=True)
    assert [elem.shape for elem in attributions] == [first.shape, second.shape]
    assert all(bool((elem != 0).flatten(1).any(1).all()) for elem in attributions)
    assert torch.equal(first, copies[0]) and torch.equal(second, copies[1])
    initial = model(first.clone(), second)[[0, 1, 2], [1, 2, 3]]
    assert torch.allclose(sum(elem.sum((1, 2, 3)) for elem in attributions) + delta, initial)
    if method is ResNetLRP:
        assert delta.abs().max() < 1e-12


@each_method
def test_unused_input(method):
    '''An input which relevance does not reach has none.'''
    class Model(torch.nn.Module):
        '''Multiplies with the sigmoid of a second input, and ignores a third.'''
        def __init__(self):
            super().__init__()
            self.model = network()
            self.gate = torch.nn.Sigmoid()

        def forward(self, x, gate, _):
            '''Logits.'''
            return self.model(x * self.gate(gate).mean(1, keepdim=True))

    x = images()
    attributions = method(Model()).attribute((x, images(), images()), target=1)
    assert attributions[0].any() and attributions[2].shape == x.shape and not attributions[2].any()
    if method is ResNetLRP:
        # the gate counts as a constant
        assert not attributions[1].any()


@each_method
def test_additional_arguments(method):
    '''Further arguments reach the model, have no attribution, and may require gradients.'''
    model = two_inputs(method)
    inputs = images(), torch.randn(3, 2, 24, 24, dtype=torch.float64)
    scale = (torch.rand(3, dtype=torch.float64) + .5).requires_grad_()
    attributions = method(model).attribute(inputs, target=1, additional_forward_args=(scale, 'some'))
    with torch.no_grad():
        same = method(model).attribute(inputs, target=1, additional_forward_args=(scale.detach(), 'none'))
    assert all(map(torch.equal, attributions, same)) and scale.grad is None and scale.requires_grad
    plain = method(model).attribute(inputs, 1, scale)
    assert all(map(torch.equal, attributions, plain))
    assert not torch.equal(attributions[0], method(model).attribute(inputs, 1)[0])


@each_method
@pytest.mark.parametrize('size', [1, 2, 5])
def test_chunks(method, size):
    '''Chunks give the same, with targets and arguments for each example.'''
    model = two_inputs(method)
    inputs = images(5), torch.randn(5, 2, 24, 24, dtype=torch.float64)
    scale = torch.rand(5, dtype=torch.float64) + .5
    for target in (2, [0, 1, 2, 3, 4]):
        kwargs = {'target': target, 'additional_forward_args': (scale, 'some'), 'return_convergence_delta': True}
        expected, delta = method(model).attribute(inputs, **kwargs)
        chunked, chunked_delta = method(model).attribute(inputs, **kwargs, internal_batch_size=size)
        for actual, reference in zip((*chunked, chunked_delta), (*expected, delta)):
            assert torch.allclose(actual, reference, rtol=1e-6, atol=1e-10)
    sizes = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    method(model).attribute(inputs, 1, internal_batch_size=size)
    handle.remove()
    assert max(sizes) == size and sum(sizes) == 5


# -- initial relevance and deltas --------------------------------------------------------------------------------------

@pytest.mark.parametrize('value', [
    'logit', 'softmax', 'one', pytest.param(torch.sigmoid, id='function'),
], ids=str)
def test_initial_relevance(value):
    '''Relevance sums to what it started from, and the delta is the difference.'''
    model, x = network(), images()
    output = model(x).detach()[[0, 1, 2], [1, 0, 4]]
    expected = {
        'logit': output, 'softmax': model(x).detach().softmax(1)[[0, 1, 2], [1, 0, 4]], 'one': torch.ones(3).double(),
    }.get(value, output.sigmoid())
    attributions, delta = ResNetLRP(model, initial_relevance=value).attribute(
        x, target=[1, 0, 4], return_convergence_delta=True
    )
    assert torch.allclose(attributions.sum((1, 2, 3)), expected, rtol=1e-9) and delta.abs().max() < 1e-12


def test_initial_relevance_of_all():
    '''A function gives relevance to all outputs if there is no target, as for attributors of Zennit.'''
    model, x = network(), images()
    values = torch.randn(3, 5, dtype=torch.float64)
    instance = CompositeAttribution(model, initial_relevance=lambda output: values[:len(output)])
    attributions, delta = instance.attribute(x, return_convergence_delta=True)
    assert torch.equal(attributions, route(model, composites.ResNetLRP(), x, values))
    assert torch.allclose(attributions.sum((1, 2, 3)), values.sum(1)) and delta.abs().max() < 1e-12
    seed = initial_relevance([1, 0, 4])
    attributions = CompositeAttribution(model, initial_relevance=seed).attribute(x)
    assert torch.equal(attributions, ResNetLRP(model).attribute(x, target=[1, 0, 4]))
    # nothing but the target counts with a target
    instance = CompositeAttribution(model, initial_relevance=lambda output: values.requires_grad_())
    attributions, delta = instance.attribute(x, target=2, return_convergence_delta=True)
    assert torch.allclose(attributions.sum((1, 2, 3)), values[:, 2].detach()) and not delta.requires_grad


@each_method
def test_delta(method):
    '''The delta is the initial relevance minus the sum of attributions, in double precision.'''
    model, x = network(), images()
    instance = method(model)
    assert instance.has_convergence_delta() and instance.multiplies_by_inputs
    assert isinstance(instance, GradientAttribution) and instance.forward_func is model
    attributions, delta = instance.attribute(x, target=2, return_convergence_delta=True)
    output = model(x).detach()[:, 2]
    assert torch.allclose(delta, output - attributions.sum((1, 2, 3)), atol=1e-12)
    assert torch.allclose(instance.compute_convergence_delta(attributions, output), delta, atol=1e-15)
    assert torch.equal(instance.compute_convergence_delta((attributions,), output[:, None]), delta)
    halves = instance.compute_convergence_delta((attributions[:, :1], attributions[:, 1:]), output)
    assert torch.allclose(halves, delta, atol=1e-12)
    with pytest.raises(ValueError, match='of 3 examples.*of 2'):
        instance.compute_convergence_delta(attributions, output[:2])
    with pytest.raises(NotImplementedError, match='attribute_future'):
        instance.attribute_future()


def test_delta_precision():
    '''Sums of many values have no rounding errors of their own.'''
    instance = ResNetLRP(network())
    attributions = torch.full((1, 3, 300, 300), .1)
    delta = instance.compute_convergence_delta(attributions, torch.tensor([27000.]))
    assert abs(float(delta) + (float(torch.tensor(.1)) - .1) * 270000) < 1e-6 and delta.dtype == torch.float32


def test_block_delta():
    '''The delta of the block rule is what its bias absorbs.'''
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(400, 5)).double()
    x = images()
    _, delta = C3LRP(model, epsilon=0., postprocess=None).attribute(x, target=1, return_convergence_delta=True)
    with torch.no_grad():
        output = model(x)[:, 1]
        unbiased = output - model[2].bias[1]
        bias = (model[2].weight[1].view(4, -1).sum(1) * model[0].bias).sum()
    assert torch.allclose(delta, bias * output / unbiased)


@pytest.mark.parametrize('name', ['c3', 'c1c', 'heat_quantization'])
def test_postprocess(name):
    '''The channels sum to the post-processed heatmap.'''
    model, x = network(), images()
    function = {'c3': c3, 'c1c': c1c, 'heat_quantization': heat_quantization}[name]
    relevance = C3LRP(model, postprocess=None).attribute(x, target=1)
    for choice in (name, function):
        attributions, delta = C3LRP(model, postprocess=choice).attribute(x, 1, return_convergence_delta=True)
        assert torch.allclose(attributions.sum(1), function(relevance.sum(1))) and attributions.shape == x.shape
        assert torch.equal(attributions[:, 0], attributions[:, 2])
        assert torch.allclose(delta, model(x).detach()[:, 1] - function(relevance.sum(1)).sum((1, 2)))
    attributions = ResNetLRP(model, postprocess=partial(c3, size=6)).attribute(x, target=1)
    expected = c3(ResNetLRP(model).attribute(x, target=1).sum(1), size=6)
    assert torch.allclose(attributions.sum(1), expected)


def test_relative_scale():
    '''Contributions have a scale, which their composite tells.'''
    model, x = network(), images()
    instance = RelativeLRP(model)
    instance.attribute(x, target=1)
    assert instance.composite.log_scale.shape == (3,)


# -- models ------------------------------------------------------------------------------------------------------------

@each_method
@pytest.mark.parametrize('wrap', [torch.nn.DataParallel, torch.compile], ids=['data_parallel', 'compile'])
def test_wrapped(method, wrap):
    '''Wrapped models give the same, rules are attached to what is inside.'''
    model, x = network(), images()
    try:
        wrapped = wrap(model)
    except RuntimeError as error:
        pytest.skip(str(error))
    attributions = method(wrapped).attribute(x, target=1)
    assert torch.equal(attributions, method(model).attribute(x, target=1))
    blocks = C3LRP(wrapped, blocks=['block'], postprocess=None).attribute(x, target=1)
    assert torch.equal(blocks, C3LRP(model, blocks=['block'], postprocess=None).attribute(x, target=1))


def test_several_devices():
    '''Of several devices, the first one is used.'''
    model = network()
    wrapped = torch.nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    module, forward = unwrap(wrapped)
    assert module is model and forward.module is model and forward.device_ids == [0]
    assert wrapped.device_ids == [0, 1]


def test_wrapped_twice():
    '''Any order of wrappers.'''
    model = network()
    try:
        compiled = torch.compile(model)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert unwrap(torch.nn.DataParallel(compiled)) == (model, model)
    parallel = torch.nn.DataParallel(model)
    assert unwrap(torch.compile(parallel)) == unwrap(parallel) == (model, parallel)


@pytest.mark.skipif(not torch.distributed.is_available(), reason='PyTorch without torch.distributed')
def test_distributed():
    '''Of a model for distributed training, the model inside is used.'''
    model, x = network(), images()
    expected = ResNetLRP(model).attribute(x, target=1)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert torch.equal(ResNetLRP(wrapped).attribute(x, target=1), expected)
        # the wrapper would wait for other processes
        wrapped.register_forward_pre_hook(lambda module, args: 1 / 0)
        assert torch.equal(ResNetLRP(wrapped).attribute(x, target=1), expected)
    finally:
        torch.distributed.destroy_process_group()


@each_method
def test_modes(method):
    '''Gradients are computed whatever the mode of the caller, which stays as it is.'''
    model, x = network(), images()
    expected = method(model).attribute(x, target=1)
    with torch.no_grad():
        assert torch.equal(method(model).attribute(x, target=1), expected) and not torch.is_grad_enabled()
    with torch.inference_mode():
        created = x * 1
        attributions = method(model).attribute(created, target=1, additional_forward_args=())
        assert torch.equal(attributions, expected) and torch.is_inference_mode_enabled()
    assert torch.equal(method(model).attribute(created, target=1), expected)


def test_inference_arguments():
    '''Further arguments may come from inference mode.'''
    model, inputs = TwoInputs().double(), (images(), torch.randn(3, 2, 24, 24, dtype=torch.float64))
    instance = CompositeAttribution(model, Composite())
    with torch.inference_mode():
        scale = torch.ones(3, dtype=torch.float64) * 2
        attributions = instance.attribute(inputs, 1, scale)
    assert all(map(torch.equal, attributions, instance.attribute(inputs, 1, scale.clone())))


@each_method
def test_inputs_unchanged(method):
    '''Inputs are as they were, whether or not they require gradients.'''
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=not is_block(method)), network())
    base = images()
    for x in (base.clone(), base.clone().requires_grad_(), (base.clone().requires_grad_() * 1), base.clone()[:, :, 1:]):
        before, version, requires_grad = x.detach().clone(), x._version, x.requires_grad
        attributions = method(model).attribute(x, target=1)
        assert torch.equal(x.detach(), before) and x._version == version and x.requires_grad == requires_grad
        assert not x.is_leaf or x.grad is None
        assert attributions.data_ptr() != x.data_ptr()


@each_method
def test_model_unchanged(method):
    '''The model is as it was, with user's hooks, after each of the ways in which a call can end.'''
    model, x = network(), images()
    model.head.bias.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    calls = []
    model.norm.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    model.register_forward_pre_hook(lambda module, args: calls.append('pre'))
    grad = model.stem.weight.grad.clone()
    state = state_of(model)
    instance = method(model)
    instance.attribute(x, target=1)
    assert calls == ['pre', (3, 8, 6, 6)]
    assert_state(model, state)

    def fail(*args):
        raise KeyError('by the user')

    handle = model.branches[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match='by the user'):
        instance.attribute(x, target=1)
    handle.remove()
    assert_state(model, state)
    with pytest.raises(ValueError, match='out of range'):
        instance.attribute(x, target=5)
    with pytest.raises(KeyError, match='by the user'):
        method(model, initial_relevance=fail).attribute(x, target=1)
    with pytest.raises(RuntimeError, match='expected input'):
        instance.attribute(x[:, :2], target=1)
    assert_state(model, state)
    assert torch.equal(model.stem.weight.grad, grad)
    # and it works after all of this
    assert torch.equal(instance.attribute(x, target=1), method(network_like(model)).attribute(x, target=1))


def network_like(model):
    '''A copy without hooks.'''
    other = network()
    other.load_state_dict(model.state_dict())
    return other


def test_attributes_survive():
    '''What hooks and models store in modules remains.'''
    model, x = network(), images()
    model.norm.register_forward_hook(lambda module, args, output: setattr(module, 'seen', output.detach()))
    ResNetLRP(model).attribute(x, target=1)
    assert model.norm.seen.shape == (3, 8, 6, 6)


def test_composite_of_zennit():
    '''Composites of Zennit leave no trace either, and work again.'''
    model = randomize(narrow_resnet18(num_classes=5)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    state = state_of(model)
    instance = CompositeAttribution(model, zennit.composites.EpsilonPlusFlat(canonizers=[ResNetCanonizer()]))
    first = instance.attribute(x, target=1)
    assert_state(model, state)
    assert torch.equal(instance.attribute(x, target=1), first)
    assert_state(model, state)
    expected = route(model, zennit.composites.EpsilonPlusFlat(canonizers=[ResNetCanonizer()]), x, initial_relevance(1))
    assert torch.equal(first, expected)


class BrokenCanonizer(zennit.canonizers.Canonizer):
    '''Leaves a hook behind unless it is removed, and then fails.'''
    def apply(self, root_module):
        '''Fail.'''
        raise KeyError('in the canonizer')

    def register(self):
        '''Nothing.'''

    def remove(self):
        '''Nothing.'''


def test_failing_registration():
    '''Nothing remains if rules cannot be attached.'''
    model = network()
    state = state_of(model)
    instance = CompositeAttribution(model, Composite(canonizers=[
        composites.ResNetLRP().canonizers[0], BrokenCanonizer()
    ]))
    with pytest.raises(KeyError, match='in the canonizer'):
        instance.attribute(images(), target=1)
    assert_state(model, state)


def test_training_mode():
    '''Batch normalization in training mode is an error, and nothing is updated.'''
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    for method in (ResNetLRP, RelativeLRP, C3LRP):
        with pytest.raises(RuntimeError, match='BatchNorm2d.*is in training mode'):
            method(model).attribute(images(), target=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()) and model.training


def test_unsupported():
    '''Operations without a rule are an error.'''
    class Model(torch.nn.Module):
        '''Uses a cumulative product.'''
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 2)

        def forward(self, x):
            '''Logits.'''
            return self.head(torch.cumprod(x, 1))

    with pytest.raises(UnsupportedOperation, match='cumprod'):
        ResNetLRP(Model()).attribute(torch.randn(2, 3), target=1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_precisions(dtype):
    '''Attributions have the type of the inputs, also under autocast.'''
    model, x = network().to(dtype), images().to(dtype)
    attributions, delta = ResNetLRP(model).attribute(x, target=1, return_convergence_delta=True)
    assert attributions.dtype == dtype and delta.dtype == torch.float32
    output = model(x)[:, 1].detach().float()
    tolerance = 1e-5 if dtype == torch.float32 else .1
    assert torch.allclose(attributions.float().sum((1, 2, 3)), output, atol=tolerance)
    with torch.autocast('cpu', torch.bfloat16):
        attributions = ResNetLRP(network(False)).attribute(x.float(), target=1)
    assert attributions.dtype == torch.float32 and attributions.isfinite().all()


# -- errors ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method', [ResNetLRP, C3LRP, RelativeLRP])
@pytest.mark.parametrize('target, same', [(-1, 4), (-5, 0), (torch.tensor(-2), 3), ((-1,), 4), ([(-1,)] * 3, 4)])
def test_negative_targets(method, target, same):
    '''A single index or tuples may count from the last class, as in Captum.'''
    model, x = network(), images(3)
    instance = method(model, postprocess=None)
    assert torch.equal(instance.attribute(x, target=target), instance.attribute(x, target=same))
    with torch.no_grad():
        assert torch.equal(_select_targets(model(x), target), model(x)[:, same])


@pytest.mark.parametrize('target', [-6, [-1] * 3, torch.tensor([0, -1, 2]), (-6,)])
def test_bad_negative_targets(target):
    '''One index for each example, which may come from a data set, is not negative, as in Captum.'''
    with pytest.raises(ValueError, match='target.*-[16]'):
        ResNetLRP(network()).attribute(images(3), target=target)
    with pytest.raises((IndexError, RuntimeError)):
        _select_targets(network()(images(3)), target)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('method', [ResNetLRP, C3LRP, RelativeLRP])
def test_other_precision(method, dtype):
    '''Inputs of another precision than the network are named with both.'''
    with pytest.raises(TypeError, match=f'{dtype}.*torch.float64'):
        method(network()).attribute(images().to(dtype), target=1)


@pytest.mark.parametrize('dtype', [torch.long, torch.int32, torch.uint8, torch.bool])
def test_integers(dtype):
    '''The error names the layer that integers enter.'''
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with pytest.raises(TypeError, match=f"{dtype}.*LayerRelevance.model, '0'"):
        ResNetLRP(model).attribute(torch.zeros(2, 3, dtype=dtype), target=1)


@pytest.mark.parametrize('kwargs, error, message', [
    ({'target': None}, ValueError, 'choose one with target'),
    ({'target': 5}, ValueError, '5 is out of range for 5 classes'),
    ({'target': [0, 1]}, ValueError, 'neither one for all nor one for each of 3'),
    ({'target': (1, 2)}, ValueError, 'needs 1 indices.*has 2'),
    ({'target': 1.5}, TypeError, 'integers'),
    ({'target': 'cat'}, TypeError, 'cat.*class indices'),
    ({'inputs': torch.zeros(3, 3, 12, 12, dtype=torch.long)}, TypeError, 'int64'),
    ({'inputs': [images()]}, TypeError, 'there is list'),
    ({'inputs': (images(), 1.)}, TypeError, 'there is float'),
    ({'inputs': (images(3), images(2))}, ValueError, r'\(3, 3, 12, 12\), \(2, 3, 12, 12\)'),
    ({'inputs': images(3)[:0]}, ValueError, 'no examples'),
    ({'inputs': ()}, ValueError, 'number of examples'),
    ({'inputs': torch.tensor(1.)}, ValueError, 'number of examples'),
    ({'internal_batch_size': 0}, ValueError, 'internal_batch_size=0'),
    ({'internal_batch_size': 1.5}, ValueError, 'internal_batch_size=1.5'),
], ids=str)
@pytest.mark.parametrize('method', [ResNetLRP, C3LRP])
def test_bad_calls(method, kwargs, error, message):
    '''Messages name what is wrong.'''
    with pytest.raises(error, match=message):
        method(network()).attribute(**{'inputs': images(), 'target': 1, **kwargs})


@pytest.mark.parametrize('create, error, message', [
    (lambda: ResNetLRP(lambda x: x), TypeError, 'must be a torch.nn.Module, but it is <function'),
    (lambda: ResNetLRP(network(), splitting='x'), ValueError, 'splitting=\'x\''),
    (lambda: ResNetLRP(network(), initial_relevance='x'), ValueError, 'initial_relevance=\'x\''),
    (lambda: C3LRP(network(), postprocess='x'), ValueError, 'postprocess=\'x\''),
    (lambda: CompositeAttribution(network(), 'resnet_lrp'), ValueError, 'did you mean .*resnet_lrp_ratio'),
    (lambda: CompositeAttribution(network(), 3), TypeError, 'composite=3'),
    (lambda: CompositeAttribution(network(), dict), TypeError, 'dict.*neither a composite'),
    (lambda: CompositeAttribution(network(), 'epsilon_gamma_box'), TypeError, 'epsilon_gamma_box.*give an instance'),
])
def test_bad_settings(create, error, message):
    '''Messages name what is wrong.'''
    with pytest.raises(error, match=message):
        create()


@pytest.mark.parametrize('model, kwargs, error, message', [
    (torch.nn.LSTM(4, 2), {}, TypeError, 'returns tuple'),
    (torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Flatten(0)), {}, ValueError, r'\(6,\) has no row.*3 examples'),
    (torch.jit.script(torch.nn.Linear(4, 2)), {}, TypeError, 'The model .* is a ScriptModule'),
    (torch.nn.Linear(4, 1), {'initial_relevance': 'softmax'}, ValueError, r'softmax.*\(3, 1\)'),
    (torch.nn.Linear(4, 2), {'initial_relevance': lambda output: output[:, 0]}, ValueError, r'\(3, 2\).*\(3,\)'),
    (torch.nn.Linear(4, 2), {'initial_relevance': lambda output: 1.}, ValueError, 'returns float'),
    (torch.nn.Linear(4, 2), {'postprocess': 'c3'}, ValueError, r'is not for.*\(3, 4\)'),
])
def test_bad_models(model, kwargs, error, message):
    '''Messages name what is wrong.'''
    with pytest.raises(error, match=message):
        CompositeAttribution(model, Composite(), **kwargs).attribute(torch.randn(3, 4), target=0)


def test_bad_postprocess():
    '''A function must return heatmaps.'''
    for function, found in ((lambda heatmap: heatmap[:, 1:], r'\(3, 11, 12\)'), (lambda heatmap: 3, 'int')):
        with pytest.raises(ValueError, match=rf'\(3, 12, 12\), but returns {found}'):
            ResNetLRP(network(), postprocess=function).attribute(images(), target=1)


def test_independent_output():
    '''An output that does not depend on the input has no attribution.'''
    class Model(torch.nn.Module):
        '''Constant.'''
        def forward(self, x):
            '''Logits.'''
            return x.detach()

    with pytest.raises(RuntimeError, match='Model has no gradient'):
        ResNetLRP(Model()).attribute(torch.randn(2, 3), target=1)
    with pytest.raises(ValueError, match='does not depend on the inputs'):
        CompositeAttribution(Model(), EpsilonPlus()).attribute(torch.randn(2, 3), target=1)


def test_registered_composite():
    '''A composite which is in use is an error, another one does not matter.'''
    model, x, composite = network(), images(), composites.ResNetLRP()
    instance = CompositeAttribution(model, composite)
    with composite.context(model):
        with pytest.raises(RuntimeError, match='registered already'):
            instance.attribute(x, target=1)
        assert composite.handles
    expected = instance.attribute(x, target=1)
    with composite.context(network()):
        with pytest.raises(RuntimeError, match='registered already'):
            instance.attribute(x, target=1)
    with composites.BlockLRP().context(network()):
        assert torch.equal(instance.attribute(x, target=1), expected)


def test_sensitivities():
    '''Gradients modified by a composite are not contributions.'''
    assert not CompositeAttribution(network(), 'guided_backprop').multiplies_by_inputs
    assert CompositeAttribution(network(), zennit.composites.ExcitationBackprop).multiplies_by_inputs


# -- what Captum does with attributions --------------------------------------------------------------------------------

@each_method
@pytest.mark.parametrize('kind', ['smoothgrad', 'smoothgrad_sq', 'vargrad'])
def test_noise_tunnel(method, kind):
    '''Noise tunnels give the moments of attributions of noisy inputs.'''
    model, x = network(), images(2)
    torch.manual_seed(3)
    attributions, delta = NoiseTunnel(method(model)).attribute(
        x, nt_type=kind, nt_samples=4, stdevs=.2, target=[1, 2], return_convergence_delta=True
    )
    assert attributions.shape == x.shape and len(delta) == 8
    torch.manual_seed(3)
    noisy = x.repeat_interleave(4, 0) + torch.normal(0, torch.tensor(.2).repeat(8, 3, 12, 12))
    samples = method(model).attribute(noisy, target=[1] * 4 + [2] * 4).unflatten(0, (2, 4))
    expected = {
        'smoothgrad': samples.mean(1), 'smoothgrad_sq': (samples ** 2).mean(1), 'vargrad': samples.var(1, False),
    }[kind]
    assert torch.allclose(attributions, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@each_method
def test_metrics(method):
    '''Captum's own metrics accept the methods.'''
    model, x = network(), images(2)
    instance = method(model)
    attributions = instance.attribute(x, target=[1, 2])

    def perturb(inputs):
        noise = torch.randn_like(inputs) * .01
        return noise, inputs - noise

    values = captum.metrics.infidelity(
        model, perturb, x, attributions, target=[1, 2], n_perturb_samples=3, normalize=instance.multiplies_by_inputs
    )
    assert values.shape == (2,) and bool((values >= 0).all())
    values = captum.metrics.sensitivity_max(instance.attribute, x, n_perturb_samples=3, target=[1, 2])
    assert values.shape == (2,) and bool((values > 0).all()) and bool(values.isfinite().all())


@each_method
def test_visualization(method):
    '''Captum draws attributions.'''
    x = images(1)
    attributions = method(network()).attribute(x, target=1)[0].movedim(0, -1).numpy()
    figure, _ = viz.visualize_image_attr_multiple(
        attributions, x[0].movedim(0, -1).sigmoid().numpy(), ['original_image', 'heat_map', 'blended_heat_map'],
        ['all', 'all', 'all'], use_pyplot=False
    )
    assert len(figure.axes) >= 3


CLASSES = [CompositeAttribution, ResNetLRP, RelativeLRP, C3LRP]


@pytest.mark.parametrize('cls', CLASSES)
def test_insights(cls):
    '''What Captum Insights does: a class is listed by its name, made from a model, and called without its decorator.'''
    names = {elem.get_name(): elem for elem in CLASSES}
    assert list(names) == ['Composite Attribution', 'ResNet LRP', 'Relative LRP', 'C3-LRP']
    model, x = network(), images(1)
    instance = names[cls.get_name()](model)
    assert 'baselines' not in inspect.signature(instance.attribute).parameters
    result = instance.attribute.__wrapped__(
        instance, (x,), additional_forward_args=None, target=torch.tensor([2])
    )
    assert torch.equal(result[0], cls(model).attribute(x, target=2))


@pytest.mark.parametrize('cls', CLASSES)
def test_registered_in_insights(cls, monkeypatch):
    '''Captum Insights itself, where it is installed.'''
    calculation = pytest.importorskip('captum.insights.attr_vis.attribution_calculation')
    features = pytest.importorskip('captum.insights.attr_vis.features')
    monkeypatch.setitem(calculation.ATTRIBUTION_NAMES_TO_METHODS, cls.get_name(), cls)
    model, x = network(), images(1)
    feature = features.ImageFeature('Photo', baseline_transforms=[], input_transforms=[])
    runner = calculation.AttributionCalculation([model], list('abcde'), [feature])
    scores, baselines, inputs = runner.calculate_predicted_scores((x,), None, model)
    result = runner.calculate_attribution(
        baselines, inputs, None, torch.tensor(int(scores[0].index)), cls.get_name(), {}, model
    )
    assert torch.equal(result[0], cls(model).attribute(x, target=int(scores[0].index)))
    assert np.allclose(np.abs(runner.calculate_net_contrib(result)).sum(), 1)


# -- threads and memory ------------------------------------------------------------------------------------------------

@each_method
@pytest.mark.parametrize('shared', ['nothing', 'model', 'composite'])
def test_threads(method, shared):
    '''Threads give the same as one after the other, whatever they share.'''
    first = network()
    second, x = first if shared == 'model' else network(), images()
    instances = [method(first), method(second)]
    if shared == 'composite':
        instances[1].composite = instances[0].composite
    expected = [instance.attribute(x, target=index) for index, instance in enumerate(instances)]
    states = state_of(first), state_of(second)

    def repeat(index):
        return [instances[index].attribute(x, target=index) for _ in range(8)]

    for index, results in enumerate(in_threads(partial(repeat, 0), partial(repeat, 1))):
        assert isinstance(results, list), results
        assert all(torch.equal(result, expected[index]) for result in results)
    assert_state(first, states[0])
    assert_state(second, states[1])


def test_parts():
    '''Modules and parameters that are shared are found.'''
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2, affine=False))
    model.append(model[0])
    assert set(map(id, parts_of(model))) == set(map(id, [model, model[0], model[1], model[0].weight]))


@pytest.mark.parametrize('shared', ['nothing', 'model', 'composite', 'module', 'parameter'])
def test_turns(shared):
    '''A thread waits for another one only if both share something.'''
    first, second = network(), network()
    if shared == 'model':
        second = first
    elif shared == 'module':
        second.block = first.block
    elif shared == 'parameter':
        second.stem.weight = first.stem.weight
    instance, other, x = ResNetLRP(first), ResNetLRP(second), images()
    if shared == 'composite':
        other.composite = instance.composite
    results, waits = [], []
    thread = threading.Thread(target=lambda: results.append(other.attribute(x, target=2)))

    def start(module, args, output):
        if not waits:
            waits.append(None)
            thread.start()
            thread.join(60 if shared == 'nothing' else .5)
            waits.append(thread.is_alive())

    handle = first.norm.register_forward_hook(start)
    attributions = instance.attribute(x, target=1)
    thread.join(60)
    handle.remove()
    assert waits == [None, shared != 'nothing']
    assert torch.equal(attributions, instance.attribute(x, target=1))
    assert torch.equal(results[0], other.attribute(x, target=2))


def test_turns_after_errors():
    '''A thread which fails does not keep others waiting, and a call may be made during another.'''
    model, x = network(), images()
    handle = model.norm.register_forward_hook(lambda module, args, output: 1 / 0)
    results = in_threads(*[partial(ResNetLRP(model).attribute, x, 1)] * 2)
    assert all(isinstance(result, ZeroDivisionError) for result in results)
    handle.remove()
    other, inner = network(), []
    model.norm.register_forward_hook(
        lambda module, args, output: inner.append(ResNetLRP(other).attribute(x, 1)) and None
    )
    ResNetLRP(model).attribute(x, 1)
    assert torch.equal(inner[0], ResNetLRP(other).attribute(x, 1))
    assert isinstance(in_threads(partial(ResNetLRP(model).attribute, x, 1))[0], torch.Tensor)
    order = []

    def enter():
        with exclusive(model):
            order.append('thread')

    with exclusive(model, other):
        with exclusive(model):
            pass
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(.2)
        order.append('main')
    thread.join(60)
    assert order == ['main', 'thread']
    assert not registration._HOLDERS


class Small(torch.nn.Module):
    '''A network of three modules and an addition.'''
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x):
        '''Logits.'''
        return self.head((self.conv(x) + x).mean((2, 3)))


def assert_nothing_is_accumulated(attribute):
    '''Memory and objects are those of before after 200 calls.'''
    try:
        resident()
    except OSError:
        pytest.skip('resident memory is not known here')
    for _ in range(50):
        attribute()
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    for _ in range(200):
        attribute()
    gc.collect()
    assert resident() - before < 20 and len(gc.get_objects()) - objects < 200


@each_method
def test_memory(method):
    '''Nothing accumulates over 200 calls.'''
    assert_nothing_is_accumulated(partial(method(Small()).attribute, torch.randn(1, 3, 8, 8), target=1))


@pytest.mark.parametrize('name', ['RISE', 'ScoreCAM'])
def test_memory_of_perturbations(name):
    '''Nothing accumulates over 200 calls with 8 masks each.'''
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 2)
    ).eval()
    if name == 'RISE':
        attribute = partial(RISE(model).attribute, n_masks=8, grid_size=2)
    else:
        pytest.importorskip('torchcam')
        # a mask for each channel
        attribute = ScoreCAM(model, model[1]).attribute
    assert_nothing_is_accumulated(partial(attribute, torch.rand(1, 3, 8, 8), target=1))


def test_nothing_is_kept():
    '''The graph, with all activations, is gone after a call without help by the garbage collector.'''
    model, kept = network(), []
    model.block.f[3].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    instance = ResNetLRP(model)
    gc.collect()
    gc.disable()
    try:
        instance.attribute(images(), target=1)
        assert kept and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


# -- real --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
def test_shipped_network(splitting):
    '''Relevance of photographs sums to the logit.'''
    from pathlib import Path

    from PIL import Image

    from zennit_resnet.models import load_classifier
    classifier = load_classifier()
    folder = Path(__file__).parent.parent.parent / 'examples' / 'assets' / 'photos'
    x = torch.stack([
        classifier.transform(Image.open(folder / name).convert('RGB')) for name in ('gc_cathedral.jpg', 'gc_dog.jpg')
    ])
    with torch.no_grad():
        logits, targets = classifier.model(x).max(1)
    attributions, delta = ResNetLRP(classifier.model, splitting).attribute(
        x, target=targets, return_convergence_delta=True
    )
    assert bool((delta.abs() < 1e-3 * logits.abs()).all())
    assert torch.allclose(attributions.sum((1, 2, 3)), logits, rtol=1e-3)
