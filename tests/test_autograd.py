'''Canaries for the names, numbers and saved fields of autograd nodes, and tests of the queries on graphs.

Checked with PyTorch 2.4 to 2.13. Another name would silently make a gate a signal, or a change an identity.
'''
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zennit_resnet import _autograd, _gates


def leaf(*shape):
    '''A tensor that carries relevance, of a node of its own.'''
    return torch.rand(*shape or (2, 3, 4, 4), requires_grad=True) * 1


NAMES = {
    'Sigmoid': torch.sigmoid, 'Hardsigmoid': F.hardsigmoid, 'Softmax': lambda x: x.softmax(1), 'Tanh': torch.tanh,
    'Clone': torch.clone, 'ToCopy': lambda x: x.double(), 'Relu': torch.relu, 'Hardtanh': F.hardtanh,
    'Clamp': lambda x: x.clamp(0, 1), 'Add': lambda x: x + 1, 'Sub': lambda x: x - x,
    'Rsub': lambda x: torch.rsub(x, 1),
    'Mul': lambda x: x * 2, 'Div': lambda x: x / 2, 'Neg': torch.neg, 'AvgPool2D': lambda x: F.avg_pool2d(x, 2),
    'MaxPool2DWithIndices': lambda x: F.max_pool2d(x, 2),
    'UpsampleNearest2D': lambda x: F.interpolate(x, scale_factor=2),
    'Mean': lambda x: x.mean((2, 3)), 'Sum': lambda x: x.sum(1), 'Where': lambda x: torch.where(x > 0, x, x),
    'MaskedFill': lambda x: x.masked_fill(x > 0, 0.), 'Maximum': lambda x: torch.maximum(x, x),
    'Minimum': lambda x: torch.minimum(x, x), 'Bmm': lambda x: torch.bmm(x[0], x[1]), 'Mm': lambda x: x[0, 0] @ x[0, 1],
    'Addcmul': lambda x: torch.addcmul(x, x, x), 'Lerp': lambda x: torch.lerp(x, x, .5),
}
MOVES = {
    'View': lambda x: x.view(2, 48), 'Expand': lambda x: x[:, :1].expand(2, 3, 4, 4),
    'Squeeze': lambda x: x[:, :1].squeeze(1),
    'Unsqueeze': lambda x: x.unsqueeze(0), 'Permute': lambda x: x.permute(1, 0, 2, 3),
    'Transpose': lambda x: x.transpose(1, 2),
    'Clone': torch.clone, 'ToCopy': lambda x: x.double(), 'Alias': lambda x: x[:, :3],
}
# Functions that move elements, along the dimension of examples and along another.
REORDERS = {
    'Stack': lambda x, dim: torch.stack([x, x], dim), 'Cat': lambda x, dim: torch.cat([x, x], dim),
    'Unbind': lambda x, dim: x.unbind(dim)[0], 'Select': lambda x, dim: x.select(dim, 0),
    'Slice': lambda x, dim: x.narrow(dim, 1, 1), 'Split': lambda x, dim: x.split(1, dim)[0],
    'Transpose': lambda x, dim: x.transpose(dim, 2),
    'Permute': lambda x, dim: x.permute((1, 0, 2, 3) if not dim else (0, 2, 1, 3)),
    'Flip': lambda x, dim: x.flip(dim), 'Roll': lambda x, dim: x.roll(1, dim),
    'Rot90': lambda x, dim: x.rot90(1, (dim, 2)), 'Unfold': lambda x, dim: x.unfold(dim, 2, 1),
    'AsStrided': lambda x, dim: x.as_strided((2, 2), (16, 48) if not dim else (48, 16)),
    'Repeat': lambda x, dim: x.repeat([2 if num == dim else 1 for num in range(4)]),
    'Index': lambda x, dim: x[[1, 0]] if not dim else x[:, [1, 0]],
    'IndexSelect': lambda x, dim: x.index_select(dim, torch.tensor([1, 0])),
    'Gather': lambda x, dim: x.gather(dim, torch.zeros(2, 3, 4, 4, dtype=torch.long)),
    'Scatter': lambda x, dim: torch.scatter(x, dim, torch.zeros(2, 3, 4, 4, dtype=torch.long), x),
    'Topk': lambda x, dim: x.topk(1, dim).values, 'Sort': lambda x, dim: x.sort(dim).values,
    'Kthvalue': lambda x, dim: x.kthvalue(1, dim).values, 'Median': lambda x, dim: x.median(dim).values,
    'Mode': lambda x, dim: x.mode(dim).values, 'Cummax': lambda x, dim: x.cummax(dim).values,
}


@pytest.mark.parametrize('name', NAMES)
def test_names(name):
    '''Nodes are called after their function, with Backward and a number behind.'''
    node = NAMES[name](leaf()).grad_fn
    # a product of batches comes with a view
    while not node.name().lstrip('_').startswith(name) and len(node.next_functions) == 1:
        node, _ = node.next_functions[0]
    assert 'Backward' in node.name() and node.name().lstrip('_').startswith(name)


@pytest.mark.parametrize('name', MOVES)
def test_is_move(name):
    '''Moves are known by their names, and products are none.'''
    assert _autograd.is_move(MOVES[name](leaf()).grad_fn)
    assert not _autograd.is_move((leaf() * 2).grad_fn)


def test_change_of_a_view():
    '''A change of a view in place is no move of the whole tensor, but may be part of a gate.'''
    tensor, gate = leaf().clone(), leaf().sigmoid()
    tensor[:1].relu_()
    gate[:1].mul_(2)
    assert 'CopySlices' in tensor.grad_fn.name() and not _autograd.is_move(tensor.grad_fn)
    assert _gates.is_gate(gate) and not _gates.is_gate(tensor)


@pytest.mark.parametrize('name', REORDERS)
def test_moves_first(name):
    '''The dimension along which a function moves elements is told by what its node has saved.'''
    for dim in (0, 1):
        node = REORDERS[name](leaf(), dim).grad_fn
        assert node.name().startswith(name)
        assert _autograd.moves_first(node) == (dim == 0)


@pytest.mark.parametrize('bounds, expected', [((0, 1), True), ((0, None), False), ((None, 1), False)])
def test_clamp(bounds, expected):
    '''A shift that is clipped on both sides counts as a sigmoid, by the bounds which the node has saved.'''
    assert _gates.is_gate((leaf() + 3).clamp(*bounds)) == expected


@pytest.mark.parametrize('gate, expected', [
    (torch.sigmoid, True), (lambda x: 2 * x.sigmoid() + 1, True), (lambda x: x.softmax(1).sum(1), True),
    (lambda x: F.interpolate(x.sigmoid(), scale_factor=2), True), (torch.relu, False),
    (lambda x: x.sigmoid() + x, False), (lambda x: x.sigmoid().exp(), False),
])
def test_is_gate(gate, expected):
    '''A gate was computed from sigmoids alone.'''
    assert _gates.is_gate(gate(leaf())) == expected


def test_sequence():
    '''Later nodes have larger numbers, and the next number is that of the next node.'''
    first = leaf(2)
    number = _autograd.next_sequence()
    second = first * 2
    assert _autograd.sequence_of(first.grad_fn) < number == _autograd.sequence_of(second.grad_fn)
    assert _autograd.next_sequence() > number


def test_leaves():
    '''Only the nodes of leaves accumulate gradients.'''
    parameter = torch.ones(2, requires_grad=True)
    output = parameter * 2
    (node, _), *_ = output.grad_fn.next_functions
    assert _autograd.is_leaf(node) and not _autograd.is_leaf(output.grad_fn)


def test_custom_functions():
    '''Nodes of custom functions tell their class and keep attributes that were set in the forward pass.'''
    class Custom(torch.autograd.Function):
        '''Doubles.'''
        @staticmethod
        def forward(ctx, input):
            '''Double.'''
            ctx.rule, ctx.module = 'rule', 'module'
            return 2 * input

        @staticmethod
        def backward(ctx, grad):
            '''Double.'''
            return 2 * grad

    node = Custom.apply(leaf(2)).grad_fn
    assert _autograd.class_of(node) is Custom and _autograd.class_of((leaf() * 2).grad_fn) is None
    assert (_autograd.rule_of(node), _autograd.module_of(node)) == ('rule', 'module')


def test_calls_back():
    '''What the context of a custom function is given are attributes of its node.'''
    class Custom(torch.autograd.Function):
        '''Keeps something.'''
        @staticmethod
        def forward(ctx, x, kept):
            '''Twice the input.'''
            ctx.save_for_backward(x)
            ctx.kept = kept
            return 2 * x

    for kept in (nn.ReLU(), [nn.ReLU()], {'a': (nn.ReLU(),)}, len.__class__, lambda x: x, nn.ReLU().forward):
        assert _autograd.calls_back(Custom.apply(leaf(), kept).grad_fn) is (kept is not len.__class__)
    for kept in (2, 'name', (1, 2), None, torch.float32):
        assert not _autograd.calls_back(Custom.apply(leaf(), kept).grad_fn)


def test_metadata():
    '''Nodes tell the types of what they return.'''
    assert [elem.dtype for elem in _autograd.metadata_of(leaf().half().grad_fn)] in ([torch.float16], [])


def test_depends_on():
    '''Dependence is found through copies and other functions, by edges and numbers of the graph.'''
    source, other = leaf(2), leaf(2)
    copied = source.clone()
    output = (copied * 2).relu()
    assert _autograd.depends_on(output, source) and _autograd.depends_on(output, copied)
    assert not _autograd.depends_on(output, other) and not _autograd.depends_on(source, output)
