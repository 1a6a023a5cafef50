'''Rules of relative LRP (Nyiri & Gibaru, R-LRP): contributions without any division by activations.

A neuron's contribution is the sum of what it contributes to the neurons of the next layer, each weighted with its
own contribution, Definition 9: z_i = Card(J_i) / N sum_j w_ij x_i z_j / M_j. Equations and propositions are
those of R-LRP.
'''
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from zennit.types import Convolution, ConvolutionTranspose

from ..arguments import check_choice
from ..layer import LinearMap, NonNegativeMap, linear
from . import _linear_maps as maps
from ._linear_maps import by_example
from .base import SinglePass


class Relative(SinglePass):
    '''Relative contributions of the inputs of linear layers, convolutions and average poolings, Eqs. (8) and (12).

    z_i = Card(J_i) / (N M) x_i sum_j w_ij z_j, with the contribution z_j of output j, the number N of outputs,
    the number M of inputs of an output (including those in the padding), and the number Card(J_i) of outputs that are
    computed from input i. An average pooling of n elements has weights 1 / n. Biases have no part in it.

    Parameters
    ----------
    cardinality: str, optional
        With ``'constant'`` (default), Card(J_i) is the number of weights of an input, i.e. its value if strides and
        borders are ignored. With ``'per_position'``, it is counted for each position as the equation has it: it is
        smaller at the border, and under strides it depends on the position's parity, which has nothing to do with the
        image. A ValueError is raised for others.
    '''
    for_plain = True

    def __init__(self, cardinality='constant'):
        super().__init__()
        check_choice('cardinality', cardinality, ('constant', 'per_position'))
        self.cardinality = cardinality

    def store(self, module, *inputs):
        input, = inputs
        maps.check_batch(self, module, input)
        if not len(input):
            raise ValueError(f'{type(self).__name__}: {module} got an empty batch of shape {tuple(input.shape)}!')
        return (input,)

    def propagate(self, module, stored, relevance):
        input, = stored
        if isinstance(module, (LinearMap, NonNegativeMap)) and len(input) > 1:
            _check_examples(module, input)
        num_outputs = math.prod(relevance.shape[1:])
        fan_in, cardinality = self._connections(module, input, relevance)
        if isinstance(fan_in, torch.Tensor):
            relevance, fan_in = relevance / fan_in, 1
        lower = self._transposed(module, input, relevance)
        constant = 1 / (num_outputs * fan_in)
        if isinstance(cardinality, torch.Tensor):
            lower = lower * cardinality
        else:
            constant *= cardinality
        # one step instead of two, and in place, as this is limited by memory
        is_new = isinstance(module, (Convolution, torch.nn.Linear)) and not isinstance(module, LinearMap)
        out = lower if is_new else None
        return (torch.addcmul(lower.new_zeros(()), lower, input, value=constant, out=out),)

    def _connections(self, module, input, relevance):
        '''Number M of inputs of each output, and Card(J_i), as numbers or tensors that can be broadcast.'''
        if isinstance(module, LinearMap):
            # the same product of ones counts them
            output, transpose = maps.with_adjoint(
                lambda ones: module.linear(ones, torch.ones_like), torch.ones_like(input)
            )
            counts, fan_in = transpose(torch.ones_like(output)), _largest(output)
            return fan_in.masked_fill(fan_in == 0, 1.), (
                counts if self.cardinality == 'per_position' else _largest(counts)
            )
        if isinstance(module, torch.nn.Linear):
            return module.weight.shape[1], module.weight.shape[0]
        # uses of an input by its windows if strides and borders are ignored, and outputs of each use
        uses, factor = 1, 1
        if isinstance(module, Convolution):
            factor, in_channels = module.weight.shape[0] // module.groups, module.weight.shape[1]
            if isinstance(module, ConvolutionTranspose):
                factor, in_channels = in_channels, factor
            uses = math.prod(module.weight.shape[2:])
            fan_in = in_channels * uses
        elif getattr(module, 'kernel_size', None) is not None:
            fan_in = uses = math.prod(maps.as_tuple(module.kernel_size, input.ndim - 2))
        elif getattr(module, 'output_size', None) is not None:
            fan_in = maps.adaptive_sizes(input, relevance)
        else:
            # means over whole dimensions: each input has one output
            return max(input.numel() / relevance.numel(), 1), 1
        if self.cardinality == 'per_position':
            uses = maps.count_uses(module, input, relevance)
        return fan_in, factor * uses

    @staticmethod
    def _transposed(module, input, relevance):
        if isinstance(module, LinearMap):
            return maps.with_adjoint(lambda leaf: module.linear(leaf, torch.Tensor.clone), input)[1](relevance)
        if not isinstance(module, (Convolution, torch.nn.Linear)):
            return maps.with_adjoint(module.forward, input)[1](relevance)
        weight = module.weight.detach().to(relevance.dtype)
        if isinstance(module, torch.nn.Linear):
            return linear(relevance, weight.T)
        return maps.convolve_transposed(module, input, weight, relevance)


class RelativeMaxPool(Relative):
    '''As :py:class:`Relative` for a max pooling, Proposition 13, with weights of one for maxima, including ties.'''
    @staticmethod
    def _transposed(module, input, relevance):
        if getattr(module, 'kernel_size', None) is not None:
            return by_example(functools.partial(_credit_windows, module), input, relevance)
        if getattr(module, 'output_size', None) is not None:
            return _credit_adaptive(input, relevance)
        # functional maximum over whole dimensions
        maximum = input.amax(() if module.dim is None else module.dim, keepdim=True)
        return relevance.reshape(maximum.shape) * (input == maximum)


def _largest(tensor):
    return tensor.amax(tuple(range(1, tensor.ndim)), keepdim=True) if tensor.ndim > 1 else tensor


def _check_examples(module, input):
    '''Raise a ValueError if a linear map does not keep the first dimension, which has the examples.'''
    with torch.no_grad():
        probe = torch.zeros_like(input)
        probe[0] = 1
        output = module.linear(probe, torch.ones_like) if isinstance(module, LinearMap) else module.forward(probe)
    if len(output) != len(input) or bool(output[1:].any()):
        raise ValueError(
            f'{module.name!r} moves or adds up elements along the first dimension, which has the '
            f'{len(input)} examples, and contributions are rescaled for each: explain one at a time.'
        )


def _credit_windows(module, input, relevance):
    num, shape = input.ndim - 2, relevance.shape[2:]
    kernel, stride, dilation, pads = maps.settings(module, num)
    # with ceil_mode, windows may reach beyond the padding
    pads = [(before, max((out - 1) * step + (size - 1) * dil + 1 - length - before, 0))
            for out, step, size, dil, length, (before, _) in
            zip(shape, stride, kernel, dilation, input.shape[2:], pads)]
    padded = input
    if any(map(any, pads)):
        padded = F.pad(input, [value for pair in reversed(pads) for value in pair], value=-math.inf)

    def taps(dim):
        return [
            slice(pos * dilation[dim], pos * dilation[dim] + (shape[dim] - 1) * stride[dim] + 1, stride[dim])
            for pos in range(kernel[dim])
        ]

    # the maximum along one dimension after the other is faster than the layer, which also computes the indices
    output = padded
    for dim in range(num):
        output = functools.reduce(torch.maximum, (output[(slice(None),) * (dim + 2) + (tap,)] for tap in taps(dim)))
    lower = torch.zeros_like(padded)
    for window in itertools.product(*map(taps, range(num))):
        lower[(..., *window)] += relevance * (padded[(..., *window)] == output)
    return lower[(..., *(slice(pad, pad + length) for (pad, _), length in zip(pads, input.shape[2:])))]


def _credit_adaptive(input, relevance):
    lower, shape = torch.zeros_like(input), relevance.shape[2:]
    bounds = [maps.adaptive_bounds(*lengths) for lengths in zip(input.shape[2:], shape)]
    dims = tuple(range(2, input.ndim))
    for cell in itertools.product(*map(range, shape)):
        window = (..., *(slice(*bound[index]) for bound, index in zip(bounds, cell)))
        maximum = input[window].amax(dims, keepdim=True)
        lower[window] += relevance[(..., *(slice(start, start + 1) for start in cell))] * (input[window] == maximum)
    return lower
