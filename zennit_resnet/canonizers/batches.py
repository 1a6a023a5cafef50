'''Whether what a network returns for an image depends on the other images of the batch.'''
import weakref

import torch

from .._autograd import moves_first
from .._compat import DisableTorchFunction, is_out_of_memory, unrecorded, without_hooks
from .._nested import active_tensors, map_tensors, tensors_of
from .._weights import is_plain, state_of
from ..layer import LINEAR
from .functions import ALIASES, dims_of
from .operations import OPERATIONS
from .products import subscripts

PRODUCTS = frozenset('matmul __matmul__ mm linalg_matmul addmm'.split())
# Functions that may compute something from all entries of tensors, or of matrices, which may be images.
PAIRS = frozenset(form for name in '''
    cdist pdist tensordot mv inner outer ger kron vdot dot cross inverse pinverse det logdet slogdet matrix_exp
    matrix_power cholesky cholesky_inverse cholesky_solve lu lu_solve qr svd stft istft gradient conv_tbc
    multi_head_attention_forward lstm gru rnn_tanh rnn_relu addbmm cov corrcoef renorm embedding as_strided take put
    index_put _index_put_impl_ masked_scatter
'''.split() for form in (name, f'{name}_'))
PREFIXES = 'fft_', 'linalg_'
# Functions that take the shape or type of a tensor only.
SHAPES = frozenset('view_as reshape_as type_as'.split())
TRANSPOSED = frozenset('transpose permute swapaxes swapdims movedim moveaxis t adjoint'.split())
# Functions over dimensions, with the position and the default of the argument that names these.
OVER = {name: entry.reduces or entry.takes for name, entry in OPERATIONS.items() if entry.reduces or entry.takes}
WATCHED = frozenset(OVER) | PRODUCTS | PAIRS | frozenset(LINEAR) | frozenset(
    'bilinear einsum layer_norm native_layer_norm __getitem__ __setitem__ pad scaled_dot_product_attention'.split()
)

# Networks that were asked whether images depend on each other, with their state and shapes for which these do not.
ASKED = weakref.WeakKeyDictionary()


def independent_shapes(network):
    '''Shapes of arguments for which images of a network do not depend on each other, a set that grows.'''
    if network not in ASKED:
        # most networks never are, and their state takes time
        return set()
    state = state_of(network)
    if ASKED[network] is None or ASKED[network][0] != state:
        ASKED[network] = state, set()
    return ASKED[network][1]


class Images:
    '''The images of the arguments of a forward pass, and which of its functions may mix them.'''
    def __init__(self, given=()):
        self.given, self.number = given, batch_size(given)
        # modules and names of the first function over the dimension of images, and of the first that moves it
        self.mixing, self.moved, self.is_checking = None, None, False
        # whether a function moved the dimension, which others only merge with others or divide
        self.is_transposed = False

    @property
    def layout(self):
        '''How many images there are, and whether their dimension may be another than the first by now.'''
        return self.number, self.is_transposed

    def look(self, module, name, args, kwargs):
        if isinstance(module, torch.nn.MultiheadAttention) and module.batch_first and is_plain(module) and not (
            name == 'multi_head_attention_forward' and args[0].ndim == 2
        ):
            # it moves examples, but is known not to mix them, unless they are its tokens
            return
        if self.mixing is None and (
            (name in WATCHED or name.startswith(PREFIXES)) and may_mix(name, args, kwargs, self.number)
            or len(args) > 1 and name not in SHAPES and _is_broadcast(*args[:2])
        ):
            self.mixing = module, name
        if not self.is_transposed:
            changed, self.is_transposed = changes_first(name, args, self.number)
            if self.moved is None and ('roi' in name or changed):
                self.moved = module, name

    def find_mixing(self, root, output, independent):
        '''The module and function by which images depend on each other, and whether this is known, or None.'''
        given, self.given = self.given, ()
        if output is None:
            # the network has raised an error
            return None
        # regions belong to images by their numbers, which are no longer theirs
        has_regions = self.moved is not None and 'roi' in self.moved[1]
        if self.mixing is None and (self.moved is None or has_regions):
            return None
        shapes = tuple(elem.shape for elem in tensors_of(given))
        if shapes in independent:
            return None
        ASKED.setdefault(root)
        self.is_checking = True
        try:
            is_dependent = None if has_regions else depends_on_batch(root, given, output)
        finally:
            self.is_checking = False
        if is_dependent is False:
            # of further batches of this shape as well
            independent.add(shapes)
            return None
        return (*(self.mixing or self.moved), bool(is_dependent))


def may_mix(name, args, kwargs, size):
    '''Whether a function of a tensor whose first dimension is that of images may compute something from several.'''
    if name in PAIRS or name.startswith(PREFIXES) and name not in OVER and name not in PRODUCTS:
        return bool(active_tensors((args, kwargs)))
    if name == 'einsum':
        return _contracts_first(*args)
    if name in LINEAR or name == 'bilinear':
        position = 2 if name == 'bilinear' else 1
        weight = args[position] if len(args) > position else kwargs.get('weight')
        # without a batch, images are channels
        is_single = name.endswith('d') and (args[0] if args else kwargs['input']).ndim < weight.ndim
        return weight.requires_grad or is_single
    if name == 'scaled_dot_product_attention':
        return any(elem.ndim == 2 for elem in active_tensors((args, kwargs)))
    if name in PRODUCTS:
        _, *others = tensors_of((args, kwargs))
        return bool(others) and others[-1].requires_grad and others[-1].ndim <= 2
    input = args[0] if args else kwargs.get('input')
    if not isinstance(input, torch.Tensor) or not input.ndim or len(input) != size:
        return False
    if name in ('__getitem__', '__setitem__'):
        if name == '__setitem__' and not active_tensors(args[2]):
            return False
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return first is not None and first is not Ellipsis and not (isinstance(first, slice) and first == slice(None))
    if name == 'pad':
        amounts = args[1] if len(args) > 1 else kwargs['pad']
        return len(amounts) >= 2 * input.ndim and any(amounts[2 * input.ndim - 2:])
    if 'layer_norm' in name:
        shape = args[1] if len(args) > 1 else kwargs['normalized_shape']
        return isinstance(shape, (list, tuple)) and len(shape) == input.ndim
    return 0 in _dims(input, args, kwargs, *OVER[name])


def _contracts_first(equation, *operands):
    '''Whether the first dimension of an operand that carries relevance may be another than that of the output.'''
    if not isinstance(equation, str):
        return True
    inputs, output, operands = subscripts(equation, *operands)
    return any(key[:1] != output[:1] for key, elem in zip(inputs, operands) if elem.requires_grad)


def _is_broadcast(left, right):
    '''Whether tensors that carry relevance do not have the same dimensions, so that images may meet anything else.'''
    return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and (
        left.requires_grad and right.requires_grad and left.ndim != right.ndim and min(left.ndim, right.ndim) > 0
    )


def _dims(input, args, kwargs, position, default):
    '''Dimensions that are given to a function, as numbers that are not negative, none if a tensor is given.'''
    given = {ALIASES.get(key, key): elem for key, elem in kwargs.items()}
    dims = args[position] if len(args) > position else given.get('dim', given.get('dims', default))
    if isinstance(dims, torch.Tensor):
        # an element-wise maximum
        return ()
    return dims_of(input, None if isinstance(dims, str) else dims)


def changes_first(name, args, size):
    '''Whether images are no longer the first dimension of a tensor that a function is given, or after it.

    And whether that is because the dimension was moved.
    '''
    with DisableTorchFunction():
        tensors = [elem for elem in args[:2] if isinstance(elem, torch.Tensor) and elem.requires_grad]
        # attributes such as h.T are no functions with arguments
        is_changed = any(not elem.ndim or len(elem) != size for elem in tensors)
        moves = [elem.grad_fn.name() for elem in tensors if elem.grad_fn and moves_first(elem.grad_fn)]
        if any(name.startswith(('Permute', 'Transpose', 'TBackward', 'Stack')) for name in moves):
            return True, True
        is_changed = is_changed or bool(moves)
        if not tensors or name not in TRANSPOSED:
            return is_changed, False
        dims = [dim for arg in args[1:] for dim in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        if name.startswith('permute'):
            is_moved = bool(dims) and dims[0] % tensors[0].ndim != 0
        else:
            is_moved = not dims or any(isinstance(dim, int) and dim % tensors[0].ndim == 0 for dim in dims)
        return is_changed or is_moved, is_moved


def depends_on_batch(module, given, output):
    '''Whether the output for an image depends on others: is another among copies of itself. None if it cannot be run.

    Two copies are enough to find that it does not, in a part of the time. Else there are as many as there were images,
    and then hooks of modules run as well.
    '''
    size, bare = batch_size(given), without_hooks(module)
    devices = {elem.device for elem in tensors_of(given) if elem.is_cuda}
    for index in (0, size - 1):
        # the first two are the same for a batch of two
        for network, number in ((bare, 2), (bare, size), (module, size))[size == 2:]:
            args, kwargs = map_tensors(lambda elem, copies=(index,) * number: (
                elem.detach()[list(copies)] if elem.ndim and len(elem) == size else elem.detach()
            ), given)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices), unrecorded():
                    actual = tensors_of(network(*args, **kwargs))
                differs = any(_differ(elem, expected, index, size, number)
                              for elem, expected in zip(actual, tensors_of(output)))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                differs = None
            if differs is False:
                break
        if differs is not False:
            return differs
    return False


def _differ(actual, output, index, size, number):
    '''Whether the values of an image, which is at the same end of its copies, are others than before.'''
    if not output.requires_grad or not output.ndim or len(output) != size:
        return False
    if actual.shape != (number, *output.shape[1:]):
        return number != size
    actual, expected = actual[min(index, number - 1)], output.detach()[index]
    finite = expected[expected.isfinite()]
    tolerance = min(1e3 * torch.finfo(output.dtype).eps, 1e-2) * (float(finite.abs().amax()) if finite.numel() else 0.)
    # masked classes may be infinite
    same = (actual == expected) | (actual.isnan() & expected.isnan()) | ((actual - expected).abs() <= tolerance)
    return not bool(same.all())


def batch_size(given):
    '''Number of images in nested arguments, 0 if none of them carries relevance.'''
    return next((len(elem) for elem in active_tensors(given) if elem.ndim), 0)
