"""Attribution classes and metrics in Captum's manner, for networks with skip connections.

- :mod:`captum_adapters.attr`: attribution classes over composites of Zennit.
- :mod:`captum_adapters.metrics`: metrics of attributions, statistics and plots.
- :mod:`captum_adapters.quantus`: explanation functions for Quantus.
"""
