'''Queries on the autograd graph: the only module that reads numbers and saved fields of nodes. Each has a canary.'''
import functools
import types

import torch
from zennit.types import AvgPool, Convolution, Linear, MaxPool

from ._compat import DisableTorchFunction, OpOverload, OpOverloadPacket
from .layer import Addition, Signed

# Functions, and modules in place of them, whose output has no negative values.
RELUS = frozenset('relu relu_ relu6 Relu Sigmoid Softmax Softplus'.split())
RELU_MODULES = tuple(getattr(torch.nn, name) for name in 'ReLU ReLU6 Sigmoid Hardsigmoid Softmax Softplus'.split())
# Packages and namespaces whose functions are known by their names.
PACKAGES = frozenset('torch aten prims torchvision'.split())
# Functions that move elements along the dimensions they name.
REORDERS = (
    'Stack', 'Cat', 'Unbind', 'Select', 'Slice', 'Split', 'UnsafeSplit', 'Transpose', 'Permute', 'Flip', 'Roll',
    'AsStrided', 'Rot90', 'Index', 'TBackward', 'Gather', 'Scatter', 'Topk', 'Sort', 'Kthvalue', 'Median', 'Nanmedian',
    'Mode', 'Cummax', 'Cummin', 'Diag', 'BlockDiag', 'Tril', 'Triu', 'Repeat', 'Unfold', 'Im2Col', 'PixelShuffle',
    'PixelUnshuffle', 'ChannelShuffle', 'ConstantPad', 'ReflectionPad', 'ReplicationPad',
)
# Functions that do so regardless of dimensions.
SCATTERS = ('MaskedSelect', 'MaskedScatter', 'Take', 'Put')
# 'CopySlices' is what a change of a view makes of the whole tensor, and no move.
MOVES = (
    'View', 'Alias', 'Expand', 'queeze', 'Permute', 'Transpose', 'Clone', 'ToCopy', 'CopyBackwards', 'Identity',
    'BackwardHookFunction',
)
# Functions that pick elements in another order.
PICKS = frozenset('Flip Roll Index IndexSelect Slice'.split())
# What a custom autograd function may keep to run it in the backward pass.
CALLED = (torch.nn.Module, types.FunctionType, types.MethodType, functools.partial)
# Functions of several tensors.
PRODUCTS = frozenset('Bmm Mm Mv Dot Baddbmm Addmm Addbmm'.split())
LAYERS = PRODUCTS | {'Convolution', 'Linear'}
ARITHMETIC = PRODUCTS | frozenset('Add Sub Rsub Mul Div Addcmul Addcdiv Lerp Where'.split())


def name_of(function):
    '''Name of a function without that of an overload, after that of its package if it is not one of PyTorch's.'''
    name = getattr(function, '__name__', None)
    if name is None:
        return str(function)
    name = name.partition('.')[0]
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        package = str(function).partition('.')[0]
    elif isinstance(function, types.FunctionType):
        package = str(function.__module__).partition('.')[0]
    else:
        return name
    return name if package in PACKAGES else f'{package}.{name}'


def nodes_of(tensors):
    '''The nodes at which tensors came out of a graph, without leaves.'''
    with DisableTorchFunction():
        return {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}


def sequence_of(node):
    '''Number of a node: those created later have larger ones. Only leaves have no proper number.'''
    return node._sequence_nr()


def next_sequence():
    '''Number of the node that will be created next.'''
    return torch.autograd._get_sequence_nr()


def is_leaf(node):
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


def note_vector(node):
    '''Note that a function adds a constant with several values.'''
    node.metadata['adds_vector'] = True


def adds_vector(node):
    return 'adds_vector' in node.metadata


def bounds_of(node):
    '''The lower and upper bound that a function has saved to clip its input, None if it does not clip.'''
    for low, high in (('_saved_min', '_saved_max'), ('_saved_min_val', '_saved_max_val')):
        if hasattr(node, low):
            return getattr(node, low), getattr(node, high, None)
    return None


def exponent_of(node):
    '''The exponent that a power has saved, None for other functions.'''
    return getattr(node, '_saved_exponent', None)


def rule_of(node):
    '''The single-pass rule that is the backward function of a node, or None.'''
    return getattr(node, 'rule', None)


def module_of(node):
    '''The layer of that rule, or None.'''
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


def depends_on(tensor, source):
    '''Whether a tensor was computed from another, or from what that has in another order or shape, by their graphs.'''
    if tensor.grad_fn is None or not source.requires_grad:
        return False
    edge = torch.autograd.graph.get_gradient_edge(source)
    target, output_nr = edge.node, edge.output_nr
    # in-place additions need a copy of the skip connection, and Python's sum begins with zero
    while is_move(target) or stem_of(target) == 'Add':
        parents = [parent for parent in target.next_functions if parent[0] is not None]
        if len(parents) != 1:
            break
        (target, output_nr), = parents
    # nodes are numbered in the order of their creation, only leaves have no proper number
    oldest = -1 if is_leaf(target) else sequence_of(target)
    queue, seen = [tensor.grad_fn], {(None, 0)}
    while queue:
        edges = set(queue.pop().next_functions) - seen
        if (target, output_nr) in edges:
            return True
        seen |= edges
        queue.extend(node for node, _ in edges if node is not None and sequence_of(node) > oldest)
    return False


def is_first(input):
    '''Whether no linear layer or convolution with a single-pass rule precedes, by the input's graph.'''
    return not any(map(is_layer, walk([input.grad_fn])))


def is_non_negative(tensor):
    '''Whether a tensor has no negative values by its graph: what is averaged, moved or added up comes from ReLUs.'''
    def is_relu(node):
        return type(module_of(node)) in RELU_MODULES or getattr(module_of(node), 'name', stem_of(node)) in RELUS

    def keeps_signs(node):
        module, stem = module_of(node), stem_of(node)
        if isinstance(module, Addition):
            return min(module.factors or (1,)) >= 0
        if module is None:
            return 'Pool' in stem or 'Mean' in stem or reorders(node)
        return isinstance(module, (AvgPool, MaxPool)) and not isinstance(module, Signed)

    return tensor.grad_fn is not None and all(is_relu(node) or (
        keeps_signs(node) and 0 < len(parents_of(node)) == len(node.next_functions)
    ) for node in walk([tensor.grad_fn], ends=is_relu))


def is_layer(node):
    '''Whether a node is of a linear layer or convolution with a single-pass rule.'''
    return isinstance(module_of(node), (Convolution, torch.nn.Linear))


def is_arithmetic(node):
    '''Whether a function computes something from several tensors, which the canonizer should have intercepted.'''
    return 'DifferentiableGraph' in node.name() or stem_of(node) in ARITHMETIC and len(parents_of(node)) > 1


def changes_values(node, functions):
    '''Whether the gradient of a function does not pass all relevance, by the names of some that do not.'''
    stem = stem_of(node)
    if stem in ('Add', 'Sub') and len(parents_of(node)) == 1:
        # a constant that comes first is added to a multiple of the tensor
        return node.next_functions[0][0] is None and (stem == 'Sub' or node._saved_alpha != 1)
    return stem.lower() in functions or stem.startswith('ScaledDotProduct')


def stem_of(node):
    '''Name of a function of PyTorch without what it has in common with all others.'''
    return function_of(node).split('Backward')[0]


def parents_of(node):
    '''The nodes before a node, without tensors that are constants.'''
    return [parent for parent, _ in node.next_functions if parent is not None]


def back(node, passes):
    '''The first node from one back that has several parents or does not pass, and those on the way to it.'''
    passed = []
    while node is not None and len(parents_of(node)) == 1 and passes(node):
        passed.append(node)
        node, = parents_of(node)
    return node, passed


def reorders(node):
    '''Whether a function moves or selects elements.'''
    return stem_of(node).startswith(REORDERS + SCATTERS) or is_move(node)


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
            queue.extend(parents_of(node))


def moves_first(node):
    '''Whether a function of PyTorch moves elements along the first dimension, which is that of examples.'''
    if not node.name().startswith(REORDERS):
        # pooling of regions of interest by torchvision
        return node.name().startswith(SCATTERS) or 'roi' in node.name().lower()
    if isinstance(getattr(node, '_saved_indices', None), (list, tuple)):
        return node._saved_indices[0] is not None
    if node.name().startswith('Permute'):
        return node._saved_dims[0] != 0
    if node.name().startswith('RepeatBackward'):
        return node._saved_repeats[0] != 1
    if node.name().startswith('AsStrided'):
        # also what a view is after a change in place
        first, *strides = node._saved_stride or (0,)
        reach = sum(num * (size - 1) for num, size in zip(strides, node._saved_size[1:]))
        return (node._saved_storage_offset or 0) + reach >= first
    if node.name().startswith('SliceBackward') and node._saved_step == 1 and not node._saved_start:
        # PyTorch 2.4 has one for each colon of an index
        sizes = node._saved_self_sym_sizes
        dim = _dim(node, sizes)
        if node._saved_end is None or node._saved_end >= sizes[dim]:
            return False
    # negative numbers are stored as large ones
    dims = [getattr(node, key) for key in ('_saved_dim', '_saved_dim0', '_saved_dim1', '_saved_dimension')
            if hasattr(node, key)]
    return 0 in (*dims, *getattr(node, '_saved_dims', ())) or node.name().startswith('TBackward')


def _dim(node, sizes):
    '''The dimension along which a function is. Negative numbers are stored as large ones.'''
    return next(num for num in (node._saved_dim, node._saved_dim - 2 ** 64) if num < len(sizes))


def origin_of(tensor, known=()):
    '''The last function before a tensor that is known or does more than picking its elements, and those after it.'''
    node, moves = back(tensor.grad_fn, lambda node: node not in known and (
        is_move(node) and 'Expand' not in stem_of(node) or stem_of(node) in ('T', *PICKS)
        or stem_of(node) == 'Select' and node._saved_self_sym_sizes[_dim(node, node._saved_self_sym_sizes)] == 1
    ))
    return node, tuple(reversed(moves))


def last_layers(tensor):
    '''The last layers with weights before a tensor, and their output, None if more than moves and sums follow.'''
    node, moves = back(tensor.grad_fn, lambda node: (
        is_move(node) and 'Expand' not in stem_of(node) or stem_of(node) == 'Add'
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
    '''Whether the rules of the last layers divide by the output, None if they are of other packages.'''
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
    return isinstance(module_of(node), Linear) or node is not None and stem_of(node) in LAYERS


def count_uses(nodes):
    '''How often the output of each node is used in the graph of the given nodes, which is 0 if it is only returned.'''
    uses = {}
    for node in walk(nodes):
        uses.setdefault(node, 0)
        for parent in parents_of(node):
            uses[parent] = uses.get(parent, 0) + 1
    return uses
