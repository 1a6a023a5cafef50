#!/usr/bin/env bash
# After an attribution with Zennit 1.0.0, a network's state dict is not the one that it had, while its output is.
#
# Versions: zennit 1.0.0, torch 2.14.1, torchvision 0.29.1, Python 3.13 (1.0.0 needs 3.11.11 or later; set PYTHON).
# Behaviour: a composite with ResNetCanonizer merges batch normalization, and takes that back when its context is left. The
#   output is the same as before, but 20 of the entries of the state dict of a ResNet-18 have other values (merged weights, beside
#   batch normalizations that are not merged), there are 20 more entries, and parameters() are not what forward uses: a
#   checkpoint that is saved now and loaded into a new network gives another output.
# One would guess: the network is as it was, since its output is.
# Seen:
#     output as before True
#     additional entries 20, entries with other values 20
#     saved and loaded: output as before False
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.13}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 zennit==1.0.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torchvision.models import resnet18
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.torchvision import ResNetCanonizer

torch.manual_seed(0)
model, image = resnet18(num_classes=4).eval(), torch.rand(1, 3, 64, 64)
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_var.uniform_(.5, 2)
before, output = {key: elem.clone() for key, elem in model.state_dict().items()}, model(image)
with Gradient(model=model, composite=EpsilonPlus(canonizers=[ResNetCanonizer()])) as attributor:
    attributor(image.clone(), torch.eye(4)[[1]])
after = model.state_dict()
same = torch.equal(model(image), output)
others = sum(not torch.equal(elem, after[key]) for key, elem in before.items())
print(f'output as before {same}')
print(f'additional entries {len(after) - len(before)}, entries with other values {others}')
loaded = resnet18(num_classes=4).eval()
loaded.load_state_dict(after, strict=False)
reloaded = torch.allclose(loaded(image), output, atol=1e-4)
print(f'saved and loaded: output as before {reloaded}')
sys.exit(not (same and others == 20 and len(after) - len(before) == 20 and not reloaded))
PYTHON
