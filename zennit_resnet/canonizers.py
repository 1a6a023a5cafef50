'''Canonizers which make the operations of residual networks visible to rules.'''
import gc
import sys
import warnings
import weakref

import torch
from torch._C import DisableTorchFunction
from zennit.canonizers import Canonizer
from zennit.core import Composite, RemovableHandleList
from zennit.rules import NoMod
from zennit.types import Linear

from .arguments import Described, check_flag
from .block import BlockEpsilon, note_addition
from .calls import Call, Local, is_opaque, single_pass
from .core import Eager, SinglePass, check_choice, check_evaluation, is_active, is_running, rules_among
from .functions import FunctionCall
from .graph import carriers_of, end_of, is_arithmetic, name_of, nodes_of, tensors_of, walk
from .inplace import Watch, forget, note_copy, note_weight, settle
from .layer import Addition, Filling, Gate, LinearMap, Padding, Reduction
from .merging import BatchNormMerge
from .operations import ADDITIONS, TRANSPARENT, handle, is_training
from .rules import Proportional, RatioSplit, Refill, SignalTakesAll, Uncrop
from .weights import UsedWeights

# Rules for operations that no composite of Zennit knows about, unless the composite in use has another for them.
DEFAULT_RULES = (
    (Addition, RatioSplit()),
    (Gate, SignalTakesAll()),
    (Padding, Uncrop()),
    (Filling, Refill()),
    (Reduction, Proportional()),
)

# All canonizers in use, of nested contexts the innermost last.
REGISTERED = []
# Composites of Zennit that were registered while they were in use.
REPLACED = weakref.WeakSet()


# Functions of PyTorch with a backward function of their own that change nothing, such as that of backward hooks.
IDENTITIES = frozenset(['BackwardHookFunction'])
# What to do about functions for which a layer map is the wrong remedy.
REMEDIES = {
    'softm': (
        'explain the logits, with a network that returns what its softmax is computed from. Relevance only passes a '
        'softmax that is the output of the network'
    ),
    'CheckpointFunction': 'checkpoint with use_reentrant=False, or turn checkpointing off',
}


class UnsupportedOperation(RuntimeError):
    '''A network uses an operation on relevance for which there is no rule.'''


class ResidualCanonizer(Described, Canonizer):
    '''Canonizer for residual networks of any source.

    Additions, gates, activations, poolings and other operations that a network writes as functions are found while its
    modules run, and are run through modules of :py:mod:`zennit_resnet.layer` instead, which receive their rules from
    the composite like any other module. They are children of the module whose forward ran them (for instance
    ``layer1.0.addition``), attached whenever the network does not run. What they compute is bit for bit the same.

    An operation is of concern if it is on a path from the input to the output: for as long as the canonizer is
    registered, no parameter requires a gradient, so a tensor requires one only if it depends on the input. Hence adding
    a bias or a constant is not a skip connection.

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

    Raises
    ------
    ValueError
        If ``batch_norm`` is neither ``'pass'`` nor ``'merge'``.
    '''
    # whether the gradient is the rule of all functions
    is_gradient = False

    def __init__(self, batch_norm='pass', strict=True):
        check_choice('batch_norm', batch_norm, ('pass', 'merge'))
        check_flag('strict', strict)
        self.batch_norm = batch_norm
        self.strict = strict
        self.handles = RemovableHandleList()

    def apply(self, root_module):
        '''Apply this canonizer to a module.

        Parameters
        ----------
        root_module: :py:obj:`torch.nn.Module`
            The network.

        Returns
        -------
        list of :py:obj:`ResidualCanonizer`
            A list of the single instance that was registered.
        '''
        composite = _calling_composite()
        if composite in REPLACED:
            REPLACED.discard(composite)
            raise RuntimeError(_in_use(composite))
        instance = self.copy()
        instance.register(root_module, composite)
        return [instance]

    def register(self, root_module, composite=None):
        '''Watch all modules of a network.

        Parameters
        ----------
        root_module: :py:obj:`torch.nn.Module`
            The network.
        composite: :py:obj:`zennit.core.Composite`, optional
            The composite to ask for the rules of operations. Without, additions are split by ratio.

        Raises
        ------
        TypeError
            If rules can not be attached to a module, as it is a ScriptModule or runs replicas on several devices.
        '''
        self.names = {module: name for name, module in root_module.named_modules()}
        if self._overlapping():
            # a composite that was lost while it was registered undoes that, once it is collected
            gc.collect()
        self.eager = Eager(root_module)
        self.composite, self.finalizer = None, None
        if composite is not None:
            self.composite = weakref.ref(composite)
            self.finalizer = weakref.finalize(composite, _undo, composite.handles, type(composite).__name__)
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
        # weights of the modules that ran, to be the same if checkpointing runs them again
        self.standins, self.leaves, self.used = {}, {}, {}
        self.local = Local()
        self.interception = _Interception(self, self.is_gradient)
        # zennit 1.0.0 replaces parameters of layers with new objects when its rules run
        self.parameters = {module: dict(module._parameters) for module in self.names}
        self.trainable = [param for param in root_module.parameters() if param.requires_grad]
        self.merge = BatchNormMerge()
        for param in self.trainable:
            param.requires_grad_(False)
        for module in self.names:
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self):
        '''Leave the network as it was found.'''
        self._recover()
        self.interception.leave()
        if self.finalizer is not None:
            self.finalizer.detach()
        if self.names and self._is_replaced():
            REPLACED.add(self._composite())
        self.handles.remove()
        self.merge.remove()
        if self in REGISTERED:
            REGISTERED.remove(self)
        for hook in self.suspended:
            hook.active = True
        self._detach()
        for module, parameters in self.parameters.items():
            module._parameters.clear()
            module._parameters.update(parameters)
        for param in self.trainable:
            param.requires_grad_(True)
        self.eager.remove()
        self.standins, self.trainable, self.suspended, self.parameters, self.names = {}, [], [], {}, {}
        self.leaves, self.used = {}, {}

    def copy(self):
        '''Return a copy of this canonizer.'''
        return type(self)(batch_norm=self.batch_norm, strict=self.strict)

    # -- which module runs ---------------------------------------------------------------------------------------------

    def _enter(self, module, args):
        rule = self.leaves.get(module)
        if rule is not None and rule.active and self.local.__dict__.get('stack'):
            # it runs without gradients, so that nothing inside is an operation on relevance
            self.local.leaf = module
            settle(args)
            self._note_weights(module)
            return
        self.local.__dict__.setdefault('stack', [])
        stack = self._stack()
        if not stack:
            self.local.counts, self.local.seen, self.local.known, self.local.softmaxes = {}, set(), set(), {}
            self.local.is_grad_enabled = torch.is_grad_enabled()
            self.local.leaf = None
            composite = self._composite()
            self.local.is_active = composite is None or is_active(composite)
            forget()
            self._start(args)
            self.interception.enter()
        settle(args)
        weights = self._note_weights(module)
        # what is inside of a module with a rule must have its own gradient, also if the rule runs it again
        opaque = is_opaque(module) or (stack[-1].opaque if stack else self._is_inside_opaque(module))
        changes = args[0] if args and getattr(module, 'inplace', False) is True else None
        carriers = carriers_of(args) if opaque and stack and not stack[-1].opaque else ()
        begin = nodes_of(carriers) if carriers else None
        counts = self.local.counts.setdefault(module, {})
        stack.append(Call(module, opaque, counts, changes, begin, weights, sys._getframe(1)))

    def _note_weights(self, module):
        '''Note which weights a module has, or compare them if checkpointing runs it again in the backward pass.'''
        if not module._parameters and not module._buffers or not self.local.is_active:
            return None
        with DisableTorchFunction():
            weights, before = UsedWeights(module), self.used.get(module)
            if self.paused is None:
                if before is None or before[-1].found != weights.found:
                    self.used[module] = [*(before or ()), weights]
            elif before is not None and not any(elem.is_current() for elem in before):
                raise RuntimeError(
                    f'Checkpointing runs {self._label(module)} again in the backward pass, with other weights than in '
                    'the forward pass: have them in place until the backward pass is done, or turn checkpointing off.'
                )
        return weights

    def _recover(self):
        '''Forget a forward pass that was interrupted by an exception for which PyTorch runs no hooks.'''
        stack = self.local.__dict__.get('stack')
        if stack:
            stack.clear()
            forget()
            torch.set_grad_enabled(self.local.is_grad_enabled)

    def _stack(self):
        '''Calls of modules that are running.'''
        stack = self.local.__dict__.get('stack')
        if stack and not is_running(stack[-1].frame):
            self._recover()
        return stack

    def _is_inside_opaque(self, module):
        path = self.names.get(module, '').split('.')
        above = {'.'.join(path[:num]) for num in range(1, len(path))}
        return any(name in above and is_opaque(parent) for parent, name in self.names.items()) if above else False

    def _leave(self, module, args, output):
        self.local.leaf = None
        stack = self.local.__dict__.get('stack')
        # this is called for exceptions before the module was entered as well
        if not stack or stack[-1].module is not module:
            return
        call = stack.pop()
        if call.changes is not None:
            note_copy(call.changes, output)
        if not stack:
            settle(output)
            forget()
        carriers = carriers_of((output,))
        if not stack and self.local.is_active and self.local.is_grad_enabled:
            # also attributes of objects of any class
            carriers = carriers or carriers_of(vars(output) if hasattr(output, '__dict__') else ())
            self._check_output(args, output, carriers)
            self._follow_softmaxes(carriers)
        if self.local.is_active:
            if call.weights is not None and carriers and (call.opaque or self.is_gradient):
                self._watch_weights(call, carriers)
            if not call.opaque:
                self._guard(call, carriers)
            elif call.begin is not None:
                self._note(carriers, call.begin)
        if not stack:
            self.interception.leave()
            # nodes keep the tensors of the forward pass
            self.local.seen, self.local.known = set(), set()
            self._finish(carriers)

    def _check_output(self, args, output, carriers):
        '''Raise a RuntimeError if the input requires a gradient, but no output depends on it.'''
        tensors = tensors_of(output)
        if carriers_of(args) and not carriers and any(elem.is_floating_point() for elem in tensors):
            raise RuntimeError(
                f'The output of the {type(self.root).__name__} has no gradient: the network runs under torch.no_grad() '
                'as frozen parts often do, or detaches what it computes. Freeze parameters with requires_grad_(False) '
                'instead, which relevance passes.'
            )

    def _watch_weights(self, call, carriers):
        '''Have an error if a rule that reads weights from the module, as those of Zennit, finds others later.'''
        if self.is_gradient:
            for node in nodes_of(carriers):
                node.register_prehook(call.weights.check_data)
        elif not isinstance(call.module, Linear):
            return
        for tensor in call.module._parameters.values():
            if tensor is not None:
                note_weight(tensor, call.weights)
        rules = rules_among(call.module._forward_pre_hooks)
        if any(rule.active and not isinstance(rule, (SinglePass, BlockEpsilon)) for rule in rules):
            weights = self.checked[call.module] = UsedWeights(call.module)
            for node in nodes_of(carriers):
                node.register_prehook(weights.check)

    def _start(self, args):
        if self not in REGISTERED:
            if torch.is_grad_enabled() and carriers_of(args):
                raise RuntimeError(
                    f'The {type(self.root).__name__} is a copy that was made within the context of a composite, whose '
                    'hooks it has without being registered: copy the network outside of the context.'
                )
            self.paused = None
            return
        # checkpointing runs parts of the network again in the backward pass, for which all folded weights remain
        self.paused = self.merge.pause() if torch._C._current_graph_task_id() != -1 else None
        self.merge.unfold()
        self._detach()
        self.eager.pause_compiler()
        if self.paused is None:
            self.used, self.checked = {}, {}
        if torch.is_grad_enabled():
            check_evaluation(self.root)
            self._check_rules()
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
            self._check_parameters()

    def _label(self, module):
        '''Name and type of a module.'''
        return f'{self.names.get(module) or "The model"} ({type(module).__name__})'

    def _is_replaced(self):
        '''Whether Zennit removes the composite because it is registered for another network, without asking.'''
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not Composite.remove.__code__:
            frame = frame.f_back
        return frame is not None and frame.f_back.f_code is Composite.register.__code__

    def _check_parameters(self):
        '''Raise a RuntimeError if a rule of Zennit modifies weights that are no parameters, which it would not find.'''
        for module in self.names:
            if isinstance(module, Linear) and 'weight' not in module._parameters:
                for rule in rules_among(module._forward_pre_hooks):
                    modifiers = getattr(rule, 'param_modifiers', ())
                    if rule.active and not all(isinstance(elem, NoMod) for elem in modifiers):
                        raise RuntimeError(
                            f'{self._label(module)} computes its weight (by a parametrization, weight norm or '
                            f'pruning), and Zennit\'s {type(rule).__name__} modifies parameters only: make the weight '
                            'one (torch.nn.utils.parametrize.remove_parametrizations), or use a composite of '
                            'this package.'
                        )

    def _check_rules(self):
        '''Raise a RuntimeError if a composite of Zennit was registered within the context of this one.'''
        composite = self._composite()
        known = () if composite is None else composite.hook_refs
        for module in self.names:
            # that of this canonizer, and one of the composite
            if len(module._forward_pre_hooks) > 2:
                rules = [rule for rule in rules_among(module._forward_pre_hooks) if rule.active]
                foreign = [rule for rule in rules
                           if rule not in known and not isinstance(rule, (SinglePass, BlockEpsilon))]
                if foreign and len(rules) > len(foreign):
                    raise RuntimeError(
                        f'{self._label(module)} was given the rule {type(foreign[0]).__name__} of another composite '
                        f'within the context of {type(composite).__name__}: leave that first. To combine both, use '
                        'with_splitting or a layer map.'
                    )

    def _overlapping(self):
        '''Other canonizers in use for the same modules.'''
        return [other for other in REGISTERED if other is not self and not self.names.keys().isdisjoint(other.names)]

    def _finish(self, carriers):
        if self not in REGISTERED:
            return
        if self.paused is not None:
            self.merge.resume(self.paused)
        elif all(REGISTERED.index(other) < REGISTERED.index(self) for other in self._overlapping()):
            for linear in self.merge.fold(carriers):
                if linear in self.checked:
                    self.checked[linear].renew()
        self.paused = None
        for owner, name, standin in self.standins.values():
            owner._modules[name] = standin

    def _detach(self):
        # containers which call all of their children must not find stand-ins among them
        for owner, name, _ in self.standins.values():
            owner._modules.pop(name, None)

    # -- what runs in it -----------------------------------------------------------------------------------------------

    def look(self, func, args, kwargs):
        '''Look at a function before :py:meth:`intercept` runs it, and what it changes is copied for rules.

        Parameters
        ----------
        func: callable
            The function that was called.
        args: tuple
            Its positional arguments.
        kwargs: dict
            Its keyword arguments.

        Raises
        ------
        RuntimeError
            If what it returns depends on chance or on other samples, as it is called for training.
        '''
        if not is_training(func, args, kwargs):
            return
        stack = self._stack()
        if not stack or not self.local.is_active or not (torch.is_grad_enabled() or self.local.leaf is not None):
            return
        if carriers_of((args, kwargs)):
            module = self.local.leaf or stack[-1].module
            raise RuntimeError(
                f'{self._label(module)} calls \'{func.__name__}\' for training or without running statistics, by which '
                'the output for one sample depends on chance or on the other samples of the batch. Have it called with '
                'training=self.training and call model.eval() first, or explain one sample at a time if it has no '
                'running statistics.'
            )

    def intercept(self, func, args, kwargs):
        '''Run a function, through a module that stands for it if it is an operation on relevance.

        Parameters
        ----------
        func: callable
            The function that was called.
        args: tuple
            Its positional arguments.
        kwargs: dict
            Its keyword arguments.

        Returns
        -------
        object
            What the function returns.

        Raises
        ------
        UnsupportedOperation
            If there is no rule for the function.
        '''
        name = name_of(func)
        stack = self._stack()
        if not stack or stack[-1].opaque or not self.local.is_active or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in TRANSPARENT and name != '__getitem__':
            return func(*args, **kwargs)
        carriers = carriers_of((args, kwargs))
        if not carriers:
            return func(*args, **kwargs)
        return handle(self, stack[-1], FunctionCall(func, name, args, kwargs, carriers))

    def refuse(self, call, function, reason):
        '''Run a function which relevance must not reach. What computes a gate may be anything.

        Parameters
        ----------
        call: object
            The call of the module that runs the function.
        function: :py:obj:`zennit_resnet.operations.FunctionCall`
            The function with its arguments.
        reason: str
            Why there is no rule, for the message once relevance does reach it.

        Returns
        -------
        object
            What the function returns.
        '''
        output, check = self.run_known(function, function.carriers), self._check(call, function.name, reason)
        for carrier in carriers_of((output,)):
            carrier.register_hook(check)
        return output

    def pass_at_end(self, call, function):
        '''Run a softmax, which passes relevance to the logits it was computed from if it is the output of the network.

        Parameters
        ----------
        call: object
            The call of the module that runs the function.
        function: :py:obj:`zennit_resnet.operations.FunctionCall`
            The function with its arguments.

        Returns
        -------
        :py:obj:`torch.Tensor`
            What the function returns.
        '''
        output = self.run_known(function, function.carriers)
        with DisableTorchFunction():
            if output.requires_grad:
                self.local.softmaxes[output.grad_fn] = self._check(call, function.name, 'it is not the output')
        return output

    def _follow_softmaxes(self, outputs):
        '''Let those pass relevance which are what the network returns, and have an error of all others.'''
        at_end = {end_of(node) for node in nodes_of(outputs)}
        for node, check in self.local.softmaxes.items():
            if node in at_end and not self.is_gradient:
                node.register_prehook(_explain_logits)
                node.register_hook(lambda lower, relevance: (relevance[0], *lower[1:]))
            elif node in at_end or not self.is_gradient:
                node.register_prehook(check)
        self.local.softmaxes = {}

    def _check(self, call, name, reason):
        '''A backward hook which raises or warns if there is any relevance.'''
        path = self.names.get(call.module) or 'the model'
        where = f'{path} ({type(call.module).__name__}) uses \'{name}\' on tensors that carry relevance'
        remedy = next((text for key, text in REMEDIES.items() if key in name), None)
        if remedy is not None:
            message = f'{where}: {remedy}.'
        else:
            kind = type(call.module).__name__
            remedy_of_module = 'Put it in a module and give that a rule in the layer map of the composite'
            if call.module is not self.root and not call.module._modules and not call.module._parameters:
                remedy_of_module = (
                    f'If it is an activation, layer_map=[({kind}, PassThrough())] passes relevance, otherwise give it '
                    'another rule there'
                )
            message = (
                f'{where}, and {reason}. {remedy_of_module}, or use ResidualCanonizer(strict=False) to have its '
                'gradient instead.'
            )
        # the gradient of a softmax sums to zero, and that of the others is not what was asked for either
        strict = self.strict or remedy is not None

        def check(relevance):
            relevance = relevance if isinstance(relevance, tuple) else (relevance,)
            if any(elem is not None and bool((elem != 0).any()) for elem in relevance):
                if strict:
                    raise UnsupportedOperation(message)
                warnings.warn(message, stacklevel=2)

        return check

    def _guard(self, call, outputs):
        '''Custom autograd functions, scripted and mapped ones are not intercepted. Relevance must not reach them.'''
        for node in walk(nodes_of(outputs), self.local.seen):
            source = getattr(node, '_forward_cls', None)
            if node in self.local.known:
                continue
            if source is not None and not source.__module__.startswith('zennit') and source.__name__ not in IDENTITIES:
                node.register_prehook(self._check(call, source.__qualname__, 'it has a backward function of its own'))
            elif is_arithmetic(node):
                name = node.name().rpartition('::')[2]
                node.register_prehook(self._check(call, name, 'it runs in a scripted or mapped function'))

    def _note(self, outputs, begin):
        '''Do not guard what lies between outputs and the nodes of all inputs that they were computed from.'''
        self.local.known.update(walk(nodes_of(outputs), set(begin)))

    def _composite(self):
        return None if self.composite is None else self.composite()

    def stand_in(self, call, kind, name):
        '''Get the stand-in for the next operation of a kind, with its rule.

        Parameters
        ----------
        call: object
            The call of the module that runs the operation.
        kind: type
            Class of the stand-in, see :py:mod:`zennit_resnet.layer`.
        name: str
            Name of the function.

        Returns
        -------
        :py:obj:`torch.nn.Module`
            The stand-in.
        '''
        index = call.counts[kind.label] = call.counts.get(kind.label, -1) + 1
        key = call.module, kind, index
        if key not in self.standins:
            label = kind.label if index == 0 else f'{kind.label}_{index}'
            while hasattr(call.module, label):
                label += '_'
            standin = kind(name)
            standin.train(call.module.training)
            self.standins[key] = call.module, label, standin
            prefix = self.names.get(call.module, '')
            self._hook(f'{prefix}.{label}' if prefix else label, standin)
            if self.batch_norm == 'merge' and kind is not LinearMap:
                self.merge.watch(standin)
        standin = self.standins[key][2]
        standin.name = name
        return standin

    def run_known(self, function, carriers):
        '''Run a function, inside of which nothing has to be guarded, of tensors that carry relevance.'''
        begin = nodes_of(carriers)
        output = function()
        self._note(carriers_of((output,)), begin)
        return output

    def _hook(self, name, standin):
        composite = self._composite()
        template = None if composite is None else composite.module_map(self.context, name, standin)
        if template is None:
            template = next((rule for kind, rule in DEFAULT_RULES if isinstance(standin, kind)), None)
        if template is not None:
            hook = template.copy()
            if composite is not None:
                composite.hook_refs.add(hook)
            self.handles.append(hook.register(standin))

    def run(self, call, kind, function, **settings):
        '''Run a function through the stand-in for it.

        Parameters
        ----------
        call: object
            The call of the module that runs the function.
        kind: type
            Class of the stand-in, see :py:mod:`zennit_resnet.layer`.
        function: :py:obj:`zennit_resnet.operations.FunctionCall`
            The function with its arguments.
        **settings
            Attributes of the stand-in, which its rule needs to know.

        Returns
        -------
        object
            What the function returns.
        '''
        standin = self.stand_in(call, kind, function.name)
        for key, value in settings.items():
            setattr(standin, key, value)
        standin.function = function.rebind()
        return self.run_known(lambda: standin(*function.carriers), function.carriers)


class BlockCanonizer(ResidualCanonizer):
    '''Canonizer which finds residual blocks, for :py:class:`~zennit_resnet.rules.BlockEpsilon`.

    A block is a module which adds two tensors that depend on the input in its own forward. No function is replaced, as
    the rule takes the gradient of whatever a block computes.
    '''
    is_gradient = True

    def look(self, func, args, kwargs):
        '''Note additions.'''
        super().look(func, args, kwargs)
        stack = self._stack()
        if stack and getattr(func, '__name__', '') in ADDITIONS and len(carriers_of((args, kwargs))) == 2:
            note_addition(stack[-1].module)

    def intercept(self, func, args, kwargs):
        '''Run a function.'''
        stack = self._stack()
        if not stack or 'softmax' not in name_of(func) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        carriers = carriers_of((args, kwargs))
        function = FunctionCall(func, name_of(func), args, kwargs, carriers)
        return self.pass_at_end(stack[-1], function) if carriers else function()


class _Interception(Watch):
    '''Hand all functions on tensors over to the canonizer.'''
    def __init__(self, canonizer, is_gradient):
        super().__init__()
        self.canonizer = canonizer
        self.is_gradient = is_gradient

    def look(self, func, args, kwargs):
        '''Let the canonizer look at it.'''
        self.canonizer.look(func, args, kwargs)

    def run(self, func, args, kwargs):
        '''Run a function, through a module that stands for it if it is an operation on relevance.'''
        return self.canonizer.intercept(func, args, kwargs)


def _explain_logits(relevance):
    warnings.warn(
        'The network ends with a softmax: what is explained are the logits that it was computed from, with the '
        'relevance that was given for the probabilities. Those of a log-softmax are negative, so start from one there.',
        stacklevel=2,
    )


def _in_use(composite):
    return (
        f'{type(composite).__name__} was registered while it was in use for a network. One instance is for one network '
        'at a time: leave its context first, or call its remove(), or use another instance.'
    )


def _undo(handles, name):
    '''Leave the network of a composite that was lost as it was found.'''
    if handles:
        handles.remove()
        warnings.warn(
            f'A {name} was lost while it was registered. The network is as it was before, so that its gradients are no '
            'relevance: keep the composite for as long as it is needed, or use its context.', stacklevel=2
        )


def _calling_composite():
    '''The composite that is being registered.

    Composites of Zennit do not tell their canonizers who they are, but operations found later need their rules.
    '''
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get('self')
        if isinstance(caller, Composite) and frame.f_code.co_name == 'register':
            return caller
        frame = frame.f_back
    return None
