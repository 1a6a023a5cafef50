#!/usr/bin/env bash
# One target for a batch of images gives blank maps for all but the first image in pytorch-grad-cam, without a warning.
#
# Versions: grad-cam 1.5.7, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Behaviour: targets and outputs are paired until the shorter list ends. The other images get no gradient, so their weights are zero,
#   and their maps too. The metrics of the same package (ROAD, drop in confidence) then return one score for the batch of four.
# One would guess: one target counts for all images, as in Captum, or an error says that their number is wrong.
# Seen: the highest value of each map, and the number of scores:
#     one target    [1.0, 0.0, 0.0, 0.0]
#     four targets  [1.0, 1.0, 1.0, 1.0]
#     scores by DropInConfidence with one target: 1
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet grad-cam==1.5.7 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 opencv-python==5.0.0.93 scipy==1.17.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)
).eval()
images = torch.rand(4, 3, 16, 16)
target = ClassifierOutputTarget(1)
found = []
with GradCAM(model, [model[1]]) as cam:
    for name, targets in (('one target', [target]), ('four targets', [target] * 4)):
        maps = cam(images, targets)
        found.append([round(float(value), 3) for value in maps.max((1, 2))])
        print(f'{name:12}  {found[-1]}')
scores = DropInConfidence()(images, maps[:, None], [target], model)
print('scores by DropInConfidence with one target:', len(scores))
sys.exit(not (found == [[1., 0., 0., 0.], [1.] * 4] and len(scores) == 1))
PYTHON
