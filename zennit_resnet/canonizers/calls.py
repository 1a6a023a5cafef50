'''The forward pass that is running in a thread, its calls of modules, and whether rules cover what happens inside.'''
import threading
import weakref
from typing import NamedTuple

import torch
from zennit.core import BasicHook
from zennit.types import Activation, AvgPool, BatchNorm, Linear, MaxPool

from .._autograd import nodes_of
from .._compat import DisableTorchFunction, Dropout, in_backward, pre_hooks_of, rules_of
from .._nested import map_tensors, tensors_of
from .._weights import is_plain
from ..layer import Operation
from ..rules.base import SinglePass
from ..rules.block import BlockEpsilon
from .batches import Images

# Modules for which the composite was asked already. If it has no rule for them, the gradient is the rule.
COVERED = (
    Linear, BatchNorm, Activation, AvgPool, MaxPool, torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten,
    Dropout, torch.nn.PixelShuffle,
)


class Local(threading.local):
    '''State of a thread, which is not copied.'''
    def __deepcopy__(self, memo):
        return type(self)()


class ForwardPass(Local):
    '''What is known of the forward pass of a thread, before it begins.'''
    def __init__(self):
        # calls of modules that are running, and the images of the network's arguments
        self.stack, self.images = [], Images()
        self.begin()

    def begin(self):
        # whether rules count, and a module that runs without gradients by its rule
        self.is_active, self.leaf = False, None
        # whether it is only a part of one that runs in another thread
        self.is_part = False
        self.is_grad_enabled = torch.is_grad_enabled()
        # numbers of operations by their module, nodes that were guarded, those that need not be, and those of arguments
        self.counts, self.seen, self.known, self.before = {}, set(), set(), set()
        # nodes of softmaxes, with hooks that refuse relevance, if any, and whether they pass it anyway
        self.softmaxes = {}


class ModuleCall(NamedTuple):
    '''A call of a module.'''
    module: torch.nn.Module
    opaque: bool  # whether a rule covers what happens inside
    counts: dict  # numbers of operations by their kind, in all of its calls so far
    changes: torch.Tensor  # what an activation changes in place, as rules may give it a copy
    begin: set  # nodes of the graph from which a module begins that a rule covers
    weights: object
    frame: object


class Stored:
    '''What a rule of Zennit has stored, for each call of its module: the rule itself has that of the last call only.'''
    def __init__(self, rule):
        self.rule, self.before = weakref.ref(rule), {}

    def watch(self, module):
        '''Handles of hooks of the module, which follow those of the rule.'''
        return (
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, module, args):
        rule = self.rule()
        if rule is not None:
            self.before, rule.stored_tensors = rule.stored_tensors, {}

    def _leave(self, module, args, output):
        rule, before, self.before = self.rule(), self.before, {}
        if rule is None:
            return
        if in_backward():
            # checkpointing runs it again, for a graph that has the tensors of the first time
            rule.stored_tensors = before
            return
        reference, stored = self.rule, rule.stored_tensors
        # surrogates take over other settings in the next call
        settings = dict(vars(module)) if isinstance(module, Operation) else {}

        def put(relevance):
            if reference() is not None:
                reference().stored_tensors = stored
                vars(module).update(settings)

        with DisableTorchFunction():
            if not isinstance(rule, BasicHook):
                # an output would keep its graph, which keeps this
                before.update({key: map_tensors(torch.Tensor.detach, elem) for key, elem in before.items()})
            for node in nodes_of(tensors_of(output)):
                node.register_prehook(put)


def keep_stored(module):
    '''Have rules of Zennit for a module find what they stored in each of its calls.'''
    rules = dict.fromkeys(rules_of(module))
    return [
        handle for rule in rules if not isinstance(rule, (SinglePass, BlockEpsilon))
        for handle in Stored(rule).watch(module)
    ]


def single_pass(module):
    '''The rule within which a module runs without gradients, or None.'''
    return next((hook.__self__ for hook in pre_hooks_of(module)
                 if getattr(hook, '__func__', None) is SinglePass._pre_forward and hook.__self__.active), None)


def is_opaque(module):
    '''Whether what happens inside a module is covered by a rule of the module itself.'''
    if any(rule.active for rule in rules_of(module)):
        return True
    return isinstance(module, COVERED) and is_plain(module) and not isinstance(module, torch.nn.MultiheadAttention)
