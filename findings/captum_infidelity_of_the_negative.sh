#!/usr/bin/env bash
# Captum's normalized infidelity cannot tell an explanation from its negative: both have the best score, zero.
#
# Versions: captum 0.9.0, torch 2.14.1, Python 3.11.
# Behaviour: infidelity(..., normalize=True) multiplies attributions by the factor that fits them best to the changes of the output, so
#   that methods of different scale can be compared. The factor may be negative: a map with all signs reversed, in which what speaks for
#   the class speaks against it, is as faithful as the right one. Without normalization, the difference is plain.
# One would guess: invariance to a positive scale, and a bad score for the reversed map.
# Seen: for a linear network, whose gradient is the exact answer:
#     gradient       plain 0.00000  normalized 0.00000
#     3 x gradient   plain 0.01265  normalized 0.00000
#     -gradient      plain 0.01265  normalized 0.00000
#     random         plain 0.03236  normalized 0.00344
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet captum==0.9.0 torch==2.14.1 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from captum.metrics import infidelity
from torch import nn

torch.manual_seed(0)
model = nn.Linear(192, 3).eval()
inputs = torch.rand(2, 192)
gradient = model.weight[1].detach().expand(2, -1)


def perturb(inputs):
    noise = .1 * torch.randn_like(inputs)
    return noise, inputs - noise


found = {}
maps = {'gradient': gradient, '3 x gradient': 3 * gradient, '-gradient': -gradient, 'random': torch.randn(2, 192) / 8}
for name, attributions in maps.items():
    torch.manual_seed(1)
    found[name] = [
        float(infidelity(model, perturb, inputs, attributions, target=1, n_perturb_samples=1000, normalize=normalize).mean())
        for normalize in (False, True)
    ]
    print('{:13}  plain {:.5f}  normalized {:.5f}'.format(name, *map(abs, found[name])))
wrong, right, other = found['-gradient'], found['gradient'], found['random']
sys.exit(not (abs(right[1]) < 1e-6 and abs(wrong[1]) < 1e-6 and wrong[0] > 1e-3 and other[1] > 1e-4))
PYTHON
