'''Weights of the modules that ran in a forward pass.'''
import copy

from zennit.types import Linear

from .._autograd import nodes_of
from .._compat import DisableTorchFunction, rules_of
from .._weights import UsedWeights
from ..rules.base import SinglePass
from ..rules.block import BlockEpsilon


class WeightLog:
    '''Notes which weights modules had, and has errors raised where rules would find others.

    Single-pass rules have copies of what they need. Rules of Zennit read weights in the backward pass,
    :py:class:`~zennit_resnet.rules.BlockEpsilon` has gradients, which do not notice other data, and checkpointing runs
    modules again.
    '''
    def __init__(self):
        # weights of the last forward pass, in which a module may be called several times, and those that rules read
        self.used, self.read = {}, {}

    def note(self, module, is_active, is_again):
        '''Note the weights of a module that is called, or compare them if checkpointing runs it again.'''
        if not is_active or not module._parameters and not module._buffers:
            return None
        with DisableTorchFunction():
            weights, before = UsedWeights(module), self.used.get(module)
            if not is_again:
                if before is None or not before[-1].is_same(weights):
                    self.used[module] = [*(before or ()), weights]
            elif before is not None and not any(elem.is_same(weights) for elem in before):
                raise RuntimeError(
                    f'Checkpointing runs a {type(module).__name__} again in the backward pass, with other weights than '
                    'in the forward pass: have them in place until the backward pass is done, or turn it off.'
                )
        return weights

    def watch(self, weights, outputs, is_opaque, is_gradient):
        '''Have an error raised if weights that are not copied change before they are read.'''
        module = weights.module
        if not is_gradient and not (is_opaque and isinstance(module, Linear)):
            return
        if any(rule.active and not isinstance(rule, (SinglePass, BlockEpsilon)) for rule in rules_of(module)):
            # those of the call, as a hook of the user may have put others back by now
            weights = self.read[module] = copy.copy(weights)
            for node in nodes_of(outputs):
                node.register_prehook(weights.check)
        weights.watch()

    def finish(self, outputs):
        '''Have an error raised in the backward pass if gradients are rules, and other data was assigned to a weight.'''
        used = [weights for several in self.used.values() for weights in several]

        def check(relevance):
            for weights in used:
                weights.check_data()

        for node in nodes_of(outputs):
            node.register_prehook(check)

    def renew(self, modules):
        '''Take the weights of modules that were folded for those to be read.'''
        for module in modules:
            if module in self.read:
                self.read[module].renew()
