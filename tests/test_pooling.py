'''Gradients of pooling, written with operations that other runtimes have.'''
import itertools

import pytest
import torch
import torch.nn.functional as F

from zennit_resnet._pooling import adaptive_maximum_backward, average_backward, maximum_backward

AVERAGES = [
    case for case in itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (False, True), (False, True), (None, 5))
    if case[2] <= case[0] // 2
]


def gradient(function, input):
    '''Some relevance at the output, and the gradient.'''
    output, *indices = function(input)
    upper = torch.randn_like(output)
    return upper, torch.autograd.grad(output, input, upper)[0], *(elem.detach() for elem in indices)


@pytest.mark.parametrize('shape', [(7, 7), (8, 5)], ids=str)
def test_average(shape):
    '''Windows that overlap, leave gaps, and end before the input or after it.'''
    for kernel, stride, padding, ceil_mode, count_include_pad, divisor in AVERAGES:
        input = torch.rand(2, 3, *shape, dtype=torch.float64, requires_grad=True)
        args = kernel, stride, padding, ceil_mode, count_include_pad, divisor
        upper, expected = gradient(lambda input, args=args: (F.avg_pool2d(input, *args),), input)
        lists = [kernel] * 2, [stride] * 2, [padding] * 2
        actual = average_backward(upper, input, *lists, ceil_mode, count_include_pad, divisor)
        torch.testing.assert_close(actual, expected, msg=lambda text, args=args: f'{args}: {text}')


def test_average_of_volumes():
    '''Three dimensions, and a stride that is left out.'''
    input = torch.rand(2, 3, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    upper, expected = gradient(lambda input: (F.avg_pool3d(input, (3, 2, 2), padding=(1, 0, 1)),), input)
    torch.testing.assert_close(
        average_backward(upper, input, [3, 2, 2], [], [1, 0, 1], False, True, None), expected
    )


@pytest.mark.parametrize('pool, adaptive, dims', [
    (F.max_pool2d, F.adaptive_max_pool2d, 2), (F.max_pool3d, F.adaptive_max_pool3d, 3)
])
def test_maximum(pool, adaptive, dims):
    '''Each window has one winner, also if it is that of others.'''
    input = torch.randint(4, (2, 3, *(7, 6, 5)[:dims])).double().requires_grad_()
    upper, expected, indices = gradient(lambda input: pool(input, 3, 2, 1, return_indices=True), input)
    actual = maximum_backward(upper, input, [3] * dims, [2] * dims, [1] * dims, [1] * dims, False, indices)
    torch.testing.assert_close(actual, expected)
    upper, expected, indices = gradient(lambda input: adaptive(input, 2, return_indices=True), input)
    torch.testing.assert_close(adaptive_maximum_backward(upper, input, indices), expected)
