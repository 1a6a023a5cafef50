'''What all tests have in common.'''
import pytest
import torch

# networks are too small for more, and processes of pytest-xdist would compete for the same cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    '''Make each test independent of the order of tests.'''
    torch.manual_seed(0)
