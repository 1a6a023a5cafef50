"""What is evaluated: the options, and what determines the records."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from captum_adapters._light import PERCENTS, check_choice
from captum_adapters.evaluation.columns import DEFAULT, MASKED, METRICS, RISE_STEP, TOP
from captum_adapters.evaluation.names import CONTROLS, LABELS, LAYOUTS
from captum_adapters.evaluation.presets import PRESETS

if TYPE_CHECKING:
    from captum_adapters.evaluation.data import Samples
    from zennit_resnet.models import Classifier

# What a run grows by
GROWING = ("manifest", "samples", "methods", "files")
PACKAGES = ("zennit-resnet", "torch", "torchvision", "zennit", "captum", "numpy")
SCORED = ("explained", "label")
# Options that choose a class, which may be the label
CLASSES = ("explain_class", "score", "published")
# Options that records depend on, besides methods and metrics
IDENTICAL = (*CLASSES, "initial", "step", "rank_by", "fill", "amp")
# Options that the last digits of records depend on
COMPUTATION = ("batch_size", "forward_batch", "channels_last", "compile")


def _option(default: Any, text: str, **metadata: Any) -> Any:
    """A field with what the command line needs to know about it."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass
class Evaluation:
    """What is evaluated, and how. Each field is an option of the command line.

    Raises:
        ValueError: If a value is wrong. The message is a single line.

    Attributes:
    """

    data: str = _option(dataclasses.MISSING, "Folder or CSV file of images.")
    out: str = _option(dataclasses.MISSING, "Folder of the run. The same command continues it.")
    methods: tuple[str, ...] = _option(
        ("resnet_lrp_ratio",),
        "Names separated by commas, such as resnet_lrp_ratio+quantize8,grad_cam. See"
        " --list for all of them.",
    )
    metrics: tuple[str, ...] = _option(DEFAULT, f"Among {', '.join(METRICS)}.")
    preset: tuple[str, ...] = _option(
        (),
        "Methods and protocol of a paper's table or figure; may be repeated. What is"
        " given besides replaces that, except that --methods +NAME adds methods.",
    )
    model: Optional[str] = _option(None, "Model of torchvision  [default: embedded ResNet-50]")
    weights: Optional[str] = _option(None, "Name of weights in torchvision, or a file.")
    size: Optional[int] = _option(None, "Side of the images, for weights from a file.", least=1)
    layout: Optional[str] = _option(
        None, f"Layout of the data, if it is not recognized: {', '.join(LAYOUTS)}."
    )
    split: Optional[str] = _option(None, "Split of the data.")
    labels: str = _option(
        "given",
        "Labels of the data: match them by name; take them in sorted order as the"
        " network's classes; or use none.",
        choices=LABELS,
    )
    limit: Optional[int] = _option(None, "Largest number of images, chosen at random.", least=1)
    seed: int = _option(0, "Seed of this choice.")
    explain_class: str = _option(
        "prediction", "Class that is explained.", choices=("prediction", "label")
    )
    score: str = _option("explained", "Class whose probability is measured.", choices=SCORED)
    published: str = _option(
        "explained", "The same for published protocols of insertion and deletion.", choices=SCORED
    )
    initial: str = _option(
        "softmax", "What relevance starts from.", choices=("softmax", "logit", "one")
    )
    step: int = _option(500, "Pixels between two points of curves.", least=1)
    percents: tuple[float, ...] = _option(PERCENTS, "Percentages of the most relevant pixels.")
    rank_by: str = _option(
        "magnitude",
        "What is most relevant, for accuracy, pointing and distance.",
        choices=("value", "magnitude"),
    )
    fill: str = _option("black", "What replaces deleted pixels.", choices=("black", "mean"))
    cross: tuple[str, ...] = _option(
        (),
        "Another network NAME=WEIGHTS for the metric cross, such as vgg16=DEFAULT; may be"
        " repeated.",
    )
    batch_size: int = _option(8, "Images that are explained together.", least=1)
    forward_batch: int = _option(32, "Images in a forward pass of metrics.", least=1)
    workers: int = _option(0, "Processes that read images.", least=0)
    device: Optional[str] = _option(None, "Device, such as cuda or cpu.")
    amp: Optional[str] = _option(
        None,
        "Half precision for the forward passes of metrics, RISE and Score-CAM.",
        choices=(None, "bfloat16", "float16"),
    )
    pictures: int = _option(1000, "Images whose pictures are kept for the report.", least=0)
    channels_last: bool = _option(
        True, "Memory format of images.", flag="--channels-last/--channels-first"
    )
    compile: bool = _option(
        False, "Compile the network for metrics, and trace attributions.", flag="--compile"
    )
    controls: bool = _option(
        True, f"Add {', '.join(CONTROLS)} maps.", flag="--controls/--no-controls"
    )

    def __post_init__(self) -> None:
        if isinstance(self.percents, (int, float)):
            self.percents = (self.percents,)


FIELDS = dataclasses.fields(Evaluation)
Evaluation.__doc__ = f"{Evaluation.__doc__}\n" + "".join(
    f"        {item.name}: {item.metadata['help']}\n" for item in FIELDS
)


def check(evaluation: Evaluation) -> None:
    """Check what can be checked without data and network."""
    for item in FIELDS:
        value, least = getattr(evaluation, item.name), item.metadata.get("least")
        check_choice(item.name, value, item.metadata.get("choices", (value,)))
        if least is None or (value is None and item.default is None):
            continue
        # True is no number
        if type(value) is not int or value < least:
            raise ValueError(f"{item.name}={value!r} is not an integer from {least} on")
    for name in ("methods", "metrics", "percents"):
        if not getattr(evaluation, name):
            raise ValueError(f"{name}={getattr(evaluation, name)!r}: choose at least one")
    for name in ("methods", "metrics", "cross", "preset"):
        values = getattr(evaluation, name)
        if isinstance(values, str):
            # whose letters are no names
            raise ValueError(f"{name}={values!r} is a text: give a tuple, ({values!r},)")
        stripped = [value.strip() for value in values]
        twice = [value for value in stripped if stripped.count(value) > 1]
        if twice:
            raise ValueError(f"{name}={values} has {twice[0]!r} twice")
    for name in evaluation.preset:
        check_choice("preset", name, PRESETS)
    for name in evaluation.metrics:
        check_choice("metrics", name, METRICS)
    percents = evaluation.percents
    if not isinstance(percents, (tuple, list)):
        raise ValueError(f"percents={percents!r} are no numbers, such as (1, 5)")
    for percent in percents:
        number = isinstance(percent, (int, float)) and not isinstance(percent, bool)
        if not number or not 0 < percent <= 100:
            raise ValueError(f"percents are above 0 and up to 100, unlike {percent!r}")
    if ("cross" in evaluation.metrics) != bool(evaluation.cross):
        raise ValueError(
            "the metric 'cross' and other networks belong together: name them as"
            " --cross NAME=WEIGHTS"
        )
    if evaluation.compile and "randomization" in evaluation.metrics:
        raise ValueError("the metric 'randomization' changes weights: leave out --compile")


def check_pixels(evaluation: Evaluation, size: Sequence[int]) -> None:
    """Check steps and percentages for images of this height and width."""
    pixels = math.prod(size)
    images = f"images of {size[0]} x {size[1]} = {pixels} pixels"
    steps = dict.fromkeys(("insertion_deletion", "c3", "contrastive"), evaluation.step)
    steps["rise"] = RISE_STEP
    for name in evaluation.metrics:
        if steps.get(name, 0) > pixels:
            raise ValueError(f"step={steps[name]} of {name} is too large for {images}")
    for percent in evaluation.percents if {*TOP} & {*evaluation.metrics} else ():
        if Fraction(str(percent)) * pixels < 100:
            raise ValueError(f"percents contain {percent:g}, which is no pixel of {images}")


def check_masks(evaluation: Evaluation, data: "Samples") -> Optional[str]:
    """Check that there are masks for metrics that need them, and say what is missing."""
    needed = [name for name in MASKED if name in evaluation.metrics]
    if not needed or any(sample.mask or sample.boxes for sample in data.samples):
        return None
    reason = f"there are no masks or boxes in {evaluation.data}"
    if len(needed) == len(evaluation.metrics):
        raise ValueError(f"{reason}, which the metrics {', '.join(needed)} need")
    return f"{reason}, so there are no scores {', '.join(needed)}"


def check_labels(evaluation: Evaluation, data: "Samples") -> None:
    """Refuse numbers on labels whose classes are a guess."""
    asked = [key for key in CLASSES if getattr(evaluation, key) == "label"]
    if asked and data.matched_by == "order":
        label, name = min(data.classes.items())
        raise ValueError(
            f"{asked[0]}='label' needs labels of known classes, but that {label!r} is"
            f" {name!r}, and so on, is guessed from the order: name them as the network's"
            " classes, or say --labels order if they are its classes in sorted order"
        )


def make_evaluation(given: dict[str, Any]) -> Evaluation:
    """Combine fields of :class:`Evaluation`, `None` if not given, with presets.

    Raises:
        ValueError: If a preset is unknown, or two cannot be run together, or `data` or
                `out` is missing.
    """
    given = {name: value for name, value in given.items() if value not in (None, ())}
    fields: dict[str, Any] = {}
    for name in given.get("preset", ()):
        check_choice("preset", name, PRESETS)
        preset = PRESETS[name]
        # abn is nothing without a file
        rows = [method for method in preset.rows if method != "abn"]
        methods = dict.fromkeys([*fields.pop("methods", ()), *rows])
        metrics = dict.fromkeys([*fields.pop("metrics", ()), *preset.metrics])
        if fields and fields != preset.options:
            raise ValueError(
                f"the presets {given['preset'][0]} and {name} differ in their protocol:"
                " run them one by one"
            )
        fields = {"methods": (*methods,), "metrics": (*metrics,), **preset.options}
    first = given.get("methods", ("",))[0]
    if first.startswith("+"):
        if not fields:
            raise ValueError(f"{first} is for what a preset has besides: name a --preset")
        fields["methods"] += tuple(name.lstrip("+") for name in given.pop("methods"))
    for item in FIELDS:
        # versions of click differ in whether they notice this
        if item.default is dataclasses.MISSING and item.name not in given:
            raise ValueError(f"--{item.name} is missing: {item.metadata['help']}")
    return Evaluation(**{**fields, **given})


# -- what determines the records -------------------------------------------------------


def describe(
    evaluation: Evaluation, classifier: "Classifier", data: "Samples", size: Sequence[int],
    device: str,
) -> dict[str, Any]:
    """What is written to `settings.json`, with a fingerprint of what determines records."""
    # these load PyTorch, which the options do not need
    from captum_adapters.evaluation.methods import Method
    from zennit_resnet.models import find_embedded, hash_weights

    given = dataclasses.asdict(evaluation)
    options = {
        **{name: given[name] for name in IDENTICAL},
        "percents": list(evaluation.percents),
        "size": list(size),
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
    }
    files = [str(Method(text).options.get("weights", "")) for text in evaluation.methods]
    files += [text.partition("=")[2] for text in evaluation.cross]
    versions = {name: _version(name) for name in PACKAGES}
    # names, labels and boxes, wherever the data is
    rows = [
        (name, label, mask is None, boxes, problem)
        for name, _, label, mask, boxes, problem in data.samples
    ]
    transform: Any = classifier.transform
    described = " ".join(repr(transform).split())
    if hasattr(transform, "keywords"):
        described = f"{transform.func.__name__}({transform.keywords})"
    identity = {
        "manifest": _hash("".join(f"{row}\n" for row in rows).encode()),
        "samples": len(data.samples),
        "model": evaluation.model or "resnet50",
        "weights": hash_weights(classifier.model)[:16],
        "transform": described,
        "methods": list(evaluation.methods),
        "metrics": list(evaluation.metrics),
        "cross": list(evaluation.cross),
        "files": {name: _hash(Path(name).read_bytes()) for name in files if Path(name).is_file()},
        "options": options,
        "labels": evaluation.labels,
        "computation": {name: given[name] for name in COMPUTATION},
        "device": device,
        # a patch release computes the same
        "versions": {
            name: ".".join(version.split("+")[0].split(".")[:2])
            for name, version in versions.items()
        },
    }
    fixed = {key: value for key, value in identity.items() if key not in GROWING}
    text = json.dumps(fixed, sort_keys=True, separators=(",", ":"))
    return {
        "fingerprint": _hash(text.encode()),
        "identity": identity,
        "data": os.path.abspath(evaluation.data),
        "layout": data.layout,
        "weights_name": str(evaluation.weights or find_embedded().name),
        "labels": {"matched_by": data.matched_by, "classes": dict(data.classes)},
        "classes": list(classifier.classes),
        "preset": list(evaluation.preset),
        "batch_size": evaluation.batch_size,
        "installed": versions,
        "command": _command(),
        "evaluation": given,
    }


def _version(name: str) -> str:
    """Version of a package, which may be imported without being installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _command() -> Optional[str]:
    """The command that was given, `None` if it is another program that evaluates."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if Path(sys.argv[0]).stem == "captum-adapters":
        return shlex.join(["captum-adapters", *sys.argv[1:]])
    if spec is not None and spec.name == "captum_adapters.__main__":
        return shlex.join(["python", "-m", "captum_adapters", *sys.argv[1:]])
    return None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
