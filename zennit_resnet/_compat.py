'''Everything private that this package uses of Python, PyTorch and Zennit, but for what autograd nodes tell.

``tests/test_compat.py`` has a canary for each name, as an upgrade could otherwise silently make maps wrong. Checked
with Python 3.10 to 3.13, PyTorch 2.4 to 2.13, Zennit 0.5.1 and 1.0.0.
'''
import itertools
import sys
import types
from collections import OrderedDict

import torch
from torch._C import DisableTorchFunction  # noqa: F401
from torch._C import _set_grad_enabled as set_grad_enabled  # noqa: F401
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload, OpOverloadPacket  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake  # noqa: F401
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as keep_version  # noqa: F401
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing as unrecorded  # noqa: F401
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, set_proxy_slot
from torch.nn.functional import _get_softmax_dim as softmax_dim  # noqa: F401
from torch.nn.functional import _in_projection_packed as project  # noqa: F401
from torch.nn.modules.dropout import _DropoutNd as Dropout  # noqa: F401
from torch.overrides import _get_current_function_mode_stack as function_modes  # noqa: F401
from torch.overrides import _pop_mode as pop_mode  # noqa: F401
from torch.overrides import _push_mode as push_mode  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401
from zennit.core import Composite, Hook

# Attributes of modules that compute what torch.nn.Module.__call__ runs, besides ``forward``.
FORWARD_PARTS = ('_conv_forward', '_output_padding')
# Weights are real tensors, and what is read from them is not recorded.
RECORDING = {'_allow_non_fake_inputs': True, '_error_on_data_dependent_ops': False}
COMPILED_CALL, COMPILED_MODULE = '_compiled_call_impl', '_orig_mod'


def body_of(function, **names):
    '''A function of torch.nn.functional as one that a mode sees the inside of, where names may mean other functions.'''
    names = {**function.__globals__, 'has_torch_function': lambda args: False, **names}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def version_of(tensor):
    '''How often a tensor was changed in place, None for those of inference mode, where nobody counts it.'''
    try:
        return tensor._version
    except RuntimeError:
        return None


def is_view(tensor):
    '''Whether a tensor is a view of another for autograd.'''
    return tensor._is_view()


def base_of(tensor):
    '''The tensor that a tensor is a view of, or None.'''
    return tensor._base


def backward_pass():
    '''Number of the backward pass that is running in this thread, or -1.'''
    return torch._C._current_graph_task_id()


def in_backward():
    '''Whether a backward pass is running in this thread, as it is where checkpointing runs modules again.'''
    return backward_pass() != -1


def is_traced():
    '''Whether what runs now is recorded as a graph, where no branch may depend on a value.'''
    return get_proxy_mode() is not None


def recording():
    '''A context for make_fx with real tensors, which would make a FakeTensorMode for each of them, a slow thing.'''
    return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))


def has_values(tensor):
    '''Whether reading a value of a tensor costs nothing: not while a graph is recorded, or on another device.'''
    return tensor.device.type == 'cpu' and not is_traced()


def is_recorded(tensor):
    '''Whether a tensor is computed from inputs of the graph that is recorded.'''
    mode = get_proxy_mode()
    proxy = None if mode is None or not isinstance(tensor, torch.Tensor) else get_proxy_slot(tensor, mode.tracer, None)
    queue, seen = [] if proxy is None else [proxy.proxy.node], set()
    while queue:
        node = queue.pop()
        if node.op == 'placeholder':
            return True
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return False


def as_parameter(tensor):
    '''A tensor as a parameter without gradients. A graph that is recorded would take it for a constant.'''
    tensor = tensor.detach()
    parameter, mode = torch.nn.Parameter(tensor, requires_grad=False), get_proxy_mode()
    proxy = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if proxy is not None:
        set_proxy_slot(parameter, mode.tracer, proxy)
    return parameter


def is_out_of_memory(error):
    '''Whether an error is for lack of memory, which for that of the CPU only its message tells.'''
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(key in str(error) for key in ('allocate memory', 'not enough memory'))
    )


def pre_hooks_of(module):
    '''Forward pre-hooks of a module, in their order.'''
    return module._forward_pre_hooks.values()


def hooks_of(module):
    '''Forward hooks of a module, in their order.'''
    return module._forward_hooks.values()


def hooks_of_all():
    '''Forward pre-hooks and hooks of all modules.'''
    kinds = torch.nn.modules.module
    return [*kinds._global_forward_pre_hooks.values(), *kinds._global_forward_hooks.values()]


def rules_of(module, with_post=False):
    '''Rules of Zennit and of this package that are attached to a module.'''
    owners = [getattr(hook, '__self__', None) for hook in pre_hooks_of(module)]
    if with_post:
        owners += [getattr(hook, '__self__', None) for hook in hooks_of(module)]
    return [owner for owner in owners if isinstance(owner, Hook)]


def without_hooks(root):
    '''A copy of a network, with the same weights, without hooks but for those of PyTorch that compute weights.'''
    copies = {}

    def duplicate(module):
        if module in copies or module is None:
            return copies.get(module)
        twin = copies[module] = object.__new__(type(module))
        attributes = vars(twin)
        attributes.update(vars(module))
        for name in ('_parameters', '_buffers'):
            attributes[name] = attributes[name].copy()
        for name in ('_forward_pre_hooks', '_forward_hooks', '_backward_hooks', '_backward_pre_hooks'):
            attributes[name] = OrderedDict(
                (key, hook) for key, hook in attributes[name].items()
                if (getattr(hook, '__module__', None) or type(hook).__module__).startswith('torch.nn.utils')
            )
        attributes['_modules'] = {name: duplicate(child) for name, child in list(module._modules.items())}
        return twin

    return duplicate(root)


def padding_of(convolution):
    '''Padding of a convolution that pads by a mode, in the order of :py:func:`torch.nn.functional.pad`.'''
    return convolution._reversed_padding_repeated_twice


def can_be_compiled():
    '''Whether the compiler is loaded, so that functions which it compiled may run.'''
    return 'torch._dynamo' in sys.modules


def caller(depth=1):
    '''The frame of the function that calls the one which asks.'''
    return sys._getframe(depth + 1)


def _from(frame):
    '''A frame and those that called it, the innermost first.'''
    while frame is not None:
        yield frame
        frame = frame.f_back


def origin_of_call(function):
    '''The frame whose code calls a function of PyTorch, which modes handle that hand it on to each other.'''
    origin = sys._getframe(1)
    for frame in _from(origin):
        if frame.f_code.co_name == '__torch_function__' and frame.f_locals.get('func') is function:
            origin = frame.f_back
    return next((elem for elem in _from(origin) if elem.f_globals.get('__name__', '').split('.')[0] != 'torch'), None)


def module_around(frame):
    '''The module whose method a frame runs, or is called by, or None.'''
    owners = (elem.f_locals.get('self') for elem in _from(frame))
    return next((elem for elem in owners if isinstance(elem, torch.nn.Module)), None)


def is_running(frame):
    '''Whether a frame is executed, and not one that an interrupt has left, for which PyTorch runs no hooks.'''
    return any(elem is frame for elem in _from(sys._getframe(1)))


def registering_composite():
    '''The composite of Zennit that is being registered, or None. It does not tell its canonizers.'''
    frames = _from(sys._getframe(1))
    return next((elem.f_locals['self'] for elem in frames if elem.f_code is Composite.register.__code__), None)


def is_replacing():
    '''Whether Zennit removes a composite because it is registered for another network, without asking.'''
    frames = _from(sys._getframe(1))
    composite = next((elem.f_locals['self'] for elem in frames if elem.f_code is Composite.remove.__code__), None)
    # a subclass may have a method of its own in between
    own = itertools.takewhile(lambda elem: elem.f_locals.get('self') is composite, frames)
    return composite is not None and any(elem.f_code is Composite.register.__code__ for elem in own)
