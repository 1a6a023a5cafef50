#!/usr/bin/env bash
# torch.compile on the CPU writes C++ that does not compile for the exponents of torch.frexp in double precision.
#
# Versions: torch 2.14.1, Python 3.11, CPU with AVX-512, g++ 12.
# Behaviour: a function that clamps the exponents of frexp, as one does to rescale a tensor by a power of two, is compiled in single
#   precision with the right result. In double precision, the default backend raises InductorError (CppCompileError). The exponents are
#   integers of 32 bits beside numbers of 64 bits. floor(log2) instead of frexp compiles.
# One would guess: a function that compiles in one precision compiles in the other.
# Seen:
#     torch.float32: equal
#     torch.float64: InductorError
#     torch.float64 by log2: equal
# Exits with 1 if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore - 2> "$work/errors" <<'PYTHON'
import sys

import torch


def exponents(tensor):
    return torch.frexp(tensor)[1].clamp(-126, 126).to(tensor.dtype)


def logarithms(tensor):
    return tensor.log2().floor().add(1).clamp(-126, 126)


seen = []
for function, dtype, label in (
    (exponents, torch.float32, 'torch.float32'), (exponents, torch.float64, 'torch.float64'),
    (logarithms, torch.float64, 'torch.float64 by log2'),
):
    values = torch.rand(4, 64, dtype=dtype)
    try:
        seen.append('equal' if torch.equal(torch.compile(function)(values), function(values)) else 'differs')
    except Exception as error:
        seen.append(type(error).__name__)
    print(f'{label}: {seen[-1]}')
sys.exit(seen != ['equal', 'InductorError', 'equal'])
PYTHON
