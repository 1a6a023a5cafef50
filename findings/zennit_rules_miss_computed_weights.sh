#!/usr/bin/env bash
# Zennit's rules that modify weights do nothing to layers whose weight is computed: weight norm, parametrizations, pruning.
#
# Versions: zennit 0.5.1 (the same with 1.0.0, which needs Python 3.11.11), torch 2.14.1, Python 3.11.
# Behaviour: a rule temporarily replaces the parameters of a layer (z+ clamps them at zero) and runs its forward again. With
#   weight_norm these are weight_g and weight_v, with a parametrization none but the bias, with pruning weight_orig. The forward
#   uses the computed weight, which stays as it was, so the z+ rule propagates by the weights of both signs. There is no warning,
#   and relevance still sums to what it started from.
# One would guess: the relevance of the same layer with a plain weight, as the layer computes the same function.
# Seen: smallest relevance 0.000 for a plain weight (z+ of a positive input has no negative relevance), -2.292 for the others:
#     plain                         smallest relevance    0.000  sum   4.000
#     weight_norm                   smallest relevance   -2.292  sum   4.000
#     parametrizations.weight_norm  smallest relevance   -2.292  sum   4.000
#     prune                         smallest relevance   -2.292  sum   4.000
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 zennit==0.5.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch.nn.utils import parametrizations, prune, weight_norm
from zennit.rules import ZPlus


def relevance(layer, x):
    handles = ZPlus(stabilizer=1e-9, zero_params='bias').register(layer)
    x = x.clone().requires_grad_()
    result, = torch.autograd.grad(layer(x), x, torch.ones(1, 4))
    handles.remove()
    return result


torch.manual_seed(0)
x = torch.rand(1, 8)
weight = torch.nn.Linear(8, 4, bias=False).weight.detach()
found = {}
for name, change in {
    'plain': lambda layer: None,
    'weight_norm': weight_norm,
    'parametrizations.weight_norm': parametrizations.weight_norm,
    'prune': lambda layer: prune.random_unstructured(layer, 'weight', amount=0),
}.items():
    layer = torch.nn.Linear(8, 4, bias=False)
    layer.weight.data = weight.clone()
    change(layer)
    layer(x)
    assert torch.allclose(layer.weight, weight, atol=1e-6)
    found[name] = relevance(layer, x)
    print(f'{name:28}  smallest relevance {found[name].min().item():8.3f}  sum {found[name].sum().item():7.3f}')
plain, *others = found.values()
sys.exit(not (plain.min() >= 0 and all(elem.min() < -1 and abs(elem.sum() - 4) < 1e-3 for elem in others)))
PYTHON
