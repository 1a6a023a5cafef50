'''A composite with the gamma rule, for networks whose single units matter less than what adds up to them.'''
import torch
from zennit.composites import register_composite
from zennit.types import AvgPool, Convolution, MaxPool

from .arguments import check_choice, check_number
from .composites import NORMALIZATION_LAYERS, PASSING, SPLITTING, _LayerMap
from .layer import Addition, MatrixProduct, Subsampling
from .rules import EpsilonNormalization, EpsilonSplit, GeneralizedGamma, HalfEach

ADDITION = {'epsilon': EpsilonSplit, **SPLITTING}


@register_composite('gamma_lrp')
class GammaLRP(_LayerMap):
    '''LRP-gamma for residual networks and transformers, with evidence of both signs, which tells classes apart.

    Convolutions and linear layers have the :py:class:`~zennit_resnet.rules.GeneralizedGamma` rule, the last one
    LRP-epsilon (``classifier`` is ``'epsilon'``), normalizations :py:class:`~zennit_resnet.rules.EpsilonNormalization`,
    activations pass relevance on. With ``attention='value'``, that is CP-LRP (Ali et al. 2022), with ``'half'`` AttnLRP
    (Achtibat et al. 2024).

    Relevance starts from logits, and biases keep a part of it, so that the sum of an input's relevance is near the
    initial relevance, but not the same. Constants that a network adds by itself keep nothing.
    :py:func:`~zennit_resnet.conservation.conservation_ledger` tells what is kept.

    Parameters
    ----------
    conv_gamma, linear_gamma: float, optional
        How much convolutions and linear layers enlarge contributions that have the sign of the output. The defaults of
        0.25 and 0.05 are those of LXT for a vision transformer.
    addition: str, optional
        What skip connections and residual branches receive: ``'epsilon'`` (default) in proportion to their values, by
        :py:class:`~zennit_resnet.rules.EpsilonSplit`, ``'ratio'`` or ``'symmetric'`` as in
        :py:class:`~zennit_resnet.composites.ResNetLRP`.
    first_layer, low, high: optional
        Rule for the first layer, see :py:class:`~zennit_resnet.rules.GeneralizedGamma`.
    epsilon: callable or float, optional
        What is added to denominators with their sign. Not zero, as that of zero by zero would be no number.
    batch_norm: str, optional
        With ``'pass'`` (default), relevance passes batch normalization unchanged. ``'merge'`` folds it into the linear
        layer before it, which then divides by what the network goes on with. Its biases keep most of the relevance of
        deep networks, and with it the evidence.
    attention, parameters, layer_map, canonizers: optional
        See :py:class:`~zennit_resnet.composites.ResNetLRP`, also for ``sinks``.

    A ValueError is raised if an argument is not one of its choices, or a number is negative or not finite, and a
    TypeError if an argument is of another type.
    '''
    # by which the evaluator knows what to start from
    classifier = 'epsilon'

    def __init__(
        self, conv_gamma=0.25, linear_gamma=0.05, addition='epsilon', first_layer='gamma', low=None, high=None,
        epsilon=1e-6, batch_norm='pass', attention='value', parameters='pass', layer_map=None, canonizers=None,
    ):
        check_choice('addition', addition, tuple(ADDITION))
        check_number('conv_gamma', conv_gamma, 0)
        check_number('linear_gamma', linear_gamma, 0)
        if not callable(epsilon) and epsilon == 0:
            raise ValueError(f'epsilon={epsilon!r}: relevance of outputs of zero would be NaN, choose a small one!')
        options = {'epsilon': epsilon, 'first_layer': first_layer, 'low': low, 'high': high}
        super().__init__(
            [
                (Addition, EpsilonSplit(epsilon) if addition == 'epsilon' else SPLITTING[addition]()),
                *PASSING,
                (MatrixProduct, HalfEach(epsilon)),
                (NORMALIZATION_LAYERS, EpsilonNormalization(epsilon)),
                ((Convolution, AvgPool, MaxPool, Subsampling), GeneralizedGamma(conv_gamma, **options)),
                (torch.nn.Linear, GeneralizedGamma(linear_gamma, **options)),
            ],
            layer_map, canonizers, conv_gamma=conv_gamma, linear_gamma=linear_gamma, addition=addition,
            batch_norm=batch_norm, attention=attention, parameters=parameters, **options,
        )
