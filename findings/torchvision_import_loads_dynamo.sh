#!/usr/bin/env bash
# Importing torchvision loads torch._dynamo, the front end of torch.compile, which takes nearly as long as importing torch.
#
# Versions: torch 2.14.1, torchvision 0.29.1, Python 3.11, CPU.
# Behaviour: torchvision.ops.roi_align asks torch._dynamo whether it may be compiled, at import time. So every program that imports
#   torchvision, also for a network or a transform only, loads some hundred modules of the compiler: 1.4 s of processor time beside 1.5 s
#   for torch itself on a server core. Command lines and test workers that explain one image feel it.
# One would guess: the compiler is loaded when something is compiled, as torch does it (import torch leaves torch._dynamo out).
# Seen:
#     after import torch:        torch._dynamo False
#     after import torchvision:  torch._dynamo True
#     modules of torch._dynamo:  more than 50
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import time

import torch  # noqa: F401

first = 'torch._dynamo' in sys.modules
start = time.process_time()
import torchvision  # noqa: E402, F401

seconds = time.process_time() - start
second = 'torch._dynamo' in sys.modules
number = sum(name.startswith('torch._dynamo') for name in sys.modules)
print(f'after import torch:        torch._dynamo {first}')
print(f'after import torchvision:  torch._dynamo {second}')
print(f'modules of torch._dynamo:  {number}, {seconds:.2f} s of processor time for the import')
sys.exit(first or not second or number <= 50)
PYTHON
