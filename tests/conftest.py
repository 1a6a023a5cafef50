'''What all tests have in common.'''
import gc

import pytest
import torch

# networks are too small for more, and processes of pytest-xdist would compete for the same cores
torch.set_num_threads(1)
# parameters of tests may be random, and are part of their names, which must be those of other processes
torch.manual_seed(0)


def pytest_collection_finish(session):
    '''What was imported and collected stays, so that searching for garbage in tests need not pass through it.'''
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    '''Make each test independent of the order of tests.'''
    # torch.manual_seed formats the stack for each kind of device, which takes longer than many tests
    torch.default_generator.manual_seed(0)
