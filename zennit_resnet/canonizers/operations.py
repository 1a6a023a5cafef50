'''One table: what each function of PyTorch is for relevance. A new operation is one entry here, and one test.'''
from functools import partial
from typing import NamedTuple

import torch

from .._compat import base_of
from ..layer import (
    Activation,
    Addition,
    AveragePool,
    Filling,
    Gate,
    MatrixProduct,
    MaxPool,
    NonNegativeMap,
    Normalization,
    Padding,
    Product,
    Reduction,
    Softmax,
)
from ..rules.attention import HalfEach, SoftmaxTaylor
from ..rules.passing import Proportional, Refill, SignalTakesAll, Uncrop
from ..rules.splitting import RatioSplit, SymmetricSplit
from . import attention, layers, moves, products, recurrence

# Rules of surrogate modules, unless the composite in use has another for them. Other surrogates are of a type that
# Zennit's composites know. Whether a surrogate may be part of a gate is its attribute ``in_gate``.
DEFAULT_RULES = (
    (Addition, RatioSplit()),
    (Gate, SignalTakesAll()),
    (Product, SymmetricSplit()),
    (MatrixProduct, HalfEach()),
    (Softmax, SoftmaxTaylor()),
    (Padding, Uncrop()),
    (Filling, Refill()),
    (Reduction, Proportional()),
)


class Entry(NamedTuple):
    '''What a function is for relevance: a handler ``(canonizer, call, function) -> output`` runs it.

    It is :py:func:`gradient` if that is the exact rule, None if there is no rule. Others are the position and default
    of an argument: that for training, the dimensions over which it goes (if these have the images, they are mixed), and
    that along which it takes elements apart.
    '''
    names: tuple  # as functions, methods, operators and in exported networks, without forms in place
    run: object = None
    training: tuple = None
    reduces: tuple = None
    takes: tuple = None


def gradient(canonizer, call, function):
    '''Run a function whose gradient is the rule.'''
    return function()


def _entry(names, run=None, kind=None, **properties):
    '''An entry for names, which may be a text, whose handler is told the class of the surrogate module, or the twin.'''
    names = tuple(names.split() if isinstance(names, str) else names)
    return Entry(names, run if kind is None else partial(run, kind=kind), **properties)


# The first dimension, by the name of the function: there is no argument of that position.
FIXED = (9, 0)
# Functions of each element in torch.special.
SPECIAL = '''
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammainc
    gammaincc gammaln i0 i0e i1 i1e log1p log_ndtr logit modified_bessel_i0 modified_bessel_i1 modified_bessel_k0
    modified_bessel_k1 multigammaln ndtr ndtri polygamma psi round scaled_modified_bessel_k0
    scaled_modified_bessel_k1 sinc spherical_bessel_j0 xlog1py xlogy zeta chebyshev_polynomial_t
    chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he
    laguerre_polynomial_l legendre_polynomial_p shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u
    shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w
'''.split()

TABLE = (
    # moves, selections, and what is the identity in evaluation
    _entry('''
        view view_as reshape reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim
        moveaxis adjoint squeeze unsqueeze contiguous clone expand expand_as repeat repeat_interleave tile
        broadcast_to broadcast_tensors as_strided pixel_shuffle pixel_unshuffle channel_shuffle to type type_as
        float double half bfloat16 cuda cpu detach requires_grad_ __get__ __set__ retain_grad register_hook
        fliplr dsplit hsplit diagonal linalg_diagonal narrow_copy atleast_1d atleast_2d atleast_3d meshgrid
        cartesian_prod combinations as_tensor asarray positive __pos__ nan_to_num resolve_conj resolve_neg conj
        conj_physical real native_channel_shuffle fft_fftshift fft_ifftshift pin_memory _to_copy _unsafe_view
        alias lift_fresh view_copy permute_copy transpose_copy t_copy squeeze_copy unsqueeze_copy select_copy
        slice_copy split_copy split_with_sizes_copy expand_copy unbind_copy unfold_copy diagonal_copy alias_copy
        detach_copy masked_select take fractional_max_pool2d fractional_max_pool3d
        fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices index
    ''', gradient),
    _entry('select unbind narrow index_select gather take_along_dim', gradient, takes=(1, 0)),
    _entry('''
        split chunk tensor_split roll split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk
    ''', gradient, takes=(2, 0)),
    _entry('flip', gradient, takes=(1, None)),
    _entry('rot90', gradient, takes=(2, (0, 1))),
    _entry('__iter__ __reversed__ flipud vsplit', gradient, takes=FIXED),
    _entry('kthvalue topk', gradient, reduces=(2, -1)),
    _entry('median nanmedian mode sort', gradient, reduces=(1, -1)),
    _entry('msort', gradient, reduces=FIXED),
    _entry('cummax cummin aminmax', gradient, reduces=(1, None)),
    _entry('dropout dropout1d dropout2d dropout3d', gradient, training=(2, True)),
    _entry('alpha_dropout feature_dropout feature_alpha_dropout', gradient, training=(2, False)),
    _entry('__getitem__', layers.index_),
    _entry('slice', layers.slice_),
    # sums and products
    _entry('add __add__ __radd__ __iadd__ sub subtract __sub__ __rsub__ __isub__ rsub', layers.add),
    _entry('''
        mul multiply __mul__ __rmul__ __imul__ div divide true_divide __truediv__ __itruediv__ __div__ __idiv__
        __rdiv__ __rtruediv__
    ''', products.multiply),
    _entry('addcmul', products.as_twin, products.addcmul),
    _entry('addcdiv', products.as_twin, products.addcdiv),
    _entry('lerp', products.as_twin, products.lerp),
    _entry('diff', products.as_twin, products.diff, reduces=(2, -1)),
    # element-wise functions and normalizations
    _entry('''
        relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh
        softplus softsign logsigmoid tanhshrink hardshrink softshrink threshold clamp clip clamp_min clamp_max neg
        negative __neg__ log_sigmoid _threshold fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
        abs absolute square pow float_power sqrt rsqrt reciprocal exp exp2 expm1 log log1p log2 log10 sin cos tan
        asin acos atan arcsin arccos arctan sinh cosh asinh acosh atanh arcsinh arccosh arctanh erf erfc erfinv
        sinc logit lgamma digamma polygamma mvlgamma i0 igamma igammac round floor ceil trunc fix frac sign sgn
        fmod remainder hypot atan2 arctan2 copysign ldexp xlogy deg2rad rad2deg nextafter __abs__ __pow__ __rpow__
        __ipow__ __mod__ __imod__ __rmod__ logaddexp logaddexp2
    ''', layers.unary, Activation),
    _entry((f'special_{name}' for name in SPECIAL), layers.unary, Activation),
    _entry('rrelu', layers.unary, Activation, training=(3, False)),
    _entry('maximum minimum fmax fmin', layers.extremum),
    _entry('max min amin', layers.extremum, reduces=(1, None)),
    _entry('layer_norm group_norm instance_norm native_layer_norm native_group_norm', layers.normalization),
    _entry('rms_norm local_response_norm', layers.unary, Normalization),
    _entry('normalize', layers.unary, Normalization, reduces=(2, 1)),
    _entry('''
        batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm
    ''', layers.normalization, training=(5, False)),
    _entry('_native_batch_norm_legit_no_training', layers.normalization),
    # it returns its statistics as well
    _entry('_fused_rms_norm', products.run_first_output, Normalization),
    _entry('glu', layers.gated_unit),
    # these pass relevance at the end of a network only
    _entry('softmax log_softmax special_softmax special_log_softmax', attention.softmax, reduces=(1, None)),
    _entry('_softmax _log_softmax', attention.softmax, reduces=(1, None)),
    # attention
    _entry('scaled_dot_product_attention', attention.scaled_dot_product, training=(4, 0.)),
    _entry('multi_head_attention_forward', attention.multi_head),
    # recurrences
    _entry('lstm gru rnn_tanh rnn_relu', recurrence.all_steps),
    _entry('lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell', recurrence.one_step),
    _entry('pad_sequence', products.as_twin, recurrence.pad_sequence),
    # averages, maxima and other functions over positions or dimensions
    _entry('''
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d
    ''', layers.pool, AveragePool),
    _entry('mean sum', layers.pool, AveragePool, reduces=(1, None)),
    _entry('''
        max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices
        adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
    ''', layers.pool, MaxPool),
    _entry('amax', layers.pool, MaxPool, reduces=(1, None)),
    _entry('''
        interpolate upsample upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
        upsample_trilinear3d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
    ''', products.interpolate),
    _entry('lp_pool1d', products.as_twin, partial(products.lp_pool, num=1)),
    _entry('lp_pool2d', products.as_twin, partial(products.lp_pool, num=2)),
    _entry('lp_pool3d', products.as_twin, partial(products.lp_pool, num=3)),
    _entry('dist', products.as_twin, products.dist),
    _entry('pairwise_distance', products.as_twin, products.pairwise_distance),
    _entry('cdist', products.as_twin, products.cdist),
    _entry('cosine_similarity', products.as_twin, products.cosine_similarity, reduces=(2, 1)),
    _entry('std var std_mean var_mean', moves.deviation, reduces=(1, None)),
    _entry('norm linalg_norm linalg_vector_norm', moves.norm, reduces=(2, None)),
    _entry('linalg_matrix_norm frobenius_norm', moves.norm),
    _entry('logsumexp special_logsumexp', moves.log_sum_exp, reduces=(1, None)),
    _entry('quantile nanquantile', moves.quantile, reduces=(2, None)),
    _entry('fold trapezoid trapz cumulative_trapezoid trace sum_to_size segment_reduce col2im', moves.add_up),
    _entry('cumsum nansum nanmean', moves.add_up, reduces=(1, None)),
    # products with constant weights
    _entry('linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d', layers.linear),
    _entry('convolution', layers.convolution),
    _entry('''
        matmul __matmul__ __rmatmul__ mm bmm mv dot vdot inner outer ger kron tensordot linalg_matmul
        linalg_vecdot _sparse_mm spmm dsmm hspmm
    ''', products.contract),
    _entry('einsum', products.einsum),
    _entry('bilinear', products.bilinear),
    _entry('addmm addmv addr baddbmm addbmm', products.add_product),
    _entry('chain_matmul linalg_multi_dot', products.multi_dot),
    _entry('deform_conv2d', products.deformable),
    _entry('affine_grid affine_grid_generator', products.as_twin, products.affine_grid),
    _entry('''
        roi_align ps_roi_align ps_roi_pool grid_sample grid_sampler grid_sampler_2d grid_sampler_3d
    ''', moves.sample, NonNegativeMap),
    # the largest elements, with zeros for regions without any
    _entry('roi_pool', moves.sample, Filling),
    # elements among others
    _entry('cat concat concatenate stack hstack vstack dstack column_stack row_stack', layers.concatenate),
    _entry('pad constant_pad_nd', layers.pad),
    _entry('''
        where masked_fill masked_scatter fill_diagonal_ tril triu fill_ zero_ diag diag_embed diagflat block_diag
        max_unpool1d max_unpool2d max_unpool3d index_put put diagonal_scatter _index_put_impl_
    ''', moves.place),
    _entry('index_fill scatter index_copy', moves.place, takes=(1, 0)),
    _entry('select_scatter slice_scatter', moves.place, takes=(2, 0)),
    _entry('scatter_add index_add scatter_reduce', moves.add_at, takes=(1, 0)),
    _entry('copy_', moves.copy),
    _entry('__setitem__', moves.assign),
    _entry('unfold im2col', moves.unfold),
    # no rule, but they may compute something from several images
    _entry('prod cumprod logcumsumexp softmin', reduces=(1, None)),
    _entry('argsort', reduces=(1, -1)),
)
# Forms in place have the entry of the function.
OPERATIONS = {form: entry for entry in TABLE for name in entry.names for form in (name, f'{name}_')}
# They are asked for more often than anything else.
TRANSPARENT = frozenset(name for name, entry in OPERATIONS.items() if entry.run is gradient)
TRAINING = {name: entry.training for name, entry in OPERATIONS.items() if entry.training}
# Handlers that run a function through a surrogate whatever it is given, which leaves no node of its own in the graph.
COVERING = (
    layers.unary, layers.normalization, layers.gated_unit, layers.linear, layers.convolution, products.multiply,
    products.interpolate, products.contract, moves.deviation, moves.norm, moves.log_sum_exp, moves.add_up,
    attention.softmax,
)
COMPLEX_FUNCTIONS = frozenset('view_as_complex complex polar stft istft linalg_eig cfloat cdouble chalf'.split())


def _is_covered(run):
    return run is None or getattr(run, 'func', run) in COVERING or (
        isinstance(run, partial) and run.keywords == {'kind': AveragePool}
    )


# Names of nodes that only functions have which nobody intercepted. What ReLUs of these pass is right where it matters,
# and of segments, the gradient may be the rule.
HIDDEN = frozenset(
    name.replace('_', '') for entry in TABLE if _is_covered(entry.run) for name in entry.names
) - {'relu', 'segmentreduce'} | {'prelukernel', 'rsub'}


def is_training(func, name, args, kwargs):
    '''Whether a function for training has an output for a sample that depends on chance or on the other samples.'''
    position, default = TRAINING[name]
    given = dict(enumerate(args))
    flags = (kwargs[key] for key in ('training', 'train', 'dropout_p') if key in kwargs)
    if not given.get(position, next(flags, default)):
        return False
    if 'dropout' in name:
        return given.get(1, kwargs.get('p', .5)) > 0
    if 'batch_norm' not in name:
        return True
    given = layers.norm_arguments(func, name, args, kwargs)
    # without statistics, it may be a normalization of another kind, of a tensor that was reshaped to have no examples
    return given.get('running_mean') is not None or len(given['input']) > 1


def handle(canonizer, call, function):
    '''Run a function on tensors that carry relevance.'''
    target = function.kwargs.get('out') if function.kwargs else None
    if isinstance(target, torch.Tensor):
        # surrogates build no graph for it, and PyTorch does not either
        kwargs = {key: elem for key, elem in function.kwargs.items() if key != 'out'}
        output = handle(canonizer, call, function._replace(kwargs=kwargs))
        return (target if target.shape == output.shape else target.resize_(output.shape)).copy_(output)
    entry = OPERATIONS.get(function.name)
    handler = None if entry is None else entry.run
    is_complex = any(elem.is_complex() if isinstance(elem, torch.Tensor) else isinstance(elem, complex) for elem in (
        *function.tensors(), *function.args, *function.kwargs.values()
    ))
    if handler is not None and not is_complex:
        target = function.target
        if target is not None and not target.requires_grad and base_of(target) is not None:
            return moves.write(canonizer, call, function, target, lambda changed: handler(canonizer, call, changed))
        return handler(canonizer, call, function)
    is_complex = is_complex or function.name.startswith('fft_') or function.name in COMPLEX_FUNCTIONS
    return canonizer.refuse(call, function, (
        'it computes with complex numbers, which have no positive or negative parts for a rule' if is_complex
        else 'no rule covers it'
    ))
