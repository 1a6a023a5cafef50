'''The classic rules of LRP, one for a whole network, as Nyiri and Gibaru compare them with R-LRP.

Numbers of equations are those of Nyiri and Gibaru, Relative Layer-Wise Relevance Propagation. The rules are Zennit's,
except for the alpha-beta rule of any sign. Where Zennit's rules differ from the printed equations:

- Eqs. (1) and (3) to (5) have no bias in the denominator, Zennit's rules do. :py:class:`ClassicLRP` follows the
  equations (by ``zero_params='bias'``), and has it with ``with_bias=True``.
- Eq. (4) adds epsilon to the denominator, Zennit adds it with the denominator's sign.
- Eq. (3) enlarges the weights that are positive, for inputs which are not negative. Zennit's ``Gamma`` enlarges the
  contributions that have the sign of the unit's output. Both are the same for inputs which are not negative and an
  output (with its bias) which is positive, as in all layers followed by a ReLU, but for the first.
- Eq. (5) has a negative beta where that of Zennit's ``AlphaBeta`` is positive.
- Rules other than ``Epsilon`` stabilize denominators with 1e-6 in Zennit, the equations do not. By default,
  :py:class:`ClassicLRP` adds nothing, and contributions to a denominator of zero are zero.
'''
import torch
from zennit.rules import AlphaBeta, Epsilon, Gamma, Norm, WSquare, ZPlus
from zennit.types import AvgPool, Convolution

from .arguments import check_choice, check_flag, check_number, check_stabilizer
from .composites import NORMALIZATION_LAYERS, PASSING, SPLITTING, _LayerMap
from .layer import Addition
from .rules import Duplicate, LinearSum, PassThrough, SignedAlphaBeta

ADDITION = ('rule', *SPLITTING, 'duplicate')

# What the paper compares with, as arguments of ClassicLRP. In its figures, these are lrp0, lrp_eps01, lrp_eps001,
# (in the text only), lrp_gamma25, lrp_ab21, lrp_ab0505 and (named, but without results) z+ and w^2.
SETTINGS = {
    'lrp_0': {'rule': 'lrp0'},
    'lrp_epsilon_0.01': {'rule': 'epsilon', 'epsilon': 0.01},
    'lrp_epsilon_0.001': {'rule': 'epsilon', 'epsilon': 0.001},
    'lrp_epsilon_1': {'rule': 'epsilon', 'epsilon': 1.},
    'lrp_gamma_0.25': {'rule': 'gamma', 'gamma': 0.25},
    'lrp_alpha_beta_2_-1': {'rule': 'alpha_beta', 'alpha': 2., 'beta': -1.},
    'lrp_alpha_beta_0.5_0.5': {'rule': 'alpha_beta', 'alpha': 0.5, 'beta': 0.5},
    'lrp_zplus': {'rule': 'zplus'},
    'lrp_wsquare': {'rule': 'wsquare'},
}


def drop_zero(denominator):
    '''Stabilizer that puts infinity in place of zero (or numbers too small to be inverted), and else adds nothing.'''
    return denominator.masked_fill(denominator.abs() < torch.finfo(denominator.dtype).tiny, torch.inf)


class ClassicLRP(_LayerMap):
    '''One of the classic rules of LRP for all linear layers and convolutions of a network.

    Relevance passes activations and normalizations. Average poolings share it in proportion to their inputs (Zennit's
    ``Norm``), max poolings give it to the maximum. Zennit's rules keep the input of a layer's last call only, so no
    layer may be used more than once.

    Parameters
    ----------
    rule: str, optional
        ``'lrp0'`` LRP-0, Eq. (1); ``'epsilon'`` (default) LRP-epsilon, Eq. (4); ``'gamma'`` LRP-gamma, Eq. (3);
        ``'alpha_beta'`` LRP-alpha-beta, Eq. (5); ``'zplus'`` LRP-z+; ``'wsquare'`` LRP-w^2.
    epsilon, stabilizer: callable or float, optional
        Stabilization parameter of ``'epsilon'``, with Zennit's convention of signs, and of all other rules. Callables
        ``(denominator) -> stabilized denominator`` may have another. By default, contributions to denominators of zero
        are zero for these, and nothing is added to others.
    gamma, alpha, beta: float, optional
        How much ``'gamma'`` enlarges contributions, and multipliers of positive and negative contributions of
        ``'alpha_beta'``, which sum to one. Zennit's beta has the opposite sign.
    with_bias: bool, optional
        Whether biases are part of the denominators, as in Zennit. Default is ``False``, as in the equations.
    addition: str, optional
        What skip connections and residual branches receive, on which the paper is silent: ``'rule'`` (default) what the
        rule for linear layers gives to inputs with weights of one, as in Definition 1; ``'ratio'`` or ``'symmetric'``
        what relevance splitting gives to them, see :py:class:`~zennit_resnet.composites.ResNetLRP`; ``'duplicate'`` all
        relevance each, without splitting.
    batch_norm: str, optional
        Whether batch normalization is folded into the linear layer before it (``'merge'``, default), or passed
        (``'pass'``).
    layer_map, canonizers:
        See :py:class:`~zennit_resnet.composites.ResNetLRP`.

    A ValueError is raised if an argument is not one of its choices, if a number is out of range or not finite, or if
    alpha and beta do not sum to one, and a TypeError if an argument is of another type.
    '''
    def __init__(
        self, rule='epsilon', epsilon=0.01, gamma=0.25, alpha=2., beta=-1., with_bias=False, addition='rule',
        batch_norm='merge', stabilizer=drop_zero, layer_map=None, canonizers=None,
    ):
        check_choice('addition', addition, ADDITION)
        epsilon, stabilizer = check_stabilizer('epsilon', epsilon), check_stabilizer('stabilizer', stabilizer)
        check_number('gamma', gamma, 0)
        check_number('alpha', alpha)
        check_number('beta', beta)
        check_flag('with_bias', with_bias)
        settings = {'zero_params': None if with_bias else 'bias'}
        stabilized = {'stabilizer': stabilizer, **settings}
        rules = {
            'lrp0': lambda: Epsilon(stabilizer, **settings),
            'epsilon': lambda: Epsilon(epsilon, **settings),
            'gamma': lambda: Gamma(gamma, **stabilized),
            'alpha_beta': lambda: (
                AlphaBeta(alpha, -beta, **stabilized) if alpha - (-beta) == 1. and alpha >= 0. >= beta
                else SignedAlphaBeta(alpha, beta, **stabilized)
            ),
            'zplus': lambda: ZPlus(**stabilized),
            'wsquare': lambda: WSquare(**stabilized),
        }
        check_choice('rule', rule, tuple(rules))
        linear = rules[rule]()
        split = {'rule': lambda: LinearSum(linear), 'duplicate': Duplicate, **SPLITTING}[addition]()
        super().__init__(
            [
                (Addition, split),
                *PASSING,
                (NORMALIZATION_LAYERS, PassThrough()),
                (AvgPool, Norm(stabilizer)),
                ((Convolution, torch.nn.Linear), linear),
            ],
            layer_map, canonizers, rule=rule, epsilon=epsilon, gamma=gamma, alpha=alpha, beta=beta, with_bias=with_bias,
            addition=addition, batch_norm=batch_norm, stabilizer=stabilizer,
        )
