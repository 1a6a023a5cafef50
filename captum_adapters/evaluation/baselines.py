"""Attribution methods that are no composites, from Captum and from this project."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

import captum.attr
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module

from captum_adapters.attr import RISE, ScoreCAM
from captum_adapters.attr.abn import ABN, load_abn
from zennit_resnet.models import Classifier


class Context(NamedTuple):
    """What methods are made for.

    Attributes:

        classifier (Classifier): The network and its preprocessing.
        initial (str): What relevance starts from: `"logit"`, `"softmax"` or `"one"`.
        forward_batch (int): Number of images in a forward pass.
        device (torch.device): Where images are.
        forward (callable or None): The network for passes without gradients, which may
                be faster.
        autocast (callable): Context manager for such passes.
    """

    classifier: Classifier
    initial: str = "softmax"
    forward_batch: int = 32
    device: torch.device = torch.device("cpu")
    forward: Optional[Callable[[Tensor], Tensor]] = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


# From a batch of inputs, targets and names of samples to attributions, of shape (batch,
# channels, height, width) or (batch, height, width)
Function = Callable[[Tensor, Tensor, Sequence[str]], Tensor]


def _captum(name: str) -> Callable[[Context, dict[str, Any]], tuple[Function, None]]:
    """A method of Captum's that needs nothing but the network."""

    def create(context: Context, options: dict[str, Any]) -> tuple[Function, None]:
        method = getattr(captum.attr, name)(context.classifier.model)

        def attribute(images: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
            if name == "IntegratedGradients":
                size = max(context.forward_batch, len(images))
                settings: dict[str, Any] = {"n_steps": 50, **options}
                settings["internal_batch_size"] = size
                black = context.classifier.bounds()[0].to(images)
                return method.attribute(
                    images, black.expand_as(images), targets, **settings
                )
            images = images.clone().requires_grad_()
            return method.attribute(images, target=targets, **options)

        return attribute, None

    return create


def _last_layer(context: Context) -> Module:
    """The last module that gives a map of features, such as a ResNet's `layer4`."""
    classifier = context.classifier
    found: list[Module] = []
    photo = classifier.transform(Image.new("RGB", (256, 256)))[None]

    def watch(module: Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
            found.append(module)

    handles = [
        module.register_forward_hook(watch) for module in classifier.model.children()
    ]
    try:
        with torch.no_grad():
            classifier.model(photo.to(context.device))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("the network has no layer with a map of features")
    return found[-1]


def _grad_cam(context: Context, options: dict[str, Any]) -> tuple[Function, None]:
    """Grad-CAM at the last map of features."""
    method = captum.attr.LayerGradCam(context.classifier.model, _last_layer(context))

    def attribute(images: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
        images = images.clone().requires_grad_()
        return method.attribute(
            images, targets, relu_attributions=options.get("relu", True)
        )

    return attribute, None


def _score_cam(context: Context, options: dict[str, Any]) -> tuple[Function, None]:
    """Score-CAM at the last map of features."""
    method = ScoreCAM(context.classifier.model, _last_layer(context))

    def attribute(images: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
        with context.autocast():
            return method.attribute(
                images, targets, perturbations_per_eval=context.forward_batch
            ).float()

    return attribute, None


def _rise(context: Context, options: dict[str, Any]) -> tuple[Function, None]:
    """RISE with the masks of its paper for a ResNet-50."""
    method = RISE(context.forward or context.classifier.model)
    settings: dict[str, Any] = {"n_masks": 8000, **options}
    return lambda images, targets, names: method.attribute(
        images, targets, perturbations_per_eval=context.forward_batch, **settings
    ), None


def _abn(context: Context, options: dict[str, Any]) -> tuple[Function, Module]:
    """The attention map of an attention branch network, which is a network itself."""
    if "weights" not in options:
        raise ValueError(
            "abn is a network of its own: train it by examples/abn/train.py, and name"
            " its file as abn:weights=FILE"
        )
    network = load_abn(str(options["weights"]), options.get("model", "resnet50"))
    network = network.to(context.device).eval()
    method = ABN(network)
    return lambda images, targets, names: method.attribute(images, targets), network


OTHERS: dict[
    str, Callable[[Context, dict[str, Any]], tuple[Function, Optional[Module]]]
] = {
    "input_x_gradient": _captum("InputXGradient"),
    "gradient": _captum("Saliency"),
    "integrated_gradients": _captum("IntegratedGradients"),
    "guided_backprop": _captum("GuidedBackprop"),
    "captum_lrp": _captum("LRP"),
    "grad_cam": _grad_cam,
    "score_cam": _score_cam,
    "rise": _rise,
    "abn": _abn,
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "input_x_gradient": (),
    "gradient": ("abs",),
    "integrated_gradients": ("n_steps", "method"),
    "guided_backprop": (),
    "captum_lrp": (),
    "grad_cam": ("relu",),
    "score_cam": (),
    "rise": ("n_masks", "grid_size", "probability", "seed", "normalization"),
    "abn": ("weights", "model"),
}
