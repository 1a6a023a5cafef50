'''Queries on the autograd graph: the only module that reads the names, numbers and saved fields of its nodes.

``tests/test_autograd.py`` has a canary for each name that is read here: another name would silently make gates of
signals, or have operations attributed to other layers.
'''
import functools
import types

import torch
from zennit.types import Activation, AvgPool, Convolution, Linear, MaxPool

from ._compat import DisableTorchFunction
from .layer import Addition, Gate, MatrixProduct, NonNegativeMap, Operation, Signed

# Functions, and modules in place of them, of which the output has no negative values.
RELUS = frozenset('relu relu_ relu6 Relu Sigmoid Softmax Softplus'.split())
RELU_MODULES = tuple(
    getattr(torch.nn, name) for name in 'ReLU ReLU6 Sigmoid Hardsigmoid Softmax Softplus'.split()
)
SIGMOIDS = frozenset('sigmoid hardsigmoid softmax expit ndtr'.split())
# Functions of which the output may be anything, whatever they are given.
UNBOUNDED = frozenset('exp exp_ exp2 exp2_ special_exp2 __rpow__'.split())
# Logarithms of sigmoids, and of what is one more than an exponential.
LOG_SIGMOIDS = frozenset('logsigmoid logsoftmax'.split())
SOFTPLUS = frozenset('softplus logaddexp'.split())
NEGATIONS = frozenset('neg negative rsub'.split())
EXPONENTIALS = frozenset('exp exp2 rpow'.split())
LOWER, UPPER = (frozenset(names.split()) for names in (
    'clamp clampmin clamp_min relu maximum max fmax threshold', 'clamp clampmax clamp_max minimum min fmin'
))
COPIES = ('Clone', 'ToCopy')
# Functions that move elements along the dimensions they name.
REORDERS = (
    'Stack', 'Cat', 'Unbind', 'Select', 'Slice', 'Split', 'Transpose', 'Permute', 'Flip', 'Roll', 'Index', 'TBackward',
    'Gather', 'Scatter', 'Topk', 'Sort', 'Kthvalue', 'Median', 'Nanmedian', 'Mode', 'Cummax', 'Cummin', 'Diagonal',
)
# Functions that do so regardless of dimensions.
SCATTERS = ('MaskedSelect', 'MaskedScatter', 'Take', 'Put')
# 'CopySlices' is what a change of a view makes of the whole tensor, and no move.
MOVES = (
    'View', 'Expand', 'queeze', 'Permute', 'Transpose', 'Clone', 'ToCopy', 'CopyBackwards', 'Identity',
    'BackwardHookFunction',
)
# Functions that pick elements in another order.
PICKS = frozenset('Flip Roll Index IndexSelect Slice'.split())
# Functions, and modules in place of them, of which the output is a gate if all that they are given is one.
SHIFTS, SCALES = ('Add', 'Sub', 'Rsub'), ('Mul', 'Div', 'Neg')
AVERAGES = ('Pool', 'Upsample', 'Mean', 'Sum')
CLIPS = ('Clamp', 'Hardtanh', 'Relu', 'Where', 'Masked', 'Maximum', 'Minimum')
COMBINES = (Activation, AvgPool, MaxPool, torch.nn.Upsample)
# Functions that scale or bound a sum, as a softmax that is written out may do with that of its exponentials.
SCALED = frozenset('add sub mul div truediv clamp clamp_min clampmin clip neg'.split())
INVERSES = frozenset('reciprocal pow div truediv rtruediv rdiv'.split())
# Functions that a softmax may be written with.
SOFT = frozenset('exp exp2 expm1 logsumexp logaddexp softplus sigmoid tanh softmax logsoftmax logsigmoid'.split())
# What a custom autograd function may keep to run it in the backward pass.
CALLED = (torch.nn.Module, types.FunctionType, types.MethodType, functools.partial)
# Functions of several tensors.
PRODUCTS = frozenset('Bmm Mm Mv Dot Baddbmm Addmm Addbmm'.split())
LAYERS = PRODUCTS | {'Convolution', 'Linear'}
ARITHMETIC = PRODUCTS | frozenset('Add Sub Rsub Mul Div Addcmul Addcdiv Lerp Where'.split())


def name_of(function):
    '''Name of a function, without that of an overload, which those of exported networks have (``add.Tensor``).'''
    name = getattr(function, '__name__', None)
    return str(function) if name is None else name.partition('.')[0]


def nodes_of(tensors):
    '''The nodes at which tensors came out of a graph, without leaves.'''
    with DisableTorchFunction():
        return {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}


# -- nodes -------------------------------------------------------------------------------------------------------------

def sequence_of(node):
    '''Number of a node: those created later have larger ones. Only leaves have no proper number.'''
    return node._sequence_nr()


def next_sequence():
    '''Number of the node that will be created next.'''
    return torch.autograd._get_sequence_nr()


def is_leaf(node):
    '''Whether a node is that of a leaf, which accumulates gradients.'''
    return 'AccumulateGrad' in node.name()


def function_of(node):
    '''Name of a node without namespaces.'''
    return node.name().rpartition('::')[2]


def class_of(node):
    '''Class of the custom autograd function that a node belongs to, None for others.'''
    return getattr(node, '_forward_cls', None)


def calls_back(node):
    '''Whether a custom autograd function keeps modules or functions, which its backward pass may run again.'''
    return any(_is_called(elem) for elem in vars(node).values())


def _is_called(value):
    if isinstance(value, (list, tuple, dict)):
        return any(map(_is_called, value.values() if isinstance(value, dict) else value))
    return isinstance(value, CALLED)


def metadata_of(node):
    '''Shapes and types of the outputs of a node, empty where it does not tell, as some of PyTorch 2.4.'''
    return getattr(node, '_input_metadata', ())


def rule_of(node):
    '''The single-pass rule that is the backward function of a node, None if there is none.'''
    return getattr(node, 'rule', None)


def module_of(node):
    '''The layer of that rule, None if there is none.'''
    return getattr(node, 'module', None)


def is_move(node):
    '''Whether a node only gives elements another shape or order, or copies them.'''
    return any(key in node.name() for key in MOVES)


def pull_back(node, gradient):
    '''What a node that moves or picks elements makes of a gradient, without the hooks of the backward pass.'''
    if rule_of(node) is not None:
        # of a product or sum with constants, which change nothing
        return gradient
    with torch.no_grad():
        # nodes of custom functions are no functions
        results = node(gradient) if callable(node) else node.apply(gradient)
    results = results if isinstance(results, tuple) else (results,)
    return next(elem for elem, (parent, _) in zip(results, node.next_functions) if parent is not None)


# -- questions ---------------------------------------------------------------------------------------------------------

def depends_on(tensor, source):
    '''Whether a tensor was computed from another, or from what that is a copy of, by their graphs.'''
    if tensor.grad_fn is None or not source.requires_grad:
        return False
    edge = torch.autograd.graph.get_gradient_edge(source)
    target, output_nr = edge.node, edge.output_nr
    # in-place additions need a copy of the skip connection
    while any(key in target.name() for key in COPIES) and len(target.next_functions) == 1:
        target, output_nr = target.next_functions[0]
    # nodes are numbered in the order of their creation, only leaves have no proper number
    oldest = -1 if is_leaf(target) else sequence_of(target)
    queue, seen = [tensor.grad_fn], set()
    while queue:
        for node, index in queue.pop().next_functions:
            if node is None or (node, index) in seen:
                continue
            if node == target and index == output_nr:
                return True
            seen.add((node, index))
            if sequence_of(node) > oldest:
                queue.append(node)
    return False


def is_first(input):
    '''Whether no linear layer or convolution with a single-pass rule precedes, by the input's graph.'''
    return not any(map(_is_layer, walk([input.grad_fn])))


def is_non_negative(tensor):
    '''Whether a tensor has no negative values by its graph: what is averaged, moved or added up comes from ReLUs.'''
    queue, seen = [tensor.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None:
            return False
        if node in seen:
            continue
        seen.add(node)
        module, stem = module_of(node), _stem(node)
        if type(module) in RELU_MODULES or getattr(module, 'name', stem) in RELUS:
            continue
        lower = [parent for parent, _ in node.next_functions]
        is_sum = isinstance(module, Addition) and min(module.factors or (1,)) >= 0
        is_pooled = isinstance(module, (AvgPool, MaxPool)) and not isinstance(module, Signed)
        if not lower or None in lower or not (is_sum or is_pooled or module is None and (
            'Pool' in stem or 'Mean' in stem or is_move(node) or stem.startswith(REORDERS)
        )):
            return False
        queue.extend(lower)
    return True


def is_gate(tensor, with_tanh=True):
    '''Whether a tensor was computed from outputs of sigmoids alone, without any layer in between, by its graph.'''
    if tensor.grad_fn is None:
        return False
    queue, seen = [tensor.grad_fn], set()
    while queue:
        node = queue.pop()
        if node in seen or _is_sigmoid(node, with_tanh):
            continue
        if not _combines(node):
            return False
        seen.add(node)
        queue.extend(_parents(node))
    return True


def end_of(node):
    '''The last function before an output that does more than moving, selecting or averaging elements.'''
    return _back(node, lambda node: (
        isinstance(module_of(node), AvgPool) or _reorders(node) or any(key in _stem(node) for key in AVERAGES)
    ))[0]


def is_shift(tensor, other):
    '''Whether another tensor has the largest elements of a tensor, as what a softmax subtracts first.'''
    node = _skip(other.grad_fn)
    return _function(node) in ('max', 'amax') and len(_parents(node)) == 1 and (
        _skip(_parents(node)[0]) is _skip(tensor.grad_fn)
    )


def is_log_sum(node):
    '''Whether a function is the logarithm of a sum of exponentials.'''
    node = _skip(node, ('neg', 'negative'))
    name, lower = _function(node), () if node is None else _parents(node)
    if name == 'add' and len(lower) == 2:
        # the largest element, and the rest of the sum
        return any(map(is_log_sum, lower))
    return name == 'logsumexp' or name == 'log' and is_sum(lower[0])


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


def is_sum(node, is_inverse=False):
    '''Whether a function is a sum of exponentials, or the inverse of one.'''
    return _exponential(node, is_inverse) is not None


def is_exponential(node):
    '''Whether a function has some elements of exponentials.'''
    return _function(_back(node, _reorders)[0]) == 'exp'


def _exponential(node, is_inverse):
    '''The exponentials that a function sums up, None if it does anything else.'''
    if is_inverse:
        node = _skip(node, INVERSES)
    node = _skip(node, SCALED)
    if _function(node) != 'sum':
        return None
    node = _skip(_parents(node)[0], SCALED)
    return node if _function(node) == 'exp' else None


def _normalizes(node):
    '''Whether a function of two tensors normalizes exponentials, or subtracts the logarithm of their sum.'''
    lower, name = _parents(node), _function(node)
    if len(lower) != 2 or name not in ('sub', 'add', 'div', 'mul'):
        return False
    if name in ('sub', 'add'):
        return any(map(is_log_sum, lower))
    return any(is_sum(elem, name == 'mul') for elem in lower)


def softmaxes_before(outputs):
    '''Softmaxes after the last layers before the outputs of a network, written out or not, by their graphs.'''
    softmaxes, names, seen, is_only = [], set(), set(), True
    queue = list(nodes_of(outputs))
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        name = _function(node)
        names.add(name)
        if name in ('softmax', 'logsoftmax') or _normalizes(node):
            softmaxes.append(node)
        elif _is_layer(node) or _stem(node) in LAYERS or not _parents(node):
            is_only = False
        else:
            queue.extend(_parents(node))
    return softmaxes, is_only, names


def _function(node):
    '''Name of the function that a node is of, which may have run through a module.'''
    if node is None:
        return ''
    module = module_of(node)
    if isinstance(module, Operation):
        return module.name.strip('_').replace('special_', '').replace('log_s', 'logs')
    if module is not None and rule_of(node) is not None:
        kind = next(base for base in type(module).__mro__ if base.__module__.startswith('torch.nn.'))
        return kind.__name__.lower()
    return _stem(node).lower().replace('special', '')


def _skip(node, names=()):
    '''The function before those that move elements, and those of some names.'''
    return _back(node, lambda node: _function(node) in names or is_move(node))[0]


def is_weighting(tensor, other):
    '''Whether a tensor comes from a sigmoid or softmax on a way of its own, on which there is no other such product.

    Between the softmax and the product, some networks mix the heads.
    '''
    shared = set(walk([other.grad_fn]))
    return any(_is_sigmoid(node, False) for node in walk([tensor.grad_fn], shared, _is_matrix_product))


def _is_matrix_product(node):
    return isinstance(module_of(node), (MatrixProduct, NonNegativeMap))


def _is_layer(node):
    return isinstance(module_of(node), (Convolution, torch.nn.Linear))


def is_arithmetic(node):
    '''Whether a function computes something from several tensors, which the canonizer should have intercepted.'''
    return 'DifferentiableGraph' in node.name() or _stem(node) in ARITHMETIC and len(_parents(node)) > 1


def _is_sigmoid(node, with_tanh):
    '''Whether a function is a sigmoid, which may be one that networks write as a shift, clipped on both sides.'''
    module, name = module_of(node), _function(node)
    if _is_tanh(node):
        return with_tanh
    if name in SIGMOIDS or _is_logistic(node, name):
        return True
    if len(_parents(node)) == 1 and _stem(node) in SHIFTS:
        # one and a hyperbolic tangent
        below = _unscaled(node)
        return below is not None and _is_tanh(below)
    if not _clips(node, module):
        # on one side after the other
        below = _skip(_parents(node)[0]) if len(_parents(node)) == 1 else None
        if not any(name in first and _function(below) in other for first, other in ((LOWER, UPPER), (UPPER, LOWER))):
            return False
        node = below
    below = _unscaled(node)
    return below is not None and _stem(below) in SHIFTS and len(_parents(below)) == 1


def _unscaled(node):
    '''The function before one, and before those that scale its result, None if there are several.'''
    lower = _parents(node)
    while len(lower) == 1 and _scales(lower[0]):
        lower = _parents(lower[0])
    return lower[0] if len(lower) == 1 else None


def _is_tanh(node):
    '''Whether a function is a hyperbolic tangent, or clips between minus one and one.'''
    if _function(node) in ('tanh', '_tanh'):
        return True
    module = module_of(node)
    bounds = getattr(module, 'bounds', None)
    if isinstance(module, torch.nn.Hardtanh) and not isinstance(module, torch.nn.ReLU6):
        bounds = module.min_val, module.max_val
    for key in ('_saved_min', '_saved_min_val'):
        if hasattr(node, key):
            bounds = getattr(node, key), getattr(node, key.replace('min', 'max'))
    return bounds is not None and all(isinstance(elem, (int, float)) for elem in bounds) and bounds == (-1, 1)


def _is_logistic(node, name):
    '''Whether a function is a sigmoid or softmax that is written out with exponentials.'''
    lower = _parents(node)
    if len(lower) != 1:
        return False
    below = _skip(lower[0])
    if name == 'exp':
        below_name = _function(below)
        if below_name == 'sub' and len(_parents(below)) == 2:
            # h - softplus(h)
            return any(_is_softplus(elem) or is_log_sum(elem) for elem in _parents(below))
        return below_name in LOG_SIGMOIDS or below_name in NEGATIONS and _is_softplus(_parents(below)[0])
    if name == 'mul':
        # what PyTorch makes of a number that is divided
        below, name = _skip(_parents(below)[0]) if _function(below) == 'reciprocal' else None, 'reciprocal'
    is_inverse = name in ('reciprocal', 'rtruediv', 'rdiv', 'div', 'truediv')
    exponent = getattr(node, '_saved_exponent', None)
    return (is_inverse or isinstance(exponent, (int, float)) and exponent == -1) and is_one_more(below)


def _is_softplus(node):
    '''Whether a function is the logarithm of what is one more than an exponential.'''
    node = _skip(node)
    name = _function(node)
    if name not in ('log', 'log1p'):
        return name in SOFTPLUS
    below = _skip(_parents(node)[0])
    return is_one_more(below) if name == 'log' else _is_exponential(below)


def is_one_more(node):
    '''Whether a function adds a constant to an exponential.'''
    node = _skip(node)
    if _function(node) not in ('add', 'radd') or len(_parents(node)) != 1:
        return False
    return _is_exponential(_skip(_parents(node)[0]))


def _is_exponential(node):
    '''Whether a function has its argument as an exponent.'''
    return _function(node) in EXPONENTIALS or node is not None and (
        node.name() in ('PowBackward1', 'PowBackward2') and isinstance(node._saved_exponent, torch.Tensor)
    )


def _clips(node, module):
    '''Whether a function clips its input on both sides.'''
    if isinstance(module, (torch.nn.ReLU6, torch.nn.Hardtanh)) or 'Hardtanh' in node.name():
        return True
    if 'Clamp' in node.name():
        return getattr(node, '_saved_min', None) is not None and getattr(node, '_saved_max', None) is not None
    return getattr(module, 'is_clipped', False)


def _scales(node):
    '''Whether a function moves or scales what it is given.'''
    stem = _stem(node)
    return isinstance(module_of(node), Gate) or stem in SCALES or is_move(node)


def _combines(node):
    '''Whether a function moves, averages, scales, clips or adds up what it is given.'''
    stem, module = _stem(node), module_of(node)
    if isinstance(module, Operation) and module.name in UNBOUNDED:
        return False
    return (
        getattr(module, 'in_gate', False) or isinstance(module, COMBINES) or _scales(node)
        or stem in (*SHIFTS, 'CopySlices') or stem.startswith(REORDERS) or any(key in stem for key in AVERAGES + CLIPS)
    ) and bool(_parents(node))


def _stem(node):
    '''Name of a function of PyTorch without what it has in common with all others.'''
    return function_of(node).split('Backward')[0]


def _parents(node):
    return [parent for parent, _ in node.next_functions if parent is not None]


def _back(node, passes):
    '''The first node from one back that has several parents or does not pass, and those on the way to it.'''
    passed = []
    while node is not None and len(_parents(node)) == 1 and passes(node):
        passed.append(node)
        node, = _parents(node)
    return node, passed


def _reorders(node):
    '''Whether a function moves or selects elements.'''
    return _stem(node).startswith(REORDERS) or is_move(node)


def walk(nodes, seen=None, ends=lambda node: False):
    '''All nodes of the graph that some nodes are computed from, themselves included, up to those that are ends.'''
    queue, seen = [node for node in nodes if node is not None], set() if seen is None else seen
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not ends(node):
            queue.extend(_parents(node))


def moves_first(node):
    '''Whether a function of PyTorch moves elements along the first dimension, which is that of examples.'''
    if not node.name().startswith(REORDERS):
        # pooling of regions of interest by torchvision
        return node.name().startswith(SCATTERS) or 'roi' in node.name().lower()
    if isinstance(getattr(node, '_saved_indices', None), (list, tuple)):
        return node._saved_indices[0] is not None
    if node.name().startswith('Permute'):
        return node._saved_dims[0] != 0
    if node.name().startswith('SliceBackward') and node._saved_step == 1 and not node._saved_start:
        # PyTorch 2.4 has one for each colon of an index
        sizes = node._saved_self_sym_sizes
        dim = _dim(node, sizes)
        if node._saved_end is None or node._saved_end >= sizes[dim]:
            return False
    # negative numbers are stored as large ones
    dims = [getattr(node, key) for key in ('_saved_dim', '_saved_dim0', '_saved_dim1') if hasattr(node, key)]
    return 0 in (*dims, *getattr(node, '_saved_dims', ())) or node.name().startswith('TBackward')


def _dim(node, sizes):
    '''The dimension along which a function is. Negative numbers are stored as large ones.'''
    return next(num for num in (node._saved_dim, node._saved_dim - 2 ** 64) if num < len(sizes))


def origin_of(tensor, known=()):
    '''The last function before a tensor that is known or does more than picking its elements, and those after it.'''
    node, moves = _back(tensor.grad_fn, lambda node: node not in known and (
        is_move(node) and 'Expand' not in _stem(node) or _stem(node) in ('T', *PICKS)
        or _stem(node) == 'Select' and node._saved_self_sym_sizes[_dim(node, node._saved_self_sym_sizes)] == 1
    ))
    return node, tuple(reversed(moves))


def last_layers(tensor):
    '''Nodes of the last layers with weights before a tensor, and the output of each with the constants added to it.

    The output is None unless nothing but moves and such additions come after a layer.
    '''
    node, moves = _back(tensor.grad_fn, lambda node: (
        is_move(node) and 'Expand' not in _stem(node) or _stem(node) == 'Add'
    ))
    if _has_weights(node):
        value = tensor.detach()
        for move in moves:
            value = pull_back(move, value)
        return [(node, value)]
    return [(elem, None) for elem in walk([node], ends=_has_weights) if _has_weights(elem)]


def after_last_layers(tensor):
    '''Nodes between the last layers with weights and a tensor that is computed from their outputs.'''
    return [node for node in walk([tensor.grad_fn], ends=_has_weights) if not _has_weights(node)]


def divides_by_output(output):
    '''Whether the rules of the last layers divide relevance by the output, None if they are of others.

    That of a tensor without a graph, or of no layer with weights, does not.
    '''
    if hasattr(output, 'divides_relevance'):
        # of a traced network
        return output.divides_relevance
    node = output.grad_fn
    if node is not None and getattr(class_of(node), '__module__', '') == f'{__package__}.rules.block':
        return True
    kinds = {getattr(rule_of(node), 'classifier', None) == 'epsilon' if rule_of(node) is not None else None
             for node, _ in last_layers(output)}
    return None if None in kinds or len(kinds) > 1 else kinds == {True}


def _has_weights(node):
    return isinstance(module_of(node), Linear) or node is not None and _stem(node) in LAYERS


def moved_before(tensor):
    '''Whether what moves elements right before a tensor also moves them along the first dimension.'''
    return any(map(moves_first, _back(tensor.grad_fn, _reorders)[1]))


def count_uses(nodes):
    '''How often the output of each node is used in the graph of the given nodes, which is 0 if it is only returned.'''
    uses = {}
    for node in walk(nodes):
        uses.setdefault(node, 0)
        for parent in _parents(node):
            uses[parent] = uses.get(parent, 0) + 1
    return uses
