'''Handlers ``(canonizer, call of the module, call of the function)`` of functions that layers have classes for.'''
import functools

import torch
import torch.nn.functional as F

from .._autograd import note_vector
from .._gates import are_probabilities, is_log_sum, is_shift, is_weighting
from ..layer import Activation, Addition, Concatenation, Gate, MaxPool, Normalization, Padding, Subsampling
from . import moves, products, sinks
from .functions import FunctionCall, fully_connected, out_of_place

CLIPPED = frozenset('relu6 hardtanh hardtanh_'.split())
POWERS = frozenset('pow pow_ __pow__ __ipow__ float_power float_power_'.split())
# Settings of convolutions, in the order of the arguments.
SETTINGS = {
    'linear': (), 'conv': ('stride', 'padding', 'dilation', 'groups'),
    'conv_transpose': ('stride', 'padding', 'output_padding', 'groups', 'dilation'),
}


def add(canonizer, call, function):
    '''Add two tensors, or a constant to one.'''
    left, right = function.operands()
    factors = [1, function.kwargs.get('alpha', 1)]
    if 'sub' in function.name:
        # x - alpha y is the sum of x and -alpha y, other - alpha x of -alpha x and other
        factors[1] *= -1
        if function.name in ('__rsub__', 'rsub'):
            factors.reverse()
    if len(function.active) == 2:
        output = normalize(canonizer, call, function, (left, right), factors)
        if output is not None:
            return output
        return canonizer.run(call, Addition, function, factors=None if factors == [1, 1] else tuple(factors))
    signal, = function.active
    constant, found = right if left is signal else left, canonizer.merge.find(signal)
    if canonizer.parameters == 'sink' and _is_sink(constant):
        return _add_sink(canonizer, call, function, factors=factors)
    factor, sign = factors if left is signal else factors[::-1]
    # the gradient of adding a constant passes all relevance on
    output = function() if factor == 1 else canonizer.run(call, Gate, function)
    if _is_vector(constant):
        note_vector(output.grad_fn)
    if found is not None:
        shift = constant if sign == 1 else constant * sign
        canonizer.merge.note(found, signal, output, None if factor == 1 else factor, shift)
    return output


def _is_vector(constant):
    '''Whether a constant has several values, as far as its shape tells.'''
    return isinstance(constant, torch.Tensor) and (constant.layout is not torch.strided or any(
        length > 1 and step for length, step in zip(constant.shape, constant.stride())
    ))


def _is_sink(constant):
    '''Whether a constant differs over more than one dimension, as embeddings of positions do, and biases do not.'''
    return isinstance(constant, torch.Tensor) and constant.is_floating_point() and sum(
        length > 1 for length in constant.shape
    ) > 1


@out_of_place
def _add_sink(canonizer, call, function, factors):
    '''Add a constant that receives relevance, as if it depended on the input.'''
    given, = function.active
    constant = next(elem for elem in function.operands() if elem is not given)
    signal, sink = given.view_as(given), constant.detach().requires_grad_()
    function = function.put(given, signal).put(constant, sink)
    function = function._replace(active=list(function.operands()))
    output = canonizer.run(call, Addition, function, factors=None if factors == [1, 1] else tuple(factors))
    sinks.watch_addition(canonizer, call, function, signal, constant, output)
    return output


def normalize(canonizer, call, function, operands, factors):
    '''Subtract what a softmax that is written out does, as a constant. Return None if it is anything else.'''
    if factors == [1, 1] and operands[0].shape == operands[1].shape:
        # as skip connections are
        return None
    for (signal, other), (factor, sign) in zip((operands, operands[::-1]), (factors, factors[::-1])):
        if factor != 1:
            continue
        if sign == -1 and signal.shape != other.shape and is_shift(signal, other):
            return canonizer.run_covered(function.keep(signal), [signal])
        if is_log_sum(other.grad_fn) and are_probabilities(signal.detach() + sign * other.detach()):
            function = function.renamed('log_softmax')
            output = products.run_for_signal(canonizer, call, Gate, function, signal)
            canonizer.note_softmax(call, function.name, output, is_passed=True)
            return output
    return None


def unary(canonizer, call, function, kind):
    '''Run a function of each element, or a normalization.'''
    if len(function.active) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    if kind is Activation:
        given = function.bind('input', 'min', 'max')
        bounds = given.get('min', given.get('min_val')), given.get('max', given.get('max_val'))
        is_clipped = bounds[0] is not None and bounds[1] is not None or function.name in CLIPPED
        if function.name.startswith('hardtanh'):
            bounds = tuple(default if value is None else value for default, value in zip((-1, 1), bounds))
        exponent = function.bind('input', 'exponent').get('exponent') if function.name in POWERS else None
        if isinstance(exponent, (int, float)) and exponent == -1:
            function = function.renamed('reciprocal')
        return products.run_for_signal(
            canonizer, call, kind, function, function.active[0], is_clipped=is_clipped, bounds=bounds
        )
    return canonizer.run(call, kind, function)


def normalization(canonizer, call, function):
    '''Normalize, with what is needed to fold it, or which tells what has a mean in common.'''
    if len(function.active) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    given = norm_arguments(function.func, function.name, function.args, function.kwargs)
    if function.name == 'instance_norm' and (given.get('running_mean') is None or given.get('training', True)):
        given.update(num_groups=given['input'].shape[1], running_mean=None, running_var=None)
    shape = given.get('normalized_shape')
    settings = {
        'eps': given.get('eps', 1e-5), 'num_groups': given.get('num_groups'),
        'normalized_shape': None if shape is None else tuple(shape), **{
            key: None if given.get(key) is None else given[key].detach()
            for key in ('running_mean', 'running_var', 'weight', 'bias')
        },
    }
    if function.name in ('batch_norm', 'instance_norm', 'layer_norm', 'group_norm'):
        return canonizer.run(call, Normalization, function, **settings)
    return products.run_first_output(canonizer, call, function, Normalization, **settings)


def norm_arguments(func, name, args, kwargs):
    if 'layer_norm' in name:
        names = 'input normalized_shape weight bias eps'
    elif name == 'group_norm':
        names = 'input num_groups weight bias eps'
    elif name == 'native_group_norm':
        names = 'input weight bias N C HxW num_groups eps'
    elif func in (F.batch_norm, F.instance_norm):
        names = 'input running_mean running_var weight bias training momentum eps'
    else:
        names = f'input weight bias running_mean running_var {"training" * ("no_training" not in name)} momentum eps'
    aliases = {'use_input_stats': 'training', 'group': 'num_groups'}
    return dict(zip(names.split(), args), **{aliases.get(key, key): elem for key, elem in kwargs.items()})


def gated_unit(canonizer, call, function):
    '''Halves of a tensor, a signal and its gate.'''
    given = function.bind('input', 'dim')
    dim = given.get('dim', -1)
    signal, gate = given['input'].chunk(2, dim)
    gate = gate.detach()

    def unit(signal):
        return function.func(torch.cat((signal, gate), dim), dim)

    return canonizer.run(call, Gate, FunctionCall(unit, function.name, (signal,), {}, [signal]))


def extremum(canonizer, call, function):
    '''The largest or smallest elements, along a dimension or of two tensors.'''
    given = function.bind('input', 'dim')
    if isinstance(given.get('dim', given.get('other')), torch.Tensor):
        # the gradient of the maximum of two tensors is the rule, that with a constant is clipped by it
        return function() if len(function.active) > 1 else unary(canonizer, call, function, Activation)
    return pool(canonizer, call, function, MaxPool)


def pool(canonizer, call, function, kind):
    '''Average or maximum of windows, positions or dimensions.'''
    given = function.bind(*_pool_arguments(function.name))
    tensors = None if 'pool' in function.name else moves.branches(function)
    if tensors is not None:
        return moves.reduce_branches(canonizer, call, function, tensors)
    if 'min' in function.name:
        return moves.minimum(canonizer, call, function)
    windows = {key: given.get(key, default) for key, default in products.WINDOWS.items()}
    if not windows['stride']:
        # torch.max_pool2d has an empty list for it
        windows['stride'] = windows['kernel_size']
    return canonizer.run(call, kind, function, **windows)


def concatenate(canonizer, call, function):
    given = function.bind('tensors', 'dim')
    tensors, dim = given['tensors'], given.get('dim', 0)
    is_stack, is_cat = function.name == 'stack', function.name in ('cat', 'concat', 'concatenate')
    # a token that is a parameter is no padding, whatever its values
    if not is_cat or len(function.active) > 1 or len(tensors) < 2 or any(
        sinks.is_parameter(elem) or bool(elem.any()) for elem in tensors if not elem.requires_grad
    ):
        output = canonizer.run(call, Concatenation, function)
        sinks.watch_constants(canonizer, call, function, output, tensors)
        if is_stack or is_cat:
            moves.note_stacked(output, tensors, dim, is_stack)
        return output
    # concatenation with zeros, as some shortcuts have it
    position = next(num for num, elem in enumerate(tensors) if elem is function.active[0])
    lengths = [elem.shape[dim] for elem in tensors]
    return canonizer.run(call, Padding, function, amounts={
        dim % tensors[0].ndim: (sum(lengths[:position]), sum(lengths[position + 1:]))
    })


def pad(canonizer, call, function):
    given = function.bind('input', 'pad', *(('mode',) if function.name == 'pad' else ()))
    if given.get('mode', 'constant') != 'constant':
        # elements are repeated, the gradient adds up the relevance of the copies
        return function()
    pad, last = list(given['pad']), given['input'].ndim - 1
    return canonizer.run(call, Padding, function, amounts={
        last - num: amounts for num, amounts in enumerate(zip(pad[::2], pad[1::2])) if any(amounts)
    })


def index_(canonizer, call, function):
    '''Index a tensor, which may be subsampling.'''
    tensor, index = function.args
    return _subsample(canonizer, call, function, tensor, index if isinstance(index, tuple) else (index,))


def slice_(canonizer, call, function):
    '''The function that slices are of aten.'''
    given = {'dim': 0, 'start': None, 'end': None, 'step': 1, **function.bind('input', 'dim', 'start', 'end', 'step')}
    input, dim, end = (given[key] for key in ('input', 'dim', 'end'))
    index = [slice(None)] * input.ndim
    index[dim] = slice(given['start'], None if end is None or end >= input.shape[dim] else end, given['step'])
    return _subsample(canonizer, call, function, input, tuple(index))


def _subsample(canonizer, call, function, tensor, index):
    steps = _spatial_steps(tensor, index)
    return canonizer.run(call, Subsampling, function, steps=steps) if any(step != 1 for step in steps) else function()


def linear(canonizer, call, function):
    '''A convolution or fully connected layer, from its settings.'''
    settings = SETTINGS[function.name.rstrip('123d')]
    given = function.bind('input', 'weight', 'bias', *settings)
    weights = [elem for elem in function.active if elem is not given['input']]
    if weights and given['input'].requires_grad and all(is_weighting(elem, given['input']) for elem in weights):
        # experts that a softmax or sigmoid chooses from are constants, as other weights are
        given, weights = function.keep(given['input']).bind('input', 'weight', 'bias', *settings), []
    if weights:
        is_hidden = any(elem.is_leaf for elem in weights)
        return canonizer.refuse(call, function, (
            'its weights require a gradient, but are no parameters of the network that was given' if is_hidden
            else 'its weights do'
        ))
    func, names = function.func, frozenset(given)
    if function.name == 'linear' and canonizer.has_frozen(given['weight']):
        func = functools.partial(fully_connected, func)

    def with_given(*args, **kwargs):
        # overloads take lists where others take numbers, as the defaults are
        return func(*args, **{key: elem for key, elem in kwargs.items() if key in names})

    defaults = {'stride': 1, 'padding': 0, 'output_padding': 0, 'dilation': 1, 'groups': 1}
    return products.run_as_layer(
        canonizer, call, function.name, given['input'], with_given, given['weight'], given.get('bias'),
        **{key: given.get(key, defaults[key]) for key in settings},
    )


def convolution(canonizer, call, function):
    '''The function that all convolutions are of aten.'''
    given = function.bind(
        'input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'transposed', 'output_padding', 'groups'
    )
    is_transposed, func = given.pop('transposed'), function.func
    if not is_transposed:
        del given['output_padding']

    def convolution(input, weight, bias, stride, padding, dilation, groups, output_padding=(0,)):
        return func(input, weight, bias, stride, padding, dilation, is_transposed, output_padding, groups)

    name = f'conv{"_transpose" * is_transposed}{given["weight"].ndim - 2}d'
    return linear(canonizer, call, FunctionCall(convolution, name, (), given, function.active))


def _pool_arguments(name):
    '''Names of the leading arguments of a function over positions.'''
    if name.startswith('adaptive'):
        return 'input', 'output_size'
    if 'pool' not in name:
        return 'input', 'dim'
    return 'input', 'kernel_size', 'stride', 'padding', *(('dilation',) if 'max' in name else ()), 'ceil_mode'


def _spatial_steps(tensor, index):
    '''Steps of the trailing dimensions, empty if the index does anything but subsample these from their start.'''
    position = next((num for num, elem in enumerate(index) if elem is Ellipsis), len(index))
    missing = (slice(None),) * (tensor.ndim - len(index) + (position < len(index)))
    index = index[:position] + missing + index[position + 1:]
    if not all(isinstance(elem, slice) and elem.start in (None, 0) and elem.stop is None for elem in index):
        return ()
    if tensor.ndim not in (3, 4, 5) or any(elem.step not in (None, 1) for elem in index[:2]):
        return ()
    return tuple(elem.step or 1 for elem in index[2:])
