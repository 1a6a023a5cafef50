'''Rules for residual networks.

All rules here run in a single pass: the layer's own graph is replaced with a function whose backward *is* the rule, so
nothing is computed that the rule does not need. Equations are those of Otsuki et al. 2024 (Layer-Wise Relevance
Propagation for ResNet) unless said otherwise.
'''
import functools

import torch
import torch.nn.functional as F
from zennit.core import RemovableHandle, RemovableHandleList, Stabilizer
from zennit.types import Convolution, ConvolutionTranspose, MaxPool

from . import windows
from .arguments import (
    as_bound,
    check_bounds,
    check_inside,
    check_rule,
    check_stabilizer,
    spread_bound,
)
from .block import BlockEpsilon  # noqa: F401, pylint: disable=unused-import
from .core import SinglePass, check_choice
from .graph import depends_on, is_first
from .layer import NonNegativeMap, Signed, Subsampling
from .memory import LARGE, by_example
from .relative import Relative, RelativeMaxPool  # noqa: F401, pylint: disable=unused-import
from .weights import is_plain

FIRST_LAYER = ('zplus', 'literal', 'ones', 'zbox', 'wsquare', 'flat')
PROJECTION = ('spread', 'literal')
DEAD_UNITS = ('spread', 'drop')
MAXPOOL = ('winner', 'average', 'avg2x2')
RELU = ('relu', 'relu_', 'relu6')
COVERAGE = ('literal', 'even')


class PassThrough(SinglePass):
    '''Relevance passes element-wise activations and normalizations unchanged: R' = R.'''
    reads_layer = False

    def store(self, module, *inputs):
        '''Nothing but the layer's input is needed, and only one input can receive the relevance.'''
        if len(inputs) != 1:
            raise ValueError(f'{type(self).__name__} is for one input, {type(module).__name__} got {len(inputs)}!')
        return ()

    def propagate(self, module, stored, relevance):
        '''Pass relevance on.'''
        return (relevance,)


class SignalTakesAll(SinglePass):
    '''All relevance of a product follows the signal, the gate counts as a constant (Arras et al. 2017).'''
    reads_layer = False

    def propagate(self, module, stored, relevance):
        '''Pass relevance on to the signal only.'''
        return (relevance,)


class Uncrop(SinglePass):
    '''Relevance of the elements that a padding added goes back to elements that exist, so that nothing is lost.

    Along spatial dimensions it goes to the nearest element, along the channels it is shared evenly. Elements with a
    value of zero receive relevance from dead units, from rules for the first layer that treat all inputs alike, and
    from symmetric splitting with a skip connection that is padded with channels.
    '''
    def store(self, module, *inputs):
        '''Keep the amounts, which may be others for another input.'''
        return (torch.tensor([(dim, *amounts) for dim, amounts in module.amounts.items()]),)

    def propagate(self, module, stored, relevance):
        '''Fold relevance back.'''
        for dim, before, after in stored[0].tolist():
            length = relevance.shape[dim] - max(before, 0) - max(after, 0)
            inner = relevance.narrow(dim, max(before, 0), length).clone()
            for start, amount, edge in ((0, before, 0), (relevance.shape[dim] - max(after, 0), after, length - 1)):
                if amount > 0:
                    outer = relevance.narrow(dim, start, amount).sum(dim, keepdim=True)
                    if dim >= 2:
                        inner.narrow(dim, edge, 1).add_(outer)
                    else:
                        inner.add_(outer / length)
            # negative amounts crop
            relevance = F.pad(inner, [value for num in reversed(range(inner.ndim)) for value in (
                (max(-before, 0), max(-after, 0)) if num == dim else (0, 0)
            )])
        return (relevance,)


class Refill(SinglePass):
    '''Relevance of zeros that were put in place of elements goes back evenly to the elements that were kept.

    Elements that were kept receive their own relevance, as the gradient has it. That of constants which are zero is
    shared among all elements of the same example that were kept, or among all of its elements if none was. Constants
    which are not zero keep their part, as concatenated ones do.
    '''
    def store(self, module, *inputs):
        '''Keep the input, of which the order may decide what is kept.'''
        input, = inputs
        return (input,)

    def propagate(self, module, stored, relevance):
        '''Take the gradient, and share what arrives at zeros.'''
        input, = stored
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            output = module.forward(leaf)
        lower, = torch.autograd.grad(output, leaf, relevance, retain_graph=True)
        with torch.no_grad():
            zeros = module.forward(torch.zeros_like(input))
            is_constant = module.forward(torch.ones_like(input)) == zeros
        gap = relevance.where(~is_constant, 0.).double().sum() - lower.double().sum()
        if bool(gap.abs() > 1e-3 * relevance.abs().double().sum()):
            raise RuntimeError(
                f'\'{module.name}\' puts several elements in the same place, for which the gradient is not defined: '
                'have it put each in a place of its own.'
            )
        lost = relevance.where(is_constant & (zeros == 0), 0.)
        if not bool(lost.any()):
            return (lower,)
        kept = (torch.autograd.grad(output, leaf, torch.ones_like(output))[0] != 0).to(lower)
        return (lower + _share_evenly(lost, kept, module.examples),)


class Proportional(SinglePass):
    '''Elements receive relevance in proportion to what they add to a norm, a deviation, ...: R' = R a_i / sum_k a_k.

    If no element adds anything, all receive equal parts.
    '''
    def store(self, module, *inputs):
        '''Keep the input.'''
        input, = inputs
        return (input,)

    def propagate(self, module, stored, relevance):
        '''Share relevance by the amounts.'''
        amounts = module.amounts(stored[0])
        total = amounts.sum(module.dims, keepdim=True)
        shares = torch.where(total == 0, total.numel() / amounts.numel(), amounts / total)
        return (relevance.reshape(total.shape) * shares,)


def _share_evenly(lost, kept, examples=None):
    '''Share relevance evenly among elements that are marked with one, of the same example if there is one for each.'''
    if examples is None and lost.ndim and kept.ndim and len(lost) == len(kept):
        examples = torch.arange(len(kept), device=kept.device)
    if examples is None:
        lost, kept, shape = lost.reshape(1, -1), kept.reshape(1, -1), kept.shape
        examples = torch.zeros(1, dtype=torch.long, device=kept.device)
    else:
        lost, kept, shape = lost.reshape(len(lost), -1), kept.reshape(len(kept), -1), kept.shape
    counts = kept.sum(1, keepdim=True)
    kept = torch.where(counts == 0, 1., kept)
    total = lost.new_zeros(len(kept)).index_add(0, examples, lost.sum(1))
    return (total[:, None] * kept / kept.sum(1, keepdim=True)).reshape(shape)


class Split(SinglePass):
    '''Base class of rules which split relevance at an addition, such as the end of a residual block.

    Relevance R of the sum is divided into one part for each addend. The parts sum to R element by element, Eq. (4).
    '''
    reads_layer = False

    def shares(self, *addends):
        '''Compute the share of each addend but the last, which receives what the others leave.

        Parameters
        ----------
        *addends: tuple of :py:obj:`torch.Tensor`
            Addends as they enter the addition, which can be broadcast to a common shape.

        Returns
        -------
        list of :py:obj:`torch.Tensor` or float
            Shares between 0 and 1, which can be broadcast to the shape of the sum.
        '''
        raise NotImplementedError()

    def split(self, relevance, *addends):
        '''Split relevance.

        Parameters
        ----------
        relevance: :py:obj:`torch.Tensor`
            Relevance of the sum, of the addends' common shape.
        *addends: tuple of :py:obj:`torch.Tensor`
            The addends.

        Returns
        -------
        tuple of :py:obj:`torch.Tensor`
            Relevance of each addend, of the shape of ``relevance``.
        '''
        return self._divide(relevance, self.shares(*addends))

    @staticmethod
    def _divide(relevance, shares):
        parts, rest = [], relevance
        for share in shares:
            parts.append(relevance * share)
            rest = rest - parts[-1]
        return (*parts, rest)

    def store(self, module, *inputs):
        '''Compute the shares, as an in-place addition overwrites its first addend.'''
        # modules of users have none
        factors = getattr(module, 'factors', None) or (1,) * len(inputs)
        inputs = [elem if factor == 1 else elem * factor for elem, factor in zip(inputs, factors)]
        return tuple(torch.as_tensor(share, dtype=None if isinstance(share, torch.Tensor) else torch.float64)
                     for share in self.shares(*inputs))

    def propagate(self, module, stored, relevance):
        '''Split relevance by the shares.'''
        return self._divide(relevance, stored)


class RatioSplit(Split):
    '''Ratio-based relevance splitting, Eqs. (6) and (7): each addend h_i receives ``R |h_i| / sum_k |h_k|``.

    Where all addends are zero, they receive equal parts.
    '''
    def shares(self, *addends):
        '''Share of the magnitudes.'''
        addends = [elem if elem.dtype == torch.float64 else elem.float() for elem in addends]
        return [by_example(self._share, addends[num], *addends[:num], *addends[num + 1:])
                for num in range(len(addends) - 1)]

    @staticmethod
    def _share(*addends):
        '''Share of the first addend.'''
        share, total, *others = (elem.abs() for elem in torch.broadcast_tensors(*addends))
        for elem in (*others, share):
            total.add_(elem)
        return share.div_(total).nan_to_num_(1 / len(addends))


class SymmetricSplit(Split):
    '''Symmetric relevance splitting, Eq. (5): each of n addends receives R / n.'''
    def shares(self, *addends):
        '''Equal shares.'''
        return [1 / len(addends)] * (len(addends) - 1)

    @staticmethod
    def _divide(relevance, shares):
        if len(shares) > 1:
            return Split._divide(relevance, shares)
        # both halves are the same
        return (relevance * shares[0],) * 2


class ResidualOnly(Split):
    '''Identity skip connections receive no relevance (ablation, rows (i) and (iii) of Table 2).

    An addend is an identity skip connection if another addend was computed from it. Additions without one, such as the
    end of a block whose skip connection is a projection, are left to another rule.

    Parameters
    ----------
    rule: :py:obj:`Split`, optional
        The rule for additions without identity skip connection, and among several residual branches.

    Raises
    ------
    TypeError
        If ``rule`` is not an instance of a :py:obj:`Split`.
    '''
    def __init__(self, rule=None):
        super().__init__()
        self.rule = RatioSplit() if rule is None else rule
        check_rule('rule', self.rule, Split)

    def shares(self, *addends):
        '''Share of the residual branches.'''
        identity = [
            any(depends_on(other, elem) for other in addends if other is not elem) for elem in addends
        ]
        branches = [elem for elem, is_identity in zip(addends, identity) if not is_identity]
        if len(branches) in (0, len(addends)):
            return self.rule.shares(*addends)
        parts = self.rule.shares(*branches)
        parts.append(1 - sum(parts))
        parts = iter(parts)
        return [0. if is_identity else next(parts) for is_identity in identity][:-1]


class ZPlus(SinglePass):
    '''Single-pass z+ rule, Eq. (2): R'_i = h_i sum_j w+_ji R_j / sum_k w+_jk h_k, for linear layers, convolutions and
    poolings. Biases have no part in it, so relevance is conserved.

    For layers whose input h has negative values, the contributions are (w h)+, which is the same where h >= 0.

    Parameters
    ----------
    stabilizer: callable or float, optional
        If it is a float, it will be added to the denominator with the same sign as each respective entry. If it is
        callable, a function ``(input: torch.Tensor) -> torch.Tensor`` is expected, of which the output corresponds to
        the stabilized denominator. Relevance is lost by it. The default 0 loses none, because units with a denominator
        that is zero up to rounding (less than the machine precision times the mean of the layer and sample) are treated
        by ``dead_units`` anyway.
    first_layer: str, optional
        Contributions to the first layer, i.e. to layers that no convolution or linear layer with a rule of this package
        precedes. With weights w, and w+ and w- their positive and negative parts: ``'zplus'`` (default) (w h)+;
        ``'literal'`` w+ h as printed, even where h < 0 (denominators may vanish); ``'ones'`` w+ (the published code:
        the input is replaced by ones); ``'zbox'`` w h - w+ low - w- high = w+ (h - low) + w- (h - high); ``'wsquare'``
        w^2; ``'flat'`` 1.
    low: :py:obj:`torch.Tensor`, sequence of float or float, optional
        Lowest possible input values for ``'zbox'``, and only for this: one for all, one for each channel (a sequence or
        a tensor with one dimension; for linear layers the last dimension of the input has the channels), or a tensor
        that can be broadcast to the input.
    high: :py:obj:`torch.Tensor`, sequence of float or float, optional
        Highest possible input values for ``'zbox'``, likewise. It is an error if an input of the first layer is outside
        of ``low`` and ``high`` by more than rounding (a thousandth of the range between them).
    projection: str, optional
        Convolutions whose stride exceeds their kernel, such as the 1 x 1 projections of stride 2 in skip connections,
        read only some of the positions. ``'literal'`` propagates to these only, which leaves a lattice of dots in the
        heatmap. ``'spread'`` (default) shares relevance over the whole stride cell in proportion to the activations:
        z = w+ * avgpool_s(h), R' = h avgpool_s^T(w+^T (R / z)), which conserves it as well.
    dead_units: str, optional
        What becomes of the relevance of units with no positive contribution, 0/0 in Eq. (2). ``'spread'`` (default)
        shares it evenly over the unit's inputs (those inside the image), ``'drop'`` loses it.
    maxpool: str, optional
        ``'winner'`` (default) lets the first maximum take all, ``'average'`` uses an average pooling with the kernel,
        stride and padding of the max pooling, ``'avg2x2'`` an average over 2 x 2 with stride 2 for every max pooling
        (the published code), which must halve its input.
    coverage: str, optional
        Windows with a stride read some positions more often than others (a kernel of 3 with stride 2 every other one
        twice), which leaves a fine lattice in the heatmap. ``'literal'`` (default) keeps it. ``'even'`` scales the
        weights of each filter such that they sum to the same for all positions modulo the stride, and smoothes
        relevance below a max pooling and below the first convolution with a binomial filter. Both conserve relevance.

    Raises
    ------
    ValueError
        If an argument is not one of its choices, if ``stabilizer`` is negative or not finite, if ``low`` and ``high``
        are missing for ``'zbox'`` or given without it, or if ``low`` is above ``high``.
    TypeError
        If ``stabilizer``, ``low`` or ``high`` is not of numbers.
    '''
    # pylint: disable=too-many-arguments
    def __init__(
        self,
        stabilizer=0.,
        first_layer='zplus',
        low=None,
        high=None,
        projection='spread',
        dead_units='spread',
        maxpool='winner',
        coverage='literal',
    ):
        super().__init__()
        check_choice('first_layer', first_layer, FIRST_LAYER)
        check_choice('projection', projection, PROJECTION)
        check_choice('dead_units', dead_units, DEAD_UNITS)
        check_choice('maxpool', maxpool, MAXPOOL)
        check_choice('coverage', coverage, COVERAGE)
        if first_layer == 'zbox' and (low is None or high is None):
            raise ValueError(
                'first_layer=\'zbox\' needs the lowest and highest possible input values, low and high: for an input '
                'normalized with mean and std, low=(0 - mean) / std and high=(1 - mean) / std.'
            )
        if first_layer != 'zbox' and not (low is None and high is None):
            raise ValueError(
                f'low={low!r} and high={high!r} are for first_layer=\'zbox\', but first_layer={first_layer!r}: leave '
                'them out, or choose \'zbox\'.'
            )
        stabilizer = check_stabilizer('stabilizer', stabilizer)
        self.stabilizer = None if stabilizer == 0 else Stabilizer.ensure(stabilizer)
        self.first_layer = first_layer
        self.low, self.high = low, high
        if first_layer == 'zbox':
            self._low, self._high = as_bound('low', low), as_bound('high', high)
            check_bounds(self._low, self._high)
        self.projection = projection
        self.dead_units = dead_units
        self.maxpool = maxpool
        self.coverage = coverage

    def register(self, module):
        '''Register this instance to the supplied module, unless its own gradient is the rule already.'''
        # a subclass with a forward of its own (same-padding, standardized weights) may compute anything from its
        # weights. The canonizer looks inside and finds the functional convolution.
        handles = RemovableHandleList([RemovableHandle(self)])
        if not is_plain(module):
            return handles
        if not isinstance(module, MaxPool) or (self.maxpool, self.dead_units) != ('winner', 'spread'):
            return super().register(module)
        if self.coverage == 'even':
            handles.append(module.register_forward_pre_hook(self._smooth, with_kwargs=True))
        return handles

    def _smooth(self, module, args, kwargs):
        '''Smooth the relevance of the input.'''
        input = args[0] if args else kwargs['input']
        windows.check_batch(self, module, input)
        stride = windows.overlapping_stride(module, input.ndim - 2)
        if stride is None or not (self.active and input.requires_grad and torch.is_grad_enabled()):
            return None
        input = input.view_as(input)
        input.register_hook(lambda relevance: windows.smooth(relevance, stride))
        return ((input, *args[1:]), kwargs) if args else (args, {**kwargs, 'input': input})

    def store(self, module, *inputs):
        '''Keep the input, whether this is a first layer, and whether the input is known to be non-negative.'''
        input, = inputs
        if isinstance(module, (Convolution, MaxPool)):
            windows.check_batch(self, module, input)
        first = is_first(input)
        if first and self.first_layer == 'zbox':
            bounds = [self._bound(name, module, input) for name in ('low', 'high')]
            check_inside(input, *bounds, (self._low.dtype, self._high.dtype))
        source = getattr(input.grad_fn, 'module', None)
        is_relu = type(source) in (torch.nn.ReLU, torch.nn.ReLU6) or getattr(source, 'name', '') in RELU
        return input, torch.tensor([first, is_relu])

    def propagate(self, module, stored, relevance):
        '''Compute Eq. (2).'''
        input, (first, is_relu) = stored[0], stored[1].tolist()
        if isinstance(module, MaxPool) and self.maxpool == 'winner':
            return (self._winner(module, input, relevance),)
        variant = self.first_layer if first else 'zplus'
        # also if an example has NaN, which is none of the others' business
        is_negative = variant == 'zplus' and not is_relu and not bool(input.amin() >= 0)

        pairs = self._contributions(module, input, variant, is_negative)
        outputs, transposes = zip(*(self._map(module, *pair, relevance.shape[2:]) for pair in pairs))
        denominator = outputs[0]
        for elem in outputs[1:]:
            denominator = denominator + elem
        share, dead = self._share(relevance, denominator, variant == 'literal')
        lower = None
        for (elem, weight), transpose in zip(pairs, transposes):
            grad = transpose(share)
            if lower is None:
                lower = elem * grad if weight is None or callable(weight) else grad.mul_(elem)
            else:
                lower.addcmul_(elem, grad)
        if lower.shape != input.shape:
            lower = lower.unflatten(1, (-1, input.shape[1])).sum(1)
        if dead is not None:
            lower += self._spread(module, input, relevance * dead)
        if first and _is_plain_convolution(module):
            # filters of few taps may have no weight of a sign at some positions, which can not be levelled
            lower = self._smooth_lower(module, lower)
        return (lower,)

    def _share(self, relevance, denominator, is_signed):
        '''Compute R / z in the place of z, and which units are dead, None if nothing is to be spread of them.'''
        dims = tuple(range(1, denominator.ndim))
        magnitude = denominator.abs() if is_signed else denominator
        # without dimensions, these would be the mean and minimum of all examples
        resolution = (magnitude.mean(dims, keepdim=True) if dims else magnitude) * torch.finfo(denominator.dtype).eps
        dead = None
        if bool(((magnitude.amin(dims, keepdim=True) if dims else magnitude) <= resolution).any()):
            dead = magnitude <= resolution
        if self.stabilizer is not None:
            denominator = self.stabilizer(denominator)
        share = torch.div(relevance, denominator, out=denominator)
        if dead is None:
            return share, None
        if self.dead_units == 'drop':
            # with a stabilizer, 0/0 does not occur, and dead units have no contributions that would receive relevance
            return share if self.stabilizer is not None else share.masked_fill_(dead, 0.), None
        return share.masked_fill_(dead, 0.), dead if bool((relevance * dead).any()) else None

    def _contributions(self, module, input, variant, is_negative):
        '''Pairs of inputs and weights (None for poolings) of which the products are the contributions.'''
        pairs = self._pairs(module, input, variant, is_negative)
        if isinstance(module, Signed) or not isinstance(module, (Convolution, torch.nn.Linear)):
            return pairs
        weight = module.weight.detach().to(input.dtype)
        if isinstance(module, torch.nn.Linear):
            return [(elem, _Rows(weight, part)) for elem, part in pairs]
        pairs = [(elem, part(weight)) for elem, part in pairs]
        if self.coverage == 'even':
            # each pair by itself, so that a sample does not depend on whether others in its batch have negative values
            pairs = [(elem, windows.even_weight(module, weight)) for elem, weight in pairs]
        if len(pairs) > 1 and _is_plain_convolution(module) and module.groups == 1:
            # a single convolution of more channels is faster than one after the other
            inputs, weights = zip(*pairs)
            pairs = [(torch.cat(inputs, 1), torch.cat(weights, 1))]
        return pairs

    def _pairs(self, module, input, variant, is_negative):
        '''Pairs of inputs and the parts of the weight, as functions of it, that they are multiplied with.'''
        if not isinstance(module, (Convolution, torch.nn.Linear, Signed)):
            if variant == 'zplus':
                return [(input.clamp(min=0) if is_negative else input, None)]
            if variant == 'literal':
                return [(input, None)]
            return [(input - self._bound('low', module, input) if variant == 'zbox' else torch.ones_like(input), None)]

        positive, negative = functools.partial(torch.clamp, min=0), functools.partial(torch.clamp, max=0)
        if variant == 'zplus' and is_negative:
            return [(input.clamp(min=0), positive), (input.clamp(max=0), negative)]
        if variant in ('zplus', 'literal'):
            return [(input, positive)]
        if variant == 'zbox':
            low, high = (self._bound(name, module, input) for name in ('low', 'high'))
            return [(input - low, positive), (input - high, negative)]
        part = {'ones': positive, 'wsquare': torch.square, 'flat': torch.ones_like}[variant]
        return [(torch.ones_like(input), part)]

    def _bound(self, name, module, input):
        '''A bound which can be broadcast to the input.'''
        dim = 1
        if isinstance(module, torch.nn.Linear):
            dim = -1
        elif isinstance(module, Convolution):
            dim = 1 - module.weight.ndim
        return spread_bound(name, {'low': self._low, 'high': self._high}[name], input, dim)

    def _map(self, module, input, weight, shape):
        '''The output of :py:meth:`_linear`, and the transposed linear map as a function.'''
        if isinstance(module, torch.nn.Linear) and not isinstance(module, Signed):
            return weight.map(input), weight.transpose
        if isinstance(module, Convolution):
            if self.projection == 'literal' or not windows.is_sparse(module):
                output = windows.convolve(module, input, weight, shape)
                return output, functools.partial(windows.convolve_transposed, module, input, weight)
            cells = windows.whole_cells(module, input)
            if cells is not None:
                return windows.convolve_cells(module, input, weight, cells)
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            result = self._linear(module, leaf, weight, shape)
        # the gradient may need the result, in place of which relevance is divided
        output = result.detach().clone() if isinstance(module, (NonNegativeMap, Signed)) else result.detach()
        return output, lambda output: torch.autograd.grad(result, leaf, output)[0]

    def _linear(self, module, input, weight, shape):
        '''A convolution or pooling as a linear map of an input to an output of a spatial shape, with another weight.'''
        if isinstance(module, Convolution):
            return windows.convolve(module, input, weight, shape, self.projection == 'spread')
        if isinstance(module, MaxPool):
            if self.maxpool == 'average':
                output = windows.average(module, input, self.coverage == 'even')
            else:
                output = windows.AVG_POOL[input.ndim - 2](input, 2, 2)
            if output.shape[2:] != shape:
                raise ValueError(
                    f'maxpool={self.maxpool!r} makes an output of size {tuple(output.shape[2:])} of a max pooling with '
                    f'one of {tuple(shape)} ({module}): use \'winner\'.'
                )
            return output
        if isinstance(module, Subsampling):
            return windows.pool_cells(input, module.steps)
        if isinstance(module, Signed):
            return module.linear(input, torch.ones_like if weight is None else weight)
        return module.forward(input)

    def _spread(self, module, input, relevance):
        '''Share the relevance of dead units evenly over their inputs.'''
        if isinstance(module, torch.nn.Linear) and not isinstance(module, Signed):
            return (relevance.sum(-1, keepdim=True) / input.shape[-1]).expand_as(input)
        ones, weight, shape = torch.ones_like(input), None, relevance.shape[2:]
        if isinstance(module, Convolution):
            # all channels of a group are treated alike, so one of each is enough
            kernel = module.weight.shape[2:]
            out_channels = relevance.shape[1] // module.groups
            relevance = relevance.unflatten(1, (module.groups, out_channels)).sum(2)
            ones = ones[:, :module.groups]
            weight = torch.ones(module.groups, 1, *kernel).to(relevance)
        with torch.enable_grad():
            ones.requires_grad_()
            output = self._linear(module, ones, weight, shape)
        lower, = torch.autograd.grad(output, ones, torch.nan_to_num(relevance / output.detach(), 0., 0., 0.))
        if isinstance(module, Convolution):
            in_channels = input.shape[1] // module.groups
            lower = (lower / in_channels).unsqueeze(2).expand(-1, -1, in_channels, *lower.shape[2:])
        elif isinstance(module, (NonNegativeMap, Signed)):
            # places outside of the image read nothing
            lost = relevance.where(output == 0, 0.)
            if bool(lost.any()):
                lower = lower + _share_evenly(lost, torch.ones_like(input), getattr(module, 'examples', None))
        return lower.reshape(input.shape)

    def _winner(self, module, input, relevance):
        '''Eq. (2) with weights that are one for the first maximum of each window, and zero for all others.'''
        with torch.enable_grad():
            input = input.detach().requires_grad_()
            output = module.forward(input)
        share, _ = self._share(relevance, output.detach().clone(), True)
        return self._smooth_lower(module, torch.autograd.grad(output, input, share)[0] * input.detach())

    def _smooth_lower(self, module, relevance):
        '''Smooth the relevance of the input of overlapping windows with a stride.'''
        stride = windows.overlapping_stride(module, relevance.ndim - 2) if self.coverage == 'even' else None
        return relevance if stride is None else windows.smooth(relevance, stride)


class _Rows:
    '''Part of the weight of a fully connected layer, computed for some outputs at a time: it may take most memory.'''
    def __init__(self, weight, part):
        self.weights = weight.split(max(LARGE // max(weight.shape[1], 1), 1))
        self.part = part

    def map(self, input):
        '''The linear map.'''
        outputs = [F.linear(input, self.part(elem)) for elem in self.weights]
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]

    def transpose(self, output):
        '''The transposed linear map.'''
        parts = output.split([len(elem) for elem in self.weights], -1)
        lower = parts[0] @ self.part(self.weights[0])
        for part, weight in zip(parts[1:], self.weights[1:]):
            lower += part @ self.part(weight)
        return lower


def _is_plain_convolution(module):
    return isinstance(module, Convolution) and not isinstance(module, ConvolutionTranspose)
