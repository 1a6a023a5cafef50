"""Whether relevance is on the image of the asked class: mosaics of several images."""

from random import Random
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._validation import (
    Inputs,
    Maps,
    TargetType,
    as_batch,
    check_images,
    check_target,
    double_dtype,
    positive_integer,
    to_tensor,
    warn_negative_maps,
)
from captum_adapters.metrics.sensitivity import summed_maps


class Mosaics(NamedTuple):
    """Result of :func:`mosaics` on the inputs' device, with one row for each mosaic.

    Attributes:
        images (Tensor): Mosaics, of shape (mosaics, channels, n * height, n * width),
            or (mosaics, channels, height, width) if they are rescaled.
        cells (Tensor): Class of each cell, (mosaics, n, n).
        targets (Tensor): Classes to ask for, one after the other, of shape (mosaics,
            questions): that of each cell, row by row, or for Focus mosaics the single
            class which has half of the cells.
        indices (Tensor): Which of the inputs is in each cell, (mosaics, n, n).
    """

    images: Tensor
    cells: Tensor
    targets: Tensor
    indices: Tensor


class GridPointing(NamedTuple):
    """Result of :func:`grid_pointing`, each of shape (batch,) on the maps' device.

    Attributes:
        share (Tensor): Share of positive relevance that is in cells of the target, from
            0 to 1. Where there is no positive relevance, it is the level of chance.
        chance (Tensor): Share of these cells in the mosaic, which is the share of a
            constant map, and the expected one of a random map.
        ceiling (Tensor): Largest possible share, which is 1.
        empty (Tensor): Whether there is no positive relevance, bool.
    """

    share: Tensor
    chance: Tensor
    ceiling: Tensor
    empty: Tensor


def _queues(
    labels: Tensor, scores: Optional[Tensor], threshold: float, random: Random
) -> dict[int, list[int]]:
    """Images of each class in the order of their use, without those that are unfit."""
    order = list(range(len(labels)))
    random.shuffle(order)
    if scores is not None:
        scores = to_tensor(scores, "scores").detach().to(labels.device)
        if scores.ndim != 2 or len(scores) != len(labels):
            raise ValueError(
                f"scores must be of shape ({len(labels)}, classes), but are of shape"
                f" {tuple(scores.shape)}."
            )
        if int(labels.max()) >= scores.shape[1]:
            raise ValueError(
                f"target {int(labels.max())} is out of range for scores of"
                f" {scores.shape[1]} classes."
            )
        highest, predicted = scores.max(1)
        # also false for NaN
        fit = ((predicted == labels) & (highest >= threshold)).tolist()
        confidence = highest.tolist()
        # the order of equal ones stays random
        order = [index for index in order if fit[index]]
        order.sort(key=lambda index: -confidence[index])
    queues: dict[int, list[int]] = {}
    for index in order:
        queues.setdefault(int(labels[index]), []).append(index)
    return queues


def arrange(
    labels: Tensor, n: int = 2, *, focus: bool = False, count: Optional[int] = None,
    scores: Optional[Tensor] = None, threshold: float = 0.5, seed: int = 0,
) -> Tensor:
    """Which image is in which cell, (mosaics, n, n). See :func:`mosaics`."""
    n = positive_integer("n", n)
    if n < 2:
        raise ValueError(f"n={n} is not a mosaic: give at least 2.")
    if count is not None:
        count = positive_integer("count", count)
    random = Random(str(seed))
    queues = _queues(labels, scores, threshold, random)
    own = n * n // 2 if focus else 1
    numbers = [own] + [1] * (n * n - own)
    asked = [label for label in sorted(queues) if len(queues[label]) >= own]
    if len(queues) < len(numbers) or not asked:
        found = ", ".join(f"{label}: {len(queues[label])}" for label in sorted(queues))
        raise ValueError(
            f"Mosaics of {n} x {n} need images of {len(numbers)} classes"
            f"{f', and {own} of one of them' if focus else ''}, but there are"
            f" {len(queues)} ({found})"
            f"{'' if scores is None else f', correct with a score of at least {threshold}'}."
        )
    used = dict.fromkeys(sorted(queues), 0)
    others = list(used)

    def turn(label: int, number: int = 1) -> tuple[int, int]:
        # first whose images are not used up, then those that were used least
        return (used[label] + number - 1) // len(queues[label]), used[label]

    arranged: list[list[int]] = []
    while count is None or len(arranged) < count:
        # what is equal stays in random order
        random.shuffle(asked)
        random.shuffle(others)
        first = min(asked, key=lambda label: turn(label, own))
        rest = sorted((label for label in others if label != first), key=turn)
        classes = [first, *rest][: len(numbers)]
        if count is None and any(
            turn(label, number)[0] for label, number in zip(classes, numbers)
        ):
            break
        indices = []
        for label, number in zip(classes, numbers):
            for _ in range(number):
                indices.append(queues[label][used[label] % len(queues[label])])
                used[label] += 1
        random.shuffle(indices)
        arranged.append(indices)
    return torch.tensor(arranged, device=labels.device).view(-1, n, n)


def assemble(images: Tensor, indices: Tensor, rescale: bool = False) -> Tensor:
    """Put images into the cells of mosaics. See :func:`mosaics`."""
    count, rows, columns = indices.shape
    _, channels, height, width = images.shape
    mosaics = images[indices].permute(0, 3, 1, 4, 2, 5)
    mosaics = mosaics.reshape(count, channels, rows * height, columns * width)
    if not rescale:
        return mosaics
    return F.interpolate(mosaics, (height, width), mode="bilinear", antialias=True)


def mosaics(
    inputs: Inputs, target: TargetType, n: int = 2, *, focus: bool = False,
    count: Optional[int] = None, scores: Optional[Tensor] = None,
    threshold: float = 0.5, rescale: bool = False, seed: int = 0,
) -> Mosaics:
    """Mosaics of n x n images of distinct classes, for :func:`grid_pointing`.

    In a mosaic it is known where the evidence for a class is. The grid pointing game
    (Böhle et al. 2021, CoDA-Nets) asks for the class of each cell in turn. Focus
    mosaics (Arias-Duart et al. 2021) have two cells of one class, which is asked for,
    and two of others. As published, the game takes only images that are classified
    correctly and with confidence: give `scores`, see `docs/metrics.md` for which.

    Args:
        inputs (Tensor, numpy.ndarray or tuple[Tensor]): Images of shape (batch,
            channels, height, width).
        target (Tensor or list): Class of each image, of shape (batch,).
        n (int, optional): Number of cells in a row, and in a column.
        focus (bool, optional): Whether half of the cells (rounded down) are of the same
            class. Focus is published for n = 2, and any images.
        count (int, optional): Number of mosaics, for which images are used again if
            they do not suffice. Default: None, for as many as there are classes with
            unused images for
        scores (Tensor, optional): Scores of the classes of each image, of shape (batch,
            classes): images that are classified correctly are used, from the most
            confident one of each class on. Default: None, for all images in random
            order
        threshold (float, optional): Lowest score of the class of an image.
        rescale (bool, optional): Whether to shrink mosaics to the size of an image, for
            networks that see more than they were trained on otherwise.
        seed (int, optional): Seed of the choice of classes and cells.

    Raises:
        ValueError: If a shape does not fit, there are too few classes with images, or a
            number is not positive.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import grid_pointing, mosaics
        >>> grid = mosaics(torch.rand(8, 3, 5, 5), [0, 0, 1, 1, 2, 2, 3, 3])
        >>> grid.images.shape, grid.cells.shape, grid.targets.shape
        (torch.Size([2, 3, 10, 10]), torch.Size([2, 2, 2]), torch.Size([2, 4]))
        >>> maps = torch.ones_like(grid.images)
        >>> grid_pointing(maps, grid.cells, grid.targets[:, 0]).share
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    images = check_images(inputs, [2])
    labels = check_target(target, len(images), images.device)
    if labels is None or labels.ndim != 1:
        raise ValueError(f"target={target!r} is not the class of each of the images.")
    indices = arrange(
        labels, n, focus=focus, count=count, scores=scores, threshold=threshold,
        seed=seed,
    )
    cells = labels[indices]
    targets = cells.flatten(1)
    if focus:
        # the only class that is there more than once
        targets = targets.mode(1).values[:, None]
    return Mosaics(assemble(images, indices, rescale), cells, targets, indices)


def _overlaps(cells: int, pixels: int, device: torch.device) -> Tensor:
    """How much of a pixel is in a cell, as a multiple of 1 / cells, (cells, pixels)."""
    begin = torch.arange(pixels, device=device) * cells
    start = torch.arange(cells, device=device)[:, None] * pixels
    inside = (begin + cells).minimum(start + pixels) - begin.maximum(start)
    return inside.clamp(min=0).to(double_dtype(device))


def grid_pointing(
    attributions: Maps, cells: Tensor, target: TargetType
) -> GridPointing:
    r"""Share of positive relevance inside of the asked class's own cells of a mosaic.

    .. math::
        \frac{\sum_{i \in C} \max(0, R_i)}{\sum_i \max(0, R_i)}

    with the own cells :math:`C`: the grid pointing game (Böhle et al. 2021), and Focus
    (Arias-Duart et al. 2021). Average over all cells of a mosaic, as a map that prefers
    some place of the image, such as its middle, does not have the level of chance in a
    single one.

    A map without positive relevance says nothing on where the class is. It has the
    level of chance, as any constant map has exactly, and is marked as `empty`. The
    published codes make it 0 or divide by zero.

    Args:
        attributions (Tensor, numpy.ndarray or tuple[Tensor]): Attributions of shape
            (batch, channels, height, width) or (batch, height, width), or (height,
            width) for a single mosaic. Channels are summed. The size may be another
            than that of the mosaic: cells divide the map evenly, and a pixel at a
            border counts for each cell by its area inside.
        cells (Tensor): Class of each cell, of shape (batch, rows, columns), as
            :func:`mosaics` returns it.
        target (int, Tensor, or list): Class that each map explains.

    Raises:
        ValueError: If a shape does not fit, no cell is of the target, or there is NaN
            or infinity in the attributions.

    Warns:
        NegativeMapWarning: If a map varies, but has no positive value.
    """
    maps = summed_maps(attributions)
    batch = len(maps)
    classes = as_batch(to_tensor(cells, "cells"), batch).to(maps.device)
    if classes.ndim != 3 or len(classes) != batch or classes.numel() == 0:
        raise ValueError(
            f"cells must be of shape ({batch}, rows, columns), but are of shape"
            f" {tuple(classes.shape)}."
        )
    index = check_target(target, batch, maps.device)
    if index is None or index.ndim != 1:
        raise ValueError(f"target={target!r} is not the class that each map explains.")
    own = classes == index[:, None, None]
    absent = ~own.flatten(1).any(1)
    if bool(absent.any()):
        row = int(absent.nonzero()[0])
        raise ValueError(
            f"target {int(index[row])} of example {row} is in none of its cells, which"
            f" are {classes[row].tolist()}."
        )
    highest, lowest = maps.amax((1, 2)), maps.amin((1, 2))
    empty, constant = highest <= 0, highest == lowest
    warn_negative_maps(maps, effect="and the share is that of chance:")
    dtype = double_dtype(maps.device)
    # relative to the highest, whose sum cannot overflow
    positive = maps.clamp(min=0).to(dtype) / highest.where(~empty, 1)[:, None, None]
    rows, columns = (
        _overlaps(*sizes, maps.device) for sizes in zip(classes.shape[1:], maps.shape[1:])
    )
    inside = (rows @ positive @ columns.T).flatten(1)
    own = own.flatten(1).to(dtype)
    chance = own.mean(1)
    share = (inside * own).sum(1) / inside.sum(1)
    share = chance.where(empty | constant, share)
    return GridPointing(share, chance, torch.ones_like(chance), empty)
