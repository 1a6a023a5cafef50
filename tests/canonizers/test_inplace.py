'''Networks that work in place get the same relevance as those that do not.'''

import pytest
import torch
from helpers.inplace import BLOCKS, COMPOSITES, ZENNIT_1, Block
from helpers.networks import narrow_resnet18, randomize
from torch import nn
from torch.nn import functional as F
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite

from zennit_resnet import BlockEpsilon, BlockLRP, GammaLRP, ResNetLRP
from zennit_resnet._inplace import replace, settle


class Network(nn.Module):
    '''Two blocks whose outputs are scaled.'''
    def __init__(self, name, inplace):
        super().__init__()
        self.inplace = inplace
        self.stem = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([Block(name, inplace), Block(name, inplace)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        '''Run the network.'''
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x.mul_(.1) if self.inplace else x * .1
        return self.fc(x.mean((2, 3)))


LOST = ('relu-not-returned', 'relu-first', 'relu-after-use', 'relu-part', 'relu-part-of-view')


@pytest.mark.parametrize('composite', COMPOSITES)
@pytest.mark.parametrize('name', BLOCKS)
def test_twins(request, name, composite):
    '''The output is bit for bit that without rules, and relevance that of the network which works out of place.'''
    if composite in ('splitting', 'alpha-beta') and name in LOST and ZENNIT_1:
        request.applymarker(pytest.mark.xfail(
            strict=True, reason='Zennit 1.0.0 loses in-place results which the network does not take from the module'
        ))
    x, results = torch.randn(2, 3, 6, 6).double(), []
    for inplace in (True, False):
        torch.manual_seed(1)
        model = randomize(Network(name, inplace)).double().eval()
        expected = model(x.clone()).detach()
        leaf = x.clone().requires_grad_()
        with COMPOSITES[composite]().context(model):
            output = model(leaf.clone())
            relevance, = torch.autograd.grad(output, leaf, output.detach() * torch.eye(5)[[1, 2]])
        assert torch.equal(output, expected) and torch.equal(leaf, x)
        results.append(relevance)
    scale = results[1].abs().max()
    assert scale > 0 and (results[0] - results[1]).abs().max() < 1e-9 * scale


@pytest.mark.parametrize('composite', [BlockLRP, lambda: LayerMapComposite([(nn.Sequential, BlockEpsilon(0.))])])
def test_input_in_place(composite):
    '''With the block rule, a network may even work in place on a leaf, which is not changed.'''
    x, results = torch.randn(4, 3).double(), []
    layer = nn.Linear(3, 2).double()
    for inplace in (True, False):
        input = x.clone()
        with Gradient(model=nn.Sequential(nn.ReLU(inplace), layer), composite=composite()) as attributor:
            results.append(attributor(input, torch.ones(4, 2))[1])
        assert torch.equal(input, x)
    assert torch.allclose(*results, rtol=1e-12) and results[0].any()


@pytest.mark.parametrize('is_view', [False, True])
def test_part(is_view):
    '''A part that is replaced has the history of what took its place, the rest has its own.'''
    source = torch.randn(2, 4, 3, requires_grad=True)
    tensor = (source * 2)[:] if is_view else source * 2
    expected = torch.cat([tensor[:, :2] * 3, tensor[:, 2:]], 1)
    replace(tensor[:, :2], tensor[:, :2] * 3)
    settle(tensor)
    assert torch.equal(tensor, expected)
    weights = torch.randn(2, 4, 3)
    assert torch.equal(*(
        torch.autograd.grad((elem * weights).sum(), source, retain_graph=True)[0] for elem in (tensor, expected)
    ))


@torch.jit.script
def scale_in_place(x):
    '''Functions of TorchScript are not seen.'''
    return x.mul_(.5)


def test_unseen_change():
    '''What cannot be followed is an error.'''
    class Model(nn.Module):
        '''A layer that is scaled by a scripted function.'''
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            '''Run the network.'''
            return scale_in_place(self.fc(x)).sum(1, keepdim=True)

    with Gradient(model=Model(), composite=BlockLRP(layer_map=[(nn.Linear, BlockEpsilon(form='gradient'))])) as lrp:
        with pytest.raises(RuntimeError, match=r'shape \(4, 2\) .* was changed in place .* scripted'):
            lrp(torch.randn(4, 3), torch.ones(4, 1))


@pytest.mark.parametrize('build', [
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(64, 2)
    ),
    lambda: narrow_resnet18(num_classes=2),
], ids=['sequence', 'resnet'])
def test_not_copied(monkeypatch, build):
    '''Nothing but the network's output is copied for an in-place ReLU or addition at the end of a block.'''
    copies = []
    monkeypatch.setattr('zennit_resnet._inplace.Kept.copy', lambda self: copies.append(tuple(self.tensor.shape)))
    with Gradient(model=build().eval(), composite=BlockLRP()) as attributor:
        _, relevance = attributor(torch.rand(2, 3, 32, 32), torch.ones(2, 2))
    assert copies == [(2, 2)] and relevance.abs().sum() > 0


FLAGS = {
    'module': lambda m, x: m.pool(x),
    'function': lambda m, x: F.avg_pool2d(x, 3, 1, 1, False, True),
    'ceil_mode': lambda m, x: F.max_pool2d(x, 3, 1, 1, 1, True),
}


@pytest.mark.parametrize('composite', COMPOSITES)
@pytest.mark.parametrize('name', FLAGS)
def test_flags(name, composite):
    '''Flags of other functions do not mean in place: what was pooled can be used again as it was.'''
    class Pooled(nn.Module):
        '''A pooling beside a convolution of the same input.'''
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
            self.pool = nn.AvgPool2d(3, 1, 1)

        def forward(self, x):
            '''Two branches.'''
            x = self.first(x)
            pooled = FLAGS[name](self, x)
            return (self.second(x) + pooled).mean((2, 3))

    model, input = Pooled().double().eval(), torch.randn(2, 3, 6, 6).double()
    expected = model(input)
    with COMPOSITES[composite]().context(model):
        assert torch.equal(model(input.clone().requires_grad_()), expected)


all_rules = pytest.mark.parametrize(
    'create', [ResNetLRP, lambda: ResNetLRP('symmetric'), GammaLRP], ids=['ratio', 'half', 'gamma']
)


def add_to_rows(rows, other):
    '''Add by an operator, after which Python assigns what was added.'''
    rows[:, :, ::2] += other


def set_rows(rows, value):
    '''Assign to a slice of a slice.'''
    rows[:, :, ::2][:] = value


# What changes every second row of a tensor, given another, and what these rows become.
ROWS = {
    'add_': (lambda h, x: h[:, :, ::2].add_(x), lambda h, x: h + x),
    'add_ of an ellipsis': (lambda h, x: h[..., ::2, :].add_(x), lambda h, x: h + x),
    '+=': (add_to_rows, lambda h, x: h + x),
    'relu_': (lambda h, x: h[:, :, ::2].relu_(), lambda h, x: h.relu()),
    'relu function': (lambda h, x: F.relu(h[:, :, ::2], inplace=True), lambda h, x: h.relu()),
    'module': (lambda h, x: nn.Hardswish(True)(h[:, :, ::2]), lambda h, x: F.hardswish(h)),
    'chain': (lambda h, x: h[:, :, ::2].mul_(-.5).add_(x).relu_(), lambda h, x: (h * -.5 + x).relu()),
    'copy_': (lambda h, x: h[:, :, ::2].copy_(x), lambda h, x: x),
    'set': (set_rows, lambda h, x: x),
    'keyword': (lambda h, x: torch.relu_(input=h[:, :, ::2]), lambda h, x: h.relu()),
}


class Rows(nn.Module):
    '''A network that changes rows in place, or takes the tensor apart.'''
    def __init__(self, name, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc, self.function, self.inplace = nn.Linear(4, 3), ROWS[name][not inplace], inplace

    def forward(self, x):
        '''Logits.'''
        h = self.first(x)
        other, h = h[:, :, :3].relu(), self.second(h.relu())
        if self.inplace:
            self.function(h, other)
        else:
            odd, even = torch.arange(1, 6, 2), torch.arange(0, 6, 2)
            h = torch.stack([self.function(h[:, :, even], other), h[:, :, odd]], 3).flatten(2, 3)
        return self.fc(self.second(h).relu().mean((2, 3)))


@all_rules
@pytest.mark.parametrize('name', ROWS)
def test_rows(name, create):
    '''What changes a slice with a step, which has a rule, changes the tensor.'''
    x, results = torch.randn(2, 3, 6, 6).double(), []
    for inplace in (True, False):
        model = Rows(name, inplace).double().eval()
        with Gradient(model=model, composite=create()) as attributor:
            output, relevance = attributor(x, torch.eye(3)[[0, 2]].double())
        assert torch.equal(output, model(x))
        results.append(relevance)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5 * float(results[1].abs().max()))


def test_zeroed_rows():
    '''Zeros in a slice are those of the tensor, as the network computes it.'''
    model = Rows('copy_', True).double().eval()
    model.function = lambda h, x: h[:, :, ::2].zero_()
    x = torch.randn(2, 3, 6, 6).double()
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        output, relevance = attributor(x, torch.eye(3)[[0, 2]].double())
    assert torch.equal(output, model(x))
    assert torch.allclose(relevance.sum((1, 2, 3)), torch.ones(2).double())


def test_view_of_rows():
    '''Of a part of a slice, it is not known of what that is a part.'''
    model = Rows('copy_', True).double().eval()
    model.function = lambda h, x: h[:, :, ::2][:, :2].relu_()
    with pytest.raises(RuntimeError, match=r'view of shape \(2, 2, 3, 6\) of a slice with a step .* change the slice'):
        Gradient(model=model, composite=ResNetLRP())(torch.randn(2, 3, 6, 6).double(), torch.ones(2, 3).double())
    assert not model._forward_hooks


def test_changed_shortcut():
    '''A slice that is changed itself conserves relevance.'''
    model = Rows('copy_', True).double().eval()
    model.forward = lambda x: (
        lambda h: model.fc(h[:, :, ::2].add_(h[:, :, 1::2]).relu_().mean((2, 3)))
    )(model.first(x))
    x = torch.randn(2, 3, 6, 6).double()
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        _, relevance = attributor(x, torch.eye(3)[[0, 2]].double())
    assert torch.allclose(relevance.sum((1, 2, 3)), torch.ones(2).double())


MASK = torch.arange(36).view(6, 6) % 3 == 0
GRID = F.affine_grid(torch.eye(2, 3)[None].double(), (1, 1, 6, 6), align_corners=False)


def changed_places(h, x):
    '''Indices, which change for the next use.'''
    places = torch.tensor([0, 1])
    output = torch.zeros_like(h).index_add(1, places, h[:, :2])
    return output.index_add(1, places.add_(2), x[:, :2])


def changed_grid(h, x):
    '''A grid, which is mirrored in place.'''
    grid = GRID.repeat(len(h), 1, 1, 1)
    return F.grid_sample(h, grid, align_corners=False) + F.grid_sample(x, grid.mul_(-1), align_corners=False)


def changed_buffer(h, x):
    '''Zeros among which elements are put one after the other. Some were added to zeros.'''
    output = torch.zeros_like(h)
    output[:, 0] = h[:, 2]
    output[:, 1] = output[:, 1] + x[:, 3]
    return h + output


# What changes a constant in place after it was used, and the same with one that stays.
CONSTANTS = {
    'mask': (
        lambda h, x: (lambda mask: h.masked_fill(mask, 0.) + x.masked_fill(mask.logical_not_(), 0.))(MASK.clone()),
        lambda h, x: h.masked_fill(MASK, 0.) + x.masked_fill(~MASK, 0.),
    ),
    'filling': (
        lambda h, x: (lambda value: torch.where(MASK, h, value) + torch.where(MASK, value.zero_(), x))(torch.ones(1)),
        lambda h, x: torch.where(MASK, h, torch.ones(1)) + torch.where(MASK, torch.zeros(1), x),
    ),
    'places': (changed_places, lambda h, x: torch.zeros_like(h).index_add(1, torch.tensor([0, 1]), h[:, :2]).index_add(
        1, torch.tensor([2, 3]), x[:, :2]
    )),
    'grid': (changed_grid, lambda h, x: (
        F.grid_sample(h, GRID.repeat(len(h), 1, 1, 1), align_corners=False)
        + F.grid_sample(x, -GRID.repeat(len(h), 1, 1, 1), align_corners=False)
    )),
    'buffer': (changed_buffer, lambda h, x: h + (lambda output: output.index_copy(
        1, torch.tensor([1]), output[:, 1:2] + x[:, 3:]
    ))(torch.zeros_like(h).index_copy(1, torch.tensor([0]), h[:, 2:3]))),
}


class Functional(nn.Module):
    '''A function of two convolutions.'''
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.hidden, self.fc, self.function = nn.Linear(144, 4), nn.Linear(4, 3), function
        self.double().eval()

    def forward(self, x):
        '''Logits.'''
        h = self.first(x).relu()
        return self.fc(self.hidden(self.function(h, self.second(h).relu()).flatten(1)).relu())


def maps(function, composite, number=2):
    '''Relevance of each image.'''
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()[:number]
    model = Functional(function)
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(x, torch.eye(3)[[0, 2]].double()[:number])
    assert torch.equal(output, model(x))
    return relevance


@all_rules
@pytest.mark.parametrize('name', CONSTANTS)
def test_constants(name, create):
    '''Rules know constants as they were when the network used them.'''
    actual, expected = (maps(function, create()) for function in CONSTANTS[name])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# What puts two channels among zeros.
WRITES = {
    'copy_': lambda z, h: z[:, :2].copy_(h), 'add_': lambda z, h: z[:, :2].add_(h),
    'narrow': lambda z, h: z.narrow(1, 0, 2).copy_(h), 'product': lambda z, h: z[:, :2].fill_(1.).mul_(h),
    'one by one': lambda z, h: [z.select(1, num).copy_(h[:, num]) for num in range(2)],
    'rows': lambda z, h: [z[:, :2, num].copy_(h[:, :, num]) for num in range(6)],
    'other shape': lambda z, h: z.view(len(z), 4, -1)[:, :2].copy_(h.flatten(2)),
    'transposed': lambda z, h: z.transpose(1, 2)[:, :, :2].copy_(h.transpose(1, 2)),
    'set': lambda z, h: z[:, :2].__setitem__(slice(None), h), 'index_add_': lambda z, h: z[:, :3].index_add_(
        1, torch.tensor([0, 2]), h
    ), 'chain': lambda z, h: z[:, :2].add_(h).mul_(2.).relu_(),
}


@pytest.mark.parametrize('name', WRITES)
def test_writes(name):
    '''Zeros beside what is written into a view of them give their relevance to that, as in other spellings.'''
    def function(h, x):
        output = torch.zeros_like(h)
        WRITES[name](output, h[:, 2:])
        return x + output

    relevance = maps(function, ResNetLRP('symmetric'))
    assert torch.allclose(relevance.sum((1, 2, 3)), torch.ones(2).double())
    assert torch.allclose(maps(function, ResNetLRP('symmetric'), 1), relevance[:1])
    if name in ('copy_', 'add_', 'narrow', 'product', 'other shape', 'transposed', 'set'):
        expected = maps(lambda h, x: x + torch.zeros_like(h).index_copy(1, torch.arange(2), h[:, 2:]), (
            ResNetLRP('symmetric')
        ))
        assert torch.allclose(relevance, expected)


def in_rows(function):
    '''A function of positions, with images in the second dimension, added to another.'''
    def run(h, x):
        moved, other = (elem.flatten(2).permute(2, 0, 1) for elem in (h, x))
        return (other + function(moved)).permute(1, 2, 0)

    return run


def in_tokens(function):
    '''A function of the positions of all images.'''
    def run(h, x):
        tokens, other = (elem.flatten(2).mT.reshape(-1, 4) for elem in (h, x))
        return (other + function(tokens, len(h))).view(len(h), -1, 4)

    return run


def put_rows(h):
    '''Elements of some positions at others, among zeros.'''
    output = torch.zeros_like(h)
    output[:5] = h[3:8]
    return output


def put_channels(h):
    '''Elements of some channels.'''
    output = torch.zeros_like(h)
    output[:, :, :2] = h[:, :, 2:]
    return output


def put_tokens(h, number):
    '''Elements of chosen positions.'''
    output, mask = torch.zeros_like(h), MASK.flatten().repeat(number)
    output[mask] = h[mask] * 1
    return output


LINE = MASK.flatten()[:, None, None]
# Elements among zeros, of networks in which rows are no images.
AMONG_ZEROS = {
    'masked_fill': in_rows(lambda h: h.masked_fill(LINE, 0.)), 'where': in_rows(lambda h: torch.where(LINE, h, 0.)),
    'rows': in_rows(put_rows), 'channels': in_rows(put_channels),
    'tril': lambda h, x: x + h.permute(1, 0, 2, 3).tril().permute(1, 0, 2, 3),
    'tokens': in_tokens(put_tokens), 'masked tokens': in_tokens(lambda h, number: h.masked_fill(
        MASK.flatten().repeat(number)[:, None], 0.
    )),
    'scattered tokens': in_tokens(lambda h, number: torch.zeros_like(h).masked_scatter(
        MASK.flatten().repeat(number)[:, None], h[MASK.flatten().repeat(number)]
    )),
    'added tokens': in_tokens(lambda h, number: torch.zeros_like(h).index_add(
        0, MASK.flatten().repeat(number).nonzero()[:, 0], h[MASK.flatten().repeat(number)]
    )),
    'row of images': lambda h, x: (x[None] + h[None].masked_fill(MASK, 0.))[0],
    'images': lambda h, x: x + h.masked_fill(MASK, 0.),
}


@pytest.mark.parametrize('name', AMONG_ZEROS)
def test_images(name):
    '''Relevance of zeros stays with the image that they are of, wherever a network has its images.'''
    relevance = maps(AMONG_ZEROS[name], ResNetLRP('symmetric'))
    assert torch.allclose(relevance.sum((1, 2, 3)), torch.ones(2).double())
    assert torch.allclose(maps(AMONG_ZEROS[name], ResNetLRP('symmetric'), 1), relevance[:1])


def one_by_one(h, x):
    '''Elements that are put among zeros image by image.'''
    output = torch.zeros_like(h)
    for num, elem in enumerate(h):
        output[num, :2] = elem[2:]
    return x + output


@pytest.mark.parametrize('function, message', [
    (one_by_one, 'of an image among which \'__setitem__\' puts no elements'),
    (lambda h, x: (torch.stack([x, h]) + torch.stack([h, x]).masked_fill(MASK, 0.)).sum(0), '2 images is not known'),
])
def test_unknown_images(function, message):
    '''If it is not known to which image zeros belong, images are explained one at a time.'''
    with pytest.raises(RuntimeError, match=message):
        maps(function, ResNetLRP('symmetric'))
    assert torch.allclose(maps(function, ResNetLRP('symmetric'), 1).sum(), torch.ones(()).double())


def test_slice_beside_an_output_that_is_given():
    '''A slice is not what a function with ``out=`` changes, so that its own rule counts.'''
    def explained(add):
        model = Rows('copy_', True).double().eval()
        model.forward = lambda x: (
            lambda h: model.fc(add(h[:, :, ::2, ::2], F.avg_pool2d(h, 2)).mean((2, 3)))
        )(model.first(x).relu())
        with Gradient(model=model, composite=ResNetLRP()) as attributor:
            return attributor(x, torch.eye(3)[[0, 2]].double())[1]

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    results = [explained(add) for add in (torch.add, lambda *addends: torch.add(*addends, out=torch.empty(0).double()))]
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
