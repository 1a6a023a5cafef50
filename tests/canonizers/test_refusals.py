'''What cannot be explained as it is: errors that say what to do, or a map of what was meant, and a warning.'''
import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import narrow_resnet18
from torch import nn
from torch.utils.checkpoint import checkpoint
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from captum_adapters.attr import ResNetLRP as CaptumResNetLRP
from zennit_resnet import (
    BlockLRP,
    RelativeLRP,
    ResidualCanonizer,
    ResNetLRP,
    UnsupportedOperation,
    initial_relevance,
    with_splitting,
)
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.layer import Gate
from zennit_resnet.rules import SinglePass

COMPOSITES = {
    'ratio': ResNetLRP, 'relative': RelativeLRP, 'splitting': lambda: with_splitting(EpsilonPlus()),
}


class Net(nn.Module):
    '''Logits, and what is made of them.'''
    def __init__(self, function=None, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.head, self.function = nn.Linear(6, classes), function

    def forward(self, x):
        '''What the function makes of the logits.'''
        x = self.stem(x).relu()
        x = self.head((x + self.branch(x)).relu().mean((2, 3)))
        return x if self.function is None else self.function(x)


def images(dtype=torch.double):
    '''Two images.'''
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)


def explain(model, composite, value='one'):
    '''Relevance of the images.'''
    with Gradient(model=model.double().eval(), composite=composite) as attributor:
        return attributor(images(), initial_relevance([1, 2], value))[1]


# -- a softmax at the end ----------------------------------------------------------------------------------------------

ENDS = {
    'F.softmax': lambda x: F.softmax(x, 1), 'method': lambda x: x.softmax(-1),
    'torch': lambda x: torch.softmax(x, dim=1),
    'log_softmax': lambda x: F.log_softmax(x, 1), 'module': nn.Softmax(1), 'module with log': nn.LogSoftmax(1),
    'selected': lambda x: x.softmax(1)[:, :4], 'averaged': lambda x: x[:, :, None].expand(-1, -1, 3).softmax(1).mean(2),
    'special': lambda x: torch.special.softmax(x, 1), 'reshaped': lambda x: x[:, :, None].softmax(1).squeeze(2),
}


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('end', ENDS)
def test_softmax_at_the_end(end, name, strict):
    '''What is explained is the logit, and a warning says so.'''
    composite = COMPOSITES[name]()
    if name == 'ratio':
        composite = ResNetLRP(canonizers=[ResidualCanonizer(strict=strict)])
    with pytest.warns(UserWarning, match='logits'):
        relevance = explain(Net(ENDS[end]), composite)
    if (end, name) != ('averaged', 'relative'):
        # an average is a layer, which has a stabilizer in Zennit, and multiplies with probabilities in relative LRP
        torch.testing.assert_close(relevance, explain(Net(), COMPOSITES[name]()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('function', [
    lambda x: x.softmax(1) * 2 + x, lambda x: x.softmax(1) @ torch.eye(5).double().softmax(0),
    lambda x: (x.softmax(1) + x.flip(1).softmax(1)) / 2, lambda x: F.softmin(x, 1),
])
def test_softmax_elsewhere(function):
    '''Otherwise it is an error, which never advises to take its gradient.'''
    with pytest.raises(UnsupportedOperation, match='logits') as caught:
        explain(Net(function), ResNetLRP())
    assert 'strict' not in str(caught.value)
    with pytest.warns(UserWarning, match='logits'):
        explain(Net(function), ResNetLRP(canonizers=[ResidualCanonizer(strict=False)]))


def test_softmax_without_relevance():
    '''A softmax that no relevance reaches is none of anyone's business.'''
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        explain(Net(lambda x: x * x.softmax(1)), ResNetLRP())


def shifted(h):
    '''Exponentials of logits without the largest.'''
    return (h - h.max(1, keepdim=True).values).exp()


WRITTEN = {
    'logsumexp': lambda h: h - h.logsumexp(1, keepdim=True),
    'torch': lambda h: torch.sub(h, torch.logsumexp(h, 1)[:, None]),
    'special': lambda h: h - torch.special.logsumexp(h, -1, True), 'negative': lambda h: h + -h.logsumexp(1, True),
    'log of sum': lambda h: h - h.exp().sum(1, keepdim=True).log(), 'in place': lambda h: h.sub_(h.logsumexp(1, True)),
    'expanded': lambda h: h - h.logsumexp(1, keepdim=True).expand_as(h),
    'log without largest': lambda h: h - h.amax(1, True) - shifted(h).sum(1, keepdim=True).log(),
    'largest added': lambda h: h - (h.amax(1, True) + shifted(h).sum(1, keepdim=True).log()),
    'quotient': lambda h: h.exp() / h.exp().sum(1, keepdim=True),
    'without largest': lambda h: shifted(h) / shifted(h).sum(1, keepdim=True),
    'without largest of all': lambda h: (h - h.max()).exp() / (h - h.max()).exp().sum(1, keepdim=True),
    'detached': lambda h: (h - h.detach().amax(1, True)).exp() / (h - h.detach().amax(1, True)).exp().sum(1)[:, None],
    'product': lambda h: h.exp() * h.exp().sum(1, keepdim=True).reciprocal(),
    'power': lambda h: h.exp() * h.exp().sum(1, keepdim=True) ** -1,
    'stabilized': lambda h: h.exp() / (h.exp().sum(1, keepdim=True) + 1e-16),
}
# written so that it is not known which tensor has the logits
UNKNOWN = {
    'exponentials': lambda h: (h - h.logsumexp(1, keepdim=True)).exp(), 'log_softmax': lambda h: h.log_softmax(1).exp(),
    'normalize': lambda h: F.normalize(h.exp(), p=1, dim=1), 'norm': lambda h: h.exp() / h.exp().norm(1, 1, True),
    'pairs': lambda h: 1 / (h[:, None] - h[:, :, None]).exp().sum(2), 'softmin': lambda h: F.softmin(h, 1),
    'sigmoids': lambda h: torch.stack([(h[:, 1] - h[:, 0]).sigmoid(), (h[:, 0] - h[:, 1]).sigmoid()], 1),
    'complement': lambda h: torch.stack([(h[:, 1] - h[:, 0]).sigmoid(), 1 - (h[:, 1] - h[:, 0]).sigmoid()], 1),
    'negative': lambda h: h.logsumexp(1, keepdim=True) - h,
}
# what may follow a softmax
FOLLOWING = {
    'clamp': lambda p: p.clamp(1e-7, 1), 'log': lambda p: p.log(), 'log of shifted': lambda p: (p + 1e-9).log(),
    'product': lambda p: p * 2, 'mask': lambda p: p * torch.ones(5).double(), 'complement': lambda p: 1 - p,
    'mean': lambda p: torch.stack([p, p.flip(1)]).mean(0), 'square': lambda p: p ** 2, 'negative': lambda p: -p,
}


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('end', WRITTEN)
def test_softmax_written_out(end, name):
    '''However it is written.'''
    with pytest.warns(UserWarning, match='logits'):
        relevance = explain(Net(WRITTEN[end]), COMPOSITES[name]())
    torch.testing.assert_close(relevance, explain(Net(), COMPOSITES[name]()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('end', UNKNOWN)
def test_softmax_written_otherwise(end, name):
    '''It is known by its values.'''
    with pytest.raises(UnsupportedOperation, match='logits') as caught:
        with Gradient(model=Net(UNKNOWN[end]).double(), composite=COMPOSITES[name]()) as attributor:
            attributor(images(), initial_relevance([0, 1], 'one'))
    assert 'strict' not in str(caught.value)


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('following', FOLLOWING)
def test_after_softmax_written_out(following, name):
    '''What follows has to be left out as well.'''
    with pytest.raises(UnsupportedOperation, match='logits'):
        explain(Net(lambda h: FOLLOWING[following](h.exp() / h.exp().sum(1, keepdim=True))), COMPOSITES[name]())


BLOCKED = {
    **ENDS, **WRITTEN, **UNKNOWN,
    **{f'{name} of {end}': lambda h, f=following, end=end: f({**ENDS, **WRITTEN}[end](h))
       for name, following in FOLLOWING.items() for end in ('F.softmax', 'quotient', 'product')},
}


@pytest.mark.parametrize('end', BLOCKED)
def test_softmax_with_blocks(end):
    '''BlockLRP takes gradients, and those of a softmax sum to zero.'''
    with pytest.raises(UnsupportedOperation, match='logits'):
        with Gradient(model=Net(BLOCKED[end]).double(), composite=BlockLRP()) as attributor:
            attributor(images(), initial_relevance([0, 1], 'one'))


@pytest.mark.parametrize('function', [
    lambda h: h.sigmoid(), lambda h: h - h.mean(1, keepdim=True), lambda h: h / (1 + h.abs()), lambda h: h.exp(),
    lambda h: h - h.roll(1, 1).logsumexp(1, keepdim=True) / 2,
])
def test_no_softmax(function):
    '''What is none is taken for none.'''
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for create in (*COMPOSITES.values(), BlockLRP):
            assert bool(explain(Net(function), create()).isfinite().all())


@pytest.mark.parametrize('function', [
    lambda h: h.softmax(1), lambda h: h.exp() / h.exp().sum(1, keepdim=True), lambda h: F.log_softmax(h, 1),
])
def test_softmax_within_a_network(function):
    '''Gradients of a softmax that layers follow are those of any function.'''
    model = nn.Sequential(Net(function), nn.Linear(5, 5))
    assert bool(explain(model, BlockLRP()).isfinite().all())
    with pytest.raises(UnsupportedOperation, match='logits'):
        explain(model, ResNetLRP())


# -- networks without a gradient ---------------------------------------------------------------------------------------

class Frozen(nn.Module):
    '''Runs its backbone without gradients.'''
    def __init__(self, context=torch.no_grad):
        super().__init__()
        self.net, self.head, self.context = Net(), nn.Linear(5, 5), context

    def forward(self, x):
        '''Logits.'''
        with self.context():
            features = self.net(x)
        return self.head(features)


@pytest.mark.parametrize('create', [ResNetLRP, RelativeLRP, BlockLRP])
@pytest.mark.parametrize('model', [Frozen(), Net(lambda x: x.detach()), nn.Sequential(nn.Conv2d(3, 3, 1), Frozen())])
def test_frozen_backbone(model, create):
    '''Nothing of the output depends on the input.'''
    with pytest.raises(RuntimeError, match=rf'{type(model).__name__}.*no_grad'):
        explain(model, create())
    # nothing sees functions any more, also if the context is not left
    with create().context(model):
        with pytest.raises(RuntimeError, match='no_grad'):
            model(images().requires_grad_())
        assert not torch.overrides._get_current_function_mode_stack()


def test_predictions_within_a_context():
    '''Running the network without gradients is no error, whatever the input requires.'''
    model, x = Net().double().eval(), images().requires_grad_()
    expected = model(x).detach()
    with ResNetLRP().context(model):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x.detach()), expected)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('create', [ResNetLRP, BlockLRP])
def test_without_gradients(create, mode):
    '''Attributions within them are an error that names them.'''
    model = Net().double()
    with mode(), pytest.raises(RuntimeError, match='no_grad|inference_mode'):
        explain(model, create())
    with torch.inference_mode(), pytest.raises(RuntimeError, match='inference_mode'):
        conservation_ledger(model, images(), create(), target=1)
    # Captum itself turns gradients on
    with mode():
        assert bool(CaptumResNetLRP(model).attribute(images(), target=1).isfinite().all())
    assert bool(explain(model, create()).isfinite().all())


# -- networks that were changed ----------------------------------------------------------------------------------------

def test_reentrant_checkpointing():
    '''The error says which argument to change.'''
    class Checkpointed(nn.Module):
        '''Runs its network again.'''
        def __init__(self, use_reentrant):
            super().__init__()
            self.net, self.use_reentrant = Net(), use_reentrant

        def forward(self, x):
            '''Logits.'''
            return checkpoint(self.net, x, use_reentrant=self.use_reentrant)

    with pytest.raises(UnsupportedOperation, match='use_reentrant=False'):
        explain(Checkpointed(True), ResNetLRP())
    torch.testing.assert_close(explain(Checkpointed(False), ResNetLRP()), explain(Net(), ResNetLRP()))


class Reversible(torch.autograd.Function):
    '''Runs a module again in the backward pass, and differentiates with respect to its parameters.'''
    @staticmethod
    def forward(ctx, x, run, *parameters):
        '''Output of the module.'''
        ctx.save_for_backward(x)
        ctx.run, ctx.number = run, len(parameters)
        with torch.no_grad():
            return run[0](x) if isinstance(run, list) else run(x)

    @staticmethod
    def backward(ctx, gradient):
        '''Gradients of all.'''
        x, run = ctx.saved_tensors[0].detach().requires_grad_(), ctx.run
        run = run[0] if isinstance(run, list) else run
        parameters = getattr(run, '__self__', run).parameters() if ctx.number else ()
        with torch.enable_grad():
            lower = torch.autograd.grad(run(x), (x, *parameters), gradient)
        return lower[0], None, *lower[1:]


class Doubled(torch.autograd.Function):
    '''A function with a gradient of its own, as layers that save memory have.'''
    @staticmethod
    def forward(ctx, x):
        '''Twice the input.'''
        ctx.factor = 2
        return ctx.factor * x

    @staticmethod
    def backward(ctx, gradient):
        '''Gradient.'''
        return ctx.factor * gradient


@pytest.mark.parametrize('with_parameters', [True, False])
@pytest.mark.parametrize('kept', [lambda m: m, lambda m: [m], lambda m: m.forward])
@pytest.mark.parametrize('create', [ResNetLRP, RelativeLRP, BlockLRP])
def test_functions_that_run_modules_again(create, kept, with_parameters):
    '''Weights are frozen within the context, and rules are not those of a backward pass: all composites refuse.'''
    class Outer(nn.Module):
        '''A reversible block.'''
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            '''Logits.'''
            return Reversible.apply(x, kept(self.net), *(self.net.parameters() if with_parameters else ()))

    outer = Outer()
    outer.double()(images().requires_grad_()).sum().backward()
    with pytest.raises(UnsupportedOperation, match=r'The model \(Outer\) uses \'Reversible\''):
        explain(outer, create())


@torch.overrides.wrap_torch_function(lambda x, y: (x, y))
def add(x, y):
    '''Not what its name is in PyTorch.'''
    return x - 3 * y


def test_functions_of_other_packages():
    '''Functions of other packages may have the name of one of PyTorch, and compute anything.'''
    with pytest.raises(UnsupportedOperation, match=r'\'\w+\.add\''):
        explain(Net(lambda x: add(x, x.sigmoid())), ResNetLRP())
    if hasattr(torch.library, 'custom_op'):
        operator = torch.library.custom_op('zennit_resnet_tests::relu', mutates_args=())(negative)
        operator.register_autograd(lambda ctx, gradient: -gradient)
        with pytest.raises(UnsupportedOperation, match=r'\'zennit_resnet_tests\.relu\''):
            explain(Net(torch.ops.zennit_resnet_tests.relu), ResNetLRP())


def negative(x: torch.Tensor) -> torch.Tensor:
    '''The negative.'''
    return -x


def test_functions_that_run_no_modules():
    '''If the gradient is the rule, that of such a function is as good as any.'''
    relevance = explain(Net(Doubled.apply), BlockLRP())
    torch.testing.assert_close(relevance, explain(Net(lambda x: 2 * x), BlockLRP()))
    for create in (ResNetLRP, RelativeLRP):
        with pytest.raises(UnsupportedOperation, match='Doubled'):
            explain(Net(Doubled.apply), create())


@pytest.mark.filterwarnings('ignore')
def test_quantized():
    '''Rules need floating point weights.'''
    quantized = pytest.importorskip('torch.ao.nn.quantized')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), quantized.Conv2d(4, 4, 3))
    with pytest.raises(TypeError, match=r'1 \(Conv2d\).*quantized'):
        Gradient(model, ResNetLRP())(images(torch.float), initial_relevance(1))


@pytest.mark.filterwarnings('ignore')
def test_modules_for_functions():
    '''Networks that may be quantized later call modules for functions, which are float until then.'''
    functional = pytest.importorskip('torch.ao.nn.quantized').FloatFunctional

    class Quantizable(nn.Module):
        '''A residual block.'''
        def __init__(self, add):
            super().__init__()
            self.conv, self.add = nn.Conv2d(3, 3, 3, padding=1), add

        def forward(self, x):
            '''The sum of both branches.'''
            return self.add(x, self.conv(x)).relu().mean((2, 3))

    model, add = Quantizable(torch.add).eval(), functional()
    expected = explain(model, ResNetLRP())
    model.functional, model.add = add, add.add
    torch.testing.assert_close(explain(model, ResNetLRP()), expected)


@pytest.mark.parametrize('create', [ResNetLRP, BlockLRP])
def test_made_in_inference_mode(create):
    '''Weights that were made in inference mode have no gradient. A copy has, and nothing is left changed.'''
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)).eval()
        model(torch.rand(1, 3, 8, 8))
    with pytest.raises(TypeError, match=r"0 \(Conv2d\) has 'weight'.*inference_mode.*deepcopy"):
        create().register(model)
    assert not model[0]._forward_pre_hooks and model[0].weight.requires_grad
    with create().context(copy.deepcopy(model)) as network:
        network(torch.rand(1, 3, 8, 8, requires_grad=True)).sum().backward()


def test_sharded():
    '''Rules need whole weights.'''
    class FSDPConv2d(nn.Conv2d):
        '''Named like the classes that torch.distributed.fsdp.fully_shard makes.'''

    with pytest.raises(TypeError, match=r'0 \(FSDPConv2d\).*sharded'):
        Gradient(nn.Sequential(FSDPConv2d(3, 4, 3)), ResNetLRP())(images(torch.float), initial_relevance(1))


def test_exported():
    '''A network that was exported has the same relevance.'''
    model = Net().eval()
    exported = torch.export.export(model, (images(torch.float),)).module()
    maps = []
    for elem in (model, exported):
        with Gradient(model=elem, composite=ResNetLRP()) as attributor:
            maps.append(attributor(images(torch.float), initial_relevance([1, 2]))[1])
    torch.testing.assert_close(maps[1], maps[0])


def test_exported_resnet():
    '''With batch normalization and pooling.'''
    torch.manual_seed(0)
    model, x = narrow_resnet18(num_classes=5).eval(), torch.rand(2, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    maps = [Gradient(elem, ResNetLRP())(x, initial_relevance([1, 2]))[1] for elem in (model, exported)]
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-5)


# -- errors of rules ---------------------------------------------------------------------------------------------------

def test_type_error_of_a_rule():
    '''A TypeError in the rule of an operator is not taken for operands that Python does not support.'''
    class Wrong(SinglePass):
        '''Raises.'''
        def store(self, module, *inputs):
            '''Nothing.'''
            raise TypeError('the rule is wrong')

    scale = torch.rand(5).double()
    for function in (lambda x: x * scale, lambda x: scale * x, lambda x: x / scale, lambda x: torch.mul(x, scale)):
        with pytest.raises((RuntimeError, TypeError), match='the rule is wrong'):
            explain(Net(function), ResNetLRP(layer_map=[(Gate, Wrong())]))


def test_type_error_of_a_network():
    '''Operands that are not supported are still Python's.'''
    class Reversed:
        '''Knows tensors.'''
        def __radd__(self, other):
            return other

    with pytest.raises(TypeError, match='str'):
        explain(Net(lambda x: x + 'a'), ResNetLRP())
    torch.testing.assert_close(explain(Net(lambda x: x + Reversed()), ResNetLRP()), explain(Net(), ResNetLRP()))


def test_output_of_any_class():
    '''What is not in a tensor or container is followed as well.'''
    class Double(torch.autograd.Function):
        '''Has a backward function of its own.'''
        @staticmethod
        def forward(ctx, x):
            '''Twice.'''
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            '''Not its gradient.'''
            return grad

    model = Net(lambda x: types.SimpleNamespace(logits=Double.apply(x))).double().eval()
    x = images().requires_grad_()
    with ResNetLRP().context(model):
        output = model(x).logits
        with pytest.raises(UnsupportedOperation, match='Double'):
            torch.autograd.grad(output, x, torch.ones_like(output))
