#!/usr/bin/env bash
# Captum's guided backpropagation and DeepLift are plain gradients where a network calls torch.relu instead of a module.
#
# Versions: captum 0.9.0, torch 2.14.1, Python 3.11.
# Behaviour: both methods set hooks on modules. A ReLU that is a function (torch.relu, F.relu, as in most code for CIFAR's ResNets)
#   is not seen. Guided backpropagation is then the gradient, bit for bit; DeepLift is gradient times input, and does not sum to the
#   difference of the outputs. There is no error and no warning. DeepLift knows no GELU, SiLU, ReLU6 or Hardswish either: for those,
#   also as modules, it is the same.
# One would guess: two networks with the same weights that compute the same function have the same attributions.
# Seen:                     guided backpropagation is the gradient   DeepLift: sum, difference of outputs
#     ReLU as a module        False                                    0.0620 0.0620
#     ReLU as a function      True                                     0.0679 0.0620
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 captum==0.9.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from captum.attr import DeepLift, GuidedBackprop
from torch import nn


class Network(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.relu = function or nn.ReLU()

    def forward(self, images):
        return self.linear(self.relu(self.conv(images)).amax((2, 3)))


torch.manual_seed(0)
module, function, image = Network(None), Network(torch.relu), torch.randn(1, 3, 8, 8)
function.load_state_dict(module.state_dict())
found = []
for name, network in (('module', module), ('function', function)):
    leaf = image.clone().requires_grad_()
    gradient, = torch.autograd.grad(network(leaf)[0, 1], leaf)
    guided = GuidedBackprop(network).attribute(image.clone().requires_grad_(), target=1)
    total = DeepLift(network).attribute(image, target=1).sum()
    difference = (network(image) - network(0 * image))[0, 1]
    found.append((torch.equal(guided, gradient), bool((total - difference).abs() < 1e-3)))
    print(f'ReLU as a {name:12}  {found[-1][0]!s:40} {total:.4f} {difference:.4f}')
sys.exit(found != [(False, True), (True, False)])
PYTHON
