'''Batch normalization in all its forms: folded wherever it is a fixed affine map, refused where it mixes examples.'''
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import randomize
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from zennit_resnet import BlockLRP, RelativeLRP, ResidualCanonizer, ResNetLRP, initial_relevance
from zennit_resnet.canonizers import batches

MERGING = {
    'ratio': lambda: ResNetLRP(batch_norm='merge'), 'relative': RelativeLRP,
    'zennit': lambda: EpsilonPlus(canonizers=[ResidualCanonizer(batch_norm='merge')]),
}
CHANNELS = 6


class DetectronNorm(nn.Module):
    '''Frozen, by the function.'''
    def __init__(self, norm):
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x):
        '''Normalized.'''
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-5)


class ArithmeticNorm(DetectronNorm):
    '''Frozen, written out.'''
    eps = 1e-5

    def forward(self, x):
        '''Normalized.'''
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class BuiltinNorm(DetectronNorm):
    '''The function of torch, whose arguments have another order.'''
    def forward(self, x):
        '''Normalized.'''
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, .1, 1e-5, False
        )


class NormActivation(nn.BatchNorm2d):
    '''With an activation, as in timm.'''
    def forward(self, x):
        '''Normalized, and clipped.'''
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps
        ).relu()


class OtherNorm(DetectronNorm):
    '''Has statistics, and does something else.'''
    def forward(self, x):
        '''Not normalized.'''
        return x * self.weight[:, None, None].abs()


def frozen(norm):
    '''That of torchvision.'''
    other = FrozenBatchNorm2d(CHANNELS)
    other.load_state_dict(norm.state_dict(), strict=False)
    return other


def tracking(norm):
    '''Instance normalization with running statistics.'''
    other = nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True)
    other.load_state_dict(norm.state_dict())
    return other


def activated(norm):
    '''With an activation.'''
    other = NormActivation(CHANNELS)
    other.load_state_dict(norm.state_dict())
    return other


def synchronized(norm):
    '''Across processes.'''
    return nn.SyncBatchNorm.convert_sync_batchnorm(norm)


class Affine(nn.Module):
    '''Frozen, as one factor and one summand for each channel, in a way to write it.'''
    def __init__(self, norm, function):
        super().__init__()
        norm, self.function = norm.double(), function
        self.register_buffer('w', (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach())
        self.register_buffer('b', (norm.bias - norm.running_mean * self.w).detach())

    def forward(self, x):
        '''Normalized.'''
        return self.function(x, self.w, self.b)


def spatial(tensor):
    '''With dimensions for positions.'''
    return tensor[:, None, None]


AFFINE = {
    'product and sum': lambda x, w, b: x * spatial(w) + spatial(b),
    'views': lambda x, w, b: w.view(1, -1, 1, 1) * x + spatial(b),
    'channels last': lambda x, w, b: (x.permute(0, 2, 3, 1) * w + b).permute(0, 3, 1, 2),
    'moved': lambda x, w, b: (x.movedim(1, -1) * w + b).movedim(-1, 1),
    'transposed': lambda x, w, b: (x.transpose(1, 3) * w + b).transpose(1, 3),
    'moved before each': lambda x, w, b: ((x.permute(0, 2, 3, 1) * w).permute(0, 3, 1, 2) + spatial(b)),
    'flat': lambda x, w, b: (x.flatten(2) * w[:, None] + b[:, None]).view_as(x),
    'batch of channels': lambda x, w, b: (
        x.reshape(-1, *x.shape[2:]) * spatial(w.repeat(len(x))) + spatial(b.repeat(len(x)))
    ).view_as(x),
    'addcmul': lambda x, w, b: torch.addcmul(spatial(b), x, spatial(w)),
    'addcmul swapped': lambda x, w, b: torch.addcmul(spatial(b), spatial(w), x),
    'in place': lambda x, w, b: x.mul_(spatial(w)).add_(spatial(b)),
    'operators': lambda x, w, b: x.__imul__(spatial(w)).__iadd__(spatial(b)),
    'partly in place': lambda x, w, b: (x * spatial(w)).add_(spatial(b)),
    'cast': lambda x, w, b: (x.double() * spatial(w) + spatial(b)).to(x.dtype),
    'difference': lambda x, w, b: (x - spatial(-b / w)) * spatial(w) + 0 * spatial(b),
    'quotient': lambda x, w, b: x / spatial(1 / w) + spatial(b),
    'negative': lambda x, w, b: spatial(b) - x * spatial(-w),
    'alpha': lambda x, w, b: torch.add(spatial(b), x * spatial(w / 2), alpha=2),
    'einsum': lambda x, w, b: torch.einsum('bchw,c->bchw', x, w) + spatial(b),
    'einsum swapped': lambda x, w, b: torch.einsum('c,...chw->...chw', w, x) + spatial(b),
    'expanded': lambda x, w, b: x * spatial(w).expand(x.shape).clone() + spatial(b).expand_as(x),
}
NATIVE = {
    'native': torch.native_batch_norm, 'overload': torch.ops.aten.native_batch_norm.default,
    'legit': torch.ops.aten._native_batch_norm_legit,
}


class NativeNorm(DetectronNorm):
    '''A function that returns statistics as well, with its flag.'''
    def __init__(self, norm, function, *flags):
        super().__init__(norm)
        self.function, self.flags = function, flags

    def forward(self, x):
        '''Normalized.'''
        return self.function(
            x, self.weight, self.bias, self.running_mean, self.running_var, *self.flags, .1, 1e-5
        )[0]


class MovedNorm(DetectronNorm):
    '''The function, on rows of channels, in single precision or half of it.'''
    def forward(self, x):
        '''Normalized.'''
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        rows = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias)
        return rows.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


NORMS = {
    'FrozenBatchNorm2d': frozen, 'function': DetectronNorm, 'arithmetic': ArithmeticNorm, 'builtin': BuiltinNorm,
    'instance': tracking, 'activated': activated, 'moved': MovedNorm,
    **{name: lambda norm, function=function: NativeNorm(norm, function, False) for name, function in NATIVE.items()},
    'no training': lambda norm: NativeNorm(norm, torch.ops.aten._native_batch_norm_legit_no_training),
    **{name: lambda norm, function=function: Affine(norm, function) for name, function in AFFINE.items()},
}


def network(convert=lambda norm: norm, functional=False):
    '''A network with a normalization after a convolution.'''
    class Net(nn.Module):
        '''One block.'''
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)
            self.branch, self.head = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 4)

        def forward(self, x):
            '''Logits.'''
            x = F.conv2d(x, self.stem.weight, self.stem.bias) if functional else self.stem(x)
            x = self.norm(x).relu()
            return self.head((x + self.branch(x)).relu().mean((2, 3)))

    model = randomize(Net()).eval()
    model.norm = convert(model.norm).eval()
    return model.double()


def explain(model, composite):
    '''Output and relevance of two images.'''
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, initial_relevance([1, 2], 'one'))


@pytest.mark.parametrize('functional', [False, True])
@pytest.mark.parametrize('name', MERGING)
@pytest.mark.parametrize('norm', NORMS)
def test_folded(norm, name, functional):
    '''The same map as with BatchNorm2d, which is that of folding by hand.'''
    expected = explain(network(), MERGING[name]())
    actual = explain(network(NORMS[norm], functional), MERGING[name]())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    folded = network()
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(folded.stem, folded.norm)
    folded.stem, folded.norm = fused, nn.Identity()
    torch.testing.assert_close(explain(folded, MERGING[name]()), expected, rtol=1e-6, atol=1e-9)


PRODUCTS = {
    'linear': F.linear, 'product': lambda x, w, b: x @ w.T + b, 'addmm': lambda x, w, b: torch.addmm(b, x, w.T),
    'in place': lambda x, w, b: (x @ w.T).add_(b),
}


PRODUCTS.update({
    'einsum': lambda x, w, b: torch.einsum('bi,ki->bk', x, w) + b,
    'left': lambda x, w, b: (w @ x[..., None])[..., 0] + b,
    'tensordot': lambda x, w, b: torch.tensordot(x, w, ([1], [1])) + b, 'transposed': lambda x, w, b: (w @ x.T).T + b,
    'bmm': lambda x, w, b: torch.bmm(x[:, None], w.T.expand(len(x), -1, -1))[:, 0] + b,
})


@pytest.mark.parametrize('name', ['ratio', 'relative'])
@pytest.mark.parametrize('how', PRODUCTS)
def test_folded_into_products(how, name):
    '''A linear layer may be written in several ways.'''
    class Net(nn.Module):
        '''Two layers.'''
        def __init__(self, product):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.head = nn.Linear(243, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
            self.product = product

        def forward(self, x):
            '''Logits.'''
            return self.head(self.norm(self.product(self, x.flatten(1))).relu())

    def build(product):
        return randomize(Net(product)).double().eval()

    if (how, name) == ('transposed', 'relative'):
        pytest.skip('contributions are those of examples, which are not the first dimension')
    expected = explain(build(lambda net, x: net.first(x)), MERGING[name]())
    actual = explain(build(lambda net, x: PRODUCTS[how](x, net.first.weight, net.first.bias)), MERGING[name]())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


LAYOUTS = {
    'convolution': lambda x, w, b, norm: norm(F.conv2d(x, w[:, :, None, None], b)),
    'channels last': lambda x, w, b, norm: norm(F.linear(x.permute(0, 2, 3, 1), w, b).permute(0, 3, 1, 2)),
    'product': lambda x, w, b, norm: norm((x.permute(0, 2, 3, 1) @ w.T + b).permute(0, 3, 1, 2)),
    'left': lambda x, w, b, norm: norm((w @ x.flatten(2) + b[:, None]).unflatten(2, x.shape[2:])),
    'einsum': lambda x, w, b, norm: norm(torch.einsum('bchw,kc->bkhw', x, w) + b[:, None, None]),
    'written out': lambda x, w, b, norm: torch.einsum('bchw,kc->bkhw', x, w * factors(norm)[0][:, None]) + spatial(
        factors(norm)[0] * b + factors(norm)[1]
    ),
    'rows': lambda x, w, b, norm: F.batch_norm(
        F.linear(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), w, b), norm.running_mean, norm.running_var, norm.weight,
        norm.bias, False, 0., norm.eps
    ).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2),
    'rows of images': lambda x, w, b, norm: F.batch_norm(
        F.linear(x.permute(0, 2, 3, 1), w, b).flatten(0, 2), norm.running_mean, norm.running_var, norm.weight,
        norm.bias, False, 0., norm.eps
    ).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2),
    'cast': lambda x, w, b, norm: norm(F.conv2d(x, w[:, :, None, None], b).float().double()),
}


def factors(norm):
    '''Factor and summand of each channel.'''
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


@pytest.mark.parametrize('name', ['ratio', 'symmetric', 'relative'])
@pytest.mark.parametrize('how', LAYOUTS)
def test_folded_into_any_layout(how, name):
    '''What was moved in between does not matter.'''
    class Net(nn.Module):
        '''A layer of single positions, with a normalization.'''
        def __init__(self, layer):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
            self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
            self.layer = layer

        def forward(self, x):
            '''Logits.'''
            x = self.layer(self.stem(x).relu(), self.weight, self.bias, self.norm).relu()
            return self.head((x + x.flip(2)).relu().mean((2, 3)))

    create = {**MERGING, 'symmetric': lambda: ResNetLRP('symmetric', batch_norm='merge')}[name]
    expected, actual = (
        explain(randomize(Net(LAYOUTS[key])).double().eval(), create()) for key in ('convolution', how)
    )
    if (how, name) == ('rows', 'relative'):
        # contributions of rows are those of more examples
        actual[1].mul_(1 / 49)
    tolerance = 1e-4 if how == 'cast' else 1e-9
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected[1].abs().amax()))


ORDERS = {
    'flipped': lambda h: h.flip(1), 'mirrored': lambda h: h.flip(3), 'rolled': lambda h: h.roll(2, 1),
    'indexed': lambda h: h[:, [3, 1, 5, 0, 2, 4]],
    'selected': lambda h: h.index_select(1, torch.tensor([3, 1, 5, 0, 2, 4])), 'cropped': lambda h: h[:, :, 1:-1, 2:],
    'some channels': lambda h: h[:, [3, 5, 0]], 'first channels': lambda h: h[:, :4],
    'shuffled': lambda h: h.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
}


@pytest.mark.parametrize('written', [False, True])
@pytest.mark.parametrize('name', MERGING)
@pytest.mark.parametrize('how', ORDERS)
def test_folded_in_any_order(how, name, written):
    '''The channels that reach a normalization may have another order, or be some of those of the layer.'''
    class Net(nn.Module):
        '''A layer whose channels are picked before or after a normalization of all.'''
        def __init__(self, is_first):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            channels = ORDERS[how](torch.arange(6.)[None, :, None, None].expand(1, 6, 7, 7))[0, :, 0, 0].long()
            self.head, self.is_first = nn.Linear(len(channels), 4), is_first
            randomize(self)
            # z+ tells signs of factors, not their sizes
            self.norm.weight.data = torch.tensor([-.5, .7, -.9, 1.1, 1.3, -1.5])
            if not is_first:
                for key in ('weight', 'bias', 'running_mean', 'running_var'):
                    getattr(self.norm, key).data = getattr(self.norm, key).data[channels]

        def normalize(self, h):
            scale, shift = factors(self.norm)
            return h * spatial(scale) + spatial(shift) if written else self.norm(h)

        def forward(self, x):
            '''Logits.'''
            h = self.stem(x)
            h = ORDERS[how](self.normalize(h)) if self.is_first else self.normalize(ORDERS[how](h))
            return self.head(h.relu().mean((2, 3)))

    expected, actual = (explain(Net(elem).double().eval(), MERGING[name]()) for elem in (True, False))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    passed = explain(Net(False).double().eval(), ResNetLRP())
    assert name == 'relative' or not torch.allclose(passed[1], expected[1])


@pytest.mark.parametrize('how', [
    lambda x, norm: x * norm.w, lambda x, norm: x * norm.w + x.detach(),
    lambda x, norm: x * torch.rand(7, 7).double() + 1,
    lambda x, norm: x.transpose(2, 3) * torch.rand(7).double() + 1, lambda x, norm: (x * norm.w).relu() + norm.b,
    lambda x, norm: x * norm.w + norm.b + x, lambda x, norm: torch.addcmul(torch.zeros_like(x), x, norm.w),
    lambda x, norm: x * norm.w + 0 * norm.b,
])
def test_other_products(how):
    '''Layer scale and constants that are no normalization of channels are not folded.'''
    class Scale(Affine):
        '''Uses its constants.'''
        def forward(self, x):
            '''Scaled.'''
            torch.manual_seed(0)
            return how(x, types.SimpleNamespace(w=spatial(self.w), b=spatial(self.b)))

    model = network(lambda norm: Scale(norm, None))
    for create in (RelativeLRP, ResNetLRP):
        maps = [explain(model, create(batch_norm=batch_norm)) for batch_norm in ('merge', 'pass')]
        torch.testing.assert_close(*maps)


USERS = {
    'full backward hook': lambda layer: layer.register_full_backward_hook(lambda *args: None),
    'full backward pre-hook': lambda layer: layer.register_full_backward_pre_hook(lambda *args: None),
    'view': lambda layer: layer.register_forward_hook(lambda module, args, output: output.view_as(output)),
    'copy': lambda layer: layer.register_forward_hook(lambda module, args, output: output.clone()),
}


@pytest.mark.parametrize('name', ['ratio', 'relative'])
@pytest.mark.parametrize('hook', USERS)
def test_hooks_of_users(hook, name):
    '''Hooks on the layer leave the map as it is.'''
    model = network()
    USERS[hook](model.stem)
    torch.testing.assert_close(explain(model, MERGING[name]()), explain(network(), MERGING[name]()))


CHANGES = {
    'view': lambda h: h[:, :, ::2].relu_(), 'columns': lambda h: h[..., ::2].mul_(.5),
    'module': lambda h: nn.ReLU(inplace=True)(h[:, :, ::2]), 'channels': lambda h: h[:, :4].neg_(),
    'detached': lambda h: h.detach().mul_(.5),
}


@pytest.mark.parametrize('how', CHANGES)
def test_changed_before_the_normalization(how):
    '''What is changed in place before the normalization is not the output of the layer any more.'''
    class Changed(nn.Module):
        '''The normalization after the change.'''
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, h):
            '''Normalized.'''
            CHANGES[how](h)
            return self.norm(h)

    model = network(Changed)
    torch.testing.assert_close(explain(model, ResNetLRP(batch_norm='merge')), explain(model, ResNetLRP()))


def test_threads():
    '''Threads that share a context with folded layers do not share what they know of their forward passes.'''
    model, results = network(), [None] * 3
    inputs = [torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(num)).double() for num in range(3)]
    with Gradient(model=model, composite=RelativeLRP()) as attributor:
        expected = [attributor(x.clone(), initial_relevance(1))[1] for x in inputs]

        def work(num):
            for _ in range(10):
                leaf = inputs[num].clone().requires_grad_()
                output = model(leaf)
                relevance, = torch.autograd.grad(output, leaf, initial_relevance(1)(output))
                results[num] = relevance if results[num] is None or torch.equal(relevance, results[num]) else None

        threads = [threading.Thread(target=work, args=(num,)) for num in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for found, elem in zip(results, expected):
        torch.testing.assert_close(found, elem)


@pytest.mark.parametrize('name', MERGING)
def test_not_folded(name):
    '''Statistics alone do not make a normalization.'''
    model, twin = network(OtherNorm), network(OtherNorm)
    twin.norm.running_mean = None
    torch.testing.assert_close(explain(model, MERGING[name]()), explain(twin, MERGING[name]()))


@pytest.mark.parametrize('norm', NORMS)
def test_passed(norm):
    '''Without folding, relevance passes all of them.'''
    torch.testing.assert_close(
        explain(network(NORMS[norm]), ResNetLRP()), explain(network(), ResNetLRP()), rtol=1e-6, atol=1e-9
    )


MIXING = {
    'module': lambda norm: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    'function': lambda norm: Function(lambda x: F.batch_norm(x, None, None, training=True)),
    'keywords': lambda norm: Function(
        lambda x: F.batch_norm(input=x, running_mean=None, running_var=None, training=True)
    ),
    'with statistics': lambda norm: Function(lambda x: F.batch_norm(
        x, torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double(), training=True)),
    'builtin': lambda norm: Function(lambda x: torch.batch_norm(x, None, None, None, None, True, .1, 1e-5, False)),
}


class Function(nn.Module):
    '''A function as a module.'''
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        '''Run it.'''
        return self.function(x)


@pytest.mark.parametrize('name', [*MERGING, 'pass', 'block'])
@pytest.mark.parametrize('norm', MIXING)
def test_mixing(norm, name):
    '''A normalization by the statistics of the batch is an error for several images, and none for one.'''
    create = {**MERGING, 'pass': ResNetLRP, 'block': BlockLRP}[name]
    model, x = network(MIXING[norm]), torch.randn(2, 3, 9, 9).double()
    with pytest.raises(RuntimeError, match='norm|model'):
        Gradient(model, create())(x, initial_relevance(1))
    if norm != 'with statistics':
        output, relevance = Gradient(model, create())(x[:1], initial_relevance(1))
        assert bool(relevance.isfinite().all())


def test_normalization_of_one():
    '''A tensor that was reshaped to be a single example is normalized for each image by itself.'''
    def instance_norm(x):
        return F.batch_norm(x.reshape(1, -1, *x.shape[2:]), None, None, training=True).view_as(x)

    model, x = network(lambda norm: Function(instance_norm)), torch.randn(2, 3, 9, 9).double()
    relevance = Gradient(model, ResNetLRP())(x, initial_relevance(1))[1]
    single = Gradient(model, ResNetLRP())(x[1:], initial_relevance(1))[1]
    torch.testing.assert_close(relevance[1:], single)


# -- statistics of the batch that are written by hand ------------------------------------------------------------------

def without_gradient(h):
    '''Statistics that are no part of the graph.'''
    with torch.no_grad():
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True)
    return (h - mean) / (var + 1e-5).sqrt()


def by_both(h):
    '''The function that returns both.'''
    var, mean = torch.var_mean(h, (0, 2, 3), keepdim=True)
    return (h - mean) / (var + 1e-5).sqrt()


def rows(h):
    '''One row for each channel.'''
    return h.transpose(0, 1).reshape(h.shape[1], -1)


STATISTICS = {
    'mean': lambda h: h - h.mean((0, 2, 3), keepdim=True), 'mean of images': lambda h: h - h.mean(0),
    'keywords': lambda h: torch.sub(h, torch.mean(input=h, dim=[0], keepdim=True)),
    'negative': lambda h: h - h.mean(-4),
    'axis': lambda h: h - h.mean(axis=0), 'std': lambda h: h / h.std(0), 'var': lambda h: h / (h.var(0) + 1e-5).sqrt(),
    'var_mean': by_both, 'std_mean': lambda h: h - torch.std_mean(h, 0)[1], 'sum': lambda h: h - h.sum(0) / len(h),
    'amax': lambda h: h / h.amax((0, 2, 3), keepdim=True).clamp(min=.1), 'max of all': lambda h: h / h.max(),
    'mean of all': lambda h: h - h.mean(), 'in place': lambda h: h.clone().sub_(h.mean(0)),
    'detached': lambda h: h - h.mean(0).detach(), 'of detached': lambda h: h - h.detach().mean(0),
    'without gradient': without_gradient, 'gate': lambda h: h * h.mean((0, 2, 3), keepdim=True).sigmoid(),
    'rows': lambda h: h - rows(h).mean(1)[:, None, None], 'std of rows': lambda h: h / rows(h).std(1)[:, None, None],
    'channels last': lambda h: h - h.permute(0, 2, 3, 1).reshape(-1, h.shape[1]).mean(0)[:, None, None],
    'einsum': lambda h: h - torch.einsum('bchw->c', h)[:, None, None] / h[:, 0].numel(),
    'product': lambda h: h - (torch.ones(1, len(h)).double() / len(h) @ h.flatten(1)).view(1, *h.shape[1:]),
    'norm': lambda h: h / h.norm(dim=0), 'normalize': lambda h: F.normalize(h, dim=0),
    'norm of all': lambda h: h / h.norm(),
    'layer_norm': lambda h: F.layer_norm(rows(h), [rows(h).shape[1]]).view(-1, len(h), *h.shape[2:]).transpose(0, 1),
    'instance_norm': lambda h: F.instance_norm(rows(h)[None])[0].view(-1, len(h), *h.shape[2:]).transpose(0, 1),
    'softmax': lambda h: h * h.softmax(0), 'median': lambda h: h - h.median(0).values, 'cumsum': lambda h: h.cumsum(0),
    'stack': lambda h: h - torch.stack(list(h)).mean(0), 'sum of list': lambda h: h - sum(h) / len(h),
    'first': lambda h: h - h[:1] / 2, 'neighbour': lambda h: h + h.roll(1, 0), 'nanmean': lambda h: h - h.nanmean(0),
}


@pytest.mark.parametrize('name', [*MERGING, 'pass', 'block'])
@pytest.mark.parametrize('how', STATISTICS)
def test_statistics_by_hand(how, name):
    '''The map of one image must not depend on others.'''
    create = {**MERGING, 'pass': ResNetLRP, 'block': BlockLRP}[name]
    model, x = network(lambda norm: Function(STATISTICS[how])), torch.randn(2, 3, 9, 9).double()
    with pytest.raises(RuntimeError, match='norm .*one image at a time'):
        Gradient(model, create())(x, initial_relevance(1))
    # nothing is left behind
    with torch.no_grad():
        model(x)
    Gradient(network(), create())(x, initial_relevance(1))


INDEPENDENT = {
    'logged': lambda h: (h.mean(0), h)[1], 'branches': lambda h: torch.stack([h, h.flip(1)]).sum(0),
    'softmax': lambda h: h * ((h - h.max()).exp() / (h - h.max()).exp().sum(1, keepdim=True)),
    'one by one': lambda h: torch.cat([elem - elem.mean((0, 2, 3), keepdim=True) for elem in h.split(1)]),
    'channels': lambda h: (h.flatten(0, 1) - h.flatten(0, 1).mean((1, 2), keepdim=True)).view_as(h),
    'groups': lambda h: F.normalize(h.reshape(len(h), 2, -1), dim=2).view_as(h),
    'channels first': lambda h: h + h.transpose(0, 1).mean(0)[:, None], 'instances': lambda h: h - h.mean((2, 3), True),
}


@pytest.mark.parametrize('name', ['ratio', 'zennit', 'pass', 'block'])
@pytest.mark.parametrize('how', INDEPENDENT)
def test_no_statistics(how, name, monkeypatch):
    '''Other reductions are none of the batch, whatever their dimensions are.'''
    create = {**MERGING, 'pass': ResNetLRP, 'block': BlockLRP}[name]
    model, x = network(lambda norm: Function(INDEPENDENT[how])), torch.randn(3, 3, 9, 9).double()
    calls, checks, check = [], [], batches.depends_on_batch
    monkeypatch.setattr(batches, 'depends_on_batch', lambda *args: checks.append(0) or check(*args))
    model.register_forward_hook(lambda *args: calls.append(0))
    relevance = Gradient(model, create())(x, initial_relevance(1))[1]
    for num in range(3):
        single = Gradient(model, create())(x[num:num + 1], initial_relevance(1))[1]
        torch.testing.assert_close(relevance[num:num + 1], single, rtol=1e-6, atol=1e-9)
    # it runs again only if it may be one
    is_suspicious = how in ('logged', 'softmax', 'one by one', 'channels first', 'branches', 'channels')
    assert len(calls) == 4 and len(checks) == is_suspicious


def test_arguments_by_name():
    '''Inputs may be given in any way, and not all of them have examples.'''
    class Net(nn.Module):
        '''Takes a dict.'''
        def __init__(self, is_mixing):
            super().__init__()
            self.net, self.is_mixing = network(), is_mixing

        def forward(self, inputs, scale):
            '''Logits, and the mean.'''
            x = inputs['image'] * scale
            return (self.net(x - x.mean(0) if self.is_mixing else x), x.mean(0))

    x = torch.randn(2, 3, 9, 9).double().requires_grad_()
    for is_mixing in (True, False):
        model = Net(is_mixing)
        with ResNetLRP().context(model):
            if is_mixing:
                with pytest.raises(RuntimeError, match='one image at a time'):
                    model({'image': x}, scale=torch.ones(3, 1, 1).double())
            else:
                output, _ = model(inputs={'image': x}, scale=torch.ones(3, 1, 1).double())
                assert bool(torch.autograd.grad(output[:, 0].sum(), x)[0].any())
