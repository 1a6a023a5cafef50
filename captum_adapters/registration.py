"""Attach composites to models: one thread at a time, and without a trace."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Callable, Optional, Union

from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel
from zennit.composites import COMPOSITES
from zennit.core import Composite

import zennit_resnet.composites  # noqa: F401, registers composites by their names
from zennit_resnet.attribution import select_output
from zennit_resnet.canonizers.eager import Eager

# What picks the tensor to explain from what a model returns
Output = Union[None, str, int, Callable[[Any], Any]]

_TURN = threading.Condition()
# Which thread uses an object, by its id, and how often
_HOLDERS: dict[int, tuple[int, int]] = {}


def create_composite(composite: Any) -> Composite:
    """Get an instance of a composite."""
    factory = composite
    if isinstance(composite, str):
        if composite not in COMPOSITES:
            similar = get_close_matches(composite, COMPOSITES)
            raise ValueError(
                f"composite={composite!r} is not registered: choose one of"
                f" {', '.join(map(repr, similar or COMPOSITES))}."
            )
        factory = COMPOSITES[composite]
    if isinstance(factory, type) and issubclass(factory, Composite):
        try:
            return factory()
        except TypeError as error:
            raise TypeError(
                f"composite={composite!r} can not be created without arguments, give an"
                f" instance: {error}"
            ) from error
    if not isinstance(composite, Composite):
        raise TypeError(
            f"composite={composite!r} is neither a composite of Zennit nor the name of"
            " one."
        )
    return composite


def unwrap(model: Module) -> tuple[Module, Callable[..., Any]]:
    """The module to which rules are attached, and what is called to run it."""
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
    original = getattr(model, "_orig_mod", None)
    return unwrap(original) if isinstance(original, Module) else (model, model)


def parts_of(module: Module) -> list[object]:
    """All modules and parameters of a module.

    Another thread may be adding modules meanwhile, so each dictionary is copied.
    """
    found: dict[int, object] = {}
    queue = [module]
    while queue:
        each = queue.pop()
        if id(each) not in found:
            found[id(each)] = each
            found.update((id(elem), elem) for elem in [*each._parameters.values()])
            queue.extend(elem for elem in [*each._modules.values()] if elem is not None)
    found.pop(id(None), None)
    return list(found.values())


@contextmanager
def exclusive(*objects: object) -> Iterator[None]:
    """Wait until no other thread uses any of these objects, and use them."""
    keys, thread = {id(elem) for elem in objects}, threading.get_ident()

    def is_free() -> bool:
        return all(_HOLDERS.get(key, (thread, 0))[0] == thread for key in keys)

    with _TURN:
        _TURN.wait_for(is_free)
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


@contextmanager
def registered(
    composite: Composite, module: Module, output: Output = None
) -> Iterator[None]:
    """Have rules attached, and leave no trace of them.

    The module then returns the chosen output only. Rules apply to how it is chosen.
    """
    with exclusive(composite, *parts_of(module)):
        if composite.handles:
            raise RuntimeError(
                f"{type(composite).__name__} is registered already: leave its context"
                " first, it is registered in each call."
            )
        eager = Eager(module)
        # Zennit 1.0.0 leaves other parameters behind, and attributes that hide them
        found = [
            (each, dict(each._parameters), dict(each._buffers), set(vars(each)))
            for each in module.modules()
        ]
        own: Optional[Any] = vars(module).get("forward")
        try:
            if output is not None:
                forward = module.forward
                vars(module)["forward"] = lambda *args, **kwargs: select_output(
                    forward(*args, **kwargs), output
                )
            composite.register(module)
            yield
        finally:
            try:
                composite.remove()
            finally:
                if own is not None:
                    vars(module)["forward"] = own
                elif output is not None:
                    vars(module).pop("forward", None)
                eager.remove()
                for each, parameters, buffers, attributes in found:
                    for key in (parameters.keys() | buffers.keys()) - attributes:
                        vars(each).pop(key, None)
                    each._parameters.clear()
                    each._parameters.update(parameters)
                    each._buffers.clear()
                    each._buffers.update(buffers)
