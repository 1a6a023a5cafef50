'''Calls of functions, and other ways to write them.'''
from typing import NamedTuple

import torch

from .._compat import is_view, keep_version
from .._inplace import KeptWeight, changed_by, is_inplace
from .._nested import map_tensors, tensors_of
from ..layer import linear

# What PyTorch calls some arguments as well.
ALIASES = {'self': 'input', 'axis': 'dim', 'keepdims': 'keepdim'}


class FunctionCall(NamedTuple):
    '''A function call with its arguments. The active ones carry relevance.'''
    func: object
    name: str
    args: tuple
    kwargs: dict
    active: list

    def __call__(self):
        return self.func(*self.args, **self.kwargs)

    def bind(self, *names):
        '''Arguments by name. Positional ones have the given names.'''
        return dict(zip(names, self.args), **{ALIASES.get(key, key): elem for key, elem in self.kwargs.items()})

    def operands(self):
        given = self.bind('input', 'other')
        return given['input'], given['other']

    def tensors(self):
        '''All floating point or complex tensors among the arguments, in their order.'''
        return [elem for elem in tensors_of((self.args, self.kwargs)) if elem.is_floating_point() or elem.is_complex()]

    def keep(self, tensor):
        '''The call with all tensors but one as constants.'''
        constants = {id(elem): elem.detach() for elem in self.active if elem is not tensor}
        args, kwargs = self._with(constants)
        return self._replace(args=args, kwargs=kwargs, active=[tensor])

    def distinct(self):
        '''The call with another tensor for each of the same that carry relevance.'''
        seen = []

        def alias(tensor):
            if not any(tensor is elem for elem in self.active):
                return tensor
            seen.append(tensor if all(tensor is not elem for elem in seen) else tensor.view_as(tensor))
            return seen[-1]

        args, kwargs = map_tensors(alias, (self.args, self.kwargs))
        return self._replace(args=args, kwargs=kwargs, active=seen)

    def part(self, num, is_copied=True):
        '''The call as one that returns a single one of its tensors, as a copy with a node of its own in the graph.'''
        func = self.func

        def select(*args, **kwargs):
            output = func(*args, **kwargs)[num]
            return output.clone() if is_copied else output

        return self._replace(func=select)

    def renamed(self, name):
        '''The call as one of another function, with the form in place if this one is.'''
        return self._replace(name=name + '_' * self.is_inplace)

    def put(self, tensor, value):
        args, kwargs = self._with({id(tensor): value})
        active = [value if elem is tensor else elem for elem in self.active]
        return self._replace(args=args, kwargs=kwargs, active=[elem for elem in active if elem.requires_grad])

    def _with(self, replacements):
        '''Arguments with others in the place of tensors, by their id.'''
        return map_tensors(lambda elem: replacements.get(id(elem), elem), (self.args, self.kwargs))

    def rebind(self, *tensors):
        '''The call as a function of tensors, by default those that carry relevance, without a reference to any.

        With ``part``, a function of each element, constants of floating point are those that it makes of them.
        '''
        func, tensors = self.func, tensors or self.active
        slots = {id(elem): _Slot(num) for num, elem in enumerate(tensors)}
        # the network may change constants in place before a rule runs the function again
        given = map_tensors(lambda elem: slots.get(id(elem)) or KeptWeight(elem), (self.args, self.kwargs))
        precision = _precision(tensors[0])

        def function(*tensors, part=None):
            dtype, is_other = tensors[0].dtype, _precision(tensors[0]) != precision

            def bound(elem):
                if isinstance(elem, _Slot):
                    return tensors[elem.place]
                values = elem.values
                if not values.is_floating_point():
                    return values
                # rules run in single precision where the network runs in half precision
                values = values.to(dtype) if is_other else values
                return values if part is None else part(values)

            args, kwargs = map_tensors(bound, given, (KeptWeight, _Slot))
            return func(*args, **kwargs)

        return function

    @property
    def is_inplace(self):
        '''Whether the first argument becomes what is returned.'''
        return is_inplace(self.name, self.kwargs)

    @property
    def target(self):
        '''The tensor that the call changes in place, or None.'''
        return changed_by(self.name, self.args, self.kwargs)

    def out_of_place(self):
        '''The call which returns what the first argument of this one becomes.'''
        kwargs = {key: elem for key, elem in self.kwargs.items() if key != 'inplace'}
        if 'inplace' in self.kwargs:
            return self._replace(kwargs=kwargs)
        name = self.name.replace('__i', '__') if self.name.startswith('__') else self.name[:-1]
        func, args = self.func, self.args or (kwargs.pop('input'),)

        def changed(input, *args, **kwargs):
            return func(input.clone(), *args, **kwargs)

        return self._replace(func=changed, name=name, args=args, kwargs=kwargs)


def _precision(tensor):
    '''The precision of a tensor, and whether functions choose theirs.'''
    return tensor.dtype, torch.is_autocast_enabled(tensor.device.type)


class _Slot(NamedTuple):
    '''Place of a tensor in the arguments of a call.'''
    place: int


def out_of_place(handler):
    '''Let a handler only see calls which change nothing in place, as rules need their inputs.'''
    def run(canonizer, call, function, **settings):
        if not function.is_inplace:
            return handler(canonizer, call, function, **settings)
        target = function.target
        return become(target, handler(canonizer, call, function.out_of_place().put(target, target.clone()), **settings))

    return run


def become(target, output):
    '''What a function returns that changes a tensor in place, but was run out of place.'''
    if target.requires_grad and (target.shape, target.dtype) == (output.shape, output.dtype):
        # nothing is copied unless the network goes on with the tensor itself, see :py:func:`inplace.note_copy`
        return output
    return target.copy_(output)


def fully_connected(func, input, weight, bias=None):
    '''Run a fully connected layer as if its weight needed a gradient, which is faster and decides on the last bits.'''
    is_usual = type(input) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
    if is_usual and weight.layout is torch.strided and not torch.is_autocast_enabled(input.device.type):
        return linear(input, weight, bias)
    return func(input, weight, bias)


def with_values(output, exact):
    '''Replace the values of a tensor, with its graph: of other ways to write a function, the last bits differ.'''
    if output.shape != exact.shape:
        output = output.reshape(exact.shape)
    if output.stride() != exact.stride():
        # other functions round differently in another layout of memory
        order = sorted(range(exact.ndim), key=lambda dim: -exact.stride(dim))
        output = output.permute(order).contiguous().permute([order.index(dim) for dim in range(exact.ndim)])
    # the graph of a view is made again once its values change, which not all functions can do
    output = output.clone() if is_view(output) else output
    # the network has not changed it
    with torch.no_grad(), keep_version(output):
        output.copy_(exact)
    return output


def run_twin(canonizer, function, twin):
    '''Run a function, of one tensor or a tuple of them, with the rules of another way to write it.'''
    with torch.no_grad():
        exact = function()
    # the canonizer sees what the twin does as if the network did it
    with canonizer.interception:
        output = twin()
    return tuple(map(with_values, output, exact)) if isinstance(output, tuple) else with_values(output, exact)


def dims_of(input, dim):
    '''Dimensions as numbers that are not negative, all of them by default.'''
    if dim is None or isinstance(dim, bool) or dim == () or dim == []:
        return tuple(range(input.ndim))
    dims = dim if isinstance(dim, (list, tuple)) else (dim,)
    return tuple(elem % max(input.ndim, 1) for elem in dims)
