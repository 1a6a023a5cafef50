#!/usr/bin/env bash
# The gradient of torchvision's ps_roi_pool on the CPU is not that of its output, for regions off the upper left corner.
#
# Versions: torchvision 0.29.1, torch 2.14.1, Python 3.11, CPU.
# Behaviour: position-sensitive pooling is linear in the image, so <output, r> equals <gradient for r, image>, for any r. For the
#   region (0, 0, 3, 3) of a 6 x 6 image they are equal. For (2, 0, 6, 3) and (1, 2, 6, 6) they differ by several percent, and
#   torch.autograd.gradcheck fails. Whatever is computed by gradients from it (saliency, relevance, training) is off.
# One would guess: the gradient of a linear function is its transpose, wherever the region is.
# Seen:
#     region (0, 0, 3, 3): 0.487772 by the output, 0.487772 by the gradient
#     region (2, 0, 6, 3): 1.119057 by the output, 1.179594 by the gradient
#     region (1, 2, 6, 6): 0.642719 by the output, 0.565155 by the gradient
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torchvision.ops import ps_roi_pool

torch.manual_seed(0)
gaps = []
for region in ((0, 0, 3, 3), (2, 0, 6, 3), (1, 2, 6, 6)):
    image = torch.rand(1, 4, 6, 6, dtype=torch.double, requires_grad=True)
    output = ps_roi_pool(image, [torch.tensor([region], dtype=torch.double)], 2)
    weight = torch.rand_like(output)
    gradient, = torch.autograd.grad(output, image, weight)
    left, right = (output * weight).sum().item(), (gradient * image).sum().item()
    print(f'region {region}: {left:.6f} by the output, {right:.6f} by the gradient')
    gaps.append(abs(left - right))
sys.exit(not (gaps[0] < 1e-9 and min(gaps[1:]) > 1e-2))
PYTHON
