'''Relevance splitting at additions, Eqs. (4) to (7) of Otsuki et al. 2024.'''
import torch

from .._autograd import depends_on
from ..arguments import as_stabilizer, check_rule
from ._linear_maps import by_example
from .base import SinglePass


class Split(SinglePass):
    '''Base class of rules that split relevance at an addition into parts with this sum, element by element, Eq. (4).'''
    reads_layer = False

    def shares(self, *addends):
        '''Shares of all addends but the last, which receives what they leave: numbers or tensors to be broadcast.'''
        raise NotImplementedError()

    def split(self, relevance, *addends):
        '''Split relevance of the sum, of the addends' common shape, into parts of this shape for each addend.'''
        return self._divide(relevance, self.shares(*addends))

    @staticmethod
    def _divide(relevance, shares):
        parts, rest = [], relevance
        for share in shares:
            parts.append(relevance * share)
            rest = rest - parts[-1]
        return (*parts, rest)

    def store(self, module, *inputs):
        '''Compute the shares, as an in-place addition overwrites its first addend.'''
        # modules of users have none
        factors = getattr(module, 'factors', None) or (1,) * len(inputs)
        inputs = [elem if factor == 1 else elem * factor for elem, factor in zip(inputs, factors)]
        return tuple(torch.as_tensor(share, dtype=None if isinstance(share, torch.Tensor) else torch.float64)
                     for share in self.shares(*inputs))

    def propagate(self, module, stored, relevance):
        return self._divide(relevance, stored)


class RatioSplit(Split):
    '''Ratio-based splitting, Eqs. (6) and (7): h_i receives ``R |h_i| / sum_k |h_k|``, equal parts if all are zero.'''
    def shares(self, *addends):
        addends = [elem if elem.dtype == torch.float64 else elem.float() for elem in addends]
        return [by_example(self._share, addends[num], *addends[:num], *addends[num + 1:])
                for num in range(len(addends) - 1)]

    @staticmethod
    def _share(*addends):
        share, total, *others = (elem.abs() for elem in torch.broadcast_tensors(*addends))
        for elem in (*others, share):
            total.add_(elem)
        return share.div_(total).nan_to_num_(1 / len(addends))


class SymmetricSplit(Split):
    '''Symmetric relevance splitting, Eq. (5): each of n addends receives R / n.'''
    def shares(self, *addends):
        return [1 / len(addends)] * (len(addends) - 1)

    @staticmethod
    def _divide(relevance, shares):
        if len(shares) > 1:
            return Split._divide(relevance, shares)
        # both halves are the same
        return (relevance * shares[0],) * 2


class EpsilonSplit(Split):
    '''LRP-epsilon at additions: each addend h_i receives ``R h_i / (z + epsilon sign(z))`` with the sum z, and the last
    one what the others leave.

    Parts may be larger than R, and of both signs. An error is raised if ``epsilon`` is neither a function of
    denominators (TypeError) nor a number that is not negative (ValueError).
    '''
    def __init__(self, epsilon=1e-6):
        super().__init__()
        self.epsilon = epsilon
        self._stabilize = as_stabilizer('epsilon', epsilon)

    def shares(self, *addends):
        addends = torch.broadcast_tensors(*(elem if elem.dtype == torch.float64 else elem.float() for elem in addends))
        total = self._stabilize(sum(addends[1:], addends[0]))
        return [elem / total for elem in addends[:-1]]


class ResidualOnly(Split):
    '''Identity skip connections receive no relevance (ablation, rows (i) and (iii) of Table 2).

    An addend is an identity skip connection if another addend was computed from it. Additions without one, such as the
    end of a block whose skip connection is a projection, and several residual branches are left to another ``rule``,
    :py:class:`RatioSplit` by default. A TypeError is raised if it is no :py:obj:`Split`.
    '''
    def __init__(self, rule=None):
        super().__init__()
        self.rule = RatioSplit() if rule is None else rule
        check_rule('rule', self.rule, Split)

    def shares(self, *addends):
        identity = [any(depends_on(other, elem) for other in addends if other is not elem) for elem in addends]
        branches = [elem for elem, is_identity in zip(addends, identity) if not is_identity]
        if len(branches) in (0, len(addends)):
            return self.rule.shares(*addends)
        parts = self.rule.shares(*branches)
        parts.append(1 - sum(parts))
        parts = iter(parts)
        return [0. if is_identity else next(parts) for is_identity in identity][:-1]
