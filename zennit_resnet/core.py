'''Base class of rules that replace the gradient of a layer.'''
import copy
import sys
import threading
from contextlib import nullcontext

import torch
from torch._C import DisableTorchFunction, _set_grad_enabled
from torch.utils.checkpoint import CheckpointError
from zennit.core import Hook, RemovableHandle, RemovableHandleList
from zennit.types import BatchNorm

from .arguments import Described
from .inplace import keep_version
from .layer import Operation
from .weights import UsedModule


def check_choice(name, value, choices):
    '''Raise a ValueError which names the argument, its value and the choices, if the value is not among them.'''
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(map(repr, choices))}!')


def is_active(composite):
    '''Whether any rule of a composite, or the lack of any, counts.'''
    return not composite.hook_refs or any(hook.active for hook in composite.hook_refs)


def varies(module):
    '''Whether the output of a module for a sample depends on chance or on other samples, as it is in training mode.'''
    kinds = (BatchNorm, torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)  # pylint: disable=protected-access
    # stochastic depth is a module of torchvision, timm, and many networks
    # frozen modules of torch.jit have no mode
    return getattr(module, 'training', False) and (
        isinstance(module, kinds) or type(module).__name__.startswith(('Drop', 'StochasticDepth'))
    )


def check_evaluation(model):
    '''Raise a RuntimeError which names the module if the output of any depends on chance or on other samples.

    Parameters
    ----------
    model: :py:obj:`torch.nn.Module`
        The network.
    '''
    for name, module in model.named_modules():
        if varies(module):
            raise RuntimeError(
                f'{name or "The model"} ({type(module).__name__}) is in training mode, in which the output for one '
                'sample depends on chance or on the other samples. Call model.eval() first.'
            )


def rules_among(hooks):
    '''Rules that the hooks of a module, ``(id: hook)``, belong to.'''
    owners = (getattr(hook, '__self__', None) for hook in hooks.values())
    return [owner for owner in owners if isinstance(owner, Hook)]


def is_running(frame):
    '''Whether a frame is among those that are executed, and not one that an interrupt has left without running hooks.

    PyTorch runs no hooks for exceptions that are not errors, such as a KeyboardInterrupt.
    '''
    current = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


class _Compiler:
    '''Has functions that were compiled run in Python, as long as anyone needs that.

    PyTorch has a single setting for all functions and threads, and none before version 2.6.
    '''
    def __init__(self):
        self.lock = threading.Lock()
        self.users, self.stance = set(), None

    def pause(self, user):
        '''Run functions in Python for a user, and at least those of which the compiler is loaded by now.'''
        with self.lock:
            self.users.add(user)
            if self.stance is None and 'torch._dynamo' in sys.modules and hasattr(torch.compiler, 'set_stance'):
                self.stance = torch.compiler.set_stance('force_eager')

    def resume(self, user):
        '''Run functions as before, unless there are other users.'''
        with self.lock:
            self.users.discard(user)
            if not self.users and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


_COMPILER = _Compiler()


class Eager:
    '''Has all modules of a network run in Python, where rules can be attached to them.

    Modules that were compiled, by :py:func:`torch.compile` or :py:meth:`torch.nn.Module.compile`, run as before until
    this is removed. So do functions that were compiled, which may be inside of the network or around it.

    Parameters
    ----------
    root_module: :py:obj:`torch.nn.Module`
        The network.

    Raises
    ------
    TypeError
        If a module is a ScriptModule, quantized, sharded, or runs replicas on several devices.
    RuntimeError
        In inference mode, in which there are no gradients.
    '''
    def __init__(self, root_module):
        self.replaced, self.is_copy = [], False
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                'There is no relevance within torch.inference_mode(): leave it, torch.enable_grad() is not enough.'
            )
        for name, module in root_module.named_modules():
            label = f'{name or "The model"} ({type(module).__name__})'
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f'{label} is a ScriptModule, to which no rules can be attached: use the module it was made from.'
                )
            if isinstance(module, torch.nn.DataParallel) and len(module.device_ids) > 1:
                raise TypeError(
                    f'{label} runs replicas of its module on several devices, to which no rules are attached: use the '
                    'module inside, which is its attribute \'module\'.'
                )
            if any('FSDP' in base.__name__ or 'FullySharded' in base.__name__ for base in type(module).__mro__):
                raise TypeError(
                    f'{label} is sharded among processes, and rules need whole weights: explain the network before '
                    'fully_shard or FullyShardedDataParallel.'
                )
            if 'quantized' in type(module).__module__.split('.'):
                raise TypeError(
                    f'{label} is quantized, and rules need floating point numbers: explain the network before it is '
                    'converted.'
                )
        for module in root_module.modules():
            original = module._modules.get('_orig_mod')
            if original is not None and 'forward' in vars(module):
                self._replace(module, 'forward', original.__call__)
            if vars(module).get('_compiled_call_impl') is not None:
                self._replace(module, '_compiled_call_impl', None)
        self.pause_compiler()

    def __deepcopy__(self, memo):
        '''Copy of a network within the context, which nobody removes, and for which nothing shall be paused.'''
        duplicate = copy.copy(self)
        duplicate.replaced, duplicate.is_copy = [], True
        return duplicate

    def pause_compiler(self):
        '''Have functions run in Python, also if nothing had been compiled before.'''
        if not self.is_copy:
            _COMPILER.pause(self)

    def _replace(self, module, key, value):
        # compiled modules hand attributes on to the module inside
        self.replaced.append((vars(module), key, vars(module)[key]))
        vars(module)[key] = value

    def remove(self):
        '''Leave all modules as they were found.'''
        while self.replaced:
            attributes, key, value = self.replaced.pop()
            attributes[key] = value
        _COMPILER.resume(self)


# Arguments of the function below before the inputs.
_NUM_SETTINGS = 6


class _Propagate(torch.autograd.Function):
    '''Give the output of a layer a backward function which is the layer's rule.'''
    # pylint: disable=abstract-method,arguments-differ,too-many-arguments
    @staticmethod
    def forward(ctx, rule, module, weights, stored, output, inplace, *inputs):
        '''Return the output, which comes in a list, because a tensor argument would be returned as a view.'''
        ctx.rule = rule
        ctx.module = module
        ctx.weights = weights
        ctx.shapes = [elem.shape for elem in inputs]
        # in which the rule runs
        ctx.context = nullcontext
        ctx.set_materialize_grads(False)
        # the last one is only there to be counted: if checkpointing runs a function again outside of all modules, where
        # it is not intercepted, other tensors must not be taken for these
        ctx.save_for_backward(*stored, torch.empty(0))
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
        '''Let the rule distribute the relevance, of which there is no derivative.'''
        # only asked for where a derivative may be, as it takes longer than many rules
        return _once(ctx, relevance) if torch.is_grad_enabled() else _propagate(ctx, relevance)


def _propagate(ctx, relevance):
    '''Let the rule of a node distribute relevance.'''
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
    try:
        stored = ctx.saved_tensors[:-1]
    except CheckpointError as error:
        raise RuntimeError(
            'Checkpointing ran a part of the network again, of which not all operations can be followed: '
            'checkpoint modules instead of functions, or turn it off.'
        ) from error
    stored = [elem.to(relevance.dtype) if elem.is_floating_point() else elem for elem in stored]
    if not relevance.numel():
        # an empty batch
        return (*(None,) * _NUM_SETTINGS, *(relevance.new_zeros(shape) for shape in ctx.shapes))
    device = relevance.device.type
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with autocast, ctx.context():
        lower = ctx.rule.propagate(ctx.module, stored, relevance)
    # inputs may have been broadcast to the shape of the output, and the last ones may receive nothing
    lower = [elem if elem is None or elem.shape == shape else elem.sum_to_size(shape)
             for elem, shape in zip(lower, ctx.shapes)]
    return (*(None,) * _NUM_SETTINGS, *lower, *(None,) * (len(ctx.shapes) - len(lower)))


_once = torch.autograd.function.once_differentiable(_propagate)


class _Pending:
    '''What is kept of a call of a layer while it runs.'''
    def __init__(self, module, carriers):
        self.module, self.carriers = module, carriers
        self.versions = [elem._version for elem in carriers]  # pylint: disable=protected-access
        self.stored = self.used = None

    def finish(self):
        '''The layer has run, or an error came before that.'''
        if self.used is not None:
            self.used.finish(self.module)


class SinglePass(Described, Hook):
    '''Base class of rules that replace the gradient of a layer.

    The layer's forward runs as it is, but without gradients. Its output is then given a backward function that calls
    :py:meth:`propagate`. State is kept for each call and not for each module, so a module may be called several times.
    '''
    # whether the rule reads weights of the layer, or runs it again
    reads_layer = True

    def __init__(self):
        super().__init__()
        self._pending = {}

    def store(self, module, *inputs):
        '''Choose what is kept for the backward pass. Called before the layer runs, which may be in-place.

        Parameters
        ----------
        module: :py:obj:`torch.nn.Module`
            The layer.
        *inputs: tuple of :py:obj:`torch.Tensor`
            Those of the layer's inputs that carry relevance.

        Returns
        -------
        tuple of :py:obj:`torch.Tensor`
            Tensors to keep.
        '''
        return ()

    def propagate(self, module, stored, relevance):
        '''Distribute the relevance of the layer's output over its inputs.

        Parameters
        ----------
        module: :py:obj:`torch.nn.Module`
            A copy of the layer, with the weights it had when it was called.
        stored: list of :py:obj:`torch.Tensor`
            What :py:meth:`store` returned, in the precision of ``relevance``.
        relevance: :py:obj:`torch.Tensor`
            Upper relevance, of the shape of the output.

        Returns
        -------
        tuple of :py:obj:`torch.Tensor` or None
            Lower relevance for each input that receives any, of the shape of the input or that to which it is
            broadcast.
        '''
        raise NotImplementedError()

    def copy(self):
        '''Return a copy of this hook.'''
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
            _set_grad_enabled(True)
            pending.finish()

    def register(self, module):
        '''Register this instance to the supplied module.

        Raises
        ------
        RuntimeError
            If the module has a rule of Zennit already.
        '''
        for rule in rules_among(module._forward_pre_hooks):
            if not isinstance(rule, SinglePass) and not type(rule).__module__.startswith(__package__):
                raise RuntimeError(
                    f'{type(module).__name__} has the rule {type(rule).__name__} already, within which no rule of '
                    f'{__package__} can be used: leave the context of that rule first.'
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
            carriers = [
                elem for elem in (*args, *kwargs.values()) if isinstance(elem, torch.Tensor) and elem.requires_grad
            ]
            if not carriers or not self.active or not torch.is_grad_enabled():
                return
            _set_grad_enabled(False)
            pending = self._pending[threading.get_ident()] = _Pending(module, carriers)
            try:
                if self.reads_layer:
                    pending.used = UsedModule(module)
                pending.stored = self.store(module, *carriers)
            except BaseException:
                self._recover()
                raise

    def _post_forward(self, module, args, kwargs, output):
        '''Attach the output to the inputs by the rule.'''
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is None:
            return None
        carriers = pending.carriers
        with DisableTorchFunction():
            _set_grad_enabled(True)
            pending.finish()
            if output is None:
                # the layer raised
                return None
            given = {id(elem) for elem in (*args, *kwargs.values())}
            if any(id(elem) not in given for elem in carriers):
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
            inplace = next((index for index, elem in enumerate(carriers) if elem is first), None)
            if inplace is not None and first._version == pending.versions[inplace]:  # pylint: disable=protected-access
                # the layer is the identity
                return None
            if first._is_view():  # pylint: disable=protected-access
                # views that were made without gradients can not be modified in-place
                first = first.detach()
            if pending.used is not None:
                module = pending.used.module
            elif isinstance(module, Operation):
                # it takes over other settings in the next call
                module = copy.copy(module)
            # what the layer has changed in place was counted already
            with nullcontext() if inplace is None else keep_version(first):
                first = _Propagate.apply(
                    self, module, pending.used, pending.stored, [first], inplace, *carriers
                )
        # functions such as the maximum along a dimension return tuples with names
        return type(output)((first, *output[1:])) if isinstance(output, tuple) else first

