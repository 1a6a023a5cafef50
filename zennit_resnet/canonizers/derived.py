'''Constants computed from the input without a gradient, such as indices, from which relevance has no way on.'''
import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .._compat import DisableTorchFunction, base_of
from .._inplace import is_inplace
from .._nested import active_tensors, tensors_of
from . import layers, moves
from .functions import FunctionCall
from .operations import OPERATIONS

REMEDY = (
    'it arrives at what \'{}\' computed from the input without a gradient (an index, a comparison, a detached tensor), '
    'from where it has no way on. Explain outputs that have a gradient, such as scores in place of coordinates'
)
# Functions which read no more than shape and type of other arguments than the first, or return several of their own.
READ_FIRST = frozenset('expand_as view_as reshape_as type_as to'.split())
READ_NONE = frozenset('broadcast_tensors meshgrid'.split())
# Functions that put elements among constants, and with concatenations.
FILLINGS = frozenset(name for name, entry in OPERATIONS.items() if entry.run in (moves.place, moves.copy, moves.assign))
PLACING = FILLINGS | {name for name, entry in OPERATIONS.items() if entry.run is layers.concatenate}
# Fillings whose integers are places.
INDEXED = ('scatter', 'index', '_index', 'put', 'max_unpool', 'select', 'slice', 'diagonal')


class _Sources(threading.local):
    '''Names of the functions that computed constants, in the forward pass of a thread.'''
    def __init__(self):
        self.names = WeakTensorKeyDictionary()


_sources = _Sources()


def forget():
    '''Forget all constants at the end of a forward pass, as parameters and buffers among them are there in the next.'''
    _sources.names.clear()


def source_of(tensor):
    '''Name of the function that computed a constant from the input, None for other tensors.'''
    return None if tensor.requires_grad else _sources.names.get(tensor)


def note(name, args, kwargs, output):
    '''Note that an output has no gradient, although it was computed from the input.'''
    if name == '__get__' and not isinstance(output, torch.Tensor):
        # shapes and types are asked for often
        return
    with DisableTorchFunction():
        outputs = [args[0]] if name == '__setitem__' else tensors_of(output)
        outputs = [elem for elem in outputs if not elem.requires_grad]
        if not outputs or name in READ_NONE or name.endswith('_like') or name.startswith('new_'):
            return
        given = args[:1] if name in READ_FIRST else (args, kwargs)
        source = next(filter(None, map(source_of, tensors_of(given))), None)
        if source is None and active_tensors(given):
            source = 'data' if name == '__get__' else name
        # views of parameters are no other constants than these, only what is changed in place is
        in_place = name == '__setitem__' or is_inplace(name, kwargs)
        for elem in outputs if source is not None else ():
            for each in (elem, base_of(elem) if in_place else None):
                if each is not None:
                    _sources.names[each] = source


def marks_of(func, name, args, kwargs):
    '''A function of the relevance of an output that has only that of such constants, and their source, or None.'''
    with DisableTorchFunction():
        is_filling = name in FILLINGS
        values = tensors_of((args[0], args[2]) if name == '__setitem__' else (args, kwargs))
        if is_filling:
            values = [elem for elem in values if elem.is_floating_point() or not (
                elem.dtype == torch.bool or name.startswith(INDEXED)
            )]
        values = list({id(elem): elem for elem in values}.values())
        # relevance of zeros goes to other elements
        sources = [source_of(elem) for elem in values]
        sources = [source if source is not None and bool(elem.any()) else None for elem, source in zip(values, sources)]
        if not any(sources):
            return None
        marks = [
            (elem != 0 if is_filling else torch.ones_like(elem, dtype=torch.bool)) if source is not None
            else torch.zeros((), dtype=torch.bool, device=elem.device).expand(elem.shape)
            for elem, source in zip(values, sources)
        ]
        again = FunctionCall(func, name, args, kwargs, values).rebind(*values)

    def select(relevance):
        given = [mark.to(relevance.dtype, copy=True) for mark in marks]
        with torch.no_grad():
            output = again(*given)
        return relevance.where((given[0] if name == '__setitem__' else output) != 0, 0.)

    return select, next(filter(None, sources))
