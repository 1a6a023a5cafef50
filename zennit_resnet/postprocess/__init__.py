'''Post-processing, which turns relevance into heatmaps, and the steps of the choice of contour and component.

Functions take batches of tensors of shape (batch, height, width), but also NumPy arrays and single maps of shape
(height, width): what they return then are arrays, and has no first axis. Results are on the same device, and of the
same type (integers become the default floating point type), masks are boolean. All but zero of a given mask belongs to
it. A ValueError is raised for heatmaps of another shape, or which are complex, not finite, or have no pixels, and for
an argument that is unknown or out of range, a TypeError if one is of another type.

Functions with an argument ``dims`` (2 by default) are also for signals (``dims=1``, heatmaps of shape (batch, length))
and for volumes or videos (``dims=3``, of shape (batch, depth, height, width)). It has to be told, as three axes may as
well be those of an image. The choice of contour and component is for images.

The choice of contour and component computes in double precision on the CPU, and does not propagate gradients.
'''
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
from .regions import binarize, component_of_maximum, expand_heatmap, largest_component, largest_contour, reduce_heatmap

__all__ = [
    'Choice', 'EmptyMaskWarning', 'ablation', 'attention_errors', 'binarize', 'c1c', 'c3', 'component_of_maximum',
    'expand_heatmap', 'heat_quantization', 'largest_component', 'largest_contour', 'mask_cases', 'reduce_heatmap',
    'sum_channels',
]
