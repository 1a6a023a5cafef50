'''Products of tensors: gates, matrix products with a constant, and functions that can be written with these.'''
import math
import string

import torch
import torch.nn.functional as F

from .._autograd import is_non_negative
from .._compat import is_recorded
from .._gates import are_probabilities, is_gate, is_one_more, is_part, is_weighting, summed_by
from ..layer import (
    LINEAR,
    Activation,
    AveragePool,
    FullyConnected,
    Gate,
    LinearMap,
    MatrixProduct,
    NonNegativeMap,
    NonNegativeProduct,
    Product,
    Resampling,
    WeightedMap,
)
from .functions import ALIASES, FunctionCall, become, out_of_place, run_twin

# Products to which a tensor is added, with the arguments they have and the products they add.
ADDED_PRODUCTS = {
    'addmm': (('mat1', 'mat2'), torch.mm), 'addmv': (('mat', 'vec'), torch.mv), 'addr': (('vec1', 'vec2'), torch.outer),
    'baddbmm': (('batch1', 'batch2'), torch.bmm),
    'addbmm': (('batch1', 'batch2'), lambda left, right: torch.bmm(left, right).sum(0)),
}
# Weights of these modes of interpolation have no negative sign.
NON_NEGATIVE = frozenset('nearest nearest-exact area linear bilinear trilinear'.split())
# Settings of poolings.
WINDOWS = {
    'kernel_size': None, 'output_size': None, 'stride': None, 'dim': None, 'padding': 0, 'dilation': 1,
    'ceil_mode': False,
}


def find_signal(factors, by_size=True):
    '''Index of the signal among factors, None if ambiguous.'''
    # of the product of both, which LSTMs have, a tanh is the signal
    for with_tanh in (True, False):
        gates = [is_gate(elem, with_tanh) for elem in factors]
        if gates.count(False) == 1:
            return gates.index(False)
    left, right = factors[0].numel(), factors[-1].numel()
    if not by_size or len(factors) > 2 or left == right:
        return None
    return 0 if left > right else 1


def run_for_signal(canonizer, call, kind, function, signal, **settings):
    '''Run a function with all tensors but one as constants. One of the constants may be changed in place.'''
    target = function.args[0] if function.args and function.is_inplace else signal
    if target is signal:
        return canonizer.run(call, kind, function.keep(signal), **settings)
    return become(target, canonizer.run(call, kind, function.out_of_place().keep(signal), **settings))


def run_first_output(canonizer, call, function, kind, **settings):
    '''Run a function that returns several tensors: the first has the rule, the others are constants.'''
    with torch.no_grad():
        _, *others = function()
    return (canonizer.run(call, kind, function.part(0, is_copied=False), **settings), *others)


def multiply(canonizer, call, function):
    '''A product or quotient of two factors, element by element.'''
    left, right = function.operands()
    is_division = 'div' in function.name
    if len(function.active) == 1:
        signal, = function.active
        is_divisor = is_division and signal is (left if function.name in ('__rdiv__', '__rtruediv__') else right)
        if is_divisor:
            # a constant divided by a tensor is a function of each element, as its reciprocal is
            return run_for_signal(canonizer, call, Activation, function, signal)
        found, constant = canonizer.merge.find(signal), right if signal is left else left
        output = run_for_signal(canonizer, call, Gate, function, signal)
        if found is not None:
            canonizer.merge.note(found, signal, output, 1 / constant if is_division else constant)
        return output
    if left is right and not is_division:
        # a square
        func = function.func
        square = FunctionCall(lambda input: func(input, input), function.name, (left,), {}, [left])
        return canonizer.run(call, Activation, square)
    signal = _exponentials(left, right, is_division)
    if signal is not None:
        # a softmax
        function = function.renamed('softmax')
        output = run_for_signal(canonizer, call, Gate, function, signal)
        canonizer.note_softmax(call, 'softmax', output, is_passed=True)
        return output
    signal = 0 if is_division else find_signal([left, right])
    if is_division and is_one_more(right.grad_fn) and bool(((right - left).detach() - 1).abs().amax() <= 1e-3):
        # e^h / (e^h + 1)
        function = function.renamed('sigmoid')
    if signal is None:
        # none or both were computed from sigmoids alone
        return canonizer.run(call, Product, function)
    # the gate counts as a constant, what computes it is not visited in the backward pass
    return run_for_signal(canonizer, call, Gate, function, (left, right)[signal])


def _exponentials(left, right, is_division):
    '''The factor that has exponentials, if the other normalizes them by their sum, as a softmax does.'''
    for signal, other in [(left, right)] if is_division else [(left, right), (right, left)]:
        total = summed_by(other.grad_fn, not is_division)
        if total is None:
            continue
        if is_part(signal.grad_fn, total):
            return signal
        with torch.no_grad():
            values = signal / other if is_division else signal * other
        if are_probabilities(values):
            return signal
    return None


def _product_of_weights(canonizer, call, function, run, is_sum=True):
    '''Run a product of weights by ``run(function, signal, constants, kind)``, or one of two signals, or refuse it.'''
    index, gates = 0, []
    if len(function.active) > 1:
        index = _find_value(canonizer, function.active)
        gates = [elem for num, elem in enumerate(function.active) if num != index]
    if index is not None:
        signal = function.active[index]
        # by the graph alone: values would give the examples of a batch rules that depend on each other
        is_positive = gates and all(map(is_non_negative, gates)) and all(
            not is_recorded(elem) and bool((elem >= 0).all()) for elem in function.tensors() if not elem.requires_grad
        )
        function = function.keep(signal)
        constants = [elem for elem in function.tensors() if elem is not signal]
        if is_sum and is_positive:
            return canonizer.run(call, NonNegativeProduct, function)
        return run(function, signal, constants, WeightedMap if gates else LinearMap)
    if len(function.active) == 2:
        return canonizer.run(call, MatrixProduct, function.distinct())
    shapes = ', '.join(str(tuple(elem.shape)) for elem in function.active)
    return canonizer.refuse(call, function, f'it is a product of more than two that do (shapes {shapes})')


def _find_value(canonizer, factors):
    '''Index of the factor of a product over dimensions which the others weight, None if both count as signals.'''
    if canonizer.attention == 'half' or len({id(elem) for elem in factors}) == 1:
        return None
    signal = find_signal(factors, False)
    if signal is None and len(factors) == 2:
        weights = [is_weighting(*factors), is_weighting(*factors[::-1])]
        signal = weights.index(False) if weights.count(False) == 1 else None
    return signal


def contract(canonizer, call, function):
    '''A product of two tensors over dimensions, which is linear in the one that is no constant.'''
    def run(function, signal, constants, kind):
        constant, = constants
        is_product = function.name in ('matmul', '__matmul__', 'mm', 'linalg_matmul') and constant.ndim == 2
        if kind is LinearMap and is_product and function.tensors()[0] is signal and constant.layout is torch.strided:
            func = function.func
            return run_as_layer(canonizer, call, function.name, signal, (
                lambda input, weight, bias: func(input, weight.T)
            ), constant.T, None)
        return run_as_map(canonizer, call, function, function.rebind(signal, constant), constant, kind)

    return _product_of_weights(canonizer, call, function, run)


def run_as_layer(canonizer, call, name, input, func, weight, bias, **settings):
    '''Run ``func``, ``(input, weight, bias, **settings)``, as the layer of its name, by default a linear one.'''
    surrogate = canonizer.surrogate_for(call, LINEAR.get(name, FullyConnected), name)
    surrogate.set_call(func, weight, bias, **settings)
    return canonizer.run_covered(lambda: surrogate(input), [input])


def run_as_map(canonizer, call, function, product, weight, kind=LinearMap):
    '''Run a function of one tensor, which is a product with a constant.'''
    signal, = function.active
    surrogate = canonizer.surrogate_for(call, kind, function.name)
    surrogate.set_product(product, weight if weight.layout is torch.strided else weight.to_dense(), function.rebind())
    return canonizer.run_covered(lambda: surrogate(signal), [signal])


@out_of_place
def add_product(canonizer, call, function):
    '''A matrix product to which a tensor is added.'''
    names, product = ADDED_PRODUCTS[function.name]
    given = function.bind('input', *names)
    added, left, right = (given[key] for key in ('input', *names))
    alpha, beta = given.get('alpha', 1), given.get('beta', 1)
    factors = [elem for elem in (left, right) if elem.requires_grad]
    if not factors:
        # the product is added as a constant
        return function() if beta == 1 else canonizer.run(call, Gate, function)
    is_layer = function.name == 'addmm' and (alpha, beta) == (1, 1) and added.ndim == 1
    if is_layer and not added.requires_grad and factors[0] is left and not right.requires_grad:
        func = function.func
        return run_as_layer(canonizer, call, function.name, left, (
            lambda input, weight, bias: func(bias, input, weight.T)
        ), right.T, added)
    if alpha != 1 and len(factors) == 1:
        # a factor with a negative sign is one of the weights'
        left, right = (elem if elem.requires_grad else alpha * elem for elem in (left, right))
        alpha = 1

    def twin():
        other, output = added if beta == 1 else added * beta, product(left, right)
        return torch.add(output if alpha == 1 else output * alpha, other)

    return run_twin(canonizer, function, twin)


def einsum(canonizer, call, function):
    '''A sum of products in Einstein's notation.'''
    # numbers in the place of letters are none by now
    inputs, output, operands = subscripts(*function.args)
    # a sum over a single position is none
    sums = {letter for key, elem in zip(inputs, operands) for letter, size in zip(key, elem.shape)
            if letter not in output and size > 1}
    is_product = not sums and set(output) <= set(''.join(inputs)) and all(
        len(set(key)) == len(key) for key in (*inputs, output)
    )
    if len(operands) > 1 and is_product:
        return _multiply_aligned(canonizer, call, function, inputs, output, operands)
    if len(operands) > 1:
        return _contract_many(canonizer, call, function, inputs, output, operands)
    # sums over positions, or a permutation or diagonal, whose gradient is the rule
    return function() if set(inputs[0]) <= set(output) else canonizer.run(call, NonNegativeMap, function, examples=None)


def _multiply_aligned(canonizer, call, function, inputs, output, operands):
    '''A product of elements, without a sum, of tensors whose dimensions have letters.'''
    def aligned(key, elem):
        if not set(key) <= set(output):
            elem = elem[tuple(slice(None) if letter in output else 0 for letter in key)]
            key = ''.join(letter for letter in key if letter in output)
        order = [key.index(letter) for letter in output if letter in key]
        elem = elem if order == sorted(order) else elem.permute(order)
        for num, letter in enumerate(output):
            elem = elem if letter in key else elem.unsqueeze(num)
        return elem

    def run(picked, signal, constants, kind):
        def twin():
            product = aligned(next(key for key, elem in zip(inputs, operands) if elem is signal), signal)
            for key, elem in zip(inputs, operands):
                product = product if elem is signal else product * aligned(key, elem.detach())
            return product

        return run_twin(canonizer, function, twin)

    return _product_of_weights(canonizer, call, function, run, is_sum=False)


def subscripts(equation, *operands):
    '''Letters of all operands and the output, with letters in the place of dots, and the operands.'''
    operands = list(operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands)
    inputs, arrow, output = equation.replace(' ', '').partition('->')
    inputs = inputs.split(',')
    free = [elem for elem in string.ascii_letters if elem not in equation]
    num = max(elem.ndim - len(key.replace('...', '')) for key, elem in zip(inputs, operands))
    dots = ''.join(free[:num])
    inputs = [
        key.replace('...', dots[num - (elem.ndim - len(key.replace('...', ''))):]) if '...' in key else key
        for key, elem in zip(inputs, operands)
    ]
    if arrow:
        return inputs, output.replace('...', dots), operands
    letters = ''.join(inputs)
    return inputs, dots * ('...' in equation) + ''.join(
        key for key in sorted(set(letters)) if letters.count(key) == 1 and key not in dots
    ), operands


def multi_dot(canonizer, call, function):
    '''A product of several matrices. The first and the last may be vectors.'''
    operands = function.tensors()
    inputs = [string.ascii_letters[num:num + 2] for num in range(len(operands))]
    if operands[0].ndim == 1:
        inputs[0] = inputs[0][1:]
    if operands[-1].ndim == 1:
        inputs[-1] = inputs[-1][:1]
    return _contract_many(canonizer, call, function, inputs, inputs[0][:-1] + inputs[-1][1:], operands)


def _contract_many(canonizer, call, function, inputs, output, operands):
    '''A sum of products of two or more tensors, given the letters of the dimensions of each and of the output.'''
    def run(function, signal, constants, kind):
        own = next(key for key, elem in zip(inputs, operands) if elem is signal)
        others = [key for key, elem in zip(inputs, operands) if elem is not signal]
        kept, weight = others[0], constants[0]
        if len(constants) > 1:
            # they multiply each other to the weight of one layer
            kept = ''.join(key for key in sorted(set(''.join(others))) if key in own + output)
            weight = torch.einsum(f'{",".join(others)}->{kept}', *constants)
        equation = f'{own},{kept}->{output}'
        return run_as_map(canonizer, call, function, lambda *factors: torch.einsum(equation, *factors), weight, kind)

    return _product_of_weights(canonizer, call, function, run)


def bilinear(canonizer, call, function):
    given = {'bias': None, **function.bind('input1', 'input2', 'weight', 'bias')}
    left, right, weight, bias = (given[key] for key in ('input1', 'input2', 'weight', 'bias'))
    if any(elem is not None and elem.requires_grad for elem in (weight, bias)):
        return canonizer.refuse(call, function, 'its weights do')
    return run_twin(canonizer, function, lambda: (
        torch.einsum('...i,kij,...j->...k', left, weight, right) + (0 if bias is None else bias)
    ))


def deformable(canonizer, call, function):
    '''A deformable convolution whose offsets and mask count as constants.'''
    names = ('input', 'weight', 'offset', 'mask', 'bias')
    given = function.bind(*names)
    input, weight = given['input'], given['weight']
    if not input.requires_grad or weight.requires_grad:
        return canonizer.refuse(call, function, 'its weights or places do')
    mask = given['mask']
    # a graph has no values
    if not is_non_negative(mask) and (is_recorded(mask) or bool((mask < 0).any())):
        return canonizer.refuse(call, function, 'its mask has negative values')
    function = function.keep(input)
    bias = function.bind(*names)['bias']
    product = function.put(bias, torch.zeros_like(bias)).rebind(input, weight)
    return run_as_map(canonizer, call, function, product, weight)


@out_of_place
def as_twin(canonizer, call, function, kind):
    '''Run a function with the rules of a twin: a function of the same arguments that is written with others.'''
    kwargs = {ALIASES.get(key, key): elem for key, elem in function.kwargs.items()}
    return run_twin(canonizer, function, lambda: kind(*function.args, **kwargs))


def lerp(input, end, weight):
    return torch.add(input * (1 - weight), end * weight)


def addcmul(input, tensor1, tensor2, value=1):
    return torch.add(input, torch.mul(tensor1, tensor2), alpha=value)


def addcdiv(input, tensor1, tensor2, value=1):
    return torch.add(input, torch.div(tensor1, tensor2), alpha=value)


def lp_pool(input, norm_type, kernel_size, stride=None, ceil_mode=False, *, num):
    '''A mean of powers over windows of some dimensions. Relevance passes the powers.'''
    pool, power = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[num - 1], float(norm_type)
    return pool(input.pow(power), kernel_size, stride, 0, ceil_mode).pow(1 / power)


def dist(input, other, p=2):
    return torch.linalg.vector_norm(input - other + 0., float(p))


def cdist(x1, x2, p=2, compute_mode=None):
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3) + 0., float(p), -1)


def pairwise_distance(x1, x2, p=2, eps=1e-6, keepdim=False):
    return torch.linalg.vector_norm(x1 - x2 + eps, float(p), -1)


def cosine_similarity(x1, x2, dim=1, eps=1e-8):
    '''A product of normalized tensors. Relevance passes the normalization.'''
    return torch.sum(F.normalize(x1, dim=dim) * F.normalize(x2, dim=dim), dim)


def diff(input, n=1, dim=-1, prepend=None, append=None):
    if not n:
        return input.clone()
    parts = [elem for elem in (prepend, input, append) if elem is not None]
    output = torch.cat(parts, dim) if len(parts) > 1 else input
    for _ in range(n):
        length = output.shape[dim] - 1
        output = output.narrow(dim, 1, length) - output.narrow(dim, 0, length)
    return output


def affine_grid(theta, size, align_corners=None):
    '''Places of an affine transformation, which are a product with fixed places.'''
    unit = torch.eye(theta.shape[1], theta.shape[2]).to(theta)[None]
    places = F.affine_grid(unit, [1, *size[1:]], align_corners or False)[0]
    places = torch.cat([places, torch.ones_like(places[..., :1])], -1)
    return torch.einsum('...k,bjk->b...j', places, theta) + 0


def nansum(input, dim=None, keepdim=False, dtype=None):
    '''A sum of elements. Those that are NaN receive nothing.'''
    return torch.where(input.isnan(), 0., input).sum(dim, keepdim, dtype=dtype)


def nanmean(input, dim=None, keepdim=False, dtype=None):
    return nansum(input, dim, keepdim, dtype) / (~input.isnan()).sum(dim, keepdim)


def interpolate(canonizer, call, function):
    '''An interpolation whose weights of both signs are separated.'''
    given = function.bind('input', 'size', 'scale_factor', 'mode')
    is_bicubic = 'bicubic' in function.name or given.get('mode', 'nearest') not in NON_NEGATIVE and (
        function.name in ('interpolate', 'upsample')
    )
    if is_bicubic:
        matrices = _matrices(function)
        if any(bool((elem < 0).any()) for elem in matrices):
            return canonizer.run(call, Resampling, function, matrices=matrices)
    return canonizer.run(call, AveragePool, function, **WINDOWS)


def _matrices(function):
    '''The map of each spatial dimension: what it makes of unit vectors that vary along no other dimension.'''
    input, = function.active
    shape, matrices = input.shape[2:], []
    dtype = input.dtype if input.dtype in (torch.float32, torch.float64) else torch.float32
    for dim, length in enumerate(shape):
        unit = torch.eye(length, dtype=dtype, device=input.device)
        unit = unit[(None, slice(None), *(slice(None) if num == dim else None for num in range(len(shape))))]
        # a limited number at a time, as each has the size of the input
        parts = unit.expand(1, length, *shape).split(max(2 ** 22 // math.prod(shape), 1), 1)
        values = torch.cat([function.put(input, elem)() for elem in parts], 1)[0]
        matrices.append(values[(slice(None), *(slice(None) if num == dim else 0 for num in range(len(shape))))].T)
    return matrices
