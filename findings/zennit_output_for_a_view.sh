#!/usr/bin/env bash
# Under a composite of Zennit, the output of a network is not bit for bit its own where a layer is given a part of a tensor.
#
# Versions: zennit 0.5.1 (the same with 1.0.0, which needs Python 3.11.11), torch 2.14.1, Python 3.11, a CPU with vector instructions.
# Behaviour: each layer with a rule gets a copy of its input, so that operations in place work. The copy of a part (a slice, or half of
#   the channels) is contiguous, for which PyTorch takes vector instructions, where it had computed one element after the other. Sigmoid
#   and other functions have other last bits then. Whoever compares outputs with and without the composite exactly, or by a hash, finds
#   another network.
# One would guess: the forward pass is the same, as a composite has rules for the backward pass.
# Seen: largest difference of the output with and without a composite, of which the rule leaves the gradient of the layer as it is, in
#   double precision:
#     whole tensor    0.000e+00
#     part of it      2.220e-16
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
from zennit.composites import LayerMapComposite
from zennit.rules import Pass

torch.manual_seed(0)
table = torch.randn(2000, 6, dtype=torch.float64)
layer = nn.Sequential(nn.Sigmoid())
found = []
for name, given in (('whole tensor', table), ('part of it', table[:, 1:])):
    plain = layer(given)
    with LayerMapComposite([(nn.Sigmoid, Pass())]).context(layer):
        output = layer(given.detach().requires_grad_())
    found.append((plain - output).abs().max().item())
    print(f'{name:14}  {found[-1]:.3e}')
sys.exit(not (found[0] == 0 and 0 < found[1] < 1e-15))
PYTHON
