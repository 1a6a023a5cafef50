"""Insertion and deletion."""

import math
import warnings
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._validation import (
    BaselineType,
    Inputs,
    Maps,
    ScoreFunction,
    Scores,
    TargetType,
    check_baselines,
    check_choice,
    check_evaluation,
    check_images,
    check_output,
    check_range,
    check_target,
    pixel_maps,
    predicted_class,
    select_target,
    split_args,
    warn_negative_maps,
)
from captum_adapters.metrics._forward import forward_in_chunks
from captum_adapters.metrics._perturbation import (
    PerturbedImages,
    blur,
    count_grid,
    group_ends,
    nearest_ends,
)
from captum_adapters.metrics._ranking import (
    SampleIds,
    random_orders,
    sort_scores,
    tied_pixels,
)


class Protocol(NamedTuple):
    """What a protocol prescribes, where the caller chooses nothing else."""

    ties: str = "nearest"
    step: Optional[int] = None  # pixels between two points
    ends: bool = True  # whether the curve begins with nothing inserted or deleted
    uniform: bool = False  # whether all points are equally far apart on the x-axis


PROTOCOLS: dict[Optional[str], Protocol] = {
    None: Protocol(),
    "c3": Protocol(ties="stable"),
    "keio": Protocol(ties="threshold", step=500, ends=False, uniform=True),
    "rise": Protocol(ties="stable", step=224, uniform=True),
}


class InsertionDeletion(NamedTuple):
    """Result of :func:`insertion_deletion`, with one row for each example.

    Curves have as many points as there are steps, plus one where both ends are points.
    Tensors are on the device of the inputs.

    Attributes:
        insertion, deletion (Tensor): Areas under both curves, (batch,). Insertion is
            better if it is higher, deletion if it is lower.
        id_score (Tensor): Insertion minus deletion, (batch,).
        insertion_normalized, deletion_normalized, id_normalized (Tensor): The same on a
            scale where the score of the blank image is 0, and that of the whole image
            is 1, (batch,). NaN where both scores are equal.
        fractions (Tensor): Where points are on the x-axis, 0 to 1, (batch, points).
        selected (Tensor): Number of pixels that are really inserted or deleted at each
            point, (batch, points).
        insertion_curve, deletion_curve (Tensor): Scores, (batch, points).
        insertion_classes, deletion_classes (Tensor): Predicted classes, (batch,
            points).
        score_full, score_blank (Tensor): Scores of the whole image, and after all
            pixels are deleted, (batch,).
        tied_share (Tensor): Share of pixels whose value is not theirs alone, (batch,).
        distinct_levels (Tensor): Number of distinct values of the map, (batch,).
    """

    insertion: Tensor
    deletion: Tensor
    id_score: Tensor
    insertion_normalized: Tensor
    deletion_normalized: Tensor
    id_normalized: Tensor
    fractions: Tensor
    selected: Tensor
    insertion_curve: Tensor
    deletion_curve: Tensor
    insertion_classes: Tensor
    deletion_classes: Tensor
    score_full: Tensor
    score_blank: Tensor
    tied_share: Tensor
    distinct_levels: Tensor


def insertion_deletion(
    forward_func: Callable[..., Any], inputs: Inputs, attributions: Maps,
    baselines: BaselineType = None, target: TargetType = None,
    additional_forward_args: object = None, *, n_steps: Optional[int] = None,
    ties: Optional[str] = None, output: ScoreFunction = "softmax", reduce: str = "sum",
    interpolate: Optional[str] = None, max_examples_per_batch: Optional[int] = None,
    protocol: Optional[str] = None, show_progress: bool = False,
    step: Optional[int] = None, insertion_baselines: BaselineType = None, seed: int = 0,
    sample_ids: SampleIds = None,
) -> InsertionDeletion:
    """Scores while pixels are inserted into, and deleted from, an image.

    Pixels are ranked by descending attribution, all channels of a pixel together. The
    image of insertion has the first n pixels of the input, and the baseline elsewhere,
    and that of deletion the reverse (Eqs. 5 and 6 of Doublet et al. 2024, C³-LRP; the
    curves are by Petsiuk et al. 2018, RISE). The areas under both curves are integrated
    by the trapezoidal rule, and the ID score is their difference.

    By default, both curves have the same baseline and both ends, each pixel counts on
    the x-axis, and pixels of equal value are never divided. Then the insertion area of
    a map is the deletion area of its negative, and random and constant maps have an
    (expected) ID score of 0.

    Args:
        forward_func (Callable): The network, or any function of images. Put it into
            evaluation mode before.
        inputs (Tensor, numpy.ndarray or tuple[Tensor]): Images of shape (batch,
            channels, height, width), or signals (batch, channels, length), volumes or
            videos (batch, channels, depth, height, width), for which the shapes below
            change likewise.
        attributions (Tensor, numpy.ndarray or tuple[Tensor]): Attributions of shape
            (batch, channels or 1, height, width) or (batch, height, width), or (height,
            width) for a single image.
        baselines (scalar, Tensor, tuple of scalar, or Tensor, optional): What pixels
            are without their content: a number, or a tensor that can be broadcast to
            the inputs, such as one of shape (1, channels, 1, 1). `None` is 0, the mean
            colour if inputs are normalized. Black is `-mean / std` then, which must be
            given for `protocol="keio"`.
        target (int, tuple, Tensor, or list, optional): Index of the class whose score
            is measured, as in Captum. `None` is for networks with a single output only.
        additional_forward_args (Any, optional): Further arguments of `forward_func`,
            one or a tuple. Of tensors with a row for each example, each image is given
            the row of its example.
        n_steps (int, optional): Number of equal intervals of pixels. If the middle
            falls between two pixels, both are points. Default: None, for 100 or the
            `step` of the protocol
        ties (str, optional): What happens to pixels of equal value. `"nearest"`: they
            enter together, and a point that would divide them is moved to before or
            after them, whichever is nearer, on the x-axis as well. `"group"`: the same,
            but always to after them, so that with few points what comes just before a
            large group may be missed. `"stable"`: row by row. `"random"`: in random
            order. `"threshold"`: they enter together as soon as n reaches one of them,
            and the x-axis stays at n. Default: None, for `"nearest"` or that of the
            protocol
        output (str or Callable, optional): What the score is: `"softmax"` for the
            probability of the target among classes (dimension 1), `"identity"` or
            `"logit"` for the output as it is, which networks that return probabilities
            need, or a function of the output. A single output per example is taken as
            it is.
        reduce (str, optional): `"sum"` ranks pixels by the sum of attributions over
            channels, `"abs_sum"` by its magnitude.
        interpolate (str, optional): Mode of :func:`torch.nn.functional.interpolate` for
            attributions of another height and width. `None` refuses these.
        max_examples_per_batch (int, optional): The largest number of images to evaluate
            at a time. Default: None, for 32 or the batch size if that is larger
        protocol (str, optional): A preset, which other arguments replace: `"c3"` for
            the text of C³-LRP, `"keio"` for the published code of Otsuki et al. 2024,
            or `"rise"` for that of RISE. `docs/metrics.md` says what they reward.
        show_progress (bool, optional): Whether to show a progress bar.
        step (int, optional): Number of pixels between two points, instead of `n_steps`.
        insertion_baselines (scalar, Tensor, tuple of scalar, or Tensor, optional): What
            insertion starts from, if not from `baselines`.
        seed (int, optional): Seed of random orders.
        sample_ids (list or Tensor, optional): An identity for each example, which
            together with `seed` determines its random order, whatever the rest of the
            batch. Default: None, for the content of the image

    Raises:
        ValueError: If a shape does not fit, a map has NaN or infinity, the network is
            in training mode, or an argument is missing, unknown or out of range.
        TypeError: If an argument is not of the type above.

    Warns:
        NegativeMapWarning: If a map varies, but has no positive value.
        ProbabilityWarning: If the outputs are probabilities for all images, although
            `output="softmax"`, or all between 0 and 1 for ten or more classes.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import insertion_deletion
        >>> images = torch.tensor([4.0, 3.0, 2.0, 1.0]).view(1, 1, 2, 2)
        >>> result = insertion_deletion(lambda x: x.mean((1, 2, 3)), images, images)
        >>> result.insertion_curve
        tensor([[0.0000, 1.0000, 1.7500, 2.2500, 2.5000]])
        >>> result.insertion, result.deletion, result.id_score
        (tensor([1.5625]), tensor([0.9375]), tensor([0.6250]))
    """
    check_choice("protocol", protocol, PROTOCOLS)
    preset = PROTOCOLS[protocol]
    ties = preset.ties if ties is None else ties
    check_choice("ties", ties, ("nearest", "group", "stable", "random", "threshold"))
    scores_of = Scores(output)
    images = check_images(inputs)
    maps = pixel_maps(attributions, images, reduce, interpolate)
    warn_negative_maps(maps)
    batch, n_pixels = len(images), maps[0].numel()
    index = check_target(target, batch, images.device)
    origin = ""
    if n_steps is None and step is None:
        n_steps, step = (None if preset.step else 100), preset.step
        origin = f" of protocol={protocol!r}"
    counts = count_grid(n_pixels, n_steps, step, preset.ends, origin).to(images.device)
    moved = ties in ("nearest", "group")
    if moved and not preset.ends:
        # without the empty image, the area would not begin at zero
        counts = F.pad(counts, (1, 0))

    if protocol == "keio" and baselines is None and bool((images < 0).any()):
        warnings.warn(
            "protocol='keio' makes pixels black, but inputs are negative somewhere, so"
            " that the default baseline of 0 is not black: give baselines=-mean / std"
            " of the normalization, of shape (1, channels, 1, 1).",
            stacklevel=2,
        )
    deleted = check_baselines(baselines, images)
    inserted = None
    if insertion_baselines is not None:
        inserted = check_baselines(insertion_baselines, images, "insertion_baselines")
    elif protocol == "rise":
        inserted = blur(images)

    shuffle = ties == "random"
    first = random_orders(images, seed, sample_ids, n_pixels) if shuffle else None
    values, order = sort_scores(maps, first)
    equal = values[:, 1:] == values[:, :-1]
    selected = counts.expand(batch, -1)
    if ties == "nearest":
        selected = nearest_ends(equal).gather(1, selected)
    elif ties in ("group", "threshold"):
        selected = group_ends(equal).gather(1, selected)

    alone = not any(split_args(additional_forward_args, batch)[1])
    perturbed = PerturbedImages(images, deleted, inserted, order, selected, alone)
    examples = perturbed.examples
    blank: list[Tensor] = []

    def choose(scores: Tensor, logits: Tensor, index: Any) -> tuple[Tensor, Tensor]:
        """The target's scores, and the predicted classes."""
        return select_target(scores, index, False), predicted_class(logits, index)

    def collect(result: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        scores = scores_of(result)
        # where there are several positions, the class at the target's is meant
        logits = result if result.ndim <= 2 else scores
        if part.start == 0:
            check_range(scores, index)
            first = [0] * batch
            blank.extend(choose(scores[first], logits[first], index))
        return choose(scores, logits, None if index is None else index[examples[part]])

    scores, classes = forward_in_chunks(
        forward_func, perturbed.create, collect, examples, batch,
        additional_forward_args, max_examples_per_batch, show_progress,
    )
    scores_of.warn()
    scores, classes = scores[perturbed.inverse], classes[perturbed.inverse]
    if perturbed.shared is not None:
        # the first image is blank, and has a score for the target of each example
        scores, classes = (
            own[:, None].where(perturbed.shared, values)
            for own, values in zip(blank, (scores, classes))
        )
    n_points = len(counts)
    insertion_curve, deletion_curve = scores[:, :n_points], scores[:, -n_points:]
    full, deletion_blank = insertion_curve[:, -1], deletion_curve[:, -1]

    if preset.uniform and not moved:
        fractions = _equal_steps(insertion_curve)
    else:
        fractions = (selected if moved else counts).to(scores) / n_pixels
    fractions = fractions.expand(batch, -1)
    insertion = _area(insertion_curve, fractions)
    deletion = _area(deletion_curve, fractions)
    insertion_scaled = _normalize(insertion, scores[:, n_points], full)
    deletion_scaled = _normalize(deletion, deletion_blank, full)
    return InsertionDeletion(
        insertion, deletion, insertion - deletion,
        insertion_scaled, deletion_scaled, insertion_scaled - deletion_scaled,
        fractions, selected, insertion_curve, deletion_curve,
        classes[:, :n_points], classes[:, -n_points:], full, deletion_blank,
        tied_pixels(values).to(scores.dtype).mean(1), n_pixels - equal.sum(1),
    )


def contrastive_insertion_deletion(
    forward_func: Callable[..., Any], inputs: Inputs, attributions: Maps,
    baselines: BaselineType = None, target: TargetType = None,
    additional_forward_args: object = None, *, rival: TargetType = None,
    output: ScoreFunction = "softmax", max_examples_per_batch: Optional[int] = None,
    **options: Any,
) -> InsertionDeletion:
    """Insertion and deletion of the target's score minus that of its rival.

    Pixels that count for both classes leave the difference as it is, so a map has to
    show what is evidence for this class and not that one. Random and constant maps have
    an expected ID score of 0. If both classes are exchanged, the score is the negative
    one.

    Args:
        target (int, Tensor, or list): Index of the class that is explained.
        rival (int, Tensor, or list, optional): Index of the class it is compared with.
            Default: None, for the highest other class of the whole image
        forward_func, inputs, attributions, output, ...: See :func:`insertion_deletion`,
            as for `**options`. The output must be of shape (batch, classes).

    Returns:
        InsertionDeletion: All scores are differences, and predicted classes are 0 where
        the target's score is at least that of its rival, and 1 elsewhere.

    Raises:
        ValueError: As :func:`insertion_deletion`, or if there is no target, or the
            rival is the target.
    """
    all_scores = Scores(output)
    check_evaluation(forward_func)
    images = check_images(inputs)
    batch, device = len(images), images.device
    index = check_target(target, batch, device)
    if index is None or index.ndim != 1:
        raise ValueError(
            f"target={target!r}, but a contrast needs the class of each example."
        )

    def scores_of(result: Tensor) -> Tensor:
        scores = all_scores(result)
        if scores.ndim != 2 or scores.shape[1] < 2:
            raise ValueError(
                "A contrast needs scores of shape (batch, classes) of several classes,"
                f" but they are of shape {tuple(scores.shape)}."
            )
        return scores

    def runner_up(result: Tensor, part: slice) -> tuple[Tensor]:
        scores = scores_of(result)
        check_range(scores, index[part])
        others = scores.scatter(1, index[part, None], float("-inf"))
        return (others.argmax(1),)

    other = check_target(rival, batch, device)
    if other is None:
        (other,) = forward_in_chunks(
            forward_func, images.__getitem__, runner_up,
            torch.arange(batch, device=device), batch, additional_forward_args,
            max_examples_per_batch,
        )
    same = (index == other).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"rival is the target {int(index[same[0]])} itself for the examples {same}."
        )

    def difference(images: Tensor, first: Tensor, second: Tensor, *args: Any) -> Tensor:
        scores = scores_of(check_output(forward_func(images, *args), len(images)))
        contrast = select_target(scores, first) - select_target(scores, second)
        return torch.stack([contrast, -contrast], 1)

    args = index, other, *split_args(additional_forward_args, batch)[0]
    result = insertion_deletion(
        difference, images, attributions, baselines, 0, args, output="identity",
        max_examples_per_batch=max_examples_per_batch, **options,
    )
    all_scores.warn()
    return result


class Areas(NamedTuple):
    """Areas under both curves, and their difference, each of shape (batch,)."""

    insertion: Tensor
    deletion: Tensor
    id_score: Tensor


def keio_areas(result: InsertionDeletion) -> Areas:
    """Areas by the published code of Otsuki et al. 2024, without further forwards.

    The result is one with `protocol="keio"`, and `ties="group"`, or `"nearest"` for
    maps without a moved point: the images of that code are the same, whatever the ties.
    A ValueError is raised if there is no other point but the end.
    """
    if result.insertion_curve.shape[1] < 2:
        raise ValueError("The curves have a single point, and no area.")
    # without the empty image of insertion, and the whole image of deletion
    curves = (result.insertion_curve[:, 1:], result.deletion_curve[:, 1:])
    fractions = _equal_steps(curves[0])
    insertion, deletion = (_area(curve, fractions) for curve in curves)
    return Areas(insertion, deletion, insertion - deletion)


def _equal_steps(curves: Tensor) -> Tensor:
    """Positions of points on the x-axis that are equally far apart."""
    n_points = curves.shape[1]
    fractions = torch.arange(n_points).to(curves) / max(1, n_points - 1)
    return fractions.expand_as(curves)


def _area(curve: Tensor, fractions: Tensor) -> Tensor:
    """Area by the trapezoidal rule, or the value of a single point."""
    if curve.shape[1] == 1:
        return curve[:, 0]
    return torch.trapezoid(curve, fractions, dim=1)


def _normalize(area: Tensor, blank: Tensor, full: Tensor) -> Tensor:
    """Area on the scale from the blank to the whole image."""
    scale = full - blank
    rounding = 10 * torch.finfo(area.dtype).eps * torch.maximum(full.abs(), blank.abs())
    return ((area - blank) / scale).where(scale.abs() > rounding, math.nan)
