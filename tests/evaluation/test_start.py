'''What commands load before they do anything.'''
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('args, others', [
    (['--help'], {'numpy'}), (['evaluate', '--help'], {'numpy'}), (['report', '--out', 'page', 'RUN'], set()),
])
def test_start(whole, tmp_path, args, others):
    '''Help needs nothing but click, and a report no PyTorch, so that they are there at once.'''
    args = [str(whole.folder) if arg == 'RUN' else arg for arg in args]
    result = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'captum_adapters', *args], capture_output=True, text=True,
        cwd=tmp_path, check=True, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    loaded = set(re.findall(r'^import time: .*\| +([\w.]+)$', result.stderr, re.M))
    assert 'click' in loaded
    assert not loaded & {'torch', 'torchvision', 'captum', 'zennit', *others}
    if 'report' in args:
        assert (tmp_path / 'page' / 'montage.png').exists()
