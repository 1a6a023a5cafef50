"""Explanation functions for Quantus, of this package's and all Captum methods.

Quantus calls them as `explain_func(model, inputs, targets, **explain_func_kwargs)` with
NumPy arrays, and expects an array of as many dimensions as the inputs.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Callable, Optional, Union

import captum.attr
import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import Attribution
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import captum_adapters.attr
from captum_adapters._validation import (
    LINEAR,
    check_choice,
    check_target,
    positive_integer,
    suggest,
    warn_negative_maps,
)
from captum_adapters.attr import LayerRelevance
from zennit_resnet.arguments import as_map

Method = Union[str, Callable[..., Attribution], Attribution]


def explain(
    model: torch.nn.Module, inputs: ArrayLike, targets: Optional[ArrayLike],
    method: Method = "ResNetLRP", device: Union[None, str, torch.device] = None, *,
    batch_size: Optional[int] = None, reduce: Optional[str] = "sum",
    attribute_kwargs: Optional[Mapping[str, Any]] = None, **init_kwargs: Any,
) -> NDArray[Any]:
    """Attributions of a batch of arrays, as an `explain_func` of Quantus.

    A method is created for the given model in each call, since the randomization
    metrics of Quantus compare explanations of several models. Put the network into
    evaluation mode before. Let relevance start from `initial_relevance="one"` with the
    LRP methods of this package: from a negative logit, z+ ranks what is most relevant
    last.

    Args:
        model (torch.nn.Module): The network.
        inputs (numpy.ndarray): Inputs of shape (batch, channels, ...) or (batch,
            features). They are converted to the model's type.
        targets (numpy.ndarray, optional): Class index of each input, of shape (batch,),
            or one for all. `None` for networks with a single output.
        method (str, callable or Attribution, optional): The name of a class of this
            package or of :mod:`captum.attr`; a class, or any function `(model,
            **init_kwargs)` which returns a Captum attribution, for instance `lambda
            model: NoiseTunnel(ResNetLRP(model))`; or an attribution for this model.
        device (str or torch.device, optional): Device of the inputs, which must be that
            of the model. Quantus passes its own on.
        batch_size (int, optional): Number of inputs to explain at once, by default all.
        reduce (str, optional): `"sum"` for the sum over channels, as Quantus' own
            explanation functions do. `"abs_sum"` for the magnitude of that sum, `None`
            to keep the channels.
        attribute_kwargs (dict, optional): Further arguments of the method's
            `attribute`, for instance `{"n_masks": 8000}` for RISE. Arrays are converted
            to tensors, the same for each part of `batch_size` inputs.
        init_kwargs (Any): Further arguments of the method's constructor, for instance
            `splitting="symmetric"` for ResNetLRP. The name of a module may be given for
            `layer`, with any method.

    Returns:
        numpy.ndarray: Attributions of shape (batch, 1, ...), or of the inputs' shape if
        channels are kept or absent, in the model's precision, at least single.
        Those of layers are resized to the inputs with linear interpolation.

    Warns:
        NegativeMapWarning: If a map varies, but has no positive value.

    Raises:
        ValueError: If the method, or a layer, is unknown, an attribution is for another
            model, the model is on another device, or shapes do not fit.
        TypeError: If targets are not integers, or the method does not take an argument.

    Examples:
        >>> import numpy as np, torch
        >>> from captum_adapters.quantus import explain
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
        >>> images = np.random.default_rng(0).random((2, 3, 4, 4))
        >>> explain(net, images, np.array([1, 4]), "InputXGradient").shape
        (2, 1, 4, 4)
    """
    check_choice("reduce", reduce, ("sum", "abs_sum", None))
    where, dtype = _place(model, device)
    images = as_map("inputs", np.asarray(inputs)).to(where, dtype)
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(
            "inputs must be of shape (batch, channels, ...) or (batch, features), but"
            f" are of shape {tuple(images.shape)}."
        )
    target = _to_target(targets, len(images))
    size = len(images) if batch_size is None else batch_size
    size = positive_integer("batch_size", size)
    attribution = _create(method, model, init_kwargs)
    kwargs = dict(attribute_kwargs or {})
    for key, value in kwargs.items():
        if isinstance(value, np.ndarray):
            kind = dtype if np.issubdtype(value.dtype, np.floating) else None
            kwargs[key] = as_map(key, value).to(where, kind)
    # some methods of Captum explain a neuron or layer, and not an output
    if not {"target", "kwargs"} & {*inspect.signature(attribution.attribute).parameters}:
        target = None
    parts = []
    for begin in range(0, len(images), size):
        # otherwise Captum's gradient methods warn
        part = images[begin : begin + size].requires_grad_()
        if target is not None:
            kwargs["target"] = target[begin : begin + size]
        parts.append(_fit(attribution.attribute(part, **kwargs), part, reduce))
    result = torch.cat(parts)
    warn_negative_maps(result)
    return result.numpy()


def explainer(method: Method, **settings: Any) -> Callable[..., NDArray[Any]]:
    """Create an `explain_func` for Quantus from a method and settings of `explain`.

    It is a function `(model, inputs, targets, device=None, **kwargs)` which returns an
    array. Keyword arguments, Quantus' `explain_func_kwargs`, replace the settings. Only
    `method` is ignored, as `quantus.evaluate` passes the name under which results are
    listed.
    """
    def explain_func(model: Any, inputs: Any, targets: Any, **kwargs: Any) -> Any:
        """Attributions of a batch of arrays."""
        kwargs.pop("method", None)
        return explain(model, inputs, targets, method, **{**settings, **kwargs})

    return explain_func


def _create(
    method: Method, model: torch.nn.Module, init_kwargs: dict[str, Any]
) -> Attribution:
    """Create the attribution for a model."""
    if isinstance(method, Attribution):
        if init_kwargs:
            raise TypeError(
                f"{method.get_name()} exists already, so that it takes no"
                f" {', '.join(init_kwargs)}: give its class instead."
            )
        if method.forward_func is not model:
            raise ValueError(
                f"{method.get_name()} was created for another model: give its class."
            )
        return method
    factory: Any = method
    if isinstance(method, str):
        names = {**vars(captum.attr), **vars(captum_adapters.attr)}
        known = {
            name: each
            for name, each in names.items()
            if inspect.isclass(each) and issubclass(each, Attribution)
        }
        if method not in known:
            raise ValueError(f"method={method!r} is unknown{suggest(method, known)}")
        factory = known[method]
    layer = init_kwargs.get("layer")
    knows_names = inspect.isclass(factory) and issubclass(factory, LayerRelevance)
    if isinstance(layer, str) and not knows_names:
        modules = dict(model.named_modules())
        if layer not in modules:
            where = f"{type(model).__name__}{suggest(layer, modules)}"
            raise ValueError(f"layer={layer!r} is not a module of {where}")
        init_kwargs = {**init_kwargs, "layer": modules[layer]}
    attribution = factory(model, **init_kwargs)
    if not isinstance(attribution, Attribution):
        raise TypeError(
            f"method must return an attribution, but returns {type(attribution).__name__}."
        )
    return attribution


def _place(
    model: torch.nn.Module, device: Union[None, str, torch.device]
) -> tuple[torch.device, torch.dtype]:
    """Where the model is, and of what type."""
    state = [*model.parameters(), *model.buffers()]
    where = torch.device(device or (state[0].device if state else "cpu"))
    if state and state[0].device.type != where.type:
        raise ValueError(
            f"device={str(device)!r}, but the model is on {state[0].device}: move it"
            " with model.to(device)."
        )
    types = [tensor.dtype for tensor in state if tensor.is_floating_point()]
    return where, types[0] if types else torch.float32


def _to_target(targets: Optional[ArrayLike], batch: int) -> Optional[list[Any]]:
    """Give each input a class index, or a tuple of indices."""
    given: Any = None if targets is None else np.asarray(targets)
    index = check_target(given, batch, allow_negative=True)
    if index is None:
        return None
    rows = index.reshape(batch, -1).tolist()
    return [tuple(row) if len(row) > 1 else row[0] for row in rows]


def _fit(
    attributions: Union[Tensor, tuple[Tensor, ...]], inputs: Tensor,
    reduce: Optional[str],
) -> Tensor:
    """Attributions of the inputs' dimensions, of a type that NumPy has."""
    if isinstance(attributions, (tuple, list)) and len(attributions) == 1:
        attributions = attributions[0]
    if not isinstance(attributions, Tensor):
        raise ValueError(
            "The method returns several tensors: choose one layer, and no convergence"
            " delta."
        )
    # maps of layers are resized, but neither their units nor channels are the inputs'
    fits = attributions.ndim == inputs.ndim and len(attributions) == len(inputs)
    if fits and (inputs.ndim == 2 or reduce is None):
        channels = (inputs.shape[1],) if inputs.ndim == 2 else (1, inputs.shape[1])
        fits = attributions.shape[1] in channels
    if not fits:
        raise ValueError(
            f"Attributions of shape {tuple(attributions.shape)} do not fit inputs of"
            f" shape {tuple(inputs.shape)}."
        )
    half = inputs.dtype in (torch.float16, torch.bfloat16)
    values = attributions.detach().to(torch.float32 if half else inputs.dtype)
    if inputs.ndim > 2 and reduce is not None:
        values = values.sum(1, keepdim=True)
    if reduce == "abs_sum":
        values = values.abs()
    if values.shape[2:] != inputs.shape[2:]:
        values = F.interpolate(values, inputs.shape[2:], mode=LINEAR[inputs.ndim - 2])
    return values.cpu()
