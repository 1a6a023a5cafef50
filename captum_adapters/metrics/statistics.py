"""Statistics for comparisons of methods on the same examples.

They are in :mod:`captum_adapters.statistics`, which needs no PyTorch.
"""

from captum_adapters.statistics import (
    Comparison,
    Interval,
    bootstrap_interval,
    compare,
    holm,
)

__all__ = ["Comparison", "Interval", "bootstrap_interval", "compare", "holm"]
