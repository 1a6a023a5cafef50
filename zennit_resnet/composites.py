'''Composites for residual networks, registered by name in Zennit's ``COMPOSITES``.'''
import weakref
from operator import attrgetter

import torch
from torch.nn.utils.parametrize import type_before_parametrizations
from zennit.composites import LayerMapComposite, register_composite
from zennit.core import Composite
from zennit.rules import Pass
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, AvgPool, BatchNorm, Convolution, MaxPool

from . import arguments
from ._nested import active_tensors
from ._weights import is_plain
from .arguments import Described, check_choice, check_flag, check_module, check_rule
from .canonizers import BlockCanonizer, ResidualCanonizer
from .canonizers.eager import is_active
from .canonizers.refusals import in_use
from .canonizers.residual import registering
from .layer import Addition, Filling, Gate, Padding, Subsampling
from .rules.block import BlockEpsilon, GradientTimesInput
from .rules.branch_scaling import Contributions
from .rules.passing import NoRule, PassThrough, SignalTakesAll, Uncrop
from .rules.relative import Relative, RelativeMaxPool
from .rules.splitting import RatioSplit, ResidualOnly, SymmetricSplit
from .rules.zplus import ZPlus

SPLITTING = {'ratio': RatioSplit, 'symmetric': SymmetricSplit}

# Normalizations which Zennit's type does not include.
NORMALIZATION_LAYERS = (
    BatchNorm, torch.nn.SyncBatchNorm, torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm,
    torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d, torch.nn.LocalResponseNorm,
    torch.nn.CrossMapLRN2d,
)

# What layers that are not linear have in all composites with a rule for each of them.
PASSING = [
    (Gate, SignalTakesAll()),
    (Padding, Uncrop()),
    (torch.nn.MultiheadAttention, None),
    (Activation, PassThrough()),
]


def _with_canonizer(canonizers, batch_norm='pass', **options):
    '''Add our own canonizer to a list of canonizers, unless it is there already.'''
    # it would take the additions of torchvision's blocks away from ours, so ours replaces it
    others = [elem for elem in canonizers if not isinstance(elem, ResNetCanonizer)]
    if not any(isinstance(elem, ResidualCanonizer) for elem in others):
        batch_norm = batch_norm if len(others) == len(canonizers) else 'merge'
        others.append(ResidualCanonizer(batch_norm=batch_norm, **options))
    return others


class _Transaction(Described):
    '''Composites which leave nothing behind if they cannot be registered, or are lost.'''
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # without a reference to itself, a composite is collected as soon as it is lost, and undoes what it did
        del self.module_map

    def module_map(self, ctx, name, module):
        return self.mapping(ctx, name, module)

    def register(self, module):
        '''Apply all canonizers and register all hooks, or raise a TypeError (no module) or RuntimeError (in use).'''
        check_module(module)
        if self.handles:
            raise RuntimeError(in_use(self))
        try:
            with registering(self):
                super().register(module)
        except BaseException:
            self.remove()
            raise


class _LayerMap(_Transaction, LayerMapComposite):
    '''Composites with a rule for each type of plain modules. Those that are given are for all of their types.'''
    # adds the composite's own canonizer to those that are given
    complete = staticmethod(_with_canonizer)

    def __init__(self, rules, layer_map, canonizers, **options):
        '''Rules come after those of the user. Options are kept as attributes, some are those of the canonizer.'''
        vars(self).update(options)
        layer_map = arguments.check_layer_map(layer_map)
        canonizers = arguments.check_canonizers(canonizers)
        # the attributes of these names have what the composite adds as well
        self.given = {'layer_map': layer_map or None, 'canonizers': canonizers or None}
        settings = {key: options[key] for key in ('batch_norm', 'attention', 'parameters') if key in options}
        super().__init__(layer_map=layer_map + rules, canonizers=self.complete(canonizers, **settings))

    def __repr__(self):
        return arguments.describe(self, given=self.given)

    def mapping(self, ctx, name, module):
        '''The rule for a module of a name, or None.'''
        layer_map = self.layer_map if is_plain(module) else self.given['layer_map'] or []
        return next((rule for types, rule in layer_map if isinstance(module, types)), None)


class ResNetLRP(_LayerMap):
    '''LRP for ResNet (Otsuki et al. 2024): relevance splitting at skip connections, and the z+ rule everywhere else.

    Relevance is conserved: the input relevance sums to the initial relevance, whatever the network, together with what
    constants keep that are concatenated, which is the attribute ``sinks``, see
    :py:class:`~zennit_resnet.canonizers.ResidualCanonizer`.

    Parameters
    ----------
    splitting: str, optional
        ``'ratio'`` (default) splits relevance in proportion to the magnitudes of skip connection and residual branch,
        ``'symmetric'`` in half.
    identity_skip: bool, optional
        If ``False``, identity skip connections receive no relevance (ablation). Default is ``True``.
    batch_norm: str, optional
        Relevance passes batch normalization unchanged with ``'pass'`` (default). With ``'merge'``, batch normalization
        is folded into the linear layer before it first.
    first_layer, projection, dead_units, maxpool, stabilizer, low, high: optional
        Options of the z+ rule, see :py:class:`~zennit_resnet.rules.ZPlus`, also for what is raised.
    coverage: str, optional
        See :py:class:`~zennit_resnet.rules.ZPlus`. By default, ``'even'`` if ``projection`` is ``'spread'``, and
        ``'literal'`` if it is ``'literal'``.
    classifier: str, optional
        Rule for the last linear layer or convolution, ``'zplus'`` (default) as in the paper, or ``'epsilon'``, with
        which maps of different classes differ much more, see :py:class:`~zennit_resnet.rules.ZPlus`. Start it from
        logits (``initial_relevance(target)``, with or without a ``contrast``). Relevance then sums to these without the
        biases of the last layer.
    attention, parameters: str, optional
        See :py:class:`~zennit_resnet.canonizers.ResidualCanonizer`.
    layer_map, canonizers: list, optional
        Pairs of types of modules and a rule, which come before those of the composite, and canonizers, to which the
        composite adds its own.

    A ValueError is raised if an argument is not one of its choices, and in the forward pass if an input is outside of
    ``low`` and ``high``, and a TypeError if an argument is of another type.
    '''
    def __init__(
        self, splitting='ratio', identity_skip=True, batch_norm='pass', first_layer='zplus', projection='spread',
        dead_units='spread', maxpool='winner', stabilizer=0., layer_map=None, canonizers=None, low=None, high=None,
        coverage=None, classifier='zplus', attention='value', parameters='pass',
    ):
        check_choice('splitting', splitting, tuple(SPLITTING))
        check_flag('identity_skip', identity_skip)
        if coverage is None:
            coverage = 'even' if projection == 'spread' else 'literal'
        options = {
            'first_layer': first_layer, 'low': low, 'high': high, 'projection': projection, 'dead_units': dead_units,
            'maxpool': maxpool, 'stabilizer': stabilizer, 'coverage': coverage, 'classifier': classifier,
        }
        rule, zplus = SPLITTING[splitting](), ZPlus(**options)
        super().__init__(
            [
                (Addition, rule if identity_skip else ResidualOnly(rule)),
                *PASSING,
                (NORMALIZATION_LAYERS, PassThrough()),
                ((Convolution, torch.nn.Linear, AvgPool, MaxPool), zplus),
                *([(Subsampling, zplus)] if projection == 'spread' else []),
            ],
            layer_map, canonizers, splitting=splitting, identity_skip=identity_skip, batch_norm=batch_norm,
            attention=attention, parameters=parameters, **options,
        )


@register_composite('resnet_lrp_ratio')
class ResNetLRPRatio(ResNetLRP):
    ''':py:class:`ResNetLRP` with ratio-based splitting.'''
    def __init__(self, **kwargs):
        super().__init__(**{'splitting': 'ratio', **kwargs})


@register_composite('resnet_lrp_symmetric')
class ResNetLRPSymmetric(ResNetLRP):
    ''':py:class:`ResNetLRP` with symmetric splitting.'''
    def __init__(self, **kwargs):
        super().__init__(**{'splitting': 'symmetric', **kwargs})


class SplittingComposite(_Transaction, Composite):
    '''Another composite, with a rule for the additions that end residual blocks, see :py:func:`with_splitting`.'''
    def __init__(self, composite, rule=None):
        self.composite, self.rule = composite, RatioSplit() if rule is None else rule
        check_rule('composite', composite, Composite)
        check_rule('rule', self.rule)
        super().__init__(module_map=self.mapping, canonizers=_with_canonizer(composite.canonizers))

    def mapping(self, ctx, name, module):
        '''The splitting rule for additions, and the hook of the other composite for anything else.'''
        if isinstance(module, Addition):
            return self.rule
        hook = self.composite.module_map(ctx, name, module)
        # one of Zennit's activations, but its three inputs cannot pass relevance: what it computes has rules
        return None if isinstance(module, torch.nn.MultiheadAttention) and isinstance(hook, Pass) else hook


def with_splitting(composite, rule=None):
    '''Add relevance splitting to any composite, such as Zennit's ``EpsilonPlusFlat``.

    Parameters
    ----------
    composite: :py:obj:`zennit.core.Composite`
        The composite, which is not changed. If Zennit's ``ResNetCanonizer`` is among its canonizers, it is replaced by
        ``ResidualCanonizer(batch_norm='merge')``.
    rule: :py:obj:`zennit_resnet.rules.Split`, optional
        The rule for additions, :py:class:`~zennit_resnet.rules.RatioSplit` by default.

    A TypeError is raised if ``composite`` is not a composite (but for instance the class of one), or ``rule`` is not a
    hook.
    '''
    return SplittingComposite(composite, rule)


@register_composite('relative_lrp')
class RelativeLRP(_LayerMap):
    '''Relative LRP (Nyiri & Gibaru, R-LRP): contributions without any division by activations.

    Every layer multiplies with its input. Contributions are not conserved, and only their ratios within one example
    have a meaning: what is propagated is rescaled for each example, and in addition for each branch of a residual block
    (Proposition 14), see :py:class:`~zennit_resnet.rules.Contributions`. If relevance starts from the logit of
    the target, what is propagated to the input of a network without skip connections times exp(``log_scale``) is what
    the equations say.

    Attributes
    ----------
    log_scale: :py:obj:`torch.Tensor`
        Natural logarithm of the factor by which the input's contributions of the last backward pass have to be
        multiplied, of shape (batch,). In residual networks, blocks are not counted (a factor of two each).
    num_replaced: :py:obj:`torch.Tensor`
        Number of branches, of shape (batch,), whose contributions summed to zero up to rounding in the last backward
        pass, so that their sum of magnitudes was used.

    Parameters
    ----------
    cardinality, normalization: str, optional
        See :py:class:`~zennit_resnet.rules.Relative` and :py:func:`~zennit_resnet.rules.branch_factor`.
    batch_norm: str, optional
        Batch normalization is folded into the linear layer before it with ``'merge'`` (default). With ``'pass'``,
        contributions pass it unchanged.
    layer_map, canonizers:
        See :py:class:`ResNetLRP`.

    A ValueError is raised if an argument is not one of its choices.
    '''
    def __init__(
        self, cardinality='constant', normalization='signed', batch_norm='merge', layer_map=None, canonizers=None
    ):
        self.contributions = Contributions(normalization)
        super().__init__(
            [
                (Addition, SymmetricSplit()),
                # what is added by padding has no contribution, the gradient removes it
                ((Padding, Filling), NoRule()),
                *PASSING,
                (NORMALIZATION_LAYERS, PassThrough()),
                (MaxPool, RelativeMaxPool(cardinality)),
                ((Convolution, torch.nn.Linear, AvgPool), Relative(cardinality)),
            ],
            layer_map, canonizers, cardinality=cardinality, normalization=normalization, batch_norm=batch_norm,
        )

    log_scale = property(attrgetter('contributions.log_scale'))
    num_replaced = property(attrgetter('contributions.num_replaced'))

    def register(self, module):
        '''Apply all canonizers, register all hooks to a module and its children, and follow its forward passes.'''
        super().register(module)
        # does not keep the composite
        follow = weakref.WeakMethod(self._follow)
        self.handles.append(module.register_forward_hook(lambda *args: follow() and follow()(*args), with_kwargs=True))

    def _follow(self, module, args, kwargs, output):
        if torch.is_grad_enabled() and is_active(self):
            contributions = Contributions(self.normalization)
            # of nested contexts, the rules of the innermost are in use
            if contributions.watch(active_tensors(output), active_tensors((args, kwargs)), self.hook_refs):
                self.contributions = contributions


def _names_of_whole(network):
    '''Names of modules that have all layers of a network, as those in a wrapper do.'''
    names, module = [], network
    while not module._parameters:
        children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1:
            break
        (name, module), = children
        names.append(f'{names[-1]}.{name}' if names else name)
    return frozenset(names)


@register_composite('block_lrp')
class BlockLRP(_LayerMap):
    '''Propagation of C3-LRP (Doublet et al.): residual blocks, and layers outside of them, as one layer each, Eq. (1).

    This amounts to Gradient x Input times R_k / (y_k - b_k), with logit y_k of the target, its bias b_k and its initial
    relevance R_k, up to the effect of ``epsilon``. What makes C3-LRP more than that is its post-processing, see
    :py:func:`~zennit_resnet.postprocess.c3`. As ``propagates`` says, it is the gradient that is propagated: relevance
    divided by the activation, until the network's input is reached.

    Parameters
    ----------
    epsilon, mode: optional
        See :py:class:`~zennit_resnet.rules.BlockEpsilon`.
    blocks: type, tuple of types, list of str or callable, optional
        Which modules are blocks, by their type, their name, or a predicate ``(name, module) -> bool``. By default,
        these are all modules which add tensors in their own forward, of nested ones the outermost, but not the whole
        network, whatever it is wrapped in.
    layer_map, canonizers:
        See :py:class:`ResNetLRP`.

    A TypeError is raised if ``blocks`` is none of the above, and a ValueError when it is registered, if the network has
    no module of a name in ``blocks``.
    '''
    propagates = 'gradient'
    complete = staticmethod(lambda canonizers: [*canonizers, BlockCanonizer()])

    def __init__(self, epsilon=1e-6, mode='sign', blocks=None, layer_map=None, canonizers=None):
        self.blocks = self.find_block = blocks
        if all(isinstance(elem, type) for elem in (blocks if isinstance(blocks, tuple) else (blocks,))):
            self.find_block = lambda name, module: isinstance(module, blocks)
        elif isinstance(blocks, (list, set)):
            self.find_block = lambda name, module: name in blocks
        elif blocks is not None and not callable(blocks):
            raise TypeError(f'blocks={blocks!r} is not a type, a tuple of types, a list of names or a predicate!')
        # layers between network and blocks which are functions have no rule, so it is R / z that is propagated
        settings = {'epsilon': epsilon, 'mode': mode, 'form': 'gradient'}
        self.block_rule = BlockEpsilon(**settings)
        self.any_rule = BlockEpsilon(**settings, is_block=None)
        self.whole = ()
        super().__init__(
            [
                (torch.nn.Linear, BlockEpsilon(**settings, with_bias=False)),
                ((Convolution, BatchNorm, AvgPool, MaxPool), self.block_rule),
            ],
            layer_map, canonizers, epsilon=epsilon, mode=mode,
        )

    def register(self, module):
        '''Apply all canonizers and register all hooks to a module and its children, if it has the named blocks.'''
        check_module(module)
        if isinstance(self.blocks, (list, set)):
            names = dict(module.named_modules())
            missing = sorted(name for name in self.blocks if name not in names)
            if missing:
                raise ValueError(
                    f'blocks: there is no module {missing[0]!r} in the {type(module).__name__}, its modules are named '
                    f'as in {", ".join(repr(name) for name in list(names)[1:4])}, ... (model.named_modules())'
                )
        self.whole = _names_of_whole(module)
        super().register(module)

    def mapping(self, ctx, name, module):
        '''The rule of a block or layer, or None.'''
        if not name:
            return GradientTimesInput()
        if self.find_block is not None and self.find_block(name, module):
            return self.block_rule
        is_own = not type_before_parametrizations(module).__module__.startswith('torch.nn.')
        any_rule = self.any_rule if is_own and self.find_block is None and name not in self.whole else None
        return super().mapping(ctx, name, module) or any_rule
