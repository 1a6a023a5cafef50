'''Networks of torchvision, timm and users, and the operations that they are made of.'''
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import (
    CifarResNet,
    Function,
    UserNetwork,
    build_timm,
    build_torchvision,
    cifar_images,
    cifar_network,
    efficientnet_lite0,
    imagenet_samples,
    narrow_resnet18,
    prepare,
    randomize,
)
from torchvision import models, transforms
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, NameMapComposite
from zennit.rules import Epsilon

from zennit_resnet import (
    GammaLRP,
    RatioSplit,
    RelativeLRP,
    ResidualCanonizer,
    ResNetLRP,
    SymmetricSplit,
    UnsupportedOperation,
    initial_relevance,
    with_splitting,
)
from zennit_resnet.conservation import assert_conserved
from zennit_resnet.layer import Addition, Concatenation, Gate, Operation, Product, Subsampling
from zennit_resnet.rules import SignalTakesAll, Split

# -- whole networks ----------------------------------------------------------------------------------------------------

TORCHVISION = {name: 64 for name in (
    'resnet18', 'resnext50_32x4d', 'regnet_y_400mf', 'mobilenet_v2', 'mobilenet_v3_small',
    'efficientnet_b0', 'convnext_tiny', 'densenet121', 'vgg16_bn', 'googlenet', 'inception_v3', 'deeplabv3_resnet50',
    'shufflenet_v2_x0_5', 'squeezenet1_0',
)}
TORCHVISION.update(inception_v3=75, deeplabv3_resnet50=33)
TIMM = (
    'resnet26d', 'seresnet18', 'seresnet33ts', 'resnetv2_50', 'ecaresnet26t', 'nf_resnet26',
    'tf_efficientnet_lite0', 'convnext_atto', 'res2net50_26w_4s', 'skresnet18', 'dla34',
)


def images(size, batch=2):
    '''Random images.'''
    return torch.randn(batch, 3, *(size if isinstance(size, tuple) else (size, size)), dtype=torch.float64)


def conservation_error(model, composite, input, plain=None):
    '''Largest relative deviation of the sum of relevance, after checking that the forward pass is the same.'''
    if plain is None:
        with torch.no_grad():
            plain = model(input)
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(input.clone(), initial_relevance([1, 2] * (len(input) // 2), 'one'))
        assert torch.equal(output, plain)
    assert relevance.shape == input.shape
    assert bool(relevance.isfinite().all())
    assert bool((relevance != 0).any())
    return float((relevance.sum((1, 2, 3)) - 1).abs().max())


@pytest.mark.once
@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name):
    '''Networks of torchvision: nothing changes in the forward pass, and relevance is conserved.'''
    model, input = prepare(build_torchvision(name)), images(TORCHVISION[name])
    assert conservation_error(model, ResNetLRP(), input) <= 1e-6


@pytest.mark.once
@pytest.mark.parametrize('name', TIMM)
def test_timm(name):
    '''Networks of timm: nothing changes in the forward pass, and relevance is conserved.'''
    assert conservation_error(prepare(build_timm(name)), ResNetLRP(), images(64)) <= 1e-6


SMALL = {
    'resnet18': lambda: narrow_resnet18(num_classes=7),
    'densenet': lambda: models.DenseNet(8, (2, 3, 2), 16, num_classes=7),
    'mobilenet_v2': lambda: models.mobilenet_v2(num_classes=7, width_mult=.25),
    'mobilenet_v3_small': lambda: models.mobilenet_v3_small(num_classes=7),
    'seresnet18': lambda: build_timm('seresnet18'), 'resnetv2_50': lambda: build_timm('resnetv2_50'),
}


@pytest.mark.parametrize('name', [*SMALL][:5])
def test_symmetric(name):
    '''Symmetric splitting of small networks.'''
    assert conservation_error(prepare(SMALL[name]()), ResNetLRP('symmetric'), images(64)) <= 1e-6


@pytest.mark.parametrize('name', ['resnet18', 'densenet', 'mobilenet_v2', 'seresnet18'])
def test_merge(name):
    '''Merged batch normalization changes relevance, but neither the forward pass nor the sum.'''
    model = prepare(SMALL[name]())
    input = images(64)
    assert conservation_error(model, ResNetLRP(batch_norm='merge'), input) <= 1e-6
    results = []
    for batch_norm in ('pass', 'merge'):
        with Gradient(model=model, composite=ResNetLRP(batch_norm=batch_norm)) as attributor:
            results.append(attributor(input, initial_relevance([1, 2], 'one'))[1])
    assert float((results[0] - results[1]).abs().max()) > 1e-3 * float(results[0].abs().max())


class Merging(torch.nn.Module):
    '''A convolution and batch normalizations, which a function combines.'''
    def __init__(self, function):
        super().__init__()
        # before the convolution, as definitions say nothing of the order of calls
        self.norm, self.other = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
        self.first, self.conv = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.function = torch.nn.Linear(4, 3), function

    def forward(self, x):
        '''Logits.'''
        return self.head(self.function(self, self.first(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize('function, is_merged', [
    pytest.param(lambda m, x: m.norm(m.conv(x)), True, id='once'),
    pytest.param(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), False, id='output has two uses'),
    pytest.param(lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(2 * x)), False, id='layer is called twice'),
    pytest.param(lambda m, x: m.conv(m.norm(x)), False, id='before a convolution'),
    pytest.param(lambda m, x: m.norm(torch.cat((m.conv(x)[:, :2], x[:, :2]), 1)), False, id='after a concatenation'),
    pytest.param(lambda m, x: m.norm(m.conv(x).relu()), False, id='after an activation'),
])
def test_merged_weights(function, is_merged):
    '''Batch normalization is folded into the layer before it if that has no other use, and passed otherwise.'''
    torch.manual_seed(0)
    model, input = prepare(Merging(function)), images(8)
    relevance = []
    for batch_norm in ('merge', 'pass'):
        with Gradient(model=model, composite=ResNetLRP(batch_norm=batch_norm)) as attributor:
            relevance.append(attributor(input, initial_relevance([1, 2], 'one'))[1])
    if not is_merged:
        assert torch.equal(*relevance)
        return
    assert not close(*relevance)
    folded = copy.deepcopy(model)
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    folded.conv.weight.data = model.conv.weight.data * scale.detach()[:, None, None, None]
    folded.conv.bias.data = ((model.conv.bias - model.norm.running_mean) * scale + model.norm.bias).detach()
    folded.norm = torch.nn.Identity()
    with Gradient(model=folded, composite=ResNetLRP()) as attributor:
        assert close(relevance[0], attributor(input, initial_relevance([1, 2], 'one'))[1])


@pytest.mark.parametrize('name, build', [
    ('resnet18', EpsilonPlusFlat), ('resnet18', EpsilonPlus), ('resnet18', EpsilonAlpha2Beta1),
    ('resnet18', lambda: EpsilonGammaBox(low=-4., high=4.)),
    ('densenet', EpsilonPlus), ('mobilenet_v3_small', EpsilonAlpha2Beta1), ('seresnet18', EpsilonPlusFlat),
    ('resnetv2_50', lambda: EpsilonGammaBox(low=-4., high=4.)),
])
def test_with_splitting(name, build):
    '''Composites of Zennit with splitting: nothing changes in the forward pass, and relevance is finite.'''
    model = prepare(SMALL[name]())
    for rule in (RatioSplit(), SymmetricSplit()):
        conservation_error(model, with_splitting(build(), rule), images(32).clamp(-4, 4))


def test_user_network():
    '''A residual network of a user works with no extra code, even where images have odd sizes.'''
    model = prepare(UserNetwork())
    for splitting in ('ratio', 'symmetric'):
        for batch_norm in ('pass', 'merge'):
            assert conservation_error(model, ResNetLRP(splitting, batch_norm=batch_norm), images((33, 21))) <= 1e-6
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        attributor(images(32), initial_relevance([1, 2]))
        names = [name for name, module in model.named_modules() if isinstance(module, Addition)]
    # the block is called twice
    assert sorted(names) == ['addition', 'addition_1', 'addition_2', 'addition_3', 'block.addition', 'block.addition_1']


# -- trained networks on real images -----------------------------------------------------------------------------------

@pytest.mark.parametrize('num_blocks, name, accuracy', [
    (3, 'resnet20-12fca82f.th', .90), (9, 'resnet56-4bfd9763.th', .92),
])
def test_cifar(num_blocks, name, accuracy):
    '''ResNet-20 and -56 for CIFAR-10, with option A shortcuts, functional activations and poolings.'''
    model = cifar_network(num_blocks, name)
    input, target = cifar_images()
    with torch.no_grad():
        correct = model(input.float()).argmax(1) == target
    assert float(correct.double().mean()) >= accuracy
    model, input, target = model.double(), input[:10], target[:10]
    with torch.no_grad():
        plain = model(input)
    for splitting in ('ratio', 'symmetric'):
        with Gradient(model=model, composite=ResNetLRP(splitting)) as attributor:
            output, relevance = attributor(input, initial_relevance(target))
        initial = plain.gather(1, target[:, None])[:, 0]
        assert torch.equal(output, plain)
        assert float(((relevance.sum((1, 2, 3)) - initial) / initial).abs().max()) <= 1e-6


def test_cifar_random():
    '''The same network without the trained weights.'''
    model = prepare(CifarResNet(1))
    for batch_norm in ('pass', 'merge'):
        for splitting in ('ratio', 'symmetric'):
            composite = ResNetLRP(splitting, batch_norm=batch_norm)
            assert conservation_error(model, composite, images(32)) <= 1e-6


def test_efficientnet_lite0():
    '''A trained network with convolutions of a class of its own, which pad by themselves.'''
    model = efficientnet_lite0()
    input, target = imagenet_samples(transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
    ]))
    # published: 75 % of the validation set
    with torch.no_grad():
        correct = torch.cat([model(elem).argmax(1) for elem in input[::3].split(10)]) == target[::3]
    assert float(correct.double().mean()) >= .75
    model, input, target = model.double(), input[:2].double(), target[:2]
    with torch.no_grad():
        plain = model(input)
    for splitting in ('ratio', 'symmetric'):
        with Gradient(model=model, composite=ResNetLRP(splitting)) as attributor:
            output, relevance = attributor(input, initial_relevance(target, 'one'))
        assert torch.equal(output, plain)
        assert float((relevance.sum((1, 2, 3)) - 1).abs().max()) <= 1e-6


# -- operations --------------------------------------------------------------------------------------------------------

def propagate(model, inputs, composite=None, relevance=None):
    '''Output, relevance of the output and of each input, and all surrogates by name.'''
    inputs = [elem.detach().clone().requires_grad_() for elem in inputs]
    with torch.no_grad():
        plain = model(*[elem.detach().clone() for elem in inputs])
    composite = ResNetLRP() if composite is None else composite
    with composite.context(model):
        output = model(*inputs)
        assert torch.equal(output, plain)
        if relevance is None:
            relevance = torch.rand(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
        lower = torch.autograd.grad(output, inputs, relevance, allow_unused=True)
        names = {name: module for name, module in model.named_modules() if isinstance(module, Operation)}
    assert not any(isinstance(module, Operation) for module in model.modules())
    return output.detach(), relevance, lower, names


def pair(*shape):
    '''Two tensors.'''
    shape = shape or (2, 4, 6, 6)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def close(actual, expected):
    '''Whether tensors are equal up to rounding.'''
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= 1e-12 * max(
        float(expected.abs().max()), 1e-300
    )


def add_in_place(module, a, b):
    '''`a += b` on a tensor that may be overwritten.'''
    a = a.clone()
    a += b
    return a


def add_as_statement(module, a, b):
    '''`a.add_(b)` without using what it returns.'''
    a = a.clone()
    a.add_(b)
    return a


def add_alpha_in_place(module, a, b):
    '''`a.add_(b, alpha=-.5)` without using what it returns.'''
    a = a.clone()
    a.add_(b, alpha=-.5)
    return a


def subtract_in_place(module, a, b):
    '''`a -= b`.'''
    a = a.clone()
    a -= b
    return a


ADDITIONS = {
    'add': (lambda m, a, b: a + b, 1, 1),
    'iadd': (add_in_place, 1, 1),
    'add_': (add_as_statement, 1, 1),
    'add_-alpha': (add_alpha_in_place, 1, -.5),
    'torch.add': (lambda m, a, b: torch.add(a, b), 1, 1),
    'torch.add-alpha': (lambda m, a, b: torch.add(a, b, alpha=2), 1, 2),
    'torch.add-other': (lambda m, a, b: torch.add(a, other=b, alpha=2), 1, 2),
    'torch.add-keywords': (lambda m, a, b: torch.add(input=a, other=b, alpha=2), 1, 2),
    'torch.add-out-of-order': (lambda m, a, b: torch.add(b, a), 1, 1),
    'sub': (lambda m, a, b: a - b, 1, -1),
    'isub': (subtract_in_place, 1, -1),
    'torch.sub-alpha': (lambda m, a, b: torch.sub(a, b, alpha=3), 1, -3),
    'torch.rsub': (lambda m, a, b: torch.rsub(a, b), -1, 1),
    'sum': (lambda m, a, b: sum([a, b]), 1, 1),
}


@pytest.mark.parametrize('rule', ['ratio', 'symmetric'])
@pytest.mark.parametrize('name', ADDITIONS)
def test_addition(name, rule):
    '''All ways to write a sum of two tensors.'''
    function, *factors = ADDITIONS[name]
    a, b = pair()
    _, relevance, lower, names = propagate(Function(function), (a, b), ResNetLRP(rule))
    share = (factors[0] * a).abs() / ((factors[0] * a).abs() + (factors[1] * b).abs())
    share = share if rule == 'ratio' else torch.full_like(share, .5)
    assert close(lower[0], relevance * share)
    assert close(lower[1], relevance * (1 - share))
    assert list(names) == ['addition'] and isinstance(names['addition'], Addition)


@pytest.mark.parametrize('shape', [(2, 4, 1, 1), (1, 4, 6, 6), (2, 1, 6, 1)])
def test_broadcast_addition(shape):
    '''Addends of the same number of dimensions that are broadcast.'''
    a, _ = pair()
    _, b = pair(*shape)
    for addends, index in (((a, b), 0), ((b, a), 1)):
        _, relevance, lower, names = propagate(Function(lambda m, a, b: a + b), addends)
        share = a.abs() / (a.abs() + b.abs())
        assert close(lower[index], relevance * share)
        assert close(lower[1 - index], (relevance * (1 - share)).sum_to_size(shape))
        assert list(names) == ['addition']


def test_zero_addends():
    '''Where all addends are zero, each receives the same.'''
    a, b = torch.zeros(2, 3, 2, 2).double(), torch.zeros(2, 3, 2, 2).double()
    _, relevance, lower, _ = propagate(Function(lambda m, a, b: a + b), (a, b))
    assert close(lower[0], relevance / 2) and close(lower[1], relevance / 2)


CONSTANTS = {
    'bias': lambda m, x: x + m.bias.view(-1, 1, 1),
    'bias-left': lambda m, x: m.bias.view(-1, 1, 1) + x,
    'bias-scaled': lambda m, x: torch.add(x, m.bias.view(-1, 1, 1), alpha=2),
    'embedding': lambda m, x: x + m.embedding,
    'in-place': lambda m, x: x.clone().add_(m.embedding),
    'buffer': lambda m, x: x + m.buffer,
    'number': lambda m, x: 3 + x + 1.5,
    'fresh': lambda m, x: x + torch.ones_like(x),
    'fresh-random': lambda m, x: x + torch.arange(6.).to(x),
    'difference': lambda m, x: 1 - x,
    'negative': lambda m, x: -x,
    'scaled-constant': lambda m, x: torch.add(m.embedding, x, alpha=.3),
    'subtracted-mean': lambda m, x: (x - m.buffer) / m.scale,
    'computed': lambda m, x: x + m.linear(m.embedding),
}


@pytest.mark.parametrize('name', CONSTANTS)
def test_constants(name):
    '''Biases, embeddings and other constants are no skip connections: relevance passes.'''
    model = Function(
        CONSTANTS[name], bias=torch.nn.Parameter(torch.randn(4)), embedding=torch.nn.Parameter(torch.randn(1, 4, 6, 6)),
        scale=torch.nn.Parameter(torch.rand(4, 1, 1) + .5), linear=torch.nn.Linear(6, 6),
    )
    model.register_buffer('buffer', torch.randn(4, 1, 1))
    for rule in ('ratio', 'symmetric'):
        _, relevance, lower, names = propagate(model.double(), pair()[:1], ResNetLRP(rule))
        assert close(lower[0], relevance)
        assert not any(isinstance(module, Addition) for module in names.values())


def test_several_additions():
    '''Each addition of a forward pass has its own name and rule.'''
    class Model(torch.nn.Module):
        '''Three additions, one name is taken.'''
        def __init__(self):
            super().__init__()
            self.addition_1 = torch.nn.Identity()

        def forward(self, a, b):
            '''Sum.'''
            return self.addition_1(a + b) + a + b

    a, b = (elem.abs() for elem in pair())
    _, relevance, lower, names = propagate(Model(), (a, b))
    assert set(names) == {'addition', 'addition_1_', 'addition_2'}
    # the ratio of positive addends is the share of the sum
    assert close(lower[0], relevance * a / (a + b))
    assert close(lower[1], relevance * b / (a + b))
    # the first is split in half, the others by ratio
    composite = NameMapComposite([(['addition'], SymmetricSplit()), (['addition_1_', 'addition_2'], RatioSplit())], [
        ResidualCanonizer()
    ])
    _, relevance, lower, _ = propagate(Model(), (a, b), composite)
    total = 2 * (a + b)
    first = relevance * (a + b) / total
    assert close(lower[0], first / 2 + relevance * a / total)


def convolutional(function, **attributes):
    '''A module with a convolution before and after a function.'''
    return Function(
        lambda m, x: m.last(function(m, m.first(x).relu())).sum((2, 3)),
        first=torch.nn.Conv2d(3, 4, 3, padding=1), last=torch.nn.Conv2d(4, 4, 1), **attributes,
    ).double().eval()


def test_shared_modules():
    '''Modules and blocks that are called several times give the same as copies of them.'''
    class Block(torch.nn.Module):
        '''A block with a shared activation.'''
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(4, 4, 3, padding=1)
            self.conv2 = torch.nn.Conv2d(4, 4, 1)
            self.relu = torch.nn.ReLU()

        def forward(self, x):
            '''Residual block.'''
            return self.relu(self.conv2(self.relu(self.conv1(x))) + x)

    import copy
    block, input = Block(), images(8)
    shared = convolutional(lambda m, x: m.block(m.block(m.block(x))), block=block)
    separate = convolutional(
        lambda m, x: m.third(m.second(m.block(x))), block=block, second=copy.deepcopy(block), third=copy.deepcopy(block)
    )
    separate.first, separate.last = shared.first, shared.last
    for composite in (ResNetLRP, lambda: ResNetLRP(batch_norm='merge')):
        results = [propagate(model, [input], composite()) for model in (shared, separate)]
        assert close(results[0][2][0], results[1][2][0])
        assert {'block.addition', 'block.addition_1', 'block.addition_2'} == {
            name for name in results[0][3] if 'addition' in name
        }
        assert {'block.addition', 'second.addition', 'third.addition'} == {
            name for name in results[1][3] if 'addition' in name
        }


@pytest.mark.parametrize('operation', ['gate', 'padding', 'subsampling', 'linear'])
def test_shared_modules_with_different_settings(operation):
    '''Calls of one module in which operations differ do not get in each other's way.'''
    class Multiply(torch.nn.Module):
        '''The order of signal and gate is up to the caller.'''
        def forward(self, a, b):
            '''Product.'''
            return a * b

    class Pad(torch.nn.Module):
        '''The amount of padding is up to the caller.'''
        def forward(self, x, amount):
            '''Padded.'''
            return F.pad(x, amount)

    class Step(torch.nn.Module):
        '''The stride is up to the caller.'''
        def forward(self, x, step):
            '''Subsampled.'''
            return x[:, :, ::step, ::step]

    class Project(torch.nn.Module):
        '''The weight is up to the caller.'''
        def forward(self, x, weight):
            '''Linear map.'''
            return F.linear(x, weight)

    a, b = pair(2, 4, 12, 12)
    kinds = {'gate': Multiply, 'padding': Pad, 'subsampling': Step, 'linear': Project}
    weights = {'weight': torch.nn.Parameter(torch.rand(12, 12).double()),
               'other': torch.nn.Parameter(torch.randn(12, 12).double())}
    kind = kinds[operation]
    first, second = {
        'gate': (
            lambda f, m, x: f(x, x.mean((2, 3), keepdim=True)), lambda f, m, x: f(x.mean((2, 3), keepdim=True), x)
        ),
        'padding': (lambda f, m, x: f(x, (1, 0)), lambda f, m, x: f(x, (0, 0, 0, 0, 2, 3))),
        'subsampling': (lambda f, m, x: f(x, 2), lambda f, m, x: f(x, 3)),
        'linear': (lambda f, m, x: f(x, m.weight), lambda f, m, x: f(x, m.other)),
    }[operation]
    results = []
    for modules in ([kind()] * 2, [kind(), kind()]):
        model = Function(
            lambda m, a, b: torch.cat([first(m.f[0], m, a).flatten(1), second(m.f[1], m, b).flatten(1)], 1),
            f=torch.nn.ModuleList(modules), **weights,
        )
        results.append(propagate(model, (a, b), ResNetLRP('symmetric'))[2])
    assert close(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1])


class SkipSequential(torch.nn.Sequential):
    '''A container which is a residual block.'''
    def forward(self, x):
        '''Residual block.'''
        return x + super().forward(x)


class Registry(torch.nn.Module):
    '''A module which calls all of its children.'''
    def __init__(self):
        super().__init__()
        self.branches = torch.nn.ModuleDict({key: torch.nn.Conv2d(4, 4, 1) for key in 'ab'})

    def forward(self, x):
        '''Sum of the branches.'''
        for key, branch in self.branches.items():
            assert key in 'ab'
            x = x + branch(x)
        for module in self.children():
            assert module is self.branches
        return x


@pytest.mark.parametrize('block, names', [
    (SkipSequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU()), ['block.addition']),
    (torch.nn.Sequential(
        SkipSequential(torch.nn.Conv2d(4, 4, 1), SkipSequential(torch.nn.Conv2d(4, 4, 1))), torch.nn.ReLU()
    ), ['block.0.1.addition', 'block.0.addition']),
    (Registry(), ['block.addition', 'block.addition_1']),
])
def test_containers(block, names):
    '''Surrogates are not among the children that containers call.'''
    model, input = convolutional(lambda m, x: m.block(x), block=block), images(8)
    first = propagate(model, [input], ResNetLRP())
    assert sorted(name for name in first[3] if 'addition' in name) == names
    with torch.no_grad():
        plain = model(input)
    with ResNetLRP().context(model):
        for _ in range(3):
            inner = input.clone().requires_grad_()
            output = model(inner)
            assert torch.equal(output, plain)
            assert close(torch.autograd.grad(output, inner, first[1])[0], first[2][0])
            with torch.no_grad():
                assert torch.equal(model(input), plain)
    conserved = first[2][0].sum((1, 2, 3)) - first[1].sum(1)
    assert float(conserved.abs().max()) < 1e-9


def test_broadcast_gate():
    '''Squeeze-and-excitation: the gate receives nothing, in any order of the factors, and in-place.'''
    a, _ = pair()
    gate = torch.randn(2, 4, 1, 1).double()
    for function in (
        lambda m, a, g: a * g, lambda m, a, g: g * a, lambda m, a, g: torch.mul(a, g),
        lambda m, a, g: a.clone().mul_(g),
        lambda m, a, g: a * g.sigmoid(), lambda m, a, g: a * g.view(2, 4, 1, 1).expand_as(a).sigmoid(),
        lambda m, a, g: a / g,
    ):
        _, relevance, lower, names = propagate(Function(function), (a, gate))
        assert close(lower[0], relevance)
        assert lower[1] is None or not lower[1].any()
        assert any(isinstance(module, Gate) for module in names.values())


def test_gate_with_keywords():
    '''Factors may be given by name.'''
    a, _ = pair()
    gate = torch.randn(2, 4, 1, 1).double()
    _, relevance, lower, _ = propagate(Function(lambda m, a, g: torch.mul(input=a, other=g)), (a, gate))
    assert close(lower[0], relevance)


@pytest.mark.parametrize('sigmoid', [
    torch.sigmoid, torch.tanh, F.hardsigmoid, torch.nn.Sigmoid(), torch.nn.Hardsigmoid(),
])
def test_gate_of_same_size(sigmoid):
    '''A gate of the size of the signal is known by its sigmoid.'''
    for function in (lambda m, a, g: a * m.sigmoid(g), lambda m, a, g: m.sigmoid(g) * a):
        model = Function(function)
        model.sigmoid = sigmoid
        _, relevance, lower, _ = propagate(model, pair())
        assert close(lower[0], relevance)
        assert lower[1] is None or not lower[1].any()


GATES = {
    'shifted': lambda g: 1 + g.sigmoid(),
    'complement': lambda g: 1 - g.sigmoid(),
    'negative': lambda g: -g.sigmoid(),
    'interpolated': lambda g: F.interpolate(F.avg_pool2d(g, 2).sigmoid(), size=g.shape[2:]),
    'upsampled': lambda g: torch.nn.Upsample(scale_factor=2, mode='bilinear')(F.avg_pool2d(g, 2).sigmoid()),
    'averaged': lambda g: F.avg_pool2d(g.sigmoid(), 3, 1, 1),
    'averaged by module': lambda g: torch.nn.AvgPool2d(3, 1, 1)(torch.nn.Sigmoid()(g)),
    'dilated': lambda g: F.max_pool2d(g.sigmoid(), 3, 1, 1),
    'mean of channels': lambda g: g.sigmoid().mean(1, keepdim=True).expand_as(g),
    'chunk': lambda g: torch.cat((g, g), 1).sigmoid().chunk(2, 1)[0],
    'slice': lambda g: torch.cat((g, g), 1).sigmoid()[:, 2:6],
    'concatenated': lambda g: torch.cat((g[:, :2].sigmoid(), g[:, 2:].tanh()), 1),
    'flipped': lambda g: g.sigmoid().flip(3), 'turned': lambda g: g.sigmoid().rot90(1, (2, 3)),
    'whole slice': lambda g: g.sigmoid()[:, :4], 'rows': lambda g: g.sigmoid().take(torch.arange(288).view(2, 4, 6, 6)),
    'repeated': lambda g: g.mean((2, 3), keepdim=True).sigmoid().repeat(1, 1, 6, 6),
    'tiled': lambda g: g[:, :2].sigmoid().tile(1, 2, 1, 1), 'triangle': lambda g: 1 - g.sigmoid().tril(),
    'windows': lambda g: g.sigmoid().unfold(3, 1, 1)[..., 0], 'columns': lambda g: F.unfold(g.sigmoid(), 1).view_as(g),
    'strides': lambda g: g.sigmoid().contiguous().as_strided((2, 4, 6, 6), (144, 36, 6, 1)),
    'padded': lambda g: F.pad(g.sigmoid()[..., 1:], (1, 0)),
    'repeated at borders': lambda g: F.pad(g.sigmoid()[..., 1:], (1, 0, 0, 0), mode='replicate'),
    'shuffled pixels': lambda g: F.pixel_shuffle(F.pixel_unshuffle(g.sigmoid(), 2), 2),
    'shuffled channels': lambda g: F.channel_shuffle(g.sigmoid(), 2),
    'product': lambda g: g.sigmoid() * (2 * g).sigmoid(),
    'mean': lambda g: (g.sigmoid() + (2 * g).sigmoid()) / 2,
    'hard concrete': lambda g: (1.2 * g.sigmoid() - .1).clamp(0, 1),
    'bottleneck attention': lambda g: 1 + (g * g.flip(1)).sigmoid(),
    'relu6': lambda g: F.relu6(g + 3) / 6,
    'relu6 by module': lambda g: torch.nn.ReLU6()(g + 3) / 6,
    'clamp': lambda g: (g + 3).clamp(0, 6) / 6,
    'clamp at one': lambda g: torch.clamp(g * .2 + .5, min=0, max=1),
    'hardtanh': lambda g: F.hardtanh(g / 6 + .5, 0, 1),
    'hardsigmoid': F.hardsigmoid,
}


@pytest.mark.parametrize('build', [ResNetLRP, lambda: with_splitting(EpsilonPlus())], ids=('ResNetLRP', 'EpsilonPlus'))
@pytest.mark.parametrize('name', GATES)
def test_gate_made_of_sigmoids(name, build):
    '''Whatever was computed from sigmoids alone is a gate, in any order of the factors.'''
    gate = GATES[name]
    for function in (lambda m, a, g: a * gate(g), lambda m, a, g: gate(g) * a):
        _, relevance, lower, _ = propagate(Function(function), pair(), build())
        assert close(lower[0], relevance)
        assert lower[1] is None or not lower[1].any()


@pytest.mark.parametrize('gate', [
    F.relu, F.relu6, F.gelu, torch.exp, lambda g: g + 3, lambda g: (g + 3).clamp(min=0), lambda g: g.sigmoid().exp(),
    lambda g: g.sigmoid() + g, F.logsigmoid,
    lambda g: F.relu6(g + torch.arange(4.).double().view(4, 1, 1)),
    lambda g: 1 / (torch.arange(4.).double().view(4, 1, 1) + g.exp()),
    lambda g: F.conv2d(g.sigmoid(), torch.ones(4, 4, 1, 1).double()),
])
def test_no_gate(gate):
    '''What may be anything is no gate, so that each factor receives a half, or what the layer map says.'''
    model = Function(lambda m, a, g: a * gate(g))
    _, relevance, lower, _ = propagate(model, pair())
    assert close(lower[0], relevance / 2) and close(lower[1].sum(), relevance.sum() / 2)
    _, relevance, lower, _ = propagate(model, pair(), ResNetLRP(layer_map=[(Product, SignalTakesAll())]))
    assert close(lower[0], relevance) and (lower[1] is None or not lower[1].any())


def test_tanh_and_sigmoid():
    '''Of the product of both, the tanh is the signal, as in long short-term memories.'''
    places = torch.randn(4, 6, 6).double()
    for function in (
        lambda m, a, g: a.tanh() * g.sigmoid(), lambda m, a, g: g.sigmoid() * a.tanh(),
        lambda m, a, g: (a.tanh() + places) * g.sigmoid(), lambda m, a, g: F.relu6(places - a) * g.sigmoid(),
    ):
        _, relevance, lower, _ = propagate(Function(function), pair())
        assert close(lower[0], relevance)
        assert lower[1] is None or not lower[1].any()


@pytest.mark.parametrize('rule, share', [(SymmetricSplit(), .5), (SignalTakesAll(), 1.)])
def test_product_in_a_module(rule, share):
    '''Products of users which are modules can have a rule of several inputs.'''
    class Product(torch.nn.Module):
        '''Product of two signals.'''
        def forward(self, left, right):
            '''Multiply them.'''
            return left * right

    model = Function(lambda m, a, g: m.product(a, g), product=Product())
    _, relevance, lower, _ = propagate(model, pair(), ResNetLRP(layer_map=[(Product, rule)]))
    assert close(lower[0], relevance * share)
    assert close(lower[1], relevance * (1 - share)) if share < 1 else lower[1] is None


@pytest.mark.parametrize('dim', [1, -1])
@pytest.mark.parametrize('function', [
    lambda m, x: F.glu(x, m.unit.dim), lambda m, x: F.glu(input=x, dim=m.unit.dim), lambda m, x: m.unit(x),
])
def test_gated_linear_unit(function, dim):
    '''The first half receives all, the other one nothing.'''
    _, relevance, lower, _ = propagate(Function(function, unit=torch.nn.GLU(dim)), pair()[:1])
    assert close(lower[0], torch.cat((relevance, torch.zeros_like(relevance)), dim))


def test_layer_scale():
    '''Relevance passes multiplication by constants.'''
    model = Function(lambda m, x: x * m.scale * 2 / 3, scale=torch.nn.Parameter(torch.randn(4, 1, 1)))
    _, relevance, lower, _ = propagate(model.double(), pair()[:1])
    assert close(lower[0], relevance)


@pytest.mark.parametrize('function, operation', [
    (lambda m, a, b: a.cumprod(1) + b, 'cumprod'),
    (lambda m, a, b: a.abs() ** b, 'pow'),
    (lambda m, a, b: torch.fft.fft2(a).real + b, 'fft_fft2'),
    (lambda m, a, b: F.conv2d(a, b[:, :, :3, :3]), 'conv2d'),
    (lambda m, a, b: a.softmax(1) + b, 'softmax'),
])
def test_unsupported(function, operation):
    '''What has no rule raises, or warns and takes the gradient.'''
    class Inner(Function):
        '''A module which can be named.'''

    model = Function(lambda m, a, b: m.inner(a, b), inner=Inner(function))
    # weights of several images would be refused for that
    inputs = [elem[:1] for elem in pair()]
    with pytest.raises(UnsupportedOperation, match=rf"inner \(Inner\) uses '.*{operation}.*'"):
        propagate(model, inputs)
    composite = ResNetLRP(canonizers=[ResidualCanonizer(strict=False)])
    with pytest.warns(UserWarning, match=rf"inner \(Inner\) uses '.*{operation}.*'"):
        propagate(model, inputs, composite)


class Square(torch.autograd.Function):
    '''A function with a gradient of its own.'''
    @staticmethod
    def forward(ctx, x):
        '''Square.'''
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        '''Gradient.'''
        return grad * 2 * ctx.saved_tensors[0]


def test_custom_function():
    '''The gradient of a custom function is not taken for relevance without a word.'''
    model = Function(lambda m, x: m.inner(x), inner=Function(lambda m, x: Square.apply(x)))
    with pytest.raises(UnsupportedOperation, match='inner'):
        propagate(model, pair()[:1])


@pytest.mark.parametrize('function', [
    lambda m, a, b: torch.cat([a, b], 1), lambda m, a, b: torch.cat((a, b), dim=2),
    lambda m, a, b: torch.hstack([a, b]),
    lambda m, a, b: torch.concat([a, b, a], 3), lambda m, a, b: torch.stack([a, b], 1),
    lambda m, a, b: torch.cat(tensors=[a, b], dim=-1),
])
def test_concatenation(function):
    '''Concatenated tensors receive exactly their slices.'''
    a, b = pair()
    _, relevance, lower, names = propagate(Function(function), (a, b))
    tensors = [elem.requires_grad_() for elem in (a, b)]
    expected = torch.autograd.grad(function(None, *tensors), tensors, relevance)
    assert all(torch.equal(actual, elem) for actual, elem in zip(lower, expected))
    assert list(names) == ['concatenation'] and isinstance(names['concatenation'], Concatenation)


FUNCTIONAL = {
    'relu': (lambda m, x: F.relu(x), torch.nn.ReLU()),
    'relu-inplace': (lambda m, x: F.relu(x, inplace=True), torch.nn.ReLU()),
    'relu_': (lambda m, x: torch.relu_(x), torch.nn.ReLU()),
    'gelu': (lambda m, x: F.gelu(x), torch.nn.GELU()),
    'silu': (lambda m, x: F.silu(x), torch.nn.SiLU()),
    'hardtanh': (lambda m, x: F.hardtanh(x), torch.nn.Hardtanh()),
    'clamp': (lambda m, x: x.clamp(min=0), torch.nn.ReLU()),
    'swish': (lambda m, x: x * torch.sigmoid(x), torch.nn.SiLU()),
    'hardswish': (lambda m, x: x * F.relu6(x + 3) / 6, torch.nn.Hardswish()),
    'avg_pool2d': (lambda m, x: F.avg_pool2d(x, 2), torch.nn.AvgPool2d(2)),
    'avg_pool2d-padded': (
        lambda m, x: F.avg_pool2d(x, 3, 2, 1, False, False), torch.nn.AvgPool2d(3, 2, 1, False, False)
    ),
    'adaptive_avg_pool2d': (lambda m, x: F.adaptive_avg_pool2d(x, (2, 3)), torch.nn.AdaptiveAvgPool2d((2, 3))),
    'mean': (lambda m, x: x.mean((2, 3), keepdim=True), torch.nn.AdaptiveAvgPool2d(1)),
    'torch.mean': (lambda m, x: torch.mean(x, dim=(2, 3), keepdim=True), torch.nn.AdaptiveAvgPool2d(1)),
    'max_pool2d': (lambda m, x: F.max_pool2d(x, 2), torch.nn.MaxPool2d(2)),
    'amax': (lambda m, x: x.amax((2, 3), keepdim=True), torch.nn.AdaptiveMaxPool2d(1)),
    'adaptive_max_pool2d': (lambda m, x: F.adaptive_max_pool2d(x, 1), torch.nn.AdaptiveMaxPool2d(1)),
    'batch_norm': (
        lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, m.bias), torch.nn.BatchNorm2d(4)
    ),
    'conv2d': (lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding=1), None),
    'conv2d-keywords': (lambda m, x: F.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias, padding=1), None),
    'torch.conv2d': (lambda m, x: torch.conv2d(x, m.conv.weight, m.conv.bias, 1, 1), None),
}


@pytest.mark.parametrize('build', [
    pytest.param(ResNetLRP, id='ResNetLRP'),
    pytest.param(lambda: with_splitting(EpsilonPlusFlat()), id='EpsilonPlusFlat'),
    pytest.param(lambda: with_splitting(EpsilonAlpha2Beta1()), id='EpsilonAlpha2Beta1'),
])
@pytest.mark.parametrize('name', FUNCTIONAL)
def test_functional(name, build):
    '''Functions receive the rule that a module in their place receives.'''
    function, module = FUNCTIONAL[name]
    conv, norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
    if module is None:
        module = conv
    elif name == 'batch_norm':
        module = norm
    first, last = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 1)

    class Block(torch.nn.Module):
        '''Runs the function.'''
        def __init__(self):
            super().__init__()
            self.conv = conv
            self.register_buffer('mean', norm.running_mean)
            self.register_buffer('var', norm.running_var)
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x):
            '''Run the function.'''
            return function(self, x)

    models = [
        Function(
            lambda m, x: m.last(m.block(m.first(x))).flatten(1), first=first, block=block, last=last
        ).double().eval()
        for block in (Block(), module)
    ]
    randomize(models[1])
    with torch.no_grad():
        models[0].block.mean.copy_(norm.running_mean)
        models[0].block.var.copy_(norm.running_var)
    input = images(8)
    results = [propagate(model, [input], build()) for model in models]
    assert close(results[0][0], results[1][0])
    assert close(results[0][2][0], results[1][2][0])
    if build is ResNetLRP:
        assert any(name.startswith('block.') for name in results[0][3])
        total = results[0][1].sum(1)
        assert float((results[0][2][0].sum((1, 2, 3)) - total).abs().max()) < 1e-9


class SamePadding(torch.nn.Conv2d):
    '''A convolution which pads by itself, as in ports from other frameworks.'''
    def forward(self, x):
        '''Pad and convolve.'''
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(torch.nn.Conv2d):
    '''A convolution with standardized weights.'''
    def forward(self, x):
        '''Standardize and convolve.'''
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize('batch_norm', ['pass', 'merge'])
@pytest.mark.parametrize('kind', [SamePadding, Standardized])
def test_subclasses_of_convolutions(kind, batch_norm):
    '''Subclasses with a forward of their own receive the rule for what they compute.'''
    first, second = kind(3, 4, 3, 2).double(), torch.nn.Conv2d(3, 4, 3, 2).double()
    second.load_state_dict(first.state_dict())
    if kind is SamePadding:
        second = torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), second)
    else:
        with torch.no_grad():
            second.weight.copy_(first.weight - first.weight.mean((1, 2, 3), keepdim=True))
    norm, input, results = randomize(torch.nn.BatchNorm2d(4)), images(8), []
    with torch.no_grad():
        norm.weight[1] = -1
    for conv in (first, second):
        model = torch.nn.Sequential(conv, norm, torch.nn.ReLU(), torch.nn.Flatten()).double().eval()
        results.append(propagate(model, [input], ResNetLRP(batch_norm=batch_norm)))
    assert float((results[0][2][0] - results[1][2][0]).abs().max()) < 1e-6 * float(results[1][2][0].abs().max())
    assert float((results[0][2][0].sum((1, 2, 3)) - results[0][1].sum(1)).abs().max()) < 1e-9


@pytest.mark.parametrize('function', [pytest.param(function, id=name) for name, function in {
    'channels': lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + F.pad(x * .5, (0, 0, 0, 0, 1, 3), 'constant', 0),
    'keywords': lambda m, x: F.pad(input=x, pad=[1, 2, 0, 1]),
    'reflect': lambda m, x: F.pad(x, (1, 1, 1, 1), mode='reflect'),
    'replicate': lambda m, x: F.pad(x, (1, 1, 1, 1), mode='replicate'),
    'crop': lambda m, x: F.pad(x, (-1, 2, 1, -1)) + F.pad(x, (0, 1, 0, 0)),
    'cat-product': lambda m, x: torch.cat([x, x.mul(0)], 1) + torch.cat([x.mul(0), x], 1),
    'cat-zeros': lambda m, x: torch.cat([x, torch.zeros_like(x)], 1) + torch.cat([torch.zeros_like(x), x], 1),
}.items()])
def test_padding_is_conserving(function):
    '''Relevance of zeros that were added goes back to elements that exist.'''
    for splitting in ('ratio', 'symmetric'):
        a, _ = pair()
        _, relevance, lower, _ = propagate(Function(function), [a], ResNetLRP(splitting))
        assert float((lower[0].sum((1, 2, 3)) - relevance.sum((1, 2, 3))).abs().max()) < 1e-9


def test_channel_padding():
    '''The relevance of channels of zeros is shared evenly among the others.'''
    a, _ = pair()
    _, relevance, lower, names = propagate(Function(lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 1))), [a])
    outer = torch.cat([relevance[:, :2], relevance[:, 6:]], 1).sum(1, keepdim=True)
    assert close(lower[0], relevance[:, 2:6] + outer / 4)
    assert list(names) == ['padding']


def test_strided_slicing():
    '''Subsampling in shortcuts.'''
    a = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    model = Function(lambda m, x: x[:, :, ::2, ::2])
    _, relevance, lower, names = propagate(model, [a], ResNetLRP(projection='literal'))
    expected = torch.zeros_like(a)
    expected[:, :, ::2, ::2] = relevance
    assert close(lower[0], expected)
    assert list(names) == ['subsampling'] and isinstance(names['subsampling'], Subsampling)
    _, relevance, lower, _ = propagate(model, [a], ResNetLRP(projection='spread'))
    expected = torch.zeros_like(a)
    for row in range(7):
        for column in range(6):
            cell = a[:, :, row // 2 * 2:row // 2 * 2 + 2, column // 2 * 2:column // 2 * 2 + 2].sum((2, 3))
            expected[:, :, row, column] = relevance[:, :, row // 2, column // 2] * a[:, :, row, column] / cell
    assert close(lower[0], expected)


@pytest.mark.parametrize('function', [pytest.param(function, id=name) for name, function in {
    'ellipsis': lambda m, x: x[..., ::2, ::2],
    'rows': lambda m, x: x[:, :, ::2],
    'offset': lambda m, x: x[:, :, 1::2, ::3],
    'channels': lambda m, x: x[:, ::2],
    'part': lambda m, x: x[::1, :, :6:2],
    'one-channel': lambda m, x: x[:, 0, ::2, ::2],
    'large-step': lambda m, x: x[..., ::5, ::7],
}.items()])
def test_other_slicing(function):
    '''Subsampling with an offset, of other dimensions, or of a part.'''
    a = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    for projection in ('spread', 'literal'):
        _, relevance, lower, _ = propagate(Function(function), [a], ResNetLRP(projection=projection))
        assert abs(float(lower[0].sum() - relevance.sum())) < 1e-9


@pytest.mark.parametrize('function', [
    lambda m, x: x[:, :2], lambda m, x: x.flatten(1)[:, :5], lambda m, x: x.transpose(1, 3).contiguous(),
    lambda m, x: torch.chunk(x, 2, 1)[0] + torch.chunk(x, 2, 1)[1], lambda m, x: x.repeat(1, 2, 1, 1),
    lambda m, x: x.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6), lambda m, x: F.dropout(x, training=False),
    lambda m, x: F.interpolate(x, scale_factor=2, mode='bilinear'), lambda m, x: x.unbind(1)[2], lambda m, x: x.float(),
    lambda m, x: F.pixel_shuffle(x, 2), lambda m, x: F.interpolate(x, size=(3, 3)), lambda m, x: x.mean(3).mean(2),
    lambda m, x: torch.stack([x, x.relu()]).sum(0),
])
def test_moves_are_conserving(function):
    '''Functions which move elements conserve relevance.'''
    a, _ = pair()
    _, relevance, lower, _ = propagate(Function(function), [a.abs()])
    tolerance = 1e-4 if relevance.dtype == torch.float32 else 1e-9
    assert abs(float(lower[0].sum()) - float(relevance.double().sum())) < tolerance


# -- rules of other composites -----------------------------------------------------------------------------------------

class NaiveSplit(torch.autograd.Function):
    '''Splitting, written by hand.'''
    @staticmethod
    def forward(ctx, rule, a, b):
        '''Sum.'''
        ctx.save_for_backward(a, b)
        ctx.rule = rule
        return a + b

    @staticmethod
    def backward(ctx, relevance):
        '''Split.'''
        a, b = (elem.abs() for elem in ctx.saved_tensors)
        if ctx.rule == 'symmetric':
            a, b = torch.ones_like(a), torch.ones_like(b)
        total = a + b
        share = torch.where(total > 0, a / total, .5)
        return None, relevance * share, relevance * (1 - share)


class SmallNetwork(torch.nn.Module):
    '''Two residual blocks, with additions or with what stands for them.'''
    def __init__(self, rule=None):
        super().__init__()
        self.rule = rule
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.relu = torch.nn.ModuleList(torch.nn.ReLU() for _ in range(3))
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        '''Logits.'''
        add = torch.add if self.rule is None else lambda a, b: NaiveSplit.apply(self.rule, a, b)
        x = self.relu[0](self.stem(x))
        x = self.relu[1](add(x, self.conv1(x)))
        x = self.relu[2](add(self.conv2(x), x))
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize('rule, hook', [('ratio', RatioSplit), ('symmetric', SymmetricSplit), ('ratio', None)])
@pytest.mark.parametrize('build', [EpsilonPlusFlat, EpsilonPlus, EpsilonAlpha2Beta1])
def test_layer_map(build, rule, hook):
    '''Users may give additions a rule in the layer map of any composite.'''
    model, naive = SmallNetwork().double().eval(), SmallNetwork(rule).double().eval()
    naive.load_state_dict(model.state_dict())
    input = images(8)
    with Gradient(model=naive, composite=build()) as attributor:
        expected = attributor(input, initial_relevance([1, 2]))[1]
    layer_map = [] if hook is None else [((Addition,), hook())]
    composites = [build(layer_map=layer_map, canonizers=[ResidualCanonizer()])]
    composites.append(with_splitting(build(), None if hook is None else hook()))
    for composite in composites:
        with Gradient(model=model, composite=composite) as attributor:
            actual = attributor(input, initial_relevance([1, 2]))[1]
        assert close(actual, expected)


def test_name_map():
    '''Name maps see surrogates.'''
    class KeepFirst(Split):
        '''The first addend takes all.'''
        def shares(self, *addends):
            '''Shares.'''
            return [1.]

    model, input = SmallNetwork().double().eval(), images(8)
    captured = {}

    def capture(key):
        return lambda module, args: args[0].register_hook(lambda grad: captured.__setitem__(key, grad)) and None

    composite = NameMapComposite(
        [(['addition'], KeepFirst()), (['addition_1'], SymmetricSplit()), (['conv1', 'conv2', 'head'], Epsilon())],
        canonizers=[ResidualCanonizer()],
    )
    handles = [
        model.relu[1].register_forward_pre_hook(capture('sum')), model.conv1.register_forward_pre_hook(capture('x'))
    ]
    with Gradient(model=model, composite=composite) as attributor:
        attributor(input, initial_relevance([1, 2]))
        named = dict(model.named_modules())
        assert isinstance(named['addition'], Addition) and isinstance(named['addition_1'], Addition)
    for handle in handles:
        handle.remove()
    assert close(captured['x'], captured['sum'])


@pytest.mark.parametrize('create', [GammaLRP, ResNetLRP])
def test_part_in_another_thread(create):
    '''A branch that runs in another thread is a part of the network, and not one of its own.'''
    class Branches(torch.nn.Module):
        '''A residual block whose branch may have a thread of its own.'''
        def __init__(self, run):
            super().__init__()
            self.run = run
            self.conv, self.branch = torch.nn.Conv2d(3, 8, 3), torch.nn.Sequential(
                torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
            )
            self.fc = torch.nn.Linear(8, 5)

        def forward(self, x):
            '''Logits.'''
            h = self.conv(x).relu()
            return self.fc((h + self.run(self.branch, h)).relu().mean((2, 3)))

    def in_thread(module, h):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(module, h).result()

    model, x = prepare(Branches(lambda module, h: module(h))), images(8).double()
    twin = Branches(in_thread).double().eval()
    twin.load_state_dict(model.state_dict())
    results = []
    for network in (model, twin):
        with Gradient(model=network, composite=create()) as attributor:
            results += [attributor(x, initial_relevance(1))[1] for _ in range(2)]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    if create is ResNetLRP:
        assert_conserved(twin, x, create(), target=1)
    with pytest.raises(RuntimeError, match=r"branch \(Sequential\).*another thread.*batch_norm='pass'"):
        Gradient(model=twin, composite=ResNetLRP(batch_norm='merge'))(x, initial_relevance(1))
    assert torch.equal(twin(x), model(x))
    # without a normalization, there is nothing to fold
    for network in (model, twin):
        network.branch = torch.nn.Conv2d(8, 8, 1).double().requires_grad_(False)
        torch.nn.init.constant_(network.branch.weight, .1)
        torch.nn.init.constant_(network.branch.bias, .1)
    first, second = (Gradient(model=network, composite=RelativeLRP())(x, initial_relevance(1))[1]
                     for network in (model, twin))
    assert torch.equal(first, second)
