#!/usr/bin/env bash
# A network of which one layer runs under torch.no_grad() cannot be explained with Zennit: registering a hook on nothing raises.
#
# Versions: zennit 0.5.1, torch 2.14.1, Python 3.11. (zennit 1.0.0, which needs Python 3.11.11, raises "RuntimeError: Backward hook
#   could not be registered!" at the same place.)
# Behaviour: the hook of a rule inserts a node into the graph before and after its layer, and puts a hook on it. Where gradients are
#   switched off (a mask or gate that is computed under no_grad, a frozen branch), there is no node, and the forward pass ends with an
#   AttributeError that names neither the layer nor the reason.
# One would guess: no relevance goes there, as no gradient does. The gradient of the same network by autograd works.
# Seen:
#     autograd  gradient of shape (1, 3, 8, 8)
#     zennit    AttributeError: 'NoneType' object has no attribute 'register_hook'
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 zennit==0.5.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        with torch.no_grad():
            gate = self.gate(images).sigmoid()
        return self.head((self.features(images) * gate).mean((2, 3)))


model, images = Gated().eval(), torch.rand(1, 3, 8, 8, requires_grad=True)
gradient = torch.autograd.grad(model(images)[0, 0], images)[0]
print(f'autograd  gradient of shape {tuple(gradient.shape)}')
try:
    with Gradient(model=model, composite=EpsilonPlus()) as attributor:
        attributor(images.detach(), torch.eye(2)[[0]])
except AttributeError as error:
    print(f'zennit    AttributeError: {error}')
    sys.exit('register_hook' not in str(error))
sys.exit(1)
PYTHON
