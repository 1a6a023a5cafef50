'''Rules of attention: products of two signals, and the softmax between them.'''
import functools

import torch

from ..arguments import as_stabilizer
from ._linear_maps import with_adjoint
from .base import SinglePass


class HalfEach(SinglePass):
    '''Each factor of a product over dimensions, y_jp = sum_i x_ji z_ip, receives one half of the relevance, by z+.

    R'_x,ji = x_ji / 2 sum_p R_jp [x_ji z_ip > 0] z_ip / sum_k (x_jk z_kp)+, and likewise for z, so that relevance is
    conserved. Relevance of an output without positive contributions is shared evenly.

    With ``epsilon``, a number or a function of denominators, relevance is divided by the stabilized outputs instead, as
    Achtibat et al. 2024 have it (AttnLRP): R'_x,ji = x_ji / 2 sum_p z_ip R_jp / (y_jp + epsilon sign(y_jp)). An error
    is raised if it is of another type (TypeError) or negative (ValueError).
    '''
    reads_layer = False

    def __init__(self, epsilon=None):
        super().__init__()
        self.epsilon = epsilon
        self._stabilize = None if epsilon is None else as_stabilizer('epsilon', epsilon)

    def store(self, module, *inputs):
        if len(inputs) != 2:
            raise ValueError(f'{type(self).__name__} is for products of two signals, not of {len(inputs)}!')
        return inputs

    def propagate(self, module, stored, relevance):
        '''Share relevance by the positive contributions, of two positive or two negative elements, or by all.'''
        if self._stabilize is not None:
            output, transpose = with_adjoint(module.forward, *stored)
            gradients = transpose(relevance / self._stabilize(output) / 2)
            return tuple(elem * gradient for elem, gradient in zip(stored, gradients))
        parts = functools.partial(torch.clamp, min=0), functools.partial(torch.clamp, max=0), torch.ones_like
        pairs = [tuple(map(part, stored)) for part in parts]
        (positive, negative, numbers), transposes = zip(*(with_adjoint(module.forward, *pair) for pair in pairs))
        total = positive + negative
        # as for z+, less than the rounding of others of the example is zero
        mean = total.reshape(len(total), -1).mean(1).view(-1, *(1,) * (total.ndim - 1)) if total.ndim else 0.
        dead = total <= mean * torch.finfo(total.dtype).eps
        share, rest = (relevance / total).where(~dead, 0.), (relevance / numbers).where(dead, 0.)
        lower = [
            [elem * gradient / 2 for elem, gradient in zip(pair, transpose(upper))]
            for pair, transpose, upper in zip(pairs, transposes, (share, share, rest))
        ]
        return tuple(sum(terms[1:], terms[0]) for terms in zip(*lower))


class SoftmaxTaylor(SinglePass):
    '''Logits h of a softmax s receive R'_i = h_i (R_i - s_i sum_k R_k), the rule of Achtibat et al. 2024 (AttnLRP).

    It is a Taylor expansion, whose constant keeps its part: relevance is not conserved.
    '''
    reads_layer = False

    def store(self, module, *inputs):
        return inputs

    def propagate(self, module, stored, relevance):
        '''Compute the rule. Masked elements, with a logit of minus infinity, receive nothing.'''
        logits, = stored
        share = logits.softmax(module.dim)
        lower = logits * (relevance - share * relevance.sum(module.dim, keepdim=True))
        return (lower.where(share > 0, 0.),)
