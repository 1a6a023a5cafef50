'''Command line, to explain what a network sees in photographs.'''
from . import export
from .commands import main

__all__ = ['export', 'main']
