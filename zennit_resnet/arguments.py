'''Checks of arguments, one for each kind, and how objects show the arguments that they were created with.'''
import functools
import inspect
import math
import re
from contextlib import contextmanager
from numbers import Real

import numpy as np
import torch
from zennit.canonizers import Canonizer
from zennit.core import Hook, Stabilizer

from ._nested import map_tensors


def check_number(name, value, minimum=-math.inf, maximum=math.inf, finite=True):
    '''Raise an error which names an argument and its value, unless it is a number within a range.'''
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name}={value!r} is not a number!')
    if math.isnan(value) or finite and math.isinf(value):
        raise ValueError(f'{name}={value!r} is not {"finite" if finite else "a number"}!')
    if not minimum <= value <= maximum:
        bounds = [f'{sign} {bound:g}' for sign, bound in (('>=', minimum), ('<=', maximum)) if math.isfinite(bound)]
        raise ValueError(f'{name}={value!r} is out of range: choose a number {" and ".join(bounds)}!')


def as_integer(name, value, minimum):
    '''An integer, which may be one of NumPy's or a float, or an error which names an argument and its value.'''
    check_number(name, value, minimum)
    if int(value) != value:
        raise ValueError(f'{name}={value!r} is not an integer!')
    return int(value)


def check_choice(name, value, choices):
    '''Raise a ValueError which names the argument, its value and the choices, if the value is not among them.'''
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(map(repr, choices))}!')


def check_flag(name, value):
    '''Raise a TypeError which names an argument and its value, unless it is True or False.'''
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f'{name}={value!r} is neither True nor False!')


def check_stabilizer(name, value):
    '''Get a stabilizer, which must be a finite number that is not negative, or a function of denominators.'''
    if callable(value) and not isinstance(value, type):
        if isinstance(value, Stabilizer):
            check_number(f'{name}.epsilon', value.epsilon, 0)
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name}={value!r} is neither a number nor a function of denominators!')
    check_number(name, value, 0)
    return float(value)


def as_stabilizer(name, value):
    '''Get a stabilizer as a function of denominators: a number is added to them with their sign.'''
    value = check_stabilizer(name, value)
    return value if callable(value) else functools.partial(_stabilize, value)


def _stabilize(epsilon, denominator):
    return torch.add(denominator, signs(denominator), alpha=epsilon)


def signs(tensor):
    '''Signs of a tensor, positive for zeros. Several times as fast as a choice between numbers.'''
    return tensor.sign().add_(0.5).sign_()


def check_rule(name, value, kind=Hook):
    '''Raise a TypeError unless an argument is an instance of a rule.'''
    if not isinstance(value, kind):
        remedy = f', such as {value.__name__}()' if isinstance(value, type) else ''
        raise TypeError(f'{name}={value!r} is not an instance of a {kind.__name__.lower()}: give one{remedy}!')


def check_module(value):
    '''Raise a TypeError unless rules can be attached to a model, which must be a module.'''
    if not isinstance(value, torch.nn.Module):
        raise TypeError(
            f'Rules are attached to modules, so the model must be a torch.nn.Module, but it is {value!r}: put '
            'functions into the forward of one.'
        )


@contextmanager
def check_precision(model, *inputs):
    '''Explain errors of a forward pass whose inputs are of another precision than the model.'''
    try:
        yield
    except RuntimeError as error:
        types = {param.dtype for param in model.parameters() if param.is_floating_point()}
        other = next((elem.dtype for elem in inputs if elem.is_floating_point() and elem.dtype not in types), None)
        if len(types) == 1 and other is not None and re.search('dtype|scalar type|should be the same', str(error)):
            raise TypeError(
                f'The input is of {other}, but the parameters of the model are of {types.copy().pop()}: convert one of '
                f'them, for instance with input.to({types.pop()}).'
            ) from error
        raise


def check_layer_map(layer_map):
    layer_map = _as_list('layer_map', layer_map, 'pairs (type, hook)')
    for num, entry in enumerate(layer_map):
        if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not _are_types(entry[0]):
            raise TypeError(
                f'layer_map[{num}]={entry!r} is not a pair (type, hook), or (tuple of types, hook), with types of '
                'modules such as torch.nn.Conv2d! Rules by the name of modules are for '
                'zennit.composites.NameMapComposite.'
            )
        if entry[1] is not None:
            check_rule(f'layer_map[{num}][1]', entry[1])
    return layer_map


def _are_types(value):
    '''Whether a value can be asked for by isinstance: a type, or tuples of types.'''
    return all(map(_are_types, value)) if isinstance(value, tuple) else isinstance(value, type)


def check_canonizers(canonizers):
    '''Get canonizers as a list, or raise a TypeError which names what is not an instance of one.'''
    canonizers = _as_list('canonizers', canonizers, 'canonizers')
    for num, canonizer in enumerate(canonizers):
        check_rule(f'canonizers[{num}]', canonizer, Canonizer)
    return canonizers


def _as_list(name, value, kind):
    '''Get an argument as a list, which is empty for None.'''
    if isinstance(value, (str, dict)) or value is not None and not hasattr(value, '__iter__'):
        raise TypeError(f'{name}={value!r} is not a list of {kind}!')
    return list(value or [])


# Share of the range by which inputs may be outside, a quarter of the step of 8-bit images
MARGIN = 1e-3


def as_bound(name, value):
    '''Get the bound of an input as a tensor.'''
    if not isinstance(value, torch.Tensor):
        try:
            # python's numbers in the precision of python
            dtype = type(value) if isinstance(value, (bool, str)) else getattr(value, 'dtype', np.float64)
            value = as_map(name, np.asarray(value, dtype))
        except (TypeError, ValueError) as error:
            raise TypeError(f'{name}={value!r} is not made of numbers!') from error
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f'{name} must be made of real numbers, but is of {value.dtype}!')
    if not value.numel() or not bool(value.isfinite().all()):
        raise ValueError(f'{name}={value.tolist()} is empty or not finite!')
    return value.detach()


def check_bounds(low, high):
    '''Raise a ValueError if the lowest input is above the highest anywhere, as far as it is known without the input.'''
    if low.ndim and high.ndim and 1 in (low.ndim, high.ndim) and low.ndim != high.ndim:
        # channels, and what is broadcast: see spread_bound
        return
    try:
        low, high = torch.broadcast_tensors(low.cpu().double(), high.cpu().double())
    except RuntimeError:
        raise ValueError(
            f'low of shape {tuple(low.shape)} and high of shape {tuple(high.shape)} cannot be broadcast!'
        ) from None
    wrong = low > high
    if bool(wrong.any()):
        raise ValueError(
            f'low={float(low[wrong][0]):g} is above high={float(high[wrong][0]):g}: exchange them, low is the lowest '
            'possible input and high the highest!'
        )


def spread_bound(name, value, input, dim):
    bound = value.to(input)
    if bound.ndim == 1 and len(bound) > 1:
        bound = bound.view(-1, *(1,) * ((-1 - dim) % input.ndim))
    fits = bound.ndim <= input.ndim and all(
        size in (1, expected) for size, expected in zip(reversed(bound.shape), reversed(input.shape))
    )
    if not fits:
        raise ValueError(
            f'{name} of shape {tuple(value.shape)} does not fit the input of shape {tuple(input.shape)}: give a '
            f'number, one for each of {input.shape[dim]} channels, or a tensor that can be broadcast.'
        )
    return bound


def check_inside(input, low, high, dtypes=()):
    '''Raise a ValueError which says by how much, if an input is outside of its bounds.'''
    check_bounds(low, high)
    digits = max(torch.finfo(dtype).eps for dtype in (input.dtype, *dtypes) if dtype.is_floating_point)
    largest = torch.maximum(low.abs().amax(), high.abs().amax())
    margin = torch.maximum(MARGIN * (high - low), 4 * digits * largest)
    for bound, excess, side in ((low, low - input, 'below low'), (high, input - high, 'above high')):
        # what is NaN stays NaN, which everyone can see
        wrong = excess > margin
        if bool(wrong.any()):
            index = excess.where(wrong, -math.inf).argmax()
            amount, limit = (float(elem.expand_as(excess).flatten()[index]) for elem in (excess, bound))
            raise ValueError(
                f'The input of the first layer is {amount:g} {side}={limit:g}. For first_layer=\'zbox\', low and high '
                'must be the lowest and highest possible input: for an input normalized with mean and std, '
                'low=(0 - mean) / std and high=(1 - mean) / std.'
            )


def takes_maps(*names, single=True):
    '''Have a function of batches of tensors also take arrays, and single maps of ``dims`` axes, and return these.'''
    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            given = [bound.arguments[name] for name in names]
            maps = [as_map(*elem) for elem in zip(names, given)]
            dims = bound.arguments.get('dims', 2)
            is_single = single and all(elem.ndim == dims for elem in maps)
            bound.arguments.update(
                (name, elem[None] if single and elem.ndim == dims else elem) for name, elem in zip(names, maps)
            )
            result = function(*bound.args, **bound.kwargs)
            # of the kind of the arguments, also in named tuples and dicts
            result = map_tensors(lambda tensor: tensor[0], result) if is_single else result
            is_array = any(isinstance(elem, np.ndarray) for elem in given)
            return map_tensors(torch.Tensor.numpy, result) if is_array else result

        return wrapper

    return decorate


def map_shape(dims, *before):
    '''Text for the shape of maps with one to three dimensions, or raise a ValueError for another number of them.'''
    check_choice('dims', dims, (1, 2, 3))
    axes = (('length',), ('height', 'width'), ('depth', 'height', 'width'))[dims - 1]
    return f'({", ".join((*before, *axes))})'


def as_map(name, value):
    '''Get a tensor of a tensor or a NumPy array, which is copied, or raise a TypeError which names the argument.'''
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f'{name} must be a tensor or a NumPy array, but is {type(value).__name__}!')
    try:
        # of the byte order of this machine, and without negative strides
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder('='), order='C'))
    except TypeError as error:
        raise TypeError(f'{name} must be an array of numbers, but is of type {value.dtype}!') from error


def show(value):
    if isinstance(value, torch.Tensor):
        text = repr(value.tolist()) if value.numel() <= 8 else f'tensor of shape {tuple(value.shape)}'
    elif isinstance(value, Stabilizer):
        text = repr(value.epsilon) if not (value.clip or value.norm_scale) else describe(value)
    elif isinstance(value, torch.nn.Module):
        text = type(value).__name__
    elif isinstance(value, (list, tuple)):
        text = ', '.join(map(show, value))
        text = f'[{text}]' if isinstance(value, list) else f'({text}{"," * (len(value) == 1)})'
    elif isinstance(value, type) or inspect.isroutine(value):
        text = value.__name__
    elif type(value).__repr__ is object.__repr__:
        # rules and composites of Zennit do not show theirs
        text = f'{type(value).__name__}(...)'
    else:
        text = repr(value)
    return ' '.join(text.split())


def describe(instance, names=None, given=()):
    '''Text which shows an object as the call that creates it.'''
    if names is None:
        for kind in type(instance).__mro__:
            parameters = inspect.signature(kind.__init__).parameters if '__init__' in vars(kind) else {}
            if parameters and all(param.kind not in (param.VAR_KEYWORD, param.VAR_POSITIONAL)
                                  for param in parameters.values()):
                break
        names = list(parameters)[1:]
    # rules of Zennit keep no arguments, and a copy may keep none either
    values = {**{name: getattr(instance, name, None) for name in names}, **dict(given)}
    text = ', '.join(f'{name}={show(value)}' for name, value in values.items() if value is not None)
    return f'{type(instance).__name__}({text})'


class Described:
    '''Objects which show the arguments that they were created with.'''
    def __repr__(self):
        return describe(self)
