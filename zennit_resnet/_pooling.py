'''Gradients of pooling by operations that other runtimes have, too: for :py:mod:`zennit_resnet.export`.'''
import math

import torch
import torch.nn.functional as F

from .rules._linear_maps import CONV_TRANSPOSE, as_tuple

aten = torch.ops.aten


def average_backward(upper, input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override=None):
    '''The gradient of an average pooling: its windows are those of a transposed convolution with ones.'''
    lengths, outs = input.shape[2:], upper.shape[2:]
    num = len(lengths)
    kernel, stride, padding = (as_tuple(value, num) for value in (kernel, stride or kernel, padding))
    planes = math.prod(upper.shape[:2])
    if divisor_override:
        upper = upper / divisor_override
    else:
        for dim, (length, out, size, step, pad) in enumerate(zip(lengths, outs, kernel, stride, padding)):
            counts = _counts(length, out, size, step, pad, count_include_pad)
            shape = [1] * upper.ndim
            shape[dim + 2] = out
            is_even = len(set(counts)) == 1
            upper = upper / (counts[0] if is_even else upper.new_tensor(counts).view(shape))
    upper = upper.reshape(planes, 1, *outs)
    lower = CONV_TRANSPOSE[num](upper, upper.new_ones(1, 1, *kernel), stride=stride)
    # windows end before the input does, or after it
    margins = [(-pad, pad + length - total) for length, total, pad in zip(lengths, lower.shape[2:], padding)]
    lower = F.pad(lower, [value for pair in reversed(margins) for value in pair])
    return lower.reshape(input.shape)


def _counts(length, out, size, step, pad, count_include_pad):
    '''Number of elements that each window along one dimension has.'''
    starts = [index * step - pad for index in range(out)]
    ends = [min(start + size, length + pad) for start in starts]
    if not count_include_pad:
        starts, ends = [max(start, 0) for start in starts], [min(end, length) for end in ends]
    return [end - start for start, end in zip(starts, ends)]


def maximum_backward(upper, input, kernel, stride, padding, dilation, ceil_mode, indices):
    '''The gradient of a max pooling: each window gives its relevance to the element that its index says.'''
    return _scatter(upper, input, indices, len(kernel))


def adaptive_maximum_backward(upper, input, indices):
    return _scatter(upper, input, indices, input.ndim - 2)


def _scatter(upper, input, indices, num):
    lead = input.shape[:-num]
    lower = upper.new_zeros(*lead, math.prod(input.shape[-num:]))
    return lower.scatter_add(-1, indices.flatten(-num), upper.flatten(-num)).reshape(input.shape)


DECOMPOSITIONS = {
    aten.avg_pool2d_backward.default: average_backward,
    aten.avg_pool3d_backward.default: average_backward,
    aten.max_pool2d_with_indices_backward.default: maximum_backward,
    aten.max_pool3d_with_indices_backward.default: maximum_backward,
    aten.adaptive_max_pool2d_backward.default: adaptive_maximum_backward,
    aten.adaptive_max_pool3d_backward.default: adaptive_maximum_backward,
}
