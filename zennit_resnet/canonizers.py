'''Canonizers which make the operations of residual networks visible to rules.'''
import sys
import threading
import warnings
import weakref

import torch
from zennit.canonizers import Canonizer
from zennit.core import Composite, Hook, RemovableHandleList
from zennit.types import Activation as ActivationType
from zennit.types import AvgPool, BatchNorm, Linear
from zennit.types import MaxPool as MaxPoolType

from .block import note_addition
from .core import Eager, is_running
from .graph import is_sigmoid, walk
from .inplace import Watch, forget, note_copy, settle
from .layer import (
    Activation,
    Addition,
    AveragePool,
    Concatenation,
    Convolution1d,
    Convolution2d,
    Convolution3d,
    FullyConnected,
    Gate,
    MaxPool,
    Normalization,
    Padding,
    Subsampling,
)
from .merging import BatchNormMerge
from .rules import RatioSplit, SignalTakesAll, Uncrop

# Rules for operations that no composite of Zennit knows about, unless the composite in use has another for them.
DEFAULT_RULES = (
    (Addition, RatioSplit()),
    (Gate, SignalTakesAll()),
    (Padding, Uncrop()),
)

# Modules of which the composite was asked already, and of which the gradient is the rule if it has none.
COVERED = (
    Linear, BatchNorm, ActivationType, AvgPool, MaxPoolType, torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten,
    torch.nn.modules.dropout._DropoutNd, torch.nn.PixelShuffle,  # pylint: disable=protected-access
)

# Functions which move elements or are the identity in evaluation, so that the gradient is the exact rule.
TRANSPARENT = frozenset('''
    view view_as reshape reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim moveaxis
    adjoint squeeze squeeze_ unsqueeze unsqueeze_ contiguous clone __getitem__ __setitem__ copy_ chunk split
    tensor_split unbind narrow select index_select gather take_along_dim expand expand_as repeat repeat_interleave
    tile roll flip rot90 broadcast_to broadcast_tensors unfold as_strided pixel_shuffle pixel_unshuffle
    channel_shuffle to type type_as float double half bfloat16 cuda cpu detach detach_ requires_grad_ __get__ __set__
    retain_grad register_hook dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout maximum minimum fmax fmin
'''.split())

ADDITIONS = frozenset('''
    add add_ __add__ __radd__ __iadd__ sub sub_ subtract subtract_ __sub__ __rsub__ __isub__ rsub
'''.split())
PRODUCTS = frozenset('''
    mul mul_ multiply multiply_ __mul__ __rmul__ __imul__
    div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__ __div__ __idiv__
'''.split())
ACTIVATIONS = frozenset('''
    relu relu_ relu6 leaky_relu leaky_relu_ rrelu rrelu_ prelu elu elu_ selu selu_ celu celu_ gelu silu mish hardtanh
    hardtanh_ hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid tanhshrink hardshrink
    softshrink threshold threshold_ clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_ neg neg_ negative
    __neg__
'''.split())
NORMALIZATIONS = frozenset(
    'batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize'.split()
)
AVERAGES = frozenset('''
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum
    interpolate upsample
'''.split())
MAXIMA = frozenset('''
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax max
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
'''.split())
CONCATENATIONS = frozenset('cat concat concatenate stack hstack vstack dstack column_stack'.split())
CONVOLUTIONS = {'conv1d': Convolution1d, 'conv2d': Convolution2d, 'conv3d': Convolution3d}


# All canonizers in use, of nested contexts the innermost last.
REGISTERED = []


class UnsupportedOperation(RuntimeError):
    '''A network uses an operation on relevance for which there is no rule.'''


class ResidualCanonizer(Canonizer):
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
        The folded weights are in place between forward passes, which is when rules use them, and the forward pass still
        runs with the original ones.
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
        if batch_norm not in ('pass', 'merge'):
            raise ValueError(f'batch_norm={batch_norm!r} is not one of \'pass\', \'merge\'!')
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
        instance = self.copy()
        instance.register(root_module, _calling_composite())
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
        self.eager = Eager(root_module)
        self.composite = None if composite is None else weakref.ref(composite)
        self.root = root_module
        self.names = {module: name for name, module in root_module.named_modules()}
        for other in self._overlapping():
            other.merge.unfold()
        REGISTERED.append(self)
        self.context = self.paused = None
        self.standins = {}
        self.local = _Local()
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
        self.handles.remove()
        self.merge.remove()
        if self in REGISTERED:
            REGISTERED.remove(self)
        self._detach()
        for module, parameters in self.parameters.items():
            module._parameters.clear()
            module._parameters.update(parameters)
        for param in self.trainable:
            param.requires_grad_(True)
        self.eager.remove()
        self.standins, self.trainable, self.parameters, self.names = {}, [], {}, {}

    def copy(self):
        '''Return a copy of this canonizer.'''
        return type(self)(batch_norm=self.batch_norm, strict=self.strict)

    # -- which module runs ---------------------------------------------------------------------------------------------

    def _enter(self, module, args):
        self.local.__dict__.setdefault('stack', [])
        stack = self._stack()
        if not stack:
            self.local.counts, self.local.seen = {}, set()
            self.local.is_grad_enabled = torch.is_grad_enabled()
            forget()
            self._start()
            self.interception.enter()
        settle(args)
        # what is inside of a module with a rule must have its own gradient, also if the rule runs it again
        opaque = _is_opaque(module) or (stack[-1].opaque if stack else self._is_inside_opaque(module))
        changes = args[0] if args and getattr(module, 'inplace', False) is True else None
        stack.append(_Call(module, opaque, self.local.counts.setdefault(module, {}), changes, sys._getframe(1)))

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
        return any(name in above and _is_opaque(parent) for parent, name in self.names.items()) if above else False

    def _leave(self, module, args, output):
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
        if not call.opaque:
            self._guard(call, carriers)
        if not stack:
            self.interception.leave()
            # nodes keep the tensors of the forward pass
            self.local.seen = set()
            self._finish(carriers)

    def _start(self):
        # checkpointing runs parts of the network again in the backward pass, for which all folded weights remain
        self.paused = self.merge.pause() if torch._C._current_graph_task_id() != -1 else None
        self.merge.unfold()
        self._detach()
        if torch.is_grad_enabled():
            self._check_evaluation()
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

    def _overlapping(self):
        '''Other canonizers in use for the same modules.'''
        return [other for other in REGISTERED if other is not self and not self.names.keys().isdisjoint(other.names)]

    def _finish(self, carriers):
        if self.paused is not None:
            self.merge.resume(self.paused)
        elif all(REGISTERED.index(other) < REGISTERED.index(self) for other in self._overlapping()):
            self.merge.fold(carriers)
        self.paused = None
        for owner, name, standin in self.standins.values():
            owner._modules[name] = standin

    def _detach(self):
        # containers which call all of their children must not find stand-ins among them
        for owner, name, _ in self.standins.values():
            owner._modules.pop(name, None)

    def _check_evaluation(self):
        for module, name in self.names.items():
            if module.training and isinstance(module, (BatchNorm, torch.nn.modules.dropout._DropoutNd)):
                raise RuntimeError(
                    f'{name} ({type(module).__name__}) is in training mode, in which the output for one sample depends '
                    'on chance or on the other samples. Call model.eval() first.'
                )

    # -- what runs in it -----------------------------------------------------------------------------------------------

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
        name = getattr(func, '__name__', str(func))
        stack = self._stack()
        if not stack or stack[-1].opaque or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in TRANSPARENT and name != '__getitem__':
            return func(*args, **kwargs)
        handler = HANDLERS.get(name)
        carriers = carriers_of((args, kwargs))
        if not carriers:
            return func(*args, **kwargs)
        if handler is not None:
            return handler(self, stack[-1], _Function(func, name, args, kwargs, carriers))
        return self._unsupported(stack[-1], _Function(func, name, args, kwargs, carriers), 'no rule covers it')

    def _unsupported(self, call, function, reason):
        '''Run a function which relevance must not reach. What computes a gate may be anything.'''
        output, check = function(), self._check(call, function.name, reason)
        for carrier in carriers_of((output,)):
            carrier.register_hook(check)
        return output

    def _check(self, call, name, reason):
        '''A backward hook which raises or warns if there is any relevance.'''
        path = self.names.get(call.module) or 'the model'
        message = (
            f'{path} ({type(call.module).__name__}) uses \'{name}\' on tensors that carry '
            f'relevance, and {reason}. Put it in a module and give that a rule in the layer map of the composite, or '
            'use ResidualCanonizer(strict=False) to have its gradient instead.'
        )
        strict = self.strict

        def check(relevance):
            relevance = relevance if isinstance(relevance, tuple) else (relevance,)
            if any(elem is not None and bool((elem != 0).any()) for elem in relevance):
                if strict:
                    raise UnsupportedOperation(message)
                warnings.warn(message, stacklevel=2)

        return check

    def _guard(self, call, outputs):
        '''Custom autograd functions are not intercepted. Relevance must not reach them.'''
        for node in walk([elem.grad_fn for elem in outputs], self.local.seen):
            source = getattr(node, '_forward_cls', None)
            if source is not None and not source.__module__.startswith(('zennit', 'torch.nn.')):
                node.register_prehook(self._check(call, source.__qualname__, 'it has a backward function of its own'))

    def _composite(self):
        return None if self.composite is None else self.composite()

    def _standin(self, call, kind, name):
        '''The stand-in of the next operation of a kind in a call.'''
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
            if self.batch_norm == 'merge':
                self.merge.watch(standin)
        standin = self.standins[key][2]
        standin.name = name
        return standin

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

    def _run(self, call, kind, function, **settings):
        '''Run a function through the stand-in for it, of which the settings become attributes.'''
        standin = self._standin(call, kind, function.name)
        for key, value in settings.items():
            setattr(standin, key, value)
        standin.function = function.rebind()
        return standin(*function.carriers)

    def _add(self, call, function):
        left, right = function.operands()
        factors = [1, function.kwargs.get('alpha', 1)]
        if 'sub' in function.name:
            # x - y is the sum of x and -y, other - x of -x and other
            factors[0 if function.name in ('__rsub__', 'rsub') else 1] *= -1
        if len(function.carriers) == 2:
            return self._run(call, Addition, function, factors=None if factors == [1, 1] else tuple(factors))
        if factors[0 if left is function.carriers[0] else 1] == 1:
            # the gradient of adding a constant passes all relevance on
            return function()
        return self._run(call, Gate, function)

    def _multiply(self, call, function):
        left, right = function.operands()
        is_division = 'div' in function.name
        if len(function.carriers) == 1:
            if is_division and right is function.carriers[0]:
                return self._unsupported(call, function, 'the divisor is the only one that does')
            return self._run(call, Gate, function)
        signal = 0 if is_division else _find_signal(left, right)
        if signal is None:
            return self._unsupported(call, function, (
                f'which factor is the signal and which the gate is ambiguous: shapes {tuple(left.shape)} and '
                f'{tuple(right.shape)}, none or both from a sigmoid'
            ))
        # the gate counts as a constant, what computes it is not visited in the backward pass
        return self._run(call, Gate, function.keep((left, right)[signal]))

    def _unary(self, call, function, kind):
        if len(function.carriers) > 1:
            return self._unsupported(call, function, 'more than one of its arguments does')
        return self._run(call, kind, function)

    def _pool(self, call, function, kind):
        given = dict(zip(_pool_arguments(function.name), function.args), **function.kwargs)
        if isinstance(given.get('dim', given.get('other')), torch.Tensor):
            # torch.max of two tensors is their maximum, of which the gradient is the rule
            return function()
        windows = dict.fromkeys(('kernel_size', 'output_size', 'stride', 'dim'))
        windows.update(padding=0, dilation=1, ceil_mode=False)
        windows.update((key, value) for key, value in given.items() if key in windows)
        if not windows['stride']:
            # torch.max_pool2d has an empty list for it
            windows['stride'] = windows['kernel_size']
        return self._run(call, kind, function, **windows)

    def _concatenate(self, call, function):
        given = dict(zip(('tensors', 'dim'), function.args), **function.kwargs)
        tensors, dim = given['tensors'], given.get('dim', given.get('axis', 0))
        is_padded = function.name in ('cat', 'concat', 'concatenate') and len(function.carriers) == 1
        if not is_padded or len(tensors) < 2 or any(bool(elem.any()) for elem in tensors if not elem.requires_grad):
            return self._run(call, Concatenation, function)
        # concatenation with zeros, as some shortcuts have it
        position = next(num for num, elem in enumerate(tensors) if elem is function.carriers[0])
        lengths = [elem.shape[dim] for elem in tensors]
        return self._run(call, Padding, function, amounts={
            dim % tensors[0].ndim: (sum(lengths[:position]), sum(lengths[position + 1:]))
        })

    def _pad(self, call, function):
        given = dict(zip(('input', 'pad', 'mode', 'value'), function.args), **function.kwargs)
        if given.get('mode', 'constant') != 'constant':
            # elements are repeated, the gradient adds up the relevance of the copies
            return function()
        pad, last = list(given['pad']), given['input'].ndim - 1
        return self._run(call, Padding, function, amounts={
            last - num: amounts for num, amounts in enumerate(zip(pad[::2], pad[1::2])) if any(amounts)
        })

    def _index(self, call, function):
        _, index = function.args
        index = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(elem, slice) and elem.step not in (None, 1) for elem in index):
            return function()
        steps = _spatial_steps(function.args[0], index)
        if not steps:
            return function()
        return self._run(call, Subsampling, function, steps=steps)

    def _linear(self, call, function):
        names = ('input', 'weight', 'bias')
        settings = () if function.name == 'linear' else ('stride', 'padding', 'dilation', 'groups')
        given = dict(zip(names + settings, function.args), **function.kwargs)
        if len(function.carriers) > 1 or given['input'] is not function.carriers[0]:
            return self._unsupported(call, function, 'its weights do')
        standin = self._standin(call, CONVOLUTIONS.get(function.name, FullyConnected), function.name)
        defaults = {'stride': 1, 'padding': 0, 'dilation': 1, 'groups': 1}
        standin.padding_mode = 'zeros'
        standin.set_call(
            function.func, given['weight'], given.get('bias'),
            **{key: given.get(key, defaults[key]) for key in settings},
        )
        return standin(given['input'])


class BlockCanonizer(ResidualCanonizer):
    '''Canonizer which finds residual blocks, for :py:class:`~zennit_resnet.rules.BlockEpsilon`.

    A block is a module which adds two tensors that depend on the input in its own forward. No function is replaced, as
    the rule takes the gradient of whatever a block computes.
    '''
    is_gradient = True

    def intercept(self, func, args, kwargs):
        '''Note additions.'''
        stack = self._stack()
        if stack and getattr(func, '__name__', '') in ADDITIONS and len(carriers_of((args, kwargs))) == 2:
            note_addition(stack[-1].module)
        return func(*args, **kwargs)


HANDLERS = {
    **dict.fromkeys(ADDITIONS, ResidualCanonizer._add),
    **dict.fromkeys(PRODUCTS, ResidualCanonizer._multiply),
    **{name: lambda self, call, function, kind=kind: self._unary(call, function, kind) for names, kind in (
        (ACTIVATIONS, Activation), (NORMALIZATIONS, Normalization), (('addcmul',), Gate),
    ) for name in names},
    **{name: lambda self, call, function, kind=kind: self._pool(call, function, kind) for names, kind in (
        (AVERAGES, AveragePool), (MAXIMA, MaxPool),
    ) for name in names},
    **dict.fromkeys(CONCATENATIONS, ResidualCanonizer._concatenate),
    **dict.fromkeys((*CONVOLUTIONS, 'linear'), ResidualCanonizer._linear),
    '__getitem__': ResidualCanonizer._index,
    'pad': ResidualCanonizer._pad,
}


class _Interception(Watch):
    '''Hand all functions on tensors over to the canonizer.'''
    def __init__(self, canonizer, is_gradient):
        super().__init__()
        self.canonizer = canonizer
        self.is_gradient = is_gradient

    def run(self, func, args, kwargs):
        '''Run a function, through a module that stands for it if it is an operation on relevance.'''
        return self.canonizer.intercept(func, args, kwargs)


class _Local(threading.local):
    '''State of a thread, of which nothing is copied.'''
    def __deepcopy__(self, memo):
        return _Local()


class _Call:
    '''A call of a module, with the number of operations of each kind in all of its calls so far.

    It is known which tensor an activation changes in place, as rules may give it a copy.
    '''
    # pylint: disable=too-many-arguments
    def __init__(self, module, opaque, counts, changes, frame):
        self.module = module
        self.opaque = opaque
        self.counts = counts
        self.changes = changes
        self.frame = frame


class _Function:
    '''A function call with its arguments.'''
    # pylint: disable=too-many-arguments
    def __init__(self, func, name, args, kwargs, carriers):
        self.func = func
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.carriers = carriers

    def __call__(self):
        return self.func(*self.args, **self.kwargs)

    def operands(self):
        '''Both operands of a binary operator.'''
        given = dict(zip(('input', 'other'), self.args), **self.kwargs)
        return given['input'], given['other']

    def keep(self, carrier):
        '''The call with all tensors but one as constants.'''
        constants = {id(elem): elem.detach() for elem in self.carriers if elem is not carrier}
        args, kwargs = _replace(self.args, constants), _replace(self.kwargs, constants)
        return _Function(self.func, self.name, args, kwargs, [carrier])

    def rebind(self):
        '''The call as a function of the tensors that carry relevance, without a reference to any of them.'''
        func = self.func
        slots = {id(elem): _Slot(num) for num, elem in enumerate(self.carriers)}
        args, kwargs = _replace(self.args, slots), _replace(self.kwargs, slots)

        def function(*tensors):
            return func(*_replace(args, tensors), **_replace(kwargs, tensors))

        return function


class _Slot(int):
    '''Place of a tensor in the arguments of a call.'''


def _replace(value, replacements):
    '''Replace tensors by slots according to their id, or slots by tensors, in nested arguments.'''
    if isinstance(value, torch.Tensor):
        return replacements.get(id(value), value) if isinstance(replacements, dict) else value
    if isinstance(value, _Slot):
        return replacements[value]
    if isinstance(value, dict):
        return {key: _replace(elem, replacements) for key, elem in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replace(elem, replacements) for elem in value)
    return value


def carriers_of(value):
    '''All tensors that carry relevance in nested arguments, in their order.'''
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for elem in value for tensor in carriers_of(elem)]


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


def _is_opaque(module):
    '''Whether what happens inside a module is covered by a rule of the module itself.'''
    if any(isinstance(getattr(hook, '__self__', None), Hook) for hook in module._forward_pre_hooks.values()):
        return True
    return (
        isinstance(module, COVERED)
        and not isinstance(module, torch.nn.MultiheadAttention)
        and type(module).__module__.startswith('torch.nn.')
    )


def _pool_arguments(name):
    '''Names of the leading arguments of a function over positions.'''
    if name.startswith('adaptive'):
        return 'input', 'output_size'
    if 'pool' not in name:
        return 'input', 'dim'
    return 'input', 'kernel_size', 'stride', 'padding', *(('dilation',) if 'max' in name else ()), 'ceil_mode'


def _find_signal(left, right):
    '''Index of the signal among two factors, None if ambiguous.'''
    if left.numel() != right.numel():
        return 0 if left.numel() > right.numel() else 1
    is_gate = [is_sigmoid(elem) for elem in (left, right)]
    return is_gate.index(False) if is_gate.count(True) == 1 else None


def _spatial_steps(tensor, index):
    '''Steps of the trailing dimensions, empty if the index does anything but subsample these from their start.'''
    if Ellipsis in [elem for elem in index if elem is Ellipsis]:
        position = next(num for num, elem in enumerate(index) if elem is Ellipsis)
        index = index[:position] + (slice(None),) * (tensor.ndim - len(index) + 1) + index[position + 1:]
    index = index + (slice(None),) * (tensor.ndim - len(index))
    if not all(isinstance(elem, slice) and elem.start in (None, 0) and elem.stop is None for elem in index):
        return ()
    if tensor.ndim not in (3, 4, 5) or any(elem.step not in (None, 1) for elem in index[:2]):
        return ()
    return tuple(elem.step or 1 for elem in index[2:])
