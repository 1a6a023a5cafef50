"""Attribution methods of an evaluation: composites, and what else there is.

Names are those of :class:`zennit_resnet.methods.Method`, and mean the same here. Methods
of Captum, perturbation methods, attention branch networks and controls are added.
"""

import inspect
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Optional

import captum.attr
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn import Module

from captum_adapters.attr import RISE, CompositeAttribution, ScoreCAM
from captum_adapters.attr.abn import ABN, load_abn
from zennit_resnet import methods as grammar
from zennit_resnet.attribution import initial_relevance
from zennit_resnet.models import Classifier


class Context(NamedTuple):
    """What methods are made for."""

    classifier: Classifier
    # what relevance starts from, unless the method names this or a contrast
    initial: str = "softmax"
    forward_batch: int = 32  # images in a forward pass
    device: torch.device = torch.device("cpu")
    # the network for passes without gradients, which may be faster, and their context
    forward: Optional[Callable[[Tensor], Tensor]] = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    # whether attributions by composites are recorded as a graph
    traced: bool = False

    def photo(self) -> Tensor:
        """A black input of the network, of shape (1, 3, height, width)."""
        photo = self.classifier.transform(Image.new("RGB", (256, 256)))
        return photo[None].to(self.device)


class Attributed(NamedTuple):
    """Maps of a batch before post-processing."""

    maps: Tensor  # of shape (batch, height, width)
    # the sum of relevance of shape (batch,) and what it started from, of shape (batch,
    # classes), for methods that distribute it
    total: Optional[Tensor] = None
    initial: Optional[Tensor] = None


# From a batch of inputs, targets and names of samples to attributions, of shape (batch,
# channels, height, width) or (batch, height, width)
Function = Callable[[Tensor, Tensor, Sequence[str]], Tensor]


# -- methods of others -----------------------------------------------------------------


def _captum(context: Context, name: str, *args: Any, **options: Any) -> Function:
    """A method of Captum's that needs nothing but the network, or a layer of it."""
    method = getattr(captum.attr, name)(context.classifier.model, *args)
    return lambda images, targets, names: method.attribute(
        images.clone().requires_grad_(), target=targets, **options
    )


def _integrated_gradients(context: Context, **options: Any) -> Function:
    """Integrated gradients on the way from a black image."""
    integrated = captum.attr.IntegratedGradients(context.classifier.model)

    def attribute(images: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
        black = context.classifier.bounds()[0].to(images).expand_as(images)
        size = max(context.forward_batch, len(images))
        settings = {"n_steps": 50, **options, "internal_batch_size": size}
        return integrated.attribute(images, black, targets, **settings)

    return attribute


def _last_layer(context: Context) -> tuple[Module, int]:
    """The last module with a map of features, as a ResNet's `layer4`, and its channels."""
    model = context.classifier.model
    found: list[tuple[Module, int]] = []

    def watch(module: Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
            found.append((module, output.shape[1]))

    handles = [module.register_forward_hook(watch) for module in model.children()]
    try:
        with torch.no_grad():
            model(context.photo())
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("the network has no layer with a map of features")
    return found[-1]


def _grad_cam(context: Context, relu: bool = True) -> Function:
    layer = _last_layer(context)[0]
    return _captum(context, "LayerGradCam", layer, relu_attributions=relu)


def _score_cam(context: Context) -> Function:
    method = ScoreCAM(context.classifier.model, _last_layer(context)[0])
    size = context.forward_batch

    def attribute(images: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
        with context.autocast():
            return method.attribute(images, targets, perturbations_per_eval=size).float()

    return attribute


def _rise(context: Context, **options: Any) -> Function:
    """RISE with the masks of its paper for a ResNet-50."""
    method = RISE(context.forward or context.classifier.model)
    options = {"n_masks": 8000, "perturbations_per_eval": context.forward_batch, **options}
    return lambda images, targets, names: method.attribute(images, targets, **options)


def _abn(
    context: Context, weights: Optional[str] = None, model: str = "resnet50"
) -> tuple[Function, Module]:
    """The attention map of an attention branch network, which is a network itself."""
    if weights is None:
        raise ValueError(
            "abn is a network of its own: train it by examples/abn/train.py, and name"
            " its file as abn:weights=FILE"
        )
    network = load_abn(str(weights), model).to(context.device).eval()
    method = ABN(network)
    return lambda images, targets, names: method.attribute(images, targets), network


class _Other(NamedTuple):
    """How to make a method for a network, and the names of its options."""

    create: Callable[..., Any]
    options: tuple[str, ...] = ()
    # about the number of forward passes for an image, if these are many
    passes: Optional[Callable[..., int]] = None


OTHERS = {
    "input_x_gradient": _Other(partial(_captum, name="InputXGradient")),
    "gradient": _Other(partial(_captum, name="Saliency"), ("abs",)),
    "integrated_gradients": _Other(
        _integrated_gradients,
        ("method", "n_steps"),
        # a pass back takes as long as two
        lambda context, n_steps=50, **options: 3 * n_steps,
    ),
    "guided_backprop": _Other(partial(_captum, name="GuidedBackprop")),
    "captum_lrp": _Other(partial(_captum, name="LRP")),
    "grad_cam": _Other(_grad_cam, ("relu",)),
    "score_cam": _Other(_score_cam, (), lambda context: _last_layer(context)[1]),
    "rise": _Other(
        _rise,
        ("grid_size", "n_masks", "normalization", "probability", "seed"),
        lambda context, n_masks=8000, **options: n_masks,
    ),
    "abn": _Other(_abn, ("model", "weights")),
}


# -- maps that explain nothing, which any method should be better than ------------------


def _random(images: Tensor, names: Sequence[str], std: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise, the same for a sample whatever the batch."""
    seeds = [zlib.crc32(f"{seed}:{name}".encode()) for name in names]
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    maps = [torch.rand(images.shape[2:], generator=each) for each in generators]
    return torch.stack(maps).to(images.device)


def _constant(images: Tensor, names: Sequence[str], std: Tensor) -> Tensor:
    """One everywhere."""
    return torch.ones_like(images[:, 0])


def _gaussian(
    images: Tensor, names: Sequence[str], std: Tensor, sigma: float = 0.25
) -> Tensor:
    """A Gaussian in the centre, sigma being in sides of the image."""
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} is not positive")
    rows, columns = (
        torch.exp(-((torch.linspace(-0.5, 0.5, size) / sigma) ** 2) / 2)
        for size in images.shape[2:]
    )
    return torch.outer(rows, columns).to(images).expand(len(images), -1, -1)


def _sobel(images: Tensor, names: Sequence[str], std: Tensor) -> Tensor:
    """Magnitude of the gradient of brightness."""
    grey = (images * std.to(images)[None]).mean(1, keepdim=True)
    kernel = torch.tensor([[1.0, 2.0, 1.0]]).T @ torch.tensor([[-1.0, 0.0, 1.0]])
    kernels = torch.stack([kernel, kernel.T])[:, None].to(images)
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1)


CONTROLS: dict[str, Callable[..., Tensor]] = {
    "random": _random, "constant": _constant, "gaussian": _gaussian, "sobel": _sobel,
}


# -- by name ---------------------------------------------------------------------------


def find_entries() -> dict[str, grammar.Entry]:
    """All methods by name. Of those that Zennit has as well, Captum's are taken."""
    found = {key: entry for key, entry in grammar.find_entries().items() if key not in OTHERS}
    for name, other in OTHERS.items():
        found[name] = grammar.Entry("baseline", other.options)
    for name, function in CONTROLS.items():
        options = tuple(inspect.signature(function).parameters)[3:]
        found[name] = grammar.Entry("control", options)
    return found


# values of options that are True and False: records have one name, however they are spelled
SWITCH = re.compile(r"(?<==)(true|false)(?=[,+]|$)", re.IGNORECASE)
SWITCHES = {"abs", "relu"}


class Method(grammar.Method):
    """An attribution method, by a name such as `resnet_lrp_ratio+quantize8`.

    See :class:`zennit_resnet.methods.Method`. `true` and `false` mean `True` and `False`.
    """

    def __init__(self, text: str) -> None:
        super().__init__(SWITCH.sub(lambda found: found[0].capitalize(), text))
        for key in SWITCHES & {*self.options} if self.name in OTHERS else ():
            value = self.options[key]
            if not isinstance(value, bool):
                raise ValueError(f"{self.text}: {key}={value!r} is neither True nor False")

    @staticmethod
    def entries() -> dict[str, grammar.Entry]:
        """Methods that there are, see :func:`find_entries`."""
        return find_entries()

    def create(self, context: Context) -> "Explainer":
        """Make the method ready for a network; if that fails, it is a `ValueError`."""
        try:
            return Explainer(self, context)
        except ImportError as error:
            raise ValueError(f"{self.text}: {error}") from error


class Explainer:
    """A method for a network, made by :meth:`Method.create`."""

    def __init__(self, method: Method, context: Context) -> None:
        self.method = method
        # what is explained and has to be measured, if it is not that of the context
        self.network: Optional[Module] = None
        self._function: Function
        # for methods that distribute relevance
        self._relevance: Optional[CompositeAttribution] = None
        classifier, name = context.classifier, method.name
        if name in CONTROLS:
            control = partial(CONTROLS[name], std=classifier.std, **method.options)
            self._function = lambda images, targets, names: control(images, names)
        elif name in OTHERS:
            made = OTHERS[name].create(context, **method.options)
            self._function, self.network = made if type(made) is tuple else (made, None)
        else:
            initial, contrast = method.initial, method.contrast
            composite = method.composite(classifier)
            if initial is None and contrast is None:
                # from the probability, maps of negative logits would be turned over by
                # rules that divide by the logit
                divides = getattr(composite, "classifier", None) == "epsilon"
                turns = divides or grammar.turns_sign(
                    composite, classifier.model, context.photo()
                )
                initial = "logit" if turns else context.initial
            lrp = CompositeAttribution(
                classifier.model, composite, initial, contrast=contrast,
                contrast_weight=method.contrast_weight, traced=context.traced,
            )
            # gradients are no relevance
            if lrp.multiplies_by_inputs:
                self._relevance = lrp
            self._function = lambda images, targets, names: lrp.attribute(images, targets)

    def __call__(
        self, images: Tensor, targets: Tensor, output: Tensor, names: Sequence[str]
    ) -> Tensor:
        """Maps of shape (batch, height, width), which may not be finite."""
        return self.process(self.attribute(images, targets, output, names).maps)

    def attribute(
        self, images: Tensor, targets: Tensor, output: Tensor, names: Sequence[str]
    ) -> Attributed:
        """Maps before any post-processing, the same for methods that only differ in it."""
        with warnings.catch_warnings():
            # that hooks are set and removed again, which is what is wanted
            warnings.filterwarnings("ignore", category=UserWarning, module="captum")
            if self._relevance is not None:
                attributions, initial = self._relevance.propagate(images, targets)
            else:
                attributions = self._function(images, targets, names).detach()
                initial = None
        if self.method.name == grammar.INPUT_X_GRADIENT:
            initial = initial_relevance(targets, "logit")(output)
        maps = attributions.sum(1) if attributions.ndim == 4 else attributions
        size = images.shape[2:]
        if maps.shape[1:] != size:
            maps = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        if initial is None:
            return Attributed(maps)
        return Attributed(maps, attributions.double().flatten(1).sum(1), initial.double())

    def process(self, maps: Tensor) -> Tensor:
        """Post-process maps. Those that are not finite stay as they are."""
        finite = maps.flatten(1).isfinite().all(1)[:, None, None]
        return self.method.process(maps.where(finite, 0)).where(finite, maps)
