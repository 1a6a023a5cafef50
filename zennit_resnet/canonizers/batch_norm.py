'''Folding batch normalizations into the linear layers before them, by data flow.'''
import contextlib
import functools
import types
import weakref
from typing import NamedTuple

import torch
from torch.nn.utils.parametrize import is_parametrized
from zennit.core import RemovableHandleList
from zennit.types import BatchNorm, ConvolutionTranspose, Linear

from .._autograd import count_uses, nodes_of, origin_of, pull_back, rule_of, sequence_of
from .._compat import DisableTorchFunction, as_parameter, rules_of, version_of
from .._inplace import settle
from .._weights import UsedModule, UsedWeights, is_plain
from ..layer import LinearMap, Normalization
from ..rules.base import SinglePass
from .calls import Local

# By their numbers of spatial dimensions.
CONVOLUTIONS = (
    (torch.nn.Conv1d, torch.nn.ConvTranspose1d), (torch.nn.Conv2d, torch.nn.ConvTranspose2d),
    (torch.nn.Conv3d, torch.nn.ConvTranspose3d),
)


class Produced(NamedTuple):
    '''What a linear layer returned, perhaps with constants that were added and multiplied along its channels.'''
    reference: object  # a weak one, to the tensor
    number: tuple  # of its node, and how often it was changed in place
    linear: torch.nn.Module
    used: UsedWeights  # None if the node of the layer has its weights
    nodes: tuple  # from that of the layer to that of the tensor
    shape: tuple
    given: tuple  # shape of the input of the layer, where it is needed
    dim: int  # that of the channels, None if it is not known yet
    scale: torch.Tensor = None  # what elements of a channel are multiplied with, None for one
    shift: torch.Tensor = None  # what is added after that, None if it is zero, or if it is not needed


class _Forward(Local):
    '''What is known of the forward pass of a thread, and the normalizations that are running.'''
    def __init__(self):
        self.clear()

    def clear(self):
        # what layers returned by its node, numbers of their calls, and what normalizations were given and may be
        self.last, self.calls, self.candidates, self.pairs = {}, {}, [], {}


class BatchNormMerge:
    '''Find pairs of a linear layer and a batch normalization in a forward pass, and fold them for the backward pass.

    A pair is folded if the layer was called once and its output went into the batch normalization only. Single-pass
    rules have the folded parameters while they run, so that those of all layers use the same memory, which is several
    times as fast. Other rules have them between forward passes, which always run with the original ones.
    '''
    def __init__(self):
        self.handles = RemovableHandleList()
        self.local, self.folded = _Forward(), []

    def watch(self, module):
        '''Watch a module, after its rules were registered, so that tensors are seen as other modules see them.'''
        if isinstance(module, Linear):
            self.handles.append(module.register_forward_hook(self._note_output))
        elif isinstance(module, Normalization) or has_statistics(module):
            self.handles.append(module.register_forward_pre_hook(self._note_input, with_kwargs=True, prepend=True))
            self.handles.append(module.register_forward_hook(self._note_result))

    def _note_output(self, module, args, output):
        with DisableTorchFunction():
            if not isinstance(output, torch.Tensor) or not output.requires_grad:
                return
            # a layer with a forward of its own may return the output of a functional one, or do more than that
            before = self.local.last.get(output.grad_fn)
            if before is not None and before.reference() is output:
                return
            node, moves = output.grad_fn, ()
            if rule_of(node) is None and is_plain(module):
                # hooks of the user may return a copy or a view
                origin, after = origin_of(output)
                node, moves = (origin, after) if origin is not None and rule_of(origin) is not None else (node, ())
            has_single_pass = rule_of(node) is not None
            if isinstance(module, LinearMap) and not has_single_pass:
                # rules of Zennit need a bias
                return
            if isinstance(node.module, Linear) if has_single_pass else (is_plain(module) or rules_of(module)):
                # the node of a single-pass rule has the weights of its call
                used = None if has_single_pass else UsedWeights(module)
                given = args[0].shape if isinstance(module, LinearMap) else None
                self.local.last[output.grad_fn] = Produced(
                    weakref.ref(output), _number(output), module, used, (node, *moves), output.shape, given,
                    _channels(module, output.ndim),
                )
                self.local.calls[module] = self.local.calls.get(module, 0) + 1

    def find(self, tensor):
        '''What a linear layer returned, from which a tensor was only moved, None if there is nothing like that.'''
        if not self.local.last:
            return None
        with DisableTorchFunction():
            node, moves = origin_of(tensor, self.local.last)
            produced = self.local.last.get(node)
            before = None if produced is None else produced.reference()
            # something else may have changed it in place, such as an addition
            is_changed = before is not None and _number(before) != produced.number
            return None if produced is None or is_changed else (produced, moves)

    def note(self, found, input, output, scale=None, shift=None):
        '''Note that a constant was multiplied or added, as in a normalization that is written out, or as a bias.'''
        produced, moves = found
        with DisableTorchFunction():
            if not isinstance(output, torch.Tensor) or output.shape != input.shape or output.grad_fn is None:
                return
            dim, total, offset = produced.dim, produced.scale, produced.shift
            if scale is not None:
                dim, scale = _along_channels(produced, input, moves, scale, dim)
                if scale is None:
                    return
                total, offset = scale if total is None else total * scale, None if offset is None else offset * scale
            # biases of layers without channels are not needed
            if shift is not None and (dim is not None or total is not None):
                dim, shift = _along_channels(produced, input, moves, shift, dim)
                if shift is None:
                    return
                offset = shift if offset is None else offset + shift
            nodes = (*produced.nodes, *moves, output.grad_fn)
            self.local.last[output.grad_fn] = produced._replace(
                reference=weakref.ref(output), number=_number(output), nodes=nodes, dim=dim, scale=total, shift=offset
            )
            # nothing but zeros is added to a layer scale, which is no normalization
            if total is not None and shift is not None and bool(offset.any()):
                axis = 0
                if isinstance(produced.linear, LinearMap):
                    axis = _axis_of_map(produced.linear, produced.given, dim, len(total))
                affine = types.SimpleNamespace(
                    running_mean=torch.zeros_like(total), running_var=torch.ones_like(total), eps=0., weight=total,
                    bias=offset,
                )
                constants = types.SimpleNamespace(module=affine, check=lambda: None)
                if axis is not None:
                    self.local.candidates.append(
                        (nodes[:-1], produced.linear, produced.used, constants, nodes[-1], (axis, None))
                    )

    def _note_input(self, module, args, kwargs):
        self.local.pairs.pop(module, None)
        if not has_statistics(module):
            return
        settle((args, kwargs))
        for input in (*args, *kwargs.values()):
            found = self.find(input) if isinstance(input, torch.Tensor) and input.requires_grad else None
            if found is None:
                continue
            produced, moves = found
            with DisableTorchFunction():
                # rules of Zennit need a shift, which is in no bias
                is_plain_output = produced.scale is None and (produced.used is None or produced.shift is None)
                place = _place(produced, input, moves) if is_plain_output else None
                if place is not None:
                    batch_norm = UsedModule(module)
                    batch_norm.finish(module)
                    nodes = *produced.nodes, *moves
                    # it may be changed in place
                    values = None if isinstance(module, (BatchNorm, Normalization)) else input.detach()[:1].clone()
                    self.local.pairs[module] = values, nodes, produced.linear, produced.used, batch_norm, place
            return

    def _note_result(self, module, args, output):
        pair = self.local.pairs.pop(module, None)
        if pair is None or not isinstance(output, torch.Tensor):
            return
        input, nodes, linear, used, batch_norm, place = pair
        with DisableTorchFunction():
            # a normalization may be made of others, and the inner one is found first
            if all(nodes[0] is not candidate[0][0] for candidate in self.local.candidates) and (
                isinstance(module, (BatchNorm, Normalization)) and (
                    # what has a rule of its own counts as what its type says
                    is_plain(module) or any(rule.active for rule in rules_of(module))
                ) or input is not None and _is_affine(batch_norm.module, input, output)
            ):
                self.local.candidates.append((nodes, linear, used, batch_norm, output.grad_fn, place))

    def fold(self, outputs):
        '''Put folded parameters in place after a forward pass, or have that done when a rule uses them.'''
        candidates, calls = self.local.candidates, self.local.calls
        self.local.clear()
        uses, folded = count_uses(nodes_of(outputs)) if candidates else {}, set()
        # of constants that follow each other, all
        for nodes, linear, used, batch_norm, result, place in reversed(candidates):
            node = nodes[0]
            # what the batch normalization returned may not be used
            if any(uses.get(elem) != 1 for elem in nodes) or calls[linear] != 1 or result not in uses or node in folded:
                continue
            folded.add(node)
            if isinstance(rule_of(node), SinglePass):
                # the node has a copy of the layer
                node.context = functools.partial(_folded, node.module, batch_norm, *place)
            else:
                if is_parametrized(linear):
                    raise TypeError(
                        f'Batch normalization cannot be folded into a {type(linear).__name__}: use '
                        'batch_norm=\'pass\', or torch.nn.utils.parametrize.remove_parametrizations first.'
                    )
                used.check()
                batch_norm.check()
                self.folded.append((linear, _weights(linear)))
                fold_batch_norm(linear, batch_norm.module, *place)
        return [linear for linear, _ in self.folded]

    def pause(self):
        '''Put the original parameters back, to run a part of the network again during the backward pass.'''
        folded = [(linear, original, _weights(linear)) for linear, original in self.folded]
        self.unfold()
        return folded

    def resume(self, folded):
        '''Put folded parameters back in place, whatever was run in between.'''
        self.unfold()
        for linear, original, parameters in folded:
            self.folded.append((linear, original))
            _restore(linear, parameters)

    def unfold(self):
        '''Put the original parameters back, for a forward pass.'''
        self.local.clear()
        while self.folded:
            _restore(*self.folded.pop())

    def remove(self):
        '''Put the original parameters back, and watch no module anymore.'''
        self.unfold()
        self.handles.remove()


def _channels(linear, ndim):
    '''Dimension of the output of a linear layer that has the channels, None if it is not known.'''
    if isinstance(linear, LinearMap):
        return None
    # weights may be computed whenever they are asked for
    return next((ndim - 1 - num for num, kinds in enumerate(CONVOLUTIONS, 1) if isinstance(linear, kinds)), ndim - 1)


def _pulled(produced, tensor, moves, value):
    '''A constant that meets the moved output of a linear layer, moved back, NaN at elements that it does not meet.'''
    # None if the output is broadcast, or an element is picked several times
    value = torch.as_tensor(value, device=tensor.device)
    try:
        value = value.detach().to(tensor.dtype).expand(tensor.shape)
    except RuntimeError:
        return None
    nodes = (*produced.nodes[1:], *moves)
    if not nodes:
        return value
    counts = torch.ones_like(value)
    for node in reversed(nodes):
        value, counts = pull_back(node, value), pull_back(node, counts)
    return value.masked_fill(counts == 0, torch.nan) if bool((counts <= 1).all()) else None


def _along_channels(produced, tensor, moves, value, dim):
    '''Dimension of channels and a constant as one number for each of them, None if it is anything else.'''
    value = _pulled(produced, tensor, moves, value)
    if value is None or value.shape != produced.shape or not value.numel():
        return dim, None
    for num in range(value.ndim) if dim is None else (dim,):
        rows = value.movedim(num, 0).flatten(1)
        missed = rows.isnan()
        lowest, highest = (rows.masked_fill(missed, end).aminmax(dim=1) for end in (torch.inf, -torch.inf))
        is_missed = missed.all(1)
        if bool((is_missed | (lowest.min == highest.max)).all()):
            # nothing depends on the number of a channel that the constant does not meet
            return num, lowest.min.masked_fill(is_missed, 1)
    return dim, None


def _place(produced, tensor, moves):
    '''Axis of a layer's weight to fold a normalization into, and the order of its channels, None if impossible.'''
    if tensor.ndim < 2:
        return None
    if produced.dim == 1 and len(produced.nodes) == 1 and not moves:
        # each channel of the layer is given to that of the same number
        return 0, None
    if not all(produced.shape):
        return None
    labels = torch.arange(tensor.shape[1], device=tensor.device).view(-1, *(1,) * (tensor.ndim - 2))
    dim, order = _along_channels(produced, tensor, moves, labels, produced.dim)
    if order is None:
        return None
    axis = 0 if produced.dim is not None else _axis_of_map(produced.linear, produced.given, dim, len(order))
    # any channel will do for those that the normalization is not given
    return None if axis is None else (axis, order.long().clamp(max=tensor.shape[1] - 1))


def _axis_of_map(linear, given, dim, size):
    '''Axis of the weight of any linear map that has the channels, which are a dimension of its output.'''
    generator, weight = torch.Generator().manual_seed(0), linear.weight.detach()
    input, factors = (
        torch.rand(shape, generator=generator, dtype=torch.double).to(weight) for shape in (given, (size,))
    )
    with torch.no_grad():
        output = linear.product(input, weight)
        expected = output * factors.view(-1, *(1,) * (output.ndim - 1 - dim))
        for axis in range(weight.ndim):
            if weight.shape[axis] == size and torch.allclose(
                linear.product(input, weight * factors.view(-1, *(1,) * (weight.ndim - 1 - axis))), expected, rtol=1e-4,
                atol=1e-4 * float(output.abs().amax()),
            ):
                return axis
    return None


def has_statistics(module):
    '''Whether a module has running statistics, as batch normalization and its frozen variants do.'''
    return all(isinstance(getattr(module, key, None), torch.Tensor) for key in ('running_mean', 'running_var'))


def _is_affine(batch_norm, input, output):
    '''Whether what a module of any class returned is what batch normalization with its attributes returns.'''
    if input.ndim < 2 or input.shape[1:] != output.shape[1:] or not len(input):
        return False
    shape = (1, -1, *(1,) * (input.ndim - 2))
    # one example is enough
    input, actual = input.detach()[:1], output.detach()[:1]
    tolerance = 1e3 * torch.finfo(actual.dtype).eps * max(float(actual.abs().amax()), 1.)
    for eps in (batch_norm.eps,) if hasattr(batch_norm, 'eps') else (0., 1e-5, 1e-3):
        with torch.no_grad():
            vars(batch_norm)['eps'] = eps
            expected = (input - batch_norm.running_mean.view(shape)) * _scale(batch_norm).view(shape)
            if getattr(batch_norm, 'bias', None) is not None:
                expected = expected + batch_norm.bias.view(shape)
        # some have an activation, mostly this one
        if any(bool(((elem - actual).abs() <= tolerance).all()) for elem in (expected, expected.clamp(min=0))):
            return True
    return False


def _scale(batch_norm):
    '''Factors of batch normalization by running statistics, of shape (channels,).'''
    scale = (batch_norm.running_var + batch_norm.eps) ** -.5
    return scale if getattr(batch_norm, 'weight', None) is None else scale * batch_norm.weight


def _number(tensor):
    '''Number of the node that has computed a tensor, which no other has, None for leaves.'''
    return None if tensor.grad_fn is None else (sequence_of(tensor.grad_fn), version_of(tensor))


def _weights(linear):
    '''Parameters, and weights that are computed from them before each call, as of pruned layers.'''
    return dict(linear._parameters), {key: vars(linear)[key] for key in ('weight', 'bias') if key in vars(linear)}


def _restore(linear, weights):
    parameters, computed = weights
    linear._parameters.clear()
    linear._parameters.update(parameters)
    vars(linear).update(computed)


@contextlib.contextmanager
def _folded(linear, batch_norm, axis, order):
    '''Have folded parameters in place, see :py:func:`_place`.'''
    batch_norm.check()
    weights = _weights(linear)
    fold_batch_norm(linear, batch_norm.module, axis, order)
    try:
        yield
    finally:
        _restore(linear, weights)


def fold_batch_norm(linear, batch_norm, axis=0, order=None):
    '''Replace the parameters of a linear layer with those of it and the batch normalization after it.'''
    def pick(values):
        return values if order is None else values[order]

    with torch.no_grad():
        scale, mean = pick(_scale(batch_norm)), pick(batch_norm.running_mean)
        weight = linear.weight
        if isinstance(linear, ConvolutionTranspose):
            shape = (linear.groups, weight.shape[0] // linear.groups, *weight.shape[1:])
            weight = (weight.view(shape) * scale.view(linear.groups, 1, -1, *(1,) * (weight.ndim - 2))).view_as(weight)
        else:
            weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1 - axis))
        bias = (-mean if linear.bias is None else linear.bias - mean) * scale
        if getattr(batch_norm, 'bias', None) is not None:
            bias = bias + pick(batch_norm.bias)
    dtype = linear.weight.dtype
    for key, value in (('weight', weight), ('bias', bias)):
        if key in vars(linear):
            vars(linear)[key] = value.to(dtype)
        else:
            linear._parameters[key] = as_parameter(value.to(dtype))
