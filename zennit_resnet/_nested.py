'''Tensors in nested arguments and outputs.'''
import copy
import dataclasses

import torch

from ._compat import DisableTorchFunction


def tensors_of(value):
    '''All tensors in nested arguments, in their order.'''
    found = []
    _collect(value, found)
    return found


def _collect(value, found):
    if isinstance(value, torch.Tensor):
        found.append(value)
    # what most arguments are, first
    elif value is not None and not isinstance(value, (int, float, str)):
        for elem in value if isinstance(value, (list, tuple)) else _elements(value).values():
            _collect(elem, found)


def map_tensors(function, value, kind=torch.Tensor):
    '''Replace all tensors in nested arguments by a function of them. What has none of another value is not copied.'''
    if isinstance(value, kind):
        return function(value)
    elements = _elements(value)
    mapped = {key: map_tensors(function, elem, kind) for key, elem in elements.items()}
    if all(mapped[key] is elem for key, elem in elements.items()):
        return value
    if isinstance(value, tuple):
        return type(value)._make(mapped.values()) if hasattr(value, '_make') else type(value)(mapped.values())
    result = copy.copy(value)
    for key, elem in mapped.items():
        if isinstance(value, (dict, list)):
            result[key] = elem
        else:
            # it may be frozen
            object.__setattr__(result, key, elem)
    return result


def _elements(value):
    '''Elements of a container by their keys, empty for anything else.'''
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def active_tensors(value):
    '''All tensors that carry relevance in nested arguments, in their order.'''
    # while functions are seen, attributes are as well, which takes longer than anything else here
    with DisableTorchFunction():
        return [tensor for tensor in tensors_of(value) if tensor.requires_grad]
