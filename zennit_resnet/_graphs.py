'''Graphs of aten operations: recorded once, with no changes in place, and with all that is constant computed.'''
import functools
import math
import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ._compat import RECORDING, OpOverload, recording

aten = torch.ops.aten

# Functions that hand on what they are given.
_SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
# Functions that read nothing but a shape.
_CREATES = tuple(getattr(aten, name).default for name in (
    'ones_like', 'zeros_like', 'full_like', 'empty_like', 'new_ones', 'new_zeros', 'new_full', 'new_empty',
))
# Functions of one element after the other, which may write where they read.
_IN_PLACE = {
    getattr(getattr(aten, name), overload): getattr(getattr(aten, f'{name}_'), overload)
    for name, overload in (
        ('relu', 'default'), ('abs', 'default'), ('nan_to_num', 'default'), ('masked_fill', 'Scalar'),
        ('mul', 'Tensor'), ('add', 'Tensor'), ('sub', 'Tensor'), ('div', 'Tensor'),
    )
}
# Products of fewer rows, as last layers have, are no faster in lower precision.
_ROWS = 32
_BATCH_NORMS = tuple(getattr(aten, name).default for name in ('native_batch_norm', 'cudnn_batch_norm'))


def record(function, *inputs):
    '''What a function does to tensors as a graph of pure aten functions, and other tensors by their placeholders.'''
    with recording():
        recorded = make_fx(function, tracing_mode='real', **RECORDING)(*inputs)
    # numbers that were read from tensors
    recorded.graph.eliminate_dead_code()
    values = _lift_constants(recorded)
    module = make_fx(torch.func.functionalize(recorded), tracing_mode='fake', **RECORDING)(*values, *inputs)
    constants = dict(zip(module.graph.find_nodes(op='placeholder'), values))
    for node in module.graph.find_nodes(op='get_attr'):
        constants[node] = operator.attrgetter(node.target)(module).detach()
    module.graph.eliminate_dead_code()
    return module.graph, constants


def _lift_constants(module):
    '''Make placeholders of the constants of a graph, and get their values.'''
    graph, found = module.graph, {}
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op='get_attr'):
        if node.target not in found:
            with graph.inserting_before(first):
                found[node.target] = graph.placeholder(f'constant_{len(found)}')
        node.replace_all_uses_with(found[node.target])
        graph.erase_node(node)
    module.recompile()
    return [operator.attrgetter(name)(module).detach() for name in found]


def _add(graph, function, *args, **kwargs):
    '''Add a function to a graph, with what it makes of fake tensors.'''
    node = graph.call_function(function, args, kwargs)
    values, named = torch.fx.node.map_arg((args, kwargs), _fake)
    node.meta['val'] = function(*values, **named)
    return node


def _fake(node):
    return node.meta['val']


def simplify(graph, constants):
    '''Replace functions by fewer of the same result: batch normalizations, gradients of convolutions, products.'''
    build = functools.partial(_add, graph)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target in _SAME or node.target is aten._to_copy.default and _is_same(node):
                node.replace_all_uses_with(node.args[0])
            elif node.target in _BATCH_NORMS and node.args[5] is False:
                _replace_outputs(node, _normalize(build, constants, *node.args[:5], node.args[7]))
            elif node.target is aten.native_batch_norm_backward.default and node.args[7] is False:
                _replace_outputs(node, _normalize_backward(build, node.args))
            elif node.target is aten.convolution_backward.default and _is_input_only(node):
                _replace_outputs(node, _convolve_backward(build, constants, node.args))
            elif node.target is aten.bmm.default and len(_fake(node)) > 1 and 0 in map(_step, node.args):
                node.replace_all_uses_with(_multiply(build, *node.args))
            elif node.target in (aten.view.default, aten._unsafe_view.default):
                # strides may be others than those of fake tensors
                node.target = aten.reshape.default
    graph.eliminate_dead_code()


def _replace_outputs(node, first):
    '''Replace the first of several outputs of a function. The others are not used.'''
    if first is None:
        return
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(first)


def _is_input_only(node):
    return all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)


def _is_same(node):
    before, after = _fake(node.args[0]), _fake(node)
    return all(getattr(before, key) == getattr(after, key) for key in ('dtype', 'device')) and (
        before.stride() == after.stride()
    )


def is_constant(constants, node):
    '''Whether a node is computed from constants alone.'''
    queue = [node] if isinstance(node, Node) else []
    while queue:
        node = queue.pop()
        if node.op == 'placeholder' and node not in constants:
            return False
        if node.target not in _CREATES and node not in constants:
            queue.extend(node.all_input_nodes)
    return True


def _affine(build, weight, bias, mean, var, eps):
    '''Scale and shift of a batch normalization.'''
    scale = build(aten.rsqrt.default, build(aten.add.Tensor, var, eps))
    if weight is not None:
        scale = build(aten.mul.Tensor, scale, weight)
    shift = build(aten.neg.default, build(aten.mul.Tensor, mean, scale))
    if bias is not None:
        shift = build(aten.add.Tensor, shift, bias)
    return scale, shift


def _channels(build, vector, ndim, dim=1):
    '''A vector with one element for each channel, in the shape in which it is broadcast.'''
    shape = [1] * ndim
    shape[dim] = -1
    return build(aten.view.default, vector, shape)


def _normalize(build, constants, input, weight, bias, mean, var, eps):
    '''A batch normalization, folded into the convolution before it if nothing else uses that.'''
    scale, shift = _affine(build, weight, bias, mean, var, eps)
    ndim = _fake(input).ndim
    if input.target is aten.convolution.default and len(input.users) == 1 and not input.args[6] and (
        is_constant(constants, input.args[1]) and is_constant(constants, input.args[2])
    ):
        source, kernel, constant, *settings = input.args
        kernel = build(aten.mul.Tensor, kernel, _channels(build, scale, ndim, 0))
        if constant is not None:
            shift = build(aten.add.Tensor, shift, build(aten.mul.Tensor, constant, scale))
        return build(aten.convolution.default, source, kernel, shift, *settings)
    product = build(aten.mul.Tensor, input, _channels(build, scale, ndim))
    return build(aten.add.Tensor, product, _channels(build, shift, ndim))


def _normalize_backward(build, args):
    '''The gradient of a batch normalization by its input.'''
    upper, input, weight, mean, var, _, _, _, eps, *_ = args
    scale, _ = _affine(build, weight, None, mean, var, eps)
    return build(aten.mul.Tensor, upper, _channels(build, scale, _fake(input).ndim))


def _convolve_backward(build, constants, args):
    '''The gradient of a convolution by its input: a convolution with transposed weights and a stride of one.'''
    upper, input, kernel, _, stride, padding, dilation, transposed, _, groups, _ = args
    if transposed or not is_constant(constants, kernel):
        return None
    if upper.target is aten.mul.Tensor and isinstance(upper.args[1], Node) and is_constant(constants, upper.args[1]):
        source, factor = upper.args
        if _fake(factor).shape == (1, *_fake(upper).shape[1:2], *[1] * (_fake(upper).ndim - 2)):
            kernel = build(aten.mul.Tensor, kernel, build(aten.transpose.int, factor, 0, 1))
            upper = source
    shape, num = _fake(kernel).shape, _fake(kernel).ndim - 2
    zeros = [0] * num
    if set(stride) == {1}:
        inverse = [step * (size - 1) - pad for step, size, pad in zip(dilation, shape[2:], padding)]
        if min(inverse) >= 0:
            kernel = build(aten.reshape.default, kernel, [groups, shape[0] // groups, *shape[1:]])
            kernel = build(aten.transpose.int, kernel, 1, 2)
            kernel = build(aten.reshape.default, kernel, [groups * shape[1], shape[0] // groups, *shape[2:]])
            if math.prod(shape[2:]) > 1:
                kernel = build(aten.flip.default, kernel, list(range(2, num + 2)))
            return build(aten.convolution.default, upper, kernel, None, stride, inverse, dilation, False, zeros, groups)
    excess = [
        length - (out - 1) * step + 2 * pad - dil * (size - 1) - 1 for length, out, step, pad, dil, size
        in zip(_fake(input).shape[2:], _fake(upper).shape[2:], stride, padding, dilation, shape[2:])
    ]
    return build(aten.convolution.default, upper, kernel, None, stride, padding, dilation, True, excess, groups)


def _step(node):
    '''How far the first of two examples is from the second in memory, which is zero if they are the same.'''
    return _fake(node).stride(0)


def _multiply(build, one, other):
    '''One product of all examples with a matrix, which would be as many products, and copies of the matrix.'''
    if _step(other):
        # the same, transposed
        factors = (build(aten.transpose.int, factor, 1, 2) for factor in (other, one))
        return build(aten.transpose.int, _multiply(build, *factors), 1, 2)
    size, rows, _ = _fake(one).shape
    matrix = build(aten.select.int, other, 0, 0)
    result = build(aten.mm.default, build(aten.reshape.default, one, [size * rows, -1]), matrix)
    return build(aten.reshape.default, result, [size, rows, _fake(matrix).shape[1]])


def lower_precision(graph, constants, dtype):
    '''Have convolutions and products with weights after the output, which are those of rules, in another type.'''
    build, nodes = functools.partial(_add, graph), list(graph.nodes)
    (output, *_), = nodes[-1].args
    for node in nodes[nodes.index(output) + 1:]:
        if node.target is aten.convolution.default:
            # one channel is what dead units are spread by, for which this is no faster
            is_product = node.args[2] is None and _fake(node.args[1]).shape[1] > 1 and (
                is_constant(constants, node.args[1])
            )
        else:
            is_product = node.target is aten.mm.default and _fake(node).shape[0] >= _ROWS and (
                any(is_constant(constants, elem) for elem in node.args)
            )
        if is_product:
            with graph.inserting_before(node):
                args = [build(aten._to_copy.default, elem, dtype=dtype) for elem in node.args[:2]]
                result = build(node.target, *args, *node.args[2:])
                result = build(aten._to_copy.default, result, dtype=_fake(node).dtype)
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def fold(graph, constants, layout=torch.contiguous_format):
    '''A module of a graph with all that depends on no input as buffers, those of four dimensions in a memory format.'''
    values = dict(constants)
    module = GraphModule(torch.nn.Module(), graph)
    with torch.no_grad():
        for node in graph.nodes:
            if node.op != 'call_function':
                continue
            if node.target in _CREATES:
                like = _fake(node.args[0])
                like = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
                values[node] = node.target(like, *node.args[1:], **node.kwargs)
            elif all(elem in values for elem in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    num = 0
    for node in list(graph.nodes):
        if node not in values or all(user in values for user in node.users):
            continue
        value = values[node]
        is_part = value.numel() * value.element_size() < value.untyped_storage().nbytes()
        if 0 not in value.stride() and (value.ndim > 2 or is_part):
            # convolutions would copy transposed weights in each call, and parts keep the whole alive; what is expanded
            # is smaller as it is
            value = value.clone(memory_format=layout if value.ndim == 4 else torch.contiguous_format)
        name, num = f'constant_{num}', num + 1
        module.register_buffer(name, value)
        with graph.inserting_before(node):
            buffer = graph.get_attr(name)
        buffer.meta['val'] = _fake(node)
        node.replace_all_uses_with(buffer)
    for node in reversed(list(graph.nodes)):
        if node in values:
            graph.erase_node(node)
    module.recompile()
    return module


def write_in_place(module):
    '''Let functions write over what is not needed any more.'''
    graph = module.graph
    nodes = list(graph.nodes)
    index, owner = {node: num for num, node in enumerate(nodes)}, {}
    for node in nodes:
        # the initial relevance is that of the caller
        is_view = node.op == 'call_function' and (
            not isinstance(node.target, OpOverload)
            or any(elem.alias_info is not None for elem in node.target._schema.returns)
        )
        owner[node] = owner[node.args[0]] if is_view else node
    last = {}
    for node in nodes:
        for user in node.users:
            last[owner[node]] = max(last.get(owner[node], 0), index[user])
    for node in nodes:
        function = _IN_PLACE.get(node.target)
        if function is None:
            continue
        source = node.args[0]
        root = owner[source]
        if root.op == 'call_function' and last[root] == index[node] and _is_new(source, node) and not any(
            owner[elem] is root for elem in node.all_input_nodes if elem is not source
        ):
            node.target = function
            # the result is the same memory
            last[root] = max(last[root], last.get(node, 0))
            for elem, other in owner.items():
                if other is node:
                    owner[elem] = root
    module.recompile()


def _is_new(source, node):
    '''Whether a result fits where an argument is.'''
    before, after = _fake(source), _fake(node)
    return (before.shape, before.dtype, before.stride()) == (after.shape, after.dtype, after.stride())
