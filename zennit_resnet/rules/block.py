'''A residual block as one layer (Doublet et al., C3-LRP).'''
import copy
import threading

import torch
from zennit.core import Hook, RemovableHandle, RemovableHandleList

from .._compat import DisableTorchFunction, caller, is_running, version_of
from .._inplace import Kept, is_watched, replace, settle
from .._nested import active_tensors, map_tensors
from ..arguments import Described, as_stabilizer, check_choice, check_flag, check_stabilizer
from ._linear_maps import by_example


class _Calls(threading.local):
    '''Calls of modules with such a rule that are running in a thread.'''
    def __init__(self):
        self.stack = []


_CALLS = _Calls()


class _BlockCall:
    '''A call of a module with a :py:class:`BlockEpsilon` rule, which is one layer unless it is part of another.'''
    def __init__(self, rule, module, frame=None):
        self.rule, self.module, self.frame = rule, module, frame
        self.is_layer, self.has_addition = True, False
        # calls inside, inputs with what the module was given in their place and their versions, and all that is kept
        self.inner, self.inputs, self.kept = [], [], []

    def keep(self, tensor):
        '''Keep the values of a tensor for as long as this may be a layer.'''
        self.kept.append(Kept(tensor))
        return self.kept[-1]

    def enter(self, tensor):
        '''Have the gradient of an input multiplied with it.'''
        if not tensor.requires_grad:
            return tensor
        # a leaf, such as the network's input, must not be changed
        alias = tensor.detach().clone() if tensor.is_leaf else tensor.detach()
        kept = self.keep(tensor)
        # R' = z J^T (R / z')
        given = _Change.apply(self, [alias], tensor, lambda gradient: kept.values * gradient)
        self.inputs.append((tensor, given, version_of(tensor)))
        return given

    def leave(self, tensor):
        return self.rule.attach(self, tensor) if self.is_layer and tensor.requires_grad else tensor

    def decide(self):
        '''Decide whether this is a layer, by what it has done so far. Then all inside is part of it.'''
        is_block = self.rule.is_block
        self.is_layer = self.rule.active and (self.has_addition if is_block is None else is_block)
        if self.is_layer:
            for inner in self.inner:
                inner.is_layer = False
                for kept in inner.kept:
                    kept.clear()


class _Change(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, alias, tensor, change):
        '''Return an alias of the tensor, which comes in a list, because a tensor would be returned as a view.'''
        # what the change needs is not kept by save_for_backward, as in-place operations may follow
        ctx.call, ctx.change = call, change
        return alias[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, relevance):
        return None, None, ctx.change(relevance) if ctx.call.is_layer else relevance, None


class BlockEpsilon(Described, Hook):
    '''A module as one layer, Eq. (1) of C3-LRP: R' = z J^T (R / stab(z')), with input z, output z' and Jacobian J.

    The Jacobian's product is the module's own gradient, so there is no second pass through it: relevance is divided by
    the output before, and multiplied with the input after. Rules of the same class on modules inside are inactive.

    The factors of subsequent layers cancel. Where all layers have this rule, it amounts to Gradient x Input times
    the scalar R_k / (y_k - b_k), up to a factor z' / stab(z') for each layer.

    Parameters
    ----------
    epsilon: callable or float, optional
        What is added to the output (default 1e-6), or a function ``(output) -> stabilized output``. With 0, entries of
        zero receive nothing.
    mode: str, optional
        ``'sign'`` (default) adds ``epsilon`` with the sign of each entry, ``'plus'`` adds it as the equation has it.
    with_bias: bool, optional
        If ``False``, the module's bias is taken from the denominator, as Eq. (2) has it for linear layers.
    form: str, optional
        With ``'relevance'`` (default), the rule takes and gives relevance R, with ``'gradient'`` R / z, for which it
        only has to multiply with z' / stab(z') at the output. What is between such modules then may be anything, its
        gradient is the same equation without stabilizer. :py:class:`GradientTimesInput` for the whole network makes
        relevance of it.
    is_block: bool or None, optional
        If ``None``, the module is one layer only if it adds tensors in its own forward, which
        :py:class:`~zennit_resnet.canonizers.BlockCanonizer` finds out while it runs. Default is ``True``.

    A ValueError is raised if ``mode`` or ``form`` is unknown, or ``epsilon`` is negative or not finite, and a TypeError
    if an argument is of another type.
    '''
    def __init__(self, epsilon=1e-6, mode='sign', with_bias=True, form='relevance', is_block=True):
        super().__init__()
        check_choice('mode', mode, ('sign', 'plus'))
        check_choice('form', form, ('relevance', 'gradient'))
        check_flag('with_bias', with_bias)
        if is_block is not None:
            check_flag('is_block', is_block)
        self.epsilon = check_stabilizer('epsilon', epsilon)
        self.mode, self.with_bias, self.form, self.is_block = mode, with_bias, form, is_block

    def copy(self):
        duplicate = copy.copy(self)
        Hook.__init__(duplicate)
        return duplicate

    def register(self, module):
        return RemovableHandleList([
            RemovableHandle(self),
            module.register_forward_pre_hook(self._pre_forward, with_kwargs=True),
            module.register_forward_hook(self._post_forward, always_call=True),
        ])

    def remove(self):
        '''When removing hooks, forget calls that were interrupted.'''
        stack = _CALLS.stack
        stack[:] = [call for call in stack if call.rule is not self]
        super().remove()

    def divide(self, relevance, output):
        '''Divide relevance by the stabilized output, of the same shape, with zero where the denominator is zero.'''
        if callable(self.epsilon):
            return relevance / self.epsilon(output)
        if self.mode == 'plus':
            denominator = output + self.epsilon
        else:
            # the stabilizer's sign of zero is positive
            denominator = as_stabilizer('epsilon', self.epsilon)(output) if self.epsilon else output
        share = relevance / denominator
        return share if self.epsilon and self.mode == 'sign' else share.masked_fill_(denominator == 0, 0.)

    def scale(self, gradient, output, denominator):
        '''A gradient, R / z', times the factor z' / stab(z') by which R changes, where Eq. (2) has no bias.'''
        if callable(self.epsilon) or self.mode == 'plus' or not self.epsilon or denominator is not output:
            return self.divide(gradient * output, denominator)
        return by_example(self._scale, gradient, output)

    def _scale(self, gradient, output):
        # |z'| / (|z'| + epsilon) is the same in fewer steps, which are limited by memory
        factor = output.abs()
        return factor.div_(factor + self.epsilon).mul_(gradient)

    def _pre_forward(self, module, args, kwargs):
        with DisableTorchFunction():
            call, stack = _BlockCall(self, module, caller()), _CALLS.stack
            while stack and not is_running(stack[-1].frame):
                stack.pop()
            stack.append(call)
            if not self.active or not torch.is_grad_enabled():
                return None
            if self.form == 'gradient':
                call.inputs = [(elem, elem, version_of(elem)) for elem in active_tensors((args, kwargs))]
                return None
            return map_tensors(call.enter, (args, kwargs))

    def _post_forward(self, module, args, output):
        stack = _CALLS.stack
        if not stack or stack[-1].module is not module:
            # the module raised before this rule's hook was reached
            return None
        call = stack.pop()
        # it is part of the graph, and must not keep what refers to the graph
        call.frame, inputs, call.inputs = None, call.inputs, []
        call.decide()
        if stack:
            stack[-1].inner.extend([call, *call.inner])
        if output is None or not torch.is_grad_enabled() or not (call.is_layer or inputs):
            return None
        with DisableTorchFunction():
            result = map_tensors(call.leave, output)
            for elem, given, version in inputs:
                # what the module has changed in place is an output as well
                if version_of(elem) != version and (call.is_layer or given is not elem):
                    replace(elem, result if given is output else call.leave(given))
                    if not is_watched():
                        settle(elem)
        return result

    def attach(self, call, output):
        kept, bias, without = call.keep(output), getattr(call.module, 'bias', None), None
        if not self.with_bias and isinstance(bias, torch.Tensor):
            dims = 0 if isinstance(call.module, torch.nn.Linear) else output.ndim - 2
            without = output.detach() - bias.detach().view(-1, *(1,) * dims)

        def change(relevance):
            denominator = kept.values if without is None else without
            if self.form == 'gradient':
                return self.scale(relevance, kept.values, denominator)
            return self.divide(relevance, denominator)

        return _Change.apply(call, [output.detach()], output, change)


class GradientTimesInput(BlockEpsilon):
    '''A whole network as one layer, with further rules inside: R' = x J^T (R / y).'''
    def __init__(self):
        super().__init__(epsilon=0.)

    def _pre_forward(self, module, args, kwargs):
        if not self.active or not torch.is_grad_enabled():
            return None
        with DisableTorchFunction():
            call = _BlockCall(self, module)
            given, call.inputs = map_tensors(call.enter, (args, kwargs)), []
        return given

    def _post_forward(self, module, args, output):
        if output is None or not self.active or not torch.is_grad_enabled():
            return None
        with DisableTorchFunction():
            return map_tensors(_BlockCall(self, module).leave, output)


def note_addition(module):
    '''Note that a module which is running adds tensors.'''
    stack = _CALLS.stack
    if stack and stack[-1].module is module:
        stack[-1].has_addition = True
        # what layers inside keep may be needed no more, and is not copied if this is in place
        stack[-1].decide()
