'''Flow of relevance through the graph of a forward pass, measured without any influence on it.'''
import collections
import functools
import inspect
import re
import threading
from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as torch_module
from zennit.core import Hook

from .._autograd import function_of, is_leaf, next_sequence, parents_of, sequence_of, walk
from .._compat import DisableTorchFunction, rules_of
from .._nested import active_tensors, map_tensors
from ..rules.base import SinglePass
from ..rules.block import BlockEpsilon, GradientTimesInput
from .losses import CAUSES, LossProbe, Note, is_affine, precise


@dataclass
class Row:
    '''Relevance of a layer, of a function call that is in no layer, or of a block.

    All tensors are of shape (batch,), and of type float64 but for the numbers of values.

    Attributes
    ----------
    name: str
        Path of the module, for functions of the module in which they were called. Empty for the network itself.
    call: int
        Number of the call if the module was called several times, else 0.
    kind, type: str
        ``'layer'``, ``'function'`` or ``'block'``, and the class of the module, or name of the function.
    rule: str or None
        Class of the rule, None where the gradient takes its place.
    arrives, leaves: :py:obj:`torch.Tensor`
        Sum of the relevance that arrives at the output, and of that which leaves to the inputs.
    arrives_magnitude, leaves_magnitude: :py:obj:`torch.Tensor`
        Sum of the magnitudes of what arrives from each consumer of the output, and of what leaves to each input.
    lost_by: dict[str, :py:obj:`torch.Tensor`]
        What is lost by ``'sink'`` (constants that keep it), ``'bias'``, ``'stabilizer'``, ``'dead_units'``,
        ``'no_rule'`` and ``'unexplained'``. They sum to ``lost``. Negative values are gains.
    smallest: :py:obj:`torch.Tensor` or None
        The smallest magnitude of a denominator, before it is stabilized, among units to which relevance arrives. None
        if the rule has no denominator, or is unknown.
    nan, inf: :py:obj:`torch.Tensor`
        Number of NaN and of infinite values among what leaves.
    '''
    name: str
    call: int
    kind: str
    type: str
    rule: str
    arrives: torch.Tensor
    leaves: torch.Tensor
    arrives_magnitude: torch.Tensor
    leaves_magnitude: torch.Tensor
    lost_by: dict
    smallest: torch.Tensor
    nan: torch.Tensor
    inf: torch.Tensor

    @property
    def lost(self):
        '''What arrives and does not leave, of shape (batch,). It is negative where relevance is gained.'''
        return self.arrives - self.leaves

    @property
    def label(self):
        name = self.name or 'the network'
        return f'{self.type} in {name}' if self.kind == 'function' else f'{name} #{self.call}' if self.call else name

    @property
    def missing(self):
        '''What is lost but for what sinks keep, of shape (batch,).'''
        return self.lost - self.lost_by['sink']

    def at(self, index):
        '''The row of an example, with numbers in place of tensors.'''
        return map_tensors(lambda tensor: tensor[index].item(), self)

    def is_bad(self, threshold):
        '''Whether the row of an example loses or gains more than a threshold, or has values that are not finite.'''
        return bool(self.nan + self.inf) or not abs(self.missing) <= threshold

    def causes(self, threshold):
        '''What causes more than a threshold to be lost or gained in the row of an example, and what is not finite.'''
        lost = {key: abs(value) for key, value in self.lost_by.items()}
        threshold = max(threshold, .01 * max(lost.values()))
        keys = [key for key in sorted(lost, key=lambda key: -lost[key]) if lost[key] > threshold]
        counts = {'NaN': self.nan, 'infinite': self.inf}
        return ', '.join([
            *(key.replace('_', ' ') for key in keys), *(f'{count} {name}' for name, count in counts.items() if count)
        ])


class RecordedCall:
    '''A call of a module with rules during the forward pass, within that of its parent.'''
    def __init__(self, module, parent, rules):
        self.module, self.parent, self.rules = module, parent, rules
        self.is_container = False
        # itself, and all calls around it
        self.chain = [self]
        if parent is not None:
            parent.is_container = True
            self.chain += parent.chain

    def layer(self):
        '''The outermost call with a rule for all that it contains, else itself, or None if it called other modules.'''
        own = [] if self.is_container else [self]
        return ([None, *own] + [call for call in self.chain if any(map(_covers, call.rules))])[-1]


def _covers(hook):
    '''Whether a rule replaces what the modules inside of its module propagate.'''
    if isinstance(hook, BlockEpsilon):
        return hook.form == 'relevance' and not isinstance(hook, GradientTimesInput)
    return isinstance(hook, SinglePass) or type(hook).backward is not Hook.backward


class Recorder:
    '''Follows relevance along the edges of the graph of a single forward pass.

    The number of an operation tells when it ran, and so to which module it belongs. If the composite ``propagates``
    gradients, these become relevance by the tensor of an edge. Operations are not told apart where it is not known, as
    it is neither input nor output of a module, or has no first dimension of examples.
    '''
    def __init__(self, model, composite, batch_size):
        self.model, self.composite, self.batch_size = model, composite, batch_size
        self.is_gradient = getattr(composite, 'propagates', 'relevance') == 'gradient'
        self.probe = LossProbe(batch_size)
        self.thread = threading.get_ident()
        self.calls, self.stack, self.starts, self.owners = [], [], [], []
        self.handles, self.values, self.biased = {}, {}, {}
        self.nodes, self.flows, self.notes = [], [], collections.defaultdict(list)
        self.input = self.output = self.seed = None
        # nodes from which there is a path to the input
        self.leading = set()

    @contextmanager
    def watch(self):
        register = torch_module.register_module_forward_hook
        with ExitStack() as undo:
            undo.callback(lambda: [handle.remove() for handle in self.handles.values()])
            undo.enter_context(torch_module.register_module_forward_pre_hook(self._enter))
            if 'with_kwargs' in inspect.signature(register).parameters:
                undo.enter_context(register(self._note_bias, with_kwargs=True))
            else:
                # PyTorch 2.4 does not give these to hooks for all modules
                undo.enter_context(register(lambda module, args, output: self._note_bias(module, args, {}, output)))
            yield

    def _enter(self, module, args):
        '''Called before all other hooks of a module.'''
        # hooks for all modules are called for those of other threads, too
        if threading.get_ident() != self.thread or not (self.stack or module is self.model):
            return
        with DisableTorchFunction():
            found = rules_of(module, with_post=True)
            rules = [hook for hook in dict.fromkeys(found) if hook in self.composite.hook_refs]
            call = RecordedCall(module, self.stack[-1] if self.stack else None, rules)
            for hook in rules:
                self.probe.watch(hook, module)
            if module not in self.handles:
                # by now all rules have their hooks, so this is the last one
                self.handles[module] = module.register_forward_hook(self._leave, always_call=True)
            self.calls.append(call)
            self.stack.append(call)
            self._mark(call)
            self._keep(args)

    def _leave(self, module, args, output):
        '''Called after all other hooks of a module.'''
        if threading.get_ident() == self.thread and self.stack and self.stack[-1].module is module:
            self._mark(self.stack.pop().parent)
            self._keep(output)

    def _note_bias(self, module, args, kwargs, output):
        '''Called right after the module has run. Note layers whose bias has a share.'''
        if threading.get_ident() != self.thread or not self.stack or self.stack[-1].module is not module:
            return
        # hooks that are called before a module do not get these
        self._keep(kwargs)
        call = self.stack[-1]
        rule = next((hook for hook in call.rules if isinstance(hook, BlockEpsilon)), None)
        is_inside = any(isinstance(hook, BlockEpsilon) for elem in self.stack for hook in elem.rules)
        input = next((elem for elem in (*args, *kwargs.values()) if isinstance(elem, torch.Tensor)), None)
        if input is None or not is_affine(module) or not (self.is_gradient or is_inside):
            return
        with DisableTorchFunction():
            if output.requires_grad:
                edge = get_gradient_edge(output)
                self.biased[edge.node] = edge.output_nr, module, rule, torch.zeros_like(input[:1])

    def _mark(self, call):
        self.starts.append(next_sequence())
        self.owners.append(call)

    def _keep(self, value):
        '''Keep tensors for which gradients become relevance.'''
        if self.is_gradient:
            with DisableTorchFunction():
                for tensor in active_tensors(value):
                    edge = get_gradient_edge(tensor)
                    self.values.setdefault((edge.node, edge.output_nr), tensor.detach().clone())

    def propagate(self, output, input, seed):
        '''Propagate initial relevance of the shape of the output to the input, a leaf.'''
        edge = get_gradient_edge(input)
        self.input = edge.node, edge.output_nr
        # in the order of the backward pass
        nodes = (node for node in walk([output.grad_fn]) if not is_leaf(node))
        self.nodes = sorted(nodes, key=sequence_of, reverse=True)
        self.leading = _leading(self.nodes, edge.node)
        self.output, self.seed = output.grad_fn, self._measure(seed)
        # registered after those of rules, so what they change is changed by now
        handles = [node.register_hook(functools.partial(self._record, node)) for node in self.nodes]
        try:
            relevance, = torch.autograd.grad(output, input, seed, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        kept = getattr(getattr(self.composite, 'sinks', None), 'nodes', {})
        for node in self.nodes:
            if sequence_of(node) in kept:
                self.notes[node].append(Note(None, {'sink': kept[sequence_of(node)]}, None))
        return torch.zeros_like(input) if relevance is None else relevance

    def _record(self, node, grad_inputs, grad_outputs):
        for (parent, number), relevance in zip(node.next_functions, grad_inputs):
            # some operations compute what nothing needs, such as gradients of parameters
            if relevance is not None and parent in self.leading:
                self.flows.append((node, parent, self._measure_edge(relevance, (parent, number))))
        notes, layer = self.probe.take(), self._owner(node).layer()
        if layer is not None:
            # rules of Zennit for containers run what is inside once more, with its rules
            notes = [note for note in notes if note.rule in layer.rules]
        if node in self.biased:
            number, module, rule, zeros = self.biased[node]
            share = grad_outputs[number]
            # a rule may have taken the bias from its denominator, unless it is inactive inside of a block
            is_left_out = rule in self.probe.heard and not rule.with_bias
            if share is not None and len(share) == self.batch_size and not is_left_out:
                notes.append(Note(None, {'bias': self.probe.bias(module, share, zeros)}, None))
        self.notes[node] = notes

    def _measure_edge(self, relevance, edge):
        '''Sums of what is passed on along an edge, None if they are not known.'''
        if not self.is_gradient or edge == self.input:
            return self._measure(relevance)
        return self._measure(relevance, self.values[edge]) if edge in self.values else None

    def _measure(self, relevance, factor=None):
        '''Sums over each example of shape (4, batch), None if there is no dimension of examples.'''
        if self.batch_size > 1 and (not relevance.ndim or len(relevance) != self.batch_size):
            return None
        relevance = precise(relevance) if factor is None else precise(relevance) * precise(factor)
        relevance = relevance.reshape(self.batch_size, -1)
        return torch.stack([
            relevance.sum(1), relevance.abs().sum(1), relevance.isnan().sum(1), relevance.isinf().sum(1)
        ])

    def summarize(self):
        '''Rows in the order of the backward pass, of layers and functions in no layer, and of modules with others.'''
        names, numbers = self._names()
        calls = {node: self._owner(node) for node in self.nodes}
        # the layer that an operation is part of, or itself
        parts = {node: call.layer() or node for node, call in calls.items()}
        labels = self._merge(parts)
        flows, members, rows = self._cross(labels), collections.defaultdict(list), {}
        for node, label in labels.items():
            if label in flows:
                # otherwise nothing was propagated to it
                members[label].append(node)
        for label, nodes in members.items():
            inside = list(dict.fromkeys(parts[node] for node in nodes))
            layers = [part for part in inside if isinstance(part, RecordedCall)]
            called = [calls.get(part, part) for part in inside]
            notes = [note for node in nodes for note in self.notes[node]]
            rules = [_type_name(layer.rules[0]) for layer in layers if layer.rules]
            rows[label] = self._row(
                'layer' if layers else 'function',
                _join(names[call.module] for call in called),
                numbers[called[0]] if len(called) == 1 else 0,
                _join(_function_name(part) if part in calls else _type_name(part.module) for part in inside),
                _join(rules or [_type_name(note.rule) for note in notes if note.rule]) or None,
                flows[label], notes,
            )

        blocks = []
        for call in dict.fromkeys(call for node in self.nodes for call in reversed(calls[node].chain)):
            if not call.is_container or call.parent is None or call.layer() is not None:
                continue
            is_inside = {node: call in calls[node].chain for node in self.nodes}
            chosen = dict.fromkeys(labels[node] for node in self.nodes if is_inside[node] and labels[node] in rows)
            if chosen and all(is_inside[node] or labels[node] not in chosen for node in self.nodes):
                notes = [Note(None, rows[label].lost_by, rows[label].smallest) for label in chosen]
                rule = next(map(_type_name, call.rules), None)
                blocks.append(self._row(
                    'block', names[call.module], numbers[call], _type_name(call.module), rule,
                    self._cross(is_inside)[True], notes,
                ))
        return list(rows.values()), blocks

    @staticmethod
    def _row(kind, name, call, type_name, rule, flow, notes):
        (arrives, arrives_magnitude, _, _), (leaves, leaves_magnitude, nan, inf) = (elem.cpu() for elem in flow)
        lost_by = {key: torch.zeros_like(arrives) for key in CAUSES}
        smallest = [note.smallest.cpu() for note in notes if note.smallest is not None]
        for note in notes:
            for key, value in note.lost.items():
                lost_by[key] += torch.as_tensor(value).cpu()
        lost_by['unexplained' if rule else 'no_rule'] += arrives - leaves - sum(lost_by.values())
        return Row(
            name, call, kind, type_name, rule, arrives, leaves, arrives_magnitude, leaves_magnitude, lost_by,
            torch.stack(smallest).amin(0) if smallest else None, nan.long(), inf.long(),
        )

    def _owner(self, node):
        position = bisect_right(self.starts, sequence_of(node)) - 1
        return (self.owners[position] if position >= 0 else None) or self.calls[0]

    def _merge(self, labels):
        '''Give operations the same label if what is passed on between them is not known.'''
        merged = {}

        def find(label):
            while label in merged:
                label = merged[label]
            return label

        for source, target, amounts in self.flows:
            if amounts is None and target in labels:
                source, target = find(labels[source]), find(labels[target])
                if source is not target:
                    merged[source] = target
        return {node: find(label) for node, label in labels.items()}

    def _cross(self, labels):
        '''What arrives at operations with the same label from outside, and leaves them, by label.'''
        flows = {}

        def add(node, side, amounts):
            flows.setdefault(labels[node], [torch.zeros_like(self.seed), torch.zeros_like(self.seed)])[side] += amounts

        add(self.output, 0, self.seed)
        for source, target, amounts in self.flows:
            if labels[source] != labels.get(target):
                add(source, 1, amounts)
                if target in labels:
                    add(target, 0, amounts)
        return flows

    def _names(self):
        '''Paths of modules, and numbers of calls for modules that were called several times.'''
        names = {module: name for name, module in self.model.named_modules()}
        numbers, total, count = {}, collections.Counter(call.module for call in self.calls), collections.Counter()
        for call in self.calls:
            if call.module not in names:
                # a module that is no attribute of another
                names[call.module] = f'{names[call.parent.module]}.{_type_name(call.module)}'.lstrip('.')
            count[call.module] += 1
            numbers[call] = count[call.module] if total[call.module] > 1 else 0
        return names, numbers


def _leading(nodes, target):
    '''Nodes from which there is a path to another one, which is included.'''
    # not in the order of sequence numbers, which each thread has of its own
    children = collections.defaultdict(list)
    for node in nodes:
        for parent in parents_of(node):
            children[parent].append(node)
    found, queue = {target}, [target]
    while queue:
        fresh = [node for node in children[queue.pop()] if node not in found]
        found.update(fresh)
        queue.extend(fresh)
    return found


def _function_name(node):
    '''Name of a function by its node in the graph, such as add for AddBackward0.'''
    name = re.sub('Backward[0-9]*$', '', function_of(node)).lstrip('_')
    return re.sub('(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()


def _type_name(value):
    return type(value).__name__


def _join(names):
    names = list(dict.fromkeys(names))
    return ' + '.join(names if len(names) < 4 else [*names[:3], '...'])
