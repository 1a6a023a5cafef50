"""Relevance of a part of a batch: one forward pass, and a backward pass per target."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import Module
from zennit.core import Composite

from zennit_resnet.arguments import check_precision
from zennit_resnet.rules.base import prepared_once


class ReadOut(NamedTuple):
    """Where relevance is read off: an edge of the graph of a forward pass.

    The relevance is the gradient that arrives there, or only those parts that hooks
    collect, times the factor if there is one. An edge alone does not keep the graph
    alive in older versions of PyTorch.
    """

    tensor: Tensor
    edge: Any
    factor: Optional[Tensor] = None
    parts: Optional[list[Tensor]] = None

    def relevance(self, gradient: Optional[Tensor]) -> Tensor:
        """Relevance that is read off. Where none arrives, it is zero."""
        if self.parts is not None:
            gradient = sum(self.parts[1:], self.parts[0]) if self.parts else None
        if gradient is None:
            return torch.zeros_like(self.tensor)
        gradient = gradient.detach()
        return gradient if self.factor is None else gradient * self.factor


# Relevance of each layer, and at the output
Explained = tuple[list[tuple[Tensor, ...]], Tensor]
# The output of a model, and for each layer where to read off its relevance
Run = tuple[Any, list[tuple[ReadOut, ...]]]


def propagate(
    composite: Composite, module: Module, run: Callable[..., Run],
    tensors: tuple[Tensor, ...], args: tuple[Any, ...],
    starts: Sequence[Callable[[Any], Tensor]],
) -> list[Explained]:
    """Propagate relevance by a composite that is attached, from each start.

    What runs the module is given inputs and further arguments, a start the output.
    """
    # a graph cannot be made of tensors which inference mode has created
    leaves = tuple(
        as_constant(elem).requires_grad_(elem.is_floating_point()) for elem in tensors
    )
    args = tuple(as_constant(arg) if isinstance(arg, Tensor) else arg for arg in args)
    with check_precision(module, *leaves):
        output, layers = run(leaves, args)
    seeds = [start(output) for start in starts]
    reached = [each for layer in layers for each in layer if each.edge is not None]
    edges = [each.edge for each in reached]
    explained: list[Explained] = []
    with prepared_once(output) if len(seeds) > 1 else nullcontext():
        for number, seed in enumerate(seeds, 1):
            gradients: Any = ()
            if edges:
                gradients = torch.autograd.grad(
                    output, edges, seed, retain_graph=number < len(seeds),
                    allow_unused=True,
                )
            found = dict(zip(map(id, reached), gradients))
            relevance = [
                tuple(each.relevance(found.get(id(each))) for each in layer)
                for layer in layers
            ]
            sinks = getattr(composite, "sinks", None)
            kept = leaves[0].new_zeros(len(leaves[0]), dtype=seed.dtype)
            relevance.append((kept if sinks is None else sinks.total(kept),))
            explained.append((relevance, seed))
    return explained


def run_to_inputs(
    module: Module, forward: Callable[..., Any], leaves: tuple[Tensor, ...],
    args: tuple[Any, ...],
) -> Run:
    """Run the model, to read off relevance at its inputs."""
    # the model may change copies of its inputs in place
    output = forward(*(leaf.clone() for leaf in leaves), *args)
    return output, [tuple(ReadOut(leaf, leaf) for leaf in leaves)]


def join(chunks: Sequence[Explained]) -> Explained:
    """Join what was found for parts of the batch."""
    layers = [
        tuple(torch.cat(parts) for parts in zip(*layer))
        for layer in zip(*(chunk[0] for chunk in chunks))
    ]
    return layers, torch.cat([chunk[1] for chunk in chunks])


def as_constant(tensor: Tensor) -> Tensor:
    """A tensor without history, which may be part of a graph."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
