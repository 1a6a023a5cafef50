'''Layer-wise Relevance Propagation for residual networks, for Zennit.'''
import sys as _sys
from pathlib import Path as _Path

__version__ = '0.2.0'

__all__ = [
    'BlockEpsilon', 'BlockLRP', 'Explanation', 'GammaLRP', 'ManyTargets', 'RatioSplit', 'Relative', 'RelativeLRP',
    'RelativeMaxPool', 'ResNetLRP', 'ResidualCanonizer', 'ResidualOnly', 'SelectOutput', 'SymmetricSplit',
    'UnsupportedOperation', 'ZPlus', 'explain', 'initial_relevance', 'with_splitting',
]


def _is_command_line():
    '''Whether this process is a command line, which loads PyTorch only once a command needs it.'''
    # while Python looks for the module of -m, its packages are imported with this as the name
    program = _Path(_sys.argv[0] if _sys.argv else '')
    return program.name == '-m' or program.stem in ('zennit-resnet', 'captum-adapters') or (
        program.name == '__main__.py' and program.parent.name in (__name__, 'captum_adapters')
    )


def __getattr__(name):
    '''Load what takes longest only when it is used, and in a command line everything.'''
    from importlib import import_module
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module('.explanation' if name in ('Explanation', 'explain') else '._public', __name__), name)


if not _is_command_line():
    from ._public import *
