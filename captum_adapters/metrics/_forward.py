"""A network evaluated on many images, a few at a time."""

from typing import Any, Callable

import torch
from torch import Tensor
from tqdm import tqdm

from captum_adapters._validation import (
    check_evaluation,
    check_output,
    split_args,
    take_rows,
)


def forward_in_chunks(
    forward_func: Callable[..., Any], make_inputs: Callable[[slice], Tensor],
    collect: Callable[[Tensor, slice], tuple[Tensor, ...]], examples: Tensor,
    batch: int, additional_forward_args: object, chunk: int, show_progress: bool,
) -> tuple[Tensor, ...]:
    """Evaluate images that are derived from a batch, and concatenate what is collected.

    `make_inputs` creates the images of a part of all, and `collect` takes what shall be
    kept of their output. `examples` has the index of the example of each image, whose
    row of further arguments it is given. Nothing waits for the device unless one of
    these functions does.
    """
    check_evaluation(forward_func)
    args, per_example = split_args(additional_forward_args, batch)
    collected = []
    total = len(examples)
    with torch.no_grad(), tqdm(total=total, disable=not show_progress) as progress:
        for begin in range(0, total, chunk):
            part = slice(begin, min(begin + chunk, total))
            rows = examples[part]
            output = forward_func(make_inputs(part), *take_rows(args, per_example, rows))
            collected.append(collect(check_output(output, len(rows)), part))
            progress.update(len(rows))
    return tuple(torch.cat(tensors) for tensors in zip(*collected))
