#!/usr/bin/env bash
# In Quantus' parameter randomization (MPRT), all layers of one shape get the same "random" weights, and the mean has the original in it.
#
# Versions: quantus 0.6.0, torch 2.14.1, numpy 1.26.4, Python 3.11.
# Behaviour: the seed is set anew before each layer is randomized, so layers of one shape, as the blocks of a residual network or of a
#   transformer, are copies of each other: the "random" network is one with shared weights. The mean over layers
#   (return_average_correlation=True) includes the network before randomization, whose correlation is 1. With few layers, this is much.
# One would guess: independent weights, and the mean over the layers that were randomized.
# Seen: for four linear layers, of which the second and the third are of 20 x 20:
#     weights of both equal after randomization: True
#     mean of the 4 depths 0.206, and as returned 0.365
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
model = nn.Sequential(
    nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)
).eval()
images = np.random.default_rng(0).random((6, 3, 8, 8), dtype='float32')
labels = np.arange(6) % 5
seen = []


def explain(model, inputs, targets, **kwargs):
    seen.append([bool((model[3].weight == model[5].weight).all())])
    leaf = torch.tensor(inputs, requires_grad=True)
    output = model(leaf)[range(len(inputs)), torch.tensor(targets)].sum()
    return (torch.autograd.grad(output, leaf)[0] * leaf).sum(1, keepdim=True).detach().numpy()


def measure(**options):
    metric = quantus.MPRT(disable_warnings=True, **options)
    return metric(model, images, labels, channel_first=True, device='cpu', explain_func=explain)


depths = measure()
mean = np.mean([values for name, values in depths.items() if name != 'original'])
returned = np.mean(measure(return_average_correlation=True))
print('weights of both equal after randomization:', seen[-1][0])
print(f'mean of the {len(depths) - 1} depths {mean:.3f}, and as returned {returned:.3f}')
sys.exit(not (seen[-1][0] and not seen[0][0] and abs(returned - (4 * mean + 1) / 5) < 1e-9))
PYTHON
