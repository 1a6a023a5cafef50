"""Relevance at intermediate layers."""

import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Optional, Union

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from zennit.core import Composite

from captum_adapters._validation import Inputs, TargetType, suggest
from captum_adapters.attr._propagation import ReadOut, Run
from captum_adapters.attr.composite import (
    CompositeAttribution,
    Contrast,
    Function,
    InitialRelevance,
    Output,
)
from zennit_resnet._autograd import next_sequence, sequence_of, walk
from zennit_resnet._compat import COMPILED_MODULE, DisableTorchFunction
from zennit_resnet._nested import map_tensors, tensors_of
from zennit_resnet.arguments import check_flag
from zennit_resnet.canonizers import ResidualCanonizer
from zennit_resnet.layer import Operation

Layer = Union[Module, str]


class LayerRelevance(CompositeAttribution, LayerAttribution):
    """Relevance at the inputs or outputs of layers and blocks.

    The relevance of a layer's output is all that arrives there: for a residual block,
    what both branches of the next block propagate. The relevance of a layer's input is
    what this layer propagates to it, and not what others do that use the same tensor:
    for an addition, the shares of skip connection and residual branch. (All of it
    counts if a layer returns its input as it is.)

    Operations which the network computes by functions only have names: those of
    additions are `layer1.0.addition`, `layer1.0.addition_1`, ..., see
    :mod:`zennit_resnet.layer`. A module that is called several times needs the number
    of the call, as `layer1.0.relu#2` for the second.

    Composites such as :class:`~zennit_resnet.composites.BlockLRP` propagate relevance
    divided by the activation, which is multiplied by it here.

    Args:
        layer (torch.nn.Module, str or list): One or several layers, as modules or by
            their names (without the `module.` of wrapped models).
        model, composite, initial_relevance, output, contrast, contrast_weight: See
            :class:`CompositeAttribution`, as for errors.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from captum_adapters.attr import LayerRelevance
        >>> net, images = resnet18().eval(), torch.rand(2, 3, 64, 64)
        >>> method = LayerRelevance(net, [net.layer1, "layer3.0.addition"])
        >>> first, third = method.attribute(images, target=3)
        >>> first.shape, third.shape
        (torch.Size([2, 64, 16, 16]), torch.Size([2, 256, 4, 4]))
        >>> heatmap = LayerRelevance.interpolate(third.sum(1, keepdim=True), (64, 64))
        >>> heatmap.shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(
        self, model: Module, layer: Union[Layer, list[Layer]],
        composite: Union[Composite, type, str] = "resnet_lrp_ratio",
        initial_relevance: InitialRelevance = None, output: Output = None,
        contrast: Contrast = None, contrast_weight: float = 1.0,
    ) -> None:
        for each in layer if isinstance(layer, list) else [layer]:
            if not isinstance(each, (Module, str)):
                raise TypeError(
                    f"layer={each!r} is neither a module nor the name of one. Several"
                    " layers must be in a list."
                )
        CompositeAttribution.__init__(
            self, model, composite, initial_relevance, output=output, contrast=contrast,
            contrast_weight=contrast_weight,
        )
        devices = getattr(model, "device_ids", None)
        LayerAttribution.__init__(self, model, layer, devices)

    _shown = (
        "model", "layer", "composite", "initial_relevance", "output", "contrast",
        "contrast_weight",
    )

    _takes_integers = True

    @log_usage()
    def attribute(
        self, inputs: Inputs, target: Union[TargetType, Function] = None,
        additional_forward_args: object = None, return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        internal_batch_size: Optional[int] = None,
    ) -> Any:
        """Args:
            inputs (Tensor or tuple[Tensor]): Inputs of shape (batch, ...), also
                integers, such as the indices of words: the layer then is the embedding
                which they enter, or any behind it.
            attribute_to_layer_input (bool, optional): Whether to return the relevance
                of the layers' inputs (those given by position) in the place of their
                outputs.
            target, additional_forward_args, return_convergence_delta, ...: See
                :meth:`CompositeAttribution.attribute`.

        Returns:
            **attributions**, or 2-element tuple of **attributions**, **delta**, each a
            list with one entry for each layer if layers are in a list:

            - **attributions** (*Tensor* or *tuple[Tensor]*):
                    Relevance of the shape of the layer's output (or input), or a tuple
                    if it has several. One that is given several times, as to attention,
                    counts once. It is zero where none arrives, as for the inner layers
                    of a gate.
            - **delta** (*Tensor*, returned if return_convergence_delta=True):
                    Initial relevance minus the sum of relevance, of shape (batch,). It
                    is near zero for layers through which all relevance passes, if the
                    composite conserves it.

        Raises:
            ValueError: If a layer is not part of the model, did not run, has been
                called several times and no call is chosen, or has no row for each
                example.
            TypeError: If a layer does not give floating point tensors.
            RuntimeError: If a layer is inside of a module with a rule for all that it
                contains.
        """
        check_flag("return_convergence_delta", return_convergence_delta)
        check_flag("attribute_to_layer_input", attribute_to_layer_input)
        [((*layers, _), initial)] = self._explain(
            inputs, [target], additional_forward_args, internal_batch_size,
            partial(self._run_layers, attribute_to_layer_input),
        )
        found: Any = [layer if len(layer) > 1 else layer[0] for layer in layers]
        deltas: Any = [self.compute_convergence_delta(each, initial) for each in layers]
        if not isinstance(self.layer, list):
            (found,), (deltas,) = found, deltas
        return (found, deltas) if return_convergence_delta else found

    def attribute_targets(self, *args: Any, **kwargs: Any) -> Any:
        """Not for layers."""
        raise NotImplementedError(
            f"{type(self).__name__} explains one target at a time: use attribute."
        )

    def _run_layers(
        self, of_input: bool, module: Module, forward: Callable[..., Any],
        leaves: tuple[Tensor, ...], args: tuple[Any, ...],
    ) -> Run:
        """Run the model, to read off relevance at layers."""
        given = self.layer if isinstance(self.layer, list) else [self.layer]
        # the model may be wrapped
        given = [module if each is self.model else each for each in given]
        inputs = [leaf.clone() for leaf in leaves]
        recorder = _Recorder(module, self.composite, given, of_input, inputs)
        with recorder.watch():
            output = forward(*inputs, *args)
        return output, recorder.result(output)


@dataclass
class _LayerCall:
    """A call of a layer, with the numbers of the first operation in and after it."""

    begin: int
    end: int = 0
    read_outs: tuple[ReadOut, ...] = ()


class _Recorder:
    """Takes down inputs or outputs of layers in a forward pass."""

    def __init__(
        self, root: Module, composite: Composite, layers: list[Layer], of_input: bool,
        inputs: list[Tensor],
    ) -> None:
        self.root, self.composite, self.of_input = root, composite, of_input
        self.batch = len(inputs[0])
        self.is_gradient = getattr(composite, "propagates", "relevance") == "gradient"
        self.thread = threading.get_ident()
        # inputs that cannot require gradients: the graph begins at modules that take them
        self.integers = set(map(_memory, _integers(inputs)))
        self.has_begun = False
        # a module may have several names
        self.names = dict(root.named_modules(remove_duplicate=False))
        self.paths = {module: name for name, module in root.named_modules()}
        self.wanted = [self._find(layer) for layer in layers]
        self.calls: dict[Layer, list[_LayerCall]] = {key: [] for key, *_ in self.wanted}
        self.handles: dict[Module, Any] = {}

    def _find(self, layer: Layer) -> tuple[Layer, str, int]:
        """The module or name of a layer, its name with call, and the call or 0."""
        if isinstance(layer, Module):
            if layer not in self.paths:
                raise ValueError(
                    f"layer {type(layer).__name__} is not part of the model"
                    f" {type(self.root).__name__}."
                )
            return layer, self.paths[layer], 0
        match = re.fullmatch(r"(.*?) *#([1-9][0-9]*)", layer)
        name, call = (match[1], int(match[2])) if match else (layer, 0)
        # other names may belong to operations that are found in the forward pass
        return (self.names[name] if name in self.names else name), layer, call

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context of the forward pass."""
        handle = register_module_forward_pre_hook(self._enter)
        try:
            yield
        finally:
            handle.remove()
            for handle in self.handles.values():
                handle.remove()

    def _key(self, module: Module) -> Layer:
        """The key of a module, which is its name for operations."""
        if module in self.paths or not isinstance(module, Operation):
            return module
        for canonizer in self.composite.handles:
            if isinstance(canonizer, ResidualCanonizer):
                for owner, name, surrogate in canonizer.surrogates.values():
                    if surrogate is module:
                        prefix = self.paths.get(owner)
                        return f"{prefix}.{name}" if prefix else name
        return module

    def _enter(self, module: Module, args: tuple[Any, ...]) -> Any:
        """Called before all other hooks of a module."""
        # this is called for modules of other threads, too
        if threading.get_ident() != self.thread:
            return None
        key = self._key(module)
        if key not in self.calls:
            found = self.integers.intersection(map(_memory, _integers(args)))
            if found and module not in self.handles and module is not self.root:
                self.handles[module] = module.register_forward_hook(
                    lambda module, args, output: self._begin(output)
                )
            return None
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"There is no relevance of {self._name(key)!r}, as it runs without"
                " gradients, as inside of a module with a rule for all that it contains."
            )
        if module not in self.handles:
            # by now all rules have their hooks, so this is the last one
            self.handles[module] = module.register_forward_hook(self._leave)
        # where relevance arrives is known now, as tensors may be changed in place later
        call = _LayerCall(next_sequence())
        self.calls[key].append(call)
        if self.of_input:
            self._check_begun(key, args)
            call.read_outs = self._read_outs(key, args)
        return None

    def _begin(self, value: Any) -> Any:
        """Have a graph begin at those tensors that are not part of one."""
        def begin(tensor: Tensor) -> Tensor:
            self.has_begun |= tensor.is_floating_point()
            if tensor.requires_grad or not tensor.is_floating_point():
                return tensor
            # which may be changed in place
            return tensor.detach().requires_grad_().clone()

        with DisableTorchFunction():
            return map_tensors(begin, value)

    def _check_begun(self, key: Layer, value: Any) -> None:
        """Refuse layers before which relevance would be cut off."""
        if self.integers and not self.has_begun and _tensors(value):
            raise RuntimeError(
                f"There is no relevance of {self._name(key)!r}, before a module takes"
                " the integers of the inputs: explain their embedding, or give that."
            )

    def _leave(self, module: Module, args: tuple[Any, ...], output: Any) -> Any:
        """Called after all other hooks of a module."""
        if threading.get_ident() != self.thread:
            return None
        key = self._key(module)
        call = self.calls[key][-1]
        if not self.of_input:
            if self.integers and _integers(args):
                output = self._begin(output)
            self._check_begun(key, output)
        call.end = next_sequence()
        read_outs = self._read_outs(key, output)
        if not self.of_input:
            call.read_outs = read_outs
            return output
        returned = set(map(_source, read_outs))
        call.read_outs = tuple(
            read_out if _source(read_out) in returned else read_out._replace(parts=[])
            for read_out in call.read_outs
        )
        return None

    def _read_outs(self, key: Layer, value: Any) -> tuple[ReadOut, ...]:
        """Where the relevance of tensors arrives."""
        # outside of the whole network, it is relevance in any case
        with_factor = self.is_gradient and key is not self.root
        with DisableTorchFunction():
            return tuple(_read_out(tensor, with_factor) for tensor in _tensors(value))

    def result(self, output: Any) -> list[tuple[ReadOut, ...]]:
        """Where to read off the relevance of each layer."""
        chosen = [self._choose(*wanted) for wanted in self.wanted]
        if self.of_input:
            _collect(chosen, output)
        return [call.read_outs for call in chosen]

    def _choose(self, key: Layer, label: str, call: int) -> _LayerCall:
        """The call of a layer that was asked for."""
        calls, label = self.calls[key], f"layer {label!r}"
        if not calls:
            raise ValueError(f"{label} did not run{self._suggest(key)}")
        if len(calls) > 1 and not call:
            name = self._name(key)
            raise ValueError(
                f"{label} is called {len(calls)} times: choose one by its name, from"
                f" '{name}#1' to '{name}#{len(calls)}'."
            )
        if call > len(calls):
            raise ValueError(f"{label} does not exist, there are {len(calls)} calls.")
        chosen = calls[call - 1]
        side = "input" if self.of_input else "output"
        if not chosen.read_outs:
            raise TypeError(f"{label} has no {side} of floating point numbers.")
        for read_out in chosen.read_outs:
            if read_out.tensor.ndim == 0 or len(read_out.tensor) != self.batch:
                raise ValueError(
                    f"{label} has an {side} of shape {tuple(read_out.tensor.shape)},"
                    f" which has no row for each of {self.batch} examples."
                )
        return chosen

    def _suggest(self, key: Layer) -> str:
        """The end of a message with similar names, of operations as well."""
        if not isinstance(key, str):
            return "."
        names = [name for name, _ in self.root.named_modules() if name]
        # names are those within wrappers
        bare = re.sub(rf"^(module\.|{COMPILED_MODULE}\.)+", "", key)
        return f", as nothing has this name{suggest(bare, [bare] if bare in names else names)}"

    def _name(self, key: Layer) -> str:
        return key if isinstance(key, str) else self.paths[key]


def _integers(value: Any) -> list[Tensor]:
    """All tensors of integers in inputs of a module."""
    return [elem for elem in tensors_of(value) if not elem.is_floating_point()]


def _memory(tensor: Tensor) -> int:
    """Where a tensor or what it is a view of is."""
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    """All floating point tensors in inputs or outputs of a module, each once."""
    found = {id(elem): elem for elem in tensors_of(value) if elem.is_floating_point()}
    return [*found.values()]


def _read_out(tensor: Tensor, with_factor: bool) -> ReadOut:
    """Where the relevance of a tensor arrives."""
    if not tensor.requires_grad:
        return ReadOut(tensor, None)
    # the tensor may be changed in place
    factor = tensor.detach().clone() if with_factor else None
    return ReadOut(tensor, get_gradient_edge(tensor), factor)


def _source(read_out: ReadOut) -> tuple[Any, int]:
    """The operation where relevance arrives, and which of its outputs it is."""
    edge = read_out.edge
    return (None, 0) if edge is None else (edge.node, edge.output_nr)


def _collect(calls: list[_LayerCall], output: Any) -> None:
    """Have operations inside of calls put down what they propagate to the inputs."""
    wanted = defaultdict(list)
    for call in calls:
        for read_out in call.read_outs:
            if read_out.parts is not None:
                wanted[_source(read_out)].append((call, read_out.parts))
    for node in walk([elem.grad_fn for elem in _tensors(output)]):
        for index, edge in enumerate(node.next_functions):
            for call, parts in wanted.get(edge, ()):
                if call.begin <= sequence_of(node) < call.end:
                    # after the hooks of the composite, which may change it
                    node.register_hook(partial(_put_down, index, parts))


def _put_down(
    index: int, parts: list[Tensor], grad_inputs: tuple[Optional[Tensor], ...],
    grad_outputs: tuple[Optional[Tensor], ...],
) -> None:
    """Called when an operation has propagated relevance."""
    gradient = grad_inputs[index]
    if gradient is not None:
        parts.append(gradient.detach().clone())
