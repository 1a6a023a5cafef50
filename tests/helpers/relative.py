'''R-LRP by loops.'''
import itertools
import math

import torch
from torch import nn

from helpers.layers import connections, matrix, with_weight
from zennit_resnet.composites import RelativeLRP


def naive_weights(module, shape):
    '''The matrix (input, output) of a layer without its bias.'''
    return matrix(with_weight(module, module.weight.detach()) if hasattr(module, 'weight') else module, shape)


def naive_counts(module, shape, cardinality, edges):
    '''Number M_j of inputs of each output and number Card(J_i) of outputs of each input, Definition 9.

    M does not depend on whether inputs are in the padding. ``edges`` is the matrix of the number of connections.
    '''
    if getattr(module, 'output_size', None) is not None:
        # the windows of adaptive poolings are all inside
        fan_in, fan_out = edges.sum(0), 1
    elif isinstance(module, nn.Linear):
        fan_in, fan_out = module.in_features, module.out_features
    else:
        kernel = module.kernel_size if isinstance(module.kernel_size, tuple) else (
            (module.kernel_size,) * (len(shape) - 1)
        )
        fan_in = fan_out = math.prod(kernel)
        if hasattr(module, 'weight'):
            fan_in *= module.in_channels // module.groups
            fan_out *= module.out_channels // module.groups
    return fan_in, fan_out if cardinality == 'constant' else edges.sum(1)


def naive_relative(module, input, relevance, cardinality='constant'):
    '''Definition 9: z_i = Card(J_i) / N sum_j w_ij x_i z_j / M_j.'''
    shape = input.shape[1:]
    weights = naive_weights(module, shape)
    fan_in, fan_out = naive_counts(module, shape, cardinality, connections(module, shape))
    relevance = relevance.flatten(1)
    lower = fan_out / relevance.shape[1] * input.flatten(1) * ((relevance / fan_in) @ weights.T)
    return lower.view(input.shape)


def pool_windows(module, shape, out_shape):
    '''For each output position (without channels) of a max pooling, the positions of the input that it reads.'''
    num = len(shape)
    if hasattr(module, 'output_size'):
        ranges = [[
            range(math.floor(index * length / out), math.ceil((index + 1) * length / out)) for index in range(out)
        ] for length, out in zip(shape, out_shape)]
    else:
        values = [elem if isinstance(elem, tuple) else (elem,) * num for elem in (
            module.kernel_size, module.stride, module.padding, module.dilation
        )]
        ranges = [[
            [pos for pos in range(index * stride - pad, index * stride - pad + kernel * dilation, dilation)
             if 0 <= pos < length] for index in range(out)
        ] for length, out, kernel, stride, pad, dilation in zip(shape, out_shape, *values)]
    for index in itertools.product(*map(range, out_shape)):
        yield index, list(itertools.product(*(elem[pos] for elem, pos in zip(ranges, index))))


def naive_max_pool(module, input, relevance, cardinality='constant'):
    '''Proposition 13: the weight of each maximum of a window is one. Also returns the sum of a0_j z_j / M_j.'''
    lower, counts = torch.zeros_like(input), torch.zeros(input.shape[2:]).to(input)
    is_adaptive, identity = hasattr(module, 'output_size'), torch.zeros(len(input)).to(input)
    kernel = None if is_adaptive else module.kernel_size
    if isinstance(kernel, int):
        kernel = (kernel,) * (input.ndim - 2)
    for index, positions in pool_windows(module, input.shape[2:], relevance.shape[2:]):
        fan_in = len(positions) if is_adaptive else math.prod(kernel)
        values = torch.stack([input[(..., *pos)] for pos in positions], -1)
        weights = (values == values.amax(-1, keepdim=True)).to(input)
        share = relevance[(..., *index)] / fan_in
        identity += ((weights * values).sum(-1) * share).sum(1)
        for num, pos in enumerate(positions):
            counts[pos] += 1
            lower[(..., *pos)] += weights[..., num] * share
    if cardinality == 'constant':
        counts = torch.full_like(counts, 1 if is_adaptive else math.prod(kernel))
    return counts / relevance[0].numel() * input * lower, counts, identity


def composite_attribute(model, *inputs, relevance=None, **kwargs):
    '''Contributions by the composite, with their scale restored. Returns (relevance, *lower).'''
    composite = RelativeLRP(**kwargs)
    inputs = [elem.clone().requires_grad_() for elem in inputs]
    with torch.no_grad():
        plain = model(*(elem.detach().clone() for elem in inputs))
    with composite.context(model):
        output = model(*inputs)
        assert torch.equal(output, plain)
        relevance = torch.randn_like(output) if relevance is None else relevance
        lower = torch.autograd.grad(output, inputs, relevance)
    scale = composite.log_scale.double().exp()
    return (relevance, *(elem * scale.view(-1, *(1,) * (elem.ndim - 1)) for elem in lower))


def explain(model, input, start=None, **kwargs):
    '''Contributions with their logarithmic scale. They start from the second class, or from a constant.'''
    composite = RelativeLRP(**kwargs)
    input = input.clone().requires_grad_()
    with composite.context(model):
        output = model(input)
        if start is None:
            start = torch.eye(output.shape[1]).to(output)[[1] * len(output)] * output.detach()
        lower, = torch.autograd.grad(output, input, torch.as_tensor(start).expand_as(output))
    return lower, composite.log_scale.double()
