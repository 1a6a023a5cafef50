'''What a canonizer refuses to follow, and what to do about it.'''
import warnings
from contextlib import nullcontext

import torch
from zennit.core import BasicHook
from zennit.rules import NoMod, Pass
from zennit.types import Linear

from .. import _autograd as graph
from .._compat import DisableTorchFunction, pre_hooks_of, rules_of
from .._gates import SOFT, are_probabilities, end_of, softmaxes_before
from .._nested import active_tensors, tensors_of
from ..layer import Activation, Addition, AveragePool, Gate
from ..rules.base import SinglePass
from ..rules.block import BlockEpsilon
from ..rules.gamma import GeneralizedGamma
from ..rules.normalization import EpsilonNormalization
from ..rules.passing import PassThrough
from ..rules.splitting import EpsilonSplit
from . import derived
from .operations import HIDDEN

# What to do about functions for which a layer map is the wrong remedy.
REMEDIES = {
    'softm': (
        'explain the logits, with a network that returns what its softmax is computed from. Relevance only passes a '
        'softmax that is the output of the network. If its weights are for constants, such as a text or a learned '
        'memory, choose attention=\'half\''
    ),
    'CheckpointFunction': 'checkpoint with use_reentrant=False, or turn checkpointing off',
}


# Functions of PyTorch with a backward function of their own that change nothing, such as that of backward hooks.
IDENTITIES = frozenset(['BackwardHookFunction'])

# What to do about functions after the last layer, if that divides by its output.
TAIL = (
    'with classifier=\'epsilon\', and with GammaLRP, relevance is divided by the outputs of the last layer with '
    'weights, which it is not in proportion to after this. Explain the output of that layer, by a network that returns '
    'it, with the rest as a function for a target, or choose ResNetLRP() or BlockLRP (for sums of outputs, GammaLRP '
    'with addition=\'epsilon\')'
)


class UnsupportedOperation(RuntimeError):
    '''A network uses an operation on relevance for which there is no rule.'''


def changes_shares(node, is_folded):
    '''Whether the relevance before a function is in another proportion to its inputs than after it to its outputs.'''
    rule, module = graph.rule_of(node), graph.module_of(node)
    if rule is None:
        return 'softmax' in graph.function_of(node).lower()
    if isinstance(rule, (EpsilonSplit, GeneralizedGamma)):
        # they divide by sums as well
        return False
    if isinstance(module, Activation):
        return getattr(module, 'name', '') not in ('neg', 'relu', 'relu_')
    if isinstance(module, Gate):
        return sum(parent is not None for parent, _ in node.next_functions) > 1
    is_passed = isinstance(rule, (PassThrough, EpsilonNormalization)) and not is_folded
    return isinstance(module, (Addition, AveragePool)) or is_passed


def _explain_logits(relevance):
    warnings.warn(
        'The network ends with a softmax: what is explained are the logits that it was computed from, with the '
        'relevance that was given for the probabilities. Those of a log-softmax are negative, so start from one there.',
        stacklevel=2,
    )


def check_output(root, args, output, active):
    '''Raise a RuntimeError if the input of a network requires a gradient, but no output depends on it.'''
    with DisableTorchFunction():
        if not active and active_tensors(args) and any(elem.is_floating_point() for elem in tensors_of(output)):
            raise RuntimeError(
                f'The output of the {type(root).__name__} has no gradient: the network runs under torch.no_grad() as '
                'frozen parts often do, or detaches what it computes. Freeze parameters with requires_grad_(False) '
                'instead, which relevance passes.'
            )


def check_weight(label, module, args, kwargs):
    '''Raise a RuntimeError if a rule of Zennit modifies parameters of a layer that does not compute with these.'''
    for index, param in enumerate(('weight', 'bias'), 1) if isinstance(module, Linear) else ():
        value = kwargs.get(param, args[index] if index < len(args) else None)
        # Zennit 1.0.0 leaves attributes that hide parameters
        own = *module._parameters.values(), vars(module).get(param)
        if value is None or param in module._parameters and any(value is elem for elem in own):
            continue
        for rule in rules_of(module):
            if rule.active and not all(
                isinstance(elem, NoMod) and param not in (elem.zero_params or ())
                for elem in getattr(rule, 'param_modifiers', ())
            ):
                raise RuntimeError(
                    f'{label} computes its {param} (parametrization, weight norm, pruning, or in its forward). '
                    f'Zennit\'s {type(rule).__name__} only modifies parameters: make the {param} one (for instance '
                    'with torch.nn.utils.parametrize.remove_parametrizations), or use a composite of this package.'
                )


def as_positional(label, module, args, kwargs):
    '''Arguments as rules of Zennit know them, a tensor by position, None if nothing changes. Others are refused.'''
    # what is None may be left out
    kwargs = {key: elem for key, elem in kwargs.items() if elem is not None}
    given, ours = (*args, *kwargs.values()), (SinglePass, BlockEpsilon)
    rule = next((rule for rule in rules_of(module) if rule.active and not isinstance(rule, ours)), None)
    if rule is None or not active_tensors(given):
        return None
    if len(given) == 1:
        return given, {}
    is_run_again, is_passed = isinstance(rule, BasicHook), isinstance(rule, Pass)
    if is_run_again or not args or is_passed and len(active_tensors(args)) > 1:
        raise RuntimeError(
            f'{label} is called with {len(given)} arguments, but Zennit\'s {type(rule).__name__} only knows of one '
            'tensor. Make the others settings of the module (such as output_padding in place of output_size), give it '
            'another rule in a layer map, or use a composite of this package.'
        )
    return None


def check_rules(names, composite):
    '''Raise a RuntimeError if another composite of Zennit was registered within the context of a composite.'''
    known = () if composite is None else composite.hook_refs
    for module, name in names.items():
        # that of the canonizer, and one of the composite
        if len(pre_hooks_of(module)) <= 2:
            continue
        rules = [rule for rule in rules_of(module) if rule.active]
        foreign = [rule for rule in rules if rule not in known and not isinstance(rule, (SinglePass, BlockEpsilon))]
        if foreign and len(rules) > len(foreign):
            raise RuntimeError(
                f'{name or "The model"} ({type(module).__name__}) was given the rule {type(foreign[0]).__name__} of '
                f'another composite within the context of {type(composite).__name__}: leave that first. To combine '
                'both, use with_splitting or a layer map.'
            )


def in_use(composite):
    '''What is wrong if a composite is registered twice.'''
    return (
        f'{type(composite).__name__} was registered while it was in use for a network. One instance is for one network '
        'at a time: leave its context first, or call its remove(), or use another instance.'
    )


def undo(handles, name):
    '''Leave the network of a composite that was lost as it was found.'''
    if handles:
        handles.remove()
        warnings.warn(
            f'A {name} was lost while it was registered. The network is as it was before, so that its gradients are no '
            'relevance: keep the composite for as long as it is needed, or use its context.', stacklevel=2
        )


class Refusing:
    '''What a canonizer does about functions that relevance must not reach, and about the ends of networks.'''
    def refuse(self, call, function, reason):
        '''Run a function which relevance must not reach, for a reason. What computes a gate may be anything.'''
        output, check = self.run_covered(function, function.active), self._check(call.module, function.name, reason)
        for tensor in active_tensors((output,)):
            tensor.register_hook(check)
        return output

    def note_softmax(self, call, name, output, is_passed=False, has_rule=False):
        '''Note what a softmax returned, whether a rule passes its relevance, or has one of its own for it.'''
        with DisableTorchFunction():
            if output.requires_grad:
                check = None if has_rule else self._check(call.module, name, 'it is not the output')
                self.local.softmaxes[output.grad_fn] = check, is_passed

    def _follow_softmaxes(self, outputs):
        '''Have relevance pass the softmaxes that are the output of the network, and refused by the others.'''
        softmaxes, self.local.softmaxes = self.local.softmaxes, {}
        at_end = {end_of(node) for node in graph.nodes_of(outputs)} if softmaxes else set()
        for node, (check, is_passed) in softmaxes.items():
            if node not in at_end:
                if check is not None:
                    node.register_prehook(check)
                continue
            node.register_prehook(_explain_logits)
            if not is_passed:
                node.register_hook(lambda lower, relevance: (relevance[0], *lower[1:]))
        if at_end.isdisjoint(softmaxes):
            self._check_end(outputs)

    def _check_end(self, outputs):
        '''Refuse relevance of softmaxes at the end that are not known, or whose gradients all sum to zero.'''
        softmaxes, is_only, names = softmaxes_before(outputs)
        refused = []
        if self.is_gradient:
            shapes = {elem.shape for elem in outputs}
            refused += [node for node in softmaxes if is_only or any(
                torch.Size(elem.shape) in shapes for elem in graph.metadata_of(node)
            )]
        if softmaxes or not names.isdisjoint(SOFT):
            refused += [elem.grad_fn for elem in outputs if elem.grad_fn is not None and are_probabilities(elem)]
        for node in refused:
            node.register_prehook(self._check(self.root, 'softmax', 'it is not the output'))

    def _check(self, module, name, reason='', remedy=None):
        '''A backward hook which raises or warns if there is any relevance.'''
        label, strict = self._label(module), self.strict
        message = f'{label} uses \'{name}\' on tensors that carry relevance'
        remedy = next((text for key, text in REMEDIES.items() if key in name), remedy)
        if remedy is not None:
            message += f': {remedy}.'
        else:
            advice = 'Put it in a module and give that a rule in the layer map of the composite'
            if not module._modules and not module._parameters and not label.startswith('The model'):
                advice = (
                    f'If it is an activation, layer_map=[({type(module).__name__}, PassThrough())] passes relevance '
                    '(zennit_resnet.rules.PassThrough). '
                    'Otherwise give it another rule there'
                )
            message += f', and {reason}. {advice}, or use ResidualCanonizer(strict=False) to have its gradient instead.'

        def check(relevance):
            relevance = relevance if isinstance(relevance, tuple) else (relevance,)
            if any(elem is not None and bool((elem != 0).any()) for elem in relevance):
                if strict:
                    raise UnsupportedOperation(message)
                warnings.warn(message, stacklevel=2)

        return check

    def _check_batch(self, output):
        '''Raise a RuntimeError if functions that may compute something from several images do.'''
        images = self.local.images
        found = None if self.paused is not None else images.find_mixing(self.root, output, self.independent)
        if found is None:
            return
        module, name, is_known = found
        message = (
            f'{self._label(module)} calls \'{name}\' over the {images.number} images of the batch, by which the output '
            'for one image depends on the others' + (
                '' if is_known else ', or may do so: the network cannot be run for copies of one of them'
            ) + ': explain one image at a time, or use running statistics. If the first dimension has no images, '
            'ResidualCanonizer(strict=False) warns instead.'
        )
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)

    def _guard(self, call, outputs):
        '''Custom autograd functions, scripted and mapped ones are not intercepted. Relevance must not reach them.'''
        if self.paused is not None:
            # checkpointing runs a part again, after which relevance takes the graph of the first time
            return
        known = self.local.known, *self.known.values()
        for node in graph.walk(graph.nodes_of(outputs), self.local.seen):
            source = graph.class_of(node)
            if any(node in nodes for nodes in known):
                continue
            if source is not None and source.__name__ not in IDENTITIES and (
                source.__module__.partition('.')[0] not in ('zennit', __package__.partition('.')[0])
            ):
                if self.is_gradient and not graph.calls_back(node):
                    # with frozen weights and rules, only those that run modules in their backward pass matter
                    continue
                reason = 'it has a backward function of its own'
                node.register_prehook(self._check(call.module, source.__qualname__, reason))
            elif not self.is_gradient and (graph.is_arithmetic(node) or (
                node not in self.local.before and graph.changes_values(node, HIDDEN)
            )):
                reason = 'it runs in a scripted or mapped function, or in another thread than the module'
                node.register_prehook(self._check(call.module, graph.function_of(node), reason))

    def _refuse_marked(self, name, select, source, output):
        '''Have relevance of some elements refused, which have no gradient, unless a rule covers the module.'''
        stack = self._stack()
        if stack and (self.is_gradient or not stack[-1].opaque) and output.requires_grad:
            check = self._check(stack[-1].module, name, remedy=derived.REMEDY.format(source))
            output.register_hook(lambda relevance: check(select(relevance)))

    def _mark_last(self, tensor):
        '''Have the last layers know it if their rule divides by their output, and refuse what comes after them.'''
        layers = [
            (node, value) for node, value in graph.last_layers(tensor)
            if getattr(graph.rule_of(node), 'classifier', None) == 'epsilon'
        ]
        for node, value in layers:
            # the node has a copy of the layer
            vars(node.module)['is_last'] = value
        is_folded = all(node.context is not nullcontext for node, _ in layers)
        for node in graph.after_last_layers(tensor) if layers else ():
            if changes_shares(node, is_folded):
                # it is not in proportion to the outputs of the layers any more
                module, name = graph.module_of(node), graph.function_of(node)
                name = name if module is None else getattr(module, 'name', type(module).__name__)
                node.register_prehook(self._check(self.root, name, remedy=TAIL))
