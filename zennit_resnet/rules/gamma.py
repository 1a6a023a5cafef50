'''LRP-gamma and LRP-epsilon for inputs and outputs of any sign, in a single pass.'''
from typing import NamedTuple

import torch
from zennit.types import Convolution, MaxPool

from ..arguments import as_stabilizer, check_number, signs
from ..layer import NonNegativeMap, Signed, Subsampling
from . import _linear_maps as maps
from .zplus import Divisor, Output, ZPlus, is_fully_connected, is_plain_convolution


class _Prepared(NamedTuple):
    '''What is the same for any relevance: both transposed linear maps, the sign of the output, and the denominator.'''
    input: torch.Tensor
    gamma: float
    transpose: object
    transpose_magnitudes: object
    sign: torch.Tensor
    divisor: Divisor
    constants: torch.Tensor


class GeneralizedGamma(ZPlus):
    '''Generalized LRP-gamma rule, which enlarges the contributions that have the sign of the output.

    With contributions c_ji = w_ji h_i and outputs y_j = sum_i c_ji + b_j,
    R'_i = sum_j (c_ji + gamma c^s_ji) R_j / (y_j + gamma (sum_k c^s_jk + b^s_j)), where c^s and b^s are the positive
    parts for y_j > 0 and the negative parts for y_j < 0. It is that of Zennit's ``Gamma`` and, for gamma = 0,
    LRP-epsilon. As c^s = (c + sign(y) abs(c)) / 2, it takes one linear map with w and two with abs(w), beside that of
    the layer itself.

    As with ``ZPlus(projection='spread', coverage='even')``, which leaves no lattices, a convolution whose stride
    exceeds its kernel counts as one of averages over its stride, and relevance is smoothed below an overlapping max
    pooling. Indexing with a step has the rule of ``ZPlus``.

    Poolings, attention and other maps without weights of both signs have gamma = 0, and so does the last linear layer
    or convolution, so that maps of several classes add up. Max poolings give all to the maximum. Start from logits.

    Parameters
    ----------
    gamma: float, optional
        How much these contributions are enlarged, 0.25 by default.
    epsilon: callable or float, optional
        What is added to denominators with their sign.
    first_layer, low, high: optional
        ``'gamma'`` (default) as for the others, or another rule for layers that no convolution or linear layer
        precedes: ``'zplus'``, ``'zbox'``, ``'wsquare'`` or ``'flat'``, see :py:class:`~zennit_resnet.rules.ZPlus`.

    A ValueError is raised if an argument is not one of its choices, or a number is negative or not finite, and a
    TypeError if an argument is of another type.
    '''
    first_layers = 'gamma', 'zplus', 'zbox', 'wsquare', 'flat'

    def __init__(self, gamma=0.25, epsilon=1e-6, first_layer='gamma', low=None, high=None):
        check_number('gamma', gamma, 0)
        super().__init__(first_layer=first_layer, low=low, high=high, coverage='even', classifier='epsilon')
        self.gamma, self.epsilon = gamma, epsilon
        self._stabilize = as_stabilizer('epsilon', epsilon)

    def complete(self, module, stored, output):
        '''Keep the output of a layer that is its linear map and its bias, which spares this map.'''
        is_linear = is_fully_connected(module) or is_plain_convolution(module) and not maps.is_sparse(module)
        # rules of first layers level filters, which have another output
        if not is_linear or stored[1] and self.first_layer != 'gamma':
            return stored
        return (*stored[:-1], Output.of(module, output))

    def prepare(self, module, stored, shape):
        input, first, *rest = stored
        first = first and self.first_layer != 'gamma'
        if isinstance(module, (MaxPool, Subsampling)) or first:
            return super().prepare(module, (input, first, *rest), shape)
        is_last = 'is_last' in vars(module)
        has_signs = isinstance(module, (Convolution, torch.nn.Linear, Signed))
        gamma = self.gamma if has_signs and not (is_last or isinstance(module, NonNegativeMap)) else 0
        kept, weight, transpose_magnitudes = stored[-1], self._part(module, input), None
        if kept is not None and not is_last and kept.is_of(module, input):
            divisor, transpose = kept.values, self._transposed(module, input, weight)
            constants = self._bias(module, divisor)
        else:
            output, transpose = self._map(module, input, weight, shape[2:])
            constants = (self._constants if is_last else self._bias)(module, output)
            divisor = output if constants is None else output + constants
        sign = signs(divisor)
        if gamma:
            magnitudes = self._part(module, input, torch.abs)
            total, transpose_magnitudes = self._map(module, input.abs(), magnitudes, shape[2:])
            if constants is not None:
                total = total + constants.abs()
            divisor = (divisor * (1 + gamma / 2)).addcmul_(sign, total, value=gamma / 2)
        divisor = Divisor(divisor, self._stabilize(divisor), None)
        return _Prepared(input, gamma, transpose, transpose_magnitudes, sign, divisor, constants)

    def propagate(self, module, stored, relevance):
        if not isinstance(stored, _Prepared):
            return super().propagate(module, stored, relevance)
        input, gamma = stored.input, stored.gamma
        share, _ = self._share(relevance, stored.divisor)
        if stored.constants is not None:
            self._keep(lambda: share * (
                (1 + gamma / 2) * stored.constants + gamma / 2 * stored.sign * stored.constants.abs()
            ))
        lower = input * stored.transpose(share)
        if gamma:
            magnitudes = stored.transpose_magnitudes(stored.sign * share)
            lower.mul_(1 + gamma / 2).addcmul_(input.abs(), magnitudes, value=gamma / 2)
        return (lower,)
