"""What is in :mod:`captum_adapters.statistics`, which needs no PyTorch."""

from captum_adapters.statistics import *  # noqa: F403
