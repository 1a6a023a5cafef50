#!/usr/bin/env bash
# The gradient of an image through a vision transformer takes half as long again if its weights are frozen.
#
# Versions: torch 2.14.1, torchvision 0.29.1, Python 3.11, CPU.
# Behaviour: attention hands a transposed view to its linear layer. Of an input that is not contiguous, PyTorch makes one matrix product
#   (aten::mm) only if the weight requires a gradient. If it does not, it makes one small product for each token (aten::bmm, here 197 of
#   a batch of 4 rows each), forwards and backwards. To freeze parameters, as is usual for attributions, which need no gradient of them,
#   is what makes them slow.
# One would guess: what needs fewer gradients is faster, or as fast.
# Seen (one thread; times differ between machines, numbers of products do not):
#     trainable  products of each token:  0   seconds: 8.15
#     frozen     products of each token: 24   seconds: 12.64
# Exits with 1 if the numbers of products change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import time

import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

torch.manual_seed(0)
torch.set_num_threads(1)
network = torchvision.models.vit_b_16().eval()
images = torch.rand(4, 3, 224, 224)
TOKENS = 197


class Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and len(args[0]) == TOKENS:
            self.number += 1
        return func(*args, **(kwargs or {}))


def gradient():
    leaf = images.clone().requires_grad_()
    begin = time.perf_counter()
    torch.autograd.grad(network(leaf)[:, 0].sum(), leaf)
    return time.perf_counter() - begin


found = []
for name, is_trainable in (('trainable', True), ('frozen', False)):
    network.requires_grad_(is_trainable)
    with Count() as count:
        gradient()
    found.append(count.number)
    seconds = min(gradient() for _ in range(2))
    print(f'{name:9}  products of each token: {count.number:2}   seconds: {seconds:.2f}')
sys.exit(found != [0, 24])
PYTHON
