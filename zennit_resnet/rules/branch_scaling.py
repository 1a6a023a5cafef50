'''Relative LRP (Nyiri & Gibaru, R-LRP) in deep and residual networks: range, and branches of residual blocks.'''
import collections
import functools
import itertools
import math

import torch

from .._autograd import function_of, is_move, metadata_of, moves_first, rule_of, walk
from .._compat import backward_pass, has_values
from ..arguments import check_choice, check_number
from ._linear_maps import by_example
from .base import SinglePass
from .passing import PassThrough, SignalTakesAll
from .relative import Relative
from .splitting import SymmetricSplit

BRANCH_SUMS = ('signed', 'l1')

# Sums below this share of the sum of magnitudes are rounding errors of single precision.
TOLERANCE = 1e-6
# Contributions of an example are rescaled if the exponent of the largest one is beyond this.
EXPONENT = 30


def branch_factor(begin, end, normalization='signed', tolerance=TOLERANCE):
    '''Factor by which the contributions of a branch of a residual block are multiplied, Proposition 14 of R-LRP.

    Parameters
    ----------
    begin, end: tuple of :py:obj:`torch.Tensor`
        Sum and sum of magnitudes, of shape (batch,) each, of the branch's contributions at the block's begin, and of
        those with which the branch started at the block's end.
    normalization: str, optional
        ``'signed'`` (default) for the ratio of the sums, which may be negative, ``'l1'`` for that of the sums of
        magnitudes.
    tolerance: float, optional
        Sums smaller than this share of their magnitudes count as zero, and the ratio of the sums of magnitudes is used
        in their place. Default is 1e-6, the resolution of sums in single precision.

    Returns
    -------
    tuple of :py:obj:`torch.Tensor`
        The factor, zero for a branch without contributions, and where the sums were replaced, both of shape (batch,).

    A ValueError is raised if ``normalization`` is unknown, or ``tolerance`` is negative or not finite.
    '''
    check_choice('normalization', normalization, BRANCH_SUMS)
    check_number('tolerance', tolerance, 0)
    (total, magnitude), (end_total, end_magnitude) = begin, end
    is_empty = magnitude == 0
    factor = end_magnitude / torch.where(is_empty, 1., magnitude)
    replaced = (total.abs() < tolerance * magnitude) | (total == 0)
    # a start with both signs, as of a contrast, may sum to zero
    replaced = replaced | (end_total.abs() < tolerance * end_magnitude)
    if normalization == 'l1':
        replaced = torch.zeros_like(replaced)
    else:
        factor = torch.where(replaced, factor, end_total / torch.where(replaced, 1., total))
    return torch.where(is_empty, 0., factor), replaced & ~is_empty


class _Path:
    '''A path through a graph, from a node at which it begins to one at which several meet.'''
    def __init__(self, begin):
        # numbers of the states of contributions where it begins, and as far as it was followed
        self.begin = self.state = begin
        self.is_changed = False


class Contributions:
    '''Keeps contributions comparable and in range while they are propagated through the graph of a forward pass.

    Contributions are products of all activations along a path, which leave the range of floating point numbers in deep
    networks, so each example is multiplied with powers of two, whose exponents are kept.

    Where paths of different lengths meet, their contributions are of different scale. As Proposition 14 has it for the
    branches of residual blocks, each path between two such places (a sum or concatenation at one end, a tensor with
    several uses at the other) is rescaled so that contributions have the same sum at both ends. Contributions of a
    sum are divided evenly among its addends, so what all paths have in total is the same everywhere, also for branches
    which have branches themselves. (In the proposition, each branch begins with all of it: a factor of two for each
    block, which is the same for all inputs.) A path that changes nothing, such as an identity skip connection, remains
    as it is.

    For ``normalization``, see :py:func:`branch_factor`.
    '''
    def __init__(self, normalization='signed'):
        check_choice('normalization', normalization, BRANCH_SUMS)
        self.normalization = normalization
        # all by the numbers of states: 0 is that of the output
        self.exponents, self.sums, self.replaced = {0: torch.zeros((), dtype=torch.double, device='cpu')}, {}, {}
        self.batch_size, self.final = 0, 0
        # name of a function that has moved the examples
        self.moved = None
        # number of the last backward pass, and exponents before it
        self.current, self.initial = None, self.exponents

    @property
    def log_scale(self):
        '''Natural logarithm of the factor by which the input's contributions have to be multiplied, (batch,).'''
        if self.final not in self.exponents:
            raise RuntimeError('There is no scale yet, it is known after a backward pass to the input.')
        return (self.exponents[self.final].cpu() * math.log(2)).expand(self.batch_size)

    @property
    def num_replaced(self):
        '''Number of branches for which :py:func:`branch_factor` replaced the sums, (batch,).'''
        return sum((elem.cpu() for elem in self.replaced.values()), torch.zeros(self.batch_size, dtype=torch.long))

    def watch(self, outputs, inputs, rules):
        '''Add hooks to the graph of a forward pass, unless other rules for layers took the place of the given ones
        (False).

        Outputs are of shape (batch, ...), inputs are where to stop. A TypeError is raised if the network runs in
        float16.
        '''
        roots = [elem.grad_fn for elem in outputs if elem.grad_fn is not None]
        self.batch_size = len(outputs[0]) if outputs else 0
        begins = {elem.grad_fn for elem in inputs if elem.grad_fn is not None}
        before = {parent for node in begins for parent, _ in node.next_functions} - begins
        parents = {
            node: [(index, parent) for index, (parent, _) in enumerate(node.next_functions)
                   if parent is not None and node not in begins]
            for node in walk(roots, before)
        }
        used = {node.rule for node in parents if isinstance(rule_of(node), SinglePass)}
        if not used.issubset(rules) and not any(isinstance(rule, Relative) for rule in used.intersection(rules)):
            return False
        if not roots:
            return True
        # in PyTorch 2.4, not all nodes tell
        results = [elem for node in parents for elem in metadata_of(node)]
        if any(elem.dtype == torch.float16 for elem in (*outputs, *results)):
            raise TypeError(
                'Contributions are products of all activations along a path, for which float16 has not the range: '
                'run the network in bfloat16 or float32.'
            )
        for node in roots:
            node.register_prehook(self._start)
        for node in parents:
            if self.batch_size > 1 and moves_first(node):
                node.register_prehook(functools.partial(self._note_moved, function_of(node)))
        pending = collections.Counter(parent for edges in parents.values() for _, parent in edges)
        is_single = sum(pending[node] for node, edges in parents.items() if not edges) == 1
        states = itertools.count(1)
        # several inputs are compared with each other like several uses of the same
        inputs = None if is_single else next(states)

        arrivals = {node: [] for node in parents}
        for node in roots:
            # several outputs are the begins of different paths
            path = _Path(0 if len(roots) == 1 else next(states))
            self.exponents[path.begin] = self.exponents[0]
            arrivals[node].append((None, 0, path))
        meetings, joins, compared, edges = {}, {}, {}, collections.defaultdict(dict)
        queue, num_open = [node for node in parents if not pending[node]], len(roots)
        while queue:
            node = queue.pop()
            is_input = not parents[node]
            # where everything passes a single node, a factor would be the same for all inputs
            is_bottleneck = num_open == len(arrivals[node])
            num_open += len(parents[node]) - len(arrivals[node])
            if len(arrivals[node]) > 1 or is_input and not is_single:
                state = inputs if is_input and not is_single else next(states)
                for child, index, path in arrivals[node]:
                    if child is None:
                        self.exponents[state] = self.exponents[0]
                    else:
                        edges[child][index] = functools.partial(
                            self._meet, path, state, isinstance(rule_of(child), Relative)
                        )
                path = _Path(state)
                meetings[node] = path
            else:
                (child, index, path), = arrivals[node]
                if child is None:
                    meetings[node] = path
                if isinstance(rule_of(child), Relative):
                    state, path.state = path.state, next(states)
                    edges[child][index] = functools.partial(self._rescale, state, path.state)
            if is_input:
                self.final = path.state
            if len(parents[node]) > 1:
                if path.is_changed and not is_bottleneck:
                    compared[node] = path.begin
                joins[node] = path.state, {index: _Path(next(states)) for index, _ in parents[node]}
            is_identity = isinstance(rule_of(node), (PassThrough, SignalTakesAll)) or is_move(node)
            path.is_changed = path.is_changed or not is_identity
            for index, parent in parents[node]:
                arrivals[parent].append((node, index, joins[node][1][index] if node in joins else path))
                pending[parent] -= 1
                if not pending[parent]:
                    queue.append(parent)

        # only paths which changed anything have to be compared with where they began
        changed = {action.args[0].begin for actions in edges.values() for action in actions.values()
                   if action.func == self._meet and action.args[0].is_changed} | set(compared.values())
        for node, path in meetings.items():
            if path.begin in changed:
                node.register_prehook(functools.partial(self._begin, path.begin))
        for node, (state, paths) in joins.items():
            node.register_prehook(functools.partial(
                self._divide, state, compared.get(node), [path.begin for path in paths.values()]
            ))
            if not isinstance(rule_of(node), SymmetricSplit):
                node.register_hook(functools.partial(self._take, {
                    index: path.begin for index, path in paths.items() if path.begin in changed
                }))
        for node, actions in edges.items():
            node.register_hook(functools.partial(_act, actions))
        self.initial = dict(self.exponents)
        return True

    def _start(self, grad_outputs):
        '''Forget an earlier backward pass through the same graph.'''
        if self.current != backward_pass():
            self.current = backward_pass()
            self.exponents, self.sums, self.replaced = dict(self.initial), {}, {}

    def _note_moved(self, name, grad_outputs):
        '''From here on, it is not known to which example an element belongs.'''
        self.moved = name

    def _begin(self, state, grad_outputs):
        '''Paths begin with all contributions of a tensor.'''
        self.sums[state] = self._sum(grad_outputs)

    def _divide(self, state, compared, begins, grad_outputs):
        '''Paths begin with equal parts of the contributions of a sum, or with slices of a concatenation.'''
        (total, magnitude), exponents, factor = self._sum(grad_outputs), self._exponents(state), None
        if compared in self.sums:
            # in a branch of an outer block, they have the sum with which that began
            factor, self.replaced[compared] = branch_factor((total, magnitude), self.sums[compared], self.normalization)
            exponents, total, magnitude = self._exponents(compared), total * factor, magnitude * factor.abs()
        size = sum(elem.numel() for elem in grad_outputs if elem is not None) / self.batch_size
        exponent = _excess(magnitude / max(size, 1))
        if exponent is not None:
            exponents, scale = exponents + exponent, torch.exp2(-exponent)
            total, magnitude, factor = total * scale, magnitude * scale, scale if factor is None else factor * scale
        if factor is not None:
            grad_outputs = tuple(self._multiply(elem, factor) for elem in grad_outputs)
        for begin in begins:
            self.exponents[begin], self.sums[begin] = exponents, (total / len(begins), magnitude / len(begins))
        return grad_outputs

    def _take(self, begins, grad_inputs, grad_outputs):
        '''Sums of what paths begin with, where these are not equal parts.'''
        for index, begin in begins.items():
            self.sums[begin] = self._sum(grad_inputs[index:index + 1])

    def _rescale(self, state, following, relevance):
        examples = self._examples(relevance)
        dims = tuple(range(1, examples.ndim))
        exponent = None
        if examples.numel():
            exponent = _excess(torch.maximum(examples.amax(dims), -examples.amin(dims)).double())
        self.exponents[following] = self._exponents(state)
        if exponent is None:
            return relevance
        self.exponents[following] = self.exponents[following] + exponent
        # what a layer propagates belongs to nobody else
        return self._multiply(relevance, torch.exp2(-exponent), inplace=True)

    def _meet(self, path, state, inplace, relevance):
        '''Rescale what a path propagates to the sum with which it began.'''
        exponents, factor = self._exponents(path.begin), None
        if path.is_changed and path.begin in self.sums:
            factor, self.replaced[path.begin] = branch_factor(
                self._sum((relevance,)), self.sums[path.begin], self.normalization
            )
        reference = self.exponents.setdefault(state, exponents)
        if reference is not exponents:
            shift = torch.exp2(exponents - reference)
            factor = shift if factor is None else factor * shift
        return relevance if factor is None else self._multiply(relevance, factor, inplace)

    def _exponents(self, state):
        '''Exponents of a state, zero if the backward pass began after it.'''
        return self.exponents.get(state, self.exponents[0])

    def _sum(self, tensors):
        '''Sum and sum of magnitudes of each example.'''
        total, magnitude = 0., 0.
        for elem in tensors:
            if elem is not None:
                elem = self._examples(elem)
                # in double precision, but for the sums over positions, which would take several times as long
                dims = tuple(range(2, elem.ndim))
                total = total + (elem.sum(dims) if dims else elem).double().sum(1)
                norms = by_example(_norms, elem) if dims else elem.abs()
                magnitude = magnitude + norms.double().sum(1)
        return total, magnitude

    def _multiply(self, tensor, factor, inplace=False):
        if tensor is None:
            return None
        examples = self._examples(tensor)
        factor = factor.to(tensor.dtype).expand(self.batch_size).view(-1, *(1,) * (examples.ndim - 1))
        return (examples.mul_(factor) if inplace else examples * factor).view_as(tensor)

    def _examples(self, tensor):
        '''A tensor with one entry of its first dimension for each example, and at least one further dimension.'''
        if self.moved is not None:
            raise ValueError(
                f'The function of {self.moved} moves elements along the first dimension, which has the '
                f'{self.batch_size} examples, and contributions are rescaled for each: explain one at a time.'
            )
        if tensor.ndim > 1 and len(tensor) == self.batch_size:
            return tensor
        if not tensor.ndim or len(tensor) % self.batch_size:
            raise ValueError(
                f'A tensor of shape {tuple(tensor.shape)} has not the batch of {self.batch_size} examples as its first '
                'dimension, as it has to be where contributions are rescaled for each example: explain one at a time.'
            )
        return tensor.reshape(self.batch_size, -1)


def _norms(tensor):
    '''Sums of magnitudes over positions, which on CPU is faster than a norm.'''
    return tensor.abs().sum(tuple(range(2, tensor.ndim)))


def _act(actions, grad_inputs, grad_outputs):
    result = list(grad_inputs)
    for index, action in actions.items():
        if result[index] is not None:
            result[index] = action(result[index])
    return tuple(result)


def _excess(magnitude):
    '''Exponents to remove from the contributions of each example, None if there is nothing to do.'''
    # a compiled frexp is none in double precision
    exponent = magnitude.log2().floor().add(1).clamp(-126, 126)
    exponent = torch.where((exponent.abs() > EXPONENT) & (magnitude > 0) & magnitude.isfinite(), exponent, 0.)
    # waiting for another device to know whether there is takes longer than doing nothing
    return None if has_values(exponent) and not bool(exponent.any()) else exponent
