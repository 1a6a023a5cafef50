#!/usr/bin/env bash
# Zennit's rules keep the input of a layer's last call only: a layer that runs twice in a forward pass gets wrong relevance.
#
# Versions: zennit 0.5.1 (the same with 1.0.0, which needs Python 3.11.11), torch 2.14.1, Python 3.11.
# Behaviour: a rule stores what it needs in an attribute of its hook, which each call of the layer overwrites. In the backward pass,
#   the relevance of the first call is distributed by the input of the second one. So it is for weights that are shared within a
#   network (heads over pyramid levels, recurrent blocks, siamese branches), and for two forward passes before the first backward
#   pass. There is no error and no warning.
# One would guess: the relevance of a network in which the two calls are layers of their own with equal weights.
# Seen: relevance of the input by Epsilon, for a layer that is called twice, and for two layers with the same weights:
#     shared layer    [0.1439, 0.269, 0.0982]
#     two layers      [0.1822, 0.2289, 0.0999]
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 zennit==0.5.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys

import torch
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon

torch.manual_seed(0)
layer = nn.Linear(3, 3, bias=False)
layer.weight.data.abs_()
x = torch.rand(1, 3)
found = []
for name, second in (('shared layer', layer), ('two layers', copy.deepcopy(layer))):
    model = nn.Sequential(layer, nn.Softplus(), second, nn.Linear(3, 1, bias=False))
    torch.manual_seed(1)
    model[3].weight.data = torch.rand(1, 3)
    with Gradient(model=model, composite=LayerMapComposite([(nn.Linear, Epsilon(1e-9))])) as attributor:
        output, relevance = attributor(x, lambda output: output)
    found.append(relevance[0])
    print(f'{name:14}  {[round(value, 4) for value in relevance[0].tolist()]}')
sys.exit(not (found[0] - found[1]).abs().max() > .01)
PYTHON
