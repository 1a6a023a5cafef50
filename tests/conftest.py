'''Fixtures shared by all tests.'''
import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    '''Make each test independent of the order of tests.'''
    torch.manual_seed(0)
