"""Images of a block: what the network says about them, and records of their maps."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from captum_adapters.evaluation.baselines import Context
from captum_adapters.evaluation.datasets import Loaded, Sample
from captum_adapters.evaluation.measures import Batch, MetricSettings, measure
from captum_adapters.evaluation.methods import Explained, Method
from captum_adapters.evaluation.records import Record, RunError
from captum_adapters.evaluation.settings import Evaluation, adapt, load_other
from zennit_resnet.models import Classifier

# side of the pictures and heatmaps that are kept for the report
PICTURE = 112


class Attributed(NamedTuple):
    """Maps of a block before post-processing.

    Attributes:

        rows (list[int]): Images of the block that went through the network together.
        explained (Explained): Their maps.
        seconds (float): Time that these took.
    """

    rows: list[int]
    explained: Explained
    seconds: float


@dataclass
class Block:
    """Images of a block that can be used, and classes.

    Attributes:

        valid (list[int]): Their places in the block.
        names (list[str]): Names of their samples.
        problems (dict): Reasons by name of the sample for which others can not be used.
        images (Tensor): Network inputs of shape (n, 3, height, width).
        output (Tensor): Output of the network, of shape (n, classes).
        explained (Tensor): Class to explain, of shape (n,).
        scored (Tensor): Class whose score is measured, of shape (n,).
        published (Tensor): The same for published protocols, of shape (n,).
        masks (Tensor): Bool of shape (n, height, width), empty where there is none.
        attributed (dict): Maps that methods still to come have in common, by
                :attr:`Method.attribution`.
    """

    valid: list[int]
    names: list[str]
    problems: dict[str, Optional[str]]
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    explained: Tensor = field(default_factory=lambda: torch.empty(0))
    scored: Tensor = field(default_factory=lambda: torch.empty(0))
    published: Tensor = field(default_factory=lambda: torch.empty(0))
    masks: Tensor = field(default_factory=lambda: torch.empty(0))
    attributed: dict[str, Attributed] = field(default_factory=dict)


class Computation:
    """The network, methods and metrics of an evaluation, ready on a device.

    Args:

        evaluation (Evaluation): What is evaluated.
        classifier (Classifier): The network, which is moved to the device.
        methods (sequence of Method): The methods.
        device (torch.device): The device.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        classifier: Classifier,
        methods: Sequence[Method],
        device: torch.device,
    ) -> None:
        self.evaluation = evaluation
        self.classifier = classifier
        self.device = device
        # names of methods that can be used with the network
        self.worked: set[str] = set()
        model = classifier.model.to(device)
        if evaluation.channels_last:
            model.to(memory_format=torch.channels_last)
        self.forward = self._forward(model)
        context = Context(
            classifier,
            evaluation.initial,
            evaluation.forward_batch,
            device,
            self.forward,
            self._autocast,
        )
        self.explainers = {
            method.text: method.create(context) for method in methods
        }
        # the last of the methods that have attributions in common
        self.last = {method.attribution: method.text for method in methods}
        self.forwards = {
            name: self._forward(explainer.network)
            for name, explainer in self.explainers.items()
            if explainer.network is not None
        }
        black = classifier.bounds()[0].to(device)
        others = {}
        names = [text.partition("=")[0] for text in evaluation.cross]
        for text in evaluation.cross:
            name, other = load_other(text)
            other.model.to(device)
            # there may be several with other weights
            key = text if names.count(name) > 1 else name
            others[key] = (self._forward(other.model), adapt(classifier, other))
        self.metric_settings = MetricSettings(
            evaluation.step,
            evaluation.percents,
            evaluation.rank_by,
            black if evaluation.fill == "black" else torch.zeros_like(black),
            evaluation.forward_batch,
            others,
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

    def block(self, samples: Sequence[Sample], items: Sequence[Loaded]) -> Block:
        """Images that can be used, with what the network says about them.

        Args:

            samples (sequence of Sample): The samples of the block.
            items (sequence of Loaded): What was read of each.

        Returns:
            Block: The images on the device.
        """
        problems = {
            sample.name: sample.problem or item.problem
            for sample, item in zip(samples, items)
            if item.image is None or sample.problem is not None
        }
        valid = [
            row for row, sample in enumerate(samples) if sample.name not in problems
        ]
        if not valid:
            return Block([], [], problems)
        tensors = [items[row].image for row in valid]
        images = torch.stack([image for image in tensors if image is not None])
        images = images.to(self.device)
        if self.evaluation.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            output = self.classifier.model(images)
        prediction = output.argmax(1)
        labels = [samples[row].label for row in valid]
        given = torch.tensor([-1 if label is None else label for label in labels])
        given = given.to(self.device)
        given = given.where(given >= 0, prediction)
        explained = given if self.evaluation.explain == "label" else prediction
        scored = given if self.evaluation.score == "label" else explained
        published = given if self.evaluation.published == "label" else explained
        height, width = images.shape[2:]
        masks = [items[row].mask for row in valid]
        empty = torch.zeros(height, width, dtype=torch.bool)
        stacked = torch.stack([empty if mask is None else mask for mask in masks])
        return Block(
            valid,
            [samples[row].name for row in valid],
            problems,
            images,
            output,
            explained,
            scored,
            published,
            stacked.to(self.device),
        )

    def explain(
        self, method: Method, block: Block, rows: list[int], heatmaps: bool
    ) -> list[Record]:
        """Explain some images of a block by a method, and measure that.

        Methods that only differ in their post-processing share the maps before it. The
        time of these counts for each of them, as if it was the only one.

        Args:

            method (Method): The method.
            block (Block): The images.
            rows (list[int]): Which of them.
            heatmaps (bool): Whether to keep small maps.

        Returns:
            list[Record]: A record of each.

        Raises:
            RunError: If the method can not be used at all, or memory is short.
        """
        select = slice(None) if len(rows) == len(block.names) else rows
        images = block.images[select]
        names = [block.names[row] for row in rows]
        try:
            attributed = self._attribute(method, block, rows, images)
            begin = time.perf_counter()
            maps, total, initial = self.explainers[method.text].process(
                attributed.explained
            )
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"{method.text} is out of memory: use a --batch-size below {len(rows)},"
                " or a smaller --forward-batch"
            ) from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if method.text not in self.worked:
                raise RunError(
                    f"{method.text} fails on {names[0]} ({reason}): leave it out of"
                    " --methods or change its options, and choose another --out"
                ) from error
            if len(rows) == 1:
                return [Record(names[0], method.text, reason, {}, {})]
            # one image may be the reason
            return [self.explain(method, block, [row], heatmaps)[0] for row in rows]
        self.worked.add(method.text)
        self._synchronize()
        middle = time.perf_counter()
        finite = maps.flatten(1).isfinite().all(1)
        kept = finite.nonzero()[:, 0]
        results: list[tuple[dict[str, float], dict[str, np.ndarray]]] = []
        if len(kept):
            every = len(kept) == len(maps)
            part = slice(None) if every else kept
            batch = Batch(
                images[part],
                block.scored[select][part],
                block.published[select][part],
                block.masks[select][part],
            )
            with torch.no_grad():
                results = measure(
                    self.evaluation.metrics,
                    self.forwards.get(method.text, self.forward),
                    batch,
                    maps[part],
                    self.metric_settings,
                    None if total is None else total[part],
                    None if initial is None else initial[part],
                )
        self._synchronize()
        seconds = (attributed.seconds + middle - begin) / len(rows)
        metric_seconds = (time.perf_counter() - middle) / len(rows)
        records, found = [], iter(results)
        for row, name in enumerate(names):
            problem: Optional[str] = "the map has NaN or infinity"
            heatmap: Optional[np.ndarray] = None
            values: dict[str, float] = {}
            curves: dict[str, np.ndarray] = {}
            if bool(finite[row]):
                problem, (values, curves) = None, next(found)
                heatmap = _thumbnail(maps[row]) if heatmaps else None
            records.append(
                Record(
                    name,
                    method.text,
                    problem,
                    values,
                    curves,
                    heatmap,
                    seconds,
                    metric_seconds,
                )
            )
        return records

    def _attribute(
        self, method: Method, block: Block, rows: list[int], images: Tensor
    ) -> Attributed:
        """Maps before post-processing, of this method or one before it."""
        found = block.attributed.pop(method.attribution, None)
        # the last digits may depend on which images are computed together
        if found is None or found.rows != rows:
            self._synchronize()
            begin = time.perf_counter()
            explained = self.explainers[method.text].explain(
                images,
                block.explained[rows],
                block.output[rows],
                [block.names[row] for row in rows],
            )
            self._synchronize()
            found = Attributed(rows, explained, time.perf_counter() - begin)
        if self.last[method.attribution] != method.text:
            block.attributed[method.attribution] = found
        return found

    def _synchronize(self) -> None:
        """Wait for the device, such that times are what they say."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def picture(self, image: Tensor) -> bytes:
        """What the network sees, as a small JPEG."""
        picture = Image.fromarray(self.classifier.photo(image))
        picture.thumbnail((PICTURE, PICTURE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        return buffer.getvalue()


def _thumbnail(heatmap: Tensor) -> np.ndarray:
    """A small map in 8 bit, of which zero stays zero."""
    values = heatmap[None, None].detach().float()
    size = (min(PICTURE, heatmap.shape[0]), min(PICTURE, heatmap.shape[1]))
    # magnitudes at the limit of the range would overflow when they are averaged
    values = values / values.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    values = F.adaptive_avg_pool2d(values, size)[0, 0]
    values = values / values.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return (values * 127).round().to(torch.int8).cpu().numpy()
