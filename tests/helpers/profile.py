'''Settings of hypothesis.'''
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {'deadline': None, 'database': None, 'suppress_health_check': [HealthCheck.too_slow]}

PROFILES = {
    'quick': settings(max_examples=40, derandomize=True, **_COMMON),
    'thorough': settings(max_examples=400, derandomize=False, print_blob=True, **_COMMON),
}

PROFILE = PROFILES[os.environ.get('HYPOTHESIS_PROFILE', 'quick')]


@pytest.fixture(autouse=True)
def single_thread():
    '''Small inputs do not profit from threads.'''
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)
