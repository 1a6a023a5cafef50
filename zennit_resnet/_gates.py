'''Gates and softmaxes in the autograd graph, those that a network writes out with other functions included.'''
import torch
from zennit.types import Activation, AvgPool, MaxPool

from ._autograd import (
    LAYERS,
    adds_vector,
    back,
    bounds_of,
    exponent_of,
    is_layer,
    is_move,
    module_of,
    nodes_of,
    parents_of,
    reorders,
    rule_of,
    stem_of,
    walk,
)
from .layer import Gate, MatrixProduct, NonNegativeMap, Operation

# Functions, and modules in place of them, whose output is a gate.
SIGMOIDS = frozenset('sigmoid hardsigmoid softmax expit ndtr'.split())
# Functions whose output may be anything, whatever they are given.
UNBOUNDED = frozenset('exp exp_ exp2 exp2_ special_exp2 __rpow__'.split())
# Logarithms of sigmoids, and of what is one more than an exponential.
LOG_SIGMOIDS = frozenset('logsigmoid logsoftmax'.split())
SOFTPLUS = frozenset('softplus logaddexp'.split())
NEGATIONS = frozenset('neg negative rsub'.split())
EXPONENTIALS = frozenset('exp exp2 rpow'.split())
LOWER, UPPER = (frozenset(names.split()) for names in (
    'clamp clampmin clamp_min relu maximum max fmax threshold', 'clamp clampmax clamp_max minimum min fmin'
))
# Parts of the names of functions, and modules in place of them, whose output is a gate if the input is one.
SHIFT_NODES, SCALE_NODES = ('Add', 'Sub', 'Rsub'), ('Mul', 'Div', 'Neg')
AVERAGE_NODES = ('Pool', 'Upsample', 'Mean', 'Sum')
CLIP_NODES = ('Clamp', 'Hardtanh', 'Relu', 'Where', 'Masked', 'Maximum', 'Minimum')
COMBINES = (Activation, AvgPool, MaxPool, torch.nn.Upsample)
# Functions that scale or bound a sum, as a softmax that is written out may do with that of its exponentials.
SCALINGS = frozenset('add sub mul div truediv clamp clamp_min clampmin clip neg'.split())
INVERSES = frozenset('reciprocal pow div truediv rtruediv rdiv'.split())
# Functions that a softmax may be written with.
SOFT = frozenset('exp exp2 expm1 logsumexp logaddexp softplus sigmoid tanh softmax logsoftmax logsigmoid'.split())


def is_gate(tensor, with_tanh=True):
    '''Whether a tensor was computed from outputs of sigmoids alone, without any layer in between: 1 - g.sigmoid().'''
    if tensor.grad_fn is None:
        return False
    own = walk([tensor.grad_fn], ends=lambda node: _is_sigmoid(node, with_tanh))
    return all(_is_sigmoid(node, with_tanh) or _combines(node) for node in own)


def end_of(node):
    '''The last function before an output that does more than moving, selecting or averaging elements.'''
    return back(node, lambda node: (
        isinstance(module_of(node), AvgPool) or reorders(node) or any(key in stem_of(node) for key in AVERAGE_NODES)
    ))[0]


def is_shift(tensor, other):
    '''Whether another tensor has the largest elements of a tensor, as in h - h.amax(1, keepdim=True).'''
    node = _skip(other.grad_fn)
    return _name_of(node) in ('max', 'amax') and len(parents_of(node)) == 1 and (
        _skip(parents_of(node)[0]) is _skip(tensor.grad_fn)
    )


def is_log_sum(node):
    '''Whether a function is the logarithm of a sum of exponentials: h.logsumexp(1), h.exp().sum(1).log().'''
    node = _skip(node, ('neg', 'negative'))
    name, lower = _name_of(node), () if node is None else parents_of(node)
    if name == 'add' and len(lower) == 2:
        # the largest element, and the rest of the sum
        return any(map(is_log_sum, lower))
    return name == 'logsumexp' or name == 'log' and summed_by(lower[0]) is not None


def are_probabilities(values):
    '''Whether elements along a dimension other than that of examples sum to one, or their exponentials do.'''
    if not values.is_floating_point() or not values.numel():
        return False
    values = values.detach()
    tolerance, candidates = min(1e3 * torch.finfo(values.dtype).eps, 1e-2), [values.exp()]
    if bool((values >= 0).all()):
        candidates = [values, (-values).exp()]
    return any(
        length > 1 and bool(((elem.sum(dim) - 1).abs() <= tolerance).all())
        for elem in candidates for dim, length in enumerate(values.shape) if dim or values.ndim == 1
    )


def summed_by(node, is_inverse=False):
    '''The exponential which a function sums up, also as an inverse: h.exp() of 1 / h.exp().sum(1). Otherwise None.'''
    if is_inverse:
        node = _skip(node, INVERSES)
    node = _skip(node, SCALINGS)
    below = _skip(parents_of(node)[0], SCALINGS) if _name_of(node) == 'sum' else None
    return below if _name_of(below) == 'exp' else None


def is_part(node, total):
    '''Whether a function has elements of an exponential, or of one of the same tensor: h.exp()[:, 0] for h.exp().'''
    node = back(node, reorders)[0]
    return _name_of(node) == 'exp' and _exponents(node) == _exponents(total)


def _exponents(node):
    '''What an exponential is computed from, before it is moved, scaled and shifted by its largest element.'''
    def is_end(node):
        return not (reorders(node) or _name_of(node) in SCALINGS | {'max', 'amax'})

    return set(filter(is_end, walk(parents_of(node), ends=is_end)))


def _normalizes(node):
    '''Whether a function of two is a softmax, as h.exp() / h.exp().sum(1), or its logarithm: h - h.logsumexp(1).'''
    lower, name = parents_of(node), _name_of(node)
    if len(lower) != 2 or name not in ('sub', 'add', 'div', 'mul'):
        return False
    if name in ('sub', 'add'):
        return any(map(is_log_sum, lower))
    return any(summed_by(elem, name == 'mul') is not None for elem in lower)


def softmaxes_before(outputs):
    '''Softmaxes after the last layers before the outputs of a network, written out or not, by their graphs.'''
    def is_softmax(node):
        return _name_of(node) in ('softmax', 'logsoftmax') or _normalizes(node)

    def is_end(node):
        return is_softmax(node) or is_layer(node) or stem_of(node) in LAYERS or not parents_of(node)

    found = list(walk(nodes_of(outputs), ends=is_end))
    softmaxes = [node for node in found if is_softmax(node)]
    return softmaxes, len(softmaxes) == sum(map(is_end, found)), set(map(_name_of, found))


def _name_of(node):
    '''Name of the function that a node is of, which may have run through a module.'''
    if node is None:
        return ''
    module = module_of(node)
    if isinstance(module, Operation):
        return module.name.strip('_').replace('special_', '').replace('log_s', 'logs')
    if module is not None and rule_of(node) is not None:
        kind = next(base for base in type(module).__mro__ if base.__module__.startswith('torch.nn.'))
        return kind.__name__.lower()
    return stem_of(node).lower().replace('special', '')


def _skip(node, names=()):
    '''The function before those that move elements, and those of some names.'''
    return back(node, lambda node: _name_of(node) in names or is_move(node))[0]


def is_weighting(tensor, other):
    '''Whether a tensor comes from a sigmoid or softmax on a way of its own, on which there is no other such product.'''
    shared = set(walk([other.grad_fn]))
    own = walk([tensor.grad_fn], shared, lambda node: isinstance(module_of(node), (MatrixProduct, NonNegativeMap)))
    return any(_is_sigmoid(node, False) for node in own)


def _is_sigmoid(node, with_tanh):
    '''Whether a function is a sigmoid, which may be one that networks write as a shift, clipped on both sides.'''
    module, name = module_of(node), _name_of(node)
    if _is_tanh(node):
        return with_tanh
    if name in SIGMOIDS or _is_logistic(node, name):
        return True
    if _shifts(node):
        # one and a hyperbolic tangent
        below = _unscaled(node)
        return below is not None and _is_tanh(below)
    if not _clips(node, module):
        # on one side after the other
        below = _skip(parents_of(node)[0]) if len(parents_of(node)) == 1 else None
        if not any(name in first and _name_of(below) in other for first, other in ((LOWER, UPPER), (UPPER, LOWER))):
            return False
        node = below
    below = _unscaled(node)
    return below is not None and _shifts(below)


def _shifts(node):
    return stem_of(node) in SHIFT_NODES and _adds_number(node)


def _adds_number(node):
    '''Whether a sum adds a number. A bias or an embedding of positions is no part of a sigmoid.'''
    return len(parents_of(node)) == 1 and not adds_vector(node)


def _unscaled(node):
    '''The function before one, and before those that scale its result, None if there are several.'''
    lower = parents_of(node)
    while len(lower) == 1 and _scales(lower[0]):
        lower = parents_of(lower[0])
    return lower[0] if len(lower) == 1 else None


def _is_tanh(node):
    '''Whether a function is a hyperbolic tangent, or clips between minus one and one.'''
    if _name_of(node) in ('tanh', '_tanh'):
        return True
    module = module_of(node)
    bounds = getattr(module, 'bounds', None)
    if isinstance(module, torch.nn.Hardtanh) and not isinstance(module, torch.nn.ReLU6):
        bounds = module.min_val, module.max_val
    bounds = bounds_of(node) or bounds
    return bounds is not None and all(isinstance(elem, (int, float)) for elem in bounds) and bounds == (-1, 1)


def _is_logistic(node, name):
    '''Whether a function is a sigmoid or softmax that is written out with exponentials.'''
    lower = parents_of(node)
    if len(lower) != 1:
        return False
    below = _skip(lower[0])
    if name == 'exp':
        below_name = _name_of(below)
        if below_name == 'sub' and len(parents_of(below)) == 2:
            # h - softplus(h)
            return any(_is_softplus(elem) or is_log_sum(elem) for elem in parents_of(below))
        return below_name in LOG_SIGMOIDS or below_name in NEGATIONS and _is_softplus(parents_of(below)[0])
    if name == 'mul':
        # what PyTorch makes of a number that is divided
        below, name = _skip(parents_of(below)[0]) if _name_of(below) == 'reciprocal' else None, 'reciprocal'
    is_inverse = name in ('reciprocal', 'rtruediv', 'rdiv', 'div', 'truediv')
    exponent = exponent_of(node)
    return (is_inverse or isinstance(exponent, (int, float)) and exponent == -1) and is_one_more(below)


def _is_softplus(node):
    '''Whether a function is the logarithm of what is one more than an exponential: (1 + h.exp()).log().'''
    node = _skip(node)
    name = _name_of(node)
    if name not in ('log', 'log1p'):
        return name in SOFTPLUS
    below = _skip(parents_of(node)[0])
    return is_one_more(below) if name == 'log' else _is_exponential(below)


def is_one_more(node):
    '''Whether a function adds a number to an exponential: 1 + h.exp().'''
    node = _skip(node)
    if _name_of(node) not in ('add', 'radd') or not _adds_number(node):
        return False
    return _is_exponential(_skip(parents_of(node)[0]))


def _is_exponential(node):
    '''Whether a function has its argument as an exponent.'''
    return _name_of(node) in EXPONENTIALS or node is not None and (
        node.name() in ('PowBackward1', 'PowBackward2') and isinstance(exponent_of(node), torch.Tensor)
    )


def _clips(node, module):
    '''Whether a function clips its input on both sides.'''
    if isinstance(module, (torch.nn.ReLU6, torch.nn.Hardtanh)) or 'Hardtanh' in node.name():
        return True
    if 'Clamp' in node.name():
        return None not in (bounds_of(node) or (None,))
    return getattr(module, 'is_clipped', False)


def _scales(node):
    '''Whether a function moves or scales what it is given.'''
    stem = stem_of(node)
    return isinstance(module_of(node), Gate) or stem in SCALE_NODES or is_move(node)


def _combines(node):
    '''Whether a function moves, averages, scales, clips or adds up what it is given.'''
    stem, module = stem_of(node), module_of(node)
    if isinstance(module, Operation) and module.name in UNBOUNDED:
        return False
    return (
        getattr(module, 'in_gate', False) or isinstance(module, COMBINES) or _scales(node) or reorders(node)
        or stem in (*SHIFT_NODES, 'CopySlices') or any(key in stem for key in AVERAGE_NODES + CLIP_NODES)
    ) and bool(parents_of(node))
