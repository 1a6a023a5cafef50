'''Folding batch normalizations into the linear layers before them, by data flow.'''
import contextlib
import functools
import weakref

import torch
from torch.nn.utils.parametrize import is_parametrized
from zennit.core import RemovableHandleList
from zennit.types import BatchNorm, ConvolutionTranspose, Linear

from .._autograd import count_uses, nodes_of, rule_of, sequence_of
from .._compat import DisableTorchFunction, rules_of
from .._weights import UsedModule, UsedWeights, is_plain
from ..layer import Normalization
from ..rules.base import SinglePass


class BatchNormMerge:
    '''Find pairs of a linear layer and a batch normalization in a forward pass, and fold them for the backward pass.

    A pair is folded if the layer was called once and its output went into the batch normalization only, whatever the
    order in which both are defined. Rules use parameters in the backward pass. The forward pass runs with the original
    ones and stays bit for bit the same.

    Single-pass rules have the folded parameters while they run: those of one layer at a time use the same memory, which
    is several times as fast. Other rules have them between forward passes.
    '''
    def __init__(self):
        self.handles = RemovableHandleList()
        self.producers, self.calls, self.candidates, self.folded = {}, {}, [], []
        # of normalizations that are running
        self.pairs = {}

    def watch(self, module):
        '''Watch a module, after its rules were registered, such that tensors are seen as other modules see them.'''
        if isinstance(module, Linear):
            self.handles.append(module.register_forward_hook(self._note_output))
        elif isinstance(module, Normalization) or _has_statistics(module):
            self.handles.append(module.register_forward_pre_hook(self._note_input, with_kwargs=True, prepend=True))
            self.handles.append(module.register_forward_hook(self._note_result))

    def _note_output(self, module, args, output):
        with DisableTorchFunction():
            if not isinstance(output, torch.Tensor) or not output.requires_grad:
                return
            reference, *_ = self.producers.get(id(output), (lambda: None,))
            # a layer with a forward of its own may return the output of a functional one, or do more than that
            if reference() is output:
                return
            has_single_pass = rule_of(output.grad_fn) is not None
            if isinstance(output.grad_fn.module, Linear) if has_single_pass else (
                is_plain(module) or rules_of(module)
            ):
                # the node of a single-pass rule has the weights of its call
                used = None if has_single_pass else UsedWeights(module)
                self.producers[id(output)] = weakref.ref(output), _number(output), module, used, (output.grad_fn,)
                self.calls[module] = self.calls.get(module, 0) + 1

    def note_shift(self, input, output):
        '''Note that a constant was added, which may be a bias. Single-pass rules do not need to know of it.'''
        with DisableTorchFunction():
            reference, _, linear, used, nodes = self.producers.get(id(input), (lambda: None,) + (None,) * 4)
            if reference() is input and used is None:
                nodes = *nodes, output.grad_fn
                self.producers[id(output)] = weakref.ref(output), _number(output), linear, used, nodes

    def _note_input(self, module, args, kwargs):
        self.pairs.pop(module, None)
        input = next((elem for elem in (*args, *kwargs.values()) if id(elem) in self.producers), None)
        if input is None or not _has_statistics(module):
            return
        reference, number, linear, used, nodes = self.producers[id(input)]
        with DisableTorchFunction():
            # something else may have changed it in place, such as an addition
            if reference() is input and _number(input) == number:
                batch_norm = UsedModule(module)
                batch_norm.finish(module)
                self.pairs[module] = input, nodes, linear, used, batch_norm

    def _note_result(self, module, args, output):
        pair = self.pairs.pop(module, None)
        if pair is None or not isinstance(output, torch.Tensor):
            return
        input, nodes, linear, used, batch_norm = pair
        with DisableTorchFunction():
            # a normalization may be made of others, of which the inner one is found first
            if all(nodes[0] is not candidate[0][0] for candidate in self.candidates) and (
                isinstance(module, (BatchNorm, Normalization)) and (
                    # what has a rule of its own counts as what its type says
                    is_plain(module) or any(rule.active for rule in rules_of(module))
                ) or _is_affine(batch_norm.module, input, output)
            ):
                self.candidates.append((nodes, linear, used, batch_norm, output.grad_fn))

    def fold(self, outputs):
        '''Put folded parameters in place after a forward pass, or have that done when a rule uses them.

        Parameters
        ----------
        outputs: list of :py:obj:`torch.Tensor`
            The outputs of the forward pass that carry relevance.

        Returns
        -------
        list of :py:obj:`torch.nn.Module`
            Layers with other parameters now.

        Raises
        ------
        TypeError
            If a parameter of a linear layer is parametrized.
        '''
        candidates, calls = self.candidates, self.calls
        self.producers, self.calls, self.candidates, self.pairs = {}, {}, [], {}
        uses = count_uses(nodes_of(outputs)) if candidates else {}
        for nodes, linear, used, batch_norm, result in candidates:
            # what the batch normalization returned may not be used
            if any(uses.get(node) != 1 for node in nodes) or calls[linear] != 1 or result not in uses:
                continue
            node = nodes[0]
            if isinstance(rule_of(node), SinglePass):
                # the node has a copy of the layer
                node.context = functools.partial(_folded, node.module, batch_norm)
            else:
                _check_foldable(linear)
                used.check()
                batch_norm.check()
                self.folded.append((linear, _weights(linear)))
                fold_batch_norm(linear, batch_norm.module)
        return [linear for linear, _ in self.folded]

    def pause(self):
        '''Put the original parameters back, to run a part of the network again during the backward pass.

        Returns
        -------
        list of tuple
            Layers with their original and their folded parameters, to put these back in place with :py:meth:`resume`.
        '''
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
        self.producers, self.calls, self.candidates = {}, {}, []
        while self.folded:
            _restore(*self.folded.pop())

    def remove(self):
        '''Put the original parameters back, and watch no module anymore.'''
        self.unfold()
        self.handles.remove()


def _has_statistics(module):
    '''Whether a module has running statistics, as batch normalization and its frozen variants do.'''
    return all(isinstance(getattr(module, key, None), torch.Tensor) for key in ('running_mean', 'running_var'))


def _is_affine(batch_norm, input, output):
    '''Whether what a module of any class returned is what batch normalization with its attributes returns.'''
    if input.ndim < 2 or input.shape != output.shape or not len(input):
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
    return None if tensor.grad_fn is None else sequence_of(tensor.grad_fn)


def _weights(linear):
    '''Parameters, and weights that are computed from them before each call, as of pruned layers.'''
    return dict(linear._parameters), {key: vars(linear)[key] for key in ('weight', 'bias') if key in vars(linear)}


def _restore(linear, weights):
    '''Put back what :py:func:`_weights` has returned.'''
    parameters, computed = weights
    linear._parameters.clear()
    linear._parameters.update(parameters)
    vars(linear).update(computed)


@contextlib.contextmanager
def _folded(linear, batch_norm):
    '''Have folded parameters in place.'''
    batch_norm.check()
    weights = _weights(linear)
    fold_batch_norm(linear, batch_norm.module)
    try:
        yield
    finally:
        _restore(linear, weights)


def _check_foldable(linear):
    if is_parametrized(linear):
        raise TypeError(
            f'Batch normalization can not be folded into a {type(linear).__name__}: use batch_norm=\'pass\', or '
            'torch.nn.utils.parametrize.remove_parametrizations first.'
        )


def fold_batch_norm(linear, batch_norm):
    '''Replace the parameters of a linear layer with those of it and the batch normalization after it.

    Parameters
    ----------
    linear: :py:obj:`torch.nn.Module`
        A linear layer or convolution, of which no parameter is parametrized.
    batch_norm: :py:obj:`torch.nn.Module`
        A batch normalization with running statistics.
    '''
    with torch.no_grad():
        scale = _scale(batch_norm)
        weight = linear.weight
        if isinstance(linear, ConvolutionTranspose):
            shape = (linear.groups, weight.shape[0] // linear.groups, *weight.shape[1:])
            weight = (weight.view(shape) * scale.view(linear.groups, 1, -1, *(1,) * (weight.ndim - 2))).view_as(weight)
        else:
            weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        bias = -batch_norm.running_mean if linear.bias is None else linear.bias - batch_norm.running_mean
        bias = bias * scale
        if getattr(batch_norm, 'bias', None) is not None:
            bias = bias + batch_norm.bias
    dtype = linear.weight.dtype
    for key, value in (('weight', weight), ('bias', bias)):
        if key in vars(linear):
            vars(linear)[key] = value.to(dtype)
        else:
            linear._parameters[key] = torch.nn.Parameter(value.to(dtype), requires_grad=False)
