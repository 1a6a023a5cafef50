'''Conservation of relevance: how much of it arrives at each layer, how much leaves it, and where the rest went.'''
from .ledger import Ledger, assert_conserved, conservation_ledger
from .recorder import Row

__all__ = ['Ledger', 'Row', 'assert_conserved', 'conservation_ledger']
