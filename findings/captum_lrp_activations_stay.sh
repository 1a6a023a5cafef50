#!/usr/bin/env bash
# After an attribution with Captum's LRP, the network keeps the images: they are in the file when the network is saved.
#
# Versions: captum 0.9.0, torch 2.14.1, Python 3.11.
# Behaviour: LRP gives each layer an attribute "activations" with the inputs of its last call, and does not take it away. The state
#   dict is as before. But torch.save of the network writes all these inputs, among them the images; copies of it and processes that
#   get it carry them along; and their memory is not freed as long as the network is there.
# One would guess: the network is as it was, as after Captum's other methods, and as rules and hooks are removed.
# Seen:
#     KiB of the file: 29 before, 277 after Saliency and LRP (29 after Saliency)
#     image in the file: True
#     state dict as before: True
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 captum==0.9.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import io
import sys

import torch
from captum.attr import LRP, Saliency
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.pool = nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
        self.linear = nn.Linear(256, 24)

    def forward(self, images):
        return self.linear(self.pool(self.relu(self.conv1(images))).flatten(1))


def saved(network):
    file = io.BytesIO()
    torch.save(network, file)
    return file


def size(network):
    return len(saved(network).getvalue()) // 1024


torch.manual_seed(0)
network, image = Network().eval(), torch.rand(1, 3, 96, 96)
before, state = size(network), {key: value.clone() for key, value in network.state_dict().items()}
Saliency(network).attribute(image, target=1)
saliency = size(network)
LRP(network).attribute(image, target=1)
after = size(network)
print(f'KiB of the file: {before} before, {after} after Saliency and LRP ({saliency} after Saliency)')
loaded = torch.load(io.BytesIO(saved(network).getvalue()), weights_only=False)
found, = getattr(loaded.conv1, 'activations', {'': [None]}).values()
found = found[0] if isinstance(found, (tuple, list)) else found
same = found is not None and torch.equal(found, image)
print(f'image in the file: {same}')
equal = all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
print(f'state dict as before: {equal}')
sys.exit(not (same and equal and saliency == before and after > 2 * before))
PYTHON
