'''Rules for residual networks, one module for each family of equations.'''
from .attention import HalfEach, SoftmaxTaylor
from .base import SinglePass
from .block import BlockEpsilon, GradientTimesInput
from .branch_scaling import Contributions, branch_factor
from .classic import Duplicate, LinearSum, SignedAlphaBeta
from .gamma import GeneralizedGamma
from .normalization import EpsilonNormalization
from .passing import NoRule, PassThrough, Proportional, Refill, SignalTakesAll, Uncrop
from .relative import Relative, RelativeMaxPool
from .splitting import EpsilonSplit, RatioSplit, ResidualOnly, Split, SymmetricSplit
from .zplus import ZPlus

__all__ = [
    'BlockEpsilon', 'Contributions', 'Duplicate', 'EpsilonNormalization', 'EpsilonSplit', 'GeneralizedGamma',
    'GradientTimesInput', 'HalfEach', 'LinearSum', 'NoRule', 'PassThrough', 'Proportional', 'RatioSplit', 'Refill',
    'Relative', 'RelativeMaxPool', 'ResidualOnly', 'SignalTakesAll', 'SignedAlphaBeta', 'SinglePass', 'SoftmaxTaylor',
    'Split', 'SymmetricSplit', 'Uncrop', 'ZPlus', 'branch_factor',
]
