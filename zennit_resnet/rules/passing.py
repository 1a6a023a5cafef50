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
        '''Keep the input, whose order may decide what is kept.'''
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
        return (lower + share_among_images(module, lost, kept, transpose),)


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


def share_among_images(module, lost, kept, transpose):
    '''Share relevance that a function lost evenly among the marked elements of its input of the same image.

    Rows are images or parts of these, and share for themselves, unless the network has moved the dimension of images,
    or the function moves elements to other rows. The transposed function tells to which image these belong.
    '''
    number, is_moved = getattr(module, 'images', (0, False))
    examples, is_same = getattr(module, 'examples', None), lost.shape == kept.shape
    if examples is not None or number < 2:
        return share_evenly(lost, kept, examples)
    dim = _dim_of_images(lost.shape, number, is_moved)
    if dim is None:
        raise RuntimeError(
            f'Relevance arrives at zeros of \'{module.name}\' of shape {tuple(lost.shape)}, and which of its '
            f'dimensions has the {number} images is not known: explain one image at a time.'
        )
    are_rows = is_same
    if not is_same and len(lost) == len(kept):
        rows, is_put = _owners(_places(lost, 0, len(lost)), kept, transpose)
        are_rows = not has_values(lost) or bool((rows == _places(kept, 0, len(kept))).logical_or(is_put == 0).all())
    if are_rows and dim == 0:
        return share_evenly(lost, kept)
    places = _places(lost, dim, number)
    owners, kept = (places, kept) if is_same else _owners(places, kept, transpose)
    if are_rows:
        # each row has elements of all images
        places, owners = (
            elem + number * _places(elem, 0, len(elem)) for elem in (places, owners)
        )
        number *= len(lost)
    counts = _total(kept, owners, number)
    if is_same:
        kept = kept.where(counts[owners] != 0, 1.)
        counts = _total(kept, owners, number)
    total = _total(lost, places, number)
    if has_values(lost) and bool(((counts == 0) & (total != 0)).any()):
        raise RuntimeError(
            f'Relevance arrives at zeros of an image among which \'{module.name}\' puts no elements of this image: '
            'have it put those of all images at once, or explain one image at a time.'
        )
    return (total / counts.clamp(min=1))[owners] * kept


def _dim_of_images(shape, number, is_moved):
    '''The dimension of a tensor along which its images are, or parts of these, None if that is not known.'''
    if shape and not is_moved and not shape[0] % number:
        return 0
    dims = [dim for dim, length in enumerate(shape) if length == number]
    return dims[0] if len(dims) == 1 else None


def _places(tensor, dim, number):
    '''For each element, its place among a number of equal parts of a dimension.'''
    length = tensor.shape[dim]
    places = torch.arange(length, device=tensor.device) * number // length
    return places.view(-1, *(1,) * (tensor.ndim - dim - 1)).expand(tensor.shape)


def _owners(places, kept, transpose):
    '''The places to which a function puts elements, and the marks of those which it puts anywhere.'''
    counts = transpose(torch.ones_like(places, dtype=kept.dtype))
    is_put = counts > 0
    return (transpose(places.to(kept.dtype)) / counts.where(is_put, 1.)).round().long(), kept * is_put


def _total(tensor, places, number):
    return tensor.new_zeros(number).index_add(0, places.flatten(), tensor.flatten())


class NoRule(Described, Hook):
    '''Leaves the gradient as it is, where the composite of a canonizer has to name a rule.'''
    def register(self, module):
        return RemovableHandleList([RemovableHandle(self)])
