'''A model is bit for bit the same after it was attributed, and attribution works with what PyTorch does to models.'''
import copy
import io
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torchvision
from helpers.networks import UserNetwork, narrow_resnet18, randomize
from helpers.state import Snapshot, assert_global_state
from torch.utils.checkpoint import checkpoint
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Hook

from zennit_resnet import (
    ResidualCanonizer,
    ResNetLRP,
    SymmetricSplit,
    ZPlus,
    initial_relevance,
    with_splitting,
)
from zennit_resnet.canonizers.eager import _COMPILER
from zennit_resnet.layer import Addition, Operation

COMPOSITES = {
    'pass': ResNetLRP,
    'symmetric': lambda **kwargs: ResNetLRP('symmetric', **kwargs),
    'merge': lambda **kwargs: ResNetLRP(batch_norm='merge', **kwargs),
    'EpsilonPlus': lambda **kwargs: with_splitting(EpsilonPlus(**kwargs)),
    'EpsilonPlusFlat': lambda **kwargs: with_splitting(EpsilonPlusFlat(**kwargs)),
    'EpsilonAlpha2Beta1': lambda **kwargs: with_splitting(EpsilonAlpha2Beta1(**kwargs)),
    'canonizer': lambda **kwargs: EpsilonPlus(canonizers=[ResidualCanonizer(batch_norm='merge')], **kwargs),
}
every_composite = pytest.mark.parametrize('build', [pytest.param(build, id=name) for name, build in COMPOSITES.items()])


@pytest.fixture(autouse=True)
def clean_state():
    '''Nothing of what is global may change.'''
    yield
    modes = torch.overrides._get_current_function_mode_stack()
    is_enabled = torch.is_grad_enabled()
    # other tests must not fail with this one
    for _ in modes:
        torch.overrides._pop_mode()
    torch.set_grad_enabled(True)
    waiting = set(_COMPILER.users)
    _COMPILER.users.clear()
    assert not modes and is_enabled and not waiting


MODELS = {
    'user': UserNetwork, 'resnet18': lambda: narrow_resnet18(num_classes=5),
    'mobilenet_v2': lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=.25),
}


def build_model(dtype=torch.float64, name='user'):
    '''A model with some frozen parameters, and in-place activations in some modules.'''
    torch.manual_seed(1)
    model = MODELS[name]()
    model = randomize(model.to(dtype).eval())
    for num, param in enumerate(model.parameters()):
        param.requires_grad_(num % 3 > 0)
    return model


def images(batch=2, size=(32, 24), dtype=torch.float64):
    '''Random images.'''
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def attribute(model, composite, input, target=1):
    '''Relevance of the input.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(input, initial_relevance(target, 'one'))[1]


class BadHook(Hook):
    '''A hook which cannot be registered.'''
    def copy(self):
        '''Copy of the hook.'''
        return BadHook()

    def register(self, module):
        '''Registration fails.'''
        raise ZeroDivisionError('bad hook')


class Interrupt(torch.nn.Module):
    '''Raises an exception in the forward or backward pass on demand.'''
    def __init__(self):
        super().__init__()
        self.forward_error = self.backward_error = None

    def forward(self, x):
        '''The identity.'''
        if self.forward_error is not None:
            raise self.forward_error
        x = x.view_as(x)
        if self.backward_error is not None:
            x.register_hook(self.fail)
        return x

    def fail(self, grad):
        '''Raise.'''
        raise self.backward_error


# -- integrity ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, label', [
    *(('user', label) for label in COMPOSITES), ('resnet18', 'merge'), ('resnet18', 'EpsilonPlusFlat'),
    ('mobilenet_v2', 'pass'), ('mobilenet_v2', 'canonizer'),
])
def test_normal_exit(name, label):
    '''The model is the same after the context is left, and after leaving it again.'''
    model, build = build_model(name=name), COMPOSITES[label]
    snapshot = Snapshot(model)
    results = [attribute(model, build(), images()) for _ in range(2)]
    snapshot.check()
    assert torch.equal(*results)
    composite = build()
    for _ in range(2):
        assert torch.equal(attribute(model, composite, images()), results[0])
        snapshot.check()
    with composite.context(model):
        pass
    snapshot.check()


@every_composite
def test_inside(build):
    '''Nothing but the flags of parameters, hooks and surrogates changes inside, the checkpoint is the same.'''
    model = build_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    input = images()
    with torch.no_grad():
        plain = model(input)
    composite = build()
    with composite.context(model):
        with torch.no_grad():
            assert torch.equal(model(input), plain)
        output = model(input.clone().requires_grad_())
        assert torch.equal(output, plain)
        output.sum().backward()
        assert list(model.state_dict()) == list(before)
        with torch.no_grad():
            assert torch.equal(model(input), plain)
            if isinstance(composite, ResNetLRP):
                # hooks of Zennit refuse this
                assert torch.equal(model(input.clone().requires_grad_()), plain)
        assert torch.equal(model(input), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', COMPOSITES)
def test_exception_in_forward(name):
    '''An exception in the forward pass, at any depth: each kind with each composite, and at each depth.'''
    model, build, number = build_model(), COMPOSITES[name], list(COMPOSITES).index(name)
    kinds = ZeroDivisionError, KeyboardInterrupt, StopIteration
    for row, position in enumerate(('block', 'norm', 'stem')):
        interrupt, error = Interrupt(), kinds[(number + row) % 3]('forward')
        former = getattr(model, position)
        setattr(model, position, torch.nn.Sequential(former, interrupt))
        snapshot, input = Snapshot(model), images()
        expected = attribute(model, build(), input)
        with pytest.raises(type(error)), Gradient(model=model, composite=build()) as attributor:
            attributor(input, initial_relevance(1))
            interrupt.__dict__['forward_error'] = error
            attributor(input, initial_relevance(1))
        interrupt.__dict__['forward_error'] = None
        snapshot.check()
        assert torch.equal(attribute(model, build(), input), expected)
        if isinstance(error, KeyboardInterrupt):
            # PyTorch skips all hooks, the state is restored when the context is left
            setattr(model, position, former)
            continue
        # the context survives
        with Gradient(model=model, composite=build()) as attributor:
            interrupt.__dict__['forward_error'] = error
            with pytest.raises(type(error)):
                attributor(input, initial_relevance(1, 'one'))
            assert_global_state()
            interrupt.__dict__['forward_error'] = None
            assert torch.equal(attributor(input, initial_relevance(1, 'one'))[1], expected)
        snapshot.check()
        setattr(model, position, former)


@every_composite
def test_caught_exception(build):
    '''A module that catches an exception of its child.'''
    class Try(torch.nn.Module):
        '''Does without the child if it raises.'''
        def __init__(self):
            super().__init__()
            self.child = torch.nn.Sequential(torch.nn.ReLU(), Interrupt())

        def forward(self, x):
            '''Residual block.'''
            try:
                return x + self.child(x)
            except ZeroDivisionError:
                return x + x.relu()

    model = build_model()
    model.stem = torch.nn.Sequential(model.stem, Try())
    snapshot = Snapshot(model)
    expected = attribute(model, build(), images())
    model.stem[1].child[1].__dict__['forward_error'] = ZeroDivisionError()
    assert attribute(model, build(), images()).isfinite().all()
    model.stem[1].child[1].__dict__['forward_error'] = None
    snapshot.check()
    assert torch.equal(attribute(model, build(), images()), expected)


@every_composite
@pytest.mark.parametrize('error', [ZeroDivisionError('backward'), KeyboardInterrupt('backward')])
def test_exception_in_backward(build, error):
    '''An exception in the backward pass.'''
    model, input = build_model(), images()
    interrupt = Interrupt()
    model.block = torch.nn.Sequential(interrupt, model.block)
    snapshot = Snapshot(model)
    expected = attribute(model, build(), input)
    with Gradient(model=model, composite=build()) as attributor:
        interrupt.__dict__['backward_error'] = error
        with pytest.raises(type(error)):
            attributor(input, initial_relevance(1, 'one'))
        assert_global_state()
        interrupt.__dict__['backward_error'] = None
        assert torch.equal(attributor(input, initial_relevance(1, 'one'))[1], expected)
    snapshot.check()
    interrupt.__dict__['backward_error'] = error
    with pytest.raises(type(error)):
        attribute(model, build(), input)
    interrupt.__dict__['backward_error'] = None
    snapshot.check()


@pytest.mark.parametrize('build', [
    # a composite of Zennit leaves its canonizers applied
    pytest.param(build, id=name) for name, build in COMPOSITES.items() if name != 'canonizer'
])
def test_bad_hook(build):
    '''A hook that cannot be registered when the context is entered.'''
    model = build_model()
    snapshot = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        attribute(model, build(layer_map=[(torch.nn.Linear, BadHook())]), images())
    snapshot.check()


@pytest.mark.parametrize('name', ['pass', 'merge'])
def test_bad_hook_of_addition(name):
    '''A hook that cannot be registered when an addition is found raises each time.'''
    model = build_model()
    snapshot = Snapshot(model)
    with Gradient(model=model, composite=COMPOSITES[name](layer_map=[(Addition, BadHook())])) as attributor:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                attributor(images(), initial_relevance(1))
            assert_global_state()
    snapshot.check()


@every_composite
def test_forward_only(build):
    '''A context in which no relevance is propagated, or the output is discarded.'''
    model = build_model()
    snapshot = Snapshot(model)
    for run in (
        lambda: None, lambda: model(images()), lambda: model(images().requires_grad_()),
        lambda: model.block(torch.randn(1, 8, 4, 4).double().requires_grad_()).sum().backward(),
    ):
        with build().context(model):
            run()
        snapshot.check()


@every_composite
def test_model_without_grad_afterwards(build):
    '''Training goes on after attribution as if there had been none.'''
    model, reference = build_model(), build_model()
    attribute(model, build(), images())
    for elem in (model, reference):
        elem.train()
        optimizer = torch.optim.SGD([param for param in elem.parameters() if param.requires_grad], lr=.1)
        elem(images()).square().sum().backward()
        optimizer.step()
    for actual, expected in zip(model.state_dict().values(), reference.state_dict().values()):
        assert torch.equal(actual, expected)


def test_tied_parameters():
    '''A parameter or module with two names is still one.'''
    model = build_model()
    model.branches[1].weight = model.branches[0].weight
    model.other = model.block
    for build in COMPOSITES.values():
        snapshot = Snapshot(model)
        attribute(model, build(), images())
        snapshot.check()
        assert model.branches[1].weight is model.branches[0].weight


def test_foreign_hooks():
    '''Hooks of the user stay, in their order, and run.'''
    model, seen = build_model(), []
    model.block.register_forward_hook(lambda module, args, output: seen.append('forward'))
    model.block.register_forward_pre_hook(lambda module, args: seen.append('pre'))
    model.head.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    for build in COMPOSITES.values():
        snapshot = Snapshot(model)
        seen.clear()
        attribute(model, build(), images())
        assert seen == ['pre', 'forward'] * 2
        snapshot.check()


# -- several contexts --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('outer', ['pass', 'merge', 'symmetric'])
@pytest.mark.parametrize('inner', ['pass', 'merge', 'symmetric'])
@pytest.mark.parametrize('used', [False, True])
def test_nested_contexts(outer, inner, used):
    '''The inner one of nested contexts wins, the outer one works after it.'''
    model, input = build_model(), images()
    snapshot = Snapshot(model)
    with torch.no_grad():
        plain = model(input)
    expected = {name: attribute(model, COMPOSITES[name](), input) for name in (outer, inner)}
    with Gradient(model=model, composite=COMPOSITES[outer]()) as attributor:
        if used:
            assert torch.equal(attributor(input, initial_relevance(1, 'one'))[1], expected[outer])
        with Gradient(model=model, composite=COMPOSITES[inner]()) as other:
            for _ in range(2):
                output, actual = other(input, initial_relevance(1, 'one'))
                assert torch.equal(output, plain)
                assert float((actual - expected[inner]).abs().max()) < 1e-12
        for _ in range(2):
            output, actual = attributor(input, initial_relevance(1, 'one'))
            assert torch.equal(output, plain)
            assert float((actual - expected[outer]).abs().max()) < 1e-12
    snapshot.check()


@pytest.mark.parametrize('order', [
    ('pass', 'merge', 'EpsilonPlus'), ('EpsilonPlusFlat', 'symmetric', 'pass'),
    ('canonizer', 'EpsilonAlpha2Beta1', 'merge'),
])
def test_sequence_of_composites(order):
    '''Composites after each other give the same as each for a fresh model.'''
    model, input = build_model(), images()
    for name in (*order, *order):
        expected = attribute(build_model(), COMPOSITES[name](), input)
        assert torch.equal(attribute(model, COMPOSITES[name](), input), expected)


def test_two_models():
    '''Contexts of two models that are open at the same time.'''
    first, second, input = build_model(), build_model(name='resnet18'), images()
    expected = [attribute(model, ResNetLRP(), input) for model in (first, second)]
    with Gradient(model=first, composite=ResNetLRP()) as one, Gradient(model=second, composite=ResNetLRP()) as two:
        for _ in range(2):
            assert torch.equal(one(input, initial_relevance(1, 'one'))[1], expected[0])
            assert torch.equal(two(input, initial_relevance(1, 'one'))[1], expected[1])


def test_context_of_part():
    '''A context for a part of a model.'''
    model, input = build_model(), torch.randn(2, 8, 6, 6).double().requires_grad_()
    snapshot = Snapshot(model)
    with ResNetLRP().context(model.block) as block:
        relevance, = torch.autograd.grad(block(input).sum(), input)
    assert relevance.isfinite().all()
    snapshot.check()


@pytest.mark.parametrize('name', ['pass', 'merge'])
def test_several_forwards_before_backward(name):
    '''State belongs to a call: the order of backward passes does not matter.'''
    model, inputs = build_model(), [images(), images(size=(16, 40)), images(3)]
    expected = [attribute(model, COMPOSITES[name](), elem) for elem in inputs]
    with COMPOSITES[name]().context(model):
        inputs = [elem.clone().requires_grad_() for elem in inputs]
        outputs = [model(elem) for elem in inputs]
        for num in (1, 2, 0):
            start = initial_relevance(1, 'one')(outputs[num])
            actual, = torch.autograd.grad(outputs[num], inputs[num], start, retain_graph=True)
            assert torch.equal(actual, expected[num])


def test_folded_weights(monkeypatch):
    '''Rules have folded weights, and the network keeps its own, also after an error and outside of the context.'''
    model, input = build_model(name='resnet18'), images().requires_grad_()
    snapshot, expected = Snapshot(model), attribute(model, COMPOSITES['merge'](), input)
    original = {name: param.clone() for name, param in model.named_parameters()}
    folded, propagate = [], ZPlus.propagate

    def spy(rule, module, *args):
        current = dict(model.named_parameters())
        assert current.keys() == original.keys()
        assert all(torch.equal(param, original[name]) for name, param in current.items())
        weight = getattr(module, 'weight', None)
        if weight is not None and not any(torch.equal(weight, elem) for elem in original.values()):
            assert module.bias is not None
            folded.append(module)
        if error is not None and len(folded) > 10:
            raise error
        return propagate(rule, module, *args)

    monkeypatch.setattr(ZPlus, 'propagate', spy)
    with COMPOSITES['merge']().context(model):
        output = model(input)
        for error in (ZeroDivisionError(), None):
            with pytest.raises(ZeroDivisionError) if error is not None else nullcontext():
                relevance, = torch.autograd.grad(output, input, initial_relevance(1, 'one')(output), retain_graph=True)
        assert torch.equal(relevance, expected)
    assert len(folded) == 11 + 20
    relevance, = torch.autograd.grad(output, input, initial_relevance(1, 'one')(output))
    assert torch.equal(relevance, expected)
    snapshot.check()


@pytest.mark.parametrize('name', ['merge', 'canonizer'])
def test_checkpointing(name):
    '''A part that runs again in the backward pass does so with its own weights, and rules with the folded ones.'''
    class Checkpointed(torch.nn.Module):
        '''A module whose activations are not kept.'''
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            '''Run the module.'''
            return checkpoint(self.module, x, use_reentrant=False)

    model, input = build_model(name='resnet18'), images()
    expected = attribute(model, COMPOSITES[name](), input)
    model.layer1, model.layer3 = Checkpointed(model.layer1), Checkpointed(model.layer3)
    snapshot = Snapshot(model)
    actual = attribute(model, COMPOSITES[name](), input)
    assert float((actual - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    snapshot.check()


def test_threads():
    '''Forward passes in other threads than the one that entered the context.'''
    from concurrent.futures import ThreadPoolExecutor
    model, inputs = build_model(), [images(size=(8 * num, 24)) for num in range(1, 7)]
    expected = [attribute(model, ResNetLRP(), elem) for elem in inputs]
    snapshot = Snapshot(model)

    def run(input):
        input = input.clone().requires_grad_()
        output = model(input)
        return torch.autograd.grad(output, input, initial_relevance(1, 'one')(output))[0]

    with ResNetLRP().context(model), ThreadPoolExecutor(1) as pool:
        actual = list(pool.map(run, inputs))
    assert all(torch.equal(*pair) for pair in zip(actual, expected))
    snapshot.check()


# -- copies and wrappers -----------------------------------------------------------------------------------------------

@every_composite
def test_copies_after_use(build):
    '''Deep copies and pickles after use are models of their own.'''
    model, input = build_model(), images()
    expected = attribute(model, build(), input)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(duplicate.state_dict()) == list(model.state_dict())
        assert [param.requires_grad for param in duplicate.parameters()] == [
            param.requires_grad for param in model.parameters()
        ]
        assert not any(isinstance(module, Operation) for module in duplicate.modules())
        assert torch.equal(duplicate(input), model(input))
        assert torch.equal(attribute(duplicate, build(), input), expected)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(input), model(input))


@pytest.mark.parametrize('name', ['pass', 'merge'])
@pytest.mark.parametrize('used', [False, True])
def test_deep_copy_inside(name, used):
    '''A deep copy inside of a context does not harm the model.'''
    model, input = build_model(), images()
    snapshot = Snapshot(model)
    expected = attribute(model, COMPOSITES[name](), input)
    with Gradient(model=model, composite=COMPOSITES[name]()) as attributor:
        if used:
            attributor(input, initial_relevance(1))
        duplicate = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(duplicate(input), model(input))
        assert torch.equal(attributor(input, initial_relevance(1, 'one'))[1], expected)
    snapshot.check()


@every_composite
def test_data_parallel(build):
    '''DataParallel without GPUs.'''
    model, input = build_model(), images()
    expected = attribute(model, build(), input)
    wrapper = torch.nn.DataParallel(model)
    snapshot = Snapshot(wrapper)
    for _ in range(2):
        assert torch.equal(attribute(wrapper, build(), input), expected)
    snapshot.check()


@pytest.fixture
def process_group(tmp_path):
    '''A process group of this process alone.'''
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip('needs gloo')
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('name', COMPOSITES)
def test_distributed(process_group, name):
    '''DistributedDataParallel: the wrapper and the wrapped model.'''
    model, input = build_model(), images()
    expected = attribute(model, COMPOSITES[name](), input)
    wrapper = torch.nn.parallel.DistributedDataParallel(model)
    snapshot = Snapshot(model)
    for elem in (wrapper, wrapper, model):
        assert torch.equal(attribute(elem, COMPOSITES[name](), input), expected)
        snapshot.check()
    # training goes on
    wrapper(input).sum().backward()
    assert all((param.grad is not None) == param.requires_grad for param in model.parameters())


# -- kinds of models and inputs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('build', [ResNetLRP, COMPOSITES['EpsilonPlus']])
def test_training_mode(build):
    '''Batch normalization and dropout in training mode mix samples or are random.'''
    model = build_model()
    model.block.train()
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match=r'block\.f\.1 \(BatchNorm2d\) is in training mode'):
        attribute(model, build(), images())
    snapshot.check()
    model.eval()
    model.head = torch.nn.Sequential(model.head, torch.nn.Dropout().train())
    with pytest.raises(RuntimeError, match=r'head\.1 \(Dropout\) is in training mode'):
        attribute(model, build(), images())


@every_composite
def test_single_images(build):
    '''Relevance of a batch is that of its images.'''
    model, input = build_model(torch.float32), images(4, dtype=torch.float32)
    together = attribute(model, build(), input)
    for num in range(4):
        single = attribute(model, build(), input[num:num + 1])
        assert float((together[num] - single[0]).abs().max()) <= 1e-5 * float(single.abs().max())


@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
@pytest.mark.parametrize('name, size', [
    ('user', (65, 97)), ('resnet18', (65, 97)), ('resnet18', (40, 200)), ('user', (5, 1)),
])
def test_sizes(name, size, splitting):
    '''Batches of one image, of odd and elongated sizes.'''
    model, input = build_model(name=name), images(1, size)
    relevance = attribute(model, ResNetLRP(splitting), input)
    assert relevance.shape == input.shape
    assert abs(float(relevance.sum()) - 1) < 1e-6


@pytest.mark.parametrize('name', ['user', 'resnet18'])
def test_single_precision(name):
    '''Single precision is close to double precision.'''
    model, input = build_model(name=name), images()
    expected = attribute(model, ResNetLRP(), input)
    actual = attribute(model.float(), ResNetLRP(), input.float())
    assert actual.dtype == torch.float32
    assert float((actual.double() - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    assert float((actual.double().sum((1, 2, 3)) - 1).abs().max()) < 1e-4


@pytest.mark.parametrize('name', ['user', 'resnet18', 'mobilenet_v2'])
def test_autocast(name):
    '''Autocast on the CPU: relevance is in single precision.'''
    model, input = build_model(torch.float32, name), images(dtype=torch.float32)
    snapshot = Snapshot(model)
    for splitting in ('ratio', 'symmetric'):
        with torch.autocast('cpu', torch.bfloat16):
            with torch.no_grad():
                plain = model(input)
            with Gradient(model=model, composite=ResNetLRP(splitting)) as attributor:
                output, relevance = attributor(input, initial_relevance(1, 'one'))
        assert torch.equal(output, plain)
        assert relevance.dtype == torch.float32
        assert bool(relevance.isfinite().all())
        assert float((relevance.sum((1, 2, 3)) - 1).abs().max()) < 1e-2
    snapshot.check()


def test_half_precision_model():
    '''A model whose parameters are in half precision.'''
    model, input = build_model(torch.bfloat16), images(dtype=torch.bfloat16)
    relevance = attribute(model, ResNetLRP(), input)
    assert bool(relevance.isfinite().all())
    assert float((relevance.float().sum((1, 2, 3)) - 1).abs().max()) < 2e-2


@every_composite
def test_channels_last(build):
    '''The memory format does not matter.'''
    model, input = build_model(name='resnet18'), images()
    expected = attribute(model, build(), input)
    actual = attribute(
        model.to(memory_format=torch.channels_last), build(), input.contiguous(memory_format=torch.channels_last)
    )
    assert float((actual - expected).abs().max()) < 1e-9 * float(expected.abs().max())


@every_composite
def test_frozen_parameters(build):
    '''Whether parameters are frozen does not matter.'''
    model, input = build_model(), images()
    results = []
    for change in (lambda num: True, lambda num: False, lambda num: num % 2 == 0):
        for num, param in enumerate(model.parameters()):
            param.requires_grad_(change(num))
        snapshot = Snapshot(model)
        results.append(attribute(model, build(), input))
        snapshot.check()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert all(param.grad is None for param in model.parameters())


def test_no_warnings():
    '''Attribution is silent.'''
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        attribute(build_model(), ResNetLRP(), images())
        attribute(build_model(name='resnet18'), with_splitting(EpsilonPlusFlat(), SymmetricSplit()), images())


@every_composite
def test_views_of_input(build):
    '''Inputs which are views, not contiguous, or require a gradient already.'''
    model, input = build_model(), images()
    expected = attribute(model, build(), input)
    for elem in (
        input.clone().requires_grad_(), input.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([input, input])[:2],
    ):
        actual = attribute(model, build(), elem)
        assert float((actual - expected).abs().max()) < 1e-9 * float(expected.abs().max())
