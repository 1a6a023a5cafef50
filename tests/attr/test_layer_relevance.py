'''Relevance at intermediate layers.'''
import gc
import threading
from functools import partial

import pytest
import torch
from captum.attr import LayerAttribution, LayerLRP, NoiseTunnel
from captum.attr._utils.lrp_rules import EpsilonRule
from helpers.networks import UserNetwork, narrow_resnet18, randomize
from helpers.state import assert_state, in_threads, resident, state_of
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, LayerMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon, Pass
from zennit.types import Activation

from captum_adapters.attr import CompositeAttribution, LayerRelevance, ResNetLRP
from zennit_resnet import BlockLRP, RelativeLRP, composites, initial_relevance, with_splitting
from zennit_resnet.canonizers import ResidualCanonizer
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.rules import PassThrough

COMPOSITES = {
    'ratio': composites.ResNetLRP,
    'symmetric': partial(composites.ResNetLRP, splitting='symmetric'),
    'epsilon_plus': lambda: with_splitting(EpsilonPlus()),
    'relative': RelativeLRP,
    'block': BlockLRP,
}
each_composite = pytest.mark.parametrize('composite', COMPOSITES.values(), ids=COMPOSITES)


def network():
    '''A residual network with in-place operations, modules that are called twice, and functions.'''
    return randomize(UserNetwork()).double().eval()


def resnet():
    '''A residual network of torchvision.'''
    return randomize(narrow_resnet18(num_classes=5)).double().eval()


def images(size=12):
    '''A batch of inputs.'''
    return torch.randn(2, 3, size, size, dtype=torch.float64)


class Plain(torch.nn.Module):
    '''A residual network without in-place operations, which keeps gradients of its inner tensors.'''
    def __init__(self, inplace=False):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(6)
        self.relu = torch.nn.ReLU(inplace=inplace)
        self.conv = torch.nn.Conv2d(6, 6, 3, padding=1)
        self.last = torch.nn.ReLU(inplace=inplace)
        self.head = torch.nn.Linear(6, 4)
        self.inplace = inplace
        self.kept = {}

    def keep(self, name, tensor):
        '''Have a gradient kept, which makes a copy of its own in the graph.'''
        if not self.inplace and tensor.requires_grad:
            tensor = tensor.clone()
            tensor.retain_grad()
            self.kept[name] = tensor
        return tensor

    def forward(self, x):
        '''Logits.'''
        x = self.keep('norm', self.norm(self.keep('stem', self.stem(x))))
        x = self.keep('relu', self.relu(x))
        out = self.keep('conv', self.conv(x))
        if self.inplace:
            out += x
        else:
            out = self.keep('addition', out + x)
        x = self.keep('last', self.last(out))
        return self.keep('head', self.head(x.mean((2, 3))))


def plain(inplace):
    '''The network in both ways, with the same parameters.'''
    model = randomize(Plain(inplace)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return model


# -- values ------------------------------------------------------------------------------------------------------------

@each_composite
def test_outputs(composite):
    '''Relevance of outputs is the gradient which PyTorch keeps there, also where networks work in place.'''
    model, x = plain(False), images()
    rules = composite()
    with rules.context(model):
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        output.backward(initial_relevance([1, 2])(output))
    values = {name: tensor.detach() for name, tensor in model.kept.items()}
    factors = values if composite is BlockLRP else dict.fromkeys(values, 1)
    expected = {name: tensor.grad * factors[name] for name, tensor in model.kept.items()}
    # outside of the network, it is relevance
    names = ['stem', 'norm', 'relu', 'conv', 'last', 'head']
    assert {*names, 'addition'} == expected.keys() and all(expected[name].any() for name in names)
    for other in (model, plain(True)):
        found = LayerRelevance(other, names, composite()).attribute(x, target=[1, 2])
        # the stabilizer of the block rule is added to what an in-place addition has changed
        tolerance = 1e-5 if composite is BlockLRP and other is not model else 1e-12
        for name, relevance in zip(names, found):
            assert torch.allclose(relevance, expected[name], rtol=0, atol=tolerance * expected[name].abs().max()), name
        if composite is not BlockLRP:
            addition = LayerRelevance(other, 'addition', composite()).attribute(x, target=[1, 2])
            assert torch.allclose(addition, expected['addition'], rtol=1e-9)


@each_composite
@pytest.mark.parametrize('inplace', [False, True])
def test_inputs(composite, inplace):
    '''Relevance of inputs is what the layer propagates to them, and not what others do.'''
    model, x = plain(inplace), images()
    names = ['stem', 'norm', 'relu', 'conv', 'last', 'head']

    def get(layers, of_input):
        return LayerRelevance(model, layers, composite()).attribute(
            x, target=[1, 2], attribute_to_layer_input=of_input
        )

    stem, norm, relu, conv, _, head = get(names, True)
    outputs = dict(zip(names, get(names, False)))
    assert torch.allclose(stem, get([model], True)[0]) or composite is BlockLRP
    assert torch.equal(norm, outputs['stem']) and torch.equal(relu, outputs['norm'])
    attributions = CompositeAttribution(model, composite()).attribute(x, target=[1, 2])
    assert torch.allclose(stem, attributions, rtol=1e-9)
    assert torch.equal(get(model, True), attributions)
    assert head.shape == (2, 6)
    if composite is BlockLRP:
        # continued by the gradient: the skip connection has the rest
        assert not torch.allclose(conv, outputs['relu'])
        return
    residual, skip = get('addition', True)
    assert torch.equal(residual, outputs['conv'])
    if composite is not RelativeLRP:
        assert torch.allclose(conv + skip, outputs['relu'], rtol=1e-9, atol=1e-15)
        assert torch.allclose(residual + skip, get('addition', False), rtol=1e-9, atol=1e-15)


def test_block_closed_form():
    '''Without stabilizer, relevance of the block rule is z * dy/dz * R / (y - b) at every tensor z.'''
    model, x = plain(False), images()
    output = model(x)
    tensors = {name: model.kept[name] for name in ('stem', 'norm', 'relu', 'conv', 'last')}
    gradients = torch.autograd.grad(output[[0, 1], [1, 2]].sum(), list(tensors.values()))
    chosen = output[[0, 1], [1, 2]].detach()
    scale = (chosen / (chosen - model.head.bias[[1, 2]].detach())).view(2, 1, 1, 1)
    found = LayerRelevance(model, list(tensors), BlockLRP(epsilon=0.)).attribute(x, target=[1, 2])
    for relevance, gradient, tensor in zip(found, gradients, tensors.values()):
        assert torch.allclose(relevance, gradient * tensor.detach() * scale)
    of_input, delta = LayerRelevance(model, 'relu', BlockLRP(epsilon=0.)).attribute(
        x, target=[1, 2], attribute_to_layer_input=True, return_convergence_delta=True
    )
    assert torch.allclose(of_input, gradients[1] * tensors['norm'].detach() * scale)
    assert torch.allclose(delta, chosen - of_input.sum((1, 2, 3)))


def test_against_captum():
    '''The epsilon rule gives what Captum's LayerLRP gives, on a network which it supports.'''
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(4, 5, 1),
    ).double()
    x, target = images(), [(1, 0, 0), (2, 0, 0)]
    composite = LayerMapComposite([
        (Activation, Pass()), ((torch.nn.Conv2d, torch.nn.AdaptiveAvgPool2d), Epsilon(1e-9)),
    ])
    layers = [model[0], model[2], model[4], model[5]]
    results = []
    for of_input in (False, True):
        results.append(LayerRelevance(model, layers, composite).attribute(
            x, target, return_convergence_delta=True, attribute_to_layer_input=of_input
        ))
    for of_input, (found, deltas) in zip((False, True), results):
        for layer in layers:
            layer.rule = EpsilonRule(1e-9)
        expected, expected_deltas = LayerLRP(model, layers).attribute(
            x, target, return_convergence_delta=True, attribute_to_layer_input=of_input
        )
        for actual, reference in zip((*found, *deltas), (*expected, *expected_deltas)):
            # Captum gives inputs in tuples
            reference = reference[0] if isinstance(reference, (tuple, list)) else reference
            assert torch.allclose(actual, reference.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('composite', [COMPOSITES['ratio'], COMPOSITES['epsilon_plus'], COMPOSITES['block']])
def test_ledger(composite):
    '''Sums are those of the ledger, at all blocks and layers.'''
    model, x = resnet(), images(40)
    ledger = conservation_ledger(model, x, composite(), target=[1, 2])
    blocks = [f'layer{stage}.{num}' for stage in range(1, 5) for num in range(2)]
    names = [*blocks, 'layer2.0.downsample', 'conv1', 'maxpool', 'fc']
    if composite is not COMPOSITES['block']:
        names += [f'{name}.addition' for name in blocks]
        names += [f'{name}.conv1' for name in blocks]
    for of_input in (False, True):
        found = LayerRelevance(model, names, composite()).attribute(
            x, target=[1, 2], attribute_to_layer_input=of_input
        )
        for name, relevance in zip(names, found):
            rows = [row for row in (*ledger.rows, *ledger.blocks) if row.name == name]
            if len(rows) != 1:
                # where the ledger does not tell a layer from its neighbours
                assert composite is COMPOSITES['block'], name
                continue
            relevance = relevance if isinstance(relevance, tuple) else (relevance,)
            total = sum(elem.sum((*range(1, elem.ndim),)) for elem in relevance)
            assert torch.allclose(total, rows[0].leaves if of_input else rows[0].arrives, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
def test_blocks_conserve(splitting):
    '''All relevance passes each block and what is between them.'''
    model, x = resnet(), images(40)
    names = ['conv1', 'bn1', 'relu', 'maxpool', *(f'layer{stage}.{num}' for stage in range(1, 5) for num in range(2)),
             'layer3', 'layer4.1.addition', 'layer4.1.relu#2', 'avgpool', 'fc', model]
    for of_input in (False, True):
        relevance, deltas = LayerRelevance(model, names, composites.ResNetLRP(splitting)).attribute(
            x, target=3, return_convergence_delta=True, attribute_to_layer_input=of_input
        )
        scale = model(x)[:, 3].detach().abs().max()
        assert len(relevance) == len(deltas) == len(names)
        assert all(delta.shape == (2,) and bool((delta.abs() < 1e-9 * scale).all()) for delta in deltas)


def test_shipped_network():
    '''Sums at all blocks of the shipped ResNet-50 are those of the ledger, and shapes those of heatmaps.'''
    from pathlib import Path

    from PIL import Image

    from zennit_resnet.models import load_classifier
    classifier = load_classifier()
    path = Path(__file__).parent.parent.parent / 'examples' / 'assets' / 'photos' / 'gc_cathedral.jpg'
    x = classifier.transform(Image.open(path).convert('RGB'))[None]
    target = int(classifier.model(x).argmax())
    names = [f'layer{stage}.{num}' for stage, count in enumerate((3, 4, 6, 3), 1) for num in range(count)]
    method = LayerRelevance(classifier.model, [*names, 'bn1'])
    relevance, deltas = method.attribute(x, target, return_convergence_delta=True)
    ledger = conservation_ledger(classifier.model, x, composites.ResNetLRP(), target=target)
    scale = float(ledger.initial)
    for name, elem, delta in zip(names, relevance, deltas):
        arrives, = (float(row.arrives) for row in ledger.find(name))
        assert abs(float(elem.sum()) - arrives) < 1e-4 * scale and abs(float(delta)) < 1e-4 * scale
    assert [elem.shape[-1] for elem in relevance[::3]] == [56, 28, 28, 14, 14, 7] and relevance[-1].shape[-1] == 112


# -- layers ------------------------------------------------------------------------------------------------------------

def test_single_and_list():
    '''A tensor for a layer, a list for a list.'''
    model, x = network(), images()
    single = LayerRelevance(model, model.stem).attribute(x, target=1)
    by_name = LayerRelevance(model, 'stem').attribute(x, target=1)
    listed = LayerRelevance(model, [model.stem]).attribute(x, target=1)
    assert torch.equal(single, by_name) and isinstance(listed, list) and torch.equal(listed[0], single)
    twice, delta = LayerRelevance(model, ['stem', model.stem]).attribute(x, 1, return_convergence_delta=True)
    assert len(twice) == len(delta) == 2 and all(torch.equal(elem, single) for elem in twice)
    assert LayerRelevance(model, 'stem').attribute(x, 1, None, True)[1].shape == (2,)
    assert LayerRelevance(model, []).attribute(x, target=1) == []


def test_tuples():
    '''Layers with several inputs or outputs give tuples, and a layer may return its input.'''
    class Pair(torch.nn.Module):
        '''Returns its input, and features of it in a nested way.'''
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x):
            '''Several tensors. One has no relevance.'''
            return x, {'features': self.conv(x), 'count': 3, 'index': torch.zeros(2, dtype=torch.long)}

    class Model(torch.nn.Module):
        '''Adds them.'''
        def __init__(self):
            super().__init__()
            self.pair = Pair()
            self.identity = torch.nn.Identity()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            '''Logits.'''
            x, other = self.pair(self.identity(x))
            return self.head((x + other['features']).mean((2, 3)))

    model, x = Model().double(), images()
    first, second = LayerRelevance(model, 'pair').attribute(x, target=1)
    left, right = LayerRelevance(model, 'addition').attribute(x, target=1, attribute_to_layer_input=True)
    conv, identity = LayerRelevance(model, ['pair.conv', 'identity']).attribute(
        x, target=1, attribute_to_layer_input=True
    )
    total = ResNetLRP(model).attribute(x, target=1)
    assert torch.equal(second, right) and torch.allclose(first, left + conv) and torch.allclose(first, total)
    # all of it counts, as it is the same tensor
    assert torch.equal(identity, total)
    assert torch.equal(LayerRelevance(model, 'pair').attribute(x, 1, attribute_to_layer_input=True), total)


def test_same_tensor():
    '''What a layer takes or returns several times counts once.'''
    class Same(torch.nn.Module):
        '''Returns features twice.'''
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 8)

        def forward(self, x):
            '''A tensor under two names.'''
            x = self.linear(x)
            return {'first': x, 'last': x}

    class Model(torch.nn.Module):
        '''Self-attention, with a skip connection.'''
        def __init__(self):
            super().__init__()
            self.same = Same()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x):
            '''Logits.'''
            x = self.same(x)['first']
            return self.head((x + self.attention(x, x, x)[0]).mean(1))

    model, x = Model().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    logits = model(x)[:, 1]
    both, delta = LayerRelevance(model, 'same').attribute(x, 1, return_convergence_delta=True)
    assert both.shape == (2, 5, 8) and torch.allclose(both.sum((1, 2)), logits) and delta.abs().max() < 1e-9
    inside = LayerRelevance(model, 'attention').attribute(x, 1, attribute_to_layer_input=True)
    skip, branch = LayerRelevance(model, 'addition').attribute(x, 1, attribute_to_layer_input=True)
    assert inside.shape == both.shape and torch.allclose(skip + inside, both)
    assert torch.allclose(inside.sum((1, 2)), branch.sum((1, 2)))


def test_aliases():
    '''A module with several names has any of them.'''
    model, x = network(), images()
    model.alias = model.stem
    expected = LayerRelevance(model, model.stem).attribute(x, target=1)
    for name in ('stem', 'alias', 'alias#1'):
        assert torch.equal(LayerRelevance(model, name).attribute(x, target=1), expected)


def test_calls_of_others():
    '''What another thread runs meanwhile does not count.'''
    model, x = network(), images()
    expected = LayerRelevance(model, 'stem').attribute(x, target=1)
    inner = []

    def run():
        with torch.no_grad():
            inner.append(model.stem(x))

    def start(module, args, output):
        if not inner:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join(60)

    model.norm.register_forward_hook(start)
    for of_input in (False, True):
        inner.clear()
        found = LayerRelevance(model, 'stem').attribute(x, target=1, attribute_to_layer_input=of_input)
        assert len(inner) == 1 and (of_input or torch.equal(found, expected))


def test_calls():
    '''A module that is called several times has a number for each call.'''
    model, x = network(), images()
    first, second = LayerRelevance(model, ['block#1', 'block #2']).attribute(x, target=1)
    assert not torch.equal(first, second)
    expected = LayerRelevance(model, 'relu#2').attribute(x, target=1, attribute_to_layer_input=True)
    assert torch.equal(first, expected)
    message = r"'block' is called 2 times: choose one by its name, from 'block#1' to 'block#2'"
    for layer in (model.block, 'block'):
        with pytest.raises(ValueError, match=message):
            LayerRelevance(model, layer).attribute(x, target=1)
    with pytest.raises(ValueError, match="'block#3' does not exist, there are 2 calls"):
        LayerRelevance(model, 'block#3').attribute(x, target=1)
    assert LayerRelevance(model, 'stem#1').attribute(x, target=1).any()


def test_operations():
    '''Operations that are found while a network runs, by their names.'''
    model, x = network(), images()
    names = ['addition', 'addition_1', 'addition_2', 'addition_3', 'block.addition', 'block.addition_1', 'average_pool']
    found = LayerRelevance(model, names).attribute(x, target=1, attribute_to_layer_input=True)
    assert all(len(elem) == 2 for elem in found[:6]) and found[6].shape == (2, 8, 6, 6)
    ledger = conservation_ledger(model, x, composites.ResNetLRP(), target=1)
    for name, elem in zip(names, found[:6]):
        expected, = (row.leaves for row in ledger.rows if row.name == name)
        assert torch.allclose(sum(part.sum((1, 2, 3)) for part in elem), expected, rtol=1e-9)
    assert not any('addition' in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="'aditon' did not run, as nothing has this name: did you mean 'addition"):
        LayerRelevance(model, 'aditon').attribute(x, target=1)
    with pytest.raises(ValueError, match=r"'addition' did not run, .*: choose one of 'stem', .*, \.\.\.$"):
        LayerRelevance(model, 'addition', BlockLRP()).attribute(x, target=1)


def test_unreached():
    '''Layers which relevance does not reach have none.'''
    class Model(torch.nn.Module):
        '''Has a gate, and a path that is not used.'''
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.fc = torch.nn.Conv2d(3, 3, 1)
            self.gate = torch.nn.Sigmoid()
            self.constant = torch.nn.Linear(2, 1)
            self.unused = torch.nn.ReLU()
            self.last = torch.nn.Identity()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            '''Logits.'''
            x = self.conv(x)
            self.unused(x)
            x = x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))
            return self.head(x.mean((2, 3)) * self.constant(torch.ones(len(x), 2).to(x)))

    model, x = Model().double(), images()
    for of_input in (False, True):
        gate, constant, unused, conv = LayerRelevance(model, [model.fc, 'constant', 'unused', 'conv']).attribute(
            x, target=1, attribute_to_layer_input=of_input
        )
        assert conv.any() and not gate.any() and not constant.any() and not unused.any()
        assert gate.shape == (2, 3, 1, 1) and constant.shape == (2, 2 if of_input else 1) and unused.shape == x.shape
    with pytest.raises(ValueError, match=r"'last' did not run\."):
        LayerRelevance(model, model.last).attribute(x, target=1)


def test_inside_of_rule():
    '''There is no relevance inside of a module with a rule as a whole.'''
    class Wrapper(torch.nn.Sequential):
        '''Gets a rule as a whole.'''

    model = torch.nn.Sequential(Wrapper(torch.nn.Tanh()), torch.nn.Flatten(), torch.nn.Linear(432, 2)).double()
    composite = composites.ResNetLRP(layer_map=[(Wrapper, PassThrough())])
    assert LayerRelevance(model, '0', composite).attribute(images(), target=1).any()
    with pytest.raises(RuntimeError, match="no relevance of '0.0'.*module with a rule for all that it contains"):
        LayerRelevance(model, '0.0', composite).attribute(images(), target=1)


@pytest.mark.parametrize('layer, error, message', [
    (3, TypeError, 'layer=3'),
    (None, TypeError, 'layer=None'),
    (('stem', 'head'), TypeError, 'must be in a list'),
])
def test_bad_layers(layer, error, message):
    '''Messages name what is wrong.'''
    with pytest.raises(error, match=message):
        LayerRelevance(network(), layer)


def test_bad_calls():
    '''Messages name what is wrong, and nothing remains.'''
    model, x = network(), images()
    state, hooks = state_of(model), dict(torch.nn.modules.module._global_forward_pre_hooks)
    for layer, error, message in (
        (torch.nn.ReLU(), ValueError, 'layer ReLU is not part of the model UserNetwork'),
        ('stem.weight', ValueError, '\'stem.weight\' did not run'),
        # of a wrapped network, whose names begin after the wrapper's
        ('module.stem', ValueError, "as nothing has this name: did you mean 'stem'\\?$"),
        ('module.addition', ValueError, "did you mean 'addition'\\?$"),
        ('?', ValueError, "as nothing has this name: choose one of 'stem', "),
    ):
        with pytest.raises(error, match=message):
            LayerRelevance(model, layer).attribute(x, target=1)
    flat = torch.nn.Sequential(torch.nn.Flatten(0, 1), torch.nn.Unflatten(0, (2, 3)), torch.nn.Flatten(),
                               torch.nn.Linear(432, 5)).double()
    with pytest.raises(ValueError, match=r"layer '0' has an output of shape \(6, 12, 12\), which has no row"):
        LayerRelevance(flat, '0').attribute(x, target=1)

    class Loud(torch.nn.Module):
        '''Returns text.'''
        def forward(self, x, *, other):
            '''Nothing.'''
            return 'text'

    class Model(UserNetwork):
        '''Calls it.'''
        def __init__(self):
            super().__init__()
            self.loud = Loud()

        def forward(self, x):
            '''Logits.'''
            self.loud(x.long(), other=x)
            return super().forward(x)

    loud = randomize(Model()).double().eval()
    with pytest.raises(TypeError, match="'loud' has no output of floating point numbers"):
        LayerRelevance(loud, 'loud').attribute(x, target=1)
    with pytest.raises(TypeError, match="'loud' has no input of floating point numbers"):
        LayerRelevance(loud, 'loud').attribute(x, target=1, attribute_to_layer_input=True)
    handle = model.head.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LayerRelevance(model, ['stem', 'addition']).attribute(x, target=1)
    handle.remove()
    with pytest.raises(ValueError, match='out of range'):
        LayerRelevance(model, 'stem').attribute(x, target=9)
    assert_state(model, state)
    assert dict(torch.nn.modules.module._global_forward_pre_hooks) == hooks


# -- as attributions of Captum -----------------------------------------------------------------------------------------

def test_settings():
    '''Initial relevance, targets and names are those of other attributions.'''
    model, x = network(), images()
    method = LayerRelevance(model, model.norm, 'resnet_lrp_symmetric', 'softmax')
    assert isinstance(method, LayerAttribution) and isinstance(method, CompositeAttribution)
    assert method.layer is model.norm and method.forward_func is model and method.get_name() == 'Layer Relevance'
    seed = initial_relevance([1, 2], 'softmax')
    with Gradient(model=model, composite=composites.ResNetLRP('symmetric')) as attributor:
        output, _ = attributor(x, seed)
    relevance, delta = LayerRelevance(model, 'relu#1', initial_relevance='softmax').attribute(
        x, target=torch.tensor([1, 2]), return_convergence_delta=True
    )
    assert torch.allclose(relevance.sum((1, 2, 3)), seed(output).sum(1)) and delta.abs().max() < 1e-12
    assert method.attribute((x,), target=[1, 2]).shape == (2, 8, 6, 6)


@pytest.mark.parametrize('of_input', [False, True])
def test_chunks(of_input):
    '''Chunks give the same.'''
    model, x = network(), torch.randn(5, 3, 12, 12, dtype=torch.float64)
    method = LayerRelevance(model, ['stem', 'addition', 'block#2'])
    kwargs = {'target': [0, 1, 2, 3, 4], 'return_convergence_delta': True, 'attribute_to_layer_input': of_input}
    expected, deltas = method.attribute(x, **kwargs)
    chunked, chunked_deltas = method.attribute(x, **kwargs, internal_batch_size=2)
    assert isinstance(chunked[1], tuple) == of_input
    for actual, reference in zip((*chunked, *chunked_deltas), (*expected, *deltas)):
        for first, second in zip(*(elem if isinstance(elem, tuple) else (elem,) for elem in (actual, reference))):
            assert torch.allclose(first, second, rtol=1e-9, atol=1e-13)


def test_wrapped():
    '''Layers of wrapped models are given as modules, or by the names inside.'''
    model, x = network(), images()
    wrapped = torch.nn.DataParallel(model)
    expected = LayerRelevance(model, ['norm', 'addition', model]).attribute(x, target=1)
    for layers in (['norm', 'addition', wrapped], [model.norm, 'addition', model]):
        found = LayerRelevance(wrapped, layers).attribute(x, target=1)
        assert all(map(torch.equal, found, expected))


def test_modes_and_inputs():
    '''Works without gradients, and changes nothing.'''
    model, x = network(), images()
    state = state_of(model)
    expected = LayerRelevance(model, 'norm').attribute(x, target=1)
    with torch.inference_mode():
        assert torch.equal(LayerRelevance(model, 'norm').attribute(x * 1, target=1), expected)
    with torch.no_grad():
        found = LayerRelevance(model, 'norm').attribute(x, target=1, attribute_to_layer_input=True)
    assert found.any() and not found.requires_grad and not x.requires_grad and not expected.requires_grad
    assert_state(model, state)


def test_interpolate_and_noise():
    '''Interpolation and noise tunnels of Captum.'''
    model, x = network(), images()
    method = LayerRelevance(model, 'norm')
    heatmap = method.attribute(x, target=1).sum(1, keepdim=True)
    assert LayerAttribution.interpolate(heatmap, (12, 12), 'bilinear').shape == (2, 1, 12, 12)
    torch.manual_seed(0)
    smooth, delta = NoiseTunnel(method).attribute(
        x, nt_samples=3, stdevs=.1, target=[1, 2], return_convergence_delta=True
    )
    assert smooth.shape == (2, 8, 6, 6) and delta.shape == (6,)


def test_plain_composites():
    '''A composite without rules gives the gradient, and one with Zennit's surrogates has its own names.'''
    model, x = plain(False), images()
    gradient = LayerRelevance(model, 'conv', Composite()).attribute(x, target=1)
    output = model(x)
    expected, = torch.autograd.grad(output[:, 1], model.kept['conv'], output[:, 1].detach())
    assert torch.allclose(gradient, expected)
    composite = EpsilonPlus(canonizers=[ResidualCanonizer()])
    assert LayerRelevance(model, 'addition', composite).attribute(x, target=1).any()


def test_threads():
    '''Threads do not see the calls of others.'''
    models, x = [network(), network()], images()
    with torch.no_grad():
        models[1].stem.weight.mul_(2)
    methods = [LayerRelevance(model, ['norm', 'addition_1']) for model in (*models, models[0])]
    expected = [method.attribute(x, target=1) for method in methods]

    def repeat(index):
        return [methods[index].attribute(x, target=1) for _ in range(6)]

    for index, results in enumerate(in_threads(*(partial(repeat, index) for index in range(3)))):
        assert isinstance(results, list), results
        assert all(torch.equal(*pair) for result in results for pair in zip(result, expected[index]))


@pytest.mark.parametrize('of_input', [False, True])
def test_memory(of_input):
    '''Nothing accumulates over 500 calls.'''
    try:
        resident()
    except OSError:
        pytest.skip('resident memory is not known here')
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                                   torch.nn.Linear(144, 2)), torch.randn(1, 3, 8, 8)
    method = LayerRelevance(model, ['0', '1'])
    for _ in range(50):
        method.attribute(x, target=1, attribute_to_layer_input=of_input)
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    for _ in range(500):
        method.attribute(x, target=1, attribute_to_layer_input=of_input)
    gc.collect()
    assert resident() - before < 20 and len(gc.get_objects()) - objects < 500


# -- integers ----------------------------------------------------------------------------------------------------------

class Text(torch.nn.Module):
    '''A residual network on indices of words.'''
    def __init__(self):
        super().__init__()
        self.embedding, self.position = torch.nn.Embedding(20, 6), torch.nn.Embedding(9, 6)
        self.first, self.second = (torch.nn.Conv1d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.head = torch.nn.Linear(6, 4, bias=False)

    def forward(self, words, scale=None):
        '''Logits.'''
        return self.from_embedding(self.embedding(words), scale)

    def from_embedding(self, x, scale=None):
        '''Logits of what the embedding returns, which is changed in place.'''
        x = x.clone() if x.is_leaf else x
        x += self.position(torch.arange(x.shape[1]))
        x = self.first(x.movedim(1, 2)).relu()
        x = x + self.second(x).relu()
        return self.head(x.mean(2)) if scale is None else self.head(x.mean(2)) * scale


class Behind(torch.nn.Module):
    '''The part of a network that follows its embedding.'''
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        '''Logits.'''
        return self.model.from_embedding(x)


@pytest.mark.parametrize('composite', ['resnet_lrp_ratio', 'resnet_lrp_symmetric', 'relative_lrp', 'epsilon_plus'])
@pytest.mark.parametrize('frozen', [False, True])
def test_embedding(composite, frozen):
    '''Relevance of an embedding is that of the input of all that follows.'''
    model = randomize(Text()).double().eval().requires_grad_(not frozen)
    words = torch.randint(0, 20, (3, 9))
    embedded = model.embedding(words).detach()
    expected = CompositeAttribution(Behind(model), composite).attribute(embedded, target=[1, 2, 3])
    state = state_of(model)
    for layer in ('embedding', model.embedding):
        method = LayerRelevance(model, layer, composite)
        relevance, delta = method.attribute(words, target=[1, 2, 3], return_convergence_delta=True)
        assert relevance.shape == (3, 9, 6) and expected.any()
        assert torch.allclose(relevance, expected, rtol=1e-9, atol=1e-12)
        if composite.startswith('resnet'):
            assert delta.abs().max() < 1e-9
        assert torch.equal(method.attribute(words.int(), target=[1, 2, 3], internal_batch_size=2), relevance)
    # further layers, their inputs, and layers in a branch, where the other branch has its share
    several = LayerRelevance(model, ['embedding', 'first', 'head'], composite).attribute(words, target=[1, 2, 3])
    assert torch.allclose(several[0], expected) and several[1].any() and several[2].shape == (3, 4)
    inputs = LayerRelevance(model, model.first, composite).attribute(
        words, target=[1, 2, 3], attribute_to_layer_input=True
    )
    assert inputs.shape == (3, 6, 9) and inputs.any()
    alone = LayerRelevance(model, 'second', composite).attribute(words, target=[1, 2, 3])
    assert torch.allclose(alone, LayerRelevance(model, ['embedding', 'second'], composite).attribute(
        words, target=[1, 2, 3]
    )[1])
    with pytest.raises(TypeError, match='no input of floating point'):
        LayerRelevance(model, 'embedding', composite).attribute(words, target=1, attribute_to_layer_input=True)
    assert_state(model, state)


def test_integers_without_module():
    '''If a function embeds them, nothing could have its share but the layer itself, so this is an error.'''
    class Functional(Text):
        '''Embeds by a function.'''
        def forward(self, words):
            '''Logits.'''
            return self.from_embedding(torch.nn.functional.embedding(words, self.embedding.weight))

    model, words = randomize(Functional()).double().eval(), torch.randint(0, 20, (3, 9))
    for layer, of_input in (('second', False), ('second', True), ('first', True)):
        with pytest.raises(RuntimeError, match=f"no relevance of '{layer}'"):
            LayerRelevance(model, layer).attribute(words, target=1, attribute_to_layer_input=of_input)
    inside = torch.nn.Sequential(model)
    inside[0].requires_grad_(False)
    assert LayerRelevance(inside, '0').attribute(words, target=1).any()


def test_embedding_of_blocks():
    '''BlockLRP is the gradient times the embedding, which sums to the logit without biases and positions.'''
    model = randomize(Text()).double().eval()
    model.position.weight.data.zero_()
    words = torch.randint(0, 20, (3, 9))
    relevance = LayerRelevance(model, 'embedding', composites.BlockLRP(epsilon=0.)).attribute(words, target=2)
    embedded = model.embedding(words).detach().requires_grad_()
    gradient, = torch.autograd.grad(model.from_embedding(embedded)[:, 2].sum(), embedded)
    assert torch.allclose(relevance, embedded.detach() * gradient, rtol=1e-6, atol=1e-12)
