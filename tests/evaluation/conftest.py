'''A small data set and network, and a run on it.'''
import pytest
from helpers.evaluation import make_assets, run


@pytest.fixture(scope='session')
def assets(tmp_path_factory):
    '''Folder with a small data set, and the weights of a small network.'''
    return make_assets(tmp_path_factory.mktemp('assets'))


@pytest.fixture(scope='session')
def whole(assets, tmp_path_factory):
    '''A run by one process.'''
    return run(assets, tmp_path_factory.mktemp('whole') / 'run')
