#!/usr/bin/env bash
# torch.export accepts a network that has a submodule called `graph`, but the exported program cannot be made a module again.
#
# Versions: torch 2.14.1, Python 3.11, CPU.
# Behaviour: torch.export.export returns a program, with the weight graph.weight among its parameters. program.module() raises an error
#   that the node's target references a nonexistent attribute. (A GraphModule has a property of this name.) With any other name of the
#   submodule it works. Graph networks call a part of themselves so.
# One would guess: what export accepts can be run, and names of submodules are free.
# Seen:
#     layer: torch.Size([1, 2])
#     graph: RuntimeError
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch


class Network(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        setattr(self, name, torch.nn.Linear(2, 2))

    def forward(self, x):
        return getattr(self, self.name)(x)


seen = []
for name in ('layer', 'graph'):
    program = torch.export.export(Network(name), (torch.rand(1, 2),))
    try:
        seen.append(str(program.module()(torch.rand(1, 2)).shape))
    except Exception as error:
        seen.append(type(error).__name__)
    print(f'{name}: {seen[-1]}')
sys.exit(seen != ['torch.Size([1, 2])', 'RuntimeError'])
PYTHON
