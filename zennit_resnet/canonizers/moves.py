'''Functions that move, select, place, add up or reduce elements.'''
import functools

import torch
import torch.nn.functional as F

from .._compat import base_of, has_values, version_of
from ..layer import Addition, Filling, NonNegativeMap, Reduction
from . import products, sinks
from .functions import FunctionCall, dims_of, out_of_place, run_twin, with_values


def place(canonizer, call, function):
    '''Put elements among constants, if only one tensor carries relevance: of several, the gradient is the rule.'''
    if function.name.startswith(('index_put', 'put')):
        given = function.bind('input', 'indices', 'values', 'accumulate')
        if given.get('accumulate'):
            return _accumulate(canonizer, call, function)
    if len(function.active) > 1:
        # the same tensor may be given twice
        return canonizer.run_covered(function, function.active)
    return _fill(canonizer, call, function)


@out_of_place
def _accumulate(canonizer, call, function):
    given = function.bind('input', 'indices', 'values')
    return _add_to(canonizer, call, function, given['input'], given.get('values', given.get('source')), 1)


@out_of_place
def _fill(canonizer, call, function):
    output = canonizer.run(call, Filling, function, examples=None)
    sinks.watch_filling(canonizer, call, function, output)
    return output


def copy(canonizer, call, function):
    '''Copy a tensor into another, whose elements are lost. Of constants, relevance goes back to them.'''
    target = function.bind('input')['input']
    return function() if len(function.active) > 1 or not target.requires_grad else _fill(canonizer, call, function)


def assign(canonizer, call, function):
    target, _, value = function.args
    if all(isinstance(elem, torch.Tensor) and elem.requires_grad for elem in (target, value)):
        return function()
    target.copy_(_assigned(canonizer, call, function))


def _assigned(canonizer, call, function):
    target, index, value = function.args

    def changed(target, value):
        output = target.clone()
        output[index] = value
        return output

    placed = FunctionCall(changed, function.name, (target, value), {}, function.active)
    return _fill(canonizer, call, placed.put(target, target.clone()))


def write(canonizer, call, function, target, run):
    '''Change a view of a constant. The other elements of the constant stay: something is put among them.'''
    if function.name == '__setitem__':
        value = _assigned(canonizer, call, function)
    else:
        value = run(function.out_of_place().put(target, target.clone()))
    base, size, stride, offset = base_of(target), target.shape, target.stride(), target.storage_offset()

    def changed(base, value):
        output = torch.empty_strided(base.shape, strides, dtype=base.dtype, device=base.device).copy_(base)
        output.as_strided(size, stride, offset - start).copy_(value)
        return output

    strides, start = base.stride(), base.storage_offset()
    placed = FunctionCall(changed, function.name, (base.clone(), value), {}, [value])
    base.copy_(_fill(canonizer, call, placed) if value.requires_grad else changed(base, value))
    return None if function.name == '__setitem__' else target


def unfold(canonizer, call, function):
    '''Windows of an image, which may have zeros around it, or windows along a dimension.'''
    padding = function.bind('input', 'kernel_size', 'dilation', 'padding').get('padding', 0)
    is_padded = function.func is F.unfold or function.name == 'im2col'
    return _fill(canonizer, call, function) if is_padded and padding not in (0, (0, 0), [0, 0]) else function()


@out_of_place
def add_up(canonizer, call, function):
    '''A sum of elements with weights that are not negative.'''
    if len(function.active) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    kind = function.bind('data', 'reduce')['reduce'] if function.name == 'segment_reduce' else 'sum'
    if kind not in ('sum', 'mean'):
        # of the largest elements, the gradient is the rule
        return canonizer.refuse(call, function, 'it is no sum') if kind == 'prod' else function()
    input, = function.active
    if function.name.startswith('nan') and not (has_values(input) and not bool(input.isnan().any())):
        twin = products.nansum if function.name == 'nansum' else products.nanmean
        return products.as_twin(canonizer, call, function, kind=twin)
    steps = function.bind('input', 'x')
    steps = steps.get('x', steps.get('dx', 1)) if 'trap' in function.name else 1
    steps = steps.diff() if isinstance(steps, torch.Tensor) else torch.tensor(steps)
    if bool((steps < 0).any()):
        return canonizer.refuse(call, function, 'its steps have negative signs')
    return canonizer.run(call, NonNegativeMap, function, examples=None)


@out_of_place
def add_at(canonizer, call, function):
    '''A sum of elements at places of a destination.'''
    names = ('input', 'dim', 'index', 'source' if 'index' in function.name else 'src', 'reduce')
    given = function.bind(*names)
    target, source, alpha = given['input'], given[names[3]], function.kwargs.get('alpha', 1)
    if 'reduce' in function.name and given['reduce'] != 'sum':
        if given['reduce'] in ('amax', 'amin') or given['reduce'] == 'mean' and not source.requires_grad:
            # of the largest elements, the gradient is the rule
            return function()
        if given['reduce'] != 'mean' or target.requires_grad:
            return canonizer.refuse(call, function, f'reduce={given["reduce"]!r} is no sum')
    return _add_to(canonizer, call, function, target, source, alpha)


def _add_to(canonizer, call, function, target, source, alpha):
    if not source.requires_grad:
        # a constant is added
        return function()
    zeros, source = torch.zeros_like(target), source.detach() if target is source else source
    added = function.put(target, zeros)
    if target.requires_grad or alpha < 0:
        kwargs = {key: elem for key, elem in added.kwargs.items() if key != 'alpha'}
        added = added._replace(kwargs=kwargs)
        return run_twin(canonizer, function, lambda: torch.add(target, added(), alpha=alpha))
    output = canonizer.run(call, NonNegativeMap, added, examples=None)
    if has_values(target) and not bool(target.any()):
        return output
    with torch.no_grad():
        exact = function()
    return with_values(output + 0, exact)


def sample(canonizer, call, function, kind):
    '''Samples of an image at places or in regions, which count as constants.'''
    given = function.bind('input', 'rois' if 'roi' in function.name else 'grid', 'mode')
    input = given['input']
    if not input.requires_grad:
        return canonizer.refuse(call, function, 'only the places do, at which it takes samples')
    if 'grid' in function.name and given.get('mode', 'bilinear') in ('bicubic', 2):
        return canonizer.refuse(call, function, 'mode=\'bicubic\' has weights of both signs: use \'bilinear\'')
    if function.name == 'ps_roi_pool':
        # for boxes at the lower or right border, its backward counts other elements than its forward
        return canonizer.refuse(call, function, 'its gradient is wrong in torchvision: use ps_roi_align')
    function = function.keep(input)
    # regions name the example that they are of
    examples = given['rois'][:, 0].long() if 'roi' in function.name else None
    if function.name in ('ps_roi_align', 'roi_pool'):
        return products.run_first_output(canonizer, call, function, kind, examples=examples)
    return canonizer.run(call, kind, function, examples=examples)


def branches(function):
    '''Stacked tensors, if a function reduces the dimension along which they were stacked, else None.'''
    given = function.bind('input', 'dim')
    input, dim = given['input'], given.get('dim')
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        dim, = dim
    noted = getattr(input, '_stacked', None)
    if noted is None or not isinstance(dim, int) or isinstance(dim, bool) or given.get('dtype') is not None:
        return None
    tensors, stacked, is_stack, versions = noted
    is_changed = list(map(version_of, (input, *tensors))) != versions
    if is_changed or dim % input.ndim != stacked:
        return None
    return tensors if is_stack else [elem.squeeze(stacked) for elem in tensors]


def note_stacked(output, tensors, dim, is_stack):
    '''Note which tensors were stacked along a dimension, or concatenated with one element each.'''
    dim = dim % output.ndim
    if is_stack or all(elem.ndim == output.ndim and elem.shape[dim] == 1 for elem in tensors):
        versions = list(map(version_of, (output, *tensors)))
        output._stacked = tuple(tensors), dim, is_stack, versions


def reduce_branches(canonizer, call, function, tensors):
    '''A sum, mean or maximum of tensors that were stacked for it, as an addition or maximum of these.'''
    with torch.no_grad():
        exact = function()
    result = exact[0] if isinstance(exact, tuple) else exact
    values = result.reshape(tensors[0].shape)
    if function.name in ('sum', 'mean'):
        def total(*tensors):
            return with_values(sum(tensors[1:], tensors[0].clone()), values)

        active = [elem for elem in tensors if elem.requires_grad]
        addends = FunctionCall(total, function.name, tuple(tensors), {}, active)
        output = canonizer.run(call, Addition, addends, factors=None) if len(active) > 1 else addends()
    else:
        choose = torch.minimum if 'min' in function.name else torch.maximum
        output = with_values(functools.reduce(choose, tensors[1:], tensors[0].clone()), values)
    output = output.reshape(result.shape)
    return type(exact)((output, *exact[1:])) if isinstance(exact, tuple) else output


def minimum(canonizer, call, function):
    '''The smallest elements over dimensions, as the largest of the negatives.'''
    given = function.bind('input', 'dim', 'keepdim')
    settings = {key: given[key] for key in ('dim', 'keepdim') if key in given}
    with torch.no_grad():
        exact = function()
    if isinstance(exact, tuple):
        values = run_twin(canonizer, function.part(0), lambda: -torch.max(-given['input'], **settings).values)
        return type(exact)((values, *exact[1:]))
    largest = torch.max if function.name == 'min' else torch.amax
    return run_twin(canonizer, function, lambda: -largest(-given['input'], **settings))


def _power(order, dims, input):
    '''What elements add to a norm.'''
    magnitude = input.abs()
    if order in (float('inf'), -float('inf')):
        extreme = magnitude.amax(dims, keepdim=True) if order > 0 else magnitude.amin(dims, keepdim=True)
        return (magnitude == extreme).to(input.dtype)
    return (magnitude != 0).to(input.dtype) if order == 0 else magnitude ** order


def deviation(canonizer, call, function):
    '''A variance or standard deviation, which may come with the mean.'''
    given = function.bind('input', 'dim')
    dims = dims_of(given['input'], given.get('dim'))
    settings = {'amounts': lambda input: (input - input.mean(dims, keepdim=True)) ** 2, 'dims': dims}
    if not function.name.endswith('_mean'):
        return canonizer.run(call, Reduction, function, **settings)
    return (
        canonizer.run(call, Reduction, function.part(0), **settings),
        canonizer.run(call, NonNegativeMap, function.part(1), examples=None),
    )


def norm(canonizer, call, function):
    names = {'norm': ('p', 'dim'), 'frobenius_norm': ('dim',)}.get(function.name, ('ord', 'dim'))
    given, is_matrix = function.bind('input', *names), function.name == 'linalg_matrix_norm'
    input, = function.active
    order, dim = given.get('ord', given.get('p')), given.get('dim', (-2, -1) if is_matrix else None)
    if function.name == 'linalg_norm':
        is_matrix = isinstance(dim, (list, tuple)) and len(dim) == 2 or dim is None and input.ndim == 2
    if order in (None, 'fro'):
        order = 2
    elif is_matrix or isinstance(order, str):
        return canonizer.refuse(call, function, f'elements have no share of a matrix norm of order {order!r}')
    order, dims = float(order), dims_of(input, dim)
    return canonizer.run(call, Reduction, function, amounts=functools.partial(_power, order, dims), dims=dims)


def log_sum_exp(canonizer, call, function):
    '''A soft maximum.'''
    given = function.bind('input', 'dim')
    dims = dims_of(given['input'], given['dim'])
    return canonizer.run(
        call, Reduction, function, amounts=lambda input: (input - input.amax(dims, keepdim=True)).exp(), dims=dims
    )


def quantile(canonizer, call, function):
    '''A quantile, which is a selection unless it lies between two elements.'''
    mode = function.bind('input', 'q', 'dim', 'keepdim').get('interpolation', 'linear')
    if mode in ('lower', 'higher', 'nearest'):
        return function()
    return canonizer.refuse(call, function, (
        f'interpolation={mode!r} lies between two elements: use \'lower\', \'higher\' or \'nearest\''
    ))
