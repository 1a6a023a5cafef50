'''Canonizers which make the operations of residual networks visible to rules.'''
import functools
import gc
import threading
import weakref
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from zennit.canonizers import Canonizer
from zennit.core import RemovableHandleList

from .._autograd import nodes_of, walk
from .._compat import base_of, caller, in_backward, is_replacing, is_running, registering_composite
from .._inplace import Watch, forget, note_copy, settle, with_view
from .._nested import active_tensors
from ..arguments import Described, check_choice, check_flag
from ..layer import LINEAR
from ..rules.block import note_addition
from . import derived, layers
from .batch_norm import BatchNormMerge, has_statistics
from .batches import Images, independent_shapes
from .calls import ForwardPass, ModuleCall, is_opaque, keep_stored, single_pass
from .eager import Eager, check_evaluation, is_active
from .functions import FunctionCall, fully_connected
from .operations import DEFAULT_RULES, OPERATIONS, TRAINING, TRANSPARENT, handle, is_training
from .refusals import Refusing, as_positional, check_output, check_rules, check_weight, in_use, undo
from .sinks import Sinks
from .weight_log import WeightLog

# All canonizers in use, of nested contexts the innermost last.
REGISTERED = []
# Composites of Zennit that were registered while they were in use.
REPLACED = weakref.WeakSet()
# The composite of this package that is being registered. Those of Zennit do not tell their canonizers who they are.
_REGISTERING = ContextVar('composite', default=None)


@contextmanager
def registering(composite):
    '''Have canonizers that are applied in this context ask a composite for the rules of operations.'''
    token = _REGISTERING.set(composite)
    try:
        yield
    finally:
        _REGISTERING.reset(token)


class ResidualCanonizer(Refusing, Described, Canonizer):
    '''Canonizer for residual networks of any source.

    Additions, gates, activations, poolings and other operations that a network writes as functions are found while its
    modules run, and are run through modules of :py:mod:`zennit_resnet.layer` instead, which receive their rules from
    the composite like any other module. They are children of the module whose forward ran them (for instance
    ``layer1.0.addition``), attached whenever the network does not run. What they compute is bit for bit the same.

    An operation is of concern if it is on a path from the input to the output: for as long as the canonizer is
    registered, no parameter requires a gradient, so a tensor requires one only if it depends on the input. So adding
    a bias or a constant is not a skip connection.

    Relevance that constants kept in the last backward pass, such as class tokens that are concatenated, and those of
    ``parameters='sink'``, is the attribute ``sinks``, a dict of tensors of shape (batch,) by name. A composite that is
    registered has it as well.

    Parameters
    ----------
    batch_norm: str, optional
        ``'pass'`` (default) leaves batch normalization alone, relevance passes it. With ``'merge'``, rules see the
        linear layer before it with the batch normalization folded into its weights (not if its output has other uses).
        The folded weights are in place while a single-pass rule runs, for other rules between forward passes, and the
        forward pass still runs with the original ones.
    strict: bool, optional
        If ``True`` (default), an operation without a rule raises :py:class:`UnsupportedOperation`. If ``False``, it
        warns, and the gradient takes the place of the rule.
    attention: str, optional
        Products over dimensions of values with weights that were computed by a softmax or sigmoid: ``'value'``
        (default) counts the weights as constants, so that all relevance goes to the values. ``'half'`` gives each
        factor a half, see :py:class:`~zennit_resnet.rules.HalfEach`, and relevance of the weights goes through the
        softmax by :py:class:`~zennit_resnet.rules.SoftmaxTaylor`, which does not conserve it.
    parameters: str, optional
        Constants that are added to a signal and differ over more than one dimension, as embeddings of positions do:
        with ``'pass'`` (default), all relevance passes to the signal. With ``'sink'``, they receive the share of an
        addend.

    A ValueError is raised if an argument is not one of its choices.
    '''
    # whether the gradient is the rule of all functions
    is_gradient = False

    def __init__(self, batch_norm='pass', strict=True, attention='value', parameters='pass'):
        check_choice('batch_norm', batch_norm, ('pass', 'merge'))
        check_choice('attention', attention, ('value', 'half'))
        check_choice('parameters', parameters, ('pass', 'sink'))
        check_flag('strict', strict)
        self.batch_norm = batch_norm
        self.strict = strict
        self.attention, self.parameters, self.sinks = attention, parameters, Sinks()
        self.handles = RemovableHandleList()

    def apply(self, root_module):
        '''Apply this to a network while a composite is registered, and get a list of the instance that does it.'''
        composite = _REGISTERING.get() or registering_composite()
        if composite is None:
            raise RuntimeError(
                f'{type(self).__name__} has no composite to ask for rules: give it to a composite, as '
                'in EpsilonPlus(canonizers=[ResidualCanonizer()]), or call its register(model, composite).'
            )
        if composite in REPLACED:
            REPLACED.discard(composite)
            raise RuntimeError(in_use(composite))
        instance = self.copy()
        instance.register(root_module, composite)
        return [instance]

    def register(self, root_module, composite=None):
        '''Watch all modules of a network. The composite, if there is one, is asked for the rules of operations.

        A TypeError is raised if rules cannot be attached to a module, as it is a ScriptModule, quantized, sharded, or
        runs replicas on several devices, and a RuntimeError in inference mode, in which there are no gradients.
        '''
        self.names = {module: name for name, module in root_module.named_modules()}
        if self._overlapping():
            # a composite that was lost while it was registered undoes that, once it is collected
            gc.collect()
        self.eager = Eager(root_module)
        self.composite, self.finalizer = None, None
        if composite is not None:
            self.composite, composite.sinks = weakref.ref(composite), self.sinks
            self.finalizer = weakref.finalize(composite, undo, composite.handles, type(composite).__name__)
            self.finalizer.atexit = False
        self.root = root_module
        self.suspended = []
        for other in self._overlapping():
            other.merge.unfold()
            composite = other._composite()
            self.suspended += [] if composite is None else [hook for hook in composite.hook_refs if hook.active]
        for hook in self.suspended:
            hook.active = False
        REGISTERED.append(self)
        self.context = self.paused = None
        self.surrogates, self.leaves, self.weights = {}, {}, WeightLog()
        self.independent = independent_shapes(root_module)
        self.local, self.running = ForwardPass(), set()
        # nodes that need not be guarded by thread, as parts of a forward pass may run in other threads
        self.known = {}
        self.interception = Watch(self)
        # zennit 1.0.0 replaces parameters of layers with new objects when its rules run
        self.originals = {module: dict(module._parameters) for module in self.names}
        self.trainable = [param for param in root_module.parameters() if param.requires_grad]
        self.merge = BatchNormMerge()
        for param in self.trainable:
            param.requires_grad_(False)
        self.handles.append(root_module.register_forward_pre_hook(self._note_arguments, with_kwargs=True))
        for module in self.names:
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self):
        '''Leave the network as it was found.'''
        self._recover()
        self.interception.leave()
        if self.finalizer is not None:
            self.finalizer.detach()
        if self.names and is_replacing():
            REPLACED.add(self._composite())
        self.handles.remove()
        self.merge.remove()
        if self in REGISTERED:
            REGISTERED.remove(self)
        for hook in self.suspended:
            hook.active = True
        self._detach()
        for module, parameters in self.originals.items():
            module._parameters.clear()
            module._parameters.update(parameters)
        for param in self.trainable:
            param.requires_grad_(True)
        self.eager.remove()
        self.surrogates, self.trainable, self.suspended, self.originals, self.names = {}, [], [], {}, {}
        self.leaves, self.weights = {}, WeightLog()

    def copy(self):
        return type(self)(self.batch_norm, self.strict, self.attention, self.parameters)

    def _note_arguments(self, module, args, kwargs):
        if not self._stack() and not self.local.images.is_checking:
            self.local.images = Images((args, kwargs))

    def _enter(self, module, args, kwargs):
        given = (*args, *kwargs.values())
        if given and hasattr(given[0], '_view') and getattr(module, 'inplace', False) is True:
            args, kwargs = with_view(given[0], (args, kwargs))
            return self._enter(module, args, kwargs) or (args, kwargs)
        rule = self.leaves.get(module)
        if rule is not None and rule.active and self.local.stack:
            # it runs without gradients, so that nothing inside is an operation on relevance
            self.local.leaf = module
            settle(given)
            self.weights.note(module, self.local.is_active, self.paused is not None)
            return None
        if self.local.images.is_checking:
            return None
        stack = self._stack()
        if not stack:
            self.local.begin()
            if module is not self.root:
                self.local.images = Images()
            composite = self._composite()
            self.local.is_active = composite is None or is_active(composite)
            forget()
            # a thread of a forward pass that runs in another one
            self.local.is_part = bool(self.running) and module is not self.root
            self.local.before = set(walk(nodes_of(active_tensors(given))))
            self.local.known = self.known.setdefault(threading.get_ident(), self.local.known)
            if not self.local.is_part:
                self._start(given)
            elif self.batch_norm == 'merge' and any(map(has_statistics, self.names)):
                raise RuntimeError(
                    f'{self._label(module)} runs in another thread than the {type(self.root).__name__} it is a part '
                    'of, where batch normalization is not found to fold it: choose batch_norm=\'pass\', or run it in '
                    'the same thread.'
                )
            if module is self.root:
                self.running.add(threading.get_ident())
            self.interception.enter()
        settle(given)
        weights = self.weights.note(module, self.local.is_active, self.paused is not None)
        # what is inside of a module with a rule must have its own gradient, also if the rule runs it again
        opaque = is_opaque(module) or (stack[-1].opaque if stack else self._is_inside_opaque(module))
        changes = given[0] if given and getattr(module, 'inplace', False) is True else None
        active = active_tensors(given) if opaque and stack and not stack[-1].opaque else ()
        begin = nodes_of(active) if active else None
        counts = self.local.counts.setdefault(module, {})
        stack.append(ModuleCall(module, opaque, counts, changes, begin, weights, caller()))
        if kwargs or len(args) != 1:
            return as_positional(self._label(module), module, args, kwargs)
        return None

    def _recover(self):
        '''Forget a forward pass that was interrupted by an exception for which PyTorch runs no hooks.'''
        stack = self.local.stack
        if stack:
            stack.clear()
            self.running.discard(threading.get_ident())
            forget()
            torch.set_grad_enabled(self.local.is_grad_enabled)

    def _stack(self):
        '''Calls of modules that are running.'''
        stack = self.local.stack
        if stack and not is_running(stack[-1].frame):
            self._recover()
        return stack

    def _is_inside_opaque(self, module):
        path = self.names.get(module, '').split('.')
        above = {'.'.join(path[:num]) for num in range(1, len(path))}
        return any(name in above and is_opaque(parent) for parent, name in self.names.items()) if above else False

    def _leave(self, module, args, output):
        self.local.leaf = None
        stack = self.local.stack
        if stack and self.local.is_grad_enabled and not torch.is_grad_enabled():
            derived.note(type(module).__name__, args, {}, output)
        # this is called for exceptions before the module was entered as well
        if not stack or stack[-1].module is not module:
            return
        call = stack.pop()
        if call.changes is not None:
            note_copy(call.changes, output)
        if not stack:
            settle(output)
            forget()
            # before anything raises
            self.running.discard(threading.get_ident())
            self.interception.leave()
        active = active_tensors((output,))
        if not stack and self.local.is_active and self.local.is_grad_enabled:
            # also attributes of objects of any class
            active = active or active_tensors(vars(output) if hasattr(output, '__dict__') else ())
            self._check_batch(output)
            check_output(self.root, args, output, active)
            self._follow_softmaxes(active)
            if self.is_gradient:
                self.weights.finish(active)
        if self.local.is_active:
            if call.weights is not None and active:
                self.weights.watch(call.weights, active, call.opaque, self.is_gradient)
            if self.is_gradient or not call.opaque:
                self._guard(call, active)
            elif call.begin is not None:
                self._note(active, call.begin)
        if not stack:
            # nodes keep the tensors of the forward pass
            if not self.running:
                self.known.clear()
            self.local.seen, self.local.known, self.local.before = set(), set(), set()
            if not self.local.is_part:
                self._finish(active)

    def _start(self, args):
        if self not in REGISTERED:
            if torch.is_grad_enabled() and active_tensors(args):
                raise RuntimeError(
                    f'The {type(self.root).__name__} is a copy that was made within the context of a composite, whose '
                    'hooks it has without being registered: copy the network outside of the context.'
                )
            self.paused = None
            return
        # checkpointing runs parts of the network again in the backward pass, for which all folded weights remain
        self.paused = self.merge.pause() if in_backward() else None
        self.merge.unfold()
        self._detach()
        self.eager.pause_compiler()
        if self.paused is None:
            self.weights = WeightLog()
        if torch.is_grad_enabled():
            check_evaluation(self.root)
            check_rules(self.names, self._composite())
        if self.context is None:
            if self.batch_norm == 'merge':
                for module in self.names:
                    self.merge.watch(module)
            # rules for first layers are given to the first module of a type: ask for all modules in their order
            self.context = {}
            composite = self._composite()
            if composite is not None:
                for module, name in self.names.items():
                    composite.module_map(self.context, name, module)
            self.leaves = {module: single_pass(module) for module in self.names
                           if module is not self.root and not module._modules}
            for module in self.names:
                self.handles.extend(keep_stored(module))

    def _label(self, module):
        return f'{self.names.get(module) or "The model"} ({type(module).__name__})'

    def _overlapping(self):
        return [other for other in REGISTERED if other is not self and not self.names.keys().isdisjoint(other.names)]

    def _finish(self, active):
        if self not in REGISTERED:
            return
        if self.paused is not None:
            self.merge.resume(self.paused)
        elif all(REGISTERED.index(other) < REGISTERED.index(self) for other in self._overlapping()):
            self.weights.renew(self.merge.fold(active))
        for tensor in active:
            self._mark_last(tensor)
        derived.forget()
        self.paused = None
        for owner, name, surrogate in self.surrogates.values():
            owner._modules[name] = surrogate

    def _detach(self):
        # containers which call all of their children must not find surrogates among them
        for owner, name, _ in self.surrogates.values():
            owner._modules.pop(name, None)

    def look(self, func, name, args, kwargs):
        '''Look at a function before :py:meth:`intercept` runs it. Raise a RuntimeError if it is called for training.'''
        if self.local.images.number > 1:
            stack = self.local.stack
            self.local.images.look(stack[-1].module if stack else self.root, name, args, kwargs)
        if name not in TRAINING or not is_training(func, name, args, kwargs):
            return
        stack = self._stack()
        if not stack or not self.local.is_active or not (torch.is_grad_enabled() or self.local.leaf is not None):
            return
        if active_tensors((args, kwargs)):
            module = self.local.leaf or stack[-1].module
            raise RuntimeError(
                f'{self._label(module)} calls \'{func.__name__}\' for training or without running statistics, by which '
                'the output for one sample depends on chance or on the other samples of the batch. Have it called with '
                'training=self.training (attention with dropout_p=0.) and call model.eval() first, or explain one '
                'sample at a time if it has no running statistics.'
            )

    def intercept(self, func, name, args, kwargs):
        '''Run a function, through a surrogate or with a check if there is no rule, and get what it returns.'''
        stack = self._stack()
        is_plain = not stack or stack[-1].opaque or not self.local.is_active or not torch.is_grad_enabled()
        if is_plain and stack and stack[-1].opaque and name in LINEAR and self.local.is_active:
            check_weight(self._label(stack[-1].module), stack[-1].module, args, kwargs)
        active = () if is_plain or name in TRANSPARENT else active_tensors((args, kwargs))
        if not active:
            if name == 'linear' and self.has_frozen(args[1] if len(args) > 1 else kwargs['weight']):
                func = functools.partial(fully_connected, func)
            return func(*args, **kwargs)
        return handle(self, stack[-1], FunctionCall(func, name, args, kwargs, active))

    def has_frozen(self, weight):
        '''Whether a weight, or what it is a part of, would need a gradient if it were not frozen now.'''
        base = base_of(weight)
        return any(elem is param for param in self.trainable for elem in (weight, base))

    def follow(self, func, name, args, kwargs):
        '''Run a function, and have relevance refused that arrives at constants which were computed from the input.'''
        found, is_followed = None, self.local.is_active and self.local.leaf is None
        if name in derived.PLACING and is_followed and torch.is_grad_enabled():
            found = derived.marks_of(func, name, args, kwargs)
        output = self.intercept(func, name, args, kwargs)
        if is_followed and not (isinstance(output, torch.Tensor) and output.requires_grad):
            derived.note(name, args, kwargs, output)
        if found is not None:
            self._refuse_marked(name, *found, args[0] if name == '__setitem__' else output)
        return output

    def _note(self, outputs, begin):
        '''Do not guard what lies between outputs and the nodes of all inputs that they were computed from.'''
        self.local.known.update(walk(nodes_of(outputs), set(begin)))

    def _composite(self):
        return None if self.composite is None else self.composite()

    def surrogate_for(self, call, kind, name):
        '''Get the surrogate for the next operation of a kind and name in a call, with its rule.'''
        index = call.counts[kind.label] = call.counts.get(kind.label, -1) + 1
        key = call.module, kind, index
        if key not in self.surrogates:
            label = kind.label if index == 0 else f'{kind.label}_{index}'
            while hasattr(call.module, label):
                label += '_'
            surrogate = kind(name)
            surrogate.train(call.module.training)
            self.surrogates[key] = call.module, label, surrogate
            prefix = self.names.get(call.module, '')
            self._hook(f'{prefix}.{label}' if prefix else label, surrogate)
            if self.batch_norm == 'merge':
                self.merge.watch(surrogate)
        surrogate = self.surrogates[key][2]
        surrogate.name, surrogate.images = name, self.local.images.layout
        return surrogate

    def run_covered(self, function, active):
        '''Run a function of tensors that carry relevance. Nothing inside of it has to be guarded.'''
        begin = nodes_of(active)
        output = function()
        self._note(active_tensors((output,)), begin)
        return output

    def _hook(self, name, surrogate):
        composite = self._composite()
        template = None if composite is None else composite.module_map(self.context, name, surrogate)
        if template is None:
            template = next((rule for kind, rule in DEFAULT_RULES if isinstance(surrogate, kind)), None)
        if template is not None:
            hook = template.copy()
            if composite is not None:
                composite.hook_refs.add(hook)
            self.handles.append(hook.register(surrogate))
            self.handles.extend(keep_stored(surrogate))

    def run(self, call, kind, function, **settings):
        '''Run a function through the surrogate for it, whose attributes the settings become.'''
        surrogate = self.surrogate_for(call, kind, function.name)
        for key, value in settings.items():
            setattr(surrogate, key, value)
        surrogate.function = function.rebind()
        return self.run_covered(lambda: surrogate(*function.active), function.active)


class BlockCanonizer(ResidualCanonizer):
    '''Canonizer which finds residual blocks: modules whose forward adds two tensors that depend on the input.

    Nothing is replaced: :py:class:`~zennit_resnet.rules.BlockEpsilon` takes the gradient of whatever a block computes.
    '''
    is_gradient = True

    def look(self, func, name, args, kwargs):
        super().look(func, name, args, kwargs)
        stack, entry = self._stack(), OPERATIONS.get(name)
        if stack and entry is not None and entry.run is layers.add and len(active_tensors((args, kwargs))) == 2:
            note_addition(stack[-1].module)

    def intercept(self, func, name, args, kwargs):
        return func(*args, **kwargs)
