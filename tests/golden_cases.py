'''Golden cases: relevance computed in float64 by loops over single connections, independently of this project.'''
import json
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / 'golden'


def golden_cases(pattern, rule):
    '''All cases of a rule, as pytest parameters ``(arrays, settings, case)``.'''
    params = []
    for path in sorted(FOLDER.glob(f'{pattern}.npz')):
        arrays = np.load(path)
        settings = json.loads(str(arrays['settings'][0]))
        for num, case in enumerate(settings['cases']):
            if case['rule'] == rule:
                params.append(pytest.param(arrays, settings, case, id=f'{path.stem}-{num}'))
    assert params, f'no golden case of {rule} in {pattern}'
    return params


def tensor(arrays, key, dtype=torch.float64):
    '''An array of a case as a batch of one.'''
    return torch.from_numpy(np.array(arrays[key])).to(dtype)[None]


def relative_error(actual, expected):
    '''Largest deviation, relative to the largest value.'''
    actual = actual.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
