'''Why relevance is lost in a layer: what its rule divides by, and what it leaves to its inputs, in closed form.

Rules that divide relevance R by a denominator, R' = x W^T s with shares s = R / stab(z), lose
sum R - sum R' = sum (R - s z) + sum s b, with z = W x + b: the stabilizer's part where z != 0, all of R where z = 0
(dead units), and the bias' part. What rules divide by is taken from themselves, while they run.
'''
import math
from typing import NamedTuple

import torch
from zennit import rules as zennit_rules
from zennit.core import Hook
from zennit.types import BatchNorm, Linear

from ..layer import LinearMap, Normalization
from ..rules.block import BlockEpsilon
from ..rules.normalization import EpsilonNormalization
from ..rules.zplus import ZPlus

# What to do about each cause by which relevance is lost, and its color in plots.
CAUSES = {
    'sink': ('parameters or other constants keep it, such as a class token, which is no loss', '#56b4e9'),
    'bias': ('biases have a share of the output. With zero_params=\'bias\', rules of Zennit leave them out', '#0072b2'),
    'stabilizer': ('it is not small compared with what it is added to. Choose a smaller one', '#e69f00'),
    'dead_units': (
        'units have relevance, but no contributions to share it by. ResNetLRP(dead_units=\'spread\') does',
        '#999999',
    ),
    'no_rule': (
        'the gradient took its place. with_splitting(composite) has one for additions, a layer map for layers',
        '#d55e00',
    ),
    'unexplained': ('a rule does not conserve relevance, or terms cancel but for their rounding', '#cc79a7'),
}

# For each rule of Zennit, from outputs z and shares s of its forward passes, and the factors with which these enter the
# relevance: its parts, each divided by a denominator of its own, as (factor, share, denominator).
DENOMINATORS = {
    **dict.fromkeys(
        (zennit_rules.Epsilon, zennit_rules.Norm, zennit_rules.WSquare, zennit_rules.Flat),
        lambda z, s, factors: [(1., s[0], z[0])],
    ),
    zennit_rules.ZPlus: lambda z, s, factors: [(1., s[0], z[0] + z[1])],
    zennit_rules.AlphaBeta: lambda z, s, factors: [(factors[0], s[0], z[0] + z[1]), (factors[2], s[2], z[2] + z[3])],
    zennit_rules.ZBox: lambda z, s, factors: [(1., s[0], z[0] - z[1] - z[2])],
    zennit_rules.Gamma: lambda z, s, factors: [
        (1., s[0] + s[2], torch.where(z[4] > 0, z[0] + z[1], torch.where(z[4] < 0, z[2] + z[3], 0.)))
    ],
}


class Note(NamedTuple):
    '''What a rule says about a backward pass: relevance lost by cause, and the smallest magnitude of a denominator.'''
    rule: Hook
    lost: dict
    smallest: torch.Tensor


class LossProbe:
    '''Takes notes of what rules compute while they run, without any influence on it.'''
    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.notes = []
        # rules that gave notes
        self.heard = set()
        self.replaced = {}

    def watch(self, hook, module):
        if hook in self.replaced:
            return
        if isinstance(hook, (ZPlus, EpsilonNormalization)):
            methods = self._zplus(hook)
        elif isinstance(hook, BlockEpsilon):
            methods = self._block(hook)
        elif type(hook) in DENOMINATORS:
            methods = self._basic(hook, module)
        else:
            return
        self.replaced[hook] = methods, {key: vars(hook)[key] for key in methods if key in vars(hook)}
        vars(hook).update(methods)

    def leave(self):
        for hook, (methods, before) in self.replaced.items():
            for key in methods:
                del vars(hook)[key]
            vars(hook).update(before)
        self.replaced = {}

    def take(self):
        notes, self.notes = self.notes, []
        return notes

    def bias(self, module, share, zeros):
        '''What the bias of a layer keeps, sum s b, of shape (batch,).'''
        return self._sum(precise(share) * precise(intercept(module, zeros)))

    def _sum(self, tensor):
        return tensor.reshape(self.batch_size, -1).sum(1)

    def _note(self, hook, relevance, parts):
        '''Note what is lost at denominators, with the parts of the relevance that are divided by each of them.'''
        if relevance.ndim == 0 or len(relevance) != self.batch_size:
            return
        # otherwise it is rounding
        is_stabilized = not isinstance(hook, ZPlus) or hook.stabilizer is not None or hasattr(hook, 'epsilon')
        smallest = torch.full((self.batch_size,), math.inf, dtype=torch.float64, device=relevance.device)
        total = {'stabilizer': 0., 'dead_units': 0.}
        for factor, share, denominator in parts:
            if factor == 0:
                continue
            magnitude = precise(denominator).abs().reshape(self.batch_size, -1)
            dead = magnitude <= magnitude.mean(1, keepdim=True) * torch.finfo(denominator.dtype).eps
            lower = precise(share) * precise(denominator)
            part = factor * (precise(relevance) - lower).reshape(self.batch_size, -1)
            total['dead_units'] += part.where(dead, 0.).sum(1)
            total['stabilizer'] += part.where(~dead, 0.).sum(1) * is_stabilized
            has_relevance = relevance.reshape(self.batch_size, -1).to(magnitude.device) != 0
            smallest = smallest.to(magnitude.device).minimum(magnitude.where(has_relevance, math.inf).amin(1))
        self.heard.add(hook)
        self.notes.append(Note(hook, total, smallest))

    def _basic(self, hook, module):
        '''Rules of Zennit, which run the module with several modifications of its input and its parameters.'''
        denominators, gradient_mapper, num = DENOMINATORS[type(hook)], hook.gradient_mapper, len(hook.output_modifiers)
        factors = [float(hook.reducer(*([float(pos == index) for pos in range(num)],) * 2)) for index in range(num)]
        biases = {}

        def watch_output(index, modifier):
            def modify(output):
                if is_affine(module):
                    input, = hook.stored_tensors['input'][:1]
                    biases[index] = modifier(intercept(module, torch.zeros_like(input[:1])))
                return modifier(output)
            return modify

        def map_gradient(relevance, outputs):
            result = gradient_mapper(relevance, outputs)
            shares = [result] if isinstance(result, torch.Tensor) else result
            with torch.no_grad():
                self._note(hook, relevance, denominators(outputs, shares, factors))
                if self.notes:
                    self.notes[-1].lost['bias'] = sum(
                        factors[index] * self._sum(precise(shares[index]) * precise(value))
                        for index, value in biases.items()
                    )
            biases.clear()
            return result

        return {
            'output_modifiers': [watch_output(*elem) for elem in enumerate(hook.output_modifiers)],
            'gradient_mapper': map_gradient,
        }

    def _zplus(self, hook):
        def share_out(relevance, divisor):
            share, dead = type(hook)._share(hook, relevance, divisor)
            self._note(hook, relevance, [(1., share, divisor.denominator)])
            return share, dead

        def spread(module, input, relevance):
            lower = type(hook)._spread(hook, module, input, relevance).expand_as(input)
            if len(lower) == self.batch_size and self.notes:
                self.notes[-1].lost['dead_units'] -= self._sum(precise(lower))
            return lower

        def keep(relevance):
            if not self.notes or self.notes[-1].rule is not hook:
                return
            # not for layers whose first dimension is not that of the examples
            kept = relevance()
            if len(kept) == self.batch_size:
                self.notes[-1].lost['bias'] = self._sum(precise(kept))

        return {'_share': share_out, '_spread': spread, '_keep': keep}

    def _block(self, hook):
        def divide(relevance, output):
            share = type(hook).divide(hook, relevance, output)
            self._note(hook, relevance, [(1., share, output)])
            return share

        def scale(gradient, output, denominator):
            share = type(hook).scale(hook, gradient, output, denominator)
            self._note(hook, precise(gradient) * precise(output), [(1., share, denominator)])
            return share

        return {'divide': divide} if hook.form == 'relevance' else {'scale': scale}


def is_affine(module):
    return isinstance(module, (Linear, BatchNorm)) and not isinstance(module, (LinearMap, Normalization))


def intercept(module, zeros):
    with torch.no_grad():
        return module.forward(zeros).detach()


def precise(tensor):
    '''A tensor in double precision, on the CPU if its device has none.'''
    return (tensor.cpu() if tensor.device.type == 'mps' else tensor).double()
