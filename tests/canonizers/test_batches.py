'''Networks in which images of a batch depend on each other, and those in which they do not.'''
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from zennit_resnet import BlockLRP, RelativeLRP, ResidualCanonizer, ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.canonizers import batches

COMPOSITES = {
    'ratio': ResNetLRP, 'relative': RelativeLRP, 'block': BlockLRP, 'splitting': lambda: with_splitting(EpsilonPlus()),
}


class Net(nn.Module):
    '''A convolution, a function of its output, and a head.'''
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3, padding=1), function
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        '''Logits.'''
        return self.head(self.function(self.conv(x).relu()))


class Apply(nn.Module):
    '''A function.'''
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        '''What it returns.'''
        return self.function(x.relu())


class Views(nn.Module):
    '''Several views of each example, whose features are averaged.'''
    def __init__(self, mask=None):
        super().__init__()
        self.net, self.mask = Net(self.average), mask

    def average(self, h):
        '''The mean of views.'''
        return h.view(3, -1, *h.shape[1:]).mean(0)

    def forward(self, x):
        '''Logits. Some may be left out.'''
        output = self.net(x.transpose(0, 1).flatten(0, 1))
        return output if self.mask is None else output.masked_fill(self.mask, -torch.inf)


def build(create):
    '''A network in double precision.'''
    torch.manual_seed(0)
    return create().double().eval()


def images(*shape):
    '''A batch of four.'''
    return torch.randn(4, *shape or (3, 8, 8), generator=torch.Generator().manual_seed(1)).double()


def explain(model, x, composite):
    '''Relevance of the input.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x.clone(), initial_relevance(1))[1]


def spread(h, values):
    '''Add the mean of the values of each image to it.'''
    return h + values.flatten(1).mean(1).view(-1, 1, 1, 1)


def assigned(target, index, values):
    '''A tensor to which values were assigned.'''
    target[index] = values
    return target


NEXT = torch.tensor([1, 2, 3, 0])
MIXING = {
    'mean': lambda h: h - h.mean(0), 'ghosts': lambda h: torch.cat([elem - elem.mean(0) for elem in h.split(2)]),
    'pairs': lambda h: torch.stack((h[0::2], h[1::2]), 1).amax(1).repeat_interleave(2, 0),
    'view': lambda h: (h.view(-1, 2, 8, 8, 8) - h.view(-1, 2, 8, 8, 8).mean(1, keepdim=True)).view(h.shape),
    'unflatten': lambda h: h.unflatten(0, (2, 2)).mean(1).repeat_interleave(2, 0), 'mT': lambda h: h - h.flatten(
        1).mT.mean(-1).view(1, 8, 8, 8),
    'layer norm': lambda h: F.layer_norm(h, h.shape),
    'group norm': lambda h: F.group_norm(h.reshape(1, -1, 8, 8), 1).view(h.shape),
    'differences': lambda h: (h[:, None] - h[None]).mean(1),
    'tensordot': lambda h: h - torch.tensordot(torch.ones(4).double() / 4, h, 1),
    'roll': lambda h: h.transpose(0, 1).roll(1, 1).transpose(0, 1),
    'flat roll': lambda h: h.flatten().roll(512).view(h.shape),
    'shift': lambda h: torch.cat((h[:1], h[1:] + h[:-1])), 'pad': lambda h: F.pad(h, (0, 0, 0, 0, 0, 0, 1, -1)),
    'unsafe chunk': lambda h: h + torch.unsafe_chunk(h, 4)[0],
    'pooling': lambda h: h - F.adaptive_avg_pool3d(h.transpose(0, 1), (1, 8, 8)).transpose(0, 1),
    'index_add': lambda h: h + torch.zeros_like(h).index_add(0, NEXT, h),
    'index_copy_': lambda h: h + torch.zeros_like(h).index_copy_(0, NEXT, h),
    'index_put': lambda h: h + torch.zeros_like(h).index_put((NEXT,), h),
    'scatter': lambda h: h + torch.zeros_like(h).scatter(0, NEXT.view(-1, 1, 1, 1).expand_as(h), h),
    'assignment': lambda h: h + assigned(torch.zeros_like(h), NEXT, h),
    'strides': lambda h: h + h.as_strided(h.shape, (64, 256, 8, 1)),
    'cosine': lambda h: h * F.cosine_similarity(h, h.exp(), dim=0),
    'convolution': lambda h: spread(h, F.conv2d(h, h)), 'fft': lambda h: torch.fft.fft(h, dim=0).real, **{
        name: lambda h, product=product: spread(h, product(h.flatten(1))) for name, product in {
            'einsum': lambda h: torch.einsum('bc,dc->bd', h, h), 'list': lambda h: torch.einsum('bc,dc->bd', [h, h]),
            'dots': lambda h: torch.einsum('...c,dc->...d', h, h),
            'dots of two sizes': lambda h: torch.einsum('...c,...c->...', h[:, None].expand(-1, 4, -1), h),
            'numbers': lambda h: torch.einsum(h, [0, 1], h, [2, 1], [0, 2]), 'weights': lambda h: F.linear(h, h),
            'attention': lambda h: F.scaled_dot_product_attention(h, h, h),
            'expand_as': lambda h: h.expand_as(h[:, None].expand(-1, 4, -1)).mean(2),
            'broadcast': lambda h: (h[:, None].expand(-1, 4, -1) + h).mean(2),
            'product of two sizes': lambda h: (h @ h[:, :, None].expand(-1, -1, 2)).mean(2),
            'chain': lambda h: torch.linalg.multi_dot([h, h.T, h]),
            'inverse': lambda h: torch.linalg.inv(h[:, :4] + 99 * torch.eye(4)),
        }.items()
    },
}


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('how', MIXING)
def test_mixing(how, name):
    '''It is an error if the map of an image would depend on the others, also within parts of the batch.'''
    with pytest.raises((RuntimeError, ValueError), match='one (image |example )?at a time|single example'):
        explain(build(lambda: Net(MIXING[how])), images(), COMPOSITES[name]())


@pytest.mark.parametrize('function', [
    lambda h: h.T.cumsum(1).T, lambda h: F.layer_norm(h.T, (4,)).T, lambda h: torch.einsum('ab->ba', h).cumsum(1),
])
def test_as_many_images_as_channels(function):
    '''That the dimension of images was moved is not only found out by its size.'''
    model = build(lambda: nn.Sequential(nn.Linear(5, 4), Apply(function), nn.Linear(4, 3)))
    with pytest.raises(RuntimeError, match='4 images'):
        explain(model, images(5), ResNetLRP())


def test_hooks_and_errors_hide_nothing():
    '''A hook or a network that fails for a part of the batch does not let the others through.'''
    model = build(lambda: Net(MIXING['mean']))
    model.conv.register_forward_hook(lambda module, args, output: output.retain_grad())
    with pytest.raises(RuntimeError, match='one image at a time'):
        explain(model, images(), ResNetLRP())

    with pytest.raises(RuntimeError, match='one image at a time'):
        explain(build(lambda: Net(lambda h: h.view(4, 8, 8, 8) - h.mean(0))), images(), ResNetLRP())

    def fails(h):
        assert torch.is_grad_enabled()
        return h - h.mean(0)

    with pytest.raises(RuntimeError, match='cannot be run'):
        explain(build(lambda: Net(fails)), images(), ResNetLRP())


def test_errors_are_no_answer():
    '''A network that has raised an error is asked again.'''
    errors = [ValueError('first'), ValueError('second')]

    def fails(h):
        h = h - h.mean(0)
        if errors:
            raise errors.pop(0)
        return h

    model = build(lambda: Net(fails))
    for message in ('first', 'second', 'one image at a time', 'one image at a time'):
        with pytest.raises((ValueError, RuntimeError), match=message):
            explain(model, images(), ResNetLRP())


@pytest.mark.parametrize('batch_first', [True, False])
def test_images_as_tokens(batch_first):
    '''Without a batch, attention takes images for tokens.'''
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    model = build(lambda: nn.Sequential(nn.Linear(5, 8), Apply(lambda h: h + attention(h, h, h)[0]), nn.Linear(8, 3)))
    # as a part of the network
    model[1].attention = attention.double().eval()
    with pytest.raises(RuntimeError, match='one image at a time'):
        explain(model, images(5), ResNetLRP())


def test_images_as_channels():
    '''Without a batch, a convolution takes images for channels.'''
    layers = nn.Conv2d(1, 1, 3, padding=1), Apply(lambda h: h.squeeze(1)), nn.Conv2d(4, 4, 3, padding=1)
    model = build(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(RuntimeError, match='one image at a time'):
        explain(model, images(1, 8, 8), BlockLRP())


def test_independent():
    '''Views of the same example are no other images. Hooks run once for each call, random numbers stay as they are.'''
    model, x, sizes = build(Views), images(3, 3, 8, 8), []
    model.net.conv.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    torch.manual_seed(0)
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        found = [attributor(x.clone(), initial_relevance(1))[1] for _ in range(2)]
    assert sizes == [12, 12] and torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    alone = torch.cat([explain(model, elem[None], ResNetLRP()) for elem in x])
    for elem in found:
        torch.testing.assert_close(elem, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('function', [
    lambda h: torch.einsum('bchw,bchw->bc', h, h), lambda h: h.flatten(2) @ h.flatten(2).mT,
    lambda h: torch.einsum('dc,bchw->bdhw', torch.ones(2, 8).double(), h),
    lambda h: torch.einsum('...w,vw->...v', h, torch.ones(2, 8).double()),
    lambda h: F.scaled_dot_product_attention(h, h, h), lambda h: F.conv2d(h, torch.ones(2, 8, 3, 3).double()),
])
def test_not_asked(function):
    '''Networks that use functions of one image after the other are run once.'''
    sizes = []
    model, x = build(lambda: Net(lambda h: sizes.append(len(h)) or spread(h, function(h)))), images()
    found = explain(model, x, ResNetLRP())
    assert sizes == [4]
    torch.testing.assert_close(found[:1], explain(model, x[:1], ResNetLRP()))


def test_two_copies():
    '''Two images for each end of the batch are enough to find that it does not matter, and all if these do not run.'''
    sizes = []
    model, x = build(lambda: Net(lambda h: sizes.append(len(h)) or h.transpose(0, 1).flip(0).transpose(0, 1))), images()
    found = explain(model, x, ResNetLRP())
    assert sizes == [4, 2, 2]
    for num in range(4):
        torch.testing.assert_close(found[num], explain(model, x[num:num + 1], ResNetLRP())[0])

    fixed = build(lambda: Net(lambda h: sizes.append(len(h)) or h.transpose(0, 1).reshape(8, 4, 8, 8).transpose(0, 1)))
    sizes.clear()
    explain(fixed, x, ResNetLRP())
    assert sizes == [4, 2, 4, 2, 4]


def test_array_as_index():
    '''Images may be picked by an array of NumPy.'''
    x, index = images(), np.arange(4)
    found, expected = (explain(build(lambda: Net(how)), x, ResNetLRP()) for how in (lambda h: h[index], torch.clone))
    torch.testing.assert_close(found, expected)


def test_masked_classes():
    '''Classes that are masked with infinity are the same for all batches.'''
    mask = torch.tensor([False, False, False, True, True])
    x = images(3, 3, 8, 8)
    torch.testing.assert_close(
        explain(build(lambda: Views(mask)), x, ResNetLRP()), explain(build(Views), x, ResNetLRP())
    )


def test_no_images():
    '''If the first dimension has none, the error can be made a warning.'''
    model = build(lambda: Net(MIXING['mean']))
    with pytest.warns(UserWarning, match='4 images'):
        explain(model, images(), ResNetLRP(canonizers=[ResidualCanonizer(strict=False)]))


def test_threads():
    '''To find out whether images depend on each other leaves the network to other threads as it is.'''
    model, results = build(Views), {}
    inputs = [torch.randn(2 + num % 9, 3, 3, 8, 8).double() for num in range(36)]

    def relevance(x):
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        return torch.autograd.grad(output, leaf, initial_relevance(1)(output))[0]

    with Gradient(model=model, composite=ResNetLRP()):
        def work(first):
            for num in range(first, len(inputs), 4):
                results[num] = relevance(inputs[num])

        threads = [threading.Thread(target=work, args=(num,)) for num in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for num, x in enumerate(inputs):
            torch.testing.assert_close(results[num], relevance(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('error', [
    MemoryError('no more'), torch.cuda.OutOfMemoryError('CUDA out of memory'),
    RuntimeError('[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 8 bytes.'),
    RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.'),
])
def test_lack_of_memory(error):
    '''If there is too little for the check, the error says so, and nothing of copies. Others leave it undecided.'''
    class Limited(nn.Module):
        '''Runs without gradients are too much.'''
        def __init__(self, problem):
            super().__init__()
            self.net, self.problem = Net(lambda h: h), problem

        def forward(self, x):
            '''Logits of features that are moved first.'''
            if not torch.is_grad_enabled():
                raise self.problem
            logits = self.net(x)
            return logits + logits.transpose(0, 1).mean(1, keepdim=True).T * 0

    with pytest.raises(type(error)) as caught:
        explain(build(lambda: Limited(error)), images(), ResNetLRP())
    assert caught.value is error
    with pytest.raises(RuntimeError, match='cannot be run for copies'):
        explain(build(lambda: Limited(RuntimeError('shapes'))), images(), ResNetLRP())


def test_windows_of_attention():
    '''Products of windows do not mix images, with several windows of each image.'''
    def attend(h):
        windows = h.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
        query, key, value = windows.repeat(1, 1, 3).reshape(len(windows), 16, 3, 2, 4).permute(2, 0, 3, 1, 4)[:]
        weights = query.matmul(key.transpose(2, 3)).softmax(3).detach()
        output = weights.matmul(value).transpose(1, 2).reshape(len(h), 2, 2, 4, 4, 8)
        return output.permute(0, 5, 1, 3, 2, 4).reshape(h.shape)

    model, x = build(lambda: Net(attend)), images()
    for name in ('ratio', 'block'):
        whole = explain(model, x, COMPOSITES[name]())
        for num in range(4):
            torch.testing.assert_close(whole[num], explain(model, x[num:num + 1], COMPOSITES[name]())[0])


# -- asked once --------------------------------------------------------------------------------------------------------

@pytest.fixture(name='asked')
def count_checks(monkeypatch):
    '''Counts how often a network is run to find out whether its images depend on each other.'''
    number, check = [], batches.depends_on_batch
    monkeypatch.setattr(batches, 'depends_on_batch', lambda *args: number.append(1) or check(*args))
    return number


class Moving(nn.Module):
    '''Moves the images to another dimension and back, and has settings.'''
    def __init__(self):
        super().__init__()
        self.net, self.settings, self.flips = Net(self.move), {'flips': [False]}, False

    def move(self, h):
        '''With a setting, images are in reverse.'''
        h = h.transpose(0, 1).relu()
        return (h.flip(1) if self.flips or self.settings['flips'][0] else h).transpose(0, 1)

    def forward(self, x):
        '''Logits.'''
        return self.net(x)


def enter(model, number=3):
    '''Run a network in a context of its own.'''
    with ResNetLRP().context(model) as modified:
        modified(torch.rand(number, 3, 6, 6, dtype=torch.double).requires_grad_())


def test_asked_once(asked):
    '''A network that is the same is not asked in each context, but for other shapes.'''
    model = build(Moving)
    for number, count in ((3, 1), (3, 2), (3, 2), (4, 3), (3, 3), (4, 3)):
        enter(model, number)
        assert len(asked) == count


@pytest.mark.parametrize('change', [
    lambda model: nn.init.ones_(model.net.conv.weight),
    lambda model: setattr(model.net.conv, 'bias', nn.Parameter(torch.zeros(8, dtype=torch.double))),
    lambda model: model.register_forward_hook(lambda *args: None),
    lambda model: model.settings.update(other=1),
    lambda model: model.net.add_module('other', nn.Identity()),
    lambda model: setattr(model.net, 'function', lambda h: model.move(h) * 1),
])
def test_asked_again(asked, change):
    '''It is asked again if its weights, modules, hooks, settings or functions change.'''
    model = build(Moving)
    for _ in range(3):
        enter(model)
    change(model)
    for _ in range(2):
        enter(model)
        assert len(asked) == 3


@pytest.mark.parametrize('change', [
    lambda model: model.settings['flips'].__setitem__(0, True), lambda model: setattr(model, 'flips', True),
])
def test_no_longer_independent(change):
    '''What was found out before a setting changed does not hold any longer.'''
    model = build(Moving)
    for _ in range(3):
        enter(model)
    change(model)
    with pytest.raises(RuntimeError, match='images of the batch'):
        enter(model)


def test_network_is_not_kept():
    '''Nothing that is remembered of a network keeps it in memory.'''
    model = build(Moving)
    for _ in range(3):
        enter(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
