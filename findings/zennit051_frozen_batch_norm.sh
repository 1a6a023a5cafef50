#!/usr/bin/env bash
# Zennit 0.5.1 leaves torchvision's FrozenBatchNorm2d (all detection backbones) alone, and relevance is multiplied by its scales.
#
# Versions: zennit 0.5.1, torch 2.14.1, torchvision 0.29.1, Python 3.11. Zennit 1.0.0 treats it like BatchNorm2d.
# Behaviour: ResNetCanonizer merges BatchNorm2d into the convolution before it. FrozenBatchNorm2d computes the same by
#   arithmetic in its forward, so nothing is merged, no rule applies, and each one passes the plain gradient on.
# One would guess: the same relevance for the same function, or a warning.
# Seen, for a ResNet-18 with the same weights and statistics in both forms, and a logit of 11.22:
#     BatchNorm2d        relevance at the input   0.570
#     FrozenBatchNorm2d  relevance at the input 120.488
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 zennit==0.5.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.torchvision import ResNetCanonizer

torch.manual_seed(0)
frozen = resnet18(num_classes=4, norm_layer=FrozenBatchNorm2d).eval()
for module in frozen.modules():
    if isinstance(module, FrozenBatchNorm2d):
        module.weight.uniform_(.5, 2)
        module.running_var.uniform_(.5, 2)
        module.running_mean.normal_(0, .3)
        module.bias.normal_(0, .3)
twin = resnet18(num_classes=4).eval()
twin.load_state_dict(frozen.state_dict(), strict=False)
image, sums, outputs = torch.rand(1, 3, 64, 64), {}, []
for name, model in {'BatchNorm2d': twin, 'FrozenBatchNorm2d': frozen}.items():
    with Gradient(model=model, composite=EpsilonPlus(canonizers=[ResNetCanonizer()])) as attributor:
        output, relevance = attributor(image.clone(), torch.eye(4)[[1]])
    outputs.append(output)
    sums[name] = relevance.sum().item()
    print(f'{name:17}  relevance at the input {sums[name]:7.3f}')
assert torch.allclose(*outputs, rtol=1e-3)
sys.exit(not sums['FrozenBatchNorm2d'] > 50 * sums['BatchNorm2d'] > 0)
PYTHON
