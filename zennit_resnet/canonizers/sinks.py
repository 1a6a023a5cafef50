'''Sinks: parameters and other constants that keep a part of the relevance, as a class token does.'''
import torch

from .._autograd import sequence_of
from .._compat import DisableTorchFunction, backward_pass, base_of, has_values


class Sinks(dict):
    '''Relevance of sinks by name in the last backward pass, float64 (batch,), NaN if its example is unknown.'''
    def __init__(self):
        super().__init__()
        # by the number of a node of the graph
        self.nodes, self.current = {}, None

    def watch(self, name, tensor, batch, sign=1, node=None, select=None):
        '''Note relevance that will arrive at a tensor, or at a selection of its elements, for a sink.'''
        number = sequence_of(tensor.grad_fn if node is None else node)

        def note(relevance):
            amounts = sign * _by_example(relevance if select is None else select(relevance), batch)
            if self.current != backward_pass():
                self.clear()
                self.nodes, self.current = {}, backward_pass()
            self[name] = self.get(name, 0.) + amounts
            self.nodes[number] = self.nodes.get(number, 0.) + amounts

        tensor.register_hook(note)

    def total(self, tensor):
        '''What all of them keep, for each example of a tensor, and of its type.'''
        return sum((elem.to(tensor) for elem in self.values()), tensor.new_zeros(len(tensor)))


def is_parameter(tensor):
    '''Whether a tensor is a parameter or a view of one.'''
    return any(isinstance(elem, torch.nn.Parameter) for elem in (tensor, base_of(tensor)))


def watch_constants(canonizer, call, function, output, tensors):
    '''Note what constants keep that were put beside tensors which carry relevance.'''
    constants = [elem for elem in tensors if not elem.requires_grad and elem.numel()]
    if not constants or not output.requires_grad:
        return
    shapes = [(elem.shape, elem.requires_grad) for elem in tensors]
    again = function.rebind(*tensors)

    def select(relevance):
        with torch.no_grad(), DisableTorchFunction():
            return relevance * again(*(
                relevance.new_full((), float(not is_active)).expand(shape) for shape, is_active in shapes
            ))

    name = _name(canonizer, call, function, constants[0])
    canonizer.sinks.watch(name, output, canonizer.local.images.number, select=select)


def watch_filling(canonizer, call, function, output):
    '''Note what constants keep among which elements were put. Those of zero keep nothing, see :py:class:`.Refill`.'''
    signal, = function.active
    with torch.no_grad(), DisableTorchFunction():
        again = function.rebind()
        zeros = again(torch.zeros_like(signal))
        keeps = (zeros != 0) & zeros.isfinite() & (again(torch.ones_like(signal)) == zeros)
        if not output.requires_grad or has_values(keeps) and not bool(keeps.any()):
            return
    constant = next((elem for elem in function.tensors() if elem is not signal), signal)
    name = _name(canonizer, call, function, constant)
    number = canonizer.local.images.number
    canonizer.sinks.watch(name, output, number, select=lambda relevance: relevance.where(keeps, 0.))


def watch_addition(canonizer, call, function, signal, constant, output):
    '''Note what a constant keeps that was added to a signal.'''
    name, batch = _name(canonizer, call, function, constant), canonizer.local.images.number
    canonizer.sinks.watch(name, output, batch)
    canonizer.sinks.watch(name, signal, batch, -1, output.grad_fn)


def _name(canonizer, call, function, constant):
    '''Name of the parameter that a constant is, or of the function that has it.'''
    for name, param in canonizer.root.named_parameters():
        if param is constant or param is base_of(constant):
            return name
    name = canonizer.names.get(call.module)
    return f'{function.name} in {name or "the network"}'


def _by_example(relevance, batch):
    '''Sums over each example, which may be divided into windows, or be along the second dimension.'''
    # if it is not known how many there are, all of them are one
    batch, relevance = batch or 1, relevance.detach()
    # which has no double precision
    relevance = (relevance.cpu() if relevance.device.type == 'mps' else relevance).double()
    if relevance.ndim > 1 and len(relevance) % batch and relevance.shape[1] == batch:
        relevance = relevance.transpose(0, 1)
    if len(relevance) % batch:
        return relevance.new_full((batch,), float('nan'))
    return relevance.reshape(batch, -1).sum(1)
