'''Command line, to explain what a network sees in photographs.'''
from .commands import main

__all__ = ['main']
