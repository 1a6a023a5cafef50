#!/usr/bin/env bash
# Quantus' ROAD reports the accuracy on the first batch only, and leaves out all other images.
#
# Versions: quantus 0.6.0, torch 2.14.1, numpy 1.26.4, Python 3.11.
# Behaviour: images are evaluated in batches of 64, or of batch_size. The mean over images is taken of the first batch's results. All
#   batches are computed, and those of the second and later ones never used. There is no warning.
# One would guess: the result does not depend on batch_size.
# Seen: for eight images, the first two of which are classified correctly and the others wrongly, with 10 % of pixels removed:
#     batch_size 8   accuracy 0.25
#     batch_size 4   accuracy 0.5
#     batch_size 2   accuracy 1.0
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet quantus==0.6.0 torch==2.14.1 numpy==1.26.4 pandas==2.3.3 scipy==1.17.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import numpy as np
import quantus
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
# images that hardly change if some of their pixels are imputed
images = (np.ones((8, 1, 8, 8)) + .01 * np.random.default_rng(0).random((8, 1, 8, 8))).astype('float32')
labels = model(torch.from_numpy(images)).argmax(1).numpy()
labels[2:] = (labels[2:] + 1) % 5
relevance = np.random.default_rng(1).random(images.shape, dtype='float32')
found = []
for size in (8, 4, 2):
    metric = quantus.ROAD(percentages=[10], noise=0., disable_warnings=True)
    scores = metric(model, images, labels, relevance, channel_first=True, device='cpu', batch_size=size)
    found.append(float(scores[10]))
    print(f'batch_size {size}   accuracy {found[-1]}')
sys.exit(found != [.25, .5, 1.])
PYTHON
