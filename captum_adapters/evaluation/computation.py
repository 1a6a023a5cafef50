"""One batch of images: what the network says, maps of methods, and their scores."""

import io
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from captum_adapters.evaluation.config import Evaluation
from captum_adapters.evaluation.data import Loaded, Sample
from captum_adapters.evaluation.grids import Grids
from captum_adapters.evaluation.methods import Attributed, Context, Method
from captum_adapters.evaluation.metrics import (
    Batch,
    MetricSettings,
    adapt,
    load_other,
    measure,
)
from captum_adapters.evaluation.records import Record, RunError
from zennit_resnet.models import Classifier

# side of the pictures and heatmaps that are kept for the report
PICTURE = 112


class Computation:
    """The network, methods and metrics of an evaluation, ready on a device."""

    def __init__(
        self, evaluation: Evaluation, classifier: Classifier, methods: Sequence[Method],
        device: torch.device, grids: Optional[Grids] = None,
    ) -> None:
        self.evaluation, self.classifier = evaluation, classifier
        self.device, self.grids = device, grids
        # names of methods that can be used with the network
        self.worked: set[str] = set()
        # maps that methods still to come have in common, with their images and times
        self.shared: dict[str, tuple[list[str], Attributed, float]] = {}
        self.forward = self._forward(classifier.model.to(device))
        chunk = evaluation.forward_batch
        self.context = context = Context(
            classifier, evaluation.initial, chunk, device, self.forward, self._autocast,
            evaluation.compile,
        )
        self.explainers = {method.text: method.create(context) for method in methods}
        # the last of the methods that have attributions in common
        self.last = {method.attribution: method.text for method in methods}
        self.forwards = {
            name: self._forward(explainer.network)
            for name, explainer in self.explainers.items()
            if explainer.network is not None
        }
        others = {}
        names = [text.partition("=")[0] for text in evaluation.cross]
        for text, name in zip(evaluation.cross, names):
            other = load_other(text)
            # there may be several with other weights
            key = text if names.count(name) > 1 else name
            others[key] = (self._forward(other.model.to(device)), adapt(classifier, other))
        black = classifier.bounds()[0].to(device)
        self.metric_settings = MetricSettings(
            evaluation.step, evaluation.percents, evaluation.rank_by,
            black if evaluation.fill == "black" else torch.zeros_like(black),
            chunk, others=others,
        )

    def _forward(self, model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        """The network for metrics."""
        if self.evaluation.channels_last:
            model.to(memory_format=torch.channels_last)
        size = self.evaluation.forward_batch

        def forward(images: Tensor) -> Tensor:
            with self._autocast():
                return model(images)

        if not self.evaluation.compile:
            return forward
        # weights do not change, so batch normalization and casts are computed once
        freezing: Any = {"freezing": self.device.type == "cpu"}
        network = torch.compile(forward, dynamic=False, options=freezing)

        def padded(images: Tensor) -> Tensor:
            # compiled once for all sizes
            if len(images) >= size:
                return network(images)
            padding = images.new_zeros(size - len(images), *images.shape[1:])
            return network(torch.cat([images, padding]))[: len(images)]

        return padded

    def _autocast(self) -> torch.autocast:
        """Half precision, if that is chosen."""
        amp = self.evaluation.amp
        dtype = None if amp is None else getattr(torch, amp)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def prepare(self, samples: Sequence[Sample], items: Sequence[Loaded]) -> Batch:
        """The images that were read, and what the network says about them."""
        images = torch.stack([item.image for item in items if item.image is not None])
        images = images.to(self.device)
        if self.evaluation.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            output = self.classifier.model(images)
        prediction = output.argmax(1)
        labels = torch.tensor(
            [-1 if sample.label is None else sample.label for sample in samples],
            device=self.device,
        )
        given = labels.where(labels >= 0, prediction)
        options = self.evaluation
        targets = given if options.explain_class == "label" else prediction
        empty = torch.zeros(images.shape[2:], dtype=torch.bool)
        masks = [empty if item.mask is None else item.mask for item in items]
        names = [sample.name for sample in samples]
        mosaics, cells = images.new_empty(len(images), 0), labels.new_empty(len(images), 0)
        if self.grids is not None:
            mosaics, cells = self.grids.make(names, images, labels, output)
        scored = given if options.score == "label" else targets
        published = given if options.published == "label" else targets
        return Batch(
            names, images, output, targets, scored, published,
            torch.stack(masks).to(self.device), labels, mosaics, cells,
        )

    def picture(self, image: Tensor) -> bytes:
        """What the network sees, as a small JPEG."""
        buffer, picture = io.BytesIO(), Image.fromarray(self.classifier.photo(image))
        picture.thumbnail((PICTURE, PICTURE))
        picture.save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    def run_method(self, method: Method, batch: Batch, heatmaps: bool) -> list[Record]:
        """Explain images by a method, and measure that, with small maps if asked for.

        It is a `RunError` if the method cannot be used at all, or memory is short.
        """
        names = batch.names
        try:
            attributed, seconds = self.attribute(method, batch)
            begin = time.perf_counter()
            maps = self.explainers[method.text].process(attributed.maps)
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"{method.text} is out of memory: use a --batch-size below {len(names)},"
                " or a smaller --forward-batch, and another --out"
            ) from error
        except Exception as error:
            if method.text not in self.worked:
                raise failure(method, batch, error) from error
            if len(names) == 1:
                times = {"seconds": 0.0, "metric_seconds": 0.0}
                return [Record(names[0], {"problem": _describe_error(error), **times})]
            # one image may be the reason
            parts = [batch.take([row]) for row in range(len(names))]
            return [self.run_method(method, part, heatmaps)[0] for part in parts]
        self.worked.add(method.text)
        self.synchronize()
        middle = time.perf_counter()
        kept = maps.flatten(1).isfinite().all(1).nonzero()[:, 0].tolist()
        values: dict[str, np.ndarray] = {}
        curves: dict[str, np.ndarray] = {}
        if kept:
            rows = slice(None) if len(kept) == len(names) else kept
            sums = attributed.total, attributed.initial
            total, initial = (None if each is None else each[rows] for each in sums)
            forward = self.forwards.get(method.text, self.forward)
            with torch.no_grad():
                values, curves = measure(
                    self.evaluation.metrics, forward, batch.take(kept), maps[rows],
                    self._settings(method), total, initial,
                )
        self.synchronize()
        times = {
            "seconds": (seconds + middle - begin) / len(names),
            "metric_seconds": (time.perf_counter() - middle) / len(names),
        }
        bad = {"problem": "the map has NaN or infinity", **times}
        records = [Record(name, bad) for name in names]
        for place, row in enumerate(kept):
            scores = {name: float(value[place]) for name, value in values.items()}
            records[row] = Record(
                names[row],
                {"problem": None, **times, **scores},
                {name: curve[place] for name, curve in curves.items()},
                _thumbnail(maps[row]) if heatmaps else None,
            )
        return records

    def _settings(self, method: Method) -> MetricSettings:
        """Settings of metrics that need more maps of a method, or its network."""
        explainer = self.explainers[method.text]

        def explain(images: Tensor, classes: Tensor, names: Sequence[str]) -> Tensor:
            # an output is for what relevance starts from, which is not kept here
            output = images.new_zeros(len(images), len(self.classifier.classes))
            return explainer(images, classes, output, names)

        model = explainer.network or self.classifier.model
        return self.metric_settings._replace(explain=explain, model=model)

    def attribute(self, method: Method, batch: Batch) -> tuple[Attributed, float]:
        """Maps before post-processing, of this method or one before it, and their time."""
        key = f"{method.attribution} {batch.names[0]}"
        names, attributed, seconds = self.shared.pop(key, ([], None, 0.0))
        # the last digits may depend on which images are computed together
        if attributed is None or names != batch.names:
            self.synchronize()
            begin = time.perf_counter()
            attributed = self.explainers[method.text].attribute(
                batch.images, batch.targets, batch.output, batch.names
            )
            self.synchronize()
            seconds = time.perf_counter() - begin
        if self.last[method.attribution] != method.text:
            self.shared[key] = (batch.names, attributed, seconds)
        return attributed, seconds

    def synchronize(self) -> None:
        """Wait for the device, which times need."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _describe_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def failure(method: Method, batch: Batch, error: Exception) -> RunError:
    """A method that cannot be used."""
    return RunError(
        f"{method.text} fails on {batch.names[0]} ({_describe_error(error)}): leave it out"
        " of --methods, or change its options"
    )


def _thumbnail(heatmap: Tensor) -> np.ndarray:
    """A small map in 8 bit, in which zero stays zero."""
    # magnitudes at the limit of the range would overflow when they are averaged
    values = _normalize(heatmap.detach().float())[None]
    size = (min(PICTURE, heatmap.shape[0]), min(PICTURE, heatmap.shape[1]))
    values = _normalize(F.adaptive_avg_pool2d(values, size)[0])
    return (values * 127).round().to(torch.int8).cpu().numpy()


def _normalize(values: Tensor) -> Tensor:
    """Divide by the largest magnitude, if there is any."""
    return values / values.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
