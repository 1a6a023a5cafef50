'''The table of operations: each function conserves relevance, or says that it has no rule.'''

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.networks import narrow_resnet18
from helpers.operations import FUNCTIONS, OTHERS, REGIONS, RELATIVE, RESNET, build, check, explain, images, regions
from torch import nn

from zennit_resnet import RelativeLRP, ResNetLRP, UnsupportedOperation
from zennit_resnet.conservation import assert_conserved, conservation_ledger

pytestmark = pytest.mark.once

# functions along the first dimension
NOT_BY_EXAMPLE = {
    (name, label)
    for name in (
        'msort', 'flip', 'index_put', 'tensordot left', 'masked_scatter', 'dist', 'fill_diagonal_', 'sparse',
        'multi_head', 'multi_head kv', 'experts',
    )
    for label in RELATIVE
}


@pytest.mark.parametrize('is_relu', [True, False], ids=['relu', 'negative'])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_conserved(name, is_relu):
    '''Relevance is conserved, the output is the same to the last bit, and examples do not depend on each other.'''
    # signs do not matter for what two signals are halved by, or for where there is no batch normalization
    for label, alone in (('ratio', (0, 1)), ('merge', (0,)) if is_relu else ('symmetric', (1,))):
        check(FUNCTIONS[name], RESNET[label], is_relu=is_relu, alone=alone)


@pytest.mark.parametrize('label', [*RELATIVE, *OTHERS])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_other_composites(name, label):
    '''No composite changes the output, or fails.'''
    if (name, label) == ('out', 'block'):
        # PyTorch has no gradient for it
        with pytest.raises(RuntimeError, match='out='):
            check(FUNCTIONS[name], OTHERS[label], is_conserved=False)
    elif (name, label) in NOT_BY_EXAMPLE:
        with pytest.raises(ValueError, match='one at a time'):
            check(FUNCTIONS[name], {**RELATIVE, **OTHERS}[label], is_conserved=False)
    else:
        # the first examples of some composites, the second of others
        check(FUNCTIONS[name], {**RELATIVE, **OTHERS}[label], is_conserved=False, alone=(int(label in OTHERS),))


# -- single rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('composite', [*RESNET, *OTHERS])
@pytest.mark.parametrize('name', REGIONS)
def test_regions(name, composite):
    '''Relevance of regions goes to their own image, also if it arrives at one that is outside.'''
    torch.manual_seed(3)
    image, function = torch.rand(2, 4, 6, 6).double().requires_grad_(), REGIONS[name]
    model = Alone(lambda x: function(x, None))
    with torch.no_grad():
        expected = model(image)
    with {**RESNET, **OTHERS}[composite]().context(model):
        output = model(image)
        start = torch.rand_like(output)
        (lower,) = torch.autograd.grad(output, image, start)
    assert torch.equal(output, expected)
    if composite not in OTHERS and composite not in ('drop', 'stabilizer', 'zbox'):
        assert torch.allclose(lower.sum((1, 2, 3)), start.view(2, -1).sum(1), atol=1e-9)


@pytest.mark.parametrize('name', REGIONS)
def test_relative_regions(name):
    '''Contributions cannot be compared where regions take the place of examples.'''
    model = build(lambda h, net: REGIONS[name](h, net).reshape(len(h), -1))
    with pytest.raises(ValueError, match='one at a time'):
        explain(model, images(), RelativeLRP())
    _, relevance = explain(model, images()[:1], RelativeLRP())
    assert relevance.isfinite().all() and relevance.any()


HALF = {
    name: FUNCTIONS[name]
    for name in (
        'attention bmm',
        'attention einsum',
        'einsum',
        'where self',
        'where',
        'bicubic',
        'std',
        'index_add',
        'lerp',
        'addmm',
        'conv_transpose2d',
        'norm',
        'cumsum',
        'fold',
        'addmm of two',
    )
}
HALF['bmm'] = lambda h, net: torch.bmm(h.flatten(2), net.weight.T.repeat(9, 1).expand(len(h), 36, 5))
HALF['grid_sample'] = lambda h, net: F.grid_sample(
    h, torch.linspace(-1, 1, 50).view(1, 5, 5, 2).expand(len(h), -1, -1, -1).to(h), align_corners=True
)


@pytest.mark.parametrize('is_autocast', [False, True], ids=['bfloat16', 'autocast'])
@pytest.mark.parametrize('name', HALF)
def test_half_precision(name, is_autocast):
    '''Rules run in single precision where the network runs in half precision.'''
    model, x = build(HALF[name]), images()
    exact = explain(model, x, ResNetLRP())[1]
    dtype = torch.float32 if is_autocast else torch.bfloat16

    model, x = model.to(dtype), x.to(dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=is_autocast):
        output, relevance = explain(model, x, ResNetLRP())
    assert relevance.dtype == dtype and output.isfinite().all()
    assert torch.allclose(relevance.double().sum((1, 2, 3)), torch.ones(2).double(), atol=2e-2)
    assert (relevance - exact).abs().sum() < 0.3 * exact.abs().sum()


LABELS = {
    'bmm': 'linear',
    'deform_conv2d': 'linear',
    'einsum': 'linear',
    'attention bmm': 'nonnegative_map',
    'where': 'filling',
    'std': 'reduction',
    'bicubic': 'resampling',
    'index_add': 'nonnegative_map',
}


@pytest.mark.parametrize('name', LABELS)
def test_ledger(name):
    '''Surrogates have their rows in the ledger.'''
    for composite in (ResNetLRP(), OTHERS['zennit']()):
        ledger = conservation_ledger(build(FUNCTIONS[name]), images(), composite, target=[1, 2])
        assert any(row.name == LABELS[name] for row in ledger)
    assert_conserved(build(FUNCTIONS[name]), images(), ResNetLRP(), target=[1, 2])


def test_exported():
    '''An exported network is made of overloads of functions, which have the same rules.'''
    model, x = narrow_resnet18(num_classes=4).double().eval(), torch.rand(2, 3, 64, 64).double()
    expected = explain(model, x, ResNetLRP())[1]
    program = torch.export.export(model, (x,))
    for module in (program.module(), program.run_decompositions().module()):
        assert torch.allclose(explain(module, x, ResNetLRP())[1], expected, atol=1e-12)


class Condition(nn.Module):
    '''An image and a vector. One is a gate for the other.'''

    def __init__(self, product, sigmoid=torch.sigmoid):
        super().__init__()
        self.gate, self.signal, self.head = nn.Conv2d(3, 1, 3, padding=1), nn.Linear(3, 8), nn.Linear(8, 5)
        self.product, self.sigmoid = product, sigmoid

    def forward(self, image, vector):
        '''The vector is placed where the image asks for it.'''
        signal, gate = self.signal(vector).relu()[:, :, None, None], self.sigmoid(self.gate(image))
        return self.head(self.product(signal, gate).mean((2, 3)))


GATED = {
    '*': lambda a, g: a * g,
    'reversed': lambda a, g: g * a,
    'mul': torch.mul,
    'method': lambda a, g: g.mul(other=a),
    'mul_': lambda a, g: a.expand(-1, -1, *g.shape[2:]).clone().mul_(g),
    'mul_ of the gate': lambda a, g: g.expand(-1, a.shape[1], -1, -1).clone().mul_(a),
    'not what is returned': lambda a, g: change(g.expand(-1, a.shape[1], -1, -1).clone(), a),
    'einsum': lambda a, g: torch.einsum('bcij,bdhw->bchw', a, g),
    'bmm': lambda a, g: torch.bmm(a[..., 0], g.flatten(2)).view(*a.shape[:2], *g.shape[2:]),
    'larger gate': lambda a, g: a * g.expand(-1, 8, -1, -1),
}


def change(gate, signal):
    '''A gate that is changed in place by a statement.'''
    gate.mul_(signal)
    return gate


@pytest.mark.parametrize('size', [1, 2, 9])
@pytest.mark.parametrize('name', GATED)
def test_gate_of_any_size(name, size):
    '''A gate is known by its sigmoid, whatever has more elements.'''
    model = Condition(GATED[name]).double().eval()
    image = torch.randn(2, 3, size, size).double().requires_grad_()
    vector = torch.randn(2, 3).double().requires_grad_()
    with ResNetLRP().context(model):
        parts = torch.autograd.grad(model(image, vector)[:, 1].sum(), (image, vector), allow_unused=True)
    assert parts[0] is None or not parts[0].any()
    assert torch.allclose(parts[1].sum(1), torch.ones(2).double(), atol=1e-9)


def test_size_decides_without_sigmoids():
    '''Of two factors without sigmoids, the larger one is the signal.'''
    model = Condition(torch.mul, sigmoid=torch.relu).double().eval()
    image = torch.randn(1, 3, 9, 9).double().requires_grad_()
    vector = torch.randn(1, 3).double().requires_grad_()
    with ResNetLRP().context(model):
        parts = torch.autograd.grad(model(image, vector)[:, 1].sum(), (image, vector), allow_unused=True)
    assert torch.allclose(parts[0].sum(), torch.ones(()).double()) and parts[1] is None


def linear_function(function, shape):
    '''The matrix of a linear function.'''
    units = torch.eye(torch.Size(shape).numel()).double().view(-1, *shape)
    return function(units).flatten(1).T


class Alone(nn.Module):
    '''A function as a network.'''

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        '''Run it.'''
        return self.function(x)


RESIZED = {
    'scale': lambda x: F.interpolate(x, scale_factor=1.7, mode='bicubic'),
    'size': lambda x: F.interpolate(x, size=(3, 9), mode='bicubic'),
    'corners': lambda x: F.interpolate(x, (9, 7), mode='bicubic', align_corners=True),
    'antialias': lambda x: F.interpolate(x, (3, 4), mode='bicubic', antialias=True),
    'recomputed': lambda x: F.interpolate(x, scale_factor=(1.3, 0.6), mode='bicubic', recompute_scale_factor=True),
    'aten': lambda x: torch.ops.aten.upsample_bicubic2d.default(x, [9, 7], False),
    'product': lambda x: torch.einsum('bchw,wv->bchv', x, torch.linspace(-1, 1, 30).double().view(6, 5)),
    'attention': lambda x: torch.einsum(
        'bchw,hwk->bck', x, torch.linspace(-1, 1, 60).double().view(5, 6, 2).softmax(2)
    ),
    'cumsum': lambda x: x.cumsum(2),
    'grid_sample': lambda x: F.grid_sample(
        x, torch.linspace(-0.9, 0.9, 24).double().view(1, 3, 4, 2).expand(len(x), -1, -1, -1), align_corners=True
    ),
}


@pytest.mark.parametrize('name', RESIZED)
def test_matrix(name):
    '''Relevance is that of the z+ rule with the dense matrix of the function, for inputs of both signs.'''
    function = RESIZED[name]
    matrix = linear_function(function, (1, 5, 6))
    for low in (0, -1):
        x = (torch.rand(1, 1, 5, 6).double() * (1 - low) + low).requires_grad_()
        model = Alone(function)
        with ResNetLRP(coverage='literal').context(model):
            output = model(x)
            start = torch.rand_like(output)
            (lower,) = torch.autograd.grad(output, x, start)
        contributions = (matrix * x.detach().flatten()).clamp(min=0)
        expected = (contributions / contributions.sum(1, keepdim=True).clamp(min=1e-300)).T @ start.flatten()
        dead = start.flatten()[contributions.sum(1) == 0]
        if not len(dead):
            assert torch.allclose(lower.flatten(), expected, atol=1e-12)
        assert torch.allclose(lower.sum(), start.sum())


def test_refill():
    '''Relevance at zeros goes evenly to the elements of the same example that were kept.'''
    keep = torch.tensor([[True, False, True, False], [False, False, True, False]])
    model = Alone(lambda x: torch.where(keep, x, 0.0))
    x, start = torch.randn(2, 4).double().requires_grad_(), torch.rand(2, 4).double()
    with ResNetLRP().context(model):
        (lower,) = torch.autograd.grad(model(x), x, start)
    lost = (start * ~keep).sum(1, keepdim=True)
    assert torch.allclose(lower, keep * (start + lost / keep.sum(1, keepdim=True)))
    # constants that are not zero keep their part
    model = Alone(lambda x: x.masked_fill(~keep, 2.0))
    with ResNetLRP().context(model):
        (lower,) = torch.autograd.grad(model(x), x, start)
    assert torch.equal(lower, start * keep)


@pytest.mark.parametrize(
    'function, amounts',
    [
        (lambda x: x.std(1), lambda x: (x - x.mean(1, keepdim=True)) ** 2),
        (lambda x: x.var(1, keepdim=True), lambda x: (x - x.mean(1, keepdim=True)) ** 2),
        (lambda x: torch.norm(x, 3, 1), lambda x: x.abs() ** 3),
        (lambda x: x.logsumexp(-1), torch.exp),
        (lambda x: torch.linalg.vector_norm(x, dim=1), lambda x: x**2),
    ],
)
def test_shares_of_reductions(function, amounts):
    '''Each element receives relevance in proportion to what it adds.'''
    model, x, start = Alone(function), torch.randn(2, 5).double().requires_grad_(), torch.rand(2, 1).double()
    with ResNetLRP().context(model):
        output = model(x)
        (lower,) = torch.autograd.grad(output, x, start.view_as(output))
    shares = amounts(x.detach())
    assert torch.allclose(lower, start * shares / shares.sum(1, keepdim=True))


REFUSED = {
    'three factors': (lambda h, net: torch.einsum('bchw,bcwh,bcww->bh', h, h.flip(1), h.flip(2)), 'more than two'),
    'ps_roi_pool': (lambda h, net: torchvision.ops.ps_roi_pool(h, regions(h), 2).reshape(len(h), -1), 'ps_roi_align'),
    'prod': (lambda h, net: h.prod(3), 'prod'),
    'complex': (lambda h, net: torch.fft.rfft2(h).abs(), 'complex'),
    'complex constant': (lambda h, net: (h * 1j).imag, 'complex'),
    'view_as_complex': (lambda h, net: torch.view_as_complex(h.unflatten(3, (3, 2))).abs(), 'complex'),
    'complex matrix': (lambda h, net: (torch.complex(h, h) @ torch.eye(6).to(torch.complex128)).real, 'complex'),
    'complex sum': (lambda h, net: (h + torch.ones(1, dtype=torch.complex128)).real, 'complex'),
    'bicubic': (
        lambda h, net: F.grid_sample(h, torch.zeros(len(h), 2, 2, 2).double(), 'bicubic', align_corners=True),
        'bicubic',
    ),
    'quantile': (lambda h, net: h.quantile(0.4, 3), 'linear'),
    'matrix norm': (lambda h, net: torch.linalg.norm(h, 2, (2, 3)), 'norm'),
    'steps': (lambda h, net: torch.trapezoid(h, x=-torch.arange(6).double()), 'trapezoid'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    '''What has no rule says so.'''
    function, word = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=word):
        explain(build(function), images(), ResNetLRP())


@pytest.mark.parametrize('name', ['stack', 'cat', 'mean', 'amax'])
@pytest.mark.parametrize('num', [2, 3])
def test_relative_branches(name, num):
    '''Branches that are stacked to be added are an addition for relative LRP, of any number of examples.'''
    branches = nn.ModuleList([nn.Conv2d(4, 4, 3).double() for _ in range(num)]).requires_grad_(False)
    functions = {
        'stack': lambda h, net: torch.stack([branch(h) for branch in branches]).sum(0),
        'cat': lambda h, net: torch.cat([branch(h).unsqueeze(0) for branch in branches]).sum(0),
        'mean': lambda h, net: torch.stack([branch(h) for branch in branches]).mean(dim=0),
        'amax': lambda h, net: torch.stack([branch(h) for branch in branches]).amax(0),
    }
    check(functions[name], RelativeLRP, is_conserved=False)
    check(functions[name], ResNetLRP)
