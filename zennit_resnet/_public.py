'''What `zennit_resnet` exports: importing it registers the composites in Zennit.'''
from .attribution import SelectOutput, initial_relevance
from .attributors import ManyTargets
from .canonizers import ResidualCanonizer, UnsupportedOperation
from .composites import BlockLRP, RelativeLRP, ResNetLRP, with_splitting
from .gamma import GammaLRP
from .rules import BlockEpsilon, RatioSplit, Relative, RelativeMaxPool, ResidualOnly, SymmetricSplit, ZPlus

__all__ = [
    'BlockEpsilon', 'BlockLRP', 'GammaLRP', 'ManyTargets', 'RatioSplit', 'Relative', 'RelativeLRP', 'RelativeMaxPool',
    'ResNetLRP', 'ResidualCanonizer', 'ResidualOnly', 'SelectOutput', 'SymmetricSplit', 'UnsupportedOperation', 'ZPlus',
    'initial_relevance', 'with_splitting',
]
