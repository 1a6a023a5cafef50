#!/usr/bin/env bash
# With percentile='auto', "remove most relevant first" of pytorch-grad-cam removes the least relevant pixels.
#
# Versions: grad-cam 1.5.7, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Behaviour: for a percentile, the mask is 1 where the map is below it, which is what is kept. For 'auto', it is 1 (255) where the map is
#   above Otsu's threshold, so the object is kept and the rest is imputed. ROADMostRelevantFirst('auto') rewards maps that miss the object.
# One would guess: the same pixels as with the percentile at which the threshold is.
# Seen: for a map that is high in a square of 4 x 4 of 16 x 16 pixels, the share that is kept:
#     percentile 94  square 0.00  rest 1.00
#     auto           square 1.00  rest 0.00
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet grad-cam==1.5.7 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 opencv-python==5.0.0.93 scipy==1.17.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from pytorch_grad_cam.metrics.perturbation_confidence import RemoveMostRelevantFirst

torch.manual_seed(0)
relevance = .2 * torch.rand(16, 16)
square = torch.zeros(16, 16, dtype=torch.bool)
square[4:8, 4:8] = True
relevance[square] = .7 + .3 * torch.rand(16)
found = []
# 16 of 256 pixels are above
for percentile in (93.75, 'auto'):
    kept = RemoveMostRelevantFirst(percentile, lambda image, mask: mask != 0)(torch.ones(3, 16, 16), relevance)
    found.append([float(kept[part].float().mean()) for part in (square, ~square)])
    name = 'auto' if percentile == 'auto' else f'percentile {percentile:.0f}'
    print(f'{name:13}  square {found[-1][0]:.2f}  rest {found[-1][1]:.2f}')
sys.exit(found != [[0., 1.], [1., 0.]])
PYTHON
