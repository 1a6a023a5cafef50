"""Attribution classes for Captum.

LRP of residual networks by the composites of :mod:`zennit_resnet.composites` and any
composite of Zennit, for inputs and for layers; RISE and Score-CAM. The class for
attention branch networks is in :mod:`captum_adapters.attr.abn`.
"""

from captum_adapters.attr.composite import CompositeAttribution
from captum_adapters.attr.layer import LayerRelevance
from captum_adapters.attr.lrp import C3LRP, RelativeLRP, ResNetLRP
from captum_adapters.attr.rise import RISE
from captum_adapters.attr.score_cam import ScoreCAM

__all__ = [
    "C3LRP", "CompositeAttribution", "LayerRelevance", "RISE", "RelativeLRP",
    "ResNetLRP", "ScoreCAM",
]
