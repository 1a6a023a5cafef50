"""RISE, the perturbation baseline of the papers that Captum lacks."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from captum.attr import PerturbationAttribution
from captum.log import log_usage
from torch import Tensor
from tqdm import tqdm

from captum_adapters._validation import (
    DEFAULT_CHUNK,
    LINEAR,
    BaselineType,
    Inputs,
    ScoreFunction,
    Scores,
    TargetType,
    check_baselines,
    check_choice,
    check_evaluation,
    check_inputs,
    check_target,
    double_dtype,
    evaluate_rows,
    examples_where,
    positive_integer,
    select_target,
)


class RISE(PerturbationAttribution):
    r"""Randomized input sampling for explanation, of any black box.

    Petsiuk et al. 2018: the importance of a pixel is the expected score of the image
    under random masks M that show this pixel. It is estimated from N masks,

    .. math::
        S(\lambda) = \frac{1}{\sum_i M_i(\lambda)}
            \sum_{i=1}^N f(I \odot M_i) M_i(\lambda).

    The paper divides by the expected sum of the masks, p N. This has the same limit,
    but pixels which happen to be visible more often than others then stand out by the
    mean score, see `docs/captum.md`. Here it is an option (`normalization="expected"`).

    A mask starts as a grid of s × s cells, each of them visible with probability p. The
    grid is resized to s + 1 cells' lengths with linear interpolation, and an area of
    the image's size is cut out at random. A cell's length is that of the image divided
    by s, rounded up; the cut is shifted by up to a cell's length (exclusive). All
    examples of a batch have the same masks, which depend on `seed` alone.

    Args:
        forward_func (callable): A network, or any function of images. It is evaluated
            without gradients.

    Examples:
        >>> import torch
        >>> from captum_adapters.attr import RISE
        >>> # the score is the brightness of the right half
        >>> rise = RISE(lambda images: images[..., 4:].sum((1, 2, 3)))
        >>> image = torch.ones(1, 3, 8, 8)
        >>> attributions = rise.attribute(image, n_masks=200, grid_size=2)
        >>> attributions.shape
        torch.Size([1, 3, 8, 8])
        >>> bool(attributions[..., 7].mean() > attributions[..., 0].mean())
        True
    """

    @classmethod
    def get_name(cls) -> str:
        """Name for users, as in Captum Insights."""
        return "RISE"

    @log_usage()
    def attribute(
        self, inputs: Inputs, target: TargetType = None,
        additional_forward_args: object = None, baselines: BaselineType = None,
        n_masks: int = 4000, grid_size: Union[int, Sequence[int]] = 7,
        probability: float = 0.5, seed: int = 0, output: ScoreFunction = "softmax",
        normalization: str = "coverage", perturbations_per_eval: Optional[int] = None,
        show_progress: bool = False,
    ) -> Inputs:
        """Args:
            inputs (Tensor or tuple[Tensor]): Images of shape (batch, channels, height,
                width), or with one or three spatial dimensions instead. Each of several
                tensors has masks of its own. What must not be masked belongs in
                `additional_forward_args`.
            target, additional_forward_args: See :meth:`CompositeAttribution.attribute`.
            baselines (scalar, Tensor, tuple of scalar, or Tensor, optional): What is
                seen where a mask is zero: a number, or a tensor that can be broadcast
                to the inputs, for each of them. `None` is 0, as in the paper (after
                normalization).
            n_masks (int, optional): Number of masks N. The paper uses 4000 for VGG-16
                and 8000 for ResNet-50.
            grid_size (int or sequence of int, optional): Number of cells s along each
                spatial dimension, or one for all of them.
            probability (float, optional): Probability p of a cell to be visible,
                between 0 and 1 (exclusive).
            seed (int, optional): Seed of the masks.
            output (str or callable, optional): What the score is, see
                :func:`captum_adapters.metrics.insertion_deletion`.
            normalization (str, optional): What sums are divided by: `"coverage"` for
                the sum of the masks at the pixel, or `"expected"` for the paper's p N.
                A pixel that no mask shows is 0.
            perturbations_per_eval (int, optional): Number of masks to evaluate at once,
                each with the whole batch. Default: None, for 32 images, at least one
                mask
            show_progress (bool, optional): Whether to show a progress bar.

        Returns:
            *Tensor* or *tuple[Tensor]*: Importance in units of the score, of the shape
            and type of the inputs. All channels are the same: `attributions[:, :1]` is
            the paper's map. A tuple is returned if inputs are a tuple.

        Raises:
            ValueError: If a shape does not fit, an argument is out of range or missing,
                a score is NaN or infinite, or the network is in training mode.
            TypeError: If inputs are not floating point tensors, the target is not of
                integers, or the output is not a tensor.
        """
        images = check_maskable(inputs)
        batch = len(images[0])
        bases = _check_baselines(baselines, images)
        positive_integer("n_masks", n_masks)
        if not 0 < probability < 1:
            raise ValueError(f"probability={probability} is not between 0 and 1.")
        scores_of = Scores(output)
        check_choice("normalization", normalization, ("expected", "coverage"))
        check_evaluation(self.forward_func)
        chunk = max(1, DEFAULT_CHUNK // batch)
        if perturbations_per_eval is not None:
            chunk = positive_integer("perturbations_per_eval", perturbations_per_eval)
        # few bits each, so that masks are the same however they are evaluated
        drawing = grid_size, probability, torch.Generator().manual_seed(seed)
        grids = [_draw_grids(image, n_masks, *drawing) for image in images]
        index = check_target(target, batch, allow_negative=True)
        totals = [
            image.new_zeros((batch, *image.shape[2:]), dtype=double_dtype(image.device))
            for image in images
        ]
        covered = [torch.zeros_like(total[0]) for total in totals]
        bar = tqdm(desc="RISE attribution", total=n_masks, disable=not show_progress)
        with torch.no_grad(), bar:
            for begin in range(0, n_masks, chunk):
                part = slice(begin, begin + chunk)
                masks = [
                    _make_masks(cells[part], shifts[part], image)
                    for (cells, shifts), image in zip(grids, images)
                ]
                count = len(masks[0])
                rows = torch.arange(batch, device="cpu").repeat(count)
                result = evaluate_rows(
                    self.forward_func, [*map(_apply_masks, images, bases, masks)],
                    additional_forward_args, batch, rows,
                )
                scores = scores_of(result)
                asked = None if index is None else index[rows].to(scores.device)
                scores = select_target(scores, asked, begin == 0).view(count, -1)
                for total, cover, mask in zip(totals, covered, masks):
                    mask = mask.to(total.dtype)
                    total += torch.tensordot(scores.to(total).T, mask, 1)
                    cover += mask.sum(0)
                bar.update(count)
        # Captum's decorator is in between
        scores_of.warn(stacklevel=4)
        for total, cover in zip(totals, covered):
            # a pixel that no mask shows has a total of zero
            seen = cover.clamp(min=torch.finfo(cover.dtype).tiny)
            total /= probability * n_masks if normalization == "expected" else seen
        wrong = examples_where(~totals[0].isfinite())
        if wrong:
            raise ValueError(
                "forward_func returns NaN or infinity for masked images of the examples"
                f" {wrong}."
            )
        attributions = tuple(
            total.to(image.dtype)[:, None].expand_as(image).clone()
            for total, image in zip(totals, images)
        )
        return attributions if isinstance(inputs, tuple) else attributions[0]


def check_maskable(inputs: Inputs) -> tuple[Tensor, ...]:
    """Inputs as a tuple of floating point tensors with spatial dimensions."""
    images = check_inputs(inputs)
    for image in images:
        if not image.is_floating_point():
            raise TypeError(
                f"inputs of {image.dtype} cannot be masked: convert them to floating"
                " point numbers."
            )
        if image.ndim - 2 not in LINEAR or image.numel() == 0:
            raise ValueError(
                "inputs must be of shape (batch, channels, height, width), or with one"
                " or three spatial dimensions, and not empty, but are of shape"
                f" {tuple(image.shape)}."
            )
    return images


def _check_baselines(
    baselines: BaselineType, images: tuple[Tensor, ...]
) -> list[Optional[Tensor]]:
    """A baseline for each input, `None` for zeros."""
    given = baselines if isinstance(baselines, tuple) else (baselines,) * len(images)
    if len(given) != len(images):
        raise ValueError(f"There are {len(given)} baselines for {len(images)} inputs.")
    bases = [check_baselines(base, image) for base, image in zip(given, images)]
    return [base if bool(base.any()) else None for base in bases]


def _draw_grids(
    image: Tensor, n_masks: int, grid_size: Union[int, Sequence[int]],
    probability: float, generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Which cells are visible (masks, *cells), and their shifts (masks, dims), on CPU."""
    size = image.shape[2:]
    several = isinstance(grid_size, Sequence)
    cells: Any = tuple(grid_size) if several else (grid_size,) * len(size)  # type: ignore
    if len(cells) != len(size) or any(
        isinstance(count, bool) or not isinstance(count, Integral) or count < 1
        for count in cells
    ):
        raise ValueError(
            f"grid_size={grid_size!r} is neither a positive integer, nor one for each"
            f" of {len(size)} spatial dimensions of inputs."
        )
    grids = torch.rand(n_masks, *cells, generator=generator, device="cpu") < probability
    cell = [math.ceil(length / count) for length, count in zip(size, cells)]
    shifts = [
        torch.randint(length, (n_masks,), generator=generator, device="cpu")
        for length in cell
    ]
    return grids, torch.stack(shifts, 1)


def _make_masks(grids: Tensor, shifts: Tensor, image: Tensor) -> Tensor:
    """Masks of shape (masks, *spatial), in at least single precision."""
    size, cells = image.shape[2:], grids.shape[1:]
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    with torch.autocast(image.device.type, enabled=False):
        masks = F.interpolate(
            grids[:, None].to(image.device, dtype),
            [(count + 1) * math.ceil(side / count) for side, count in zip(size, cells)],
            mode=LINEAR[len(size)],
        )[:, 0]
    for dim, (side, shift) in enumerate(zip(size, shifts.unbind(1)), 1):
        index = shift[:, None] + torch.arange(side, device=shift.device)
        view = [len(index)] + [1] * len(size)
        view[dim] = side
        masks = masks.take_along_dim(index.view(view).to(masks.device), dim)
    return masks


def _apply_masks(image: Tensor, base: Optional[Tensor], masks: Tensor) -> Tensor:
    """Masked images of shape (masks * batch, channels, *spatial)."""
    masks = masks[:, None, None].to(image.dtype)
    masked = image.detach() * masks
    if base is not None:
        masked = masked + base * (1 - masks)
    return masked.flatten(0, 1)
