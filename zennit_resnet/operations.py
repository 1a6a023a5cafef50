'''Operations on relevance that networks write as functions, and the modules that stand for them.'''
from functools import partial

import torch
import torch.nn.functional as F

from . import moves, products
from .functions import FunctionCall
from .graph import are_probabilities, is_log_sum, is_shift, name_of
from .layer import (
    Activation,
    Addition,
    AveragePool,
    Concatenation,
    Convolution1d,
    Convolution2d,
    Convolution3d,
    ConvolutionTranspose1d,
    ConvolutionTranspose2d,
    ConvolutionTranspose3d,
    FullyConnected,
    Gate,
    MaxPool,
    Normalization,
    Padding,
    Subsampling,
)

# Functions which move or select elements or are the identity in evaluation, so that the gradient is the exact rule.
TRANSPARENT = frozenset('''
    view view_as reshape reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim moveaxis
    adjoint squeeze squeeze_ unsqueeze unsqueeze_ contiguous clone __getitem__ copy_ chunk split
    tensor_split unbind narrow select index_select gather take_along_dim expand expand_as repeat repeat_interleave
    tile roll flip rot90 broadcast_to broadcast_tensors as_strided pixel_shuffle pixel_unshuffle
    channel_shuffle to type type_as float double half bfloat16 cuda cpu detach detach_ requires_grad_ __get__ __set__
    retain_grad register_hook dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_
    feature_dropout feature_dropout_ feature_alpha_dropout feature_alpha_dropout_
    swapaxes_ swapdims_ transpose_ t_ fliplr flipud split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk
    dsplit hsplit vsplit diagonal linalg_diagonal narrow_copy atleast_1d atleast_2d atleast_3d meshgrid cartesian_prod
    combinations as_tensor asarray positive __pos__ nan_to_num nan_to_num_ resolve_conj resolve_neg conj conj_physical
    conj_physical_ real native_channel_shuffle fft_fftshift fft_ifftshift pin_memory _to_copy _unsafe_view alias
    lift_fresh view_copy permute_copy transpose_copy t_copy squeeze_copy unsqueeze_copy select_copy slice_copy
    split_copy split_with_sizes_copy expand_copy unbind_copy unfold_copy diagonal_copy alias_copy detach_copy
    topk sort msort kthvalue median nanmedian mode cummax cummin aminmax masked_select take fractional_max_pool2d
    fractional_max_pool3d fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices as_strided_ __reversed__
    index
'''.split())

ADDITIONS = frozenset('''
    add add_ __add__ __radd__ __iadd__ sub sub_ subtract subtract_ __sub__ __rsub__ __isub__ rsub
'''.split())
PRODUCTS = frozenset('''
    mul mul_ multiply multiply_ __mul__ __rmul__ __imul__
    div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__ __div__ __idiv__ __rdiv__ __rtruediv__
'''.split())
ACTIVATIONS = frozenset('''
    relu relu_ relu6 leaky_relu leaky_relu_ rrelu rrelu_ prelu elu elu_ selu selu_ celu celu_ gelu silu mish hardtanh
    hardtanh_ hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid tanhshrink hardshrink
    softshrink threshold threshold_ clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_ neg neg_ negative
    __neg__ negative_ mish_ silu_ hardswish_ hardsigmoid_ log_sigmoid _threshold fake_quantize_per_tensor_affine
    fake_quantize_per_channel_affine
'''.split())
# Functions of each element, with a form in place, and some of them in torch.special.
ELEMENT_WISE = '''
    abs absolute square pow float_power sqrt rsqrt reciprocal exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos
    atan arcsin arccos arctan sinh cosh asinh acosh atanh arcsinh arccosh arctanh erf erfc erfinv sinc logit lgamma
    digamma polygamma mvlgamma i0 igamma igammac round floor ceil trunc fix frac sign sgn fmod remainder
    hypot atan2 arctan2 copysign ldexp xlogy deg2rad rad2deg nextafter
'''.split()
SPECIAL = '''
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammainc
    gammaincc gammaln i0 i0e i1 i1e log1p log_ndtr logit modified_bessel_i0 modified_bessel_i1 modified_bessel_k0
    modified_bessel_k1 multigammaln ndtr ndtri polygamma psi round scaled_modified_bessel_k0 scaled_modified_bessel_k1
    sinc spherical_bessel_j0 xlog1py xlogy zeta chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
    chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p
    shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
    shifted_chebyshev_polynomial_w
'''.split()
ACTIVATIONS |= {
    *ELEMENT_WISE, *(f'{name}_' for name in ELEMENT_WISE), *(f'special_{name}' for name in SPECIAL),
    *'__abs__ __pow__ __rpow__ __ipow__ __mod__ __imod__ __rmod__'.split(),
    'logaddexp', 'logaddexp2',
}
# The largest or smallest of two tensors, which clip a tensor if the other is a constant.
EXTREMA = frozenset('maximum minimum fmax fmin max min amin'.split())
POWERS = frozenset('pow pow_ __pow__ __ipow__ float_power float_power_'.split())
CLIPPED = frozenset('relu6 hardtanh hardtanh_'.split())
NORMALIZATIONS = frozenset(
    'batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize'.split()
)
# They return their statistics as well.
NATIVE_NORMALIZATIONS = frozenset(
    'native_layer_norm native_group_norm _fused_rms_norm'.split()
)
NATIVE_BATCH_NORMS = frozenset('''
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
'''.split())
AVERAGES = frozenset('''
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum
    _adaptive_avg_pool2d _adaptive_avg_pool3d
'''.split())
INTERPOLATIONS = frozenset('''
    interpolate upsample upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
'''.split())
MAXIMA = frozenset('''
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
'''.split())
CONCATENATIONS = frozenset('cat concat concatenate stack hstack vstack dstack column_stack row_stack'.split())
CONVOLUTIONS = {
    'conv1d': Convolution1d, 'conv2d': Convolution2d, 'conv3d': Convolution3d,
    'conv_transpose1d': ConvolutionTranspose1d, 'conv_transpose2d': ConvolutionTranspose2d,
    'conv_transpose3d': ConvolutionTranspose3d,
}
# Settings of convolutions, in the order of the arguments.
SETTINGS = {
    'linear': (), 'conv': ('stride', 'padding', 'dilation', 'groups'),
    'conv_transpose': ('stride', 'padding', 'output_padding', 'groups', 'dilation'),
}
COMPLEX_FUNCTIONS = frozenset('view_as_complex complex polar stft istft linalg_eig cfloat cdouble chalf'.split())
SOFTMAXES = frozenset('softmax log_softmax _softmax _log_softmax special_softmax special_log_softmax'.split())
# Functions which are random or mix samples in training, with the position of the flag, and what it is by default.
TRAINING = {
    **dict.fromkeys(('dropout', 'dropout1d', 'dropout2d', 'dropout3d'), (2, True)),
    **dict.fromkeys(('alpha_dropout', 'feature_alpha_dropout'), (2, False)),
    'rrelu': (3, False), 'batch_norm': (5, False),
    **{name: (5, False) for name in NATIVE_BATCH_NORMS if 'no_training' not in name},
}


def is_training(func, args, kwargs):
    '''Whether a function is called such that its output for a sample depends on chance or on the other samples.'''
    name = name_of(func)
    if name not in TRAINING:
        return False
    position, default = TRAINING[name]
    given = dict(enumerate(args))
    if not given.get(position, kwargs.get('training', kwargs.get('train', default))):
        return False
    if 'dropout' in name:
        return given.get(1, kwargs.get('p', .5)) > 0
    if 'batch_norm' not in name:
        return True
    given = _batch_norm_arguments(func, args, kwargs)
    # without statistics, it may be a normalization of another kind, of a tensor that was reshaped to have no examples
    return given.get('running_mean') is not None or len(given['input']) > 1


# -- handlers: what runs a function, given the canonizer, the call of the module, and the call of the function ---------

def _add(canonizer, call, function):
    left, right = function.operands()
    if len(function.carriers) == 1 and products.is_complex(left, right):
        return canonizer.refuse(call, function, products.COMPLEX)
    factors = [1, function.kwargs.get('alpha', 1)]
    if 'sub' in function.name:
        # x - alpha y is the sum of x and -alpha y, other - alpha x of -alpha x and other
        factors[1] *= -1
        if function.name in ('__rsub__', 'rsub'):
            factors.reverse()
    if len(function.carriers) == 2:
        output = _normalize(canonizer, call, function, (left, right), factors)
        if output is not None:
            return output
        return canonizer.run(call, Addition, function, factors=None if factors == [1, 1] else tuple(factors))
    signal, = function.carriers
    is_left, found = left is signal, canonizer.merge.find(signal)
    factor, shift = factors[0 if is_left else 1], (right if is_left else left, factors[1 if is_left else 0])
    shift = None if found is None else shift[0] if shift[1] == 1 else shift[0] * shift[1]
    if factor == 1:
        # the gradient of adding a constant passes all relevance on
        output = function()
    else:
        output = canonizer.run(call, Gate, function)
    canonizer.merge.note(found, signal, output, None if factor == 1 else factor, shift)
    return output


def _normalize(canonizer, call, function, operands, factors):
    '''Subtract what a softmax that is written out does, as a constant. Return None if it is anything else.'''
    if factors == [1, 1] and operands[0].shape == operands[1].shape:
        # as skip connections are
        return None
    for (signal, other), (factor, sign) in zip((operands, operands[::-1]), (factors, factors[::-1])):
        if factor != 1:
            continue
        if sign == -1 and signal.shape != other.shape and is_shift(signal, other):
            return canonizer.run_known(function.keep(signal), [signal])
        if is_log_sum(other.grad_fn) and are_probabilities(signal.detach() + sign * other.detach()):
            name = 'log_softmax_' if function.is_inplace else 'log_softmax'
            function = FunctionCall(function.func, name, function.args, function.kwargs, function.carriers)
            output = products.run_on(canonizer, call, Gate, function, signal)
            canonizer.note_softmax(call, name, output, is_passed=True)
            return output
    return None


def _unary(canonizer, call, function, kind):
    if len(function.carriers) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    if kind is Activation:
        given = function.bind('input', 'min', 'max')
        bounds = given.get('min', given.get('min_val')), given.get('max', given.get('max_val'))
        is_clipped = bounds[0] is not None and bounds[1] is not None or function.name in CLIPPED
        if function.name.startswith('hardtanh'):
            bounds = tuple(default if value is None else value for default, value in zip((-1, 1), bounds))
        exponent = function.bind('input', 'exponent').get('exponent') if function.name in POWERS else None
        if isinstance(exponent, (int, float)) and exponent == -1:
            name = 'reciprocal_' if function.is_inplace else 'reciprocal'
            function = FunctionCall(function.func, name, function.args, function.kwargs, function.carriers)
        return products.run_on(
            canonizer, call, kind, function, function.carriers[0], is_clipped=is_clipped, bounds=bounds
        )
    return canonizer.run(call, kind, function)


def _batch_norm(canonizer, call, function):
    given = _batch_norm_arguments(function.func, function.args, function.kwargs)
    if len(function.carriers) > 1:
        return canonizer.refuse(call, function, 'more than one of its arguments does')
    # for those who fold it
    settings = {key: None if given.get(key) is None else given[key].detach()
                for key in ('running_mean', 'running_var', 'weight', 'bias')}
    return canonizer.run(call, Normalization, function, eps=given.get('eps', 1e-5), **settings)


def _native_batch_norm(canonizer, call, function):
    '''A batch normalization that returns statistics as well.'''
    names = ('weight', 'bias', 'running_mean', 'running_var')
    flags = ('training',) if 'no_training' not in function.name else ()
    given = function.bind('input', *names, *flags, 'momentum', 'eps')
    if len(function.carriers) > 1 or given.get('running_mean') is None:
        return products.run_first(canonizer, call, function, Normalization)
    settings = {key: None if given.get(key) is None else given[key].detach() for key in names}
    return products.run_first(canonizer, call, function, Normalization, eps=given.get('eps', 1e-5), **settings)


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


def _extremum(canonizer, call, function):
    given = function.bind('input', 'dim')
    if isinstance(given.get('dim', given.get('other')), torch.Tensor):
        # the gradient of the maximum of two tensors is the rule, that with a constant is clipped by it
        return function() if len(function.carriers) > 1 else _unary(canonizer, call, function, Activation)
    if function.name == 'max':
        return _pool(canonizer, call, function, MaxPool)
    tensors = moves.branches(function)
    if tensors is not None:
        return moves.reduce_branches(canonizer, call, function, tensors)
    return moves.minimum(canonizer, call, function)


def _pool(canonizer, call, function, kind):
    given = function.bind(*_pool_arguments(function.name))
    tensors = None if 'pool' in function.name else moves.branches(function)
    if tensors is not None:
        return moves.reduce_branches(canonizer, call, function, tensors)
    windows = dict.fromkeys(('kernel_size', 'output_size', 'stride', 'dim'))
    windows.update(padding=0, dilation=1, ceil_mode=False)
    windows.update((key, value) for key, value in given.items() if key in windows)
    if not windows['stride']:
        # torch.max_pool2d has an empty list for it
        windows['stride'] = windows['kernel_size']
    return canonizer.run(call, kind, function, **windows)


def _concatenate(canonizer, call, function):
    given = function.bind('tensors', 'dim')
    tensors, dim = given['tensors'], given.get('dim', 0)
    if function.name in ('stack', 'cat', 'concat', 'concatenate'):
        whole = moves.all_examples(tensors, dim, function.name == 'stack')
        if whole is not None:
            return whole.clone()
    is_padded = function.name in ('cat', 'concat', 'concatenate') and len(function.carriers) == 1
    if not is_padded or len(tensors) < 2 or any(bool(elem.any()) for elem in tensors if not elem.requires_grad):
        output = canonizer.run(call, Concatenation, function)
        if function.name in ('stack', 'cat', 'concat', 'concatenate'):
            moves.note_stacked(output, tensors, dim, function.name == 'stack')
        return output
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
    settings = SETTINGS[function.name.rstrip('123d')]
    given = function.bind('input', 'weight', 'bias', *settings)
    weights = [elem for elem in function.carriers if elem is not given['input']]
    if weights:
        is_hidden = any(elem.is_leaf for elem in weights)
        return canonizer.refuse(call, function, (
            'its weights require a gradient, but are no parameters of the network that was given' if is_hidden
            else 'its weights do'
        ))
    standin = canonizer.stand_in(call, CONVOLUTIONS.get(function.name, FullyConnected), function.name)
    defaults = {'stride': 1, 'padding': 0, 'output_padding': 0, 'dilation': 1, 'groups': 1}
    standin.padding_mode = 'zeros'
    standin.set_call(
        _with_settings(function.func, tuple(given)), given['weight'], given.get('bias'),
        **{key: given.get(key, defaults[key]) for key in settings},
    )
    return canonizer.run_known(lambda: standin(given['input']), [given['input']])


def _with_settings(func, names):
    '''A function which is only given some settings: overloads take lists where others take numbers.'''
    if not isinstance(func, torch._ops.OpOverload):  # pylint: disable=protected-access
        return func
    return lambda *args, **kwargs: func(*args, **{key: elem for key, elem in kwargs.items() if key in names})


def _convolution(canonizer, call, function):
    given = function.bind(
        'input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'transposed', 'output_padding', 'groups'
    )
    is_transposed, func = given.pop('transposed'), function.func
    if not is_transposed:
        del given['output_padding']

    def convolution(input, weight, bias, stride, padding, dilation, groups, output_padding=(0,)):
        return func(input, weight, bias, stride, padding, dilation, is_transposed, output_padding, groups)

    name = f'conv{"_transpose" * is_transposed}{given["weight"].ndim - 2}d'
    return _linear(canonizer, call, FunctionCall(convolution, name, (), given, function.carriers))


def _slice(canonizer, call, function):
    given = {'dim': 0, 'start': None, 'end': None, 'step': 1, **function.bind('input', 'dim', 'start', 'end', 'step')}
    input = given['input']
    index = [slice(None)] * input.ndim
    end = None if given['end'] is None or given['end'] >= input.shape[given['dim']] else given['end']
    index[given['dim']] = slice(given['start'], end, given['step'])
    steps = _spatial_steps(input, tuple(index)) if given['step'] != 1 else ()
    return canonizer.run(call, Subsampling, function, steps=steps) if steps else function()


def _pool_arguments(name):
    '''Names of the leading arguments of a function over positions.'''
    if name.startswith('adaptive'):
        return 'input', 'output_size'
    if 'pool' not in name:
        return 'input', 'dim'
    return 'input', 'kernel_size', 'stride', 'padding', *(('dilation',) if 'max' in name else ()), 'ceil_mode'


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
    **dict.fromkeys(PRODUCTS, products.multiply),
    **{name: partial(_unary, kind=kind) for names, kind in (
        (ACTIVATIONS, Activation), (NORMALIZATIONS, Normalization),
    ) for name in names},
    **{name: partial(_pool, kind=kind) for names, kind in (
        (AVERAGES, AveragePool), (MAXIMA, MaxPool),
    ) for name in names},
    **dict.fromkeys(NATIVE_NORMALIZATIONS, partial(products.run_first, kind=Normalization)),
    **dict.fromkeys(NATIVE_BATCH_NORMS, _native_batch_norm),
    **dict.fromkeys(EXTREMA, _extremum),
    **dict.fromkeys(INTERPOLATIONS, products.interpolate),
    **dict.fromkeys(CONCATENATIONS, _concatenate),
    **dict.fromkeys((*CONVOLUTIONS, 'linear'), _linear),
    **dict.fromkeys(products.CONTRACTIONS, products.contract),
    **dict.fromkeys(products.ADDED_PRODUCTS, products.add_product),
    **dict.fromkeys((f'{name}_' for name in products.ADDED_PRODUCTS), products.add_product),
    **dict.fromkeys(('addcmul', 'addcmul_', 'addcdiv', 'addcdiv_'), products.addcmul),
    **dict.fromkeys(('lerp', 'lerp_'), products.lerp),
    **dict.fromkeys(('lp_pool1d', 'lp_pool2d', 'lp_pool3d'), products.lp_pool),
    **dict.fromkeys(('dist', 'pairwise_distance', 'cdist'), products.distance),
    **dict.fromkeys(moves.PLACEMENTS, moves.place),
    **dict.fromkeys(moves.SUMS, moves.add_up),
    **dict.fromkeys(moves.SUMS_AT_PLACES, moves.add_at),
    **dict.fromkeys(moves.SAMPLES, moves.sample),
    **dict.fromkeys(('std', 'var', 'std_mean', 'var_mean'), moves.deviation),
    **dict.fromkeys(('norm', 'linalg_norm', 'linalg_vector_norm', 'linalg_matrix_norm', 'frobenius_norm'), moves.norm),
    **dict.fromkeys(('logsumexp', 'special_logsumexp'), moves.log_sum_exp),
    **dict.fromkeys(('quantile', 'nanquantile'), moves.quantile),
    **dict.fromkeys(('unfold', 'im2col'), moves.unfold),
    **dict.fromkeys(('chain_matmul', 'linalg_multi_dot'), products.multi_dot),
    **dict.fromkeys(('affine_grid', 'affine_grid_generator'), products.affine_grid),
    'bilinear': products.bilinear,
    'convolution': _convolution,
    'cosine_similarity': products.cosine_similarity,
    'deform_conv2d': products.deformable,
    'diff': products.diff,
    'einsum': products.einsum,
    'roi_pool': moves.pool_regions,
    '__getitem__': _index,
    'batch_norm': _batch_norm,
    **dict.fromkeys(SOFTMAXES, lambda canonizer, call, function: canonizer.pass_at_end(call, function)),
    '__setitem__': moves.assign,
    'slice': _slice,
    'glu': _gated_unit,
    'pad': _pad,
    'constant_pad_nd': _pad,
}


def handle(canonizer, call, function):
    '''Run a function on tensors that carry relevance.

    Parameters
    ----------
    canonizer: :py:obj:`zennit_resnet.canonizers.ResidualCanonizer`
        The canonizer.
    call: object
        The call of the module that runs the function.
    function: :py:obj:`zennit_resnet.functions.FunctionCall`
        The function with its arguments.

    Returns
    -------
    object
        What the function returns.
    '''
    target = function.kwargs.get('out') if function.kwargs else None
    if isinstance(target, torch.Tensor):
        # stand-ins build no graph for it, and PyTorch does not either
        kwargs = {key: elem for key, elem in function.kwargs.items() if key != 'out'}
        output = handle(canonizer, call, FunctionCall(
            function.func, function.name, function.args, kwargs, function.carriers
        ))
        return (target if target.shape == output.shape else target.resize_(output.shape)).copy_(output)
    handler = HANDLERS.get(function.name)
    if handler is not None and not any(map(torch.is_complex, function.carriers)):
        return handler(canonizer, call, function)
    is_complex = function.name.startswith('fft_') or function.name in COMPLEX_FUNCTIONS
    is_complex = is_complex or products.is_complex(*function.carriers)
    return canonizer.refuse(call, function, products.COMPLEX if is_complex else 'no rule covers it')
