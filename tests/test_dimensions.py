'''Networks for signals, volumes and videos: relevance is conserved, and that of the same network for images.'''
import pytest
import torch
from torch import nn
from torchvision.models import resnet18, video
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, initial_relevance
from zennit_resnet.conservation import conservation_ledger

pytestmark = pytest.mark.once

SIZES = {1: (21,), 2: (1, 21), 3: (1, 9, 11)}
BOUNDS = {'first_layer': 'zbox', 'low': [0., -1.], 'high': [1., 2.]}
COMPOSITES = {
    'ratio': lambda: ResNetLRP(),
    'symmetric': lambda: ResNetLRP('symmetric'),
    'zbox': lambda: ResNetLRP(**BOUNDS),
    'literal': lambda: ResNetLRP(projection='literal'),
    'even': lambda: ResNetLRP(coverage='even', maxpool='average'),
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'epsilon': lambda: ResNetLRP(classifier='epsilon'),
    'block': lambda: BlockLRP(),
    'relative': lambda: RelativeLRP(),
}
# those that conserve relevance without any bias, which start from one
CONSERVING = ('ratio', 'symmetric', 'zbox', 'literal', 'even', 'merge')


class Block(nn.Module):
    '''A residual block, with a projection if it changes the size.'''
    def __init__(self, width, out, stride, dims):
        super().__init__()
        conv, norm = getattr(nn, f'Conv{dims}d'), getattr(nn, f'BatchNorm{dims}d')
        self.conv1, self.norm1 = conv(width, out, 3, stride, 1), norm(out)
        self.conv2, self.norm2 = conv(out, out, 3, 1, 1), norm(out)
        self.skip = nn.Identity() if width == out and stride == 1 else conv(width, out, 1, stride)

    def forward(self, x):
        return (self.skip(x) + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def network(dims):
    '''A small ResNet with everything that a large one has.'''
    conv, norm, pool, mean = (getattr(nn, f'{name}{dims}d') for name in (
        'Conv', 'BatchNorm', 'MaxPool', 'AdaptiveAvgPool'
    ))
    model = nn.Sequential(
        conv(2, 6, 5, 2, 2), norm(6), nn.ReLU(), pool(3, 2, 1), Block(6, 6, 1, dims), Block(6, 8, 2, dims),
        mean(1), nn.Flatten(), nn.Linear(8, 3),
    )
    return fill_statistics(model)


def fill_statistics(model, seed=0):
    '''Weights and statistics of batch normalization as after training, in evaluation mode.'''
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, .3, generator=generator)
            module.running_var.uniform_(.5, 2, generator=generator)
            nn.init.uniform_(module.weight, .3, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, .2, generator=generator)
    return model.eval()


def inflate(model, twin):
    '''Give a network with more dimensions the weights of another one, in the middle of its kernels.'''
    target = twin.state_dict()
    for name, value in model.state_dict().items():
        place = target[name]
        if place.ndim > value.ndim:
            place.zero_()
            place.select(2, place.shape[2] // 2).copy_(value)
        else:
            place.copy_(value)
    return twin.eval()


def explain(model, input, composite, value='one'):
    '''Output and relevance.'''
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(input.clone(), initial_relevance(1, value))
    return output.detach(), relevance.detach()


def signals(dims, dtype=torch.float64):
    '''Inputs inside of the bounds.'''
    torch.manual_seed(dims)
    return torch.rand(3, 2, *SIZES[dims], dtype=dtype) * torch.tensor([1., 3.]).view(2, *[1] * dims) - torch.tensor(
        [0., 1.]
    ).view(2, *[1] * dims).to(dtype)


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('dims', [1, 3])
def test_twins(dims, name):
    '''A network for signals is one for images of height one, and one for volumes of depth one is one for images.'''
    torch.manual_seed(0)
    if dims == 1:
        small, large = network(1).double(), network(2).double()
        images = signals(2)
        input, other = images[:, :, 0], images
    else:
        small, large = network(2).double(), network(3).double()
        other = signals(3)
        input = other[:, :, 0]
    inflate(small, large)
    value = 'logit' if name in ('epsilon', 'block') else 'one'
    (first, relevance), (second, expected) = (
        explain(model, each, COMPOSITES[name](), value) for model, each in ((small, input), (large, other))
    )
    torch.testing.assert_close(first, second)
    assert relevance.abs().sum() > 0
    if name == 'relative':
        # factors count the positions of kernels, and only ratios have a meaning
        relevance, expected = (each / each.flatten(1).abs().sum(1).view(-1, *[1] * (each.ndim - 1))
                               for each in (relevance, expected))
    torch.testing.assert_close(relevance, expected[:, :, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', CONSERVING)
@pytest.mark.parametrize('dims', [1, 3])
def test_conserved(dims, name):
    '''Relevance sums to one, in single precision as well.'''
    torch.manual_seed(1)
    model, sizes = network(dims), {1: (50,), 3: (5, 12, 13)}[dims]
    input = torch.rand(2, 2, *sizes)
    # sums in single precision are rounded in another order by other processors
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-7)):
        _, relevance = explain(model.to(dtype), input.to(dtype), COMPOSITES[name]())
        torch.testing.assert_close(
            relevance.double().flatten(1).sum(1), torch.ones(2).double(), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize('name', ['r3d_18', 'mc3_18', 'r2plus1d_18'])
def test_video_networks(name):
    '''Relevance of torchvision's networks is conserved, and the ledger finds no loss.'''
    torch.manual_seed(0)
    model = fill_statistics(getattr(video, name)(num_classes=5)).double()
    input = torch.rand(1, 3, 4, 24, 24, dtype=torch.float64)
    for options in ({}, {'splitting': 'symmetric'}, {'first_layer': 'zbox', 'low': 0., 'high': 1.}):
        relevance = explain(model, input, ResNetLRP(**options))[1]
        assert relevance.shape == input.shape and relevance.abs().sum() > 0
        assert abs(relevance.sum() - 1) < 1e-12
    # all blocks are found: each has one addition
    ledger = conservation_ledger(model, input, ResNetLRP(), target=1)
    assert sum('addition' in row.name for row in ledger.rows) == 8
    assert float((ledger.final - ledger.initial).abs().max()) < 1e-12 * float(ledger.initial.abs().max())
    output, relevance = explain(model, input, BlockLRP(1e-12), 'logit')
    leaf = input.clone().requires_grad_()
    product, = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(relevance, product * input, rtol=1e-6, atol=1e-9)


def without_last(model):
    '''A ResNet without its last layer, which has three quarters of the weights.'''
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 5)
    return model


@pytest.mark.parametrize('name', ['ratio', 'symmetric', 'zbox'])
def test_video_network_is_inflated(name):
    '''R3D-18 with kernels of depth one in the middle explains a single frame as its network for images does.'''
    torch.manual_seed(0)
    large = fill_statistics(without_last(video.r3d_18(num_classes=5))).double()
    large.stem[0] = nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False).double()
    images = without_last(resnet18(num_classes=5))
    small = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), images.bn1, images.relu), images.layer1, images.layer2,
        images.layer3, images.layer4, images.avgpool, nn.Flatten(), images.fc,
    )
    small = fill_statistics(small).double()
    source, target = [*small.state_dict().values()], [*large.state_dict().values()]
    assert len(source) == len(target)
    for value, place in zip(source, target):
        if place.ndim > value.ndim:
            place.zero_()
            place[:, :, place.shape[2] // 2] = value
        else:
            place.copy_(value)
    input = torch.rand(2, 3, 1, 32, 32, dtype=torch.float64)
    composite = {'ratio': {}, 'symmetric': {'splitting': 'symmetric'}}.get(
        name, {'first_layer': 'zbox', 'low': 0., 'high': 1.}
    )
    first, relevance = explain(small, input[:, :, 0], ResNetLRP(**composite))
    second, expected = explain(large.eval(), input, ResNetLRP(**composite))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(relevance, expected[:, :, 0], rtol=1e-9, atol=1e-12)
