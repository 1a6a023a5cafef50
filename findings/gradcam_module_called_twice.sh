#!/usr/bin/env bash
# A ReLU that a network uses in two places gives pytorch-grad-cam the map of the first place, whichever one was meant.
#
# Versions: grad-cam 1.5.7, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Behaviour: a target layer is a module, and what each of its calls returns is appended to a list, of which the first element is used.
#   EfficientNets of several packages have one activation for the stem and for the last map: given that module, which is the last one that
#   returns a map, Grad-CAM shows the stem. On EfficientNet-Lite0 trained on ImageNet, its honest ID was -0.00 and its grid pointing 0.22,
#   below chance.
# One would guess: the map of the last call, as with torch-cam, or an error, as the layer is ambiguous.
# Seen:
#     one ReLU for both places: the map of the first place: True, of the last place: False
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
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

torch.manual_seed(0)


class Network(nn.Module):
    def __init__(self, is_shared):
        super().__init__()
        self.stem, self.last, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 3)
        self.first_relu = nn.ReLU()
        self.last_relu = self.first_relu if is_shared else nn.ReLU()

    def forward(self, x):
        return self.fc(self.last_relu(self.last(self.first_relu(self.stem(x)))).mean((2, 3)))


shared, apart = Network(True).eval(), Network(False).eval()
apart.load_state_dict(shared.state_dict())
image = torch.rand(1, 3, 16, 16)
maps = []
for network, layer in ((shared, 'last_relu'), (apart, 'first_relu'), (apart, 'last_relu')):
    with GradCAM(model=network, target_layers=[getattr(network, layer)]) as cam:
        maps.append(cam(input_tensor=image, targets=[ClassifierOutputTarget(0)])[0])
found = [bool(abs(maps[0] - other).max() < 1e-6) for other in maps[1:]]
print(f'one ReLU for both places: the map of the first place: {found[0]}, of the last place: {found[1]}')
sys.exit(found != [True, False])
PYTHON
