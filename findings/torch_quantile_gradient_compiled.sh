#!/usr/bin/env bash
# The gradient of torch.quantile goes to another element when it is compiled, if several are equal, as after a ReLU.
#
# Versions: torch 2.14.1, Python 3.11, CPU.
# Behaviour: the quantile of (0, 0, 0, 5, 0, 7) at 0.4 is one of its zeros. Eager code gives the whole gradient to the first zero. The same
#   function under torch.compile (backend aot_eager, which compiles nothing but traces autograd), and a sort written out, give it to the
#   third. Activations behind a ReLU have many zeros, so maps of relevance or gradients differ visibly between both, with equal outputs.
# One would guess: tracing with aot_eager does not change which subgradient is taken.
# Seen:
#     eager     [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
#     compiled  [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
#     sort      [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch

values = torch.tensor([0., 0., 0., 5., 0., 7.])


def gradient(function):
    leaf = values.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0].tolist()


def quantile(tensor):
    return tensor.quantile(.4, interpolation='lower')


eager = gradient(quantile)
compiled = gradient(torch.compile(quantile, backend='aot_eager'))
written = gradient(lambda tensor: tensor.sort()[0][2])
print('eager    ', eager)
print('compiled ', compiled)
print('sort     ', written)
sys.exit(not (eager.index(1) == 0 and compiled.index(1) == written.index(1) == 2))
PYTHON
