"""Metrics of an evaluation by name, as scores and curves of each example.

A new metric is a function in :data:`METRICS`, and its name and columns in
:mod:`captum_adapters.evaluation.columns`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from captum_adapters.evaluation.columns import TOP
from captum_adapters.metrics import (
    NegativeMapWarning,
    class_sensitivity,
    conservation_gap,
    contrastive_insertion_deletion,
    cross_model_accuracy,
    grid_pointing,
    insertion_deletion,
    keio_areas,
    mask_distance,
    mask_pointing,
    pixel_accuracy,
    randomization,
)
from captum_adapters.metrics._ranking import tied_pixels
from zennit_resnet.models import Classifier, load_classifier
from zennit_resnet.postprocess import attention_errors

# Tensors of shape (batch,) by column, and of shape (batch, points) by name of a curve
Scores = tuple[dict[str, Tensor], dict[str, Tensor]]
Forward = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """Images of a batch that can be used, and what the network says about them."""

    names: list[str]  # of their samples
    images: Tensor  # network inputs of shape (batch, channels, height, width)
    output: Tensor  # of the network, of shape (batch, classes)
    targets: Tensor  # class to explain, of shape (batch,)
    scored: Tensor  # class whose score is measured
    published: Tensor  # the same for published protocols
    masks: Tensor  # bool of shape (batch, height, width), empty without an object
    labels: Tensor  # class of the data set, -1 if unknown
    # see `grids`, of no pixels and cells if they are not needed
    mosaics: Tensor  # of shape (batch, channels, height, width)
    cells: Tensor  # classes of shape (batch, rows, columns), -1 for unfit images

    def take(self, rows: list[int]) -> "Batch":
        """Some of the images. All of them are not copied."""
        if len(rows) == len(self.names):
            return self
        return Batch([self.names[row] for row in rows], *(each[rows] for each in self[1:]))


class MetricSettings(NamedTuple):
    """Settings of metrics, see :class:`captum_adapters.evaluation.Evaluation`."""

    step: int = 500
    percents: tuple[float, ...] = (1, 5, 10)
    rank_by: str = "magnitude"
    fill: Optional[Tensor] = None  # of shape (1, channels, 1, 1)
    forward_batch: int = 32
    # the method: maps of shape (batch, height, width) of inputs, classes and names
    explain: Optional[Callable[[Tensor, Tensor, Sequence[str]], Tensor]] = None
    model: Optional[torch.nn.Module] = None  # that it explains
    # networks by name, with the function that makes their inputs
    others: Mapping[str, tuple[Forward, Callable[[Tensor], Tensor]]] = {}

    @property
    def absolute(self) -> bool:
        """Whether the top pixels are those of the largest magnitude."""
        return self.rank_by == "magnitude"

    def curves(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function that measures curves, with points and baselines of the settings."""
        own = {"baselines": self.fill, "step": self.step}
        return function(*args, max_examples_per_batch=self.forward_batch, **{**own, **options})

    def keep(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function that makes images with only the top pixels."""
        return function(
            *args, absolute=self.absolute, baselines=self.fill,
            max_examples_per_batch=self.forward_batch, **options,
        )


# -- insertion and deletion ------------------------------------------------------------


def _area_scores(result: Any, suffix: str = "") -> dict[str, Tensor]:
    names = {"insertion": "insertion", "deletion": "deletion", "id": "id_score"}
    return {f"{name}{suffix}": getattr(result, field) for name, field in names.items()}


def _insertion_deletion(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Insertion and deletion by our protocol and the ratio paper's code, at once."""
    measured = partial(settings.curves, insertion_deletion, forward, protocol="keio")
    result = measured(batch.images, maps, target=batch.scored, ties="nearest")
    published = keio_areas(result)
    # numbers of pixels at the points of the published code
    pixels, step = maps[0].numel(), settings.step
    grid = (step * torch.arange(1, math.ceil(pixels / step) + 1)).clamp(max=pixels - 1)
    grid = grid.to(maps.device) + 1
    # the same images, unless ties move points or another class is scored
    other = (result.selected[:, 1:] != grid).any(1) | (batch.published != batch.scored)
    if bool(other.any()):
        again = measured(batch.images[other], maps[other], target=batch.published[other])
        for area, name in zip(published, ("insertion", "deletion", "id_score")):
            area[other] = getattr(again, name)
    kept = ("tied_share", "distinct_levels", "score_full", "score_blank")
    scores = {name: getattr(result, name) for name in kept}
    curves = {
        "fractions": result.fractions,
        "insertion": result.insertion_curve,
        "deletion": result.deletion_curve,
    }
    return {**_area_scores(result), **_area_scores(published, "_keio"), **scores}, curves


def _published(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings, protocol: str
) -> Scores:
    """Insertion and deletion by a protocol that needs images of its own."""
    # RISE deletes to 0 after normalization, in steps of its own
    own = {"baselines": None, "step": None} if protocol == "rise" else {}
    result = settings.curves(
        insertion_deletion, forward, batch.images, maps, target=batch.published,
        protocol=protocol, **own,
    )
    return _area_scores(result, f"_{protocol}"), {}


# -- the top p % of pixels -------------------------------------------------------------


def _top(
    settings: MetricSettings, result: Any, scores: dict[str, Tensor], curves: dict[str, Tensor]
) -> Scores:
    """Add the percentages, and the share of ties in what pixels are ranked by."""
    ties = f"tied_share{'_magnitude' * settings.absolute}"
    percents = torch.tensor(settings.percents, dtype=torch.float64)
    percents = percents.expand(len(result.tied_share), -1)
    return {**scores, ties: result.tied_share}, {"percents": percents, **curves}


def _accuracy(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Accuracy with the top p % of pixels."""
    result = settings.keep(
        pixel_accuracy, forward, batch.images, maps, settings.percents, batch.scored
    )
    accuracy = result.accuracy
    return _top(settings, result, {"accuracy": accuracy.mean(1)}, {"accuracy": accuracy})


def _cross(forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings) -> Scores:
    """Accuracy of other networks with the top p % of pixels."""
    curves: dict[str, Tensor] = {}
    for name, (other, transform) in settings.others.items():
        result = settings.keep(
            cross_model_accuracy, other, batch.images, maps, settings.percents,
            transform=transform, reference="prediction",
        )
        curves[f"cross_accuracy:{name}"] = result.accuracy
    scores = {"cross_accuracy": torch.stack([*curves.values()]).mean((0, 2))}
    return _top(settings, result, scores, curves)


def _pointing(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Share of the top p % of pixels in the mask."""
    percents, absolute = settings.percents, settings.absolute
    result = mask_pointing(maps, batch.masks, percents, absolute=absolute)
    scores = {
        "pointing": result.share.mean(1),
        "pointing_chance": result.chance.where(~result.empty, math.nan),
    }
    ceiling = result.ceiling.masked_fill(result.empty[:, None], math.nan)
    curves = {"pointing": result.share, "pointing_ceiling": ceiling}
    return _top(settings, result, scores, curves)


def _distance(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Mean distance of the top p % of pixels to the mask."""
    percents, absolute = settings.percents, settings.absolute
    result = mask_distance(maps, batch.masks, percents, absolute=absolute)
    scores = {"distance": result.distance.mean(1), "distance_chance": result.chance}
    return _top(settings, result, scores, {"distance": result.distance})


def _attention(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Types of errors of what is attended."""
    result = attention_errors(maps, batch.masks)
    scores = {f"attention_{name}": value.double() for name, value in result._asdict().items()}
    missing = result.coverage.isnan()
    return {name: value.masked_fill(missing, math.nan) for name, value in scores.items()}, {}


# -- evidence for a class --------------------------------------------------------------


def _contrastive(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Insertion and deletion of a class minus the runner-up."""
    result = settings.curves(
        contrastive_insertion_deletion, forward, batch.images, maps, target=batch.scored,
        protocol="keio", ties="nearest",
    )
    return {"contrastive_id": result.id_score}, {}


def _explain(
    settings: MetricSettings, images: Tensor, classes: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Maps of other images or classes, zero where not finite, and where they are finite."""
    assert settings.explain is not None
    with torch.enable_grad():
        maps = settings.explain(images, classes, batch.names).detach()
    finite = maps.flatten(1).isfinite().all(1)
    return maps.where(finite[:, None, None], 0), finite


def _sensitivity(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Similarity with maps of the most probable other class."""
    rivals = batch.output.scatter(1, batch.targets[:, None], -math.inf).argmax(1)
    others, finite = _explain(settings, batch.images, rivals, batch)
    result = class_sensitivity(maps, others)
    similar = {"class_pearson": result.pearson, "class_ssim": result.ssim}
    return {name: value.where(finite, math.nan) for name, value in similar.items()}, {}


def _grid(forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings) -> Scores:
    """Positive relevance in the own cell of a mosaic."""
    share, chance = batch.output.new_full((2, len(maps)), math.nan, dtype=torch.float64)
    fit = (batch.cells.flatten(1) >= 0).all(1).nonzero()[:, 0].tolist()
    if fit:
        part = batch.take(fit)
        found, finite = _explain(settings, part.mosaics, part.labels, part)
        result = grid_pointing(found, part.cells, part.labels)
        share[fit] = result.share.where(finite, math.nan)
        chance[fit] = result.chance.where(finite, math.nan)
    return {"grid_pointing": share, "grid_pointing_chance": chance}, {}


def _randomized(
    forward: Forward, batch: Batch, maps: Tensor, settings: MetricSettings
) -> Scores:
    """Similarity with maps of the network with a random last layer."""
    assert settings.model is not None
    *_, last = (
        name
        for name, module in settings.model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    )
    failed = []

    def explain(model: torch.nn.Module) -> Tensor:
        found, finite = _explain(settings, batch.images, batch.targets, batch)
        failed.append(~finite)
        return found

    result = randomization(settings.model, explain, [last])
    ssim = result.ssim[:, 0].masked_fill(torch.stack(failed).any(0), math.nan)
    return {"random_ssim": ssim}, {}


METRICS: dict[str, Callable[[Forward, Batch, Tensor, MetricSettings], Scores]] = {
    "insertion_deletion": _insertion_deletion,
    "rise": partial(_published, protocol="rise"),
    "c3": partial(_published, protocol="c3"),
    "accuracy": _accuracy,
    "cross": _cross,
    "pointing": _pointing,
    "distance": _distance,
    "attention": _attention,
    "contrastive": _contrastive,
    "grid_pointing": _grid,
    "class_sensitivity": _sensitivity,
    "randomization": _randomized,
}


def measure(
    names: Sequence[str], forward: Forward, batch: Batch, maps: Tensor,
    settings: MetricSettings, relevance: Optional[Tensor] = None,
    initial: Optional[Tensor] = None,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float32]]]:
    """Measure finite maps of shape (batch, height, width), see :data:`Scores`.

    `relevance` of shape (batch,) is the sum of relevance before any post-processing, and
    `initial` of shape (batch, classes) what it started from, for methods that conserve it.
    """
    values: dict[str, Tensor] = {}
    curves: dict[str, Tensor] = {}
    if "conservation" in names and relevance is not None and initial is not None:
        values["relevance_sum"], values["initial"] = relevance, initial.sum(1)
        values["gap"] = conservation_gap(relevance[:, None], initial)
    flat = maps.flatten(1)
    # constant maps have no order that could be reversed
    values["negative"] = (flat.amax(1) <= 0) & (flat.amin(1) < flat.amax(1))
    with warnings.catch_warnings():
        # counted instead
        warnings.simplefilter("ignore", NegativeMapWarning)
        if "insertion_deletion" not in names and {*names} & {*TOP}:
            ordered = flat.sort(1).values
            values["tied_share"] = tied_pixels(ordered).double().mean(1)
            values["distinct_levels"] = 1 + (ordered.diff(dim=1) != 0).sum(1)
        for name in names:
            if name in METRICS:
                scores = METRICS[name](forward, batch, maps, settings)
                values.update(scores[0])
                curves.update(scores[1])
    return (
        {name: value.cpu().double().numpy() for name, value in values.items()},
        {name: curve.cpu().float().numpy() for name, curve in curves.items()},
    )


# -- other networks --------------------------------------------------------------------


def load_other(text: str) -> Classifier:
    """Load another network `NAME=WEIGHTS`."""
    name, _, weights = text.partition("=")
    if not weights:
        raise ValueError(f"{text!r} is not of the form NAME=WEIGHTS, such as vgg16=DEFAULT")
    return load_classifier(name, weights)


def adapt(source: Classifier, target: Classifier) -> Callable[[Tensor], Tensor]:
    """Function from images of a network to those of another one's size and mean."""
    size = input_size(target)

    def transform(images: Tensor) -> Tensor:
        values = source.mean, source.std, target.mean, target.std
        mean, std, other_mean, other_std = (value.to(images) for value in values)
        if list(images.shape[-2:]) != size:
            images = functional.resize(images, size, antialias=True)
        if torch.equal(mean, other_mean) and torch.equal(std, other_std):
            return images
        return (images * std + mean - other_mean) / other_std

    return transform


def input_size(classifier: Classifier) -> list[int]:
    """Height and width of a network's inputs."""
    return list(classifier.transform(Image.new("RGB", (256, 256))).shape[-2:])
