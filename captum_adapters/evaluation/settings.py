"""Settings of an evaluation, and what determines its records."""

import hashlib
import importlib.metadata
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from captum_adapters.evaluation.datasets import Samples
from captum_adapters.evaluation.measures import DEFAULT, MASKED, TOP, check_metrics
from captum_adapters.evaluation.methods import Method
from captum_adapters.evaluation.records import fingerprint
from captum_adapters.metrics import PERCENTS
from captum_adapters.metrics._ranking import top_counts
from captum_adapters.metrics.insertion_deletion import PROTOCOLS
from zennit_resnet.models import Classifier, find_embedded, load_classifier

PACKAGES = ("zennit-resnet", "torch", "torchvision", "zennit", "captum", "numpy")


@dataclass
class Evaluation:
    """What is evaluated, and how.

    Attributes:

        data (str): Folder or CSV file, see
                :func:`captum_adapters.evaluation.read_samples`.
        out (str): Folder of the run.
        methods (tuple[str]): Names of methods. Controls are added.
        metrics (tuple[str]): Names of metrics.
        model (str or None): Name of a classification model of torchvision. `None` with
                no weights is the embedded ResNet-50.
        weights (str or None): Name of weights in torchvision, or a file.
        size (int or None): Side of the images for weights from a file.
        layout (str or None): Layout of the data, `None` to recognize it.
        split (str or None): Split of the data, where it has some.
        labels (str): `"given"` with the data, or `"ignore"`.
        limit (int or None): Largest number of samples.
        seed (int): Seed of the choice of samples.
        explain (str): Class to explain: the network's `"prediction"`, or the `"label"`.
        score (str): Class whose score is measured: the `"explained"` one, or the
                `"label"`.
        published (str): The same for published protocols of insertion and deletion.
        initial (str): What relevance starts from: `"softmax"`, `"logit"` or `"one"`.
        step (int): Number of pixels between two points of curves.
        percents (tuple): Percentages of the top p %.
        rank_by (str): `"value"` or `"magnitude"`, for accuracy, pointing and distance.
                The default is that of the functions, as in R-LRP's paper.
        fill (str): What deleted pixels become: `"black"`, or the `"mean"` color.
        cross (tuple[str]): Other networks `NAME=WEIGHTS` for the metric `"cross"`.
        preset (tuple[str]): Names of the presets that this is from.
        batch_size (int): Number of images that are explained together.
        forward_batch (int): Number of images in a forward pass of metrics.
        workers (int): Number of processes that read images.
        device (str or None): Device, `None` for an accelerator if there is one.
        amp (str or None): `"bfloat16"` or `"float16"` for the forward passes of
                metrics, RISE and Score-CAM. Other maps are always computed in single
                precision.
        channels_last (bool): Whether to use this memory format.
        compile (bool): Whether to compile the network for the passes of metrics, which
                takes about a minute at the start.
        pictures (int): Number of samples of which pictures are kept.
        controls (bool): Whether to add the controls.
    """

    data: str
    out: str
    methods: tuple[str, ...] = ("resnet_lrp_ratio",)
    metrics: tuple[str, ...] = DEFAULT
    model: Optional[str] = None
    weights: Optional[str] = None
    size: Optional[int] = None
    layout: Optional[str] = None
    split: Optional[str] = None
    labels: str = "given"
    limit: Optional[int] = None
    seed: int = 0
    explain: str = "prediction"
    score: str = "explained"
    published: str = "explained"
    initial: str = "softmax"
    step: int = 500
    percents: tuple[float, ...] = PERCENTS
    rank_by: str = "magnitude"
    fill: str = "black"
    cross: tuple[str, ...] = ()
    preset: tuple[str, ...] = ()
    batch_size: int = 8
    forward_batch: int = 32
    workers: int = 0
    device: Optional[str] = None
    amp: Optional[str] = None
    channels_last: bool = True
    compile: bool = False
    pictures: int = 1000
    controls: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.percents, (int, float)):
            self.percents = (self.percents,)


CHOICES = {
    "labels": ("given", "ignore"),
    "explain": ("prediction", "label"),
    "score": ("explained", "label"),
    "published": ("explained", "label"),
    "initial": ("softmax", "logit", "one"),
    "rank_by": ("value", "magnitude"),
    "fill": ("black", "mean"),
    "amp": (None, "bfloat16", "float16"),
}


def check(evaluation: Evaluation) -> None:
    """Check what can be checked at once."""
    check_metrics(evaluation.metrics)
    if not evaluation.methods:
        raise ValueError("there are no methods: choose at least one")
    for name, choices in CHOICES.items():
        value = getattr(evaluation, name)
        if value not in choices:
            raise ValueError(
                f"{name}={value!r} is not one of {', '.join(map(repr, choices))}"
            )
    for name in ("step", "batch_size", "forward_batch", "size", "limit"):
        value = getattr(evaluation, name)
        optional = name in ("size", "limit")
        if not (value is None and optional) and (not _is_integer(value) or value < 1):
            raise ValueError(f"{name}={value!r} is not a positive integer")
    for name in ("workers", "pictures"):
        value = getattr(evaluation, name)
        if not _is_integer(value) or value < 0:
            raise ValueError(f"{name}={value!r} is not an integer from 0 on")
    if not isinstance(evaluation.percents, (tuple, list)) or not evaluation.percents:
        raise ValueError(
            f"percents={evaluation.percents!r} are no numbers, such as (1, 5)"
        )
    for percent in evaluation.percents:
        number = isinstance(percent, (int, float)) and not isinstance(percent, bool)
        if not number or not 0 < percent <= 100:
            raise ValueError(f"percents are above 0 and up to 100, unlike {percent!r}")
    if ("cross" in evaluation.metrics) != bool(evaluation.cross):
        raise ValueError(
            "the metric 'cross' and other networks belong together: name them as"
            " --cross NAME=WEIGHTS"
        )
    if len(set(evaluation.cross)) < len(evaluation.cross):
        raise ValueError(f"a network is named twice: {', '.join(evaluation.cross)}")


def _is_integer(value: object) -> bool:
    """Whether this is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_pixels(evaluation: Evaluation, size: Sequence[int]) -> None:
    """Check what depends on the number of pixels, before anything is computed.

    Args:

        evaluation (Evaluation): What is evaluated.
        size (sequence of int): Height and width of the images.

    Raises:
        ValueError: If a step of curves is beyond the image, or a percentage is no
                pixel.
    """
    pixels = math.prod(size)
    images = f"images of {size[0]} x {size[1]} = {pixels} pixels"
    steps = {"insertion_deletion": evaluation.step, "c3": evaluation.step}
    steps["rise"] = PROTOCOLS["rise"].step or 1
    for name, step in steps.items():
        if name in evaluation.metrics and step > pixels:
            raise ValueError(f"step={step} of {name} is too large for {images}")
    if {*MASKED} & {*TOP} & {*evaluation.metrics}:
        for percent in evaluation.percents:
            if top_counts(percent, pixels) == (0,):
                raise ValueError(f"percents contain {percent:g}, which is none of {images}")


def load_other(text: str) -> tuple[str, Classifier]:
    """Load another network `NAME=WEIGHTS`, and what it is called.

    Args:

        text (str): A model of torchvision with its weights, `embedded` for the network
                that comes with the project.

    Returns:
        tuple: Its name, and the network.

    Raises:
        ValueError: If it can not be loaded.
    """
    name, _, weights = text.partition("=")
    if text == "embedded":
        return text, load_classifier()
    if not weights:
        raise ValueError(
            f"{text!r} is not of the form NAME=WEIGHTS, such as vgg16=DEFAULT"
        )
    return name, load_classifier(name, weights)


def adapt(source: Classifier, target: Classifier) -> Callable[[Tensor], Tensor]:
    """A function from inputs of a network to those of another one.

    Args:

        source (Classifier): The network whose inputs there are.
        target (Classifier): The network that needs inputs.

    Returns:
        callable: From images of shape (batch, 3, height, width) to images of the size
        and normalization of the other network.
    """
    size = input_size(target)

    def transform(images: Tensor) -> Tensor:
        mean, std, other_mean, other_std = (
            value.to(images)
            for value in (source.mean, source.std, target.mean, target.std)
        )
        if list(images.shape[-2:]) != size:
            images = functional.resize(images, size, antialias=True)
        if torch.equal(mean, other_mean) and torch.equal(std, other_std):
            return images
        return (images * std + mean - other_mean) / other_std

    return transform


def input_size(classifier: Classifier) -> list[int]:
    """Height and width of a network's inputs."""
    return list(classifier.transform(Image.new("RGB", (256, 256))).shape[-2:])


def describe(
    evaluation: Evaluation, classifier: Classifier, data: Samples, device: str = "cpu"
) -> dict[str, Any]:
    """Settings of a run, with a fingerprint of what determines its records.

    Args:

        evaluation (Evaluation): What is evaluated.
        classifier (Classifier): The network.
        data (Samples): The samples.
        device (str, optional): Type of the device.
                Default: `"cpu"`

    Returns:
        dict: What is written to `settings.json`.
    """
    options = {
        name: getattr(evaluation, name)
        for name in (
            *("explain", "score", "published", "initial"),
            *("step", "rank_by", "fill", "amp"),
        )
    }
    options["percents"] = list(evaluation.percents)
    options["size"] = input_size(classifier)
    options["mean"] = classifier.mean.flatten().tolist()
    options["std"] = classifier.std.flatten().tolist()
    files = [Method(text).options.get("weights", "") for text in evaluation.methods]
    files += [text.partition("=")[2] for text in evaluation.cross]
    files = [str(name) for name in files if Path(str(name)).is_file()]
    identity = {
        "manifest": hash_manifest(data),
        "samples": len(data.samples),
        "model": evaluation.model or "resnet50",
        "weights": hash_state(classifier.model),
        "transform": _describe_transform(classifier),
        "methods": list(evaluation.methods),
        "metrics": list(evaluation.metrics),
        "cross": list(evaluation.cross),
        "files": {name: hash_file(name) for name in files},
        "options": options,
        "device": device,
        "versions": versions(),
    }
    weights = evaluation.weights
    if weights is None:
        weights = find_embedded().name
    return {
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "data": os.path.abspath(evaluation.data),
        "layout": data.layout,
        "samples": len(data.samples),
        "manifest": identity["manifest"],
        "model": identity["model"],
        "weights": str(weights),
        "weights_hash": identity["weights"],
        "classes": list(classifier.classes),
        "methods": identity["methods"],
        "metrics": identity["metrics"],
        "options": options,
        "preset": list(evaluation.preset),
        "dtype": evaluation.amp or "float32",
        "versions": identity["versions"],
        "command": _command(),
        "evaluation": asdict(evaluation),
    }


def _command() -> Optional[str]:
    """The command that was given, `None` if it is another program that evaluates."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name != "captum_adapters.__main__":
        return None
    return shlex.join(["python", "-m", "captum_adapters", *sys.argv[1:]])


def _describe_transform(classifier: Classifier) -> str:
    """Preprocessing, such that another one looks different."""
    transform = classifier.transform
    keywords = getattr(transform, "keywords", None)
    if keywords is not None:
        return f"{transform.func.__name__}({keywords})"  # type: ignore[attr-defined]
    return " ".join(repr(transform).split())


def hash_manifest(data: Samples) -> str:
    """Hash of what is known about samples without opening them.

    Args:

        data (Samples): The samples.

    Returns:
        str: 16 hexadecimal digits. They depend on names, sizes of files, labels, masks
        and boxes, but not on where the data is.
    """
    digest = hashlib.sha256()
    for sample in data.samples:
        sizes = []
        for path in (sample.path, sample.mask):
            try:
                sizes.append(-1 if path is None else path.stat().st_size)
            except OSError:
                sizes.append(-2)
        row = (sample.name, sample.label, sizes, sample.boxes, sample.problem)
        digest.update(f"{row}\n".encode())
    return digest.hexdigest()[:16]


def hash_state(model: torch.nn.Module) -> str:
    """Hash of all weights and buffers of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def hash_file(path: str) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that records depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
