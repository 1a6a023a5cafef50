'''Operations on relevance that networks write as functions, and the modules that stand for them.'''
from functools import partial

import torch
import torch.nn.functional as F

from .graph import is_gate
from .layer import (
    Activation,
    Addition,
    AveragePool,
    Concatenation,
    Convolution1d,
    Convolution2d,
    Convolution3d,
    FullyConnected,
    Gate,
    MaxPool,
    Normalization,
    Padding,
    Subsampling,
)

# Functions which move elements or are the identity in evaluation, so that the gradient is the exact rule.
TRANSPARENT = frozenset('''
    view view_as reshape reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim moveaxis
    adjoint squeeze squeeze_ unsqueeze unsqueeze_ contiguous clone __getitem__ __setitem__ copy_ chunk split
    tensor_split unbind narrow select index_select gather take_along_dim expand expand_as repeat repeat_interleave
    tile roll flip rot90 broadcast_to broadcast_tensors unfold as_strided pixel_shuffle pixel_unshuffle
    channel_shuffle to type type_as float double half bfloat16 cuda cpu detach detach_ requires_grad_ __get__ __set__
    retain_grad register_hook dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout maximum minimum fmax fmin
'''.split())

ADDITIONS = frozenset('''
    add add_ __add__ __radd__ __iadd__ sub sub_ subtract subtract_ __sub__ __rsub__ __isub__ rsub
'''.split())
PRODUCTS = frozenset('''
    mul mul_ multiply multiply_ __mul__ __rmul__ __imul__
    div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__ __div__ __idiv__
'''.split())
ACTIVATIONS = frozenset('''
    relu relu_ relu6 leaky_relu leaky_relu_ rrelu rrelu_ prelu elu elu_ selu selu_ celu celu_ gelu silu mish hardtanh
    hardtanh_ hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid tanhshrink hardshrink
    softshrink threshold threshold_ clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_ neg neg_ negative
    __neg__
'''.split())
CLIPPED = frozenset('relu6 hardtanh hardtanh_'.split())
NORMALIZATIONS = frozenset(
    'batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize'.split()
)
AVERAGES = frozenset('''
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum
    interpolate upsample
'''.split())
MAXIMA = frozenset('''
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax max
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
'''.split())
CONCATENATIONS = frozenset('cat concat concatenate stack hstack vstack dstack column_stack'.split())
CONVOLUTIONS = {'conv1d': Convolution1d, 'conv2d': Convolution2d, 'conv3d': Convolution3d}
# Functions which are random or mix samples in training, with the position of the flag, and what it is by default.
TRAINING = {
    **dict.fromkeys(('dropout', 'dropout1d', 'dropout2d', 'dropout3d'), (2, True)),
    **dict.fromkeys(('alpha_dropout', 'feature_alpha_dropout'), (2, False)),
    'rrelu': (3, False), 'batch_norm': (5, False),
}


def is_training(func, args, kwargs):
    '''Whether a function is called such that its output for a sample depends on chance or on the other samples.'''
    name = getattr(func, '__name__', '')
    if name not in TRAINING:
        return False
    position, default = TRAINING[name]
    given = dict(enumerate(args))
    if not given.get(position, kwargs.get('training', kwargs.get('train', default))):
        return False
    if 'dropout' in name:
        return given.get(1, kwargs.get('p', .5)) > 0
    if name != 'batch_norm':
        return True
    given = _batch_norm_arguments(func, args, kwargs)
    # without statistics, it may be a normalization of another kind, of a tensor that was reshaped to have no examples
    return given.get('running_mean') is not None or len(given['input']) > 1


class FunctionCall:
    '''A function call with its arguments.'''
    # pylint: disable=too-many-arguments
    def __init__(self, func, name, args, kwargs, carriers):
        self.func = func
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.carriers = carriers

    def __call__(self):
        return self.func(*self.args, **self.kwargs)

    def operands(self):
        '''Both operands of a binary operator.'''
        given = dict(zip(('input', 'other'), self.args), **self.kwargs)
        return given['input'], given['other']

    def keep(self, carrier):
        '''The call with all tensors but one as constants.'''
        constants = {id(elem): elem.detach() for elem in self.carriers if elem is not carrier}
        args, kwargs = _replace(self.args, constants), _replace(self.kwargs, constants)
        return FunctionCall(self.func, self.name, args, kwargs, [carrier])

    def rebind(self):
        '''The call as a function of the tensors that carry relevance, without a reference to any of them.'''
        func = self.func
        slots = {id(elem): _Slot(num) for num, elem in enumerate(self.carriers)}
        args, kwargs = _replace(self.args, slots), _replace(self.kwargs, slots)

        def function(*tensors):
            return func(*_replace(args, tensors), **_replace(kwargs, tensors))

        return function


class _Slot(int):
    '''Place of a tensor in the arguments of a call.'''


def _replace(value, replacements):
    '''Replace tensors by slots according to their id, or slots by tensors, in nested arguments.'''
    if isinstance(value, torch.Tensor):
        return replacements.get(id(value), value) if isinstance(replacements, dict) else value
    if isinstance(value, _Slot):
        return replacements[value]
    if isinstance(value, dict):
        return {key: _replace(elem, replacements) for key, elem in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replace(elem, replacements) for elem in value)
    return value


# -- handlers: what runs a function, given the canonizer, the call of the module, and the call of the function ---------

def _add(canonizer, call, function):
    left, right = function.operands()
    factors = [1, function.kwargs.get('alpha', 1)]
    if 'sub' in function.name:
        # x - alpha y is the sum of x and -alpha y, other - alpha x of -alpha x and other
        factors[1] *= -1
        if function.name in ('__rsub__', 'rsub'):
            factors.reverse()
    if len(function.carriers) == 2:
        return canonizer.run(call, Addition, function, factors=None if factors == [1, 1] else tuple(factors))
    if factors[0 if left is function.carriers[0] else 1] == 1:
        # the gradient of adding a constant passes all relevance on
        return function()
    return canonizer.run(call, Gate, function)


def _multiply(canonizer, call, function):
    left, right = function.operands()
    is_division = 'div' in function.name
    if len(function.carriers) == 1:
        if is_division and right is function.carriers[0]:
            return canonizer.refuse(call, function, 'the divisor is the only one that does')
        return canonizer.run(call, Gate, function)
    signal = 0 if is_division else _find_signal(left, right)
    if signal is None:
        return canonizer.refuse(call, function, (
            f'which factor is the signal and which the gate is ambiguous: shapes {tuple(left.shape)} and '
            f'{tuple(right.shape)}, and none or both were computed from sigmoids alone'
        ))
    # the gate counts as a constant, what computes it is not visited in the backward pass
    return canonizer.run(call, Gate, function.keep((left, right)[signal]))


def _unary(canonizer, call, function, kind):
    if len(function.carriers) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    if kind is Activation:
        given = dict(zip(('input', 'min', 'max'), function.args), **function.kwargs)
        is_clipped = given.get('min') is not None and given.get('max') is not None
        return canonizer.run(call, kind, function, is_clipped=is_clipped or function.name in CLIPPED)
    return canonizer.run(call, kind, function)


def _batch_norm(canonizer, call, function):
    given = _batch_norm_arguments(function.func, function.args, function.kwargs)
    if len(function.carriers) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    # for those who fold it
    settings = {key: None if given.get(key) is None else given[key].detach()
                for key in ('running_mean', 'running_var', 'weight', 'bias')}
    return canonizer.run(call, Normalization, function, eps=given.get('eps', 1e-5), **settings)


def _batch_norm_arguments(func, args, kwargs):
    '''Arguments of a batch normalization by their names. That of torch has them in another order.'''
    names = 'running_mean', 'running_var', 'weight', 'bias'
    if func is not F.batch_norm:
        names = names[2:] + names[:2]
    return dict(zip(('input', *names, 'training', 'momentum', 'eps'), args), **kwargs)


def _gated_unit(canonizer, call, function):
    given = dict(zip(('input', 'dim'), function.args), **function.kwargs)
    dim = given.get('dim', -1)
    signal, gate = given['input'].chunk(2, dim)
    gate = gate.detach()

    def unit(signal):
        return function.func(torch.cat((signal, gate), dim), dim)

    return canonizer.run(call, Gate, FunctionCall(unit, function.name, (signal,), {}, [signal]))


def _pool(canonizer, call, function, kind):
    given = dict(zip(_pool_arguments(function.name), function.args), **function.kwargs)
    if isinstance(given.get('dim', given.get('other')), torch.Tensor):
        # torch.max of two tensors is their maximum, of which the gradient is the rule
        return function()
    windows = dict.fromkeys(('kernel_size', 'output_size', 'stride', 'dim'))
    windows.update(padding=0, dilation=1, ceil_mode=False)
    windows.update((key, value) for key, value in given.items() if key in windows)
    if not windows['stride']:
        # torch.max_pool2d has an empty list for it
        windows['stride'] = windows['kernel_size']
    return canonizer.run(call, kind, function, **windows)


def _concatenate(canonizer, call, function):
    given = dict(zip(('tensors', 'dim'), function.args), **function.kwargs)
    tensors, dim = given['tensors'], given.get('dim', given.get('axis', 0))
    is_padded = function.name in ('cat', 'concat', 'concatenate') and len(function.carriers) == 1
    if not is_padded or len(tensors) < 2 or any(bool(elem.any()) for elem in tensors if not elem.requires_grad):
        return canonizer.run(call, Concatenation, function)
    # concatenation with zeros, as some shortcuts have it
    position = next(num for num, elem in enumerate(tensors) if elem is function.carriers[0])
    lengths = [elem.shape[dim] for elem in tensors]
    return canonizer.run(call, Padding, function, amounts={
        dim % tensors[0].ndim: (sum(lengths[:position]), sum(lengths[position + 1:]))
    })


def _pad(canonizer, call, function):
    given = dict(zip(('input', 'pad', 'mode', 'value'), function.args), **function.kwargs)
    if given.get('mode', 'constant') != 'constant':
        # elements are repeated, the gradient adds up the relevance of the copies
        return function()
    pad, last = list(given['pad']), given['input'].ndim - 1
    return canonizer.run(call, Padding, function, amounts={
        last - num: amounts for num, amounts in enumerate(zip(pad[::2], pad[1::2])) if any(amounts)
    })


def _index(canonizer, call, function):
    _, index = function.args
    index = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(elem, slice) and elem.step not in (None, 1) for elem in index):
        return function()
    steps = _spatial_steps(function.args[0], index)
    if not steps:
        return function()
    return canonizer.run(call, Subsampling, function, steps=steps)


def _linear(canonizer, call, function):
    names = ('input', 'weight', 'bias')
    settings = () if function.name == 'linear' else ('stride', 'padding', 'dilation', 'groups')
    given = dict(zip(names + settings, function.args), **function.kwargs)
    weights = [elem for elem in function.carriers if elem is not given['input']]
    if weights:
        is_hidden = any(elem.is_leaf for elem in weights)
        return canonizer.refuse(call, function, (
            'its weights require a gradient, but are no parameters of the network that was given' if is_hidden
            else 'its weights do'
        ))
    standin = canonizer.stand_in(call, CONVOLUTIONS.get(function.name, FullyConnected), function.name)
    defaults = {'stride': 1, 'padding': 0, 'dilation': 1, 'groups': 1}
    standin.padding_mode = 'zeros'
    standin.set_call(
        function.func, given['weight'], given.get('bias'),
        **{key: given.get(key, defaults[key]) for key in settings},
    )
    return canonizer.run_known(lambda: standin(given['input']), [given['input']])


def _pool_arguments(name):
    '''Names of the leading arguments of a function over positions.'''
    if name.startswith('adaptive'):
        return 'input', 'output_size'
    if 'pool' not in name:
        return 'input', 'dim'
    return 'input', 'kernel_size', 'stride', 'padding', *(('dilation',) if 'max' in name else ()), 'ceil_mode'


def _find_signal(left, right):
    '''Index of the signal among two factors, None if ambiguous.'''
    if left.numel() != right.numel():
        return 0 if left.numel() > right.numel() else 1
    # of the product of both, which LSTMs have, a tanh is the signal
    for with_tanh in (True, False):
        gates = [is_gate(elem, with_tanh) for elem in (left, right)]
        if gates.count(True) == 1:
            return gates.index(False)
    return None


def _spatial_steps(tensor, index):
    '''Steps of the trailing dimensions, empty if the index does anything but subsample these from their start.'''
    if Ellipsis in [elem for elem in index if elem is Ellipsis]:
        position = next(num for num, elem in enumerate(index) if elem is Ellipsis)
        index = index[:position] + (slice(None),) * (tensor.ndim - len(index) + 1) + index[position + 1:]
    index = index + (slice(None),) * (tensor.ndim - len(index))
    if not all(isinstance(elem, slice) and elem.start in (None, 0) and elem.stop is None for elem in index):
        return ()
    if tensor.ndim not in (3, 4, 5) or any(elem.step not in (None, 1) for elem in index[:2]):
        return ()
    return tuple(elem.step or 1 for elem in index[2:])


HANDLERS = {
    **dict.fromkeys(ADDITIONS, _add),
    **dict.fromkeys(PRODUCTS, _multiply),
    **{name: partial(_unary, kind=kind) for names, kind in (
        (ACTIVATIONS, Activation), (NORMALIZATIONS, Normalization), (('addcmul',), Gate),
    ) for name in names},
    **{name: partial(_pool, kind=kind) for names, kind in (
        (AVERAGES, AveragePool), (MAXIMA, MaxPool),
    ) for name in names},
    **dict.fromkeys(CONCATENATIONS, _concatenate),
    **dict.fromkeys((*CONVOLUTIONS, 'linear'), _linear),
    '__getitem__': _index,
    'batch_norm': _batch_norm,
    'glu': _gated_unit,
    'pad': _pad,
}
