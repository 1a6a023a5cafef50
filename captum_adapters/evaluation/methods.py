"""Attribution methods of an evaluation by name."""

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from zennit.composites import COMPOSITES

from captum_adapters.attr import CompositeAttribution
from captum_adapters.evaluation.baselines import OPTIONS, OTHERS, Context, Function
from captum_adapters.evaluation.controls import CONTROLS
from zennit_resnet.attribution import VALUES, initial_relevance
from zennit_resnet.classic import SETTINGS, ClassicLRP
from zennit_resnet.methods import (
    LEVELS,
    MAX_LEVELS,
    POSTPROCESSING,
    SPLITTING,
    create_composite,
    is_own,
)
from zennit_resnet.postprocess import EmptyMaskWarning, c1c, c3, heat_quantization


class Explained(NamedTuple):
    """Maps of a batch.

    Attributes:

        maps (Tensor): Maps of shape (batch, height, width).
        total (Tensor or None): Sum of relevance of each example before any
                post-processing, of shape (batch,), for methods that distribute
                relevance.
        initial (Tensor or None): What relevance starts from, of shape (batch,).
    """

    maps: Tensor
    total: Optional[Tensor] = None
    initial: Optional[Tensor] = None


class Method:
    """An attribution method, by a name such as `resnet_lrp:splitting=ratio+quantize8`.

    After the name may follow options of its constructor or call, separated by commas
    (of composites also `initial=logit`, what relevance starts from), and suffixes:
    `+ratio`, `+symmetric` or `+zennit` for splitting at skip connections in composites
    that do not split by themselves, `+abs` for the magnitude of the sum over channels,
    and `+quantize`, `+quantize4` (levels), `+c1c` or `+c3` for post-processing.

    Args:

        text (str): The name.

    Raises:
        ValueError: If there is no such method, or an option or suffix is not for it.

    Attributes:

        text (str): The name.
        base (str): The name without options and suffixes.
        attribution (str): The name without post-processing, which is the same for methods
                that have their attributions in common.
        group (str): `"ours"`, `"baseline"` or `"control"`.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        head, *suffixes = self.text.split("+")
        self.base, _, options = head.partition(":")
        if self.base not in names():
            raise ValueError(
                f"unknown method {self.base or self.text!r}: choose among"
                f" {', '.join(names())}"
            )
        self.options = _parse_options(self.text, options)
        self.initial: Optional[str] = None
        if _is_composite(self.base) or self.base in SETTINGS:
            self.initial = self.options.pop("initial", None)
            if self.initial not in (None, *VALUES):
                raise ValueError(
                    f"{self.text}: initial is not one of {', '.join(VALUES)}"
                )
        self.splitting: Optional[str] = None
        self.magnitude = False
        self.postprocess: list[Callable[[Tensor], Tensor]] = []
        for suffix in suffixes:
            quantize = re.fullmatch("quantize([0-9]*)", suffix)
            if suffix in SPLITTING and self.splitting is None:
                self.splitting = suffix
            elif suffix == "abs" and not self.magnitude:
                self.magnitude = True
            elif quantize:
                levels = int(quantize[1] or LEVELS)
                if not 2 <= levels <= MAX_LEVELS:
                    raise ValueError(
                        f"{self.text} has {levels} levels: choose from 2 to {MAX_LEVELS}"
                    )
                self.postprocess.append(partial(heat_quantization, levels=levels))
            elif suffix in ("c1c", "c3"):
                self.postprocess.append(c3 if suffix == "c3" else c1c)
            else:
                choices = [*SPLITTING, "abs", *POSTPROCESSING]
                raise ValueError(
                    f"suffix '+{suffix}' of {self.text} is unknown or repeated: choose"
                    f" among {', '.join(f'+{choice}' for choice in choices)}"
                )
        if self.splitting is not None and not _can_split(self.base):
            raise ValueError(
                f"{self.text}: splitting is for composites of Zennit and classic rules,"
                f" not for {self.base}"
            )
        self.attribution = head
        if self.splitting is not None:
            self.attribution += f"+{self.splitting}"
        _check_options(self)

    @property
    def group(self) -> str:
        """`"ours"`, `"baseline"` or `"control"`."""
        return group_of(self.text)

    def create(self, context: Context) -> "Explainer":
        """Make the method ready for a network.

        Args:

            context (Context): The network, and how to use it.

        Returns:
            Explainer: What computes maps.

        Raises:
            ValueError: If the method can not be used with the network.
        """
        return Explainer(self, context)


def base_of(text: str) -> str:
    """Name of a method without options and suffixes."""
    return re.split("[:+]", text)[0]


def group_of(text: str) -> str:
    """Group of a method by its name: `"ours"`, `"baseline"` or `"control"`."""
    base = base_of(text)
    if base in CONTROLS:
        return "control"
    own = _is_composite(base) and is_own(base)
    split = base not in OTHERS and any(
        suffix in ("ratio", "symmetric") for suffix in text.split("+")[1:]
    )
    return "ours" if own or split else "baseline"


def stands_for(text: str, name: str) -> bool:
    """Whether a method is meant by a name, such as `rise:n_masks=1000` by `rise`.

    Args:

        text (str): The method with its options.
        name (str): The name, without options of methods that have no suffixes.

    Returns:
        bool: Whether they are equal, or the name is that of a method of others, and the
        method is the same with other options.
    """
    return text == name or (
        name in OTHERS and "+" not in text and base_of(text) == name
    )


class Explainer:
    """A method for a network, made by :meth:`Method.create`.

    Attributes:

        method (Method): The method.
        network (torch.nn.Module or None): The network that is explained and has to be
                measured, if it is not the one of the context.
    """

    def __init__(self, method: Method, context: Context) -> None:
        self.method = method
        self.network: Optional[Module] = None
        self._initial: Optional[str] = None
        if method.base in CONTROLS:
            self._function: Function = partial(
                CONTROLS[method.base], classifier=context.classifier, **method.options
            )
        elif method.base in OTHERS:
            self._function, self.network = OTHERS[method.base](context, method.options)
        else:
            model = context.classifier.model
            initial = method.initial or context.initial
            lrp = CompositeAttribution(model, _composite(method, context), initial)
            # gradients are no relevance
            if lrp.has_convergence_delta():
                self._initial = initial
            self._function = lambda images, targets, names: lrp.attribute(
                images, targets
            )
        if method.base == "input_x_gradient":
            self._initial = "logit"

    def attribute(
        self, images: Tensor, targets: Tensor, names: Sequence[str]
    ) -> Tensor:
        """Compute attributions, without any post-processing.

        Args:

            images (Tensor): Network inputs of shape (batch, channels, height, width).
            targets (Tensor): Classes to explain, of shape (batch,).
            names (sequence of str): Names of the samples.

        Returns:
            Tensor: Attributions of shape (batch, channels, height, width), or (batch,
            height, width), with the method's own height and width.
        """
        with warnings.catch_warnings():
            # that hooks are set and removed again, which is what is wanted
            warnings.filterwarnings("ignore", category=UserWarning, module="captum")
            return self._function(images, targets, names).detach()

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        output: Tensor,
        names: Sequence[str],
    ) -> Explained:
        """Compute maps, and post-process them.

        Args:

            images (Tensor): Network inputs of shape (batch, channels, height, width).
            targets (Tensor): Classes to explain, of shape (batch,).
            output (Tensor): Output of the network, of shape (batch, classes).
            names (sequence of str): Names of the samples, which random maps depend on.

        Returns:
            Explained: The maps, which may not be finite.
        """
        return self.process(self.explain(images, targets, output, names))

    def explain(
        self,
        images: Tensor,
        targets: Tensor,
        output: Tensor,
        names: Sequence[str],
    ) -> Explained:
        """Compute maps before any post-processing, with the arguments of a call.

        They are the same for all methods that only differ in their post-processing.
        """
        attributions = self.attribute(images, targets, names)
        total = initial = None
        if self._initial is not None:
            total = attributions.double().flatten(1).sum(1)
            initial = initial_relevance(targets, self._initial)(output).double().sum(1)
        maps = attributions.sum(1) if attributions.ndim == 4 else attributions
        if maps.shape[1:] != images.shape[2:]:
            maps = F.interpolate(
                maps[:, None], images.shape[2:], mode="bilinear", align_corners=False
            )[:, 0]
        return Explained(maps, total, initial)

    def process(self, explained: Explained) -> Explained:
        """Post-process maps, which are left as they are."""
        maps = explained.maps
        if self.method.magnitude:
            maps = maps.abs()
        finite = maps.flatten(1).isfinite().all(1)[:, None, None]
        with warnings.catch_warnings():
            # a map of zeros is measured like any other
            warnings.simplefilter("ignore", EmptyMaskWarning)
            for function in self.method.postprocess:
                # what is not finite can not be processed, and the caller reports it
                maps = function(maps.where(finite, 0)).where(finite, maps)
        return explained._replace(maps=maps)


# -- by name ---------------------------------------------------------------------------


def names() -> list[str]:
    """Names of all methods, without options and suffixes."""
    composites = [*filter(_is_composite, COMPOSITES)]
    own = [name for name in composites if is_own(name)]
    others = [name for name in composites if name not in own]
    return [*own, *SETTINGS, *others, *OTHERS, *CONTROLS]


def _is_composite(base: str) -> bool:
    """Whether this is a composite, and not another method that has its name."""
    # Captum and Zennit both have guided backpropagation
    return base in COMPOSITES and base not in OTHERS and base not in CONTROLS


def _parse_options(text: str, options: str) -> dict[str, Any]:
    """Options `key=value,…`, where values are numbers or words."""
    parsed: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        key, sign, value = part.partition("=")
        if not sign or not key.isidentifier() or key in parsed:
            raise ValueError(
                f"option {part!r} of {text} is not of the form key=value, or repeated"
            )
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def _can_split(base: str) -> bool:
    """Whether a splitting can be added to a composite."""
    return base in SETTINGS or (_is_composite(base) and not is_own(base))


def _check_options(method: Method) -> None:
    """Check names and values of options, as far as that is possible without network."""
    if method.base in SETTINGS:
        accepted = {"addition", "batch_norm", "with_bias", "stabilizer"}
    elif _is_composite(method.base):
        accepted = set(_parameters(method.base))
        accepted -= {"canonizers", "layer_map", "first_map", "low", "high"}
    elif method.base in CONTROLS:
        accepted = set(inspect.signature(CONTROLS[method.base]).parameters)
        accepted -= {"images", "targets", "names", "classifier"}
    else:
        accepted = set(OPTIONS[method.base])
    for key in method.options:
        if key not in accepted:
            raise ValueError(
                f"{method.text}: {method.base} has no option {key!r}, but"
                f" {', '.join(sorted(accepted)) or 'none'}"
            )
    if method.base in SETTINGS or _is_composite(method.base):
        options = dict(method.options)
        if method.base in SETTINGS:
            settings: Any = SETTINGS[method.base]
            create, options = ClassicLRP, {**settings, **options}
        else:
            create = COMPOSITES[method.base]
            if _needs_bounds(method):
                options.update(low=torch.zeros(()), high=torch.ones(()))
        try:
            create(**options)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{method.text}: {reason}") from error


def _parameters(base: str) -> dict[str, inspect.Parameter]:
    """Parameters of a composite, with those that it hands on to the class it is of."""
    composite = COMPOSITES[base]
    found: dict[str, inspect.Parameter] = {}
    for cls in composite.__mro__ if inspect.isclass(composite) else (composite,):
        parameters = inspect.signature(cls).parameters
        found = {**parameters, **found}
        if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
            break
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: item for name, item in found.items() if item.kind not in kinds}


def _needs_bounds(method: Method) -> bool:
    """Whether a composite has to be given the lowest and highest input."""
    parameters = _parameters(method.base)
    low = parameters.get("low")
    needed = low is not None and low.default is low.empty
    return needed or method.options.get("first_layer") == "zbox"


def _composite(method: Method, context: Context) -> Any:
    """The composite of a method."""
    options = dict(method.options)
    if method.base in SETTINGS:
        if method.splitting in ("ratio", "symmetric"):
            options["addition"] = method.splitting
        elif method.splitting == "zennit":
            raise ValueError(
                f"{method.text}: classic rules find additions by themselves, so"
                " Zennit's canonizer would do it twice"
            )
        settings: Any = SETTINGS[method.base]
        return ClassicLRP(**{**settings, **options})
    if _needs_bounds(method):
        low, high = (bound.to(context.device) for bound in context.classifier.bounds())
        options.update(low=low, high=high)
    return create_composite(method.base, method.splitting or "none", **options)
