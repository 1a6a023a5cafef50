#!/usr/bin/env bash
# Quantus' Monotonicity says True for every map: it inserts no pixel of the image, but puts the baseline into the baseline.
#
# Versions: quantus 0.6.0, torch 2.14.1, numpy 1.26.4, Python 3.11.
# Behaviour: the metric starts from an image of the baseline (black by default), and at each step replaces the next pixels in ascending
#   order of relevance by the baseline, which they are already. The network sees the same image all the time, its score never falls,
#   and the result is True, whatever the map and the network are.
# One would guess: pixels are inserted in this order, and a map that ranks pixels by the reverse of their effect is not monotonic.
# Seen: for the negative mean of the image, so that each pixel that is inserted lowers the score:
#     relevance = image      True
#     relevance = -image     True
#     random relevance       True
#     scores while pixels are inserted: 0.0 -0.0625 -0.1875 -0.375 -0.625
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


class NegativeMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean = self.scale * x.mean((1, 2, 3))
        return torch.stack([-mean, 0 * mean], 1)


model = NegativeMean().eval()
image = np.array([.25, .5, .75, 1.], dtype='float32').reshape(1, 1, 2, 2)
noise = np.random.default_rng(0).random(image.shape, dtype='float32')
found = []
for name, relevance in (('relevance = image', image), ('relevance = -image', 1.5 - image), ('random relevance', noise)):
    metric = quantus.Monotonicity(features_in_step=1, perturb_baseline=0., normalise=False, disable_warnings=True)
    result = metric(model, image, np.array([0]), relevance, channel_first=True, softmax=False, device='cpu')
    found.append(bool(result[0]))
    print(f'{name:22} {found[-1]}')
shown = torch.zeros(1, 1, 2, 2)
scores = [0.]
for place in np.argsort(image.ravel()):
    shown.view(-1)[int(place)] = float(image.ravel()[place])
    scores.append(float(model(shown)[0, 0]))
print('scores while pixels are inserted:', *scores)
sys.exit(not (all(found) and scores == sorted(scores, reverse=True) and scores[-1] < 0))
PYTHON
