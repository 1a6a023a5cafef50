#!/usr/bin/env bash
# Captum's LRP explains a ResNet without any error, and relevance of the input sums to hundreds of millions of the logit.
#
# Versions: captum 0.9.0, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Behaviour: for a type of module that it has no rule for, LRP raises an error. An addition is no module: what a residual block adds
#   ("out += identity") is not seen. Both summands get the whole relevance, which the next rule divides by the summand, however
#   small that is. So relevance grows from block to block, and is not finite in a deep network. So it is for trained weights too.
#   return_convergence_delta shows it, if one asks for it.
# One would guess: an error, as for a layer norm, or a sum that is not larger than the logit by orders of magnitude.
# Seen: logit and sum of relevance, and the same for the residual branches one after another
#     resnet18              0.4603   -303976448.0
#     without additions     0.0540   0.0162
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 captum==0.9.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from captum.attr import LRP
from torch import nn
from torchvision.models import resnet18


def explain(network, image):
    relevance = LRP(network).attribute(image, target=1)
    return float(network(image)[0, 1]), float(relevance.sum())


class Chain(nn.Module):
    '''The residual branches of a ResNet-18, one after another.'''
    def __init__(self, network):
        super().__init__()
        blocks = [block for stage in (1, 2, 3, 4) for block in getattr(network, f'layer{stage}')]
        branches = [[block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2, nn.ReLU()] for block in blocks]
        self.layers = nn.Sequential(
            network.conv1, network.bn1, nn.ReLU(), network.maxpool, *sum(branches, []), network.avgpool
        )
        self.fc = network.fc

    def forward(self, images):
        return self.fc(self.layers(images).flatten(1))


torch.manual_seed(0)
network, image = resnet18(num_classes=4).eval(), torch.randn(1, 3, 64, 64)
logit, total = explain(network, image)
print(f'resnet18            {logit:8.4f}   {total}')
chain_logit, chain_total = explain(Chain(network).eval(), image)
print(f'without additions   {chain_logit:8.4f}   {chain_total:.4f}')
sys.exit(not (abs(total) > 1e6 * abs(logit) and abs(chain_total) < 10 * abs(chain_logit)))
PYTHON
