'''Whether what a network returns for an image depends on the other images of the batch.'''
import torch

from .._autograd import active_tensors, map_tensors, moved_before, tensors_of
from .functions import ALIASES
from .operations import OPERATIONS

# Functions over all dimensions but the first, which only matter if that has no examples.
NORMALIZATIONS = frozenset('instance_norm layer_norm group_norm native_layer_norm native_group_norm'.split())
PRODUCTS = frozenset('matmul __matmul__ mm linalg_matmul einsum addmm'.split())
REDUCTIONS = {name: entry.reduces for name, entry in OPERATIONS.items() if entry.reduces}
MOVES = {name: entry.takes for name, entry in OPERATIONS.items() if entry.takes}
# Softmaxes of attention are over the last dimension of what heads have moved.
SOFTMAXES = frozenset('softmax log_softmax special_softmax special_log_softmax'.split())
WATCHED = frozenset(REDUCTIONS) | frozenset(MOVES) | NORMALIZATIONS | PRODUCTS | {'__getitem__'}


def may_mix(name, args, kwargs, size):
    '''Whether a function may compute something from several images.'''
    if name == 'einsum':
        return _contracts_first(args)
    if name in PRODUCTS:
        tensors = tensors_of((args, kwargs))[-2:]
        return len(tensors) == 2 and (
            tensors[1].requires_grad and tensors[1].ndim <= 2 or any(map(moved_before, active_tensors(tensors)))
        )
    input = args[0] if args else kwargs.get('input')
    if not isinstance(input, torch.Tensor) or not input.ndim:
        return False
    if name == '__getitem__' or name in MOVES:
        return len(input) == size and (_indexes_first(args[1]) if name == '__getitem__' else 0 in _dims(
            input, args, kwargs, *MOVES[name]
        ))
    if hasattr(input, '_stacked'):
        return any(map(moved_before, input._stacked[0]))
    if name in NORMALIZATIONS:
        return moved_before(input)
    dims = _dims(input, args, kwargs, *REDUCTIONS[name])
    return 0 in dims or bool(dims) and name not in SOFTMAXES and moved_before(input)


def _dims(input, args, kwargs, position, default):
    '''Dimensions that are given to a function, as numbers that are not negative, none if a tensor is given.'''
    given = {ALIASES.get(key, key): elem for key, elem in kwargs.items()}
    dims = args[position] if len(args) > position else given.get('dim', given.get('dims', default))
    if isinstance(dims, torch.Tensor):
        # an element-wise maximum
        return ()
    if dims is None or isinstance(dims, (bool, str)) or dims in ((), []):
        return range(input.ndim)
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    return [dim % input.ndim for dim in dims]


def _indexes_first(index):
    '''Whether an index takes some elements of the first dimension.'''
    first = index[0] if isinstance(index, tuple) and index else index
    return first is not None and first is not Ellipsis and first != slice(None) if not isinstance(
        first, torch.Tensor
    ) else True


def _contracts_first(args):
    '''Whether a sum of products is over the first dimension of a tensor.'''
    if not isinstance(args[0], str):
        return True
    inputs, arrow, output = args[0].replace(' ', '').partition('->')
    return not arrow or any(elem[:1] not in output for elem in inputs.split(','))


def depends_on_batch(module, given, output):
    '''Whether the output of a network for an image depends on other images: whether it is the same for half a batch.'''
    size = batch_size(given)
    for part in (slice(0, size // 2), slice(size // 2, size)):
        args, kwargs = map_tensors(lambda elem, part=part: (
            elem.detach()[part] if elem.ndim and len(elem) == size else elem.detach()
        ), given)
        try:
            with torch.no_grad():
                actual = tensors_of(module(*args, **kwargs))
        except Exception:  # pylint: disable=broad-exception-caught
            return False
        if any(_differ(values, elem, part, size) for values, elem in zip(actual, tensors_of(output))):
            return True
    return False


def _differ(actual, output, part, size):
    '''Whether values for a part of a batch are others than those for all of it.'''
    if not output.requires_grad or not output.ndim or len(output) % size:
        return False
    expected = output.detach().reshape(size, -1)[part]
    if expected.numel() != actual.numel():
        return False
    tolerance = min(1e3 * torch.finfo(output.dtype).eps, 1e-2) * float(expected.abs().amax()) if expected.numel() else 0
    # NaN differs
    return not bool(((actual.reshape(expected.shape) - expected).abs() <= tolerance).all())


def batch_size(given):
    '''Number of images in nested arguments, 0 if none of them carries relevance.'''
    return next((len(elem) for elem in active_tensors(given) if elem.ndim), 0)
