'''Canonizer which finds residual blocks.'''
from .._nested import active_tensors
from ..rules.block import note_addition
from . import layers
from .operations import OPERATIONS
from .residual import ResidualCanonizer


class BlockCanonizer(ResidualCanonizer):
    '''Canonizer which finds residual blocks: modules whose forward adds two tensors that depend on the input.

    Nothing is replaced: :py:class:`~zennit_resnet.rules.BlockEpsilon` takes the gradient of whatever a block computes.
    '''
    is_gradient = True

    def look(self, func, name, args, kwargs):
        super().look(func, name, args, kwargs)
        stack, entry = self._stack(), OPERATIONS.get(name)
        if stack and entry is not None and entry.run is layers.add and len(active_tensors((args, kwargs))) == 2:
            note_addition(stack[-1].module)

    def intercept(self, func, name, args, kwargs):
        return func(*args, **kwargs)
