#!/usr/bin/env bash
# In Quantus' PointingGame, an image without any object is a hit, and weighted=True raises an error.
#
# Versions: quantus 0.6.0, torch 2.14.1, numpy 1.26.4, Python 3.11.
# Behaviour: hits are an array of booleans. NaN for an empty mask is stored into it, which makes it True: crops and data sets with
#   images without the object raise the score. The weight by the size of the object would be stored there as well, but its shape does
#   not fit, also for a single image.
# One would guess: NaN for an empty mask, as in TopKIntersection and RelevanceRankAccuracy, and as a comment in the code says, and a
#   number between 0 and 1 with weights.
# Seen: for a map whose highest pixel is the first one:
#     mask around it        True
#     mask elsewhere        False
#     empty mask            True
#     TopKIntersection      nan
#     weighted=True         TypeError
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

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
images = np.ones((1, 1, 8, 8), dtype='float32')
relevance = np.linspace(1, 0, 64, dtype='float32').reshape(1, 1, 8, 8)
masks = {'mask around it': (0, 3), 'mask elsewhere': (4, 8), 'empty mask': (0, 0)}


def score(metric, begin, end):
    mask = np.zeros((1, 1, 8, 8))
    mask[..., begin:end, begin:end] = 1
    try:
        return metric(model, images, np.array([0]), relevance, mask, channel_first=True, device='cpu')[0]
    except Exception as error:
        return type(error).__name__


found = [score(quantus.PointingGame(disable_warnings=True), *place) for place in masks.values()]
found.append(score(quantus.TopKIntersection(1, disable_warnings=True), 0, 0))
found.append(score(quantus.PointingGame(weighted=True, disable_warnings=True), 0, 3))
for name, value in zip((*masks, 'TopKIntersection', 'weighted=True'), found):
    print(f'{name:20}  {value}')
sys.exit([str(value) for value in found] != ['True', 'False', 'True', 'nan', 'TypeError'])
PYTHON
