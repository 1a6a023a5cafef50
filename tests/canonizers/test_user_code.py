'''What users do to networks beyond their definition: hooks, pruning, compiled functions, checkpointing, containers.'''
import copy
import dataclasses
import threading
import types
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Function, randomize
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, EpsilonPlusFlat, LayerMapComposite
from zennit.rules import Epsilon

from zennit_resnet import BlockLRP, RelativeLRP, ResidualCanonizer, ResNetLRP, UnsupportedOperation, with_splitting
from zennit_resnet.layer import Addition
from zennit_resnet.rules import BlockEpsilon, RatioSplit

COMPOSITES = {
    'ratio': ResNetLRP,
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'relative': RelativeLRP,
    'block': BlockLRP,
    'zennit': lambda: with_splitting(EpsilonPlusFlat()),
}
all_composites = pytest.mark.parametrize('create', COMPOSITES.values(), ids=COMPOSITES)

needs_stance = pytest.mark.skipif(
    not hasattr(torch.compiler, 'set_stance'), reason='PyTorch has no stance of the compiler'
)

Tuple = namedtuple('Tuple', 'logits extra')


@dataclasses.dataclass(frozen=True)
class Output:
    '''What a network returns.'''
    logits: torch.Tensor
    extra: object = None


class Net(nn.Module):
    '''A residual block between two layers. What is to be changed of it are attributes.'''
    def __init__(self, act=F.relu, pack=lambda logits: logits):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.act, self.pack = act, pack

    def forward(self, x):
        '''Logits.'''
        x = x['image'] if isinstance(x, dict) else x[0] if isinstance(x, list) else x
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.act(self.bn2(self.conv(x))))
        return self.pack(self.head(x.mean((2, 3))))


def network(**kwargs):
    '''The same network each time.'''
    torch.manual_seed(0)
    return randomize(Net(**kwargs)).eval()


def explain(model, composite, call=lambda model, input: model(input), unpack=lambda output: output, size=8):
    '''Relevance of two images.'''
    input = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with composite.context(model):
        output = unpack(call(model, input))
        return torch.autograd.grad(output, input, output.detach())[0]


def check(actual, expected):
    '''Compare relevance, whose scale varies with the composite.'''
    torch.testing.assert_close(actual / expected.abs().max(), expected / expected.abs().max(), rtol=1e-4, atol=1e-5)


# -- functions and hooks -----------------------------------------------------------------------------------------------

def double(x):
    '''An activation.'''
    return F.gelu(x) * 2


def counting_backend():
    '''A compiler which changes nothing, and a list with an entry for each graph that it has compiled.'''
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    return backend, calls


@needs_stance
@all_composites
def test_compiled_function(create):
    '''Functions that were compiled run in Python, where they are seen, and compiled afterwards.'''
    backend, calls = counting_backend()
    compiled = torch.compile(double, backend=backend)
    check(explain(network(act=compiled), create()), explain(network(act=double), create()))
    assert not calls
    model = network()
    model.forward = torch.compile(model.forward, backend=backend)
    model(torch.rand(2, 3, 8, 8))
    count = len(calls)
    check(explain(model, create()), explain(network(), create()))
    assert len(calls) == count > 0
    compiled(torch.rand(3))
    assert len(calls) == count + 1


@needs_stance
@all_composites
def test_network_in_compiled_function(create):
    '''A function around the network may be compiled, before the composite is registered or after.'''
    model = network()
    compiled = torch.compile(lambda input: model(input) * 1, backend='eager')
    expected = explain(model, create())
    check(explain(model, create(), lambda model, input: compiled(input)), expected)

    def late(model, input):
        return torch.compile(lambda input: model(input) * 1, backend='eager')(input)

    check(explain(model, create(), late), expected)


@needs_stance
def test_compiled_function_in_threads():
    '''The setting of the compiler is for all threads: it ends with the last one.'''
    backend, calls = counting_backend()
    compiled = torch.compile(double, backend=backend)
    first, second = threading.Event(), threading.Event()

    def slow(x):
        first.set()
        assert second.wait(60)
        return compiled(x)

    results = []
    thread = threading.Thread(target=lambda: results.append(explain(network(act=slow), ResNetLRP())))
    thread.start()
    assert first.wait(60)
    results.append(explain(network(act=compiled), ResNetLRP()))
    second.set()
    thread.join()
    check(*results)
    assert not calls
    compiled(torch.rand(3))
    assert len(calls) == 1


@all_composites
def test_pre_hook(create):
    '''Hooks of the user may change what a layer gets, also of a layer with a rule.'''
    mask = torch.tensor([1., 0, 2, 3]).view(4, 1, 1)

    class Masked(nn.Module):
        '''The same as a module.'''
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            '''Product.'''
            return self.layer(F.pad(x, (1, 1, 1, 1)) * mask)

    expected, hooked = network(), network()
    expected.conv.padding = hooked.conv.padding = 0
    expected.conv = Masked(expected.conv)
    hooked.conv.register_forward_pre_hook(lambda module, args: (F.pad(args[0], (1, 1, 1, 1)) * mask,))
    check(explain(hooked, create()), explain(expected, create()))
    assert len(hooked.conv._forward_pre_hooks) == 1


def test_pre_hook_too_late():
    '''A hook that changes the input after the rule has seen it is an error.'''
    model = network()
    with ResNetLRP().context(model):
        handle = model.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        with pytest.raises(RuntimeError, match='pre-hook of Conv2d changes the input after ZPlus.*before'):
            model(torch.rand(2, 3, 8, 8, requires_grad=True))
        handle.remove()
        assert torch.is_grad_enabled()
        model(torch.rand(2, 3, 8, 8, requires_grad=True))


@all_composites
def test_forward_of_instance(create):
    '''A forward that is an attribute of a layer counts, not that of its class.'''
    class Standardized(nn.Conv2d):
        '''A convolution with standardized weights.'''
        def forward(self, x):
            '''Convolve.'''
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)

    expected, model = network(), network()
    conv = Standardized(4, 4, 3, padding=1, bias=False)
    conv.load_state_dict(model.conv.state_dict())
    expected.conv = conv
    model.conv.forward = types.MethodType(Standardized.forward, model.conv)
    if create is COMPOSITES['zennit']:
        # its rules clamp the parameter, and the layer then takes the mean of that
        for elem in (model, expected):
            with pytest.raises(RuntimeError, match='computes its weight'):
                explain(elem, create())
    else:
        check(explain(model, create()), explain(expected, create()))


class ByKeyword(Net):
    '''The same network, which gives layers their input by its name.'''
    def forward(self, x):
        '''Logits.'''
        x = F.relu(self.bn1(input=self.stem(input=x)))
        x = F.relu(x + self.act(self.bn2(input=self.conv(input=x))))
        return self.head(input=x.mean((2, 3)))


@all_composites
def test_called_by_keyword(create):
    '''Layers may be given their input by its name.'''
    model, expected = network(), explain(network(), create())
    model.__class__ = ByKeyword
    check(explain(model, create()), expected)


def test_none_by_keyword():
    '''What is None may as well be left out, also for rules of Zennit.'''
    class Scaled(nn.Linear):
        '''A layer with a further argument.'''
        def forward(self, x, scale=None):
            '''Outputs, maybe scaled.'''
            return super().forward(x) if scale is None else super().forward(x) * scale

    model, layer, x = nn.Sequential(Scaled(4, 3)), Scaled(4, 3).double(), torch.rand(2, 4).double()
    model[0] = layer
    expected = Gradient(model=model, composite=with_splitting(EpsilonPlus()))(x, torch.ones(2, 3).double())[1]
    layer.register_forward_pre_hook(lambda module, args, kwargs: (args, {'scale': None}), with_kwargs=True)
    found = Gradient(model=model, composite=with_splitting(EpsilonPlus()))(x, torch.ones(2, 3).double())[1]
    assert torch.equal(found, expected)


def test_further_arguments():
    '''Rules of Zennit would run a layer again without further arguments, those of this package do not.'''
    class Upsampled(Net):
        '''A transposed convolution to a given size.'''
        def forward(self, x):
            '''Logits.'''
            return super().forward(self.up(x, output_size=[16, 16]))

    model = network()
    model.__class__, model.up = Upsampled, nn.ConvTranspose2d(3, 3, 3, 2, 1)
    explain(model, ResNetLRP())
    with pytest.raises(RuntimeError, match=r'up \(ConvTranspose2d\) is called with 2 arguments.*output_padding'):
        explain(model, with_splitting(EpsilonPlus()))


def test_checkpointed_function():
    '''Functions that checkpointing runs again cannot be followed, which is an error instead of other relevance.'''
    class Checkpointed(Net):
        '''A block in a function.'''
        def inner(self, x):
            '''The block.'''
            return F.relu(x + self.bn2(self.conv(F.relu(self.bn1(x)))))

        def forward(self, x):
            '''Logits.'''
            return self.head(checkpoint(self.inner, F.relu(self.stem(x)), use_reentrant=False).mean((2, 3)))

    model = randomize(Checkpointed()).eval()
    with pytest.raises(RuntimeError, match='checkpoint modules instead of functions'):
        explain(model, ResNetLRP())
    explain(model, BlockLRP())


# -- weights -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['prune', 'weight_norm', 'parametrized'])
@pytest.mark.parametrize('create', [COMPOSITES[key] for key in ('ratio', 'merge', 'relative', 'block')])
def test_computed_weights(create, how):
    '''Weights that are computed from parameters are folded as well, or refused, and are put back.'''
    model, expected = network(), network()
    for layer in (model.stem, model.conv):
        if how == 'prune':
            prune.l1_unstructured(layer, 'weight', amount=.3)
        elif how == 'weight_norm':
            torch.nn.utils.weight_norm(layer)
        else:
            parametrizations.weight_norm(layer)
    model(torch.rand(1, 3, 8, 8))
    for name in ('stem', 'conv'):
        getattr(expected, name).weight.data = getattr(model, name).weight.detach().clone()
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model.conv))
    check(explain(model, create()), explain(expected, create()))
    if how == 'parametrized':
        # Zennit's rules read weights from the layer itself, and parametrized ones cannot be replaced
        with pytest.raises(RuntimeError, match='ParametrizedConv2d.*remove_parametrizations'):
            explain(model, EpsilonPlus(canonizers=[ResidualCanonizer(batch_norm='merge')]))
    assert set(vars(model.conv)) == attributes
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model.conv.weight, expected.conv.weight)


@pytest.mark.parametrize('create', [EpsilonPlus, lambda: EpsilonPlus(zero_params='bias')])
@pytest.mark.parametrize('layer', ['stem', 'head'])
def test_computed_bias(create, layer):
    '''Zennit's rules neither clamp nor remove a bias that is no parameter, which is an error. Others need not.'''
    model = network()
    model.stem = nn.Conv2d(3, 4, 3, padding=1)
    expected = explain(model, ResNetLRP())
    prune.identity(getattr(model, layer), 'bias')
    check(explain(model, ResNetLRP()), expected)
    if layer == 'stem' or create is not EpsilonPlus:
        with pytest.raises(RuntimeError, match=f'{layer} .* computes its bias'):
            explain(model, with_splitting(create()))
    else:
        explain(model, with_splitting(create()))


def test_weights_of_earlier_call():
    '''Functional convolutions have the weights of their own forward pass, whatever was run since.'''
    class Bank(nn.Module):
        '''Several convolutions.'''
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(2, 4, 3, 3, 3)), nn.Linear(4, 3)

        def forward(self, x, index):
            '''Logits.'''
            return self.head(F.conv2d(x, self.weight[index], padding=1).relu().mean((2, 3)))

    model, input = Bank().eval(), torch.rand(2, 3, 8, 8, requires_grad=True)
    with ResNetLRP().context(model):
        output = model(input, 0)
        expected, = torch.autograd.grad(output, input, output.detach())
        output = model(input, 0)
        model(input, 1)
        actual, = torch.autograd.grad(output, input, output.detach())
    assert torch.equal(actual, expected)


def test_hidden_network():
    '''Weights that the network does not know of are named as the reason.'''
    class Wrapper(nn.Module):
        '''A network in a list.'''
        def __init__(self):
            super().__init__()
            self.nets = [network()]

        def forward(self, x):
            '''Logits.'''
            return self.nets[0](x)

    with pytest.raises(UnsupportedOperation, match='no parameters of the network that was given'):
        explain(Wrapper().eval(), ResNetLRP())


# -- arguments and outputs ---------------------------------------------------------------------------------------------

@all_composites
@pytest.mark.parametrize('call', [
    lambda model, image: model(x=image),
    lambda model, image: model([image]),
    lambda model, image: model({'image': image}),
], ids=['keyword', 'list', 'dict'])
def test_arguments(create, call):
    '''Images may be given by name, in a list or in a dictionary.'''
    check(explain(network(), create(), call), explain(network(), create()))


@all_composites
@pytest.mark.parametrize('pack', [
    lambda logits: Output(logits, [3]),
    lambda logits: Tuple(logits, None),
    lambda logits: {'logits': logits, 'extra': 3},
], ids=['dataclass', 'namedtuple', 'dict'])
def test_outputs(create, pack):
    '''Logits may be in containers, which remain what they are.'''
    def unpack(output):
        assert type(output) is type(pack(None))
        return output['logits'] if isinstance(output, dict) else output.logits

    check(explain(network(pack=pack), create(), unpack=unpack), explain(network(), create()))


def test_block_by_keyword():
    '''A module with the rule for blocks may be called by keyword.'''
    class Body(nn.Module):
        '''A block.'''
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x):
            '''Sum.'''
            return x + self.linear(x)

    class Outer(nn.Module):
        '''A network of one block.'''
        def __init__(self, call):
            super().__init__()
            self.body, self.call = Body(), call

        def forward(self, x):
            '''The block.'''
            return self.call(self.body, x)

    relevance, input = [], torch.rand(2, 5, requires_grad=True)
    for call in (lambda body, x: body(x), lambda body, x: body(x=x)):
        torch.manual_seed(0)
        model = Outer(call)
        with LayerMapComposite([(Body, BlockEpsilon())]).context(model):
            relevance.append(torch.autograd.grad(model(input), input, torch.ones(2, 5))[0])
    assert torch.equal(*relevance)


def test_transposed_with_output_size():
    '''Transposed convolutions may be told the size of their output.'''
    class Up(nn.Module):
        '''A decoder.'''
        def __init__(self, padding):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 3, 3, 2, 1, padding)
            self.padding = padding

        def forward(self, x):
            '''Image.'''
            x = F.relu(self.down(x))
            return (self.up(x) if self.padding else self.up(x, output_size=(8, 8))).flatten(1)

    first, second = Up(0).eval(), Up(1).eval()
    second.load_state_dict(first.state_dict())
    for create in (ResNetLRP, RelativeLRP):
        check(explain(first, create()), explain(second, create()))


def test_pool_by_keyword():
    '''A max pooling may get its input by name.'''
    class Pooled(nn.Module):
        '''A network with a max pooling.'''
        def __init__(self, call):
            super().__init__()
            self.stem, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1), nn.Linear(4, 3)
            self.call = call

        def forward(self, x):
            '''Logits.'''
            return self.head(self.call(self.pool, self.stem(x).relu()).mean((2, 3)))

    first, second = Pooled(lambda pool, x: pool(x)).eval(), Pooled(lambda pool, x: pool(input=x)).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(explain(first, ResNetLRP()), explain(second, ResNetLRP()))


# -- what is inactive --------------------------------------------------------------------------------------------------

@all_composites
def test_inactive(create):
    '''A forward pass while all rules are inactive has the gradient of the network, whatever it does.'''
    def gate(x):
        return x.exp() * torch.sigmoid(x.mean((2, 3), keepdim=True))

    model, input = network(act=gate), torch.rand(2, 3, 8, 8, requires_grad=True)
    expected, = torch.autograd.grad(model(input).sum(), input)
    composite = create()
    with composite.context(model), composite.inactive():
        actual, = torch.autograd.grad(model(input).sum(), input)
    torch.testing.assert_close(actual, expected)


@all_composites
@pytest.mark.parametrize('outside', COMPOSITES.values(), ids=COMPOSITES)
def test_nested(outside, create):
    '''The innermost of nested contexts counts, and the other one after it.'''
    class Pooled(nn.Module):
        '''A network with a max pooling, whose rule may be the gradient.'''
        def __init__(self):
            super().__init__()
            self.pool, self.net = nn.MaxPool2d(3, 2, 1), network()

        def forward(self, x):
            '''Logits.'''
            return self.net(self.pool(x))

    model = Pooled().eval()
    expected, outer = explain(model, create(), size=16), outside()
    with outer.context(model):
        if outside is COMPOSITES['zennit'] and create not in (outside, BlockLRP):
            with pytest.raises(RuntimeError, match='Conv2d has the rule .* already'):
                create().register(model)
        else:
            check(explain(model, create(), size=16), expected)
    check(explain(model, outside(), size=16), explain(model, outer, size=16))


# -- batches -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('create', [ResNetLRP, lambda: ResNetLRP('symmetric', first_layer='ones')])
def test_empty_batch(create):
    '''No images have no relevance, as they have no gradient.'''
    model, input = network(), torch.zeros(0, 3, 8, 8, requires_grad=True)
    with create().context(model):
        output = model(input)
        relevance, = torch.autograd.grad(output, input, torch.ones_like(output))
    assert relevance.shape == input.shape


@all_composites
@pytest.mark.parametrize('function', [
    lambda x: x + x[:, :0].sum(1, keepdim=True), lambda x: x + x[..., :0] @ x.new_ones(0, x.shape[-1]),
])
def test_sum_over_nothing(create, function):
    '''A branch without elements, which adds zeros.'''
    for model in (network(act=function), nn.Sequential(Function(lambda _, x: function(x)), network())):
        assert bool(explain(model.eval(), create()).isfinite().all())


def test_nan_in_batch():
    '''An image of NaN does not change the relevance of others.'''
    model, input = network(), torch.randn(2, 3, 8, 8)
    relevance = []
    for batch in (input, torch.cat([input, input[:1] * torch.nan])):
        batch.requires_grad_()
        with ResNetLRP().context(model):
            output = model(batch)
            relevance.append(torch.autograd.grad(output, batch, torch.ones_like(output))[0])
    assert (input < 0).any()
    torch.testing.assert_close(relevance[1][:2], relevance[0])


@pytest.mark.parametrize('name', ['MaxPool2d(8)', 'MaxPool2d(3, 1, 1)'])
def test_average_of_other_shape(name):
    '''The published average pooling is refused where it has another output than the max pooling.'''
    pool = eval(f'nn.{name}')
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool, nn.Flatten(), nn.LazyLinear(3))
    model(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match='maxpool=\'avg2x2\' makes an output.*\'winner\''):
        explain(model.eval(), ResNetLRP(maxpool='avg2x2'))
    explain(model.eval(), ResNetLRP())


def test_average_of_any_dimension():
    '''The published average pooling is over two positions of each dimension.'''
    for conv, pool, ndim in ((nn.Conv1d, nn.MaxPool1d, 1), (nn.Conv3d, nn.MaxPool3d, 3)):
        model = nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), pool(2), nn.Flatten(), nn.LazyLinear(3))
        input = torch.rand(2, 3, *(4,) * ndim, requires_grad=True)
        model(input)
        with ResNetLRP(maxpool='avg2x2').context(model):
            output = model(input)
            relevance, = torch.autograd.grad(output, input, output.detach())
        torch.testing.assert_close(relevance.flatten(1).sum(1), output.detach().sum(1), rtol=1e-4, atol=1e-5)


def test_reversed_subtraction_with_factor():
    '''torch.rsub(x, y, alpha=a) is y - a x.'''
    class Subtraction(nn.Module):
        '''A network of a subtraction.'''
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, x):
            '''The difference.'''
            return torch.rsub(x[:, :2].clone(), x[:, 2:].clone(), alpha=3)

    model, input = Subtraction().eval(), torch.ones(1, 4, requires_grad=True)
    with LayerMapComposite([(Addition, RatioSplit())], canonizers=ResNetLRP().canonizers).context(model):
        relevance, = torch.autograd.grad(model(input), input, torch.ones(1, 2))
    assert torch.allclose(relevance, torch.tensor([[.75, .75, .25, .25]]))


@pytest.mark.parametrize('autocast', [False, True])
def test_relative_in_float16(autocast):
    '''Contributions do not fit into half precision.'''
    model = network() if autocast else network().half()
    input = torch.rand(2, 3, 8, 8, dtype=None if autocast else torch.float16).requires_grad_()
    with RelativeLRP().context(model), torch.autocast('cpu', torch.float16, enabled=autocast):
        with pytest.raises(TypeError, match='bfloat16 or float32'):
            model(input)


# -- training, and functions that cannot be looked into ----------------------------------------------------------------

class DropPath(nn.Identity):
    '''Stochastic depth, as many networks have a class of this name.'''


STATISTICS = torch.zeros(4), torch.ones(4)
TRAINED = {
    'dropout': lambda x: F.dropout(x),
    'dropout by keyword': lambda x: F.dropout(x, training=True, p=.1),
    'torch.dropout': lambda x: torch.dropout(x, .5, True),
    'torch.dropout_': lambda x: torch.dropout_(x.clone(), .5, True),
    'dropout2d': F.dropout2d,
    'alpha_dropout': lambda x: F.alpha_dropout(x, .5, True),
    'rrelu': lambda x: F.rrelu(x, training=True),
    'batch_norm': lambda x: F.batch_norm(x, *STATISTICS, training=True),
    'attention': lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=.1),
    'attention by position': lambda x: F.scaled_dot_product_attention(x, x, x, None, .1),
}
NOT_TRAINED = {
    'dropout': lambda x: F.dropout(x, training=False),
    'dropout of nothing': lambda x: F.dropout(x, 0.),
    'alpha_dropout': F.alpha_dropout,
    'rrelu': F.rrelu,
    'batch_norm': lambda x: F.batch_norm(x, *STATISTICS),
    'attention': lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.),
    'normalization of another kind': (
        lambda x: F.batch_norm(x.flatten(0, 1)[None], None, None, training=True)[0].view_as(x)
    ),
}


@all_composites
@pytest.mark.parametrize('name', TRAINED)
def test_function_in_training(create, name):
    '''Functions that are called for training are random, or mix samples, whatever mode the network is in.'''
    with pytest.raises(RuntimeError, match=r"The model \(Net\) calls '\w+' for training"):
        explain(network(act=TRAINED[name]), create())


@pytest.mark.parametrize('name', NOT_TRAINED)
def test_function_not_in_training(name):
    '''The same functions are no error in evaluation.'''
    assert bool(explain(network(act=NOT_TRAINED[name]), ResNetLRP()).isfinite().all())


@pytest.mark.parametrize('module', [StochasticDepth(.5, 'row'), DropPath(), nn.RReLU(), nn.Dropout2d()])
@all_composites
def test_module_in_training(create, module):
    '''So are modules, in training mode only.'''
    model = network()
    model.act = module
    model.act.train()
    with pytest.raises(RuntimeError, match=rf'act \({type(module).__name__}\) is in training mode'):
        explain(model, create())
    model.act.eval()
    explain(model, create())


class Attention(nn.MultiheadAttention):
    '''Attention of a sequence to itself.'''
    def forward(self, x):
        '''Attend.'''
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize('create', [ResNetLRP, BlockLRP])
def test_attention_in_training(create):
    '''Attention has a dropout of its own, which is no module.'''
    model, input = nn.Sequential(Attention(4, 2, dropout=.5, batch_first=True), nn.Linear(4, 3)), torch.rand(2, 3, 4)
    input.requires_grad_()
    with create().context(model), pytest.raises(RuntimeError, match=r'0 \(Attention\) is in training mode'):
        model(input)
    model[0].dropout = 0.
    with create().context(model):
        model(input)


@torch.jit.script
def scripted_sum(x, y):
    '''An addition which cannot be intercepted.'''
    return x + y


class Sum(nn.Module):
    '''A module with an addition which cannot be intercepted.'''
    def forward(self, x):
        '''Add something.'''
        return scripted_sum(x, x.relu())


HIDDEN = {'scripted': scripted_sum, 'mapped': torch.vmap(torch.add)}


@pytest.mark.parametrize('create', [
    ResNetLRP, RelativeLRP, lambda: with_splitting(EpsilonPlusFlat())
], ids=['ratio', 'relative', 'zennit'])
@pytest.mark.parametrize('name', HIDDEN)
def test_hidden_addition(create, name):
    '''Additions within scripted and mapped functions would double relevance.'''
    model = network(act=lambda x: HIDDEN[name](x, F.relu(x)))
    # scripted functions are optimized after some calls
    for _ in range(3):
        with pytest.raises(UnsupportedOperation, match='scripted or mapped function'):
            explain(model, create())
    assert not model._forward_hooks


@torch.jit.script
def scripted_double(x):
    '''A product which cannot be intercepted.'''
    return x * 2.


@torch.jit.script
def scripted_sigmoid(x):
    '''A sigmoid which cannot be intercepted.'''
    return x.sigmoid()


def in_thread(function):
    '''A function that runs in another thread.'''
    def run(x):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(function, x).result()

    return run


HIDDEN_SINGLE = {
    'scripted product': scripted_double, 'scripted sigmoid': scripted_sigmoid, **{
        f'{where} {name}': hide(function) for where, hide in (('mapped', torch.vmap), ('thread', in_thread))
        for name, function in {
            'product': lambda x: x * 2, 'quotient': lambda x: x / 3, 'negation': lambda x: -x,
            'difference': lambda x: 1 - x, 'constant first': lambda x: torch.sub(torch.ones_like(x), x),
            'scaled': lambda x: torch.add(torch.ones_like(x), x, alpha=2), 'exponential': torch.exp,
            'prelu': lambda x: F.prelu(x, x.new_full((1,), .2)), 'softplus': F.softplus, 'power': lambda x: x ** 2,
            'clip': F.relu6, 'sum': lambda x: x.sum(0, keepdim=True).expand_as(x),
            'pool': lambda x: F.avg_pool2d(x, 3, 1, 1), 'norm': lambda x: F.layer_norm(x, x.shape[-1:]),
            'product of matrices': lambda x: x @ torch.eye(x.shape[-1]).to(x) * 1,
            'attention': lambda x: F.scaled_dot_product_attention(x, x, x),
        }.items()
    },
}


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('name', HIDDEN_SINGLE)
def test_hidden_function(name):
    '''Functions of one tensor that are not intercepted would have their gradient in place of a rule.'''
    for _ in range(3):
        with pytest.raises(UnsupportedOperation, match='scripted or mapped function'):
            explain(network(act=HIDDEN_SINGLE[name]), ResNetLRP())


def test_function_before():
    '''What is computed before the network is the business of who does it.'''
    model, x = network(), torch.rand(2, 3, 8, 8).requires_grad_()
    with ResNetLRP().context(model):
        relevance, = torch.autograd.grad(model(2 * (x - .5)).sum(), x)
    assert float(relevance.abs().sum()) > 0


@pytest.mark.parametrize('hide', [torch.vmap, in_thread])
@pytest.mark.parametrize('function', [
    lambda x: F.relu(x + 1) - 2, lambda x: F.max_pool2d(x, 3, 1, 1).transpose(-2, -1).flip(-1),
    lambda x: torch.cat([x[..., :1].relu(), torch.add(1., x)[..., 1:]], -1),
])
def test_hidden_selection(function, hide):
    '''Of those that move, select or shift elements, the gradient is the rule.'''
    check(explain(network(act=hide(function)), ResNetLRP()), explain(network(act=function), ResNetLRP()))


@pytest.mark.parametrize('name', HIDDEN)
def test_hidden_addition_behind(name):
    '''They are found behind modules that have a rule as well.'''
    model = network(act=lambda x: model.last(HIDDEN[name](x, F.relu(x))))
    model.last = nn.Conv2d(4, 4, 1)
    with pytest.raises(UnsupportedOperation, match='scripted or mapped function'):
        explain(model, with_splitting(EpsilonPlusFlat()))


def test_hidden_addition_with_rule():
    '''What happens within a module that has a rule is its own business, and in composites of gradients, all is.'''
    model = network()
    model.act = Sum()
    composite = with_splitting(LayerMapComposite([(Sum, Epsilon())]))
    assert bool(explain(model, composite).isfinite().all())
    assert bool(explain(model, BlockLRP()).isfinite().all())
