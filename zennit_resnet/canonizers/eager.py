'''A network in the state in which rules can be attached: run by Python, for evaluation.'''
import copy
import threading
from contextlib import contextmanager

import torch
from zennit.types import BatchNorm

from .._compat import COMPILED_CALL, COMPILED_MODULE, Dropout, can_be_compiled


def is_active(composite):
    '''Whether any rule of a composite, or the lack of any, counts.'''
    return not composite.hook_refs or any(hook.active for hook in composite.hook_refs)


def varies(module):
    '''Whether the output of a module for a sample depends on chance or on other samples, as it is in training mode.'''
    kinds = (BatchNorm, Dropout, torch.nn.RReLU)
    # stochastic depth is a module of torchvision, timm, and many networks
    # frozen modules of torch.jit have no mode
    return getattr(module, 'training', False) and (
        isinstance(module, kinds) or type(module).__name__.startswith(('Drop', 'StochasticDepth'))
        or isinstance(module, torch.nn.MultiheadAttention) and module.dropout > 0
    )


def check_evaluation(model):
    '''Raise a RuntimeError which names the module if the output of any depends on chance or on other samples.'''
    for name, module in model.named_modules():
        if varies(module):
            raise RuntimeError(
                f'{name or "The model"} ({type(module).__name__}) is in training mode, in which the output for one '
                'sample depends on chance or on the other samples. Call model.eval() first.'
            )


@contextmanager
def evaluating(model):
    '''Context in which all modules of a network are in evaluation mode.'''
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Compiler:
    '''Has functions that were compiled run in Python, as long as anyone needs that.'''
    # PyTorch has a single setting for all functions and threads, and none before version 2.6
    def __init__(self):
        self.lock = threading.Lock()
        self.users, self.stance = set(), None

    def pause(self, user):
        '''Run functions in Python for a user, at least those whose compiler is loaded by now.'''
        with self.lock:
            self.users.add(user)
            if self.stance is None and can_be_compiled() and hasattr(torch.compiler, 'set_stance'):
                self.stance = torch.compiler.set_stance('force_eager')

    def resume(self, user):
        '''Run functions as before, unless there are other users.'''
        with self.lock:
            self.users.discard(user)
            if not self.users and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


_COMPILER = _Compiler()


def _obstacle(label, module):
    '''What keeps rules from being attached to a module, None if nothing does.'''
    if isinstance(module, torch.jit.ScriptModule):
        return f'{label} is a ScriptModule, to which no rules can be attached: use the module it was made from.'
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.is_inference():
            return (
                f'{label} has {name!r}, which was created in torch.inference_mode(), and there is no gradient by such '
                'tensors: explain copy.deepcopy(model), which is made outside of it.'
            )
    if isinstance(module, torch.nn.DataParallel) and len(module.device_ids) > 1:
        return (
            f'{label} runs replicas of its module on several devices, to which no rules are attached: use the module '
            'inside, which is its attribute \'module\'.'
        )
    if any('FSDP' in base.__name__ or 'FullySharded' in base.__name__ for base in type(module).__mro__):
        return (
            f'{label} is sharded among processes, and rules need whole weights: explain the network before fully_shard '
            'or FullyShardedDataParallel.'
        )
    # modules for functions, of networks that may be quantized later, are float
    is_float = type(module).__name__ in ('FloatFunctional', 'FXFloatFunctional')
    if 'quantized' in type(module).__module__.split('.') and not is_float:
        return (
            f'{label} is quantized, and rules need floating point numbers: explain the network before it is converted.'
        )
    return None


class Eager:
    '''Has a network run in Python, where rules can be attached, also what is compiled, until it is removed.'''
    def __init__(self, root_module):
        self.replaced, self.is_copy = [], False
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                'There is no relevance within torch.inference_mode(): leave it, torch.enable_grad() is not enough.'
            )
        for name, module in root_module.named_modules():
            obstacle = _obstacle(f'{name or "The model"} ({type(module).__name__})', module)
            if obstacle is not None:
                raise TypeError(obstacle)
        for module in root_module.modules():
            original = module._modules.get(COMPILED_MODULE)
            if original is not None and 'forward' in vars(module):
                self._replace(module, 'forward', original.__call__)
            if vars(module).get(COMPILED_CALL) is not None:
                self._replace(module, COMPILED_CALL, None)
        self.pause_compiler()

    def __deepcopy__(self, memo):
        '''Copy of a network within the context, which nobody removes, and for which nothing is paused.'''
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
