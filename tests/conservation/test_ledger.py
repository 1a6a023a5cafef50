'''Tests for the conservation ledger.'''
import csv
import gc
import inspect
import json
import math
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from golden_cases import golden_cases, tensor
from helpers.golden import FIRST_LAYER, build_network
from helpers.ledger import check_sums
from helpers.networks import CifarResNet, UserNetwork, narrow_resnet18, randomize
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as torch_module
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet
from zennit import rules
from zennit.attribution import Gradient
from zennit.canonizers import Canonizer
from zennit.composites import (
    COMPOSITES,
    EpsilonAlpha2Beta1,
    EpsilonGammaBox,
    EpsilonPlus,
    LayerMapComposite,
    NameMapComposite,
)
from zennit.core import BasicHook, Composite
from zennit.torchvision import ResNetCanonizer

from zennit_resnet import initial_relevance
from zennit_resnet.canonizers import UnsupportedOperation
from zennit_resnet.cli import main
from zennit_resnet.composites import BlockLRP, RelativeLRP, ResNetLRP, with_splitting
from zennit_resnet.conservation import assert_conserved, conservation_ledger
from zennit_resnet.conservation.losses import CAUSES
from zennit_resnet.methods import Method
from zennit_resnet.models import load_classifier
from zennit_resnet.rules import BlockEpsilon, ZPlus


def tiny_resnet(num_blocks=1, classes=3):
    '''A ResNet of basic blocks with a stage of a single one each, in double precision.'''
    torch.manual_seed(1)
    model = randomize(ResNet(BasicBlock, [num_blocks] * 4, num_classes=classes)).double().eval()
    with torch.no_grad():
        # logits of comparable size
        model.fc.bias.copy_(torch.linspace(1, 2, classes))
    return model


NETWORKS = {
    'resnet': tiny_resnet,
    'user': lambda: randomize(UserNetwork(classes=3)).double().eval(),
    'cifar': lambda: randomize(CifarResNet(1)).double().eval(),
    'densenet': lambda: randomize(get_model('densenet121', num_classes=3)).double().eval(),
    'mobilenet': lambda: randomize(get_model('mobilenet_v3_small', num_classes=3)).double().eval(),
}
COMPOSITE = {
    'resnet_lrp': ResNetLRP,
    'resnet_lrp_merge': lambda: ResNetLRP('symmetric', batch_norm='merge', dead_units='drop', stabilizer=.1),
    'epsilon_plus': EpsilonPlus,
    'epsilon_plus+zennit': lambda: EpsilonPlus(canonizers=[ResNetCanonizer()]),
    'epsilon_gamma_box+ratio': lambda: with_splitting(EpsilonGammaBox(low=-3., high=3.)),
    'epsilon_alpha2_beta1': EpsilonAlpha2Beta1,
    'block_lrp': lambda: BlockLRP(epsilon=1e-3),
    'relative_lrp': RelativeLRP,
    'input_x_gradient': lambda: None,
}


def build(network):
    '''The same network each time.'''
    torch.manual_seed(1)
    return NETWORKS[network]()


def close(actual, expected, tolerance=1e-10):
    '''Whether relevance is equal, relative to the largest value, or to one.'''
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    assert actual.shape == expected.shape
    return bool(((actual - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all())


# -- measurement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('network, composite', [
    (network, composite) for network in NETWORKS for composite in COMPOSITE
    # large networks take long
    if network not in ('densenet', 'mobilenet') or composite in ('resnet_lrp', 'block_lrp')
])
def test_adds_up(network, composite):
    '''Rows add up, blocks are the sum of what is inside, and relevance is exactly that without a ledger.'''
    model, input = build(network), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, COMPOSITE[composite](), target=[1, 2])
    assert torch.equal(ledger.initial, ledger.output.gather(1, torch.tensor([[1], [2]]))[:, 0])
    assert torch.equal(ledger.scale, ledger.initial.abs())
    assert close(ledger.final, ledger.relevance.sum((1, 2, 3)), 1e-8)
    check_sums(ledger)
    for block in ledger.blocks:
        inside = [row for row in ledger if row.name == block.name or row.name.startswith(f'{block.name}.')]
        if block.call == 0:
            lost = sum(row.lost for row in inside)
            scale = sum(row.arrives_magnitude for row in inside)
            assert bool(((lost - block.lost).abs() <= 1e-9 * scale).all())
    if composite != 'input_x_gradient':
        _, expected = Gradient(model=build(network), composite=COMPOSITE[composite]())(
            input.clone(), initial_relevance([1, 2])
        )
        assert torch.equal(ledger.relevance, expected)


@pytest.mark.parametrize('network', ['resnet', 'user'])
def test_conserving(network):
    '''Ratio splitting with z+ conserves relevance in every layer.'''
    model, input = build(network), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = assert_conserved(model, input, ResNetLRP(), target=1, tolerance=1e-10)
    assert float(ledger.deviation().max()) < 1e-12
    assert all(float(value.abs().max()) < 1e-12 for value in ledger.lost_by.values())


class Probe:
    '''Gradients at the inputs and outputs of modules, by hooks on tensors.'''
    def __init__(self, model, names):
        self.sums = {}
        modules = dict(model.named_modules())
        self.handles = [handle for name in names for handle in (
            modules[name].register_forward_pre_hook(
                lambda module, args, name=name: self.keep(args[0], name, 'leaves'), prepend=True
            ),
            modules[name].register_forward_hook(
                lambda module, args, output, name=name: self.keep(output, name, 'arrives')
            ),
        )]

    def keep(self, value, name, side):
        '''Sum up the gradient of a tensor.'''
        value.register_hook(lambda grad: self.sums.__setitem__((name, side), grad.double().flatten(1).sum(1)))

    def remove(self):
        '''Remove all hooks of modules.'''
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize('composite', ['epsilon_gamma_box+ratio', 'resnet_lrp', 'epsilon_plus+zennit'])
def test_arrives_and_leaves(composite):
    '''What arrives at a layer or block is the gradient of its output, what leaves that of its input.'''
    model, input = tiny_resnet(2), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    names = ['maxpool', 'layer1', 'layer2.0', 'layer2.1', 'layer3.1', 'layer4', 'avgpool', 'fc']
    composite = COMPOSITE[composite]()
    with composite.context(model):
        probe = Probe(model, names)
        leaf = input.clone().requires_grad_()
        output = model(leaf)
        torch.autograd.grad(output, leaf, initial_relevance(0)(output))
        probe.remove()
    ledger = conservation_ledger(tiny_resnet(2), input, composite, target=0)
    for name in names:
        row, = [row for row in ledger.find(name) if row.kind != 'function']
        assert row.kind == ('layer' if name in ('maxpool', 'avgpool', 'fc') else 'block')
        assert close(row.arrives, probe.sums[name, 'arrives'])
        assert close(row.leaves, probe.sums[name, 'leaves'])


def test_rows():
    '''Rows are in the order of the backward pass, with calls, functions, surrogates and rules by their names.'''
    model, input = tiny_resnet(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, EpsilonPlus(), target=0)
    described = [(row.kind, row.label, row.type, row.rule) for row in ledger]
    assert described[:5] == [
        ('layer', 'fc', 'Linear', 'Epsilon'),
        ('function', 'view in the network', 'view', None),
        ('layer', 'avgpool', 'AdaptiveAvgPool2d', 'Norm'),
        ('layer', 'layer4.0.relu #2', 'ReLU', 'Pass'),
        ('function', 'add in layer4.0', 'add', None),
    ]
    assert described[-1] == ('layer', 'conv1', 'Conv2d', 'ZPlus')
    assert [row.name for row in ledger.blocks[:3]] == ['layer4', 'layer4.0', 'layer4.0.downsample']
    ledger = conservation_ledger(model, input, ResNetLRP(), target=0)
    addition, = ledger.find('layer4.0.addition')
    assert (addition.kind, addition.type, addition.rule) == ('layer', 'Addition', 'RatioSplit')
    assert not hasattr(model.layer4[0], 'addition')


class Odd(nn.Module):
    '''Modules without operations, with views, in-place operations, several outputs, in a list, and called in turns.'''
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.skip, self.drop = nn.Identity(), nn.Dropout()
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.others = [nn.Conv2d(4, 4, 1).double().requires_grad_(False)]
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        '''Logits.'''
        x = self.drop(self.skip(self.conv(x)))
        x[:, :1] += 1
        x, _ = self.pool(self.relu(x))
        x = self.others[0](self.relu(x).permute(0, 1, 3, 2)).flatten(2).mean(2)
        return self.head(self.relu(x))


def test_odd():
    '''Nothing is lost for modules and functions of any kind.'''
    model = Odd().double().eval()
    for composite in (EpsilonPlus(), ResNetLRP(), None):
        ledger = conservation_ledger(model, torch.randn(3, 3, 4, 4, dtype=torch.float64), composite)
        check_sums(ledger)
        assert [row.label for row in ledger if row.type == 'ReLU'] == ['relu #3', 'relu #2', 'relu #1']
        assert len(ledger.find('Conv2d')) == 1


def test_keyword():
    '''Inputs may be given by keyword.'''
    class Keyword(nn.Module):
        '''A network of a linear layer.'''
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            '''Logits.'''
            return self.linear(input=x * 1)

    model, input = Keyword().double(), torch.randn(2, 4).double()
    for composite in (None, ResNetLRP(), BlockLRP()):
        ledger = conservation_ledger(model, input, composite)
        check_sums(ledger)
        if 'with_kwargs' in inspect.signature(torch_module.register_module_forward_hook).parameters:
            assert ledger.lost_by['no_rule'].abs().max() < 1e-9
            assert ledger.lost_by['unexplained'].abs().max() < 1e-9
            assert composite is not None or ledger.lost_by['bias'].abs().max() > 1e-3


class Scale(torch.autograd.Function):
    '''A product which computes the gradient of both factors, whatever is needed.'''
    # pylint: disable=abstract-method,arguments-differ
    @staticmethod
    def forward(ctx, input, weight):
        '''Product.'''
        ctx.save_for_backward(input, weight)
        return input * weight

    @staticmethod
    def backward(ctx, grad_output):
        '''Gradients of both.'''
        input, weight = ctx.saved_tensors
        return grad_output * weight, (grad_output * input).sum_to_size(weight.shape)


class Scaled(nn.Module):
    '''A trainable weight. A view of it enters a function with a backward of its own.'''
    def __init__(self, shape):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)
        self.weight = nn.Parameter(torch.rand(6))
        self.shape = shape

    def forward(self, x):
        '''Logits.'''
        return self.head(Scale.apply(self.linear(x), self.weight.view(self.shape)))


@pytest.mark.parametrize('shape', [(6,), (1, 6)])
@pytest.mark.parametrize('batch', [1, 2])
def test_gradients_of_parameters(shape, batch):
    '''What goes to parameters is no relevance.'''
    model, input = Scaled(shape).double(), torch.randn(batch, 4, dtype=torch.float64)
    rows = []
    for requires_grad in (True, False):
        model.requires_grad_(requires_grad)
        ledger = conservation_ledger(model, input, LayerMapComposite([(nn.Linear, rules.Epsilon())]), target=1)
        check_sums(ledger)
        rows.append([(row.label, row.arrives.tolist(), row.leaves.tolist()) for row in ledger])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


class Transposed(nn.Module):
    '''A tensor between two layers has its examples in another dimension than the first.'''
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        '''Logits.'''
        return self.two(self.one(x).transpose(0, 1).contiguous()).transpose(0, 1).sum(1)


def test_no_examples():
    '''Layers are not told apart if what passes between them cannot be summed for each example.'''
    model, input = Transposed().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    composite = LayerMapComposite([(nn.Linear, rules.Epsilon())])
    ledger = conservation_ledger(model, input, composite)
    check_sums(ledger)
    assert 'Linear' in [row.type for row in ledger]
    merged = next(row for row in ledger if ' + ' in row.type)
    assert 'two' in merged.name
    # a single example has no dimension to be found
    ledger = conservation_ledger(model, input[:1], composite)
    assert not any(' + ' in row.type for row in ledger)


def test_batch():
    '''Values are those of each example by itself.'''
    model, input = tiny_resnet(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    batch = conservation_ledger(model, input, EpsilonPlus(), target=[0, 1, 2])
    for index in range(3):
        single = conservation_ledger(model, input[index:index + 1], EpsilonPlus(), target=index)
        part = batch.example(index)
        for left, right in zip((*single.rows, *single.blocks), (*part.rows, *part.blocks)):
            assert left.label == right.label
            assert close(left.arrives, right.arrives, 1e-8) and close(left.leaves, right.leaves, 1e-8)
            assert all(close(left.lost_by[key], right.lost_by[key], 1e-8) for key in CAUSES)
            assert (left.smallest is None) == (right.smallest is None)
            assert left.smallest is None or close(left.smallest, right.smallest, 1e-8)
        assert close(single.final, part.final, 1e-8) and len(part.relevance) == 1
    with pytest.raises(IndexError, match='Example 3'):
        batch.example(3)
    assert batch.example().table() == batch.table().partition('\n')[2]


def test_magnitude():
    '''Addends that cancel multiply the magnitude of relevance, not its sum.'''
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1., -.99]], dtype=torch.float64))
    ledger = conservation_ledger(
        model, torch.ones(1, 2, dtype=torch.float64), LayerMapComposite([(nn.Linear, rules.Epsilon(0.))])
    )
    row, = ledger
    assert close(row.arrives_magnitude, [.01]) and close(row.leaves_magnitude, [1.99]) and close(row.leaves, [.01])
    assert close(row.smallest, [.01])
    assert 'They grow most in 0 (Linear, Epsilon): 0.01 to 1.99' in ledger.table()


# -- causes ------------------------------------------------------------------------------------------------------------


def stab(value, epsilon):
    '''A stabilized denominator.'''
    return value + epsilon * (1 if value >= 0 else -1)


def naive(name, weight, bias, input, relevance, epsilon):
    '''What is left, and lost by each cause, by loops over connections.'''
    lost = dict.fromkeys(('bias', 'stabilizer', 'dead_units'), 0.)
    lower = np.zeros_like(input)
    smallest = math.inf
    for j, total in enumerate(relevance):
        contributions, extra = weight[j] * input, bias[j]
        parts = {
            'Epsilon': lambda c, b: [(1, c, b)],
            'ZPlus': lambda c, b: [(1, c.clip(0), max(b, 0))],
            'AlphaBeta': lambda c, b: [(2, c.clip(0), max(b, 0)), (-1, c.clip(max=0), min(b, 0))],
            'Flat': lambda c, b: [(1, np.ones_like(c), 0)],
            'WSquare': lambda c, b: [(1, weight[j] ** 2, b ** 2)],
            # b - b+ - b- cancel
            'ZBox': lambda c, b: [(1, c + 3 * weight[j].clip(0) - 2 * weight[j].clip(max=0), 0)],
            'Gamma': lambda c, b: [(
                1, c + .5 * (c.clip(0) if c.sum() + b > 0 else c.clip(max=0)),
                b + .5 * (max(b, 0) if c.sum() + b > 0 else min(b, 0)),
            )],
        }[name](contributions, extra)
        for factor, contribution, constant in parts:
            z = contribution.sum() + constant
            lower += factor * contribution * total / stab(z, epsilon)
            lost['bias'] += factor * constant * total / stab(z, epsilon)
            lost['dead_units' if z == 0 else 'stabilizer'] += factor * total * (1 - z / stab(z, epsilon))
            smallest = min(smallest, abs(z)) if total else smallest
    return lower, lost, smallest


RULES = {
    'Epsilon': rules.Epsilon,
    'ZPlus': rules.ZPlus,
    'AlphaBeta': lambda epsilon: rules.AlphaBeta(2., 1., epsilon),
    'Flat': rules.Flat,
    'WSquare': rules.WSquare,
    'ZBox': lambda epsilon: rules.ZBox(-3., 2., epsilon),
    'Gamma': lambda epsilon: rules.Gamma(.5, epsilon),
}


@pytest.mark.parametrize('epsilon', [1e-9, .5])
@pytest.mark.parametrize('name', RULES)
def test_closed_forms(name, epsilon):
    '''Rules of Zennit, with bias, stabilizer, dead units, and units that have no relevance.'''
    rng = np.random.default_rng(0)
    weight, bias, input, relevance = (rng.normal(size=shape) for shape in ((6, 5), 6, (2, 5), (2, 6)))
    # of no contributions at all, only of positive ones, and only of negative ones
    weight[0], bias[0] = 0, 0
    weight[1], bias[1] = np.sign(input[0]) * .7, .2
    weight[2], bias[2] = -np.sign(input[0]) * .6, -.3
    # which does not count for the smallest denominator
    relevance[1, 0] = relevance[:, 3] = 0
    module = nn.Linear(5, 6).double()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        module.bias.copy_(torch.from_numpy(bias))
    composite = LayerMapComposite([(nn.Linear, RULES[name](epsilon))])
    ledger = conservation_ledger(module, torch.from_numpy(input), composite, torch.from_numpy(relevance))
    row, = ledger
    check_sums(ledger)
    for index in range(2):
        lower, lost, smallest = naive(name, weight, bias, input[index], relevance[index], epsilon)
        np.testing.assert_allclose(ledger.relevance[index].numpy(), lower, rtol=1e-9)
        np.testing.assert_allclose(float(row.smallest[index]), smallest, rtol=1e-9, atol=1e-12)
        for key, value in lost.items():
            np.testing.assert_allclose(float(row.lost_by[key][index]), value, rtol=1e-8, atol=1e-9)
        assert abs(float(row.lost_by['unexplained'][index])) < 1e-9
        assert float(row.lost_by['no_rule'][index]) == 0


def test_convolution():
    '''The bias of a convolution counts at each position.'''
    module = nn.Conv2d(2, 3, 3, padding=1).double()
    input = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    composite = LayerMapComposite([(nn.Conv2d, rules.Epsilon(.1))])
    ledger = conservation_ledger(module, input, composite, torch.ones_like)
    row, = ledger
    output = module(input).detach()
    share = 1 / (output + .1 * output.sign())
    bias = module.bias.detach().view(-1, 1, 1)
    assert close(row.lost_by['bias'], (share * bias).sum((1, 2, 3)), 1e-9)
    assert close(row.lost_by['stabilizer'], (1 - share * output).sum((1, 2, 3)), 1e-9)
    assert float(row.lost_by['unexplained'].abs().max()) < 1e-9


def test_pooling():
    '''Poolings lose relevance by the stabilizer, and of windows of zeros.'''
    input = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    input[..., :2, :2] = 0
    composite = LayerMapComposite([(nn.AvgPool2d, rules.Norm(.5))])
    row, = conservation_ledger(nn.AvgPool2d(2), input, composite, torch.ones_like)
    z = F.avg_pool2d(input, 2).flatten()
    assert close(row.lost_by['dead_units'], [1.])
    assert close(row.lost_by['stabilizer'], [(1 - z[1:] / (z[1:] + .5)).sum()])
    assert float(row.smallest) == 0 and float(row.lost_by['bias']) == 0


@pytest.mark.parametrize('dead_units', ['drop', 'spread'])
@pytest.mark.parametrize('stabilizer', [0., .3])
def test_zplus(dead_units, stabilizer):
    '''Our z+ loses relevance of dead units unless it is spread, and by the stabilizer, never by the bias.'''
    module = nn.Conv2d(2, 3, 2).double()
    with torch.no_grad():
        module.weight[0] = -module.weight[0].abs()
        module.bias.fill_(5.)
    input = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    composite = LayerMapComposite([(nn.Conv2d, ZPlus(stabilizer, dead_units=dead_units))])
    ledger = conservation_ledger(module, input, composite, torch.ones_like)
    row, = ledger
    z = F.conv2d(input, module.weight.detach().clamp(min=0))[:, 1:]
    assert close(row.lost_by['dead_units'], [9. if dead_units == 'drop' else 0.] * 2, 1e-9)
    expected = (1 - z / (z + stabilizer)).sum((1, 2, 3))
    assert close(row.lost_by['stabilizer'], expected, 1e-9)
    assert float(row.lost_by['stabilizer'].abs().max()) == 0 or stabilizer
    assert float(row.lost_by['bias'].abs().max()) == 0
    assert float(row.lost_by['unexplained'].abs().max()) < 1e-9
    assert float(row.smallest.abs().max()) == 0


def test_spread_without_inputs():
    '''Relevance of units that read nothing but padding cannot be spread.'''
    module = nn.Conv2d(1, 1, 1, padding=1, bias=False).double()
    with torch.no_grad():
        module.weight.fill_(1.)
    composite = LayerMapComposite([(nn.Conv2d, ZPlus())])
    row, = conservation_ledger(module, torch.ones(1, 1, 2, 2, dtype=torch.float64), composite, torch.ones_like)
    assert close(row.lost_by['dead_units'], [12.]) and close(row.leaves, [4.])


def test_max_pooling():
    '''Max pooling with a rule.'''
    composite = LayerMapComposite([(nn.MaxPool2d, ZPlus(dead_units='drop'))])
    input = torch.tensor([[[[0., 0., 1., 2.], [0., 0., 3., 4.]]]], dtype=torch.float64)
    row, = conservation_ledger(nn.MaxPool2d(2), input, composite, torch.ones_like)
    assert close(row.lost_by['dead_units'], [1.]) and close(row.lost, [1.])


def test_block_epsilon():
    '''A layer or a block as one layer.'''
    module = nn.Linear(4, 3).double()
    input, relevance = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    output, bias = module(input).detach(), module.bias.detach()
    for with_bias in (True, False):
        composite = LayerMapComposite([(nn.Linear, BlockEpsilon(.2, with_bias=with_bias))])
        ledger = conservation_ledger(module, input, composite, relevance)
        row = next(row for row in ledger if row.kind == 'layer')
        z = output if with_bias else output - bias
        share = relevance / (z + .2 * z.sign())
        assert close(row.lost_by['stabilizer'], (relevance - share * z).sum(1))
        assert close(row.lost_by['bias'], (share * bias).sum(1) * with_bias)
        assert float(row.lost_by['unexplained'].abs().max()) < 1e-10
        assert close(row.smallest, z.abs().amin(1))
    block = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    ledger = conservation_ledger(block, input, LayerMapComposite([
        (nn.Sequential, BlockEpsilon(.2)), (nn.Linear, BlockEpsilon(.2, with_bias=False))
    ]), relevance)
    # rules inside of it have no effect
    row, = ledger
    assert (row.kind, row.type, row.rule) == ('layer', 'Sequential', 'BlockEpsilon') and not ledger.blocks
    z = block(input).detach()
    share = relevance / (z + .2 * z.sign())
    jacobian = torch.autograd.functional.jvp(block, input, input)[1].detach()
    assert close(row.lost_by['stabilizer'], (relevance - share * z).sum(1))
    assert close(row.lost_by['bias'], (share * (z - jacobian)).sum(1))
    assert float(row.lost_by['unexplained'].abs().max()) < 1e-10


def test_input_x_gradient():
    '''What each bias takes from input times gradient is its own gradient times the bias.'''
    model = tiny_resnet()
    input = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, None, target=1)
    for index in range(2):
        model.zero_grad()
        leaf = input[index:index + 1].clone().requires_grad_()
        model(leaf)[0, 1].backward()
        assert close(ledger.relevance[index], (leaf * leaf.grad)[0], 1e-9)
        for name, module in model.named_modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                constant = module.bias.detach()
                if isinstance(module, nn.BatchNorm2d):
                    scale = module.weight / (module.running_var + module.eps).sqrt()
                    constant = constant - (scale * module.running_mean).detach()
                row, = ledger.find(name)
                assert close(row.lost_by['bias'][index], (module.bias.grad * constant).sum(), 1e-9)
    assert close(ledger.lost_by['bias'], ledger.initial - ledger.final, 1e-9)
    assert all(float(row.lost_by[key].abs().max()) < 1e-9 for row in ledger for key in ('no_rule', 'unexplained'))


@pytest.mark.parametrize('epsilon', [0., .1])
def test_block_lrp(epsilon):
    '''Gradients count as relevance. The ledger of a block sums up biases inside of it, and its own stabilizer.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, BlockLRP(epsilon), target=1)
    check_sums(ledger)
    for key in ('no_rule', 'dead_units', 'unexplained'):
        assert float(ledger.lost_by[key].abs().max()) < 1e-9
    if epsilon > 1e-3:
        assert float(ledger.lost_by['stabilizer'].abs().min()) > 1e-4
        return
    # R_k / (y_k - b_k) times what biases other than that of the logit take from input times gradient
    gradient = conservation_ledger(model, input, None, target=1)
    logit = gradient.output[:, 1]
    factor = logit / (logit - model.fc.bias[1].detach())
    assert close(ledger.final, gradient.final * factor, 1e-9)
    for name in ('layer1.0', 'layer3.0'):
        left, right = (elem.find(name)[-1] for elem in (ledger, gradient))
        assert left.kind == 'block' and left.rule == 'BlockEpsilon'
        assert close(left.lost_by['bias'], right.lost_by['bias'] * factor, 1e-9)


def test_rule_of_container():
    '''A rule for a module that contains others makes it one layer, without rows for what is inside.'''
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(nn.ReLU(), nn.Linear(4, 3, bias=False)))
    model = nn.Sequential(inner, nn.Sequential(nn.Linear(3, 2))).double()
    composite = NameMapComposite([(['0', '0.1'], rules.Epsilon(.1)), (['0.0', '0.1.1', '1.0'], rules.Epsilon(.2))])
    input = torch.randn(2, 4).double()
    ledger = conservation_ledger(model, input, composite, target=0)
    assert [(row.label, row.type, row.kind) for row in ledger] == [
        ('1.0', 'Linear', 'layer'), ('0', 'Sequential', 'layer')
    ]
    assert [row.name for row in ledger.blocks] == ['1']
    z = inner(input).detach()
    relevance = torch.autograd.grad(model[1](z.requires_grad_())[:, 0].sum(), z)[0]
    share = ledger.output[:, :1] / (ledger.output[:, :1] + .2 * ledger.output[:, :1].sign())
    relevance, z = relevance * z.detach() * share, z.detach()
    stabilized = z + .1 * z.sign()
    row = ledger.rows[1]
    assert close(row.arrives, relevance.sum(1))
    assert close(row.lost_by['stabilizer'] + row.lost_by['dead_units'], (relevance * (1 - z / stabilized)).sum(1))


def test_smallest():
    '''The smallest denominator of a block is that of all layers inside.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, ResNetLRP(), target=1)
    block = ledger.find('layer2')[0]
    inside = [row.smallest for row in ledger if row.name.startswith('layer2.') and row.smallest is not None]
    assert len(inside) == 3 and torch.equal(block.smallest, torch.stack(inside).amin(0))
    assert not torch.equal(block.smallest, torch.stack(inside).amax(0))


def test_linear_in_block():
    '''The bias of a linear layer is left out of the denominator, but not inside of a block.'''
    class Block(nn.Module):
        '''A residual block.'''
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            '''Residual block.'''
            return x + self.linear(x).relu()

    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)).double()
    ledger = conservation_ledger(model, torch.randn(3, 4).double(), BlockLRP(0.), target=1)
    assert float(ledger.lost_by['unexplained'].abs().max()) < 1e-10
    lost = {row.name: row.lost_by['bias'] for row in ledger if row.type == 'Linear'}
    assert list(lost) == ['2', '1.linear', '0']
    assert close(lost['1.linear'], ledger.initial - ledger.final) and float(lost['1.linear'].abs().max()) > 1e-3
    assert float(lost['0'].abs().max()) == float(lost['2'].abs().max()) == 0


@pytest.mark.parametrize('arrays, settings, case', golden_cases('network_*', 'conserving'))
def test_golden(arrays, settings, case):
    '''What dead units and stabilizer lose in whole networks, and what arrives at the branches of blocks.'''
    arguments = case['arguments']
    model = build_network(arrays, settings['arch'])
    composite = ResNetLRP(
        splitting=arguments['splitting'], identity_skip=arguments['propagate_identity'],
        batch_norm={'pass': 'pass', 'fold': 'merge'}[arguments['batch_norm']],
        first_layer=FIRST_LAYER[arguments['first_layer']], projection='literal', dead_units='drop',
        maxpool=arguments['maxpool'], stabilizer=arguments['eps'],
    )
    ledger = conservation_ledger(model, tensor(arrays, 'input'), composite, tensor(arrays, case['inputs']['start']))
    expected = {key: tensor(arrays, value) for key, value in case['expected'].items()}
    scale = float(ledger.scale)
    lost = ledger.lost_by
    assert abs(float(lost['dead_units'] + lost['stabilizer'] - expected['lost'])) < 1e-8 * scale
    assert all(abs(float(lost[key])) < 1e-8 * scale for key in ('bias', 'no_rule', 'unexplained'))
    for block in settings['arch']['blocks']:
        name = block['name']
        row = ledger.find(name)[-1]
        assert row.kind == 'block'
        assert abs(float(row.leaves - expected[f'{name}.input'].sum())) < 1e-8 * scale
        arriving = sum(float(expected[f'{name}.end_{branch}'].sum()) for branch in ('skip', 'main'))
        assert abs(float(ledger.find(f'{name}.addition')[0].leaves) - arriving) < 1e-8 * scale


# -- failures that users of Zennit have reported -----------------------------------------------------------------------


def test_additions_double():
    '''Without a rule, each addition doubles relevance: the first thing to see.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    composite = EpsilonPlus(epsilon=1e-12, stabilizer=1e-12, zero_params='bias')
    ledger = conservation_ledger(model, input, composite, target=1)
    assert close(ledger.final, ledger.initial * 2 ** 4, 1e-6)
    additions = [row for row in ledger if row.type == 'add']
    assert [row.name for row in additions] == ['layer4.0', 'layer3.0', 'layer2.0', 'layer1.0']
    for row in additions:
        assert close(row.leaves, 2 * row.arrives)
        assert close(row.lost_by['no_rule'], -row.arrives)
    assert close(ledger.lost_by['no_rule'], ledger.initial - ledger.final, 1e-6)
    assert [row.label for row in ledger.worst(2)] == ['add in layer1.0', 'add in layer2.0']
    with pytest.raises(AssertionError) as error:
        ledger.assert_conserved()
    message = str(error.value)
    assert 'in example 0 (and 1 more)' in message
    assert '! add in layer1.0 (add, no rule)' in message and 'with_splitting' in message
    # the ledger of a block has it as well, and a rule for additions is the remedy
    assert close(ledger.find('layer1')[0].leaves, 2 * ledger.find('layer1')[0].arrives, 1e-6)
    assert_conserved(model, input, with_splitting(EpsilonPlus(zero_params='bias')), target=1)


def test_bias_leaks():
    '''Merging batch normalization makes biases of it, which take relevance.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, EpsilonPlus(canonizers=[ResNetCanonizer()]), target=1)
    lost = ledger.lost_by
    assert bool((lost['bias'].abs() > .02 * ledger.scale).all())
    assert close(lost['bias'], ledger.initial - ledger.final, 1e-3)
    assert all(row.type in ('Conv2d', 'Linear') for row in ledger.worst(3))
    with pytest.raises(AssertionError, match='zero_params'):
        ledger.assert_conserved()
    assert_conserved(model, input, EpsilonPlus(canonizers=[ResNetCanonizer()], zero_params='bias'), target=1)


def test_batch_norm_leaks():
    '''Batch normalization without a rule multiplies relevance with its scale.'''
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten()).double().eval()
    randomize(model)
    composite = LayerMapComposite([(nn.Conv2d, rules.Epsilon(1e-12))])
    ledger = conservation_ledger(model, torch.randn(2, 3, 3, 3, dtype=torch.float64), composite, torch.ones_like)
    row, = [row for row in ledger if row.type == 'BatchNorm2d']
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    assert close(row.lost_by['no_rule'], (1 - scale).sum().expand(2))
    assert ledger.worst(1) == [row]


def test_dead_units():
    '''Relevance that arrives at units without contributions vanishes.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        model.layer3[0].conv2.weight[:200] = -model.layer3[0].conv2.weight[:200].abs()
    ledger = conservation_ledger(model, input, ResNetLRP(dead_units='drop'), target=1)
    worst, = ledger.worst(1)
    assert worst.name == 'layer3.0.conv2'
    assert close(worst.lost_by['dead_units'], worst.lost, 1e-9) and float(worst.lost.abs().min()) > 1e-3
    assert 'dead units' in ledger.table()
    assert_conserved(model, input, ResNetLRP(), target=1)


def test_unexplained():
    '''Of rules that are not known, nothing is claimed.'''
    class Halve(BasicHook):
        '''An Epsilon rule which keeps half of the relevance.'''
        def __init__(self, *args):
            super().__init__(gradient_mapper=lambda relevance, outputs: [.5 * relevance / outputs[0]])

    class Epsilon(rules.Epsilon):
        '''A rule may be anything, though its base class is known.'''

    model, input = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    for rule in (Halve(), Epsilon()):
        row, = conservation_ledger(model, input, LayerMapComposite([(nn.Linear, rule)]), target=0)
        assert row.rule == type(rule).__name__ and row.smallest is None
        assert close(row.lost_by['unexplained'], row.lost) and float(row.lost.abs().min()) > 1e-3
    model = tiny_resnet()
    ledger = conservation_ledger(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), RelativeLRP(), target=1)
    with pytest.raises(AssertionError, match='does not conserve relevance'):
        ledger.assert_conserved()


@pytest.mark.parametrize('composite', [
    LayerMapComposite([(nn.ReLU, rules.Pass()), (nn.Linear, rules.Epsilon(0.))]), ResNetLRP(first_layer='flat')
], ids=['denominator', 'relevance'])
def test_not_finite(composite, tmp_path):
    '''NaN is found where it appears, and nothing that contains any is conserved.'''
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1:].abs_()
    relevance = torch.ones(2, 2, dtype=torch.float64)
    if isinstance(composite, ResNetLRP):
        relevance[1, 0] = math.nan
    input = torch.rand(2, 4, dtype=torch.float64) + .1
    ledger = conservation_ledger(model, input, composite, relevance)
    bad = [row.name for row in ledger if bool((row.nan + row.inf)[1])]
    assert bad and math.isinf(float(ledger.deviation()[1]))
    for layers in (True, False):
        with pytest.raises(AssertionError, match='example'):
            ledger.assert_conserved(1e10, layers)
    assert ledger.worst(1, 1)[0].name in bad
    assert 'NaN' in ledger.table(1)
    ledger.plot(1).savefig(tmp_path / 'nan.png')
    ledger.to_json(tmp_path / 'nan.json')
    rows = json.loads((tmp_path / 'nan.json').read_text())['rows']
    assert any(row['leaves'] is None and row['nan'] for row in rows if row['example'] == 1)


def test_nan_is_hidden():
    '''Relevance that was not finite anywhere is not conserved, though nothing is seen of it at the input.'''
    hide = BasicHook(gradient_mapper=lambda relevance, outputs: [torch.nan_to_num(relevance, 1.) / outputs[0]])
    undefined = rules.Epsilon(lambda z: z * 0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    composite = Composite(module_map=lambda ctx, name, module: {'0': hide, '1': undefined}.get(name))
    with torch.no_grad():
        model[1].weight.zero_()
    ledger = conservation_ledger(model, torch.randn(1, 4).double(), composite, torch.ones_like)
    assert math.isfinite(float(ledger.final)) and close(ledger.gap, [0.])
    for layers in (True, False):
        assert float(ledger.deviation(layers)) == math.inf
        with pytest.raises(AssertionError, match='1 NaN'):
            ledger.assert_conserved(layers=layers)


def test_where_nan_appears():
    '''0/0 in the rule of a layer: what arrives is finite, what leaves is not.'''
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
    composite = LayerMapComposite([(nn.Linear, rules.Epsilon(0.))])
    ledger = conservation_ledger(model, torch.randn(1, 4, dtype=torch.float64), composite, target=0)
    upper, lower = ledger
    assert int(upper.nan) == 0 and math.isfinite(float(upper.leaves))
    assert int(lower.nan) == 4 and math.isfinite(float(lower.arrives)) and math.isnan(float(lower.leaves))
    assert '4 NaN' in ledger.table()


# -- what is shown -----------------------------------------------------------------------------------------------------


def cancelling():
    '''A network and composite: one layer doubles relevance, another halves it.'''
    def multiply(factor):
        rule = rules.Epsilon(1e-12)
        mapper = rule.gradient_mapper
        rule.gradient_mapper = lambda relevance, outputs: factor * mapper(relevance, outputs)
        return rule

    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    doubled, halved = multiply(2), multiply(.5)
    return model, Composite(module_map=lambda ctx, name, module: {'0': halved, '1': doubled}.get(name))


def test_layers_cancel():
    '''Losses and gains that cancel are found, unless only the input is of interest.'''
    model, composite = cancelling()
    input = torch.randn(2, 4, dtype=torch.float64)
    assert_conserved(model, input, composite, target=1, layers=False)
    with pytest.raises(AssertionError, match='! [01] \\(Linear, Epsilon\\)'):
        assert_conserved(model, input, composite, target=1)
    ledger = conservation_ledger(model, input, composite, target=1)
    assert close(ledger.deviation(), [1., 1.]) and float(ledger.deviation(layers=False).max()) < 1e-9
    ledger.assert_conserved(tolerance=1.0001)


def test_tolerance():
    '''The tolerance is relative to the initial relevance, of either sign, and zero is conserved.'''
    model = nn.Linear(2, 1, bias=False).double()
    composite = LayerMapComposite([(nn.Linear, rules.Epsilon(lambda z: z * 1.1))])
    for initial in (-3., 5., 1e-9):
        ledger = conservation_ledger(model, torch.randn(1, 2).double(), composite, torch.full((1, 1), initial).double())
        assert close(ledger.gap * math.copysign(1, initial), [1 / 1.1 - 1])
        ledger.assert_conserved(tolerance=.091)
        with pytest.raises(AssertionError, match='within 0.09'):
            ledger.assert_conserved(tolerance=.09)
    ledger = conservation_ledger(model, torch.randn(1, 2).double(), composite, torch.zeros_like)
    ledger.assert_conserved(tolerance=0.)
    assert float(ledger.gap) == 0 and ledger.worst() == []
    assert ledger.table() and ledger.records()[0]['lost_relative'] == 0


def test_mixed_signs():
    '''Initial relevance that cancels is no reason for a tolerance of zero.'''
    model = nn.Linear(2, 2, bias=False).double()
    ledger = conservation_ledger(model, torch.randn(1, 2).double(), LayerMapComposite([
        (nn.Linear, rules.Epsilon(1e-9))
    ]), torch.tensor([[1., -1.]]).double())
    assert float(ledger.scale) == 2 and float(ledger.initial) == 0
    ledger.assert_conserved()


def test_table():
    '''The worst example is shown by default, functions only if they matter, and marks are before rows that do.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, EpsilonPlus(), target=1)
    worst = int(ledger.deviation().argmax())
    text = ledger.table()
    assert text == ledger.table(worst) != ledger.table(1 - worst)
    assert text.startswith(f'example {worst} of 2\n')
    lines = text.splitlines()
    marked = [line for line in lines if line.startswith('!  ')]
    assert [line.split()[1:3] for line in marked if 'no rule' in line] == [
        [f'layer{num}.0', 'add'] for num in (4, 3, 2, 1)
    ]
    assert not any(' view ' in line for line in lines)
    assert sum('layer1.0.relu #' in line for line in lines) == 2
    header = next(line for line in lines if 'arrives' in line).split()
    assert header[:6] == ['layer', 'type', 'rule', 'arrives', 'leaves', 'factor']
    row = next(line for line in lines if line.startswith('!  layer4.0')).split()
    assert row[-2:] == ['no', 'rule'] and '2' in row
    assert f'initial {float(ledger.initial[worst]):.6g}, at the input {float(ledger.final[worst]):.6g}' in text
    assert '!  ' not in ledger.table(tolerance=1e9)
    blocks = ledger.table(blocks=True)
    assert 'layer4.0.downsample' in blocks and 'conv1' not in blocks.split('initial')[0]
    single = ledger.example(0).table()
    assert single == '\n'.join(ledger.table(0).splitlines()[1:])
    with pytest.raises(IndexError, match='Example 2'):
        ledger.table(2)
    with pytest.raises(IndexError, match='Example -1'):
        ledger.plot(-1)
    with pytest.raises(KeyError, match='layer9'):
        ledger.find('layer9')


def test_files(tmp_path):
    '''CSV and JSON have all rows of all examples.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, ResNetLRP(), target=1)
    ledger.to_csv(tmp_path / 'ledger.csv')
    ledger.to_json(tmp_path / 'ledger.json')
    with open(tmp_path / 'ledger.csv', newline='', encoding='utf-8') as file:
        table = list(csv.DictReader(file))
    content = json.loads((tmp_path / 'ledger.json').read_text(encoding='utf-8'))
    number = len(ledger.rows) + len(ledger.blocks)
    assert len(table) == len(content['rows']) == 2 * number
    assert content['initial'] == ledger.initial.tolist() and content['final'] == ledger.final.tolist()
    assert set(content['lost_by']) == set(CAUSES)
    for index, row in [(0, ledger.rows[0]), (1, ledger.rows[-1]), (1, ledger.blocks[0])]:
        position = index * number + (*ledger.rows, *ledger.blocks).index(row)
        for record in (table[position], content['rows'][position]):
            assert (record['name'], record['kind'], record['type']) == (row.name, row.kind, row.type)
            assert int(record['example']) == index
            assert float(record['arrives']) == float(row.arrives[index])
            assert float(record['lost_by_unexplained']) == float(row.lost_by['unexplained'][index])
            assert float(record['lost_relative']) == float(row.lost[index] / ledger.scale[index])
            assert record['smallest'] in (None, '') if row.smallest is None else (
                float(record['smallest']) == float(row.smallest[index])
            )


def test_plot():
    '''Bars show what is lost by each cause, and a line what is left.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, EpsilonPlus(), target=1)
    index = int(ledger.deviation().argmax())
    figure = ledger.plot()
    upper, lower = figure.axes
    line = next(line for line in upper.lines if line.get_label() == 'left in the network')
    scale = float(ledger.scale[index])
    assert abs(line.get_ydata()[-1] - float(ledger.final[index]) / scale) < 1e-3
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in lower.containers}
    assert set(heights) == {'bias', 'no rule'}
    assert abs(min(heights['no rule']) - min(float(row.lost_by['no_rule'][index]) for row in ledger) / scale) < 1e-6
    assert upper.get_yscale() == 'linear'
    bottom, top = lower.get_ylim()
    assert bottom < min(heights['no rule']) and top > 0
    # causes of the same row are on top of each other
    layer = nn.Linear(2, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1., 1.], [1., 1.], [-1., -1.]]))
        layer.bias.copy_(torch.tensor([1., 0., 0.]))
    ones = torch.ones(1, 2).double()
    bars = conservation_ledger(
        layer, ones, LayerMapComposite([(nn.Linear, rules.ZPlus(1.))]), torch.ones_like
    ).plot().axes[1].containers
    assert [bar.get_label() for bar in bars] == ['bias', 'stabilizer', 'dead units']
    expected = np.array([.25, .25 + 1 / 3, 1.]) / 3
    np.testing.assert_allclose([bar[0].get_height() for bar in bars], expected)
    np.testing.assert_allclose([bar[0].get_y() for bar in bars], [0, *np.cumsum(expected)[:2]])
    # a network in which nothing is lost does not make mountains out of rounding
    figure = conservation_ledger(model, input, ResNetLRP(), target=1).plot()
    assert not figure.axes[1].containers and np.abs(figure.axes[1].get_ylim()).min() >= 1e-4
    # large factors
    with torch.no_grad():
        model.layer4[0].bn2.weight.mul_(1e5)
    gradient = BasicHook(gradient_mapper=lambda relevance, outputs: [relevance])
    composite = EpsilonPlus(layer_map=[(nn.BatchNorm2d, gradient)])
    assert conservation_ledger(model, input, composite, target=1).plot().axes[0].get_yscale() == 'symlog'


# -- the network is left as it was -------------------------------------------------------------------------------------


def snapshot(model):
    '''Everything about a network that must not change.'''
    return [
        (name, id(module), module.training, {key: id(value) for key, value in vars(module).items()},
         *({key: (id(value), value is not None and value._version, value is not None and value.requires_grad)
            for key, value in values.items()} for values in (module._parameters, module._buffers)),
         {key: id(value) for key, value in module._modules.items()},
         len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.named_modules()
    ], len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)


@pytest.mark.parametrize('composite', COMPOSITE)
def test_model_unchanged(composite):
    '''Neither parameters nor attributes nor hooks remain, also of composites of Zennit that leave some.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    output = model(input)
    before = snapshot(model)
    ledger = conservation_ledger(model, input, COMPOSITE[composite](), target=1)
    assert snapshot(model) == before
    assert torch.equal(model(input), output)
    assert not input.requires_grad and ledger.output.grad_fn is None and ledger.relevance.grad_fn is None


def test_careless_canonizer():
    '''Whatever a canonizer leaves behind is removed.'''
    class Careless(Canonizer):
        '''Changes all kinds of attributes, and restores none.'''
        def apply(self, root_module):
            '''Apply it.'''
            self.register(root_module)
            return [self]

        def register(self, module):
            '''Change a linear layer.'''
            module.scale, module.remark = 2, 'changed'
            module.register_buffer('extra', torch.ones(1))
            module.register_parameter('another', nn.Parameter(torch.ones(1)))
            module.weight = nn.Parameter(module.weight * 2)

        def remove(self):
            '''Restore nothing.'''

    model = nn.Linear(4, 3).double()
    model.scale = 1
    before = snapshot(model)
    composite = LayerMapComposite([(nn.Linear, rules.Epsilon())], canonizers=[Careless()])
    ledger = conservation_ledger(model, torch.randn(2, 4).double(), composite, target=0)
    assert snapshot(model) == before and model.scale == 1
    assert not close(ledger.output, model(torch.randn(2, 4).double()))


@pytest.mark.parametrize('stage', ['forward', 'seed', 'backward', 'register'])
@pytest.mark.parametrize('composite', ['resnet_lrp', 'epsilon_plus+zennit', 'block_lrp'])
def test_unchanged_after_errors(composite, stage):
    '''Exceptions leave nothing behind.'''
    class Fail(torch.autograd.Function):
        '''An operation with a backward function that fails.'''
        @staticmethod
        def forward(ctx, input):
            '''Identity.'''
            return input.clone()

        @staticmethod
        def backward(ctx, relevance):
            '''Fail.'''
            raise ZeroDivisionError

    class Network(nn.Module):
        '''A network that fails.'''
        def __init__(self):
            super().__init__()
            self.net = tiny_resnet()

        def forward(self, x):
            '''Logits.'''
            if stage == 'forward':
                self.net(x)
                raise ZeroDivisionError
            return self.net(Fail.apply(x) if stage == 'backward' else x)

    def attr_output(output):
        if stage == 'seed':
            raise ZeroDivisionError
        return output

    model, composite = Network().eval(), COMPOSITE[composite]()
    if stage == 'register':
        mapping = composite.module_map

        def module_map(ctx, name, module):
            if name == 'net.layer2.0.conv1':
                raise ZeroDivisionError
            return mapping(ctx, name, module)

        composite.module_map = module_map
    before = snapshot(model)
    with pytest.raises((ZeroDivisionError, UnsupportedOperation)):
        conservation_ledger(model, torch.randn(1, 3, 32, 32, dtype=torch.float64), composite, attr_output)
    assert snapshot(model) == before
    assert not composite.handles


def test_registered_composite():
    '''A composite that is registered already remains so.'''
    model, input = tiny_resnet(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for composite in (ResNetLRP(batch_norm='merge'), EpsilonPlus(canonizers=[ResNetCanonizer()])):
        expected = conservation_ledger(tiny_resnet(), input, composite, target=1)
        with Gradient(model=model, composite=composite) as attributor:
            first = attributor(input.clone(), initial_relevance(1))[1]
            before = {hook: set(vars(hook)) for hook in composite.hook_refs if type(hook) is ZPlus} | {
                hook: (hook.gradient_mapper, *hook.output_modifiers) for hook in composite.hook_refs
                if isinstance(hook, BasicHook)
            }
            ledger = conservation_ledger(model, input, composite, target=1)
            assert composite.handles and before
            for hook, value in before.items():
                if type(hook) is ZPlus:
                    assert vars(hook).keys() == value
                else:
                    assert (hook.gradient_mapper, *hook.output_modifiers) == value
            assert torch.equal(attributor(input.clone(), initial_relevance(1))[1], first)
        assert torch.equal(ledger.relevance, first)
        assert [row.label for row in ledger] == [row.label for row in expected]
        assert close(ledger.final, expected.final)


def test_no_grad():
    '''It works where gradients are disabled, and leaves them so.'''
    model, input = tiny_resnet(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        ledger = conservation_ledger(model, input, ResNetLRP(), target=1)
        assert not torch.is_grad_enabled()
    ledger.assert_conserved()


def test_memory():
    '''Neither the network nor any tensor is kept.'''
    def number():
        gc.collect()
        return sum(issubclass(type(elem), torch.Tensor) for elem in gc.get_objects())

    model, input = build('user'), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for composite in ('resnet_lrp', 'epsilon_plus', 'block_lrp'):
        conservation_ledger(model, input, COMPOSITE[composite](), target=1)
        before = number()
        for _ in range(3):
            conservation_ledger(model, input, COMPOSITE[composite](), target=1)
        assert number() == before
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_threads():
    '''Modules that run in other threads meanwhile have no part in it.'''
    other, started = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []

    class Parallel(nn.Module):
        '''Runs another network in another thread.'''
        def forward(self, x):
            '''Identity, but for its graph.'''
            def run():
                started.append(other(torch.randn(2, 3, requires_grad=True)))
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return x * 1

    model = nn.Sequential(nn.Linear(4, 4), Parallel(), nn.Linear(4, 2)).double()
    ledger = conservation_ledger(
        model, torch.randn(2, 4).double(), LayerMapComposite([(nn.Linear, rules.Epsilon())]), target=0
    )
    assert started and [row.name for row in ledger] == ['2', '1', '0']
    check_sums(ledger)


def test_half():
    '''In half precision, relevance is summed in double precision.'''
    model, input = tiny_resnet().to(torch.bfloat16), torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    ledger = conservation_ledger(model, input, ResNetLRP(), target=1)
    assert ledger.final.dtype == torch.float64
    check_sums(ledger)
    with torch.autocast('cpu', torch.bfloat16):
        ledger = conservation_ledger(tiny_resnet().float(), input.float(), ResNetLRP(), target=1)
    ledger.assert_conserved(tolerance=.02)
    for composite in (None, BlockLRP()):
        check_sums(conservation_ledger(model, input, composite, target=1))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors():
    '''Errors name what is wrong.'''
    model, input = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(2, 4, dtype=torch.float64)
    composite = EpsilonPlus()
    for args, error, match in [
        (('network', input, composite), TypeError, "'network'"),
        ((model, [1.], composite), TypeError, 'tensor of floating point numbers'),
        ((model, torch.ones(2, 4, dtype=torch.long), composite), TypeError, 'int64'),
        ((model, input.float(), composite), TypeError, 'float32.*float64'),
        ((model, input[:0], composite), TypeError, 'not empty'),
        ((model, input, EpsilonPlus), TypeError, 'not an instance of a composite'),
        ((model, input, composite, input), ValueError, r'shape \(2, 3\) of the output.*\(2, 4\)'),
        ((model, input, composite, lambda output: 1.), ValueError, 'but is 1.0'),
        ((model, input, composite, torch.ones(2, 3).double(), 1), ValueError, 'exclude each other'),
        ((model, input, composite, None, 5), IndexError, 'Target'),
        ((model, input, composite, None, 1, 'odds'), ValueError, 'odds'),
        ((nn.Sequential(nn.Dropout()), input, composite), RuntimeError, r'0 \(Dropout\) is in training mode'),
    ]:
        with pytest.raises(error, match=match):
            conservation_ledger(*args)

    class Function(nn.Module):
        '''A network of any function.'''
        def __init__(self, function):
            super().__init__()
            self.forward = function

    for function, error, match in [
        (lambda x: (x * 1,), TypeError, 'tuple'),
        (torch.Tensor.detach, ValueError, 'does not depend on the input'),
        (torch.sum, ValueError, r'of shape \(\)'),
        (lambda x: x[:1] * 2, ValueError, r'input of shape \(2, 4\), but it is of shape \(1, 4\)'),
    ]:
        with pytest.raises(error, match=match):
            conservation_ledger(Function(function), input, composite)


def test_default_start():
    '''Without a target, relevance starts from the output, as it does in Zennit.'''
    model, input = tiny_resnet(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ledger = conservation_ledger(model, input, ResNetLRP())
    output = model(input).detach()
    assert close(ledger.initial, output.sum(1)) and close(ledger.scale, output.abs().sum(1))
    softmax = conservation_ledger(model, input, ResNetLRP(), target=[0, 2], value='softmax')
    assert close(softmax.initial, output.softmax(1)[[0, 1], [0, 2]])


def test_input_without_influence():
    '''If relevance does not reach the input, constants keep all of it.'''
    class Constant(nn.Module):
        '''The output depends on the input only in its first half.'''
        def forward(self, x):
            '''Logits.'''
            return torch.cat([x * 1, torch.ones_like(x)], 1)

    start = torch.tensor([[0., 0., 1., 2.]]).double()
    ledger = conservation_ledger(Constant(), torch.randn(1, 2).double(), ResNetLRP(), start)
    check_sums(ledger)
    assert float(ledger.final) == 0 and close(ledger.lost_by['sink'], [3.]) and close(ledger.gap, [0.])
    assert list(ledger.sinks) == ['cat in the network'] and 'kept by cat in the network 3' in ledger.table()


# -- command line ------------------------------------------------------------------------------------------------------


CLASSES = ['tabby cat', 'golf ball', 'church']


@pytest.fixture(name='weights', scope='module')
def fixture_weights(tmp_path_factory):
    '''Path of the weights of a ResNet-18.'''
    torch.manual_seed(1)
    model = randomize(narrow_resnet18(num_classes=3))
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([3., 3.5, 4.]))
    path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
    save_file(dict(model.state_dict()), path, {'classes': ','.join(CLASSES)})
    return path


@pytest.fixture(name='photos')
def fixture_photos(tmp_path):
    '''Paths of two photographs.'''
    rng = np.random.default_rng(0)
    paths = [tmp_path / f'{name}.png' for name in ('first', 'second')]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(name='run')
def fixture_run(weights, tmp_path):
    '''Run the command.'''
    def run(*args):
        out = tmp_path / 'out'
        options = ['--model', 'narrow_resnet18', '--weights', weights, '--size', 32, '--device', 'cpu']
        result = CliRunner().invoke(main, ['ledger', *map(str, [*options, '--out', out, *args])])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result, out
    return run


def test_cli(run, photos):
    '''The default method conserves relevance: all is written, and the exit status is 0.'''
    result, out = run(*photos)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        f'{name}_resnet_lrp_ratio_ledger.{suffix}' for name in ('first', 'second') for suffix in ('png', 'csv', 'json')
    }
    assert result.stdout.count('\nconserved: ') == 2 and 'not conserved' not in result.stdout
    assert str(photos[0]) in result.stdout and '(class 2)' in result.stdout
    assert result.stdout.count('layer1.0.addition') == 2
    content = json.loads((out / 'second_resnet_lrp_ratio_ledger.json').read_text())
    assert len(content['initial']) == 1 and abs(content['gap'][0]) < 1e-5
    assert Image.open(out / 'first_resnet_lrp_ratio_ledger.png').size[0] > 500


@pytest.mark.parametrize('args, causes', [
    (['--method', 'epsilon_plus_flat'], ['no rule', 'add in layer1.0']),
    (['--method', 'epsilon_plus', '--splitting', 'zennit'], ['bias']),
    (['--method', 'input_x_gradient', '--value', 'one'], ['bias', 'fc']),
])
def test_cli_not_conserved(run, photos, args, causes):
    '''Other methods end with exit status 1 and name the causes.'''
    result, out = run(photos[0], *args)
    assert result.exit_code == 1
    summary = result.stdout.partition('\ninitial ')[2]
    assert 'not conserved: ' in summary and all(f'! {cause}' in summary or cause in summary for cause in causes)
    initial = json.loads(next(out.glob('first_*.json')).read_text())['initial'][0]
    assert 3 < initial < 6


def test_cli_target(run, photos):
    '''The class to explain, the value, the tolerance, and blocks.'''
    options = ['--method', 'epsilon_plus+zennit', '--tolerance', 1.5]
    result, out = run(photos[0], '--target', 'golf ball', '--value', 'one', '--blocks', *options)
    assert result.exit_code == 0, result.output
    assert 'golf ball (class 1)' in result.stdout
    assert json.loads(next(out.glob('first_*.json')).read_text())['initial'] == [1.]
    assert 'the tolerance is 1.5' in result.stdout and '\nconserved: ' in result.stdout
    assert 'BasicBlock' in result.stdout and 'Conv2d' not in result.stdout
    result, _ = run(photos[0], '--method', 'epsilon_plus', '--tolerance', 'inf')
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize('method', sorted(COMPOSITES))
def test_all_composites(weights, method):
    '''All composites that are registered can be examined.'''
    classifier = load_classifier('narrow_resnet18', weights, 32)
    ledger, target = Method(method).ledger(classifier, torch.randn(2, 3, 32, 32))
    assert target == ledger.output.argmax(1).tolist()
    check_sums(ledger, 1e-5)


def test_cli_errors(run, photos, tmp_path):
    '''Errors are one line, and do not keep others from being examined.'''
    result, out = run(tmp_path / 'missing.png', photos[0])
    assert result.exit_code == 2 and 'there is no such file' in result.stderr
    assert (out / 'first_resnet_lrp_ratio_ledger.csv').exists() and '\nconserved: ' in result.stdout
    result, _ = run(photos[0], '--method', 'unknown')
    assert result.exit_code == 2 and "unknown method 'unknown'" in result.stderr
    result, _ = run(photos[0], '--tolerance', -1)
    assert result.exit_code == 2
    (tmp_path / 'file').write_text('')
    result, _ = run(photos[0], '--out', tmp_path / 'file')
    assert result.exit_code == 2 and 'cannot make the folder' in result.stderr
    (tmp_path / 'taken' / 'first_resnet_lrp_ratio_ledger.csv').mkdir(parents=True)
    result, _ = run(photos[0], '--out', tmp_path / 'taken', '--overwrite')
    assert result.exit_code == 2 and 'first_resnet_lrp_ratio_ledger.csv exists' in result.stderr
    # nothing is replaced without a word
    result, _ = run(photos[0])
    assert result.exit_code == 2 and '--overwrite' in result.stderr and result.stdout == ''


def test_cli_only_losses(run, photos):
    '''Only what loses relevance is listed.'''
    everything, _ = run(photos[0], '--method', 'epsilon_plus_flat')
    losses, _ = run(photos[0], '--method', 'epsilon_plus_flat', '--only-losses', '--overwrite')
    rows = [result.stdout.split('\n---')[1].splitlines()[1:] for result in (everything, losses)]
    assert 0 < len(rows[1]) < len(rows[0])
    assert all(line.startswith('!') for line in rows[1])
    fine, _ = run(photos[1], '--only-losses')
    assert 'Conv2d' not in fine.stdout and '\nconserved: ' in fine.stdout
