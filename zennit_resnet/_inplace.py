'''Tensors that a network changes in place while rules need them as they were, or run on a copy of them.'''
import threading
import weakref
from contextlib import nullcontext
from numbers import Number

import torch
from torch.overrides import TorchFunctionMode

from ._autograd import name_of
from ._compat import (
    DisableTorchFunction,
    base_of,
    function_modes,
    is_fake,
    is_view,
    keep_version,
    pop_mode,
    push_mode,
    version_of,
)
from ._nested import map_tensors, tensors_of

# Functions after which each entry is the same as before, or has a gradient of zero (but may have relevance).
CLIPPING = frozenset('relu relu_ relu6 hardtanh hardtanh_ clamp_ clip_ clamp_min_ clamp_max_ threshold_'.split())
# Names of the functions that operators of Python become.
OPERATORS = frozenset('''
    add radd iadd sub rsub isub mul rmul imul div rdiv idiv truediv rtruediv itruediv true_divide pow rpow ipow matmul
    rmatmul imatmul mod rmod imod remainder floordiv rfloordiv ifloordiv floor_divide
'''.split())


class _State(threading.local):
    '''Tensors of a thread, by the addresses of their memory.'''
    def __init__(self):
        # what rules keep in this memory, as long as they do
        self.kept = {}
        # tensors which the network believes to be changed in place, with the tensors that took their place
        self.replaced = {}
        # what sees all functions at the moment
        self.watches = set()


_STATE = _State()


class Kept:
    '''Values of a tensor as they are now, for the backward pass, copied only if and when the network changes them.

    Where relevance follows the gradient, clipping by an in-place ReLU that is the first to use them leaves what it
    depends on: entries without gradient receive none.
    '''
    def __init__(self, tensor):
        self.tensor = tensor.detach()
        self._version = version_of(self.tensor)
        self.is_used = False
        if is_watched():
            self._follow(tensor)
        else:
            self.copy()

    def _follow(self, tensor):
        self.address = address_of(tensor)
        _STATE.kept.setdefault(self.address, weakref.WeakSet()).add(self)

    @property
    def is_changed(self):
        '''Whether the network has changed the tensor in a way which nobody noted.'''
        return version_of(self.tensor) != self._version

    def copy(self):
        '''Copy the values, which are about to change.'''
        self.tensor = self.tensor.clone()
        self._version, self.address = version_of(self.tensor), None

    def accept(self):
        '''Take the values as they are now.'''
        self._version = version_of(self.tensor)

    def clear(self):
        '''Forget the values, which are not needed.'''
        self.tensor = self.tensor.new_empty(0)
        self.accept()
        self.address = None

    @property
    def values(self):
        if self.is_changed:
            raise RuntimeError(
                f'A tensor of shape {tuple(self.tensor.shape)} which a rule needs was changed in place by an operation '
                'that cannot be followed, such as a scripted function: use one that is not in place.'
            )
        return self.tensor


class KeptWeight(Kept):
    '''A weight as it is now. If the network changes it, ``note`` gets a copy. That others do is only noticed.'''
    def __init__(self, tensor, note=None):
        # an alias, which assigning other ``data`` to the weight does not change
        self.tensor, self._note = tensor.detach(), note
        self._version = version_of(self.tensor)
        self.is_used, self.is_copied = True, False
        if is_followed():
            self._follow(tensor)

    def copy(self):
        super().copy()
        self.is_copied = True
        if self._note is not None:
            self._note(self.tensor)


class _Follow(torch.autograd.Function):
    '''Have a tensor become another, as if it had been changed in place.'''
    @staticmethod
    def forward(ctx, tensor, current):
        '''Copy what is not in the same memory.'''
        ctx.is_view = is_view(tensor)
        if tensor.data_ptr() != current.data_ptr():
            tensor.copy_(current)
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, relevance):
        # with None, PyTorch would also drop that of what the view is a part of
        return torch.zeros_like(relevance) if ctx.is_view else None, relevance


def is_watched():
    return any(isinstance(mode, Watch) for mode in function_modes())


class Watch(TorchFunctionMode):
    '''Has a canonizer see all functions on tensors, and takes care of those that change a tensor.'''
    def __init__(self, canonizer):
        super().__init__()
        self.canonizer = canonizer

    def enter(self):
        '''Begin, unless an interrupt has skipped the end.'''
        _STATE.watches.add(self)
        if self not in function_modes():
            push_mode(self)

    def leave(self):
        '''End, wherever it is among other modes.'''
        _STATE.watches.discard(self)
        others = []
        while self in function_modes():
            others.append(pop_mode())
        for mode in reversed(others[:-1]):
            push_mode(mode)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        name = name_of(func)
        if name in ('__get__', '__set__'):
            return self.canonizer.follow(func, name, args, kwargs)
        settle((args, kwargs))
        target = kwargs.get('out')
        target = changed_by(name, args, kwargs) if target is None else target
        if isinstance(target, torch.Tensor):
            target, args, kwargs = with_view(target, (target, args, kwargs))
        else:
            target = None
        # before what it changes is copied for those that keep it
        self.canonizer.look(func, name, args, kwargs)
        is_gradient, clipped = self.canonizer.is_gradient, ()
        if _STATE.kept and (target is not None or is_gradient or name.startswith('_foreach')):
            clipped = _use(target, name, args, kwargs, is_gradient and name in CLIPPING)
        try:
            output = self.canonizer.follow(func, name, args, kwargs)
        except TypeError as error:
            if name.strip('_') in OPERATORS and all(isinstance(elem, (torch.Tensor, Number)) for elem in args):
                # Python would call the operands unsupported, whatever is wrong
                raise RuntimeError(f'{name}: {error}') from error
            raise
        for kept in clipped:
            kept.accept()
        if target is not None:
            note_copy(target, output)
        return output


def note_copy(tensor, output):
    '''Note the output of what changes a tensor in place, but may have run on a copy, as hooks of Zennit make one.'''
    with DisableTorchFunction():
        if (
            all(isinstance(elem, torch.Tensor) and elem.requires_grad for elem in (tensor, output))
            and tensor.shape == output.shape and address_of(tensor) != address_of(output)
        ):
            replace(tensor, output)


def replace(tensor, current):
    '''Note that a tensor becomes another as soon as it is used.'''
    # a view may be the only reference to a part of another tensor
    reference = (lambda: tensor) if is_view(tensor) else weakref.ref(tensor)
    _STATE.replaced.setdefault(address_of(tensor), []).append((reference, current))


def note_view(output, view):
    '''Note that the output of a rule is in the memory of an input, with a function that makes a view of that.'''
    output._view = view


def with_view(tensor, value):
    '''Replace a tensor that is about to change, if it is such an output, by a view: what has it changes, too.'''
    if hasattr(base_of(tensor), '_view'):
        raise RuntimeError(
            f'A view of shape {tuple(tensor.shape)} of a slice with a step (x[:, :, ::2]) is changed in place, by '
            'which that changes, too, and the tensor it was taken from: change the slice itself, or a copy.'
        )
    view = getattr(tensor, '_view', None)
    if view is None:
        return value
    with DisableTorchFunction():
        del tensor._view
        current = view()
        replace(tensor, current)
    return map_tensors(lambda elem: current if elem is tensor else elem, value)


def settle(value):
    '''Have tensors, which are used now, become what took their place.'''
    if not _STATE.replaced:
        return
    with DisableTorchFunction():
        for tensor in tensors_of(value):
            for reference, current in _STATE.replaced.pop(address_of(tensor), ()):
                original = reference()
                if original is not None and original is not current:
                    settle(current)
                    is_copied = original.data_ptr() != current.data_ptr()
                    if is_copied:
                        _use(original, '', (original,))
                    # other views of the same tensor only find out by its version that its history is another
                    with nullcontext() if is_copied and is_view(original) else keep_version(original):
                        _Follow.apply(original, current)


def forget():
    '''Forget what was noted, after a forward pass.'''
    _STATE.replaced.clear()
    for address in [address for address, kept in _STATE.kept.items() if not kept]:
        del _STATE.kept[address]


def is_followed():
    '''Whether a canonizer follows the network, also from within a function that it sees at the moment.'''
    return bool(_STATE.watches)


def _use(target, name, args, kwargs=None, is_clipping=False):
    '''Note that tensors are used, and copy what is kept of those that change, unless they are only clipped.'''
    changed = tensors_of(args[:1] if name.startswith('_foreach') else target)
    addresses, clipped = set(map(address_of, changed)), []
    for tensor in tensors_of((args, kwargs)):
        key = address_of(tensor)
        for kept in tuple(_STATE.kept.get(key, ())):
            if kept.address == key:
                if key not in addresses:
                    kept.is_used = True
                elif is_clipping and not kept.is_used and not kept.is_changed:
                    clipped.append(kept)
                elif not kept.is_changed:
                    kept.copy()
    return clipped


def is_inplace(name, kwargs):
    '''Whether a function changes its first argument. PyTorch gives ``inplace`` by name, whatever the caller does.'''
    return bool(kwargs.get('inplace')) or name.startswith('__i') or name.endswith('_') and not name.endswith('__')


def changed_by(name, args, kwargs):
    '''What a function changes in place, None if it changes nothing.'''
    if name != '__setitem__' and not is_inplace(name, kwargs):
        return None
    return args[0] if args else kwargs.get('input')


def address_of(tensor):
    '''Address of the memory of a tensor, which all of its views have in common.'''
    try:
        storage = tensor.untyped_storage()
        # tensors without values have no address
        return storage._cdata if is_fake(tensor) else storage.data_ptr() or storage._cdata
    except RuntimeError:
        # within torch.vmap, and nested ones, tensors have no storage of their own
        return id(tensor)
