'''Attach a composite to a network for a while: one thread at a time, and without a trace.'''
import copy
import threading
from contextlib import ExitStack, contextmanager

from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from ._compat import COMPILED_MODULE
from .attribution import select_output
from .canonizers.eager import Eager

_TURN = threading.Condition()
# which thread uses an object, by the id of the object, and how often
_HOLDERS = {}


@contextmanager
def registered(composite, module, output=None):
    '''Context in which the rules of a composite are attached to a network, which is restored at the end.

    Threads which share the composite or a part of the network take turns. Attributes that the network or its hooks set
    meanwhile remain. With an output, the network returns this one, and rules apply to how it is chosen. A RuntimeError
    is raised if the composite is registered already, or in inference mode, a TypeError if rules cannot be attached.
    '''
    with exclusive(composite, *parts_of(module)), ExitStack() as undo:
        if composite.handles:
            raise RuntimeError(
                f'{type(composite).__name__} is registered already: leave its context first, it is registered in each '
                'call.'
            )
        eager = Eager(module)
        undo.callback(eager.remove)
        state = _State(module)
        undo.callback(state.restore)
        undo.callback(composite.remove)
        try:
            if output is not None:
                forward = module.forward
                vars(module)['forward'] = lambda *args, **kwargs: select_output(forward(*args, **kwargs), output)
            composite.register(module)
        finally:
            state.note_changes()
        yield


class _State:
    '''Parameters, buffers and attributes of all modules of a network as they were found.'''
    # Canonizers of Zennit 1.0.0 leave other parameters behind, and attributes which hide them. Attributes that the
    # network or its hooks set after the rules were attached are theirs.
    def __init__(self, root):
        self.found = [
            (module, *map(dict, (vars(module), module._parameters, module._buffers))) for module in root.modules()
        ]
        self.changed = []

    def note_changes(self):
        '''Note which attributes have changed since then, when rules were attached.'''
        self.changed = [
            [key for key in vars(module).keys() | before.keys() if vars(module).get(key) is not before.get(key)]
            for module, before, *_ in self.found
        ]

    def restore(self):
        for (module, before, parameters, buffers), changed in zip(self.found, self.changed):
            for key in (*changed, *parameters, *buffers):
                if key in before:
                    vars(module)[key] = before[key]
                else:
                    vars(module).pop(key, None)
            for current, former in ((module._parameters, parameters), (module._buffers, buffers)):
                current.clear()
                current.update(former)


def unwrap(model):
    '''The module to which rules are attached, and what runs it, of a network that may be compiled or parallel.'''
    if isinstance(model, DataParallel):
        module, forward = unwrap(model.module)
        if forward is not model.module:
            return module, forward
        if len(model.device_ids) > 1:
            # what rules keep of a forward pass belongs to modules, not to replicas
            model = copy.copy(model)
            model.device_ids = model.device_ids[:1]
        return module, model
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    # compiled modules call no hooks
    original = getattr(model, COMPILED_MODULE, None)
    return unwrap(original) if isinstance(original, Module) else (model, model)


def parts_of(module):
    found, queue = {}, [module]
    while queue:
        each = queue.pop()
        if id(each) not in found:
            found[id(each)] = each
            # copied, as another thread may be adding modules meanwhile
            found.update((id(elem), elem) for elem in [*each._parameters.values()])
            queue.extend(elem for elem in [*each._modules.values()] if elem is not None)
    found.pop(id(None), None)
    return list(found.values())


@contextmanager
def exclusive(*objects):
    '''Wait until no other thread uses any of these objects, and use them.'''
    keys, thread = {id(elem) for elem in objects}, threading.get_ident()
    with _TURN:
        _TURN.wait_for(lambda: all(_HOLDERS.get(key, (thread, 0))[0] == thread for key in keys))
        for key in keys:
            _HOLDERS[key] = thread, _HOLDERS.get(key, (thread, 0))[1] + 1
    try:
        yield
    finally:
        with _TURN:
            for key in keys:
                _, count = _HOLDERS.pop(key)
                if count > 1:
                    _HOLDERS[key] = thread, count - 1
            _TURN.notify_all()
