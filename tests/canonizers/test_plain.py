'''Rules for types are for modules that compute what their type does. The canonizer looks inside of all others.'''
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, UnsupportedOperation, initial_relevance, with_splitting
from zennit_resnet._weights import is_plain
from zennit_resnet.rules import PassThrough

COMPOSITES = {
    'ratio': ResNetLRP, 'merge': lambda: ResNetLRP('symmetric', batch_norm='merge', dead_units='drop'),
    'average': lambda: ResNetLRP(maxpool='average', coverage='literal'), 'relative': RelativeLRP,
}


class CausalConv(nn.Conv1d):
    '''Pads one side.'''
    def forward(self, x):
        '''With a padding of its own.'''
        return super().forward(F.pad(x, (2, 0)))


class StandardizedConv(nn.Conv2d):
    '''Convolves with another weight.'''
    def _conv_forward(self, input, weight, bias):
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, weight, bias)


class MaskedLinear(nn.Linear):
    '''Uses half of its weights.'''
    def forward(self, x):
        '''With a mask.'''
        return F.linear(x, self.weight * (torch.arange(self.in_features) % 2), self.bias)


class ScaledNorm(nn.BatchNorm2d):
    '''Scales what it normalizes.'''
    def forward(self, x):
        '''Twice the normalized input, and the input.'''
        return 2 * super().forward(x) + x


class Twice(nn.ReLU):
    '''An activation that is none.'''
    def forward(self, x):
        '''A sum of two.'''
        return super().forward(x) + x


class ScaledMaxPool(nn.MaxPool2d):
    '''Scales the maximum.'''
    def forward(self, x):
        '''Twice.'''
        return 2 * super().forward(x)


class BlurredAvgPool(nn.AvgPool2d):
    '''Adds a channel's neighbor.'''
    def forward(self, x):
        '''A sum of two.'''
        x = super().forward(x)
        return x + x.roll(1, 1)


class Upsampled(nn.ConvTranspose2d):
    '''Crops.'''
    def forward(self, x):
        '''Without the border.'''
        return super().forward(x)[:, :, 1:-1, 1:-1]


class Function(nn.Module):
    '''Layers that are given as a function.'''
    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        '''Run it.'''
        return self.function(self, x)


def network(layer, dims=2):
    '''A network with a layer in the middle, and a skip connection.'''
    torch.manual_seed(0)
    conv = nn.Conv2d if dims == 2 else nn.Conv1d
    stem, tail = conv(3, 4, 3, padding=1), conv(4, 4, 3, padding=1)
    return Function(
        lambda self, x: self.head((self.tail(self.layer(self.stem(x).relu())) + 1.).relu().flatten(2).mean(2)),
        stem=stem, layer=layer, tail=tail, head=nn.Linear(4, 3),
    ).double().eval()


def explain(model, composite, dims=2):
    '''Output and relevance of images with some negative values.'''
    x = torch.randn(2, 3, *(8,) * dims, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, initial_relevance([1, 2], 'one'))


def inside_of(layer):
    '''A subclass as a module that is derived from no layer, and calls the layer of its base class.'''
    base = next(base for base in type(layer).__mro__ if base.__module__.startswith('torch.nn.modules.'))
    # its parameters are none of the other module
    layer.requires_grad_(False)

    def function(self, x):
        return {
            CausalConv: lambda: F.conv1d(F.pad(x, (2, 0)), layer.weight, layer.bias),
            StandardizedConv: lambda: F.conv2d(x, (layer.weight - layer.weight.mean((1, 2, 3), keepdim=True))
                                               / layer.weight.std((1, 2, 3), keepdim=True), layer.bias, padding=1),
            MaskedLinear: lambda: F.linear(x, layer.weight * (torch.arange(layer.in_features) % 2), layer.bias),
            ScaledNorm: lambda: 2 * self.plain(x) + x,
            Twice: lambda: self.plain(x) + x,
            ScaledMaxPool: lambda: 2 * self.plain(x),
            BlurredAvgPool: lambda: (lambda pooled: pooled + pooled.roll(1, 1))(self.plain(x)),
            Upsampled: lambda: self.plain(x)[:, :, 1:-1, 1:-1],
        }[type(layer)]()

    plain = {
        nn.BatchNorm2d: lambda: nn.BatchNorm2d(4), nn.ReLU: nn.ReLU, nn.MaxPool2d: lambda: nn.MaxPool2d(2),
        nn.AvgPool2d: lambda: nn.AvgPool2d(2), nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(4, 4, 3, stride=2),
    }.get(base, nn.Identity)()
    plain.load_state_dict(layer.state_dict(), strict=False)
    return Function(function, plain=plain.double().eval())


LAYERS = {
    'causal': (lambda: CausalConv(4, 4, 3), 1), 'standardized': (lambda: StandardizedConv(4, 4, 3, padding=1), 2),
    'linear': (lambda: MaskedLinear(8, 6), 2), 'norm': (lambda: ScaledNorm(4), 2), 'activation': (Twice, 2),
    'max': (lambda: ScaledMaxPool(2), 2), 'average': (lambda: BlurredAvgPool(2), 2),
    'transposed': (lambda: Upsampled(4, 4, 3, stride=2), 2),
}


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('kind', LAYERS)
def test_forward_of_its_own(kind, name):
    '''A subclass has the relevance of the functions it is made of, and conserves it.'''
    torch.manual_seed(3)
    create, dims = LAYERS[kind]
    layer = create().double().eval()
    assert not is_plain(layer)
    model = network(layer, dims)
    (output, relevance), (same, expected) = (
        explain(elem, COMPOSITES[name](), dims) for elem in (model, network(inside_of(layer), dims))
    )
    torch.testing.assert_close(output, same)
    torch.testing.assert_close(relevance, expected, rtol=1e-9, atol=1e-12)
    if name in ('ratio', 'average'):
        torch.testing.assert_close(relevance.flatten(1).sum(1), torch.ones(2).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize('norm', [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('kind', ['causal', 'linear', 'transposed'])
def test_with_a_norm(kind, name, norm):
    '''The same with weights that are computed from others.'''
    torch.manual_seed(3)
    create, dims = LAYERS[kind]
    layer, twin = create().double(), create().double()
    twin.load_state_dict(layer.state_dict())
    norm(layer)
    model = network(layer, dims)
    model(torch.zeros(1, 3, *(8,) * dims, dtype=torch.double))
    twin.weight.data = layer.weight.detach().clone()
    torch.testing.assert_close(
        explain(model, COMPOSITES[name](), dims), explain(network(twin, dims), COMPOSITES[name](), dims)
    )


def test_is_plain():
    '''Which modules compute what their class in torch.nn does.'''
    class Named(nn.Conv2d):
        '''Nothing but a name.'''

    class Checked(nn.Linear):
        '''Has other methods.'''
        def reset_parameters(self):
            '''Zeros.'''
            self.weight.data.zero_()

    class Other(nn.Conv2d):
        '''Convolves otherwise.'''
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight.abs(), bias)

    class Own(nn.Module):
        '''Derived from no layer.'''
        def forward(self, x):
            '''Anything.'''
            return x

    patched = nn.Conv2d(1, 1, 1)
    patched.forward = lambda x: x
    for module in (Named(1, 1, 1), Checked(1, 1), nn.LazyLinear(2), Own(), nn.Sequential(), nn.MaxPool2d(2),
                   parametrizations.weight_norm(nn.Linear(1, 1)), nn.utils.weight_norm(nn.Linear(1, 1))):
        assert is_plain(module), module
    for module in (Other(1, 1, 1), patched, parametrizations.weight_norm(CausalConv(1, 1, 3)), ScaledNorm(1)):
        assert not is_plain(module), module


def test_rules_that_are_given():
    '''A rule that a user gives to a type is for all of its subclasses.'''
    class Swish(nn.SiLU):
        '''A function with a backward function of its own.'''
        class Function(torch.autograd.Function):
            '''x sigmoid(x).'''
            @staticmethod
            def forward(ctx, x):
                '''The function.'''
                return x * x.sigmoid()

            @staticmethod
            def backward(ctx, grad):
                '''Not its gradient.'''
                return grad * 7

        def forward(self, x):
            '''The function.'''
            return self.Function.apply(x)

    with pytest.raises(UnsupportedOperation, match='Swish.*PassThrough'):
        explain(network(Swish()), ResNetLRP())
    relevance = explain(network(Swish()), ResNetLRP(layer_map=[(Swish, PassThrough())]))[1]
    torch.testing.assert_close(relevance, explain(network(nn.SiLU()), ResNetLRP())[1])


@pytest.mark.parametrize('name', ['ratio', 'relative'])
def test_functions_of_torch(name):
    '''Functions of torch.nn with a backward function of their own are no exception.'''
    class Layer(nn.Module):
        '''Uses the function of a layer.'''
        def forward(self, x):
            '''A normalization across channels.'''
            return torch.nn.modules._functions.CrossMapLRN2d.apply(x, 3, 1e-4, .75, 1)

    with pytest.raises(UnsupportedOperation, match='CrossMapLRN2d'):
        explain(network(Layer()), COMPOSITES[name]())
    with Gradient(model=network(nn.CrossMapLRN2d(3)), composite=ResNetLRP()) as attributor:
        relevance = attributor(torch.randn(2, 3, 8, 8).double(), initial_relevance([1, 2], 'one'))[1]
    torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.ones(2).double())


@pytest.mark.parametrize('kind', ['standardized', 'causal'])
def test_rules_of_zennit(kind):
    '''Zennit runs the forward again with other parameters, which is wrong if it computes a weight from them.'''
    create, dims = LAYERS[kind]
    model, composite = network(create().double(), dims), with_splitting(EpsilonPlus())
    if kind == 'standardized':
        with pytest.raises(RuntimeError, match=r'layer \(StandardizedConv\).*ZPlus'):
            explain(model, composite, dims)
    else:
        torch.testing.assert_close(
            explain(model, composite, dims)[1], explain(network(inside_of(model.layer), dims), composite, dims)[1]
        )


def test_block_with_a_linear_layer_of_its_own():
    '''BlockLRP takes the bias from the denominator of linear layers only if it is added as it is.'''
    class Doubled(nn.Linear):
        '''Twice a linear layer.'''
        def forward(self, x):
            '''Twice.'''
            return 2 * super().forward(x)

    torch.manual_seed(0)
    head, x = Doubled(3, 2), torch.rand(1, 3)
    model = nn.Sequential(head).eval()
    relevance = Gradient(model, BlockLRP())(x, initial_relevance(1, 'one'))[1]
    x.requires_grad_()
    output = model(x)[0, 1]
    expected = x * torch.autograd.grad(output, x)[0] / output
    torch.testing.assert_close(relevance, expected, rtol=1e-4, atol=1e-5)
