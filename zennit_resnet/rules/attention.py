'''Rules of attention: products of two signals, and the softmax between them.'''
import torch

from ..arguments import as_stabilizer
from .base import SinglePass


class HalfEach(SinglePass):
    '''Each factor of a product over dimensions, y_jp = sum_i x_ji z_ip, receives one half of the relevance, by z+.

    R'_x,ji = x_ji / 2 sum_p R_jp [x_ji z_ip > 0] z_ip / sum_k (x_jk z_kp)+, and likewise for z, so that relevance is
    conserved. Relevance of an output without positive contributions is shared evenly.

    Parameters
    ----------
    epsilon: callable or float, optional
        If it is given, relevance is divided by the stabilized outputs instead, as Achtibat et al. 2024 have it
        (AttnLRP): R'_x,ji = x_ji / 2 sum_p z_ip R_jp / (y_jp + epsilon sign(y_jp)). An error is raised if it is neither
        a function of denominators (TypeError) nor a number that is not negative (ValueError).
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
            with torch.enable_grad():
                leaves = [elem.detach().requires_grad_() for elem in stored]
                output = module.forward(*leaves)
            share = relevance / self._stabilize(output.detach()) / 2
            return tuple(
                elem.detach() * grad for elem, grad in zip(leaves, torch.autograd.grad(output, leaves, share))
            )
        with torch.enable_grad():
            terms = [
                tuple(part(elem).detach().requires_grad_() for elem in stored)
                for part in (_positive, _negative, torch.ones_like)
            ]
            *contributions, numbers = (module.forward(*leaves) for leaves in terms)
            total = contributions[0] + contributions[1]
        with torch.no_grad():
            # as for z+, less than the rounding of others of the example is zero
            mean = total.reshape(len(total), -1).mean(1).view(-1, *(1,) * (total.ndim - 1)) if total.ndim else 0.
            dead = total <= mean * torch.finfo(total.dtype).eps
            share, rest = (relevance / total).where(~dead, 0.), (relevance / numbers).where(dead, 0.)
        leaves = [elem for pair in terms for elem in pair]
        gradients = torch.autograd.grad((total, numbers), leaves, (share, rest))
        parts = [elem.detach() * gradient / 2 for elem, gradient in zip(leaves, gradients)]
        return sum(parts[2::2], parts[0]), sum(parts[3::2], parts[1])


class SoftmaxTaylor(SinglePass):
    '''Logits h of a softmax s receive R'_i = h_i (R_i - s_i sum_k R_k), the rule of Achtibat et al. 2024 (AttnLRP).

    It is a Taylor expansion, of which the constant keeps its part: relevance is not conserved.
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


def _positive(tensor):
    return tensor.clamp(min=0)


def _negative(tensor):
    return tensor.clamp(max=0)
