'''Folding batch normalizations into the linear layers before them, by data flow.'''
import contextlib
import functools
import weakref

import torch
from torch._C import DisableTorchFunction
from torch.nn.utils.parametrize import is_parametrized
from zennit.core import RemovableHandleList
from zennit.types import BatchNorm, ConvolutionTranspose, Linear

from .core import SinglePass
from .graph import count_uses, nodes_of


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
        # of a batch normalization that is running
        self.pair = None

    def watch(self, module):
        '''Watch a module, after its rules were registered, such that tensors are seen as other modules see them.'''
        if isinstance(module, Linear):
            self.handles.append(module.register_forward_hook(self._note_output))
        elif isinstance(module, BatchNorm) and getattr(module, 'running_mean', None) is not None:
            self.handles.append(module.register_forward_pre_hook(self._note_input, prepend=True))
            self.handles.append(module.register_forward_hook(self._note_result))

    def _note_output(self, module, args, output):
        with DisableTorchFunction():
            if not isinstance(output, torch.Tensor) or not output.requires_grad:
                return
            reference, *_ = self.producers.get(id(output), (lambda: None,))
            # a layer with a forward of its own may return the output of a functional one
            if reference() is not output:
                self.producers[id(output)] = weakref.ref(output), _number(output), module
                self.calls[module] = self.calls.get(module, 0) + 1

    def _note_input(self, module, args):
        self.pair = None
        if not args or id(args[0]) not in self.producers:
            return
        reference, number, linear = self.producers[id(args[0])]
        with DisableTorchFunction():
            # something else may have changed it in place, such as an addition
            if reference() is args[0] and _number(args[0]) == number:
                self.pair = args[0].grad_fn, linear

    def _note_result(self, module, args, output):
        pair, self.pair = self.pair, None
        if pair is not None and isinstance(output, torch.Tensor):
            with DisableTorchFunction():
                self.candidates.append((*pair, module, output.grad_fn))

    def fold(self, outputs):
        '''Put folded parameters in place after a forward pass, or have that done when a rule uses them.

        Parameters
        ----------
        outputs: list of :py:obj:`torch.Tensor`
            The outputs of the forward pass that carry relevance.

        Raises
        ------
        TypeError
            If a parameter of a linear layer is parametrized.
        '''
        candidates, calls = self.candidates, self.calls
        self.producers, self.calls, self.candidates = {}, {}, []
        uses = count_uses(nodes_of(outputs)) if candidates else {}
        for node, linear, batch_norm, result in candidates:
            # what the batch normalization returned may not be used
            if uses.get(node) != 1 or calls[linear] != 1 or result not in uses:
                continue
            _check_foldable(linear)
            if isinstance(getattr(node, 'rule', None), SinglePass):
                # of a stand-in for a function, the node has the copy that belongs to this call
                node.context = functools.partial(_folded, node.module, batch_norm)
            else:
                self.folded.append((linear, _weights(linear)))
                fold_batch_norm(linear, batch_norm)

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


def _number(tensor):
    '''Number of the node that has computed a tensor, which no other has, None for leaves.'''
    return None if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()  # pylint: disable=protected-access


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
    weights = _weights(linear)
    fold_batch_norm(linear, batch_norm)
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
        scale = (batch_norm.running_var + batch_norm.eps) ** -.5
        if batch_norm.weight is not None:
            scale = scale * batch_norm.weight
        weight = linear.weight
        if isinstance(linear, ConvolutionTranspose):
            shape = (linear.groups, weight.shape[0] // linear.groups, *weight.shape[1:])
            weight = (weight.view(shape) * scale.view(linear.groups, 1, -1, *(1,) * (weight.ndim - 2))).view_as(weight)
        else:
            weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        bias = -batch_norm.running_mean if linear.bias is None else linear.bias - batch_norm.running_mean
        bias = bias * scale
        if batch_norm.bias is not None:
            bias = bias + batch_norm.bias
    dtype = linear.weight.dtype
    for key, value in (('weight', weight), ('bias', bias)):
        if key in vars(linear):
            vars(linear)[key] = value.to(dtype)
        else:
            linear._parameters[key] = torch.nn.Parameter(value.to(dtype), requires_grad=False)
