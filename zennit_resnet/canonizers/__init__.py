'''Canonizers which make the operations of residual networks visible to rules.'''
from .refusals import UnsupportedOperation
from .residual import BlockCanonizer, ResidualCanonizer

__all__ = ['BlockCanonizer', 'ResidualCanonizer', 'UnsupportedOperation']
