'''Calls of modules that are running, and whether their rules cover what happens inside.'''
import threading

import torch
from zennit.types import Activation, AvgPool, BatchNorm, Linear, MaxPool

from .._compat import Dropout, pre_hooks_of, rules_of
from .._weights import is_plain
from ..rules.base import SinglePass

# Modules of which the composite was asked already, and of which the gradient is the rule if it has none.
COVERED = (
    Linear, BatchNorm, Activation, AvgPool, MaxPool, torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten,
    Dropout, torch.nn.PixelShuffle,
)


class Local(threading.local):
    '''State of a thread, of which nothing is copied.'''
    def __deepcopy__(self, memo):
        return Local()


class Call:
    '''A call of a module, with the number of operations of each kind in all of its calls so far.

    It is known which tensor an activation changes in place, as rules may give it a copy, and from which nodes of the
    graph a module begins that a rule covers.
    '''
    # pylint: disable=too-many-arguments
    def __init__(self, module, opaque, counts, changes, begin, weights, frame):
        self.module = module
        self.opaque = opaque
        self.counts = counts
        self.changes = changes
        self.begin = begin
        self.weights = weights
        self.frame = frame


def single_pass(module):
    '''The rule within which a module runs without gradients, None if there is none.'''
    return next((hook.__self__ for hook in pre_hooks_of(module)
                 if getattr(hook, '__func__', None) is SinglePass._pre_forward and hook.__self__.active), None)


def is_opaque(module):
    '''Whether what happens inside a module is covered by a rule of the module itself.'''
    if any(rule.active for rule in rules_of(module)):
        return True
    return (
        isinstance(module, COVERED)
        and is_plain(module)
        and not isinstance(module, torch.nn.MultiheadAttention)
    )
