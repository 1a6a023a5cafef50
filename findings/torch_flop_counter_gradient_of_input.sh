#!/usr/bin/env bash
# Operations of a gradient of the input cannot be counted by PyTorch's own counter.
#
# Versions: torch 2.14.1, Python 3.11, CPU.
# Behaviour: FlopCounterMode follows modules by hooks on tensors that enter them. The image is one of these and a leaf, and
#   torch.autograd.grad of it raises a RuntimeError, which names an internal function and neither the counter nor the image. backward()
#   is counted, and so is the gradient of a copy of the image.
# One would guess: the counter measures any computation, above all the gradient of the input that attributions are made of.
# Seen:
#     autograd.grad of the image      RuntimeError: A leaf node was passed to _will_engine_execute_node but we are currently running
#                                     autograd.grad(). This is currently not supported.
#     backward()                      221184 operations
#     autograd.grad, image times one  221184 operations
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU(), torch.nn.Flatten())
network.requires_grad_(False)
image = torch.rand(1, 3, 16, 16)


def count(run):
    with FlopCounterMode(display=False) as counter:
        try:
            run(image.clone().requires_grad_())
        except RuntimeError as error:
            return f'{type(error).__name__}: {error}'
    return f'{counter.get_total_flops()} operations'


found = {
    'autograd.grad of the image': count(lambda leaf: torch.autograd.grad(network(leaf).sum(), leaf)),
    'backward()': count(lambda leaf: network(leaf).sum().backward()),
    'autograd.grad, image times one': count(lambda leaf: torch.autograd.grad(network(leaf * 1).sum(), leaf)),
}
for name, result in found.items():
    print(f'{name:31} {result}')
error, *counts = found.values()
sys.exit(not ('RuntimeError' in error and all('operations' in result for result in counts)))
PYTHON
