"""Metrics of attributions, in Captum's manner.

Functions on tensors, with one value for each example.
"""

from captum_adapters._light import PERCENTS
from captum_adapters._validation import NegativeMapWarning, ProbabilityWarning
from captum_adapters.metrics._ranking import top_fraction
from captum_adapters.metrics.conservation import conservation_gap
from captum_adapters.metrics.insertion_deletion import (
    Areas,
    InsertionDeletion,
    contrastive_insertion_deletion,
    insertion_deletion,
    keio_areas,
)
from captum_adapters.metrics.localization import (
    MaskDistance,
    MaskPointing,
    boxes_to_masks,
    mask_distance,
    mask_pointing,
)
from captum_adapters.metrics.mosaics import (
    GridPointing,
    Mosaics,
    grid_pointing,
    mosaics,
)
from captum_adapters.metrics.pixel_accuracy import (
    PixelAccuracy,
    cross_model_accuracy,
    keep_top,
    pixel_accuracy,
)
from captum_adapters.metrics.sensitivity import (
    Randomization,
    Similarity,
    class_sensitivity,
    randomization,
)
from captum_adapters.statistics import (
    Comparison,
    Interval,
    bootstrap_interval,
    compare,
    holm,
)

__all__ = [
    "Areas", "Comparison", "GridPointing", "InsertionDeletion", "Interval",
    "MaskDistance", "MaskPointing", "Mosaics", "NegativeMapWarning", "PERCENTS",
    "PixelAccuracy", "ProbabilityWarning", "Randomization", "Similarity",
    "bootstrap_interval", "boxes_to_masks", "class_sensitivity", "compare",
    "conservation_gap", "contrastive_insertion_deletion", "cross_model_accuracy",
    "grid_pointing", "holm", "insertion_deletion", "keep_top", "keio_areas",
    "mask_distance", "mask_pointing", "mosaics", "pixel_accuracy", "randomization",
    "top_fraction",
]
