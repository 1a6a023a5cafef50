"""Metrics of an evaluation by name, as scores and curves of each example."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from captum_adapters.metrics import (
    PERCENTS,
    InsertionDeletion,
    NegativeMapWarning,
    conservation_gap,
    cross_model_accuracy,
    insertion_deletion,
    keio_areas,
    mask_distance,
    mask_pointing,
    pixel_accuracy,
)
from captum_adapters.metrics._perturbation import count_grid
from captum_adapters.metrics._ranking import sort_scores, tied_pixels
from zennit_resnet.postprocess import attention_errors


class Column(NamedTuple):
    """A score in a table.

    Attributes:

        title (str): Short title.
        better (str or None): `"higher"` or `"lower"`, `None` if neither is better.
        protocol (str): `"default"` for ours, or the published one.
        about (str): What it is, in one sentence.
    """

    title: str
    better: Optional[str]
    protocol: str
    about: str


def _areas(protocol: str, about: str, suffix: str = "") -> dict[str, Column]:
    """The three columns of insertion and deletion."""
    return {
        f"insertion{suffix}": Column(
            "Insertion", "higher", protocol, f"Area under the insertion curve, {about}."
        ),
        f"deletion{suffix}": Column(
            "Deletion", "lower", protocol, f"Area under the deletion curve, {about}."
        ),
        f"id{suffix}": Column(
            "ID", "higher", protocol, f"Insertion minus deletion, {about}."
        ),
    }


#: All scores by the names that they have in records.
COLUMNS: dict[str, Column] = {
    **_areas("default", "each pixel counted, with both ends, equal pixels together"),
    **_areas("keio", "by the published code of Otsuki et al. 2024", "_keio"),
    **_areas("rise", "by the published code of RISE", "_rise"),
    **_areas("c3", "by the text of C³-LRP", "_c3"),
    "accuracy": Column(
        "Accuracy",
        "higher",
        "default",
        "Share of images of which the class is found with only the top p % of pixels,"
        " mean over p, and over orders of equal pixels.",
    ),
    "cross_accuracy": Column(
        "Cross accuracy",
        "higher",
        "default",
        "The same for another network that is given the pixels, mean over p.",
    ),
    "pointing": Column(
        "Pointing",
        "higher",
        "default",
        "Share of the top p % of pixels that is inside of the mask, mean over p, and"
        " over orders of equal pixels.",
    ),
    "pointing_chance": Column(
        "Mask share", None, "default", "Share of the mask: pointing by chance."
    ),
    "distance": Column(
        "Distance",
        "lower",
        "default",
        "Mean distance of the top p % of pixels to the mask, in image diagonals, mean"
        " over p, and over orders of equal pixels.",
    ),
    "distance_chance": Column(
        "Mean distance", None, "default", "Mean distance of all pixels to the mask."
    ),
    "attention_coverage": Column(
        "Covered",
        None,
        "default",
        "Share of the object that is attended: where the map is above its mean.",
    ),
    "attention_precision": Column(
        "Focused", None, "default", "Share of what is attended that is on the object."
    ),
    "attention_correct": Column(
        "Correct",
        "higher",
        "default",
        "Share of images where half of the object is attended, and half of what is"
        " attended is on the object.",
    ),
    "attention_insufficient": Column(
        "Insufficient",
        None,
        "default",
        "Share of images where only the first is not so: too little is attended.",
    ),
    "attention_over": Column(
        "Over",
        None,
        "default",
        "Share of images where only the second is not so: too much is attended.",
    ),
    "attention_wrong": Column(
        "Wrong", None, "default", "Share of images where neither is so."
    ),
    "gap": Column(
        "Gap",
        None,
        "default",
        "Relevance gained (or lost, if negative) on the way, relative to the initial.",
    ),
    "relevance_sum": Column("Sum", None, "default", "Sum of relevance."),
    "initial": Column("Initial", None, "default", "Relevance at the output."),
    "tied_share": Column(
        "Ties", None, "default", "Share of pixels with the same value as another one."
    ),
    "tied_share_magnitude": Column(
        "Ties in magnitude",
        None,
        "default",
        "The same for magnitudes, if accuracy, pointing and distance rank by these.",
    ),
    "distinct_levels": Column(
        "Levels", None, "default", "Number of distinct values of a map."
    ),
    "negative": Column(
        "Negative maps", None, "default", "Share of maps without any positive value."
    ),
    "score_full": Column("Whole", None, "default", "Probability for the whole image."),
    "score_blank": Column("Blank", None, "default", "Probability for a blank image."),
}


class Scores(NamedTuple):
    """What a metric gives for a batch.

    Attributes:

        values (dict): Tensors of shape (batch,) by the name of a column.
        curves (dict): Tensors of shape (batch, points) by name.
    """

    values: dict[str, Tensor]
    curves: dict[str, Tensor]


class Batch(NamedTuple):
    """Images of which maps are measured.

    Attributes:

        images (Tensor): Network inputs of shape (batch, channels, height, width).
        scored (Tensor): Class whose score is measured, of shape (batch,).
        published (Tensor): The same for published protocols, of shape (batch,).
        masks (Tensor): Masks of objects, bool of shape (batch, height, width). Without
                an object, empty.
    """

    images: Tensor
    scored: Tensor
    published: Tensor
    masks: Tensor


class MetricSettings(NamedTuple):
    """Settings of metrics.

    Attributes:

        step (int): Number of pixels between two points of curves.
        percents (tuple): Percentages p of the top p %.
        rank_by (str): `"value"` or `"magnitude"` of the sum over channels, for
                accuracy, pointing and distance.
        fill (Tensor): What deleted pixels are replaced with, of shape (1, channels, 1,
                1).
        forward_batch (int): Number of images in a forward pass.
        others (dict): Further networks by name, each with the function that makes their
                inputs out of images of the evaluated one.
    """

    step: int = 500
    percents: tuple[float, ...] = PERCENTS
    rank_by: str = "magnitude"
    fill: Optional[Tensor] = None
    forward_batch: int = 32
    others: Mapping[
        str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    ] = {}


Forward = Callable[[Tensor], Tensor]


def _insertion_deletion(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Insertion and deletion by our protocol and the ratio paper's code, at once."""

    def curves(
        images: Tensor, maps: Tensor, target: Tensor, ties: Optional[str]
    ) -> InsertionDeletion:
        return insertion_deletion(
            forward,
            images,
            maps,
            settings.fill,
            target,
            protocol="keio",
            ties=ties,
            step=settings.step,
            max_examples_per_batch=settings.forward_batch,
        )

    result = curves(batch.images, maps, batch.scored, "nearest")
    published = keio_areas(result)
    grid = count_grid(maps[0].numel(), None, settings.step, ends=False).to(maps.device)
    # the same images, unless ties move points or another class is scored
    other = (result.selected[:, 1:] != grid).any(1) | (batch.published != batch.scored)
    if bool(other.any()):
        again = curves(batch.images[other], maps[other], batch.published[other], None)
        for area, name in zip(published, ("insertion", "deletion", "id_score")):
            area[other] = getattr(again, name)
    return Scores(
        {
            "insertion": result.insertion,
            "deletion": result.deletion,
            "id": result.id_score,
            "insertion_keio": published.insertion,
            "deletion_keio": published.deletion,
            "id_keio": published.id_score,
            "tied_share": result.tied_share,
            "distinct_levels": result.distinct_levels,
            "score_full": result.score_full,
            "score_blank": result.score_blank,
        },
        {
            "fractions": result.fractions,
            "insertion": result.insertion_curve,
            "deletion": result.deletion_curve,
        },
    )


def _published(protocol: str) -> Callable[[Forward, Batch, Tensor, MetricSettings], Scores]:
    """Insertion and deletion by a protocol that needs images of its own."""

    def measure(
        forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
    ) -> Scores:
        result = insertion_deletion(
            forward,
            batch.images,
            maps,
            # RISE deletes to 0 after normalization
            None if protocol == "rise" else settings.fill,
            batch.published,
            protocol=protocol,
            step=None if protocol == "rise" else settings.step,
            max_examples_per_batch=settings.forward_batch,
        )
        return Scores(
            {
                f"insertion_{protocol}": result.insertion,
                f"deletion_{protocol}": result.deletion,
                f"id_{protocol}": result.id_score,
            },
            {},
        )

    return measure


def _ties(tied_share: Tensor, settings: MetricSettings) -> dict[str, Tensor]:
    """The share of ties in what accuracy, pointing and distance rank by."""
    suffix = "_magnitude" if settings.rank_by == "magnitude" else ""
    return {f"tied_share{suffix}": tied_share}


def _percents(settings: MetricSettings, like: Tensor) -> Tensor:
    """Percentages as a curve's positions, of the shape of the curve."""
    return torch.tensor(settings.percents, dtype=torch.float64).expand(len(like), -1)


def _accuracy(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Accuracy with the top p % of pixels."""
    result = pixel_accuracy(
        forward,
        batch.images,
        maps,
        settings.percents,
        batch.scored,
        absolute=settings.rank_by == "magnitude",
        baselines=settings.fill,
        max_examples_per_batch=settings.forward_batch,
    )
    accuracy = result.accuracy
    return Scores(
        {"accuracy": accuracy.mean(1), **_ties(result.tied_share, settings)},
        {"percents": _percents(settings, accuracy), "accuracy": accuracy},
    )


def _cross(forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings) -> Scores:
    """Accuracy of other networks with the top p % of pixels."""
    curves: dict[str, Tensor] = {}
    for name, (other, transform) in settings.others.items():
        result = cross_model_accuracy(
            other,
            batch.images,
            maps,
            settings.percents,
            reference="prediction",
            absolute=settings.rank_by == "magnitude",
            baselines=settings.fill,
            transform=transform,
            max_examples_per_batch=settings.forward_batch,
        )
        curves[f"cross_accuracy:{name}"] = result.accuracy
    every = torch.stack([*curves.values()])
    curves["percents"] = _percents(settings, every[0])
    return Scores(
        {"cross_accuracy": every.mean((0, 2)), **_ties(result.tied_share, settings)},
        curves,
    )


def _pointing(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Share of the top p % of pixels in the mask."""
    result = mask_pointing(
        maps, batch.masks, settings.percents, absolute=settings.rank_by == "magnitude"
    )
    return Scores(
        {
            "pointing": result.share.mean(1),
            "pointing_chance": result.chance.where(~result.empty, math.nan),
            **_ties(result.tied_share, settings),
        },
        {
            "percents": _percents(settings, result.share),
            "pointing": result.share,
            "pointing_ceiling": result.ceiling.masked_fill(
                result.empty[:, None], math.nan
            ),
        },
    )


def _distance(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Mean distance of the top p % of pixels to the mask."""
    result = mask_distance(
        maps, batch.masks, settings.percents, absolute=settings.rank_by == "magnitude"
    )
    return Scores(
        {
            "distance": result.distance.mean(1),
            "distance_chance": result.chance,
            **_ties(result.tied_share, settings),
        },
        {"percents": _percents(settings, result.distance), "distance": result.distance},
    )


def _attention(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Types of errors of what is attended."""
    result = attention_errors(maps, batch.masks)._asdict()
    missing = result["coverage"].isnan()
    return Scores(
        {
            f"attention_{name}": value.double().masked_fill(missing, math.nan)
            for name, value in result.items()
        },
        {},
    )


METRICS: dict[str, Callable[[Forward, Batch, Tensor, MetricSettings], Scores]] = {
    "insertion_deletion": _insertion_deletion,
    "rise": _published("rise"),
    "c3": _published("c3"),
    "accuracy": _accuracy,
    "cross": _cross,
    "pointing": _pointing,
    "distance": _distance,
    "attention": _attention,
}
# conservation is measured on relevance before any post-processing, by whom computes it
NAMES = (*METRICS, "conservation")
DEFAULT = ("insertion_deletion", "conservation")
# of the top p % of pixels, of which tied ones are divided
TOP = ("accuracy", "cross", "pointing", "distance")
# not defined without a mask
MASKED = ("pointing", "distance", "attention")


def check_metrics(names: Sequence[str]) -> None:
    """Check names of metrics.

    Args:

        names (sequence of str): The names.

    Raises:
        ValueError: If one is unknown, named twice, or there is none.
    """
    if not names:
        raise ValueError(f"there are no metrics: choose among {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"unknown metric {name!r}: choose among {', '.join(NAMES)}"
            )
        if [*names].count(name) > 1:
            raise ValueError(f"metric {name!r} is named twice")


def measure(
    names: Sequence[str],
    forward: Forward,
    batch: Batch,
    maps: Tensor,
    settings: MetricSettings,
    relevance: Optional[Tensor] = None,
    initial: Optional[Tensor] = None,
) -> list[tuple[dict[str, float], dict[str, np.ndarray]]]:
    """Measure maps.

    Args:

        names (sequence of str): Names of metrics among :data:`NAMES`.
        forward (callable): The network, from images to outputs of shape (batch,
                classes).
        batch (Batch): The images.
        maps (Tensor): Finite maps of shape (batch, height, width).
        settings (MetricSettings): Settings of metrics.
        relevance (Tensor, optional): Sums of relevance of shape (batch,), before
                post-processing.
                Default: None
        initial (Tensor, optional): Initial relevance of shape (batch,). For methods
                without, conservation is not measured.
                Default: None

    Returns:
        list: For each example, scores by column, and curves as float32 arrays of shape
        (points,).
    """
    values: dict[str, Tensor] = {}
    curves: dict[str, Tensor] = {}
    if "conservation" in names and relevance is not None and initial is not None:
        values["relevance_sum"], values["initial"] = relevance, initial
        values["gap"] = conservation_gap(relevance[:, None], initial)
    flat = maps.flatten(1)
    # constant maps have no order that could be reversed
    values["negative"] = (flat.amax(1) <= 0) & (flat.amin(1) < flat.amax(1))
    with warnings.catch_warnings():
        # counted instead
        warnings.simplefilter("ignore", NegativeMapWarning)
        if "insertion_deletion" not in names and {*names} & {*TOP}:
            ordered, _ = sort_scores(maps)
            values["tied_share"] = tied_pixels(ordered).double().mean(1)
            values["distinct_levels"] = 1 + (ordered.diff(dim=1) != 0).sum(1)
        for name in names:
            if name in METRICS:
                scores = METRICS[name](forward, batch, maps, settings)
                values.update(scores.values)
                curves.update(scores.curves)
    columns = {name: value.double().tolist() for name, value in values.items()}
    arrays = {name: curve.float().cpu().numpy() for name, curve in curves.items()}
    return [
        (
            {name: column[row] for name, column in columns.items()},
            {name: array[row] for name, array in arrays.items()},
        )
        for row in range(len(maps))
    ]
