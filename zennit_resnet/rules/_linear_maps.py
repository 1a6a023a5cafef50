'''Convolutions and poolings as linear maps, with windows adapted to what rules need of them.'''
import functools
import itertools
import math
import re

import torch
import torch.nn.functional as F
from zennit.types import Convolution, ConvolutionTranspose

from .._compat import has_values, is_traced, padding_of
from ..layer import Operation

# From this number of elements on, memory is asked for each time, which takes longer than what is computed
LARGE = 2 ** 21

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def as_tuple(value, num):
    '''A setting of a module for each of its spatial dimensions.'''
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * num if len(value) == 1 else value


def with_adjoint(function, *inputs):
    '''Output of a function, and its gradient by the input (by each of several) as a function of that of the output.'''
    with torch.enable_grad():
        leaves = [elem.detach().requires_grad_() for elem in inputs]
        output = function(*leaves)

    def transpose(upper):
        gradients = torch.autograd.grad(output, leaves, upper, retain_graph=True)
        return gradients if len(leaves) > 1 else gradients[0]

    return output.detach(), transpose


def convolve(module, input, weight, shape, spread=False):
    '''Convolve as a module does, with another weight and without bias.'''
    num = weight.ndim - 2
    stride, dilation = as_tuple(module.stride, num), as_tuple(module.dilation, num)
    if isinstance(module, ConvolutionTranspose):
        pads = as_tuple(module.padding, num)
        output_padding = [
            out - (length - 1) * step + 2 * pad - (size - 1) * dil - 1 for out, length, step, pad, size, dil
            in zip(shape, input.shape[2:], stride, pads, weight.shape[2:], dilation)
        ]
        return CONV_TRANSPOSE[num](input, weight, None, stride, pads, output_padding, module.groups, dilation)
    padding = module.padding
    if module.padding_mode != 'zeros':
        input, padding = F.pad(input, padding_of(module), mode=module.padding_mode), 0
    if not spread or not is_sparse(module):
        return _CONV[num](input, weight, None, stride, padding, dilation, module.groups)
    padding = as_tuple(padding, num)
    if any(padding):
        input = F.pad(input, [value for value in reversed(padding) for _ in range(2)])
    kernel = tuple(weight.shape[2:])
    cells = tuple(step if step > size == 1 else 1 for step, size in zip(stride, kernel))
    input = pool_cells(input, cells)
    stride = tuple(step // cell for step, cell in zip(stride, cells))
    for dim, (step, size, dil) in enumerate(zip(stride, kernel, dilation)):
        if step > size and dil == 1:
            # enlarge the kernel to the stride
            parts = torch.arange(step, device=weight.device) * size // step
            amounts = parts.bincount().to(weight)[parts].view(-1, *(1,) * (num - dim - 1))
            weight = weight.index_select(dim + 2, parts) / amounts
    excess = [
        max((out - 1) * step + (size - 1) * dil + 1 - length, 0)
        for out, step, size, dil, length in zip(shape, stride, weight.shape[2:], dilation, input.shape[2:])
    ]
    if any(excess):
        input = F.pad(input, [value for amount in reversed(excess) for value in (0, amount)])
    output = _CONV[num](input, weight, None, stride, 0, dilation, module.groups)
    # pooling includes incomplete cells at the border, which the convolution does not always read
    return output[(..., *(slice(length) for length in shape))]


def is_sparse(module):
    '''Whether the stride of a convolution exceeds its kernel, so that it reads only some of the positions.'''
    strides = zip(as_tuple(module.stride, module.weight.ndim - 2), module.weight.shape[2:])
    return not isinstance(module, ConvolutionTranspose) and any(step > size for step, size in strides)


def pool_cells(input, cells):
    # in three dimensions, PyTorch has no pooling with a window beyond the input
    cells = tuple(min(cell, length) for cell, length in zip(cells, input.shape[2:]))
    if all(cell == 1 for cell in cells):
        return input
    return AVG_POOL[len(cells)](input, cells, cells, ceil_mode=True, count_include_pad=False)


def whole_cells(module, input):
    '''Stride of a convolution that reads one position of each of its stride's cells, which fill the input.'''
    num = input.ndim - 2
    stride = as_tuple(module.stride, num)
    is_whole = not any(as_tuple(module.padding, num)) and not any(map(int.__mod__, input.shape[2:], stride))
    return stride if is_whole and set(module.weight.shape[2:]) == {1} else None


def convolve_cells(module, input, weight, cells):
    '''Convolve averages of :py:func:`whole_cells`, several times as fast as with average pooling and its gradient.'''
    num, size = len(cells), math.prod(cells)
    steps = [[slice(start, None, cell) for start in range(cell)] for cell in cells]
    parts = [input[(..., *window)] for window in itertools.product(*steps)]
    # the first sum is a new tensor
    pooled = functools.reduce(torch.Tensor.add_, parts[2:], parts[0] + parts[1]).div_(size)

    def transpose(output):
        lower = _gradient(output, pooled, weight, (1,) * num, (0,) * num, (1,) * num, module.groups).div_(size)
        for dim in reversed(range(num)):
            lower = lower.repeat_interleave(cells[dim], dim + 2)
        return lower

    return _CONV[num](pooled, weight, None, 1, 0, 1, module.groups), transpose


def average(module, input, even=False):
    '''Average pooling with the window of a max pooling.'''
    num = input.ndim - 2
    if getattr(module, 'kernel_size', None) is None or set(as_tuple(module.dilation, num)) != {1}:
        raise ValueError(f'maxpool=\'average\' needs a window without dilation, {module} has none: use \'winner\'.')
    if even and overlapping_stride(module, num) is not None and not module.ceil_mode:
        kernel = as_tuple(module.kernel_size, num)
        weight = even_weight(module, torch.ones(input.shape[1], 1, *kernel).to(input))
        return _CONV[num](input, weight, None, module.stride, module.padding, 1, input.shape[1])
    return AVG_POOL[num](input, module.kernel_size, module.stride, module.padding, module.ceil_mode)


def overlapping_stride(module, num):
    '''The stride of a convolution or pooling, None if it is one, or if windows do not overlap.'''
    if not _has_windows(module):
        return None
    kernel, stride, *_ = settings(module, num)
    return stride if any(1 < step < size for step, size in zip(stride, kernel)) else None


def even_weight(module, weight):
    '''Scale a weight in place, so that windows with a stride give all positions modulo it the same total weight.'''
    num = weight.ndim - 2
    if isinstance(module, ConvolutionTranspose) or set(as_tuple(getattr(module, 'dilation', 1), num)) != {1}:
        return weight
    stride = [step if step <= size else 1 for step, size in zip(as_tuple(module.stride, num), weight.shape[2:])]
    if set(stride) == {1}:
        return weight
    phase = torch.zeros((), dtype=torch.long, device=weight.device)
    for step, size in zip(stride, weight.shape[2:]):
        phase = phase.unsqueeze(-1) * step + torch.arange(size, device=weight.device) % step
    phase = phase.flatten()
    sums = weight.sum(1).flatten(1) @ F.one_hot(phase, math.prod(stride)).to(weight)
    # filters may have no weight at some positions
    is_used = sums != 0
    mean = sums.sum(1, keepdim=True) / is_used.sum(1, keepdim=True).clamp(min=1)
    factor = torch.where(is_used, mean / sums.where(is_used, 1.), 1.)
    return weight.mul_(factor[:, phase].view(-1, 1, *weight.shape[2:]))


def smooth(relevance, stride):
    '''Smooth relevance with the binomial (triangular) filter that removes the harmonics of a stride.'''
    return by_example(functools.partial(_smooth, stride), relevance)


def _smooth(stride, relevance):
    for dim, step in enumerate(stride, 2):
        if step == 1:
            continue
        length = relevance.shape[dim]
        shifts = [shift for shift in range(1 - step, step) if abs(shift) < length]
        # positions at the border have fewer neighbours
        places = torch.arange(length, device=relevance.device)
        total = sum(
            (step - abs(shift)) * ((places + shift >= 0) & (places + shift < length)) for shift in shifts
        ).to(relevance)
        relevance = relevance / total.view(-1, *(1,) * (relevance.ndim - dim - 1))
        result = relevance * step
        for shift in shifts:
            if shift:
                start, size = max(-shift, 0), length - abs(shift)
                result.narrow(dim, start + shift, size).add_(
                    relevance.narrow(dim, start, size), alpha=step - abs(shift)
                )
        relevance = result
    return relevance


def convolve_transposed(module, input, weight, output):
    '''The transposed linear map of a convolution or transposed convolution, with another weight.'''
    num = weight.ndim - 2
    stride, dilation = as_tuple(module.stride, num), as_tuple(module.dilation, num)
    if isinstance(module, ConvolutionTranspose):
        lower = _CONV[num](output, weight, None, stride, module.padding, dilation, module.groups)
        # an output padding beyond the stride, which a dilation allows, has further positions
        return lower[(..., *(slice(length) for length in input.shape[2:]))]

    if is_pointwise(module, weight, output):
        # the product itself is faster
        return (weight.flatten(1).T @ output.flatten(2)).view(input.shape)
    pads = _pads(module, weight)
    if module.padding_mode == 'zeros' and all(left == right for left, right in pads):
        return _gradient(output, input, weight, stride, [left for left, _ in pads], dilation, module.groups)
    mode = 'constant' if module.padding_mode == 'zeros' else module.padding_mode
    padding = [value for pair in reversed(pads) for value in pair]
    padded, crop = with_adjoint(lambda leaf: F.pad(leaf, padding, mode=mode), input)
    return crop(_gradient(output, padded, weight, stride, (0,) * num, dilation, module.groups))


def is_pointwise(module, weight, output):
    '''Whether a convolution is a product of matrices for each example.'''
    num = weight.ndim - 2
    sizes = (*weight.shape[2:], *as_tuple(module.stride, num), module.groups)
    has_padding = not isinstance(module.padding, str) and any(as_tuple(module.padding, num))
    # a graph has a convolution with transposed weights, which are computed once
    return set(sizes) == {1} and not has_padding and has_values(output) and output.is_contiguous()


def _gradient(output, input, weight, stride, padding, dilation, groups):
    '''Gradient of a convolution by its input. The values of the input are not used.'''
    return torch.ops.aten.convolution_backward(
        output, input, weight, None, stride, padding, dilation, False, (0,) * len(stride), groups, (True, False, False),
    )[0]


def count_uses(module, input, output):
    '''Count the windows of a convolution or pooling that read each position of its input.'''
    num = input.ndim - 2
    counts, mode = [], getattr(module, 'padding_mode', 'zeros')
    for dim, (length, out) in enumerate(zip(input.shape[2:], output.shape[2:])):
        if not _has_windows(module):
            reads = torch.cat([torch.arange(*bound) for bound in adaptive_bounds(length, out)])
        else:
            size, step, dil, (before, after) = (elem[dim] for elem in settings(module, num))
            if isinstance(module, ConvolutionTranspose):
                writes = torch.arange(length)[:, None] * step - before + torch.arange(size) * dil
                reads = torch.arange(length)[:, None].expand_as(writes)[(writes >= 0) & (writes < out)]
            else:
                reads = (torch.arange(out)[:, None] * step - before + torch.arange(size) * dil).flatten()
                if mode != 'zeros':
                    # positions of the padding are copies of others
                    source = F.pad(torch.arange(length, dtype=torch.double)[None, None], (before, after), mode=mode)
                    reads = source.flatten().long()[reads + before]
        counts.append(reads[(reads >= 0) & (reads < length)].bincount(minlength=length))
    return _outer(input, counts)


def _outer(input, vectors):
    '''Products of one element of each vector, of shape (1, 1, *spatial).'''
    # another device need not be waited for
    vectors = [elem.to(input, non_blocking=True) for elem in vectors]
    return functools.reduce(lambda total, elem: total.unsqueeze(-1) * elem, vectors, input.new_ones((1, 1)))


def _has_windows(module):
    '''Whether a convolution or pooling has windows of a given size.'''
    return hasattr(module, 'weight') or getattr(module, 'kernel_size', None) is not None


def settings(module, num):
    '''Kernel, stride, dilation and padding (before and after) of a convolution or pooling for each dimension.'''
    if hasattr(module, 'weight'):
        kernel = tuple(module.weight.shape[2:])
        return kernel, as_tuple(module.stride, num), as_tuple(module.dilation, num), _pads(module, module.weight)
    kernel = as_tuple(module.kernel_size, num)
    stride = kernel if module.stride is None else as_tuple(module.stride, num)
    pads = [(pad, pad) for pad in as_tuple(module.padding, num)]
    return kernel, stride, as_tuple(getattr(module, 'dilation', 1), num), pads


def _pads(module, weight):
    '''Padding of a convolution before and after, for each dimension.'''
    num = weight.ndim - 2
    if module.padding == 'valid':
        return [(0, 0)] * num
    if module.padding == 'same':
        totals = [dil * (size - 1) for size, dil in zip(weight.shape[2:], as_tuple(module.dilation, num))]
        return [(total // 2, total - total // 2) for total in totals]
    return [(pad, pad) for pad in as_tuple(module.padding, num)]


def adaptive_bounds(length, out):
    '''Begin and end of the windows of an adaptive pooling, along a dimension of a given input and output length.'''
    return [(index * length // out, -(-(index + 1) * length // out)) for index in range(out)]


def adaptive_sizes(input, output):
    '''Sizes of the windows of an adaptive pooling, of shape (1, 1, *spatial).'''
    bounds = (adaptive_bounds(*lengths) for lengths in zip(input.shape[2:], output.shape[2:]))
    return _outer(input, [torch.tensor([end - begin for begin, end in bound]) for bound in bounds])


def check_batch(rule, module, input):
    '''Raise a ValueError if the input of a layer has no dimension of examples.'''
    ndim = module.weight.ndim if isinstance(module, Convolution) else 2 + _num_spatial(module)
    if input.ndim < ndim or (isinstance(module, Convolution) and input.ndim > ndim):
        raise ValueError(
            f'{type(rule).__name__} needs a batch, {module} got an input of shape {tuple(input.shape)}: add a first '
            'dimension for a single example.'
        )


def _num_spatial(module):
    '''Number of spatial dimensions of a pooling or normalization by its name, zero for other layers.'''
    names = [module.name] if isinstance(module, Operation) else [base.__name__ for base in type(module).__mro__]
    matches = (re.search(r'(?:pool|norm)([1-3])d', name.lower()) for name in names)
    return next((int(match[1]) for match in matches if match), 0)


def by_example(function, *tensors):
    '''Apply a function to one example after the other, which on CPU is faster if tensors do not fit into the cache.'''
    # tensors of fewer dimensions are broadcast along that of the examples
    first, lengths = tensors[0], {(elem.ndim, *elem.shape[:1]) for elem in tensors}
    if (first.device.type != 'cpu' or first.numel() < LARGE or len(lengths) > 1 or first.shape[:1].numel() < 2
            or is_traced()):
        return function(*tensors)
    result = None
    for index, parts in enumerate(zip(*(elem.split(1) for elem in tensors))):
        part = function(*parts)
        if result is None:
            # of the layout of the input where possible, such as channels last
            result = (torch.empty_like(first, dtype=part.dtype) if first.shape[1:] == part.shape[1:]
                      else part.new_empty((len(first), *part.shape[1:])))
        result[index:index + 1] = part
    return result
