#!/usr/bin/env bash
# LXT's rule for layer normalization is described as the identity rule, but relevance does not pass it unchanged.
#
# Versions: lxt 2.1, torch 2.14.1, torchvision 0.29.1, transformers 4.57.6, zennit 0.5.1, Python 3.11.
# Behaviour: after `monkey_patch`, a layer norm divides by a constant deviation, and its gradient goes on through the mean. Gradient x
#   Input is then LRP-epsilon of (x - mean) / deviation: the mean takes a part from each element, and the bias keeps its own. The
#   docstring of the patch calls it the identity rule and equivalent. For layer norms without mean and bias (RMS), it is.
# One would guess: the relevance of an input element is that of the output element at its place. An implementation of the rule by its
#   name gives other maps: on a small vision transformer that was trained on digits, insertion minus deletion is near zero by it, and
#   0.6 by what LXT computes.
# Seen: relevance of the input of a layer norm whose output elements have a relevance of 1 each:
#     [-0.0048, -1.273, 2.6878, 0.0], a sum of 1.4100
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 lxt==2.1 transformers==4.57.6 zennit==0.5.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from lxt.efficient import monkey_patch
from torchvision.models import vision_transformer

monkey_patch(vision_transformer)
norm = torch.nn.LayerNorm(4)
norm.bias.data.copy_(torch.tensor([.5, .5, .5, .5]))
x = torch.tensor([[1., 3., -2., 0.]], requires_grad=True)
output = norm(x)
# a relevance of one for each element of the output, as a factor of its value
gradient, = torch.autograd.grad(output, x, 1 / output.detach())
relevance = (x * gradient).detach()[0]
print(f'relevance of the input {[round(value, 4) for value in relevance.tolist()]}, a sum of {relevance.sum():.4f}')
sys.exit(not (relevance - 1).abs().max() > .5)
PYTHON
