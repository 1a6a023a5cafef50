'''Rules that pass relevance on: through element-wise functions, to the signal of a product, back from constants.'''
import torch
import torch.nn.functional as F
from zennit.core import Hook, RemovableHandle, RemovableHandleList

from .._compat import has_values
from ..arguments import Described
from ._linear_maps import with_adjoint
from .base import SinglePass


class PassThrough(SinglePass):
    '''Relevance passes element-wise activations and normalizations unchanged: R' = R.'''
    reads_layer = False

    def store(self, module, *inputs):
        '''Nothing but the layer's input is needed, and only one input can receive the relevance.'''
        if len(inputs) != 1:
            raise ValueError(f'{type(self).__name__} is for one input, {type(module).__name__} got {len(inputs)}!')
        return ()

    def propagate(self, module, stored, relevance):
        return (relevance,)


class SignalTakesAll(SinglePass):
    '''All relevance of a product follows the signal, the gate counts as a constant (Arras et al. 2017).'''
    reads_layer = False

    def propagate(self, module, stored, relevance):
        return (relevance,)


class Uncrop(SinglePass):
    '''Relevance of the elements that a padding added goes back to elements that exist, so that nothing is lost.

    Along spatial dimensions it goes to the nearest element, along the channels it is shared evenly. Elements with a
    value of zero receive relevance from dead units, from rules for the first layer that treat all inputs alike, and
    from symmetric splitting with a skip connection that is padded with channels.
    '''
    def store(self, module, *inputs):
        '''Keep the amounts, which may be others for another input.'''
        return ([(dim, *amounts) for dim, amounts in module.amounts.items()],)

    def propagate(self, module, stored, relevance):
        for dim, before, after in stored[0]:
            length = relevance.shape[dim] - max(before, 0) - max(after, 0)
            inner = relevance.narrow(dim, max(before, 0), length).clone()
            for start, amount, edge in ((0, before, 0), (relevance.shape[dim] - max(after, 0), after, length - 1)):
                if amount > 0:
                    outer = relevance.narrow(dim, start, amount).sum(dim, keepdim=True)
                    if dim >= 2:
                        inner.narrow(dim, edge, 1).add_(outer)
                    else:
                        inner.add_(outer / length)
            # negative amounts crop
            relevance = F.pad(inner, [value for num in reversed(range(inner.ndim)) for value in (
                (max(-before, 0), max(-after, 0)) if num == dim else (0, 0)
            )])
        return (relevance,)


class Refill(SinglePass):
    '''Relevance of zeros that were put in place of elements goes back evenly to the elements that were kept.

    Elements that were kept receive their own relevance, as the gradient has it. That of constants which are zero is
    shared among all elements of the same example that were kept, or among all of its elements if none was. Constants
    which are not zero keep their part, as concatenated ones do.
    '''
    def store(self, module, *inputs):
        '''Keep the input, of which the order may decide what is kept.'''
        input, = inputs
        return (input,)

    def propagate(self, module, stored, relevance):
        '''Take the gradient, and share what arrives at zeros.'''
        input, = stored
        output, transpose = with_adjoint(module.forward, input)
        lower = transpose(relevance)
        with torch.no_grad():
            zeros = module.forward(torch.zeros_like(input))
            is_constant = module.forward(torch.ones_like(input)) == zeros
        gap = relevance.where(~is_constant, 0.).double().sum() - lower.double().sum()
        if bool(gap.abs() > 1e-3 * relevance.abs().double().sum()):
            raise RuntimeError(
                f'\'{module.name}\' puts several elements in the same place, for which the gradient is not defined: '
                'have it put each in a place of its own.'
            )
        lost = relevance.where(is_constant & (zeros == 0), 0.)
        if has_values(lost) and not bool(lost.any()):
            return (lower,)
        kept = (transpose(torch.ones_like(output)) != 0).to(lower)
        return (lower + share_evenly(lost, kept, module.examples),)


class Proportional(SinglePass):
    '''Elements receive R' = R a_i / sum_k a_k by what they add to a norm, a deviation, ..., equal parts for 0.'''
    def store(self, module, *inputs):
        input, = inputs
        return (input,)

    def propagate(self, module, stored, relevance):
        amounts = module.amounts(stored[0])
        total = amounts.sum(module.dims, keepdim=True)
        shares = torch.where(total == 0, total.numel() / amounts.numel(), amounts / total)
        return (relevance.reshape(total.shape) * shares,)


def share_evenly(lost, kept, examples=None):
    '''Share relevance evenly among elements that are marked with one, of the same example if there is one for each.'''
    if examples is None and lost.ndim and kept.ndim and len(lost) == len(kept):
        examples = torch.arange(len(kept), device=kept.device)
    shape, is_one = kept.shape, examples is None
    if is_one:
        examples = torch.zeros(1, dtype=torch.long, device=kept.device)
    lost, kept = (elem.reshape(1 if is_one else len(elem), -1) for elem in (lost, kept))
    counts = kept.sum(1, keepdim=True)
    kept = torch.where(counts == 0, 1., kept)
    total = lost.new_zeros(len(kept)).index_add(0, examples, lost.sum(1))
    return (total[:, None] * kept / kept.sum(1, keepdim=True)).reshape(shape)


class NoRule(Described, Hook):
    '''Leaves the gradient as it is, where the composite of a canonizer has to name a rule.'''
    def register(self, module):
        return RemovableHandleList([RemovableHandle(self)])
