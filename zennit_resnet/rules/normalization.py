'''Normalization as the linear map that it is if its deviation is a constant.'''
import torch
from torch.nn.modules.instancenorm import _InstanceNorm
from zennit.core import Stabilizer

from ..arguments import check_stabilizer
from ._linear_maps import with_adjoint
from .base import SinglePass


class EpsilonNormalization(SinglePass):
    '''LRP-epsilon for normalization, of which the deviation s counts as a constant.

    Layer, group and instance normalization are y_i = w_i (x_i - mean) / s + b_i, and
    R'_i = x_i (u_i - mean of u) with u_i = w_i R_i / (s (y_i + epsilon sign(y_i))), where means are those of all that is
    normalized together. Biases keep their part. Batch normalization has a constant mean as well. Normalizations without
    mean and bias (RMS, L2) pass relevance on unchanged, which is the same. The rule is that of Ali et al. 2022 and
    Achtibat et al. 2024 (AttnLRP).

    An error is raised if ``epsilon`` is neither a function of denominators (TypeError) nor a number that is not
    negative (ValueError).
    '''
    def __init__(self, epsilon=1e-6):
        super().__init__()
        self.epsilon = epsilon
        self._stabilize = Stabilizer.ensure(check_stabilizer('epsilon', epsilon))

    def store(self, module, *inputs):
        '''Keep the input.'''
        input, = inputs
        return (input,)

    def propagate(self, module, stored, relevance):
        '''Share relevance by the parts of elements and of the mean.'''
        input, = stored
        shape = _grouped(module, input)
        if shape is None and getattr(module, 'running_mean', None) is None:
            return (relevance,)
        if shape is None:
            output, transpose = with_adjoint(module.forward, input)
            return (input * transpose(relevance / self._stabilize(output)),)
        with torch.no_grad():
            output = module.forward(input)
        share, weight = relevance / self._stabilize(output), module.weight
        if weight is not None:
            by_channel = getattr(module, 'normalized_shape', None) is None
            share = share * (weight.view(-1, *(1,) * (input.ndim - 2)) if by_channel else weight).to(share)
        grouped, share = input.reshape(shape), share.reshape(shape)
        variance = grouped.var(-1, unbiased=False, keepdim=True)
        lower = (share - share.mean(-1, keepdim=True)) * (variance + module.eps).rsqrt()
        return (input * lower.view_as(input),)


def _grouped(module, input):
    '''Shape of the input with all that is normalized together as the last dimension, None if it is not by its mean.'''
    if isinstance(module, torch.nn.RMSNorm):
        return None
    if getattr(module, 'normalized_shape', None) is not None:
        return *input.shape[:-len(module.normalized_shape)], -1
    if getattr(module, 'running_mean', None) is not None:
        return None
    if isinstance(module, _InstanceNorm):
        return *input.shape[:2], -1
    groups = getattr(module, 'num_groups', None)
    return None if groups is None else (len(input), groups, -1)
