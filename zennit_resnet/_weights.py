'''Weights as a forward pass used them: by the backward pass, in which rules read them, there may be others in place.'''
import functools
import types
import weakref

import torch
from torch.nn.utils import parametrize

from ._compat import FORWARD_PARTS, hooks_of, pre_hooks_of, version_of
from ._inplace import KeptWeight, is_followed
from .layer import Operation

# What forward is made of in the classes of torch.nn that rules know, and what it reads.
_FORWARD = frozenset(('forward', *FORWARD_PARTS))
_WEIGHTS = frozenset(('weight', 'bias', 'running_mean', 'running_var'))
MANY = 1000
PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)
# what modules have of parameters, modules and hooks
STRUCTURE = frozenset(vars(torch.nn.Module())) - {'training'}


@functools.lru_cache(maxsize=512)
def _has_own_forward(kind):
    '''Whether a class defines something that the forward of the class in torch.nn which it is derived from uses.'''
    is_own = False
    for base in kind.__mro__:
        if base is torch.nn.Module or base.__module__ == 'torch.nn.modules.container':
            # derived from nothing that is known
            return False
        if base.__module__.startswith('torch.nn.modules.') or issubclass(base, Operation):
            return is_own
        # the class that torch.nn.utils.parametrize puts on top has properties for weights, which compute them
        is_parametrized = base.__module__ == parametrize.__name__
        is_own = is_own or not (_FORWARD if is_parametrized else _FORWARD | _WEIGHTS).isdisjoint(vars(base))
    return False


def is_plain(module):
    '''Whether a module computes what its class in torch.nn computes, as rules for types assume.'''
    attributes = vars(module)
    return not (
        _has_own_forward(type(module)) or 'forward' in attributes or any(part in attributes for part in FORWARD_PARTS)
    )


def state_of(model):
    '''What changes if weights, modules, hooks or settings of a network change, without a reference to any of them.'''
    tensors, seen = [*model.parameters(), *model.buffers()], {}
    return [(id(elem), elem.data_ptr(), version_of(elem)) for elem in tensors], [(
        id(module), id(type(module)), id(type(module).forward),
        list(module._modules), list(pre_hooks_of(module)), list(hooks_of(module)),
        [(key, _snapshot(elem, seen)) for key, elem in vars(module).items() if key not in STRUCTURE],
    ) for module in model.modules()]


def _snapshot(value, seen, depth=4):
    '''What changes if a setting changes: of containers and of objects with settings, these are looked at.'''
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), version_of(value)
    # what contains itself, or has more than settings, such as a trainer with its data
    found = seen.setdefault(id(value), id(value))
    if found != id(value) or not depth:
        return found
    if isinstance(value, (dict, list, tuple)) and len(value) <= MANY:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        found = [(_snapshot(key, seen, depth - 1), _snapshot(elem, seen, depth - 1)) for key, elem in pairs]
    elif isinstance(value, (types.FunctionType, types.MethodType)):
        found = weakref.ref(value)
    elif hasattr(value, '__dict__') and not isinstance(value, (type, torch.nn.Module)):
        found = id(value), _snapshot(vars(value), seen, depth - 1)
    seen[id(value)] = found
    return found


class UsedWeights:
    '''Which parameters and buffers a module has now, to find out whether it has others later.'''
    def __init__(self, module):
        self.module, self.kept = module, ()
        self.found = _look(module)

    def is_same(self, other):
        '''Whether these are the same tensors as others, none of them changed in place.'''
        return len(self.found) == len(other.found) and all(
            # Zennit 1.0.0 has new objects for the same memory after its rules have run
            address == before[1] and (version == before[2] if tensor is before[0] else not version)
            for (tensor, address, version), before in zip(other.found, self.found)
        )

    def check(self, *args):
        '''Raise a RuntimeError if the module has others, or if one was changed in place, as autograd does.'''
        if self.is_changed or not self.is_same(UsedWeights(self.module)):
            raise RuntimeError(_describe(self.module, 'weights were replaced or changed'))

    def check_data(self, *args):
        '''Raise a RuntimeError if one of the tensors has other ``data``, which autograd does not notice.'''
        if self.is_changed or any(_start(tensor) != address for tensor, address, _ in self.found):
            raise RuntimeError(_describe(self.module, 'a weight was changed, or other data was assigned to it,'))

    def renew(self):
        '''Take the weights that are in place now for those to be found later.'''
        self.found = _look(self.module)

    def watch(self):
        '''Note if the network changes one of them. An error then would keep it from changing it back.'''
        self.kept = [KeptWeight(elem) for elem in self.module._parameters.values() if elem is not None]

    @property
    def is_changed(self):
        '''Whether the network has changed one of them in place while it ran.'''
        return any(elem.is_copied for elem in self.kept)


class UsedModule:
    '''A copy of a module with the weights of a call, for a rule that reads them in the backward pass.'''
    def __init__(self, module):
        attributes, self.cache = vars(module), None
        is_parametrized = 'parametrizations' in attributes['_modules']
        kind = parametrize.type_before_parametrizations(module) if is_parametrized else type(module)
        self.module = object.__new__(kind)
        # weights, which have to be the same in the backward pass
        self.kept, self.own = {}, {'_parameters': {}, '_buffers': {}}
        for key, values in tuple(self.own.items()):
            for name, elem in attributes[key].items():
                self._keep(module, name, elem, values)
        for name, elem in attributes.items():
            # computed before each call, as of pruned layers
            if isinstance(elem, torch.Tensor):
                self._keep(module, name, elem, self.own, vars(self.module))
        inner = ()
        if is_parametrized:
            # values in the place of properties, which are computed once, as they may be random
            self.cache = parametrize.cached()
            self.cache.__enter__()
            self.own.update((name, getattr(module, name).detach()) for name in module.parametrizations)
        elif attributes['_modules']:
            inner = [elem for elem in module.modules() if elem is not module]
        # what is inside is not copied
        self.inner = [UsedWeights(elem) for elem in inner]

    def _keep(self, module, name, tensor, *owners):
        '''Have owners have an alias of a weight, or a copy once the network changes it in place.'''
        def put(value):
            for values in owners:
                values[name] = value

        if tensor is None:
            put(None)
            return
        if tensor.requires_grad and not tensor.is_leaf and is_followed():
            raise RuntimeError(
                f'The {name} of a {type(module).__name__} is computed from the input of the network, so that '
                'relevance should reach it as well, for which there is no rule: give the layer a rule of your own.'
            )
        self.kept[name] = KeptWeight(tensor, put)
        put(self.kept[name].tensor)

    def finish(self, module):
        '''Take over what the call has set, after it.'''
        if self.cache is not None:
            self.cache.__exit__(None, None, None)
            self.cache = None
        vars(self.module).update(vars(module))
        vars(self.module).update(self.own)

    def check(self):
        '''Raise a RuntimeError if a weight was changed in place since, as autograd does.'''
        for name, kept in self.kept.items():
            if kept.is_changed:
                raise RuntimeError(_describe(self.module, f'\'{name}\' was changed in place'))
        for weights in self.inner:
            weights.check()


def _look(module):
    '''Parameters and buffers of a module, where they are in memory, and how often they were changed in place.'''
    return [
        (tensor, _start(tensor), version_of(tensor))
        for tensors in (module._parameters, module._buffers) for tensor in tensors.values() if tensor is not None
    ]


def _start(tensor):
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # fake and sharded tensors have no memory of their own
        return id(tensor)


def _describe(module, what):
    return (
        f'{type(module).__name__}: {what} after it was used, so that a rule would use another than the forward pass '
        'did. Change weights before the forward pass or after the backward pass.'
    )
