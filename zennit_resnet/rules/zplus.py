'''The z+ rule for linear layers, convolutions and poolings, Eq. (2) of Otsuki et al. 2024, in a single pass.'''
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from zennit.core import RemovableHandle, RemovableHandleList, Stabilizer
from zennit.types import Convolution, ConvolutionTranspose, MaxPool

from .._autograd import is_first, is_non_negative
from .._compat import has_values, version_of
from .._weights import is_plain
from ..arguments import as_bound, check_bounds, check_choice, check_inside, check_stabilizer, spread_bound
from ..layer import FullyConnected, NonNegativeMap, NonNegativeProduct, Signed, Subsampling, WeightedMap, linear
from . import _linear_maps as maps
from ._linear_maps import LARGE
from .base import SinglePass
from .passing import share_among_images

# Sums of positive contributions that are a smaller part of all are computed by themselves, as differences would round.
SMALL = 2 ** -6


class Divisor(NamedTuple):
    '''Sums of contributions, the same with a stabilizer, and which of them are zero (None if none is).'''
    denominator: torch.Tensor
    stabilized: torch.Tensor
    dead: torch.Tensor


class _Prepared(NamedTuple):
    '''What is the same for any relevance: the terms are inputs, weights and transposed linear maps.'''
    input: torch.Tensor
    terms: list
    constants: torch.Tensor
    divisor: Divisor
    is_smooth: bool


class ZPlus(SinglePass):
    '''Single-pass z+ rule, Eq. (2): R'_i = h_i sum_j w+_ji R_j / sum_k w+_jk h_k, for linear layers, convolutions and
    poolings. Biases have no part in it, so relevance is conserved.

    For layers whose input h has negative values, the contributions are (w h)+, which is the same where h >= 0.

    Parameters
    ----------
    stabilizer: callable or float, optional
        What is added to each denominator with its sign, or a function ``(denominator) -> stabilized denominator``.
        Relevance is lost by it. The default 0 loses none: ``dead_units`` covers denominators that are zero up to
        rounding (less than the machine precision times the mean of the layer and sample).
    first_layer: str, optional
        Contributions to the first layer, i.e. to layers that no convolution or linear layer with a rule of this package
        precedes. With weights w, and w+ and w- their positive and negative parts: ``'zplus'`` (default) (w h)+;
        ``'literal'`` w+ h as printed, even where h < 0 (denominators may vanish); ``'ones'`` w+ (the published code:
        the input is replaced by ones); ``'zbox'`` w h - w+ low - w- high = w+ (h - low) + w- (h - high); ``'wsquare'``
        w^2; ``'flat'`` 1.
    low, high: :py:obj:`torch.Tensor`, sequence of float or float, optional
        Lowest and highest possible input values for ``'zbox'``: one for all, one for each channel (of linear layers the
        last dimension), or a tensor that can be broadcast to the input. It is an error if an input of the first layer
        is outside of them by more than rounding (a thousandth of the range between them).
    projection: str, optional
        Convolutions whose stride exceeds their kernel, such as the 1 x 1 projections of stride 2 in skip connections,
        read only some of the positions. ``'literal'`` propagates to these only, which leaves a lattice of dots.
        ``'spread'`` (default) shares relevance over the whole stride cell in proportion to the activations:
        z = w+ * avgpool_s(h), R' = h avgpool_s^T(w+^T (R / z)), which conserves it as well.
    dead_units: str, optional
        What becomes of the relevance of units with no positive contribution, 0/0 in Eq. (2). ``'spread'`` (default)
        shares it evenly over the unit's inputs (those inside the image), ``'drop'`` loses it.
    maxpool: str, optional
        ``'winner'`` (default) lets the first maximum take all, ``'average'`` uses an average pooling with the kernel,
        stride and padding of the max pooling, ``'avg2x2'`` one over 2 x 2 with stride 2 (the published code).
    coverage: str, optional
        Windows with a stride read some positions more often than others, which leaves a fine lattice. ``'literal'``
        (default) keeps it. ``'even'`` scales the weights of each filter so that they sum to the same for all positions
        modulo the stride, and smoothes relevance below a max pooling and the first convolution with a binomial filter.
        Both conserve relevance.
    classifier: str, optional
        Rule for the last linear layer or convolution before the output, which a
        :py:class:`~zennit_resnet.canonizers.ResidualCanonizer` finds: ``'zplus'`` (default), or ``'epsilon'`` for
        LRP-epsilon with epsilon = ``stabilizer``, R'_i = h_i sum_j w_ji R_j / y_j with the output y. Started from
        c_j y_j, features receive h_i sum_j w_ji c_j: evidence of both signs, the bias keeps its part.

    A ValueError is raised if an argument is not one of its choices, ``stabilizer`` is negative or not finite, ``low``
    and ``high`` are missing for ``'zbox'`` or given without it, or ``low`` is above ``high``, and a TypeError if one of
    these is not of numbers.
    '''
    for_plain = True
    first_layers = 'zplus', 'literal', 'ones', 'zbox', 'wsquare', 'flat'

    def __init__(
        self, stabilizer=0., first_layer='zplus', low=None, high=None, projection='spread', dead_units='spread',
        maxpool='winner', coverage='literal', classifier='zplus',
    ):
        super().__init__()
        check_choice('first_layer', first_layer, self.first_layers)
        check_choice('projection', projection, ('spread', 'literal'))
        check_choice('dead_units', dead_units, ('spread', 'drop'))
        check_choice('maxpool', maxpool, ('winner', 'average', 'avg2x2'))
        check_choice('coverage', coverage, ('literal', 'even'))
        check_choice('classifier', classifier, ('zplus', 'epsilon'))
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
        self.first_layer, self.low, self.high = first_layer, low, high
        if first_layer == 'zbox':
            self._low, self._high = as_bound('low', low), as_bound('high', high)
            check_bounds(self._low, self._high)
        self.projection, self.dead_units, self.maxpool, self.coverage = projection, dead_units, maxpool, coverage
        self.classifier = classifier

    def register(self, module):
        '''Register this instance to the supplied module, unless its own gradient is the rule already.'''
        if not isinstance(module, MaxPool) or (self.maxpool, self.dead_units) != ('winner', 'spread'):
            return super().register(module)
        handles = RemovableHandleList([RemovableHandle(self)])
        if self.coverage == 'even' and is_plain(module):
            handles.append(module.register_forward_pre_hook(self._smooth, with_kwargs=True))
        return handles

    def _smooth(self, module, args, kwargs):
        input = args[0] if args else kwargs['input']
        maps.check_batch(self, module, input)
        stride = maps.overlapping_stride(module, input.ndim - 2)
        if stride is None or not (self.active and input.requires_grad and torch.is_grad_enabled()):
            return None
        input = input.view_as(input)
        input.register_hook(lambda relevance: maps.smooth(relevance, stride))
        return ((input, *args[1:]), kwargs) if args else (args, {**kwargs, 'input': input})

    def store(self, module, *inputs):
        '''Keep the input, whether this is a first layer, and whether the input is known to be non-negative.'''
        input, = inputs
        if isinstance(module, (Convolution, MaxPool)):
            maps.check_batch(self, module, input)
        first = is_first(input)
        if first and self.first_layer == 'zbox':
            bounds = [self._bound(name, module, input) for name in ('low', 'high')]
            check_inside(input, *bounds, (self._low.dtype, self._high.dtype))
        return input, first, is_non_negative(input), None

    def complete(self, module, stored, output):
        '''Keep the output of a layer without windows, which spares a product of an input of both signs.'''
        input, first, is_positive, _ = stored
        is_dense = is_fully_connected(module) and has_values(output) or is_plain_convolution(module) and (
            maps.is_pointwise(module, module.weight, output)
        )
        # differences of rounded products would be wrong
        is_exact = output.dtype == input.dtype and output.dtype in (torch.float32, torch.float64) and (
            torch.get_float32_matmul_precision() == 'highest'
        )
        if is_positive or not (is_dense and is_exact) or first and self.first_layer != 'zplus':
            return stored
        return input, first, is_positive, Output.of(module, output)

    def distribute(self, module, stored, relevance):
        '''Leave out units and tokens that receive nothing: queries and keys of attention, all but a class token.'''
        is_dense = relevance.ndim > 2 and is_fully_connected(module) and 'is_last' not in vars(module)
        if is_dense and has_values(relevance) and relevance.numel():
            input, first, is_positive, output = stored
            if not bool(relevance[..., 0].any()):
                used = relevance.flatten(0, -2).any(0)
                units, whole, module = slice(int(used.byte().argmax()), None), module, FullyConnected()
                module.set_call(F.linear, whole.weight[units], None if whole.bias is None else whole.bias[units])
                if output is not None and output.weight is whole.weight:
                    output = output._replace(values=output.values[..., units], weight=module.weight)
                relevance = relevance[..., units]
            tokens = relevance.flatten(1, -2)
            # bounds of the first layer may have the shape of its input
            if not first and not bool(tokens[:, -1].any()):
                used = tokens.any(2).any(0)
                if 0 < 2 * int(used.sum()) < len(used):
                    kept = input.flatten(1, -2)[:, used], first, is_positive, output and output.of_tokens(used)
                    lower = tokens.new_zeros(*tokens.shape[:2], input.shape[-1])
                    lower[:, used], = super().distribute(module, kept, tokens[:, used])
                    return (lower.view(input.shape),)
            stored = input, first, is_positive, output
        return super().distribute(module, stored, relevance)

    def prepare(self, module, stored, shape):
        input, first, is_positive, output = stored
        is_winner = isinstance(module, MaxPool) and self.maxpool == 'winner'
        is_epsilon = self.classifier == 'epsilon' and 'is_last' in vars(module)
        variant = self.first_layer if first else 'zplus'
        denominator = constants = None
        if is_winner:
            pairs = [(input, None)]
        elif is_epsilon:
            pairs = [(input, self._part(module, input))]
        else:
            # also if an example has NaN, which is none of the others' business
            is_negative = variant == 'zplus' and not is_positive and not (has_values(input) and bool(input.amin() >= 0))
            pairs = self._contributions(module, input, variant, is_negative)
            if is_negative and output is not None:
                denominator = self._positive(module, input, output)
        if denominator is None:
            outputs, transposes = zip(*(self._map(module, *pair, shape[2:]) for pair in pairs))
            denominator = sum(outputs[1:], outputs[0])
        else:
            transposes = [self._transposed(module, *pair) for pair in pairs]
        if is_epsilon:
            constants = self._constants(module, denominator)
            denominator = denominator + constants
        return _Prepared(
            input, [(*pair, transpose) for pair, transpose in zip(pairs, transposes)], constants,
            self._divisor(denominator, is_winner or is_epsilon or variant == 'literal'),
            # filters of few taps may have no weight of a sign at some positions, which cannot be levelled
            is_winner or not is_epsilon and first and is_plain_convolution(module),
        )

    def propagate(self, module, stored, relevance):
        input, lower = stored.input, None
        share, dead = self._share(relevance, stored.divisor)
        if stored.constants is not None:
            self._keep(lambda: share * stored.constants)
        for elem, weight, transpose in stored.terms:
            grad = transpose(share)
            if lower is None:
                lower = elem * grad if weight is None or callable(weight) else grad.mul_(elem)
            else:
                lower.addcmul_(elem, grad)
        if lower.shape != input.shape:
            lower = lower.unflatten(1, (-1, input.shape[1])).sum(1)
        if dead is not None:
            lower += self._spread(module, input, relevance * dead)
        # below overlapping windows with a stride
        is_smooth = stored.is_smooth and self.coverage == 'even'
        stride = maps.overlapping_stride(module, lower.ndim - 2) if is_smooth else None
        return (lower if stride is None else maps.smooth(lower, stride),)

    def _positive(self, module, input, output):
        '''Sums of the positive contributions (w h)+ = (|w h| + w h) / 2, None if these would not be exact.'''
        if not output.is_of(module, input):
            return None
        weight, bias = self._part(module, input, torch.abs), self._bias(module, output.values)
        limit, _ = self._map(module, input.abs(), weight, output.values.shape[2:])
        positive = limit + output.values
        if bias is not None:
            positive -= bias
            limit += bias.abs()
        is_exact = torch.sub(positive, limit, alpha=SMALL, out=limit).amin() > 0
        return positive.div_(2) if is_exact else None

    @staticmethod
    def _part(module, input, part=None):
        '''The weight, or a function of it, as linear maps take it. None for poolings.'''
        if isinstance(module, Signed):
            return part or torch.Tensor.clone
        if not isinstance(module, (Convolution, torch.nn.Linear)):
            return None
        weight = module.weight.detach().to(input.dtype)
        if isinstance(module, torch.nn.Linear):
            return Rows(weight, part or torch.Tensor.contiguous)
        return part(weight) if part else weight

    @staticmethod
    def _bias(module, linear):
        '''The bias, which can be broadcast to the linear map. None without a bias, as for poolings.'''
        bias = getattr(module, 'bias', None)
        if bias is None:
            return None
        dims = 0 if isinstance(module, torch.nn.Linear) else linear.ndim - 2
        return bias.detach().to(linear).view(-1, *(1,) * dims)

    def _constants(self, module, linear):
        if module.is_last is not None:
            return module.is_last.to(linear) - linear
        bias = self._bias(module, linear)
        return torch.zeros_like(linear) if bias is None else bias.expand_as(linear)

    def _keep(self, relevance):
        '''Relevance that biases keep, which is lost, as a function without arguments.'''

    def _divisor(self, denominator, is_signed):
        dims = tuple(range(1, denominator.ndim))
        magnitude = denominator.abs() if is_signed else denominator
        # without dimensions, these would be the mean and minimum of all examples
        resolution = (magnitude.mean(dims, keepdim=True) if dims else magnitude) * torch.finfo(denominator.dtype).eps
        dead = None
        # the minimum takes a tenth of the time of a mask, and most layers have no dead unit
        lowest = magnitude.amin(dims, keepdim=True) if dims else magnitude
        if not has_values(denominator) or bool((lowest <= resolution).any()):
            dead = magnitude <= resolution
        stabilized = denominator if self.stabilizer is None else self.stabilizer(denominator)
        return Divisor(denominator, stabilized, dead)

    def _share(self, relevance, divisor):
        '''Compute R / z, and which units are dead, None if nothing is to be spread of them.'''
        share, dead = relevance / divisor.stabilized, divisor.dead
        if dead is None:
            return share, None
        if self.dead_units == 'drop':
            # with a stabilizer, 0/0 does not occur, and dead units have no contributions that would receive relevance
            return share if self.stabilizer is not None else share.masked_fill_(dead, 0.), None
        is_spread = not has_values(relevance) or bool((relevance * dead).any())
        return share.masked_fill_(dead, 0.), dead if is_spread else None

    def _contributions(self, module, input, variant, is_negative):
        '''Pairs of inputs and weights (None for poolings) whose products are the contributions.'''
        positive, negative = functools.partial(torch.clamp, min=0), functools.partial(torch.clamp, max=0)
        if variant == 'zplus' and is_negative:
            pairs = [(input.clamp(min=0), positive), (input.clamp(max=0), negative)]
        elif variant == 'zbox':
            low, high = (self._bound(name, module, input) for name in ('low', 'high'))
            pairs = [(input - low, positive), (input - high, negative)]
        elif variant in ('zplus', 'literal'):
            pairs = [(input, positive)]
        else:
            part = {'ones': positive, 'wsquare': torch.square, 'flat': torch.ones_like}[variant]
            pairs = [(torch.ones_like(input), part)]
        # poolings have no negative weights
        pairs = pairs if isinstance(module, (Convolution, torch.nn.Linear, Signed)) else pairs[:1]
        pairs = [(elem, self._part(module, input, part)) for elem, part in pairs]
        if not isinstance(module, Convolution):
            return pairs
        if self.coverage == 'even':
            # each pair by itself, so that a sample does not depend on whether others in its batch have negative values
            pairs = [(elem, maps.even_weight(module, weight)) for elem, weight in pairs]
        if len(pairs) > 1 and is_plain_convolution(module) and module.groups == 1:
            # a single convolution of more channels is faster than one after the other
            inputs, weights = zip(*pairs)
            pairs = [(torch.cat(inputs, 1), torch.cat(weights, 1))]
        return pairs

    def _bound(self, name, module, input):
        dim = 1
        if isinstance(module, torch.nn.Linear):
            dim = -1
        elif isinstance(module, Convolution):
            dim = 1 - module.weight.ndim
        return spread_bound(name, {'low': self._low, 'high': self._high}[name], input, dim)

    def _map(self, module, input, weight, shape):
        '''The output of :py:meth:`_linear`, and the transposed linear map as a function.'''
        if is_fully_connected(module):
            return weight.map(input), self._transposed(module, input, weight)
        if isinstance(module, Convolution):
            if self.projection == 'literal' or not maps.is_sparse(module):
                return maps.convolve(module, input, weight, shape), self._transposed(module, input, weight)
            cells = maps.whole_cells(module, input)
            if cells is not None:
                return maps.convolve_cells(module, input, weight, cells)
        return maps.with_adjoint(lambda leaf: self._linear(module, leaf, weight, shape), input)

    @staticmethod
    def _transposed(module, input, weight):
        '''The transposed linear map of a fully connected layer or a convolution, with a part of its weight.'''
        if isinstance(weight, Rows):
            return weight.transpose
        return functools.partial(maps.convolve_transposed, module, input, weight)

    def _linear(self, module, input, weight, shape):
        '''A convolution or pooling as a linear map of an input to an output of a spatial shape, with another weight.'''
        if isinstance(module, Convolution):
            return maps.convolve(module, input, weight, shape, self.projection == 'spread')
        if isinstance(module, MaxPool) and self.maxpool != 'winner':
            if self.maxpool == 'average':
                output = maps.average(module, input, self.coverage == 'even')
            else:
                output = maps.AVG_POOL[input.ndim - 2](input, 2, 2)
            if output.shape[2:] != shape:
                raise ValueError(
                    f'maxpool={self.maxpool!r} makes an output of size {tuple(output.shape[2:])} of a max pooling with '
                    f'one of {tuple(shape)} ({module}): use \'winner\'.'
                )
            return output
        if isinstance(module, Subsampling):
            return maps.pool_cells(input, module.steps)
        if isinstance(module, Signed):
            return module.linear(input, torch.ones_like if weight is None else weight)
        output = module.forward(input)
        # of poolings that return indices as well
        return output[0] if isinstance(output, tuple) else output

    def _spread(self, module, input, relevance):
        if is_fully_connected(module):
            return relevance.sum(-1, keepdim=True) / input.shape[-1]
        ones, weight, shape, in_channels = torch.ones_like(input), None, relevance.shape[2:], 1
        if isinstance(module, Convolution):
            # all channels of a group are treated alike, so one of each is enough
            in_channels = input.shape[1] // module.groups
            relevance = relevance.unflatten(1, (module.groups, -1)).sum(2)
            ones = ones[:, :module.groups]
            weight = relevance.new_ones(module.groups, 1, *module.weight.shape[2:])
        output, transpose = maps.with_adjoint(lambda leaf: self._linear(module, leaf, weight, shape), ones)
        # places outside of the image read nothing
        is_empty = output == 0
        lower = transpose(relevance * torch.where(is_empty, 0., 1 / (output * in_channels)))
        if isinstance(module, Convolution):
            return lower if module.groups == 1 else lower.repeat_interleave(in_channels, 1)
        if isinstance(module, (NonNegativeMap, Signed)):
            lost = relevance.where(is_empty, 0.)
            if has_values(lost) and not bool(lost.any()):
                return lower
            if isinstance(module, (NonNegativeProduct, WeightedMap)):
                # no weight is left of what it sums up
                count, back = maps.with_adjoint(module.add_up, torch.ones_like(input))
                return lower + back(lost / count)
            lower = lower + share_among_images(module, lost, torch.ones_like(input), transpose)
        return lower


class Output(NamedTuple):
    '''Output of a fully connected layer or convolution, with its version and the weight that the layer had.'''
    values: torch.Tensor
    version: int
    weight: torch.Tensor

    @classmethod
    def of(cls, module, output):
        '''What is to be kept of a layer that has just run.'''
        return cls(output.detach(), version_of(output), module.weight)

    def of_tokens(self, used):
        '''That of some tokens, None if it has changed since.'''
        if version_of(self.values) != self.version:
            return None
        values = self.values.flatten(1, -2)[:, used]
        return self._replace(values=values, version=version_of(values))

    def is_of(self, module, input):
        '''Whether it is what the weight makes of the input, and neither folded, of another type, nor changed since.'''
        is_current = module.weight is self.weight and version_of(self.values) == self.version
        return is_current and module.weight.dtype == self.values.dtype == input.dtype


class Rows:
    '''Part of the weight of a fully connected layer, computed for some outputs at a time: it may take most memory.'''
    def __init__(self, weight, part):
        self.weights = weight.split(max(LARGE // max(weight.shape[1], 1), 1))
        self.part = part
        if len(self.weights) == 1:
            self.weights, self.part = (part(weight),), torch.Tensor.contiguous

    def map(self, input):
        outputs = [linear(input, self.part(elem)) for elem in self.weights]
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]

    def transpose(self, output):
        parts = output.split([len(elem) for elem in self.weights], -1)
        lower = linear(parts[0], self.part(self.weights[0]).T)
        for part, weight in zip(parts[1:], self.weights[1:]):
            lower += linear(part, self.part(weight).T)
        return lower


def is_fully_connected(module):
    return isinstance(module, torch.nn.Linear) and not isinstance(module, Signed)


def is_plain_convolution(module):
    '''Whether a module is a convolution that is not transposed.'''
    return isinstance(module, Convolution) and not isinstance(module, ConvolutionTranspose)
