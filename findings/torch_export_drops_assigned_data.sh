#!/usr/bin/env bash
# torch.export leaves out what a network assigns to tensor.data, and the exported program returns other values without an error.
#
# Versions: torch 2.14.1, Python 3.11, CPU.
# Behaviour: a tensor that gets other values by assigning to its .data, as older code does to get around autograd, is followed by
#   torch.compile. torch.export.export, torch.jit.trace and make_fx record the tensor with the values that it had before. Only
#   torch.export.export(strict=True), which is not the default, refuses it. With torch.nn.Parameter(h) of an activation, make_fx keeps
#   the values of the input that was recorded, for all inputs to come; the others follow it.
# One would guess: recorded, or an error; least of all a program that differs from the network for the very input it was made with.
# Seen:
#     by .data         network 1.819  compiled 1.819  exported 0.000  jit.trace 0.000  make_fx 0.000  strict: Unsupported
#     by nn.Parameter  network 1.819  compiled 1.819  exported 1.819  jit.trace 1.819  make_fx 1.683  strict: Unsupported
# Exits with 1 if any of this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx


class Gated(torch.nn.Module):
    def __init__(self, by_data):
        super().__init__()
        self.by_data = by_data

    def forward(self, x):
        if self.by_data:
            gate = torch.zeros_like(x)
            gate.data = x.sin()
        else:
            gate = torch.nn.Parameter(x.sin(), requires_grad=False)
        return x * gate


recorded, other = torch.ones(3), torch.full((3,), 2.)
found = []
for by_data, name in ((True, 'by .data'), (False, 'by nn.Parameter')):
    network = Gated(by_data).eval()
    ways = {
        'network': network,
        'compiled': torch.compile(network, backend='aot_eager'),
        'exported': torch.export.export(network, (recorded,)).module(),
        'jit.trace': torch.jit.trace(network, (recorded,), check_trace=False),
        'make_fx': make_fx(network)(recorded),
    }
    values = [f'{key} {float(way(other)[0]):.3f}' for key, way in ways.items()]
    try:
        torch.export.export(network, (recorded,), strict=True)
        values.append('strict: exported')
    except Exception as error:
        values.append(f'strict: {type(error).__name__}')
    found.append(f'{name:15}  ' + '  '.join(values))
print(*found, sep='\n')
sys.exit(found != [
    'by .data         network 1.819  compiled 1.819  exported 0.000  jit.trace 0.000  make_fx 0.000  strict: Unsupported',
    'by nn.Parameter  network 1.819  compiled 1.819  exported 1.819  jit.trace 1.819  make_fx 1.683  strict: Unsupported',
])
PYTHON
