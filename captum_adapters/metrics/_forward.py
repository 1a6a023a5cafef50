"""A network evaluated on many images, a few at a time."""

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from captum_adapters._validation import (
    DEFAULT_CHUNK,
    check_evaluation,
    evaluate_rows,
    positive_integer,
)


def forward_in_chunks(
    forward_func: Callable[..., Any], make_inputs: Callable[[slice], Tensor],
    collect: Callable[[Tensor, slice], tuple[Tensor, ...]], examples: Tensor,
    batch: int, additional_forward_args: object, max_examples_per_batch: Optional[int],
    show_progress: bool = False,
) -> tuple[Tensor, ...]:
    """Evaluate images that are derived from a batch, and concatenate what is collected.

    `make_inputs` creates a part of the images, and `collect` takes what shall be kept
    of their output. `examples` has the index of the example of each image. Nothing
    waits for the device unless one of these functions does.
    """
    chunk = max(DEFAULT_CHUNK, batch)
    if max_examples_per_batch is not None:
        chunk = positive_integer("max_examples_per_batch", max_examples_per_batch)
    check_evaluation(forward_func)
    collected = []
    total = len(examples)
    with torch.no_grad(), tqdm(total=total, disable=not show_progress) as progress:
        for begin in range(0, total, chunk):
            part = slice(begin, min(begin + chunk, total))
            rows = examples[part]
            output = evaluate_rows(
                forward_func, [make_inputs(part)], additional_forward_args, batch, rows
            )
            collected.append(collect(output, part))
            progress.update(len(rows))
    return tuple(torch.cat(tensors) for tensors in zip(*collected))
