'''Classic rules that Zennit lacks. Numbers of equations are those of Nyiri and Gibaru, Relative LRP.'''
import math

import torch
from zennit.rules import AlphaBeta

from .._compat import as_parameter
from ..arguments import Described, as_stabilizer, check_number, check_rule
from ._linear_maps import with_adjoint
from .base import SinglePass


class SignedAlphaBeta(Described, AlphaBeta):
    '''The alpha-beta rule of Eq. (5), for alpha + beta = 1 with any signs, such as alpha = beta = 0.5.

    R'_i = sum_j (alpha (w_ij x_i)+ / sum_k (w_kj x_k)+ + beta (w_ij x_i)- / sum_k (w_kj x_k)-) R_j. Relevance is
    conserved by units that have both positive and negative contributions.

    Zennit's ``AlphaBeta(alpha, beta)`` is ``SignedAlphaBeta(alpha, -beta)``, with the same ``stabilizer`` and
    ``zero_params``.

    A ValueError is raised if alpha and beta do not sum to one, or a number is not finite, and a TypeError if an
    argument is not a number.
    '''
    def __init__(self, alpha=0.5, beta=0.5, stabilizer=1e-6, zero_params=None):
        check_number('alpha', alpha)
        check_number('beta', beta)
        if not math.isclose(alpha + beta, 1., abs_tol=1e-9):
            raise ValueError(f'alpha={alpha} and beta={beta} do not sum to one!')
        # negative and positive contributions are those of Zennit's rule
        super().__init__(1., 0., zero_params=zero_params)
        self.alpha, self.beta, self.stabilizer, self.zero_params = alpha, beta, stabilizer, zero_params
        stabilize = as_stabilizer('stabilizer', stabilizer)
        self.gradient_mapper = lambda relevance, outputs: [
            factor * relevance / stabilize(denominator)
            for factor, denominator in ((alpha, sum(outputs[:2])), (beta, sum(outputs[2:]))) for _ in range(2)
        ]
        self.reducer = lambda inputs, gradients: sum(input * gradient for input, gradient in zip(inputs, gradients))


class LinearSum(SinglePass):
    '''Apply a rule for linear layers to an addition, as a neuron whose inputs are the addends (Definition 1).

    For ``Epsilon``, this is Zennit's ``Norm``: addends h_i receive R h_i / sum_k h_k. A TypeError is raised if the rule
    is not a hook.
    '''
    def __init__(self, rule):
        check_rule('rule', rule)
        super().__init__()
        self.rule = rule

    def store(self, module, *inputs):
        addends = torch.stack(torch.broadcast_tensors(*inputs), -1)
        factors = module.factors or (1,) * len(inputs)
        return addends, torch.tensor([factors], dtype=torch.float64).to(addends.device, non_blocking=True)

    def propagate(self, module, stored, relevance):
        '''Let the rule propagate through a linear layer without bias, whose weights are the factors.'''
        addends, weight = stored
        layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight = as_parameter(weight)
        handles = self.rule.copy().register(layer)
        lower = with_adjoint(layer, addends)[1](relevance[..., None])
        handles.remove()
        return lower.unbind(-1)


class Duplicate(SinglePass):
    '''All addends receive all of the relevance, as the gradient would have it. It is doubled by each residual block.'''
    def store(self, module, *inputs):
        return (torch.tensor(len(inputs)),)

    def propagate(self, module, stored, relevance):
        return (relevance,) * int(stored[0])
