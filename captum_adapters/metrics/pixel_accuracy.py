"""Accuracy on images that keep only their most relevant pixels."""

from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._light import PERCENTS
from captum_adapters._validation import (
    BaselineType,
    Inputs,
    Maps,
    TargetType,
    as_batch,
    by_pixels,
    check_baselines,
    check_choice,
    check_images,
    check_range,
    check_target,
    double_dtype,
    pixel_maps,
    to_tensor,
    warn_negative_maps,
)
from captum_adapters.metrics._forward import forward_in_chunks
from captum_adapters.metrics._ranking import (
    Percent,
    Percents,
    SampleIds,
    percent_list,
    percent_tensors,
    rank_ties,
    top_counts,
)


class PixelAccuracy(NamedTuple):
    """Result of :func:`pixel_accuracy` on the inputs' device, a row for each example.

    Attributes:
        correct (Tensor): Whether the predicted class is the reference, bool (batch,
            percents), in the first order of ties.
        predictions (Tensor): Class with the largest output, (batch, percents), in the
            same order.
        reference (Tensor): Class that predictions are compared with, (batch,).
        counts (Tensor): Number of pixels, or inputs, that are kept, (percents,).
        percents (Tensor): Percentages, (percents,).
        accuracy (Tensor): `correct` as numbers, (batch, percents), or its mean over
            `n_orders` random orders where the percentage divides ties.
        tied_share (Tensor): Share of pixels, or inputs, whose attribution is not theirs
            alone, (batch,).
    """

    correct: Tensor
    predictions: Tensor
    reference: Tensor
    counts: Tensor
    percents: Tensor
    accuracy: Tensor
    tied_share: Tensor


def _unit_scores(
    attributions: Maps, images: Tensor, unit: str, absolute: bool,
    interpolate: Optional[str] = None,
) -> Tensor:
    """Scores to rank, of shape (batch, 1 or channels, height, width)."""
    check_choice("unit", unit, ("pixel", "input"))
    reduce = "abs_sum" if absolute else "sum"
    if unit == "pixel":
        scores = pixel_maps(attributions, images, reduce, interpolate)[:, None]
    else:
        maps = to_tensor(attributions, "attributions")
        if maps.ndim != images.ndim or maps.shape[:2] != images.shape[:2]:
            raise ValueError(
                f"unit='input' needs the channels of inputs of {tuple(images.shape)},"
                f" but attributions are of {tuple(maps.shape)}: choose unit='pixel'."
            )
        channels = maps.split(1, 1)
        scores = torch.stack(
            [pixel_maps(each, images[:, :1], reduce, interpolate) for each in channels], 1
        )
    if not absolute:
        # attributed to the caller of the public function
        warn_negative_maps(scores.flatten(1, 2), stacklevel=4)
    return scores


def _accuracy(
    forward_func: Callable[..., Any], images: Tensor, scores: Tensor,
    percents: Percents, target: TargetType, additional_forward_args: object,
    transform: Optional[Callable[[Tensor], Tensor]], *, reference: str,
    baselines: BaselineType, max_examples_per_batch: Optional[int], show_progress: bool,
    ties: str, n_orders: int, seed: int, sample_ids: SampleIds,
) -> PixelAccuracy:
    """Predictions for images that keep only the highest scores."""
    batch, total = len(images), scores[0].numel()
    labels = check_target(target, batch, images.device)
    if not isinstance(reference, str):
        raise TypeError(
            "reference is 'label' or 'prediction': give labels as target, with 'label'."
        )
    check_choice("reference", reference, ("label", "prediction"))
    if (reference == "label") == (labels is None):
        raise ValueError(
            f"reference={reference!r} is {'not ' if labels is None else ''}without"
            " target: 'prediction' compares with the prediction for the whole image."
        )
    baseline = check_baselines(baselines, images)
    percents = percent_list(percents)
    counts = top_counts(percents, total)
    # equal images are evaluated once; the whole image is the one that keeps all
    distinct = sorted({*counts, total} if reference == "prediction" else {*counts})
    ranks, rows, divided, tied_share = rank_ties(
        scores, distinct, images, ties, n_orders, seed, sample_ids
    )
    if ranks.shape[2:] != images.shape[2:]:
        ranks = F.interpolate(
            ranks.to(double_dtype(ranks.device)), images.shape[2:], mode="nearest-exact"
        )
    numbers = torch.tensor(distinct, device=images.device)
    first = torch.arange(batch, device=images.device).repeat(len(distinct))
    # places in the table of all numbers and examples that have more orders
    column, row = divided[rows].t().nonzero().unbind(1)
    further = range(n_orders - 1)
    places = (column * batch + rows[row]).repeat(len(further))
    examples = torch.cat([first, rows[row].repeat(len(further))])
    kept = torch.cat([
        numbers.repeat_interleave(batch), numbers[column].repeat(len(further))
    ])
    order = torch.cat([first, *(batch + each * len(rows) + row for each in further)])

    def make_inputs(part: slice) -> Tensor:
        rows = examples[part]
        fill = baseline if len(baseline) == 1 else baseline[rows]
        keep = ranks[order[part]] < kept[part].view(-1, *[1] * (images.ndim - 1))
        masked = torch.where(keep, images[rows], fill)
        return masked if transform is None else transform(masked)

    def collect(output: Tensor, part: slice) -> tuple[Tensor, ...]:
        if output.ndim != 2 or output.shape[1] < 2:
            raise ValueError(
                "Accuracy needs an output of shape (batch, classes) with two or more"
                f" classes, but forward_func returns {tuple(output.shape)}."
            )
        if part.start == 0 and labels is not None:
            check_range(output, labels)
        return output.argmax(1), output.isnan().any(1)

    predictions, invalid = forward_in_chunks(
        forward_func, make_inputs, collect, examples, batch, additional_forward_args,
        max_examples_per_batch, show_progress,
    )
    if bool(invalid.any()):
        wrong = examples[invalid.to(examples.device)].unique().tolist()
        raise ValueError(
            f"forward_func returns NaN for images derived from the examples {wrong} of"
            " the batch, which have no predicted class."
        )
    predictions = predictions.to(images.device)
    size = len(distinct) * batch
    table = predictions[:size].view(len(distinct), batch)
    # Captum's tuples have given labels of shape (batch, 1)
    compared = table[distinct.index(total)] if labels is None else labels.reshape(batch)
    accuracy = (table == compared).to(double_dtype(images.device))
    hits = (predictions[size:] == compared[examples[size:]]).to(accuracy.dtype)
    accuracy.view(-1).index_add_(0, places, hits)
    accuracy = (accuracy / n_orders).where(divided.t(), accuracy)
    index = [distinct.index(count) for count in counts]
    selected = table[index].t().contiguous()
    return PixelAccuracy(
        selected == compared[:, None], selected, compared,
        *percent_tensors(percents, total, images.device),
        accuracy[index].t().contiguous(), tied_share,
    )


def keep_top(
    inputs: Inputs, attributions: Maps, percent: Percent, *, unit: str = "pixel",
    absolute: bool = True, baselines: BaselineType = 0,
    interpolate: Optional[str] = None, ties: str = "random", seed: int = 0,
    sample_ids: SampleIds = None,
) -> Tensor:
    """Images with only their most relevant p % kept.

    These are the inputs of the evaluation of R-LRP by Nyiri & Gibaru (sections 4.2 to
    5).

    Args:
        percent (int, float or Fraction): Percentage from 0 to 100, see
            :func:`top_fraction`; 1 % of 224 x 224 pixels are 501.
        unit (str, optional): `"pixel"` to rank pixels by the sum over their channels,
            or `"input"` to rank each channel's values on their own, for attributions
            with the channels of the inputs.
        absolute (bool, optional): Whether to rank by magnitude; that of a pixel is
            taken after the sum over its channels. Otherwise negative contributions come
            last.
        ties (str, optional): `"random"` if pixels with equal attributions come in
            random order, `"stable"` if they come row by row, which favours those in the
            upper half of the image.
        inputs, attributions, baselines, interpolate, seed, sample_ids: See
            :func:`insertion_deletion`. The paper does not say whether the rest is the
            mean color or black.

    Returns:
        Tensor: Images of the shape and type of the inputs. For errors, see
        :func:`pixel_accuracy`.
    """
    images = check_images(inputs)
    scores = _unit_scores(attributions, images, unit, absolute, interpolate)
    counts = top_counts([percent], scores[0].numel())
    ranks, *_ = rank_ties(scores, counts, images, ties, 1, seed, sample_ids)
    return torch.where(ranks < counts[0], images, check_baselines(baselines, images))


def pixel_accuracy(
    forward_func: Callable[..., Any], inputs: Inputs, attributions: Maps,
    percents: Percents = PERCENTS, target: TargetType = None,
    additional_forward_args: object = None, *, unit: str = "pixel",
    absolute: bool = True, reference: str = "label", baselines: BaselineType = 0,
    interpolate: Optional[str] = None, max_examples_per_batch: Optional[int] = None,
    show_progress: bool = False, ties: str = "random", n_orders: int = 4, seed: int = 0,
    sample_ids: SampleIds = None,
) -> PixelAccuracy:
    """Accuracy of a network on images with only the most relevant p % kept.

    The better a method finds what the network uses, the fewer pixels are needed for its
    decision. This is the evaluation of R-LRP by Nyiri & Gibaru (sections 4.2 to 5,
    figures 9 to 21): of each image, the p % with the largest attributions are kept (see
    :func:`keep_top`), the rest is replaced, and the network predicts a class again.

    Where a percentage divides pixels with equal attributions, `accuracy` is the mean
    over several random orders of these, the same in each run.

    Args:
        percents (int, float or Fraction, or sequence of these, optional): Percentages
            from 0 to 100, in any order, by default those of the paper's figures.
        target (int, Tensor or list, optional): With `reference="label"`, the class of
            all examples, or one for each.
        reference (str, optional): What is correct: `"label"` compares with `target`,
            and `"prediction"` with the class that is predicted for the whole image, as
            the paper does on ImageNet.
        n_orders (int, optional): Number of random orders, for which as many images are
            evaluated. Every second one is the reverse of the one before.
        inputs, attributions, unit, absolute, ties, ...: See :func:`keep_top`. Of the
            paper, figures 9 to 15 have `unit="input"`, and figures 9 to 13
            `absolute=False`.
        forward_func, additional_forward_args, max_examples_per_batch, show_progress:
            See :func:`insertion_deletion`. The output is of shape (batch, classes).

    Raises:
        ValueError: As :func:`insertion_deletion`, or if a percentage is not from 0 to
            100, there is NaN in the output, or a label is missing.
        TypeError: If an argument is neither a tensor nor an array, or a percentage is
            no number.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import pixel_accuracy
        >>> # the class is that of the larger half: left or right
        >>> model = lambda images: torch.stack(
        ...     [images[..., :2].sum((1, 2, 3)), images[..., 2:].sum((1, 2, 3))], 1)
        >>> images = torch.tensor([1.0, 1.0, 2.0, 1.0]).view(1, 1, 1, 4)
        >>> maps = torch.tensor([4.0, 3.0, 2.0, 1.0]).view(1, 1, 1, 4)
        >>> result = pixel_accuracy(model, images, maps, (25, 75, 100), target=1)
        >>> result.correct
        tensor([[False, False,  True]])
        >>> result.predictions, result.counts
        (tensor([[0, 0, 1]]), tensor([1, 3, 4]))
    """
    images = check_images(inputs)
    scores = _unit_scores(attributions, images, unit, absolute, interpolate)
    return _accuracy(
        forward_func, images, scores, percents, target, additional_forward_args,
        None, reference=reference, baselines=baselines, show_progress=show_progress,
        max_examples_per_batch=max_examples_per_batch, ties=ties, n_orders=n_orders,
        seed=seed, sample_ids=sample_ids,
    )


def cross_model_accuracy(
    forward_func: Callable[..., Any], inputs: Inputs, attributions: Maps,
    percents: Percents = PERCENTS, target: TargetType = None,
    additional_forward_args: object = None, *, unit: str = "pixel",
    absolute: bool = True, transform: Optional[Callable[[Tensor], Tensor]] = None,
    resize_selection: bool = False, reference: str = "label",
    baselines: BaselineType = 0, max_examples_per_batch: Optional[int] = None,
    show_progress: bool = False, ties: str = "random", n_orders: int = 4, seed: int = 0,
    sample_ids: SampleIds = None,
) -> PixelAccuracy:
    """Accuracy of one network on the pixels that are relevant to another one.

    Whether two networks decide by the same pixels: network B (`forward_func`) sees only
    the p % of each image that are most relevant to network A (`attributions`), as in
    section 5.3 and figure 22 of R-LRP by Nyiri & Gibaru. With `reference="prediction"`,
    B's own class of the whole image is correct, and with the classes that A predicts as
    `target`, A's decision. The paper does not say what it used.

    If their preprocessing differs, `inputs` are either what A sees, and a `transform`
    makes of the masked images what B sees, or they are what B sees of the same section
    of the image, and `resize_selection` transfers which pixels are kept.

    Args:
        transform (callable, optional): A function from a batch of masked images to B's
            inputs, for instance resizing and another normalization.
        resize_selection (bool, optional): Whether attributions may have another height
            and width than inputs: a pixel of B's image is kept if the pixel of A's
            image at its center is. The share that is kept may differ by rounding.
        forward_func, inputs, attributions, percents, ...: See :func:`pixel_accuracy`.

    Returns:
        PixelAccuracy: As :func:`pixel_accuracy`, with counts of A's pixels or inputs.
    """
    images = check_images(inputs)
    dims = images.ndim - 2
    maps = as_batch(to_tensor(attributions, "attributions"), len(images), dims)
    frame, size = images, maps.shape[-dims:]
    # others are refused, by their shape
    if maps.ndim in (dims + 1, dims + 2) and size != images.shape[2:]:
        if not resize_selection:
            raise ValueError(
                f"attributions are of {by_pixels(size)} pixels, but inputs of"
                f" {by_pixels(images.shape[2:])}: give A's inputs and a transform to B's,"
                " or set resize_selection=True."
            )
        # images of the attributions' size
        frame = images.new_empty(()).expand(*images.shape[:2], *size)
    scores = _unit_scores(maps, frame, unit, absolute)
    return _accuracy(
        forward_func, images, scores, percents, target, additional_forward_args,
        transform, reference=reference, baselines=baselines, show_progress=show_progress,
        max_examples_per_batch=max_examples_per_batch, ties=ties, n_orders=n_orders,
        seed=seed, sample_ids=sample_ids,
    )
