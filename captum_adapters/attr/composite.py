"""Captum attributions by Zennit composites."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Callable, Optional, Union

import torch
from captum.attr import GradientAttribution
from captum.log import log_usage
from torch import Tensor
from torch.nn import Module
from zennit.composites import COMPOSITES, BetaSmooth, DeconvNet, GuidedBackprop
from zennit.core import Composite

import zennit_resnet.composites  # noqa: F401, registers composites by their names
from captum_adapters._validation import (
    Inputs,
    TargetType,
    at_least_single,
    check_inputs,
    check_range,
    check_target,
    double_dtype,
    positive_integer,
    split_args,
    suggest,
)
from captum_adapters.attr._propagation import (
    Explained,
    Run,
    as_constant,
    join,
    propagate,
    run_to_inputs,
)
from zennit_resnet._compat import hooks_of_all
from zennit_resnet._weights import state_of
from zennit_resnet.arguments import check_choice, check_flag, check_module, describe
from zennit_resnet.attribution import (
    as_contrast,
    check_contrast_weight,
    check_key,
    default_value,
    output_weights,
    select_output,
    weigh,
)
from zennit_resnet.postprocess import c1c, c3, heat_quantization, sum_channels
from zennit_resnet.registration import registered, unwrap
from zennit_resnet.tracing import TracedAttribution, trace

InitialRelevance = Union[None, str, Callable[[Tensor], Tensor]]
# What the target is compared with
Contrast = Union[None, str, int, Sequence[int], Tensor]
# A number for each example, of the output
Function = Callable[[Tensor], Tensor]
# What picks the tensor to explain from what a model returns
Output = Union[None, str, int, Callable[[Any], Any]]
Postprocess = Union[None, str, Callable[[Tensor], Tensor]]

# One output for each example by its indices, or a function of the output
Target = Union[None, Tensor, Function]

POSTPROCESS: dict[str, Any] = {
    "c3": c3, "c1c": c1c, "heat_quantization": heat_quantization
}


class CompositeAttribution(GradientAttribution):
    """Attributions by any composite of Zennit, or of :mod:`zennit_resnet.composites`.

    A composite assigns a rule to each layer. Relevance starts at the target and is
    propagated to the inputs, just as by :class:`zennit.attribution.Gradient`.

    Rules are attached for the duration of a call, and the model is left as it was
    found, after errors as well. For threads, wrapped and compiled models see
    `docs/captum.md`.

    Args:
        model (torch.nn.Module): The network, in evaluation mode.
        composite (Composite, type or str, optional): An instance, a class that needs no
            arguments, or a name under which one is registered in Zennit, such as
            `"resnet_lrp_ratio"`, `"block_lrp"` or `"epsilon_plus_flat"`.
        initial_relevance (str or callable, optional): What the target starts with:
            `"logit"`, `"softmax"` or `"one"`, see `value` of
            :func:`zennit_resnet.attribution.initial_relevance`, or a function from the
            output to a tensor of the same shape: the target's value is taken, or
            everything if there is no target. Default: None, for `"logit"`, or what a
            contrast or function needs
        postprocess (str or callable, optional): Post-processing of heatmaps: `"c3"`,
            `"c1c"` or `"heat_quantization"` for those of
            :mod:`zennit_resnet.postprocess`, or a function `(batch, height, width) ->
            (batch, height, width)` such as `functools.partial(c3, size=14)`. It is
            given the sum over channels, and the channels of the attributions receive
            equal parts of what it returns. Quantization and functions are also for
            signals and volumes.
        output (str, int or callable, optional): For models that return several outputs,
            see :class:`zennit_resnet.attribution.SelectOutput`.
        contrast (str, int, list or Tensor, optional): Why the target and not something
            else: `"centred"`, `"softmax"`, `"runner_up"`, or classes, see
            :func:`zennit_resnet.attribution.initial_relevance`.
        contrast_weight (float, optional): How much rivals count.
        traced (bool, optional): Whether to record the attribution as a graph, in the
            first call for each shape of the input, and to run that afterwards, see
            :func:`zennit_resnet.tracing.trace`. It is faster, most of all for small
            images. For a single input.

    Raises:
        TypeError: If an argument is none of the above.
        ValueError: If a name is unknown.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from zennit.composites import EpsilonPlus
        >>> from zennit_resnet import with_splitting
        >>> from captum_adapters.attr import CompositeAttribution
        >>> net, images = resnet18().eval(), torch.rand(2, 3, 32, 32)
        >>> lrp = CompositeAttribution(net, with_splitting(EpsilonPlus()))
        >>> attributions = lrp.attribute(images, target=[3, 7])
        >>> attributions.shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, model: Module,
        composite: Union[Composite, type, str] = "resnet_lrp_ratio",
        initial_relevance: InitialRelevance = None, postprocess: Postprocess = None,
        output: Output = None, contrast: Contrast = None, contrast_weight: float = 1.0,
        traced: bool = False,
    ) -> None:
        check_key(output)
        check_flag("traced", traced)
        check_module(model)
        if not callable(initial_relevance):
            choices = (None, "logit", "softmax", "one")
            check_choice("initial_relevance", initial_relevance, choices)
        if not callable(postprocess):
            check_choice("postprocess", postprocess, (None, *POSTPROCESS))
        GradientAttribution.__init__(self, model)
        self.model, self.output, self.traced = model, output, traced
        self.composite = create_composite(composite)
        self.initial_relevance, self.postprocess = initial_relevance, postprocess
        self.contrast, self.contrast_weight = as_contrast(contrast), contrast_weight
        check_contrast_weight(self.contrast, contrast_weight)
        # what was traced, and of what
        self._recorded: Optional[tuple[Any, TracedAttribution]] = None

    _shown: tuple[str, ...] = (
        "model", "composite", "initial_relevance", "postprocess", "output", "contrast",
        "contrast_weight", "traced",
    )
    # whether inputs may be integers, as for embeddings
    _takes_integers = False

    def __repr__(self) -> str:
        return describe(self, self._shown)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, as rules hold functions: pickle"
            " the model, and create the object again with it."
        )

    def __copy__(self) -> "CompositeAttribution":
        duplicate = type(self).__new__(type(self))
        duplicate.__dict__.update(vars(self))
        return duplicate

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompositeAttribution":
        duplicate = memo[id(self)] = copy.copy(self)
        duplicate.__dict__.update(copy.deepcopy({**vars(self), "_recorded": None}, memo))
        return duplicate

    @classmethod
    def get_name(cls) -> str:
        """Name for users, as in Captum Insights."""
        name: str = vars(cls).get("_name") or super().get_name()
        return name

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are contributions, and not sensitivities."""
        return not isinstance(self.composite, (BetaSmooth, DeconvNet, GuidedBackprop))

    def has_convergence_delta(self) -> bool:
        """Whether there is a convergence delta, which is always so."""
        return True

    @log_usage()
    def attribute(
        self, inputs: Any, target: Union[TargetType, Function] = None,
        additional_forward_args: object = None, return_convergence_delta: bool = False,
        internal_batch_size: Optional[int] = None,
    ) -> Any:
        """Args:
            inputs (Tensor or tuple[Tensor]): Inputs of shape (batch, ...), of floating
                point numbers. They are not changed, and need not require gradients.
            target (int, tuple, Tensor, list or callable, optional): Output to explain,
                not necessary for a single one. As in Captum, an integer or a tensor
                with a single one for all examples, a list of integers or a 1D tensor
                with one for each, a tuple with the indices of all output dimensions but
                the batch, or a list of tuples. Also a function from the output to a
                number for each example, such as a mean over a region: its gradient are
                the weights of the outputs.
            additional_forward_args (Any, optional): Further arguments of the model,
                after the inputs. There are no attributions for them.
            return_convergence_delta (bool, optional): Whether to return the delta, too.
            internal_batch_size (int, optional): Number of examples to run at once, by
                default all. Tensors among `additional_forward_args` that have a row for
                each example are divided like the inputs.

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**, or 2-element tuple of
            **attributions**, **delta**:

            - **attributions** (*Tensor* or *tuple[Tensor]*):
                    Relevance in units of the initial relevance, of the inputs' shape. A
                    tuple is returned if inputs are a tuple.
            - **delta** (*Tensor*, returned if return_convergence_delta=True):
                    Initial relevance minus the sum of attributions, and of what is
                    kept by constants such as a class token, of shape (batch,).

        Raises:
            ValueError: If the target is missing or out of range, a shape does not fit,
                or the output does not depend on the inputs.
            TypeError: If inputs are not floating point tensors, the target is not of
                integers, or the output is not a tensor.
            RuntimeError: If the model is in training mode with batch norm or dropout
                (by composites of this project), or the composite is in use already.
            UnsupportedOperation: If there is no rule for an operation of the model.
        """
        check_flag("return_convergence_delta", return_convergence_delta)
        [((relevance, (kept,)), initial)] = self._explain(
            inputs, [target], additional_forward_args, internal_batch_size
        )
        relevance = tuple(map(self._postprocess, relevance))
        attributions = relevance if isinstance(inputs, tuple) else relevance[0]
        if not return_convergence_delta:
            return attributions
        return attributions, self.compute_convergence_delta((*relevance, kept), initial)

    def attribute_targets(
        self, inputs: Any, targets: Sequence[Any], additional_forward_args: object = None,
        internal_batch_size: Optional[int] = None,
    ) -> Any:
        """Attributions of several targets by one forward pass.

        They are those of :meth:`attribute` for one target after the other, stacked to
        shape (targets, batch, ...): `[3, 5]` are two targets for all examples, `[[3,
        5]]` is one target of two.
        """
        if not isinstance(targets, (list, tuple)) or not targets:
            raise ValueError(f"targets={targets!r} is not a list with a target in it.")
        found = self._explain(
            inputs, targets, additional_forward_args, internal_batch_size
        )
        maps = [map(self._postprocess, relevance) for (relevance, _), _ in found]
        attributions = tuple(map(torch.stack, zip(*maps)))
        return attributions if isinstance(inputs, tuple) else attributions[0]

    def propagate(
        self, inputs: Tensor, target: Union[TargetType, Function] = None
    ) -> tuple[Tensor, Tensor]:
        """Relevance before any post-processing, and what it started from.

        Both are of the shapes of the inputs and of the output. For the target and
        errors, see :meth:`attribute`.
        """
        [(((relevance,), _), initial)] = self._explain(inputs, [target])
        return relevance, initial

    def attribute_future(self) -> None:
        """This method is not implemented."""
        name = type(self).__name__
        raise NotImplementedError(f"attribute_future is not implemented for {name}")

    def compute_convergence_delta(self, attributions: Inputs, output: Tensor) -> Tensor:
        """Initial relevance minus the sum of attributions: zero if it is conserved.

        Attributions are of shape (batch, ...), and initial relevance of shape (batch,),
        or (batch, ...) for several outputs. The difference is of shape (batch,).
        """
        initial = output.detach()
        initial = initial.reshape(len(initial) if initial.ndim else 1, -1)
        # sums of many terms would otherwise have a delta of their own
        dtype = double_dtype(output.device)
        delta = initial.to(dtype).sum(1)
        given = attributions if isinstance(attributions, tuple) else (attributions,)
        for tensor in given:
            if len(tensor) != len(initial):
                raise ValueError(
                    f"There are attributions of {len(tensor)} examples, but initial"
                    f" relevance of {len(initial)}."
                )
            total = tensor.detach().to(dtype).reshape(len(tensor), -1).sum(1)
            delta = delta - total.to(delta.device)
        return delta.to(initial.dtype)

    def _explain(
        self, inputs: Inputs, targets: Sequence[Any],
        additional_forward_args: object = None,
        internal_batch_size: Optional[int] = None,
        run: Callable[..., Run] = run_to_inputs,
    ) -> list[Explained]:
        """Relevance at layers, of constants that kept it, and at the output, by target."""
        tensors = check_inputs(inputs)
        if not self._takes_integers:
            self._check_floating(tensors)
        batch = len(tensors[0])
        indices: list[Target] = [
            each if callable(each) else check_target(each, batch, allow_negative=True)
            for each in targets
        ]
        contrast = self.contrast
        per_example = isinstance(contrast, Tensor) and contrast.ndim == 2
        if per_example and len(contrast) != batch:
            raise ValueError(
                f"There are contrasts of {len(contrast)} examples for a batch of {batch}."
            )
        args, divided = split_args(additional_forward_args, batch)
        size = batch
        if internal_batch_size is not None:
            size = positive_integer("internal_batch_size", internal_batch_size)
        chunks = []
        for begin in range(0, batch, size):
            part = slice(begin, begin + size)
            chunks.append(self._propagate(
                run, tuple(tensor[part] for tensor in tensors),
                [each[part] if isinstance(each, Tensor) else each for each in indices],
                contrast[part] if per_example else contrast,
                tuple(arg[part] if cut else arg for arg, cut in zip(args, divided)),
            ))
        return chunks[0] if len(chunks) == 1 else list(map(join, zip(*chunks)))

    def _check_floating(self, tensors: tuple[Tensor, ...]) -> None:
        """Refuse integers, and name the layer which they enter."""
        for tensor in tensors:
            if not tensor.is_floating_point():
                kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
                modules = unwrap(self.model)[0].named_modules()
                names = [repr(name) for name, each in modules if isinstance(each, kinds)]
                raise TypeError(
                    f"inputs of {tensor.dtype} cannot have relevance: explain the output"
                    " of the layer that they enter, with LayerRelevance(model,"
                    f" {[*names, 'layer'][0]}), or give them as additional_forward_args."
                )

    def _propagate(
        self, run: Callable[..., Run], tensors: tuple[Tensor, ...],
        indices: list[Target], contrast: Any, args: tuple[Any, ...],
    ) -> list[Explained]:
        """Propagate relevance of each target for a part of the batch."""
        module, forward = unwrap(self.model)
        batch = len(tensors[0])
        starts = [partial(self._seed, each, contrast, batch) for each in indices]
        if self.traced:
            return self._replay(module, tensors, starts, args)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            registered(self.composite, module, self.output),
        ):
            return propagate(
                self.composite, module, partial(run, module, forward), tensors, args,
                starts,
            )

    def _replay(
        self, module: Module, tensors: tuple[Tensor, ...], starts: Sequence[Function],
        args: tuple[Any, ...],
    ) -> list[Explained]:
        """Propagate relevance of each target by a graph that was recorded."""
        if len(tensors) > 1 or args:
            raise ValueError(
                "traced=True is for a single input, without additional_forward_args."
            )
        image = as_constant(tensors[0])
        state = state_of(module), hooks_of_all(), self.composite, self.output
        if self._recorded is None or self._recorded[0] != state:
            traced = trace(module, self.composite, image, self.output)
            self._recorded = state, traced
        traced = self._recorded[1]
        seeds: list[Tensor] = []

        def note(start: Function, output: Tensor) -> Tensor:
            seeds.append(start(output))
            return seeds[-1]

        found = [traced.explain(image, partial(note, start))[1:] for start in starts]
        return [
            ([(relevance,), tuple(kept) or (seed.new_zeros(len(seed)),)], seed)
            for (relevance, *kept), seed in zip(found, seeds)
        ]

    def _seed(self, index: Target, contrast: Any, batch: int, output: Any) -> Tensor:
        """Initial relevance of the shape of the output."""
        output = select_output(
            output, remedy=f"{type(self).__name__}(model, ..., output={{}})"
        )
        if not (output.requires_grad or self.traced):
            raise ValueError(
                "The output does not depend on the inputs by operations with a gradient."
            )
        if output.ndim == 0 or len(output) != batch:
            raise ValueError(
                f"The output of shape {tuple(output.shape)} has no row for each of"
                f" {batch} examples."
            )
        outputs = values = at_least_single(output.detach())
        value = self.initial_relevance
        if callable(value):
            values = value(outputs)
            if not isinstance(values, Tensor) or values.shape != output.shape:
                raise ValueError(
                    "initial_relevance must return a tensor of the output's shape"
                    f" {tuple(output.shape)}, but returns {_shape_or_type(values)}."
                )
            values, value = values.detach(), "logit"
            if index is None and contrast is None:
                return values
        if not callable(index):
            check_range(output, index)
        is_signed = callable(index) or contrast is not None
        value = value or default_value(output, is_signed)
        weights = output_weights(outputs, index, contrast, self.contrast_weight)
        return weigh(weights, values, value)

    def _postprocess(self, relevance: Tensor) -> Tensor:
        """Post-process relevance of images, signals or volumes."""
        function = self.postprocess
        if function is None:
            return relevance
        if isinstance(function, str):
            function = POSTPROCESS[function]
        dims = relevance.ndim - 2
        if dims not in (1, 2, 3) or (dims != 2 and function in (c1c, c3)):
            raise ValueError(
                f"postprocess={self.postprocess!r} is not for relevance of shape"
                f" {tuple(relevance.shape)}: use postprocess=None."
            )
        if function == heat_quantization:
            function = partial(heat_quantization, dims=dims)
        heatmap = function(sum_channels(relevance, dims))
        expected = (len(relevance), *relevance.shape[2:])
        if not isinstance(heatmap, Tensor) or heatmap.shape != expected:
            raise ValueError(
                f"postprocess must return heatmaps of shape {expected}, but returns"
                f" {_shape_or_type(heatmap)}."
            )
        part = heatmap[:, None] / relevance.shape[1]
        return part.to(relevance.dtype).expand_as(relevance).clone()


def _shape_or_type(value: Any) -> Any:
    """What a value is, for messages."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def create_composite(composite: Any) -> Composite:
    """Get an instance of a composite."""
    factory = composite
    if isinstance(composite, str):
        factory = COMPOSITES.get(composite)
        if factory is None:
            hint = suggest(composite, COMPOSITES)
            raise ValueError(f"composite={composite!r} is not registered{hint}")
    if isinstance(factory, type) and issubclass(factory, Composite):
        try:
            return factory()
        except TypeError as error:
            raise TypeError(
                f"composite={composite!r} needs arguments, give an instance: {error}"
            ) from error
    if not isinstance(composite, Composite):
        raise TypeError(f"composite={composite!r} is neither a composite nor a name.")
    return composite
