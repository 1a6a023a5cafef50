'''Traced attributions are those that autograd and hooks compute, for any input, without either.'''
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Function, TinyResNet, UserNetwork, build_timm, build_torchvision, prepare, randomize
from helpers.operations import FUNCTIONS, OTHERS, RELATIVE, RESNET, build, images
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import SwinTransformer, VisionTransformer
from zennit.attribution import Gradient
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat

from zennit_resnet import BlockLRP, GammaLRP, ResNetLRP, UnsupportedOperation, initial_relevance, with_splitting
from zennit_resnet.export import export
from zennit_resnet.tracing import trace

pytestmark = pytest.mark.once

COMPOSITES = {
    **RESNET, **RELATIVE, **OTHERS,
    'epsilon': lambda: ResNetLRP(classifier='epsilon'),
    'identity': lambda: ResNetLRP(identity_skip=False),
    'avg2x2': lambda: ResNetLRP(maxpool='avg2x2'),
    'zennit box': lambda: EpsilonGammaBox(low=-9., high=9.),
}


def eager(model, composite, input, start):
    '''Output and relevance by autograd and hooks.'''
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(input, start)
    return output.detach(), relevance


def assert_same(traced, model, composite, input, start, tolerance=1e-9):
    '''Compare output and relevance of both ways.'''
    expected, result = eager(model, composite, input, start), traced(input, start)
    for before, after in zip(expected, result):
        assert not after.requires_grad
        # rounding has another order where batch normalization is folded
        torch.testing.assert_close(
            after, before, rtol=0, atol=tolerance * before.nan_to_num().abs().max().item() + 1e-300, equal_nan=True
        )


def network():
    '''A residual network in double precision.'''
    torch.manual_seed(0)
    return randomize(TinyResNet()).double().eval()


# each option of ResNetLRP in one of them
COMBINED = {
    **{name: COMPOSITES[name] for name in ('ratio', *RELATIVE, *OTHERS, 'zennit box')},
    'ones, merge': lambda: ResNetLRP('symmetric', first_layer='ones', batch_norm='merge'),
    'flat, literal': lambda: ResNetLRP(first_layer='flat', projection='literal', dead_units='drop'),
    'wsquare, average': lambda: ResNetLRP(first_layer='wsquare', maxpool='average', identity_skip=False),
    'zbox, avg2x2': lambda: ResNetLRP(
        first_layer='zbox', low=-9., high=9., maxpool='avg2x2', stabilizer=1e-3, classifier='epsilon'
    ),
}


@pytest.mark.parametrize('label, build', [
    *((label, lambda: TinyResNet(5)) for label in COMBINED), ('ratio', UserNetwork), ('relative', UserNetwork),
])
def test_other_inputs(label, build):
    '''What was traced with one input is right for others: with other signs, with dead units, and with zeros only.'''
    torch.manual_seed(1)
    model, composite = prepare(build()), COMBINED[label]
    layer = model.block.conv1 if isinstance(model, TinyResNet) else model.branches[0]
    with torch.no_grad():
        # no input makes these units positive, so all of their contributions are negative
        layer.weight[:3] = -layer.weight[:3].abs()
    traced = trace(model, composite(), torch.rand(2, 3, 16, 16).double())
    start = torch.rand(2, 5).double()
    for input in (torch.randn(2, 3, 16, 16).double(), -torch.rand(2, 3, 16, 16).double()):
        assert_same(traced, model, composite(), input, start)
    output, relevance = traced(torch.zeros(2, 3, 16, 16).double(), start)
    assert torch.allclose(output, model(torch.zeros(2, 3, 16, 16).double()))
    assert relevance.shape == (2, 3, 16, 16)


@pytest.mark.parametrize('name', sorted(set(FUNCTIONS) - {'getitem mask'})[::15])
def test_operations(name):
    '''Some functions of the table of operations.'''
    model, x = build(FUNCTIONS[name], is_relu=False), images()
    composite = RESNET['merge']
    assert_same(trace(model, composite(), x[:1]), model, composite(), x[1:] * 1.3 - .1, torch.eye(3)[:1].double())


class Weighting(nn.Module):
    '''Applies a function to two layers. One may weight the other.'''
    def __init__(self, function):
        super().__init__()
        self.conv, self.other, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.function = function

    def forward(self, x):
        '''Logits.'''
        return self.fc(self.function(self.conv(x).flatten(2), self.other(x).flatten(2)).mean(2))


def with_data(tensor, values):
    '''A tensor that was given other data.'''
    tensor.data = values
    return tensor


@pytest.mark.parametrize('composite', [ResNetLRP, BlockLRP, GammaLRP])
@pytest.mark.parametrize('function', [
    lambda h, w: (w @ w.mT).detach() @ h, lambda h, w: h @ (w.mT @ w).detach(),
    lambda h, w: torch.einsum('bct,bdt,bds->bcs', h, w.detach(), w.detach()), lambda h, w: h @ (w.mT @ w).softmax(1),
], ids=['matmul', 'right', 'einsum', 'softmax'])
def test_weights_of_the_input(function, composite):
    '''What weights a signal, and was computed from the input, is that of each input, not of the one that was traced.'''
    torch.manual_seed(0)
    model = Weighting(function)
    input = torch.randn(2, 3, 8, 8).double()
    traced = trace(model.double().eval(), composite(), torch.randn_like(input))
    assert_same(traced, model, composite(), input, torch.eye(5)[:2].double())


@pytest.mark.parametrize('function', [
    lambda h, w: h * nn.Parameter(w.detach()).sigmoid(), lambda h, w: h * with_data(torch.zeros_like(w), w.detach()),
], ids=['parameter', 'data'])
def test_values_that_are_kept(function):
    '''A graph that keeps values of the input that was traced is refused.'''
    torch.manual_seed(0)
    with pytest.raises(TypeError, match='for another input'):
        trace(Weighting(function).eval(), ResNetLRP(), torch.randn(2, 3, 8, 8))


def test_noise():
    '''The output of a network that adds noise is another each time, also that of the graph.'''
    torch.manual_seed(0)
    input, start = torch.randn(2, 3, 8, 8), torch.eye(5)[:2]
    traced = trace(Weighting(lambda h, w: h + torch.randn_like(h)).eval(), ResNetLRP(), input)
    assert not torch.equal(traced(input, start)[0], traced(input, start)[0])


@pytest.mark.parametrize('label, size, dtype', [
    ('ratio', 3, torch.float32), ('ratio', 8, torch.float64), ('symmetric', 3, torch.float32),
    ('relative', 8, torch.float64), ('block', 3, torch.float32),
])
def test_batches(label, size, dtype):
    '''Each shape and type is traced once.'''
    model, composite = network().to(dtype), COMPOSITES[label]
    traced = trace(model, composite(), torch.rand(1, 3, 32, 32, dtype=dtype))
    input, start = torch.randn(size, 3, 32, 32, dtype=dtype), F.one_hot(torch.arange(size), 10).to(dtype)
    before = traced.graphs.copy()
    assert_same(traced, model, composite(), input, start, 1e-9 if dtype == torch.float64 else 2e-4)
    assert len(traced.graphs) == 2 and before.items() <= traced.graphs.items()
    if label in ('ratio', 'symmetric'):
        _, relevance = traced(input, start)
        gap = (relevance.double().sum((1, 2, 3)) - 1).abs().max()
        assert gap < (1e-9 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize('name', ['resnet18', 'squeezenet1_1'])
def test_torchvision(name):
    '''Networks of torchvision, by ratio splitting.'''
    torch.manual_seed(0)
    model = prepare(build_torchvision(name))
    input = torch.randn(1, 3, 64, 64).double()
    assert_same(trace(model, ResNetLRP(), torch.rand_like(input)), model, ResNetLRP(), input, initial_relevance(3))


@pytest.mark.parametrize('name', ['resnest14d', 'test_convnext2', 'test_efficientnet'])
def test_timm(name):
    '''Networks of timm, by ratio splitting.'''
    torch.manual_seed(0)
    model = prepare(build_timm(name))
    input = torch.randn(1, 3, 64, 64).double()
    assert_same(trace(model, ResNetLRP(), torch.rand_like(input)), model, ResNetLRP(), input, initial_relevance(3))


@pytest.mark.parametrize('build', [
    lambda: VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=5),
    lambda: SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=5),
])
def test_transformers(build):
    '''Attention weights are known not to be negative, and what class tokens keep is part of the graph.'''
    torch.manual_seed(0)
    model = build().double().eval()
    for param in model.parameters():
        nn.init.normal_(param, std=.1)
    input, start = torch.randn(2, 3, 32, 32).double(), torch.eye(5)[:2].double()
    for composite in (ResNetLRP(), ResNetLRP(attention='half', parameters='sink')):
        traced = trace(model, composite, torch.rand_like(input))
        assert_same(traced, model, composite, input, start)
        expected = composite.sinks.total(start)
        _, relevance, *kept = traced.explain(input, start)
        assert torch.allclose(sum(kept, torch.zeros(2).double()), expected)
        if composite.attention == 'value':
            assert torch.allclose(relevance.sum((1, 2, 3)) + expected, torch.ones(2).double())


@pytest.mark.parametrize('size', [2, 3])
def test_weights_for_all_tokens(size):
    '''Weights are not there once more for each token, where tokens are what a network has first.'''
    model = VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=5).eval().requires_grad_(size == 2)
    traced = trace(model, ResNetLRP(), torch.rand(size, 3, 32, 32))
    assert sum(map(torch.numel, traced.buffers())) < 8 * sum(map(torch.numel, model.parameters()))


def test_weights_of_five_dimensions():
    '''Weights that have no layout with the channels last.'''
    torch.manual_seed(0)
    model = Function(
        lambda self, x: F.conv2d(x, self.weights[0]).mean((2, 3)), weights=nn.Parameter(torch.randn(2, 4, 3, 3, 3))
    ).double().eval()
    input = torch.randn(1, 3, 8, 8).double()
    state = torch.get_rng_state()
    traced = trace(model, ResNetLRP(), torch.ones_like(input))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(traced, model, ResNetLRP(), input, torch.eye(4)[:1].double())


@pytest.mark.parametrize('function', [
    lambda h: h.view(len(h), -1), lambda h: h.flatten(1), lambda h: F.relu_(h.flatten(1)),
    lambda h: (h.flatten(1), F.relu_(h))[0],
])
@pytest.mark.parametrize('size', [2, 3])
def test_views(function, size):
    '''Views need memory formats as they are in the network, and show what is written to the same memory.'''
    torch.manual_seed(0)
    model = Function(
        lambda self, x: self.fc(function(F.adaptive_avg_pool2d(F.max_pool2d(self.conv(x), size, 2), 2))),
        conv=nn.Conv2d(3, 8, 3, 2, 1), fc=nn.Linear(32, 5),
    ).double().eval()
    input = torch.randn(1, 3, 8, 8).double()
    assert_same(trace(model, ResNetLRP(), torch.rand_like(input)), model, ResNetLRP(), input, torch.eye(5)[:1].double())


def test_composites_of_zennit():
    '''Composites of Zennit, also with splitting at additions.'''
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    for composite in (EpsilonPlus, EpsilonPlusFlat, lambda: with_splitting(EpsilonPlusFlat())):
        assert_same(
            trace(model, composite(), torch.rand(2, 3, 8, 8).double()), model, composite(),
            torch.randn(2, 3, 8, 8).double(), torch.rand(2, 3).double(),
        )


def test_left_alone():
    '''The network, the composite, the input and the initial relevance are as before, and nothing refers to them.'''
    model, composite = network(), ResNetLRP()
    before = copy.deepcopy(model.state_dict())
    parameters = {key: (id(elem), elem.requires_grad) for key, elem in model.named_parameters()}
    input, start = torch.rand(1, 3, 32, 32).double(), torch.rand(1, 10).double()
    given = input.clone(), start.clone()
    traced = trace(model, composite, input)
    expected = traced(input, start)
    assert torch.equal(input, given[0]) and torch.equal(start, given[1])
    assert not input.requires_grad and not composite.handles
    assert all(torch.equal(elem, before[key]) for key, elem in model.state_dict().items())
    assert parameters == {key: (id(elem), elem.requires_grad) for key, elem in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    del model
    gc.collect()
    # weights are those of when it was traced, also for another shape
    assert all(map(torch.equal, traced(input, start), expected))
    output, _ = traced(input.expand(2, -1, -1, -1), start.expand(2, -1))
    assert torch.allclose(output[1:], expected[0])


def test_only_aten():
    '''A graph has aten functions only, which keep no Python, and constants instead of what is done to weights.'''
    traced = trace(network(), ResNetLRP(), torch.rand(1, 3, 32, 32).double())
    module, = traced.graphs.values()
    targets = [str(node.target) for node in module.graph.nodes if node.op == 'call_function']
    others = [name for name in targets if not name.startswith('aten.') and 'getitem' not in name]
    # the check of what the caller gives
    assert len(others) == 1 and 'start_from' in others[0]
    # the input alone has both signs
    assert not any('batch_norm' in name for name in targets) and sum('clamp' in name for name in targets) == 2


@pytest.mark.parametrize('label', ['ratio', 'symmetric', 'merge', 'epsilon', 'relative', 'block'])
def test_no_values(label):
    '''Neither rules nor the canonizer need any value: tensors without values are enough.'''
    model, composite = network(), COMPOSITES[label]()

    def attribute(input, start):
        with composite.context(model), torch.enable_grad():
            leaf = input.detach().requires_grad_()
            output = model(leaf)
            relevance, = torch.autograd.grad(output, leaf, start)
        return output.detach(), relevance

    # reading a value raises an error here
    input, start = torch.rand(2, 3, 32, 32).double(), torch.rand(2, 10).double()
    graph = make_fx(attribute, tracing_mode='fake', _allow_non_fake_inputs=True)(torch.ones_like(input), start)
    with torch.no_grad():
        _, relevance = graph(input, start)
    _, expected = eager(model, COMPOSITES[label](), input, start)
    assert torch.allclose(relevance, expected, rtol=1e-7, atol=1e-12)


class _CopyGuard(TorchDispatchMode):
    '''Raises an error where a tensor with dimensions is copied to another device, and this is waited for.'''
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].ndim and not kwargs.get('non_blocking'):
            assert args[0].device == result.device, f'copy of {tuple(args[0].shape)}'
        return result


@pytest.mark.parametrize('label', ['ratio', 'symmetric', 'merge', 'relative', 'per_position', 'block'])
def test_no_copies(label, monkeypatch):
    '''On another device, which 'meta' stands for, nothing is read and no copy is waited for.'''
    composite = COMPOSITES[label]()
    # which 'meta' does not have
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *args: False)
    model, input = network().to('meta'), torch.rand(2, 3, 32, 32, dtype=torch.double, device='meta', requires_grad=True)
    with _CopyGuard(), composite.context(model):
        output = model(input)
        relevance, = torch.autograd.grad(output, input, torch.ones_like(output))
    assert relevance.device.type == 'meta' and relevance.shape == input.shape


def test_initial_relevance():
    '''What relevance starts from may be a function of the output, which knows what rule the last layer has.'''
    model, input = network(), torch.rand(2, 3, 32, 32).double()
    for composite in (ResNetLRP, lambda: ResNetLRP(classifier='epsilon'), BlockLRP):
        traced = trace(model, composite(), input)
        for start in (initial_relevance([1, 2]), initial_relevance(3, contrast='softmax')):
            assert_same(traced, model, composite(), input, start)
    traced = trace(model, EpsilonPlus(), input)
    with pytest.raises(ValueError, match='none of this'):
        traced(input, initial_relevance(3, contrast='softmax'))
    with pytest.raises(ValueError, match=r'\(2, 9\)'):
        traced(input, torch.rand(2, 9).double())
    with pytest.raises(TypeError, match='int'):
        traced(input, 3)


@pytest.mark.parametrize('function', [
    lambda a, b: torch.stack([a, b]).mean(0), lambda a, b: torch.stack([a, b], 1).sum(1), lambda a, b: (a + b).clone(),
    lambda a, b: a.mul_(.5).add_(b), lambda a, b: torch.cat([a, b], 1)[:, ::2],
    lambda a, b: torch.maximum(a, b).view_as(a),
], ids=('mean', 'sum', 'clone', 'in place', 'slice', 'view'))
def test_output_of_heads(function):
    '''What is made of several heads at the end.'''
    torch.manual_seed(0)
    model = Function(
        lambda self, x: function(self.one(x), self.other(x)), one=nn.Linear(4, 3), other=nn.Linear(4, 3)
    ).double().eval()
    input = torch.randn(2, 4).double()
    traced = trace(model, ResNetLRP(), torch.rand_like(input))
    for start in (torch.eye(3)[:2].double(), initial_relevance([0, 2])):
        assert_same(traced, model, ResNetLRP(), input, start)


def tokens():
    '''A transformer without convolutions, of 96 tokens.'''
    return nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(32, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(),
        nn.Linear(96 * 16, 10),
    )


@pytest.mark.parametrize('build', [lambda: network().float(), tokens], ids=['convolutions', 'tokens'])
def test_rule_dtype(build):
    '''Rules in bfloat16 leave the output as it is, and change relevance by its precision.'''
    torch.manual_seed(0)
    model, input, start = build().eval(), torch.rand(2, 3, 32, 32), torch.eye(10)[:2]
    expected = trace(model, ResNetLRP(), input)(input, start)
    traced = trace(model, ResNetLRP(), input, rule_dtype=torch.bfloat16)
    output, relevance = traced(input, start)
    assert torch.equal(output, expected[0]) and relevance.dtype == torch.float32
    gap = (relevance - expected[1]).abs().sum() / expected[1].abs().sum()
    assert 1e-6 < gap < 1e-2
    assert torch.allclose(relevance.sum((1, 2, 3)), expected[1].sum((1, 2, 3)), atol=1e-2)
    with pytest.raises(ValueError, match='bfloat16'):
        export(traced, input, 'explain.onnx')
    with pytest.raises(ValueError, match='float16'):
        trace(model, ResNetLRP(), input, rule_dtype=torch.float16)


class Reading(nn.Module):
    '''A layer that a function is applied to.'''
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x):
        '''Means of the channels.'''
        return self.function(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize('name, function', {
    '__float__': lambda h: h * float(h.max() > 0),
    '__bool__': lambda h: h * 2 if h.mean() > 0 else h,
    'item': lambda h: h * (h > 0).sum().item(),
    'tolist': lambda h: h + torch.tensor(h.detach().tolist()).mean(),
    'numpy': lambda h: h + torch.from_numpy(h.detach().numpy()).mean(),
    'aten.index': lambda h: h + h[h > 0].mean(),
}.items())
def test_branches(name, function):
    '''What depends on values of the input is an error that says where.'''
    model = nn.Sequential(nn.Identity(), Reading(function)).eval()
    with pytest.raises(TypeError, match=name) as info:
        trace(model, ResNetLRP(), torch.rand(1, 3, 8, 8))
    assert '1 (Reading)' in str(info.value) or name == 'aten.index'


def test_constants_are_read():
    '''Values that have nothing to do with the input may be read.'''
    model = Reading(lambda h: h * float(torch.ones(3).sum()) if bool(torch.ones(1) > 0) else h).eval()
    input = torch.rand(1, 3, 8, 8)
    assert_same(trace(model, ResNetLRP(), input), model, ResNetLRP(), input, torch.rand(1, 4), 1e-6)


def test_errors():
    '''What is refused eagerly is refused when it is traced.'''
    input = torch.rand(1, 3, 32, 32).double()
    with pytest.raises(UnsupportedOperation, match='prod'):
        trace(Function(lambda self, x: self.conv(x).flatten(2).prod(2), conv=nn.Conv2d(3, 4, 3).double()).eval(),
              ResNetLRP(), input)
    with pytest.raises(RuntimeError, match='eval'):
        trace(network().train(), ResNetLRP(), input)
    with pytest.raises(TypeError, match='float'):
        trace(network(), ResNetLRP(), input.long())
    with pytest.raises(TypeError, match='composite'):
        trace(network(), 'resnet_lrp_ratio', input)
    with pytest.raises(TypeError, match='trace it again'):
        trace(network(), ResNetLRP(), input).float()


def test_no_autograd():
    '''Neither the mode of autograd nor that of autocast matters.'''
    model, input, start = network().float(), torch.rand(1, 3, 32, 32), torch.rand(1, 10)
    traced = trace(model, ResNetLRP(), input)
    expected = traced(input, start)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert all(map(torch.equal, traced(input, start), expected))
    assert all(map(torch.equal, traced(input.requires_grad_(), start), expected))


@pytest.mark.parametrize('label', ['ratio', 'relative', 'block'])
def test_exported(label):
    '''A traced attribution can be exported by PyTorch.'''
    torch.manual_seed(0)
    model, input, start = network(), torch.rand(1, 3, 32, 32).double(), torch.rand(1, 10).double()
    traced = trace(model, COMPOSITES[label](), input)
    exported = torch.export.export(traced, (input, start)).module()
    other = torch.randn_like(input)
    for before, after in zip(traced(other, start), exported(other, start)):
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-12)


def test_compiled():
    '''A traced attribution is compiled as a whole.'''
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    input, start = torch.rand(1, 3, 8, 8), torch.rand(1, 3)
    traced = trace(model, ResNetLRP(), input)
    compiled = torch.compile(traced, fullgraph=True, backend='aot_eager')
    for before, after in zip(traced(input, start), compiled(input, start)):
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-7)
