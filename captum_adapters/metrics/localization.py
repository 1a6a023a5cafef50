"""Whether relevance is on the object: pointing, distance, and types of errors."""

import math
from typing import NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from captum_adapters._light import PERCENTS
from captum_adapters._validation import (
    Maps,
    as_batch,
    check_choice,
    double_dtype,
    pixel_maps,
    positive_integer,
    to_tensor,
    warn_negative_maps,
)
from captum_adapters.metrics._ranking import (
    Percents,
    means_of_top,
    percent_tensors,
)
from zennit_resnet.arguments import map_shape


class MaskPointing(NamedTuple):
    """Result of :func:`mask_pointing` on the maps' device, a row for each example.

    Attributes:
        share (Tensor): Share of the top p % that is inside of the mask, from 0 to 1,
            (batch, percents). NaN if the mask is empty, or the percentage selects no
            pixel.
        chance (Tensor): Share of the mask in the image, which is the expected share of
            a random map, (batch,).
        ceiling (Tensor): Largest possible share: 1, or the mask's number of pixels
            divided by that of the top p %, (batch, percents).
        empty (Tensor): Whether the mask is empty, bool (batch,).
        counts (Tensor): Number of pixels in the top p %, (percents,).
        percents (Tensor): Percentages, (percents,).
        tied_share (Tensor): Share of pixels whose attribution is not theirs alone,
            (batch,).
    """

    share: Tensor
    chance: Tensor
    ceiling: Tensor
    empty: Tensor
    counts: Tensor
    percents: Tensor
    tied_share: Tensor


class MaskDistance(NamedTuple):
    """Result of :func:`mask_distance`, with one row for each example.

    Attributes:
        distance (Tensor): Mean distance of the top p % to the mask, (batch, percents).
            Lower is better, and zero if the mask covers the image. NaN as a share.
        chance (Tensor): Mean distance of all pixels, which is the expected distance of
            a random map, (batch,).
        empty, counts, percents, tied_share (Tensor): See :class:`MaskPointing`.
    """

    distance: Tensor
    chance: Tensor
    empty: Tensor
    counts: Tensor
    percents: Tensor
    tied_share: Tensor


def _rank(
    attributions: Maps, masks: Maps, percents: Percents, absolute: bool,
    interpolate: Optional[str], dims: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and masks of shape (batch, height, width), counts and percentages."""
    maps = to_tensor(attributions, "attributions").detach()
    masks = to_tensor(masks, "masks").detach().to(maps.device)
    shape = tuple(masks.shape)
    # of single images, as an array or a picture is read
    batch = 1 if maps.ndim == dims else len(maps) if maps.ndim else 0
    masks = as_batch(masks, batch, dims)
    maps = as_batch(maps, len(masks) if masks.ndim > dims else 0, dims)
    if masks.ndim == dims + 2 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != dims + 1 or masks.numel() == 0:
        raise ValueError(
            f"masks must be of shape {map_shape(dims, 'batch')} or"
            f" {map_shape(dims, 'batch', '1')}, or {map_shape(dims)} for a single image,"
            f" and not empty, but are of shape {shape}, and attributions of shape"
            f" {tuple(maps.shape)}. For signals give dims=1, for volumes or videos dims=3."
        )
    inside = masks.bool()
    if bool((masks != inside).any()):
        raise ValueError(
            f"masks must be 0 or 1, but have values from {float(masks.min()):g} to"
            f" {float(masks.max()):g}: compare them with a threshold first."
        )
    reduce = "abs_sum" if absolute else "sum"
    scores = pixel_maps(maps, inside[:, None], reduce, interpolate, "masks")
    if not absolute:
        # attributed to the caller of the public function
        warn_negative_maps(scores, stacklevel=4)
    return scores, inside, *percent_tensors(percents, inside[0].numel(), maps.device)


def mask_pointing(
    attributions: Maps, masks: Maps, percents: Percents = PERCENTS, *,
    absolute: bool = True, interpolate: Optional[str] = None, dims: int = 2,
) -> MaskPointing:
    r"""Share of the most relevant p % of pixels that is inside of the object's mask.

    .. math::
        \frac{|T_p \cap M|}{|T_p|}

    with the top pixels :math:`T_p` and the mask :math:`M`: the pointing game of R-LRP
    by Nyiri & Gibaru (section 6.1, figures 24 and 25), which leaves out images whose
    mask covers less than 1 % or more than 99 %. The larger the mask, the higher the
    share of any map: compare it with `chance` and `ceiling`. The pointing game in which
    the single highest pixel counts is the percentage `Fraction(100, N)`.

    If the top p % divide pixels with equal attributions, then the share is the expected
    one over all their orders: the pixels above, and of the tied ones the fraction that
    is needed. So a constant map has exactly the level of chance.

    Args:
        attributions (Tensor, numpy.ndarray or tuple[Tensor]): See
            :func:`insertion_deletion`. Channels are summed.
        masks (Tensor or numpy.ndarray): Masks of shape (batch, height, width) or
            (batch, 1, height, width), or (height, width) for a single one, 1 or True
            inside of the object. For boxes, see :func:`boxes_to_masks`.
        percents (int, float or Fraction, or sequence of these, optional): See
            :func:`pixel_accuracy`, and :func:`top_fraction`.
        absolute (bool, optional): Whether to rank by the magnitude of the sum over
            channels, as the paper does. Otherwise negative relevance comes last.
        interpolate (str, optional): See :func:`insertion_deletion`.
        dims (int, optional): 1 for signals, with attributions of shape (batch,
            channels, length) and masks of shape (batch, length), 3 for volumes or
            videos. It has to be told, as three axes may also be those of images.

    Raises:
        ValueError: If a shape does not fit, a mask has other values than 0 and 1, a
            percentage is not from 0 to 100, there is NaN or infinity in the
            attributions, or `dims` is not 1, 2 or 3.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import mask_pointing
        >>> maps = torch.tensor([[[0.9, 0.8], [0.1, 0.0]]])
        >>> masks = torch.tensor([[[True, False], [False, False]]])
        >>> result = mask_pointing(maps, masks, percents=(25, 50))
        >>> [values.tolist() for values in (result.share, result.chance)]
        [[[1.0, 0.5]], [0.25]]
    """
    scores, inside, counts, values = _rank(
        attributions, masks, percents, absolute, interpolate, dims
    )
    area = inside.flatten(1).sum(1)
    pixels = area.to(double_dtype(area.device))
    chance = pixels / inside[0].numel()
    share, tied_share = means_of_top(inside.long(), scores, counts, chance)
    empty = area == 0
    ceiling = (pixels[:, None] / counts).clamp(max=1)
    share = share.masked_fill(empty[:, None], math.nan)
    return MaskPointing(share, chance, ceiling, empty, counts, values, tied_share)


def distance_maps(masks: Tensor) -> Tensor:
    """Distance of each pixel to the nearest one of the mask, NaN if that is empty."""
    from scipy.ndimage import distance_transform_edt  # slow to load

    outside = (~masks).cpu().numpy()
    distances = torch.stack(
        [torch.from_numpy(distance_transform_edt(image)) for image in outside]
    ).to(masks.device, double_dtype(masks.device))
    # without any pixel inside, the transform is not defined
    empty = ~masks.flatten(1).any(1)
    return distances.masked_fill(empty.view(-1, *[1] * (masks.ndim - 1)), math.nan)


def mask_distance(
    attributions: Maps, masks: Maps, percents: Percents = PERCENTS, *,
    normalization: Optional[str] = "diagonal", absolute: bool = True,
    interpolate: Optional[str] = None, dims: int = 2,
) -> MaskDistance:
    """Mean distance of the most relevant p % of pixels to the object's mask.

    The distance of a pixel is the Euclidean distance, between centers of pixels, to the
    nearest pixel of the mask, and zero inside of it. Unlike the share of pixels inside,
    it tells a near miss from pixels scattered all over the image: the second measure of
    R-LRP by Nyiri & Gibaru (section 6.2, figures 27 and 28), which normalizes it, but
    does not say how.

    Args:
        normalization (str, optional): What distances are divided by: `"diagonal"` for
            the distance between opposite corners' pixels of the image, `"max"` for the
            largest distance of a pixel of this image, `"mean"` for the mean distance of
            all its pixels, with which a random map has an expected distance of 1,
            `None` for nothing, so that the unit is a pixel.
        attributions, masks, percents, ...: See :func:`mask_pointing`, as for ties and
            errors.
    """
    check_choice("normalization", normalization, ("diagonal", "max", "mean", None))
    scores, inside, counts, values = _rank(
        attributions, masks, percents, absolute, interpolate, dims
    )
    distances = distance_maps(inside)
    flat = distances.flatten(1)
    chance = flat.mean(1)
    if normalization == "diagonal":
        sides = (length - 1 for length in inside.shape[1:])
        scale = torch.full_like(chance, math.hypot(*sides))
    elif normalization == "max":
        scale = flat.amax(1)
    else:
        scale = chance if normalization == "mean" else torch.ones_like(chance)
    # where the mask covers the image, all distances are zero
    scale = scale.masked_fill(scale == 0, 1)
    means, tied_share = means_of_top(distances, scores, counts, chance)
    distance, empty = means / scale[:, None], ~inside.flatten(1).any(1)
    return MaskDistance(distance, chance / scale, empty, counts, values, tied_share)


def boxes_to_masks(
    boxes: Sequence[Union[Tensor, Sequence[Sequence[float]]]], size: tuple[int, int],
    device: Union[None, str, torch.device] = None,
) -> Tensor:
    """Masks of the pixels inside of bounding boxes.

    Coordinates are those of an image from (0, 0), upper left, to (width, height). A
    pixel is inside of a box if its center is: with integers, the columns x0 to x1 - 1
    and the rows y0 to y1 - 1 are. Pascal VOC and ImageNet count pixels from 1 and
    include the last (subtract 1 from x0 and y0), and COCO gives (x0, y0, width,
    height). If the image was resized or cropped, so must be its boxes.

    Args:
        boxes (sequence of Tensor or sequence): For each image, its boxes (x0, y0, x1,
            y1) in pixels, of shape (boxes, 4), or none. The mask is that of all of
            them.
        size (tuple[int, int]): Height and width of the masks, in pixels.
        device (str or torch.device, optional): Device of the masks.

    Returns:
        Tensor: Masks, bool of shape (batch, height, width).

    Raises:
        ValueError: If there is no image, a size is not positive, or boxes are not of
            shape (boxes, 4), x0 < x1 and y0 < y1.

    Examples:
        >>> from captum_adapters.metrics import boxes_to_masks
        >>> boxes_to_masks([[(1, 0, 3, 1)]], (2, 3)).int()
        tensor([[[0, 1, 1],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    if len(boxes) == 0:
        raise ValueError("There are boxes of 0 images: give a list for each image.")
    height, width = map(positive_integer, ("height", "width"), size)
    rows = torch.arange(height, device=device)[:, None] + 0.5
    columns = torch.arange(width, device=device) + 0.5
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=device)
    for number, (mask, image_boxes) in enumerate(zip(masks, boxes)):
        corners = torch.as_tensor(image_boxes, dtype=torch.float32, device=device)
        if corners.numel() == 0:
            continue
        if corners.ndim != 2 or corners.shape[1] != 4:
            raise ValueError(
                f"boxes of image {number} must be of shape (boxes, 4), but are of shape"
                f" {tuple(corners.shape)}."
            )
        # also false for NaN
        valid = (corners[:, :2] < corners[:, 2:]).all(1)
        if not bool(valid.all()):
            raise ValueError(
                f"The box {corners[~valid][0].tolist()} of image {number} is not"
                " (x0, y0, x1, y1) with x0 < x1 and y0 < y1."
            )
        x0, y0, x1, y1 = corners.t()[..., None, None]
        covered = (x0 <= columns) & (columns < x1) & (y0 <= rows) & (rows < y1)
        mask |= covered.any(0)
    return masks
