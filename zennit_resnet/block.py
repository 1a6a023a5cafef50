'''A residual block as one layer (Doublet et al., C3-LRP).'''
import copy
import threading

import torch
from torch._C import DisableTorchFunction
from zennit.core import Hook, RemovableHandle, RemovableHandleList, Stabilizer

from .memory import by_example

_CALLS = threading.local()


class _Call:
    '''A call of a module with a :py:class:`BlockEpsilon` rule, which is one layer unless it is part of another.'''
    def __init__(self, rule, module):
        self.rule = rule
        self.module = module
        self.is_layer = True
        self.has_addition = False
        self.inner = []


class _Enter(torch.autograd.Function):
    '''Multiply with the input in the backward pass.'''
    # pylint: disable=abstract-method,arguments-differ
    @staticmethod
    def forward(ctx, call, alias, input):
        '''Return an alias of the input, which comes in a list, because a tensor would be returned as a view.'''
        ctx.call = call
        ctx.save_for_backward(input)
        return alias[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        '''R' = z J^T (R / z').'''
        input, = ctx.saved_tensors
        return None, None, input * gradient if ctx.call.is_layer else gradient


class _Leave(torch.autograd.Function):
    '''Divide by the stabilized output in the backward pass.'''
    # pylint: disable=abstract-method,arguments-differ
    @staticmethod
    def forward(ctx, call, alias, output, denominator):
        '''Return an alias of the output.'''
        ctx.call = call
        # not by save_for_backward, as an in-place activation may follow. It leaves what relevance depends on: entries
        # that ReLU sets to zero receive none.
        ctx.denominator = denominator
        return alias[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, relevance):
        '''R / stab(z').'''
        if ctx.call.is_layer:
            relevance = ctx.call.rule.divide(relevance, ctx.denominator)
        return None, None, relevance, None


class _Factor(torch.autograd.Function):
    '''Multiply with the factor by which relevance at the output changes, z' / stab(z'), in the backward pass.'''
    # pylint: disable=abstract-method,arguments-differ
    @staticmethod
    def forward(ctx, call, alias, output, values, denominator):
        '''Return an alias of the output.'''
        ctx.call = call
        ctx.values, ctx.denominator = values, denominator
        return alias[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        '''g z' / stab(z').'''
        if ctx.call.is_layer:
            gradient = ctx.call.rule.scale(gradient, ctx.values, ctx.denominator)
        return None, None, gradient, None, None


class BlockEpsilon(Hook):
    '''A module as one layer, Eq. (1) of C3-LRP: R' = z J^T (R / stab(z')), with input z, output z' and Jacobian J.

    The Jacobian's product is the module's own gradient, so there is no second pass through it: relevance is divided by
    the output before, and multiplied with the input after. Rules of the same class on modules inside are inactive.

    The factors of subsequent layers cancel. Where all layers have this rule, it thus amounts to Gradient x Input times
    the scalar R_k / (y_k - b_k), up to a factor z' / stab(z') for each layer.

    Parameters
    ----------
    epsilon: callable or float, optional
        Stabilization of the output. If it is a float (default 1e-6), it will be added with the sign of each entry. If
        it is callable, a function ``(input: torch.Tensor) -> torch.Tensor`` is expected, of which the output
        corresponds to the stabilized denominator. With 0, entries of zero receive nothing.
    mode: str, optional
        ``'sign'`` (default) adds ``epsilon`` with the sign of each entry, ``'plus'`` adds it as the equation has it.
    with_bias: bool, optional
        If ``False``, the module's bias is taken from the denominator, as Eq. (2) has it for linear layers. Default is
        ``True``.
    form: str, optional
        With ``'relevance'`` (default), the rule takes and gives relevance R. With ``'gradient'``, it takes and gives
        relevance divided by the activation, g = R / z, for which it only has to multiply with z' / stab(z') at the
        output. What is between such modules then may be anything, and its gradient is the same equation without
        stabilizer. :py:class:`GradientTimesInput` for the whole network makes relevance of it.
    is_block: bool or None, optional
        If ``None``, the module is one layer only if it adds tensors in its own forward, which
        :py:class:`~zennit_resnet.canonizers.BlockCanonizer` finds out while it runs. Default is ``True``.

    Raises
    ------
    ValueError
        If ``mode`` or ``form`` is unknown, or ``epsilon`` is negative.
    '''
    def __init__(self, epsilon=1e-6, mode='sign', with_bias=True, form='relevance', is_block=True):
        super().__init__()
        if mode not in ('sign', 'plus'):
            raise ValueError(f'mode={mode!r} is not one of \'sign\', \'plus\'!')
        if form not in ('relevance', 'gradient'):
            raise ValueError(f'form={form!r} is not one of \'relevance\', \'gradient\'!')
        if not callable(epsilon) and epsilon < 0:
            raise ValueError(f'epsilon={epsilon} is negative!')
        self.epsilon = epsilon
        self.mode = mode
        self.with_bias = with_bias
        self.form = form
        self.is_block = is_block

    def copy(self):
        '''Return a copy of this hook.'''
        duplicate = copy.copy(self)
        Hook.__init__(duplicate)
        return duplicate

    def register(self, module):
        '''Register this instance to the supplied module.'''
        return RemovableHandleList([
            RemovableHandle(self),
            module.register_forward_pre_hook(self._pre_forward),
            module.register_forward_hook(self._post_forward, always_call=True),
        ])

    def divide(self, relevance, output):
        '''Divide relevance by the stabilized output.

        Parameters
        ----------
        relevance: :py:obj:`torch.Tensor`
            Relevance of the output.
        output: :py:obj:`torch.Tensor`
            The output, of the same shape.

        Returns
        -------
        :py:obj:`torch.Tensor`
            The quotient, zero where the denominator is zero.
        '''
        if callable(self.epsilon):
            return relevance / self.epsilon(output)
        if self.mode == 'plus':
            denominator = output + self.epsilon
        else:
            # the stabilizer's sign of zero is positive
            denominator = Stabilizer(self.epsilon)(output) if self.epsilon else output
        share = relevance / denominator
        return share if self.epsilon and self.mode == 'sign' else share.masked_fill_(denominator == 0, 0.)

    def scale(self, gradient, output, denominator):
        '''Multiply a gradient with the factor by which relevance at the output changes.

        Parameters
        ----------
        gradient: :py:obj:`torch.Tensor`
            Relevance of the output, divided by the output.
        output: :py:obj:`torch.Tensor`
            The output z', of the same shape.
        denominator: :py:obj:`torch.Tensor`
            The output, without bias where Eq. (2) has it so.

        Returns
        -------
        :py:obj:`torch.Tensor`
            The product with z' / stab(z').
        '''
        if callable(self.epsilon) or self.mode == 'plus' or not self.epsilon or denominator is not output:
            return self.divide(gradient * output, denominator)
        return by_example(self._scale, gradient, output)

    def _scale(self, gradient, output):
        # |z'| / (|z'| + epsilon) is the same in fewer steps, which are limited by memory
        factor = output.abs()
        return factor.div_(factor + self.epsilon).mul_(gradient)

    def _pre_forward(self, module, args):
        with DisableTorchFunction():
            call = _Call(self, module)
            _CALLS.__dict__.setdefault('stack', []).append(call)
            if not self.active or not torch.is_grad_enabled() or self.form == 'gradient':
                return None
            return enter(call, args)

    # pylint: disable=unused-argument
    def _post_forward(self, module, args, output):
        stack = _CALLS.__dict__.get('stack', [])
        if not stack or stack[-1].module is not module:
            # the module raised before this rule's hook was reached
            return None
        call = stack.pop()
        call.is_layer = self.active and (call.has_addition if self.is_block is None else self.is_block)
        if call.is_layer:
            for inner in call.inner:
                inner.is_layer = False
        if stack:
            stack[-1].inner.extend([call, *call.inner])
        if not call.is_layer or not torch.is_grad_enabled():
            return None
        with DisableTorchFunction():
            return leave(call, output)

    def attach(self, call, output):
        '''Attach the rule to the output of a call.'''
        values, bias = output.detach(), getattr(call.module, 'bias', None)
        denominator = values
        if not self.with_bias and isinstance(bias, torch.Tensor):
            dims = 0 if isinstance(call.module, torch.nn.Linear) else output.ndim - 2
            denominator = values - bias.detach().view(-1, *(1,) * dims)
        if self.form == 'gradient':
            return _Factor.apply(call, [output.detach()], output, values, denominator)
        return _Leave.apply(call, [output.detach()], output, denominator)


class GradientTimesInput(BlockEpsilon):
    '''A whole network as one layer, with further rules inside: R' = x J^T (R / y).'''
    def __init__(self):
        super().__init__(epsilon=0.)

    def _pre_forward(self, module, args):
        if not torch.is_grad_enabled():
            return None
        with DisableTorchFunction():
            return enter(_Call(self, module), args)

    def _post_forward(self, module, args, output):
        if output is None or not torch.is_grad_enabled():
            return None
        with DisableTorchFunction():
            return leave(_Call(self, module), output)

    def copy(self):
        '''Return a copy of this hook.'''
        return type(self)()


def enter(call, args):
    '''Have gradients of all inputs multiplied with the inputs.'''
    return tuple(
        _Enter.apply(call, [elem.detach()], elem) if isinstance(elem, torch.Tensor) and elem.requires_grad else elem
        for elem in args
    )


def leave(call, output):
    '''Attach the rule to all outputs that carry relevance.'''
    if isinstance(output, dict):
        return type(output)((key, leave(call, elem)) for key, elem in output.items())
    if type(output) in (tuple, list):
        return type(output)(leave(call, elem) for elem in output)
    if not isinstance(output, torch.Tensor) or not output.requires_grad:
        return output
    return call.rule.attach(call, output)


def note_addition(module):
    '''Note that a module which is running has added tensors.'''
    stack = _CALLS.__dict__.get('stack', [])
    if stack and stack[-1].module is module:
        stack[-1].has_addition = True
