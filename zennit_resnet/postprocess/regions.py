'''Regions of heatmaps: the steps of the choice of contour and component, Doublet et al. 2024, Section 3.2.'''
import math
from operator import index

import cv2
import numpy as np
import torch
from torch.nn import functional

from ..arguments import check_choice, map_shape, takes_maps


def check_heatmap(heatmap, dims=2):
    '''Get heatmaps of a floating point type, or raise a ValueError if they are not finite (batch, height, width).'''
    expected = map_shape(dims, 'batch')
    if heatmap.ndim != dims + 1:
        raise ValueError(
            f'Heatmaps must be of shape {expected}, but the shape is {tuple(heatmap.shape)}!'
            + (' Use sum_channels first.' if heatmap.ndim == dims + 2 else '')
            + (' Slices of volumes are images of their own in heatmap.flatten(0, 1).' if heatmap.ndim == 4 else '')
        )
    if heatmap.is_complex():
        raise ValueError(f'Heatmaps must be real, but their type is {heatmap.dtype}!')
    if not heatmap.is_floating_point():
        heatmap = heatmap.to(torch.get_default_dtype())
    finite = heatmap.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f'Heatmap {int(finite.int().argmin())} of {len(heatmap)} contains NaN or infinite values!')
    return heatmap


def to_double(heatmap, dims=2):
    '''Check heatmaps, and convert them to double precision on the CPU.'''
    heatmap = check_heatmap(heatmap, dims)
    if 0 in heatmap.shape[1:]:
        raise ValueError(f'Heatmaps of shape {tuple(heatmap.shape)} have no pixels!')
    # not every device has double precision
    return heatmap.detach().cpu().double()


def to_type_of(result, heatmap):
    '''Convert a result to the device and type of the heatmaps it belongs to.'''
    dtype = heatmap.dtype if heatmap.is_floating_point() else torch.get_default_dtype()
    # the type first, since not every device has double precision
    return result.to(dtype).to(heatmap.device)


@takes_maps('heatmap')
def reduce_heatmap(heatmap, size=28):
    '''Reduce heatmaps by area averaging to shape ``(batch, *size)``.

    Each cell becomes the mean of the area that it covers, with pixels on its border counted in part. So the map's mean
    stays what it was, also of a map that is smaller and is enlarged. The size is height and width, or one integer for
    both. Default is 28 as in the paper.
    '''
    height, width = (index(side) for side in (size if isinstance(size, (tuple, list)) else (size, size)))
    if min(height, width) < 1:
        raise ValueError(f'Heatmaps cannot be reduced to size={size}: it must be positive!')
    values = to_double(heatmap)
    rows, columns = _area_weights(values.shape[1], height), _area_weights(values.shape[2], width)
    return to_type_of(rows @ values @ columns.T, heatmap)


def _area_weights(length, size):
    '''Share of each of ``length`` pixels in each of ``size`` cells of the same total length, (size, length).'''
    # a pixel is ``size`` units long and a cell ``length`` units, so the overlaps are exact
    cells, pixels = torch.arange(size)[:, None] * length, torch.arange(length) * size
    overlap = torch.minimum(cells + length, pixels + size) - torch.maximum(cells, pixels)
    return overlap.clamp(min=0).double() / length


@takes_maps('heatmap')
def expand_heatmap(heatmap, size, expand='bilinear'):
    '''Expand reduced heatmaps to the size of the image, to shape ``(batch, *size)``.

    By default, ``'bilinear'``, with pixels at the centers of their area and without extrapolation at the border, or by
    ``'nearest'``, which rounds positions down, as OpenCV does.
    '''
    check_choice('expand', expand, ('bilinear', 'nearest'))
    corners = False if expand == 'bilinear' else None
    result = functional.interpolate(to_double(heatmap)[:, None], tuple(size), mode=expand, align_corners=corners)
    return to_type_of(result[:, 0], heatmap)


@takes_maps('heatmap')
def binarize(heatmap, threshold='mean', dims=2):
    '''Find the pixels whose value is strictly above a threshold, as masks of the shape of the heatmaps.

    The threshold is ``'mean'`` (default, as code of the same group does it) for the mean of each map, a number, or a
    function from heatmaps of shape (batch, height, width) and type float64 to the threshold of each, of shape (batch,).
    A constant map has nothing above its mean.
    '''
    values = to_double(heatmap, dims)
    flat = values.flatten(1)
    if isinstance(threshold, str):
        check_choice('threshold', threshold, ('mean',))
        # rounding must neither put the mean of a constant map below its values, nor tear equal values apart
        constant = flat.amax(1) - flat.amin(1) <= 1e-12 * flat.abs().amax(1)
        limit = torch.where(constant, math.inf, flat.mean(1))
    else:
        limit = torch.as_tensor(threshold(values) if callable(threshold) else threshold, dtype=torch.float64).cpu()
        if not limit.isfinite().all():
            raise ValueError(f'threshold={threshold} is not finite: choose a number or \'mean\'!')
        if limit.shape != () and limit.shape != values.shape[:1]:
            raise ValueError(f'The threshold must be of shape {tuple(values.shape[:1])}, but is {tuple(limit.shape)}!')
    return (flat > limit.expand(len(flat))[:, None]).view(values.shape).to(heatmap.device)


def _map_masks(function, mask):
    '''Apply a function from uint8 to uint8 or bool arrays of shape (height, width) to each mask of a batch.'''
    if mask.ndim != 3:
        raise ValueError(f'Masks must be of shape (batch, height, width), but the shape is {tuple(mask.shape)}!')
    if 0 in mask.shape:
        return mask.bool()
    masks = (mask != 0).to('cpu', torch.uint8).contiguous().numpy()
    return torch.from_numpy(np.stack([function(array) for array in masks])).bool().to(mask.device)


@takes_maps('mask')
def largest_component(mask, connectivity=8):
    '''Find the connected component with the most pixels.

    Of several of the same size, it is the one that comes first in row-major order. Without any, all is false. With
    a connectivity of 8 (default), pixels that touch at a corner are connected, with 4 they are not.
    '''
    check_choice('connectivity', connectivity, (4, 8))

    def choose(array):
        count, labels = cv2.connectedComponents(array, connectivity=connectivity)
        if count == 1:
            return array
        sizes = np.bincount(labels.ravel())[1:]
        largest = 1 + np.flatnonzero(sizes == sizes.max())
        # labels are not in the order of pixels
        first = np.isin(labels, largest).argmax()
        return labels == labels.flat[first]

    return _map_masks(choose, mask)


@takes_maps('heatmap', 'mask')
def component_of_maximum(heatmap, mask, connectivity=8):
    '''Find the connected component that holds the largest value of a heatmap, as code by authors of the paper does.

    Of several largest values, the first in row-major order counts. Where it is outside the mask, the result is all that
    is outside, as in that code. For mask and connectivity, see :py:func:`largest_component`.
    '''
    check_choice('connectivity', connectivity, (4, 8))
    values = to_double(heatmap)
    if mask.shape != values.shape:
        raise ValueError(f'Heatmaps are of shape {tuple(values.shape)}, but masks of shape {tuple(mask.shape)}!')
    maxima = iter(values.flatten(1).argmax(1).tolist())

    def choose(array):
        _, labels = cv2.connectedComponents(array, connectivity=connectivity)
        return labels == labels.flat[next(maxima)]

    return _map_masks(choose, mask)


@takes_maps('mask')
def largest_contour(mask, choice='largest_area'):
    '''Find the interior of the largest external contour.

    The paper neither says what makes a contour the largest, nor whether it is filled. Only a filled contour makes sense
    to keep relevance in, so that holes of the region belong to it. Contours connect pixels that touch at a corner, and
    those inside of holes are not external. Of several largest, the first in row-major order
    counts. Without any, all is false.

    With ``'largest_area'`` (default), it is the polygon through the centers of the border's pixels that has the largest
    area (OpenCV's ``contourArea``). Lines have an area of zero, however long they are. With ``'largest_filled'``,
    it is the contour that has the most pixels when it is filled. With ``'first'``, it is the one that OpenCV's
    ``findContours`` returns first, as the authors' slides can be read. Its position is arbitrary, and OpenCV does not
    document it.
    '''
    check_choice('contour', choice, ('largest_area', 'largest_filled', 'first'))

    def fill(array, contour):
        return cv2.drawContours(np.zeros_like(array), [contour], -1, 1, cv2.FILLED)

    def choose(array):
        contours, _ = cv2.findContours(array, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if not contours:
            return array
        if choice == 'first':
            return fill(array, contours[0])
        # by (row, column) of the first pixel
        contours = sorted(contours, key=lambda contour: min((row, col) for col, row in contour[:, 0].tolist()))
        size = cv2.contourArea if choice == 'largest_area' else lambda contour: fill(array, contour).sum()
        # the first of those which are equally large
        return fill(array, max(contours, key=size))

    return _map_masks(choose, mask)
