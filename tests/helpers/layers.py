'''Layers and their dense matrices, and relevance by rules of single layers.'''
import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def attribute(rule, module, *inputs, relevance=None):
    '''Lower relevance for each input, by a rule on its own. Returns (output, relevance, *lower).'''
    # the inputs of layers have been computed from others
    sources = [elem.clone().requires_grad_() for elem in inputs]
    handles = rule.register(module)
    try:
        output = module(*sources)
        if relevance is None:
            relevance = torch.rand_like(output)
        lower = torch.autograd.grad(output, sources, relevance, allow_unused=True)
    finally:
        handles.remove()
    return (output.detach(), relevance, *lower)


def matrix(function, shape):
    '''The dense matrix (input, output) of a linear function, whose inputs have this shape without batch.'''
    size = torch.Size(shape).numel()
    with torch.no_grad():
        return function(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1)


def with_weight(module, weight):
    '''The module with another weight, and without bias.'''
    module = copy.deepcopy(module)
    module.weight.data = weight
    module.bias = None
    return module


def connections(module, shape):
    '''How often an input is connected to each output.'''
    if not hasattr(module, 'weight'):
        return (matrix(module, shape) > 0).double()
    return matrix(with_weight(module, torch.ones_like(module.weight)), shape)


def assert_close(actual, expected, tolerance=1e-10):
    '''Compare, relative to the largest value.'''
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((actual - expected).abs().max()) <= tolerance * scale


def make_input(shape, sign, dtype=torch.float64):
    '''Input with values of both signs, or after a ReLU.'''
    input = torch.randn(shape, dtype=dtype)
    return {'positive': input.clamp(min=0), 'signed': input, 'negative': -input.abs()}[sign]


LAYERS = {
    'linear': (lambda: torch.nn.Linear(7, 5), (7,)),
    'conv1d': (lambda: torch.nn.Conv1d(3, 4, 3), (3, 9)),
    'conv1d stride padding': (lambda: torch.nn.Conv1d(2, 4, 5, stride=2, padding=2), (2, 9)),
    'conv1d reflect': (lambda: torch.nn.Conv1d(2, 3, 5, padding=2, padding_mode='reflect'), (2, 7)),
    'conv2d': (lambda: torch.nn.Conv2d(3, 4, 3), (3, 5, 6)),
    'conv2d stride padding': (lambda: torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 6)),
    'conv2d same': (lambda: torch.nn.Conv2d(2, 3, 3, padding='same'), (2, 5, 4)),
    'conv2d same even dilated': (lambda: torch.nn.Conv2d(2, 3, (2, 4), padding='same', dilation=(1, 2)), (2, 5, 7)),
    'conv2d valid': (lambda: torch.nn.Conv2d(2, 3, 3, padding='valid', stride=2), (2, 5, 6)),
    'conv2d dilation': (lambda: torch.nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 6, 5)),
    'conv2d groups': (lambda: torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 5)),
    'conv2d depthwise': (lambda: torch.nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 5, 4)),
    'conv2d circular': (lambda: torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode='circular'), (2, 4, 5)),
    'conv2d circular stride': (
        lambda: torch.nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode='circular'), (2, 5, 5)
    ),
    'conv2d reflect': (lambda: torch.nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode='reflect'), (2, 4, 5)),
    'conv2d replicate': (lambda: torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode='replicate'), (2, 4, 5)),
    'conv2d circular same': (
        lambda: torch.nn.Conv2d(2, 3, (2, 3), padding='same', padding_mode='circular'), (2, 4, 5)
    ),
    'conv2d rectangular': (lambda: torch.nn.Conv2d(2, 3, (1, 3), stride=(1, 2), padding=(0, 1)), (2, 4, 7)),
    'conv3d': (lambda: torch.nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 3)),
    'conv3d groups': (lambda: torch.nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 0), groups=2), (2, 2, 4, 3)),
    'transposed 1d': (lambda: torch.nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 5)),
    'transposed 2d': (lambda: torch.nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 3)),
    'transposed 2d groups': (lambda: torch.nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), (4, 3, 3)),
    'transposed 3d': (lambda: torch.nn.ConvTranspose3d(2, 2, 2, dilation=(1, 2, 1)), (2, 2, 3, 2)),
    'average 1d': (lambda: torch.nn.AvgPool1d(3, stride=2, padding=1), (2, 7)),
    'average 2d': (lambda: torch.nn.AvgPool2d(2), (3, 5, 6)),
    'average 2d padding': (lambda: torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 5, 6)),
    'average 2d ceil': (lambda: torch.nn.AvgPool2d(3, 2, ceil_mode=True), (2, 6, 6)),
    'average 3d': (lambda: torch.nn.AvgPool3d(2, stride=1), (1, 3, 4, 3)),
    'adaptive 1d': (lambda: torch.nn.AdaptiveAvgPool1d(3), (2, 7)),
    'adaptive 2d': (lambda: torch.nn.AdaptiveAvgPool2d((2, 3)), (3, 5, 7)),
    'adaptive 2d global': (lambda: torch.nn.AdaptiveAvgPool2d(1), (3, 4, 5)),
}


def positive_negative(module, shape):
    '''Matrices of a layer's positive and negative weights. Each tap counts on its own, even if padding repeats it.'''
    if not hasattr(module, 'weight'):
        weights = matrix(module, shape)
        return weights, torch.zeros_like(weights)
    weight = module.weight.detach()
    return tuple(matrix(with_weight(module, elem), shape) for elem in (weight.clamp(min=0), weight.clamp(max=0)))


def distribute(contributions, relevance, spread=None):
    '''Relevance R_j over contributions z_ij of shape (batch, input, output): R'_i = sum_j z_ij / sum_k z_kj R_j.

    Relevance of units without any contribution is spread by another matrix, if any.
    '''
    total = contributions.sum(1, keepdim=True)
    shares = torch.where(total == 0, torch.zeros_like(contributions), contributions / total)
    if spread is not None:
        shares = torch.where(total == 0, (spread / spread.sum(0))[None], shares)
    return torch.einsum('bij,bj->bi', shares, relevance.flatten(1))


def naive_zplus(module, input, relevance, dead_units='spread'):
    '''Eq. (2) with contributions (w h)+.'''
    shape = input.shape[1:]
    positive, negative = positive_negative(module, shape)
    flat = input.flatten(1)[:, :, None]
    contributions = flat.clamp(min=0) * positive + flat.clamp(max=0) * negative
    spread = connections(module, shape) if dead_units == 'spread' else None
    return distribute(contributions, relevance, spread).view(input.shape)


def assert_conserved(lower, relevance, tolerance=1e-10):
    '''Compare the sum of relevance for each sample.'''
    lower, relevance = (elem.double().flatten(1).sum(1) for elem in (lower, relevance))
    assert float(((lower - relevance) / relevance).abs().max()) <= tolerance


def box():
    '''Lowest and highest values of normalized photographs.'''
    low = torch.tensor([-2.2, -2.0, -1.8], dtype=torch.float64).view(1, 3, 1, 1)
    return low, low + 4.5


def with_dead_units(name):
    '''A layer and non-negative input in which some of the units have no positive contribution.'''
    build, shape = LAYERS[name]
    module = build().double()
    if hasattr(module, 'weight'):
        # one filter without positive weights
        module.weight.data[0] = -module.weight.data[0].abs()
    input = make_input((2, *shape), 'positive')
    # an empty region in one of the samples
    input[0, ..., :3] = 0.
    if name == 'linear':
        input[0] = 0.
    return module, input


class Products(TorchDispatchMode):
    '''Counts products with a matrix that is repeated for each row.'''
    repeated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and args[1].stride(0) == 0:
            self.repeated += 1
        return func(*args, **(kwargs or {}))
