'''Canonizers which make the operations of residual networks visible to rules.'''
from .blocks import BlockCanonizer
from .refusals import UnsupportedOperation
from .residual import ResidualCanonizer

__all__ = ['BlockCanonizer', 'ResidualCanonizer', 'UnsupportedOperation']
