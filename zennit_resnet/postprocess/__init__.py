'''Post-processing, which turns relevance into heatmaps, and the steps of the choice of contour and component.'''
from .heatmaps import (
    Choice,
    EmptyMaskWarning,
    ablation,
    attention_errors,
    c1c,
    c3,
    heat_quantization,
    mask_cases,
    sum_channels,
)
from .regions import (
    binarize,
    component_of_maximum,
    expand_heatmap,
    largest_component,
    largest_contour,
    reduce_heatmap,
)

__all__ = [
    'Choice', 'EmptyMaskWarning', 'ablation', 'attention_errors', 'binarize', 'c1c', 'c3', 'component_of_maximum',
    'expand_heatmap', 'heat_quantization', 'largest_component', 'largest_contour', 'mask_cases', 'reduce_heatmap',
    'sum_channels',
]
