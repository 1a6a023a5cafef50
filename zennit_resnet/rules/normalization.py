'''Normalization as the linear map that it is if its deviation is a constant.'''
import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from ..arguments import as_stabilizer
from ._linear_maps import check_batch
from .base import SinglePass
from .zplus import Divisor


class EpsilonNormalization(SinglePass):
    '''LRP-epsilon for normalization, whose deviation s counts as a constant.

    Layer, group and instance normalization are y_i = w_i (x_i - mean) / s + b_i, and
    R'_i = x_i (u_i - mean of u) with u_i = w_i R_i / (s (y_i + epsilon sign(y_i))), where means are those of all that
    is normalized together. Biases keep their part. Normalizations without a mean of their input pass relevance on
    unchanged: for RMS and L2, this is the same, and for batch normalization, means and biases of channels would keep
    most of it. The rule is that of Ali et al. 2022 and Achtibat et al. 2024 (AttnLRP).

    An error is raised if ``epsilon`` is neither a function of denominators (TypeError) nor a number that is not
    negative (ValueError).
    '''
    def __init__(self, epsilon=1e-6):
        super().__init__()
        self.epsilon = epsilon
        self._stabilize = as_stabilizer('epsilon', epsilon)

    def store(self, module, *inputs):
        input, = inputs
        if isinstance(module, _InstanceNorm):
            check_batch(self, module, input)
        return (input,)

    def propagate(self, module, stored, relevance):
        '''Share relevance by the parts of elements and of the mean.'''
        input, = stored
        shape = _grouped(module, input)
        if shape is None:
            return (relevance,)
        # of elements, or of channels
        affine = getattr(module, 'normalized_shape', None) or (-1, *(1,) * (input.ndim - 2))
        weight, bias = (
            None if elem is None else elem.detach().to(input).view(affine) for elem in (module.weight, module.bias)
        )
        grouped = input.reshape(shape)
        centred = grouped - grouped.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt()
        output = (centred * scale).view_as(input)
        output = output if weight is None else output * weight
        output = output if bias is None else output + bias
        share, _ = self._share(relevance, Divisor(output, self._stabilize(output), None))
        if bias is not None:
            self._keep(lambda: share * bias)
        share = (share if weight is None else share * weight).reshape(shape)
        return (input * ((share - share.mean(-1, keepdim=True)) * scale).view_as(input),)

    def _share(self, relevance, divisor):
        '''Compute R / y. As for z+, the ledger watches it.'''
        return relevance / divisor.stabilized, None

    def _keep(self, relevance):
        '''Relevance that biases keep, which is lost, as a function without arguments.'''


def _grouped(module, input):
    '''Shape of the input with all that is normalized together as the last dimension, None if it is not by its mean.'''
    if isinstance(module, torch.nn.RMSNorm) or getattr(module, 'running_mean', None) is not None:
        return None
    if getattr(module, 'normalized_shape', None) is not None:
        return *input.shape[:-len(module.normalized_shape)], -1
    if isinstance(module, _InstanceNorm):
        return *input.shape[:2], -1
    groups = getattr(module, 'num_groups', None)
    return None if groups is None else (len(input), groups, -1)
