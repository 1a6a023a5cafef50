'''Base class of rules that replace the gradient of a layer.'''
import copy
import functools
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import CheckpointError
from zennit.core import Hook, RemovableHandle, RemovableHandleList

from .._autograd import class_of, nodes_of, walk
from .._compat import DisableTorchFunction, is_view, keep_version, rules_of, set_grad_enabled, version_of
from .._inplace import address_of, note_view
from .._weights import UsedModule, is_plain
from ..arguments import Described
from ..layer import Operation

# Whose rules may be nested.
PACKAGE = __package__.partition('.')[0]

# Arguments of the function below before the inputs.
_NUM_SETTINGS = 6


class _Propagate(torch.autograd.Function):
    '''Give the output of a layer a backward function which is the layer's rule.'''
    @staticmethod
    def forward(ctx, rule, module, weights, stored, output, inplace, *inputs):
        '''Return the output, which comes in a list, because a tensor argument would be returned as a view.'''
        ctx.rule = rule
        ctx.module = module
        ctx.weights = weights
        ctx.shapes = [elem.shape for elem in inputs]
        # by type of the relevance, see prepared_once
        ctx.prepared = None
        # in which the rule runs
        ctx.context = nullcontext
        ctx.set_materialize_grads(False)
        # the last one is only there to be counted: if checkpointing runs a function again outside of all modules, where
        # it is not intercepted, other tensors must not be taken for these
        tensors = [elem for elem in stored if isinstance(elem, torch.Tensor)]
        ctx.save_for_backward(*tensors, torch.empty(0))
        ctx.settings = [None if isinstance(elem, torch.Tensor) else (elem,) for elem in stored]
        if inplace is not None:
            ctx.mark_dirty(inputs[inplace])
            return inputs[inplace]
        output, = output
        if output.dtype in (torch.float16, torch.bfloat16) and hasattr(ctx, 'set_output_grad_dtype'):
            # keep relevance in single precision where the forward pass runs in half precision
            ctx.set_output_grad_dtype(torch.float32)
        return output

    @staticmethod
    def backward(ctx, relevance):
        # only asked for where a derivative may be, as it takes longer than many rules
        return _once(ctx, relevance) if torch.is_grad_enabled() else _propagate(ctx, relevance)


def _propagate(ctx, relevance):
    if relevance is None:
        # the output is used for something that receives no relevance, such as a gate
        return (None,) * (_NUM_SETTINGS + len(ctx.shapes))
    if not ctx.rule.active:
        raise RuntimeError(
            f'{type(ctx.rule).__name__} of {type(ctx.module).__name__} is inactive, or another composite is in '
            'use for the network. Single-pass rules replace the gradient of their layer and have none to fall back '
            'to: run the forward pass in the context of the backward pass.'
        )
    if relevance.dtype in (torch.float16, torch.bfloat16):
        relevance = relevance.float()
    if ctx.weights is not None:
        ctx.weights.check()
    prepared = (ctx.prepared or {}).get(relevance.dtype)
    stored = _load(ctx, relevance.dtype) if prepared is None else None
    if not relevance.numel() or not any(map(torch.Size.numel, ctx.shapes)):
        # an empty batch, or a sum over nothing
        return (*(None,) * _NUM_SETTINGS, *(relevance.new_zeros(shape) for shape in ctx.shapes))
    device = relevance.device.type
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    # weights were read then, and folding them once more takes as long as a convolution
    reads_weights = prepared is None or type(ctx.rule).prepare is SinglePass.prepare
    with autocast, ctx.context() if reads_weights else nullcontext():
        if ctx.prepared is None:
            lower = ctx.rule.distribute(ctx.module, stored, relevance)
        else:
            if prepared is None:
                prepared = ctx.prepared[relevance.dtype] = ctx.rule.prepare(ctx.module, stored, relevance.shape)
            lower = ctx.rule.propagate(ctx.module, prepared, relevance)
    # inputs may have been broadcast to the shape of the output, and the last ones may receive nothing
    lower = [elem if elem is None or elem.shape == shape else elem.sum_to_size(shape)
             for elem, shape in zip(lower, ctx.shapes)]
    return (*(None,) * _NUM_SETTINGS, *lower, *(None,) * (len(ctx.shapes) - len(lower)))


def _load(ctx, dtype):
    try:
        tensors = iter(ctx.saved_tensors[:-1])
    except CheckpointError as error:
        raise RuntimeError(
            'Checkpointing ran a part of the network again, and not all of its operations can be followed: '
            'checkpoint modules instead of functions, or turn it off.'
        ) from error
    stored = [next(tensors) if setting is None else setting[0] for setting in ctx.settings]
    return [elem.to(dtype) if isinstance(elem, torch.Tensor) and elem.is_floating_point() else elem for elem in stored]


_once = torch.autograd.function.once_differentiable(_propagate)


@contextmanager
def prepared_once(tensor):
    '''Context of several backward passes from a tensor, for which rules prepare only once. It takes memory.'''
    nodes = [node for node in walk(nodes_of([tensor])) if class_of(node) is _Propagate]
    for node in nodes:
        node.prepared = {}
    try:
        yield
    finally:
        for node in nodes:
            node.prepared = None


class SinglePass(Described, Hook):
    '''Base class of rules that replace the gradient of a layer.

    The layer's forward runs as it is, but without gradients. Its output is then given a backward function that calls
    :py:meth:`propagate`. State is kept for each call and not for each module, so a module may be called several times.
    '''
    # whether the rule reads weights of the layer, or runs it again
    reads_layer = True
    # whether the rule is only for modules that compute what their class in torch.nn does. A forward of its own may
    # compute anything from its weights, the canonizer looks inside of it and finds functions.
    for_plain = False

    def __init__(self):
        super().__init__()
        # what is kept of a call of a layer while it runs, by thread
        self._pending = {}

    def store(self, module, *inputs):
        '''Before the layer runs, choose a tuple of tensors and settings to keep of the inputs that carry relevance.'''
        return ()

    def complete(self, module, stored, output):
        '''Choose what is kept, given the output, which is none of the inputs. By default, what was stored.'''
        return stored

    def prepare(self, module, stored, shape):
        '''Compute what any relevance has in common, for :py:meth:`propagate`, see :py:func:`prepared_once`.

        It is given that in the place of what was stored, does not change it, and then reads no weights of the layer.
        '''
        return stored

    def distribute(self, module, stored, relevance):
        '''Prepare and propagate a single relevance, for which a rule may need less than for several.'''
        return self.propagate(module, self.prepare(module, stored, relevance.shape), relevance)

    def propagate(self, module, stored, relevance):
        '''Distribute the relevance of the layer's output over its inputs.

        The module is a copy of the layer, with the weights it had when it was called. What is stored is what
        :py:meth:`store` returned, as a list and in the precision of the relevance, or what :py:meth:`prepare` made of
        it. The relevance is of the shape of the output. A tuple is returned of the relevance of each input that
        receives any, or None, of the shape of the input or that to which it is broadcast.
        '''
        raise NotImplementedError()

    def copy(self):
        duplicate = copy.copy(self)
        SinglePass.__init__(duplicate)
        return duplicate

    def remove(self):
        '''When removing hooks, remove all references to stored tensors.'''
        self._recover()
        self._pending.clear()
        super().remove()

    def _recover(self):
        '''Undo what a call has left behind if an interrupt has skipped the forward hook.'''
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is not None:
            set_grad_enabled(True)
            if pending.used is not None:
                pending.used.finish(pending.module)

    def register(self, module):
        '''Register this instance to a module, which must not have a rule of Zennit already (RuntimeError).'''
        if self.for_plain and not is_plain(module):
            return RemovableHandleList([RemovableHandle(self)])
        for rule in rules_of(module):
            if not isinstance(rule, SinglePass) and not type(rule).__module__.startswith(PACKAGE):
                raise RuntimeError(
                    f'{type(module).__name__} has the rule {type(rule).__name__} already, within which no rule of '
                    f'{PACKAGE} can be used: leave the context of that rule first.'
                )
        return RemovableHandleList([
            RemovableHandle(self),
            # after hooks of the user, which may change the input
            module.register_forward_pre_hook(self._pre_forward, with_kwargs=True),
            # before them, so that they see an output with a graph, and what they do to it is not the layer's
            module.register_forward_hook(self._post_forward, with_kwargs=True, always_call=True, prepend=True),
        ])

    def _pre_forward(self, module, args, kwargs):
        '''Keep the inputs that carry relevance, and let the layer build no graph.'''
        with DisableTorchFunction():
            self._recover()
            active = [
                elem for elem in (*args, *kwargs.values()) if isinstance(elem, torch.Tensor) and elem.requires_grad
            ]
            if not active or not self.active or not torch.is_grad_enabled():
                return
            set_grad_enabled(False)
            pending = self._pending[threading.get_ident()] = SimpleNamespace(
                module=module, active=active, versions=list(map(version_of, active)), stored=None, used=None
            )
            try:
                if self.reads_layer:
                    pending.used = UsedModule(module)
                pending.stored = self.store(module, *active)
            except BaseException:
                self._recover()
                raise

    def _post_forward(self, module, args, kwargs, output):
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is None:
            return None
        active = pending.active
        with DisableTorchFunction():
            set_grad_enabled(True)
            if pending.used is not None:
                pending.used.finish(module)
            if output is None:
                # the layer raised
                return None
            given = {id(elem) for elem in (*args, *kwargs.values())}
            if any(id(elem) not in given for elem in active):
                raise RuntimeError(
                    f'A forward pre-hook of {type(module).__name__} changes the input after {type(self).__name__} has '
                    'seen it: register the hook before the composite.'
                )
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, torch.Tensor) or not first.is_floating_point():
                raise TypeError(
                    f'{type(self).__name__} needs a module which returns a floating point tensor, but '
                    f'{type(module).__name__} returned {type(first).__name__}!'
                )
            inplace = next((index for index, elem in enumerate(active) if elem is first), None)
            if inplace is not None and version_of(first) == pending.versions[inplace]:
                # the layer is the identity
                return None
            view = None
            if is_view(first):
                if inplace is None and isinstance(module, Operation) and address_of(first) == address_of(active[0]):
                    view = functools.partial(module.function, active[0])
                # views that were made without gradients cannot be modified in-place
                first = first.detach()
            if pending.used is not None:
                module = pending.used.module
            elif isinstance(module, Operation):
                # it takes over other settings in the next call
                module = copy.copy(module)
            stored = pending.stored if inplace is not None else self.complete(module, pending.stored, first)
            # what the layer has changed in place was counted already
            with nullcontext() if inplace is None else keep_version(first):
                first = _Propagate.apply(self, module, pending.used, stored, [first], inplace, *active)
            if view is not None:
                note_view(first, view)
        # functions such as the maximum along a dimension return tuples with names
        return type(output)((first, *output[1:])) if isinstance(output, tuple) else first
