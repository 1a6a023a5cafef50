'''Twins: the same function, written otherwise, has the same map.'''

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.operations import OTHERS, RELATIVE, RESNET, build, explain, images, index, mask, stretched
from torch import nn

from zennit_resnet import RelativeLRP, ResNetLRP

pytestmark = pytest.mark.once


def scores(h):
    '''Weights of positions.'''
    return h.flatten(2).mean(1, keepdim=True).softmax(2)


def spelled(h):
    '''The same, written out.'''
    weights = h.flatten(2).mean(1, keepdim=True).exp()
    return weights / weights.sum(2, keepdim=True)


def transposed(h, net):
    '''A layer with weights of the network.'''
    weight = net.weight[:, :, None, None].expand(-1, -1, 2, 3).transpose(0, 1) * torch.linspace(-1, 1, 6).double().view(
        2, 3
    )
    return weight, net.bias


def module_transposed(h, net):
    '''A module with weights of the network.'''
    weight, bias = transposed(h, net)
    net.transposed.weight, net.transposed.bias = (nn.Parameter(elem.detach(), False) for elem in (weight, bias))
    return net.transposed(h)


def put(h, index, value=0):
    '''Write among elements.'''
    h = h.clone()
    h[index] = value
    return h


TWINS = {
    'linear': (
        lambda h, net: F.linear(h.mean((2, 3)), net.weight, net.bias),
        lambda h, net: h.mean((2, 3)) @ net.weight.T + net.bias,
        lambda h, net: torch.mm(h.mean((2, 3)), net.weight.T) + net.bias,
        lambda h, net: torch.addmm(net.bias, h.mean((2, 3)), net.weight.T),
        lambda h, net: torch.addmm(net.bias * 2, h.mean((2, 3)), net.weight.T * -4, beta=0.5, alpha=-0.25),
        lambda h, net: torch.addmm(net.bias.expand(len(h), 5), h.mean((2, 3)), net.weight.T),
        lambda h, net: torch.einsum('bi,ki->bk', h.mean((2, 3)), net.weight) + net.bias,
        lambda h, net: torch.tensordot(h.mean((2, 3)), net.weight, dims=([1], [1])) + net.bias,
        lambda h, net: torch.inner(h.mean((2, 3)), net.weight) + net.bias,
        lambda h, net: (net.weight @ h.mean((2, 3))[:, :, None]).squeeze(2) + net.bias,
        lambda h, net: torch.baddbmm(net.bias, h.mean((2, 3))[:, None], net.weight.T.expand(len(h), 4, 5)).squeeze(1),
        lambda h, net: torch.linalg.vecdot(h.mean((2, 3))[:, None], net.weight) + net.bias,
        lambda h, net: torch.ops.aten.linear.default(h.mean((2, 3)), net.weight, net.bias),
    ),
    'linear of positions': (
        lambda h, net: F.linear(h.flatten(2).mT, net.weight),
        lambda h, net: h.flatten(2).mT @ net.weight.T,
        lambda h, net: torch.einsum('bcp,kc->bpk', h.flatten(2), net.weight),
        lambda h, net: torch.bmm(h.flatten(2).mT, net.weight.T.expand(len(h), 4, 5)),
    ),
    'two layers': (
        lambda h, net: F.linear(h.mean((2, 3)), net.weight.T @ net.weight),
        lambda h, net: torch.chain_matmul(h.mean((2, 3)), net.weight.T, net.weight),
        lambda h, net: torch.linalg.multi_dot([h.mean((2, 3)), net.weight.T, net.weight]),
        lambda h, net: torch.einsum('bi,ki,kj->bj', h.mean((2, 3)), net.weight, net.weight),
    ),
    'attention': (
        lambda h, net: (h.flatten(2) * scores(h)).sum(2),
        lambda h, net: torch.bmm(h.flatten(2), scores(h).mT).squeeze(2),
        lambda h, net: (h.flatten(2) @ scores(h).mT).squeeze(2),
        lambda h, net: (scores(h) @ h.flatten(2).mT).squeeze(1),
        lambda h, net: torch.einsum('bcp,bop->bc', h.flatten(2), scores(h)),
        lambda h, net: torch.einsum('bop,bcp->bc', scores(h), h.flatten(2)),
        lambda h, net: torch.bmm(h.flatten(2), spelled(h).mT).squeeze(2),
        lambda h, net: torch.mul(scores(h), h.flatten(2)).sum(-1),
    ),
    'conv_transpose': (
        module_transposed,
        lambda h, net: F.conv_transpose2d(h, *transposed(h, net), (2, 1), (0, 1), (1, 0)),
        lambda h, net: F.conv_transpose2d(h, *transposed(h, net), stride=(2, 1), output_padding=(1, 0), padding=(0, 1)),
        lambda h, net: torch.ops.aten.convolution.default(
            h, *transposed(h, net), [2, 1], [0, 1], [1, 1], True, [1, 0], 1
        ),
    ),
    'convolution': (
        lambda h, net: F.conv2d(h, net.weight[:, :, None, None].expand(-1, -1, 3, 3), net.bias, 2, 1),
        lambda h, net: torch.ops.aten.convolution.default(
            h, net.weight[:, :, None, None].expand(-1, -1, 3, 3), net.bias, [2, 2], [1, 1], [1, 1], False, [0, 0], 1
        ),
        lambda h, net: torch.ops.aten.conv2d.default(
            h, net.weight[:, :, None, None].expand(-1, -1, 3, 3), net.bias, [2, 2], [1, 1]
        ),
    ),
    'deformed': (
        lambda h, net: F.conv2d(h, stretched(net), net.bias, 1, 1),
        lambda h, net: torchvision.ops.deform_conv2d(h, h.new_zeros(len(h), 18, 6, 6), stretched(net), net.bias, 1, 1),
        lambda h, net: torchvision.ops.deform_conv2d(
            h,
            torch.zeros(len(h), 18, 6, 6).double(),
            stretched(net),
            net.bias,
            1,
            1,
            mask=torch.ones(len(h), 9, 6, 6).double(),
        ),
    ),
    'mix': (
        lambda h, net: h * (1 - h.sigmoid()) + h.flip(1) * h.sigmoid(),
        lambda h, net: torch.lerp(h, h.flip(1), h.sigmoid()),
        lambda h, net: h.lerp(end=h.flip(1), weight=h.sigmoid()),
        lambda h, net: h.clone().lerp_(h.flip(1), h.sigmoid()),
    ),
    'mix by a number': (
        lambda h, net: h * 0.7 + h.flip(1) * 0.3,
        lambda h, net: torch.lerp(h, h.flip(1), 0.3),
    ),
    'gated sum': (
        lambda h, net: h + h.flip(1) * h.sigmoid(),
        lambda h, net: torch.addcmul(h, h.flip(1), h.sigmoid()),
        lambda h, net: h.addcmul(tensor1=h.sigmoid(), tensor2=h.flip(1)),
        lambda h, net: h.clone().addcmul_(h.flip(1), h.sigmoid()),
        lambda h, net: torch.addcmul(h, h.flip(1) * 2, h.sigmoid(), value=0.5),
    ),
    'two branches': (
        lambda h, net: h + h.flip(1),
        lambda h, net: torch.stack([h, h.flip(1)]).sum(0),
        lambda h, net: torch.stack((h, h.flip(1)), -1).sum(-1),
        lambda h, net: torch.cat([h[None], h.flip(1)[None]]).sum(0),
        lambda h, net: torch.sum(torch.stack([h, h.flip(1)], 1), dim=1),
        lambda h, net: torch.stack([h, h.flip(1)], 2).sum(axis=2, keepdim=True).squeeze(2),
        lambda h, net: torch.stack([h, h.flip(1)]).sum((0,)),
    ),
    'mean of branches': (lambda h, net: (h + h.flip(1)) / 2, lambda h, net: torch.stack([h, h.flip(1)]).mean(0)),
    'maximum of branches': (
        lambda h, net: torch.maximum(h, h.flip(1)),
        lambda h, net: torch.stack([h, h.flip(1)]).amax(0),
        lambda h, net: torch.stack([h, h.flip(1)], 1).max(1).values,
        lambda h, net: torch.max(h, other=h.flip(1)),
    ),
    'square': (
        lambda h, net: h**2,
        lambda h, net: h.square(),
        lambda h, net: h * h,
        lambda h, net: torch.pow(h, exponent=2),
    ),
    'relu': (
        lambda h, net: h.relu(),
        lambda h, net: torch.maximum(h, h.new_zeros(())),
        lambda h, net: torch.max(h.new_zeros(1), h),
        lambda h, net: h.clamp(0),
    ),
    'fill': (
        lambda h, net: h.masked_fill(~mask, 0.0),
        lambda h, net: torch.where(mask, h, 0.0),
        lambda h, net: h.where(mask, h.new_zeros(())),
        lambda h, net: torch.where(~mask, h.new_zeros(()), h),
        lambda h, net: h.clone().masked_fill_(mask.logical_not(), 0.0),
        lambda h, net: h.masked_fill(mask == 0, 0),
    ),
    'fill positions': (
        lambda h, net: torch.where(mask[0], h, 0.0),
        lambda h, net: put(h, (..., ~mask[0])),
        lambda h, net: put(h, (slice(None), slice(None), slice(None), ~mask[0])),
        lambda h, net: put(h, (..., torch.where(~mask[0])[0]), 0.0),
        lambda h, net: put(h, (..., (~mask[0]).nonzero()[:, 0]), h.new_zeros(())),
        lambda h, net: h.masked_fill(~mask[0], 0.0),
        lambda h, net: h.index_fill(3, torch.where(~mask[0])[0], 0.0),
    ),
    'fill mask': (
        lambda h, net: torch.where(mask, h, 0.0),
        lambda h, net: put(h, (..., ~mask)),
        lambda h, net: put(h, (slice(None), slice(None), ~mask)),
    ),
    'gate': (
        lambda h, net: h * h.flip(1).sigmoid(),
        lambda h, net: torch.einsum('bchw,bchw->bchw', h, h.flip(1).sigmoid()),
        lambda h, net: torch.einsum('...,...->...', h.flip(1).sigmoid(), h),
        lambda h, net: torch.einsum('bchw,bchw->bhwc', h, h.flip(1).sigmoid()).permute(0, 3, 1, 2),
    ),
    'gate of channels': (
        lambda h, net: h * h.mean((2, 3), keepdim=True).sigmoid(),
        lambda h, net: torch.einsum('bchw,bc->bchw', h, h.mean((2, 3)).sigmoid()),
        lambda h, net: torch.einsum('bc,b...c->b...c', h.mean((2, 3)).sigmoid(), h.movedim(1, -1)).movedim(-1, 1),
    ),
    'gate of positions': (
        lambda h, net: h * h.mean(1, keepdim=True).sigmoid(),
        lambda h, net: torch.einsum('bchw,bhw->bchw', h, h.mean(1).sigmoid()),
        lambda h, net: torch.einsum('bohw,bchw->bchw', h.mean(1, keepdim=True).sigmoid(), h),
    ),
    'gate of both': (
        lambda h, net: h * h.mean((2, 3), keepdim=True).sigmoid() * h.mean(1, keepdim=True).sigmoid(),
        lambda h, net: torch.einsum('bchw,bc,bhw->bchw', h, h.mean((2, 3)).sigmoid(), h.mean(1).sigmoid()),
    ),
    'spread vector': (
        lambda h, net: h.mean((2, 3))[:, :, None, None] * h.mean(1, keepdim=True).sigmoid(),
        lambda h, net: torch.einsum('bc,bhw->bchw', h.mean((2, 3)), h.mean(1).sigmoid()),
    ),
    'scale': (
        lambda h, net: h * net.weight.mean(),
        lambda h, net: torch.einsum('bchw,->bchw', h, net.weight.mean()),
        lambda h, net: torch.einsum('bchw,c->bchw', h, net.weight.mean().expand(h.shape[1])),
    ),
    'padding': (
        lambda h, net: F.pad(h, (1, 1, 1, 1)),
        lambda h, net: torch.constant_pad_nd(h, (1, 1, 1, 1), 0.),
        lambda h, net: torch.ops.aten.constant_pad_nd.default(h, [1, 1, 1, 1], 0.),
    ),
    'norm': (
        lambda h, net: h.norm(dim=1),
        lambda h, net: torch.linalg.norm(h, dim=1),
        lambda h, net: torch.linalg.vector_norm(h, 2, 1),
        lambda h, net: torch.norm(h, 2, -3),
    ),
    'window norm': (
        lambda h, net: (F.avg_pool2d(h.abs() ** 2, 2) * 4).pow(0.5),
        lambda h, net: F.lp_pool2d(h.abs(), 2.0, 2),
    ),
    'sum at places': (
        lambda h, net: torch.zeros_like(h).index_add(1, index, h),
        lambda h, net: torch.zeros_like(h).scatter_add(1, index[None, :, None, None].expand_as(h), h),
    ),
    'fold': (
        lambda h, net: F.fold(F.unfold(h, 2), (6, 6), 2),
        lambda h, net: F.fold(F.unfold(input=h, kernel_size=2), output_size=(6, 6), kernel_size=2),
    ),
    'differences': (
        lambda h, net: h[..., 1:] - h[..., :-1],
        lambda h, net: h.diff(),
        lambda h, net: torch.diff(h, dim=3),
    ),
}
COMPOSITES = {**RESNET, **RELATIVE}
# what is for the first layer, where the function is one
FIRST = ('ones', 'flat', 'wsquare', 'zbox')
CASES = [
    *((label, False) for label in COMPOSITES if label not in FIRST),
    *((label, True) for label in ('ratio', 'stabilizer', *FIRST, *RELATIVE)),
]


def widened(function):
    '''The function of an image with as many channels and positions as the first layer has.'''
    return lambda h, net: function(h if h.shape[1] == 4 else torch.cat([h, h[:, :1]], 1)[..., :6, :6], net)


@pytest.mark.parametrize('label, is_first', CASES)
@pytest.mark.parametrize('name', TWINS)
def test_twins(name, label, is_first):
    '''The same function, written otherwise, has the same map, for inputs of both signs too.'''
    if is_first and name == 'attention' and label in FIRST:
        pytest.skip('a gate is no layer, and a sum of gated inputs has no other weights than one')
    for is_relu in (True, False):
        maps = []
        for function in TWINS[name]:
            model = build(widened(function), is_relu=is_relu, is_first=is_first)
            maps.append(explain(model, images(), COMPOSITES[label]())[1])
        for num, other in enumerate(maps[1:], 1):
            assert torch.allclose(maps[0], other, rtol=1e-9, atol=1e-11 * maps[0].abs().max().item()), num


# -- gates -------------------------------------------------------------------------------------------------------------

def with_zero(h):
    '''Logits of two classes. The second is zero.'''
    return torch.stack([h, torch.zeros_like(h)], 1)


SIGMOIDS = {
    'sigmoid': torch.sigmoid, 'module': nn.Sigmoid(), 'expit': torch.special.expit,
    'in place': lambda h: h.clone().sigmoid_(),
    'softplus': lambda h: torch.exp(-F.softplus(-h)), 'softplus module': lambda h: (-nn.Softplus()(-h)).exp(),
    'logsigmoid': lambda h: F.logsigmoid(h).exp(), 'logsigmoid module': lambda h: nn.LogSigmoid()(h).exp(),
    'reciprocal': lambda h: (1 + (-h).exp()).reciprocal(), 'quotient': lambda h: 1 / (1 + torch.exp(-h)),
    'method': lambda h: (1 + torch.exp(-h)).pow(-1), 'operator': lambda h: (torch.exp(-1 * h) + 1) ** -1,
    'power': lambda h: torch.pow(torch.exp(-h) + 1., -1.),
    'constant': lambda h: torch.ones_like(h) / (1 + torch.exp(-h)),
    'all in place': lambda h: (-h).exp().add_(1).reciprocal_(), 'base': lambda h: 1 / (1 + math.e ** -h),
    'tanh': lambda h: .5 * (1 + torch.tanh(h / 2)), 'tanh module': lambda h: nn.Tanh()(h * .5) / 2 + .5,
    'softmax': lambda h: with_zero(h).softmax(1)[:, 0], 'softmin': lambda h: F.softmin(-with_zero(h), 1)[:, 0],
    'log_softmax': lambda h: with_zero(h).log_softmax(1).exp()[:, 0],
    'softmax written out': lambda h: with_zero(h).exp()[:, 0] / with_zero(h).exp().sum(1),
    'normalized': lambda h: (with_zero(h).exp() / with_zero(h).exp().sum(1, keepdim=True))[:, 0],
    'logsumexp': lambda h: (with_zero(h) - with_zero(h).logsumexp(1, keepdim=True)).exp()[:, 0],
    'logsumexp of one': lambda h: (h - with_zero(h).logsumexp(1)).exp(),
    'odds': lambda h: h.exp() / (1 + h.exp()), 'difference': lambda h: (h - F.softplus(h)).exp(),
    'log1p': lambda h: torch.exp(-torch.log1p(torch.exp(-h))),
    'log': lambda h: torch.exp(-torch.log(1 + torch.exp(-h))),
    'logaddexp': lambda h: torch.exp(-torch.logaddexp(h.new_zeros(()), -h)),
    'complement': lambda h: 1 - 1 / (1 + torch.exp(h)),
}
HARD = {
    'hardsigmoid': F.hardsigmoid, 'module': nn.Hardsigmoid(), 'clamp': lambda h: torch.clamp(h / 6 + .5, 0, 1),
    'keywords': lambda h: F.hardtanh(h / 6 + .5, min_val=0., max_val=1.), 'relu6': lambda h: F.relu6(h + 3) / 6,
    'two clamps': lambda h: (h / 6 + .5).clamp(min=0).clamp(max=1), 'relu': lambda h: F.relu(h / 6 + .5).clamp(max=1),
    'hardtanh': lambda h: (F.hardtanh(h / 3) + 1) / 2, 'hardtanh module': lambda h: nn.Hardtanh()(h / 3) * .5 + .5,
    'symmetric': lambda h: (h / 3).clamp(-1, 1) / 2 + .5, 'methods': lambda h: h.add(3).clip(min=0, max=6).div(6),
    'extrema': lambda h: torch.minimum(torch.maximum(h / 6 + .5, h.new_zeros(())), h.new_ones(())),
}
PRODUCTS = {
    'gate': lambda h, g: h * g(2 * h.flip(1)), 'swapped': lambda h, g: g(2 * h.flip(1)) * h,
    'tanh': lambda h, g: h.flip(2).tanh() * g(h), 'both': lambda h, g: h.flip(2) * g(h) + h * (1 - g(h)),
    'einsum': lambda h, g: torch.einsum('bchw,bchw->bc', h, g(2 * h.flip(1)))[:, :, None, None] + h,
}


@pytest.mark.parametrize('label', ['ratio', 'relative', 'zennit'])
@pytest.mark.parametrize('product', PRODUCTS)
@pytest.mark.parametrize('spellings', [SIGMOIDS, HARD], ids=['soft', 'hard'])
def test_gates(spellings, product, label):
    '''A gate is one however its sigmoid is written.'''
    maps = {
        name: explain(
            build(lambda h, net, gate=gate: PRODUCTS[product](h, gate), is_relu=False), images(),
            {**COMPOSITES, **OTHERS}[label]()
        )[1]
        for name, gate in spellings.items()
    }
    expected, *_ = maps.values()
    for name, actual in maps.items():
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item()), name


@pytest.mark.parametrize('function', [
    lambda h, net: torch.stack([elem.relu() for elem in h]), lambda h, net: torch.stack(list(h)),
    lambda h, net: torch.cat([h[:1], h[:1]][:len(h)]), lambda h, net: torch.stack([h[0], h[-1] + 1][:len(h)]),
    lambda h, net: put(h, (mask & torch.ones(h.shape).bool(),)),
])
def test_other_examples(function):
    '''Where examples are taken apart, contributions of several cannot be compared.'''
    model = build(widened(function))
    with pytest.raises((ValueError, RuntimeError), match='one (image )?at a time'):
        explain(model, images(), RelativeLRP())
    assert bool(explain(model, images()[:1], RelativeLRP())[1].isfinite().all())


NUMBERS = {
    'nansum': (
        lambda h, known: torch.where(known, h, torch.nan).nansum((2, 3)), lambda h, known: (h * known).sum((2, 3))
    ),
    'nanmean': (
        lambda h, known: torch.nanmean(torch.where(known, h, torch.nan), dim=(2, 3)),
        lambda h, known: (h * known).sum((2, 3)) / known.sum(),
    ),
    'of all': (
        lambda h, known: torch.where(known, h, torch.nan)[:1].nansum()[None].expand(len(h), 4),
        lambda h, known: (h * known)[:1].sum()[None].expand(len(h), 4),
    ),
    'type': (
        lambda h, known: torch.where(known, h, torch.nan).float().nansum((2, 3), dtype=torch.double),
        lambda h, known: (h * known).float().sum((2, 3), dtype=torch.double),
    ),
    'kept dimension': (
        lambda h, known: h.masked_fill(~known, torch.nan).nanmean(3, True),
        lambda h, known: (h * known).sum(3, True) / known.sum(1)[:, None],
    ),
}


@pytest.mark.parametrize('label', [*COMPOSITES, 'zennit', 'block'])
@pytest.mark.parametrize('name', NUMBERS)
def test_sums_of_numbers(name, label):
    '''What is NaN has no part in a sum that leaves it out, nor in its relevance.'''
    x, known = images()[:1], mask | (torch.arange(6) == 0)
    actual, expected = (
        explain(build(lambda h, net, function=function: function(h, known)), x, {**COMPOSITES, **OTHERS}[label]())[1]
        for function in NUMBERS[name]
    )
    assert bool(actual.isfinite().all())
    if label in ('ratio', 'symmetric', 'merge', 'block'):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_examples():
    '''Examples may be taken apart, and may change in place meanwhile.'''
    def change(h, net):
        h = h.clone()
        examples = [h[num] for num in range(len(h))]
        for elem in examples:
            elem.mul_(2)
        return torch.stack(examples)

    def change_whole(h, net):
        h = h.clone()
        examples = [h[num] for num in range(len(h))]
        h += 1
        return torch.stack(examples)

    for function, twin in (
        (change, lambda h: h * 2), (change_whole, lambda h: h + 1), (lambda h, net: torch.stack(list(h)), torch.clone),
        (lambda h, net: torch.cat([h[num:num + 1] for num in range(len(h))]), torch.clone),
        (lambda h, net: torch.cat(h.split(1)), torch.clone),
    ):
        actual, expected = (
            explain(build(elem), images(), ResNetLRP()) for elem in (function, lambda h, net, twin=twin: twin(h))
        )
        torch.testing.assert_close(actual, expected)
