'''Whatever is killed whenever, nothing is lost and nothing is there twice.'''
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.evaluation import METHODS, SIZE, assert_same, run

from captum_adapters.evaluation import read_run

pytestmark = pytest.mark.once


def command(assets, out, world):
    '''Command of an evaluation by several processes.'''
    launcher = ['-m', 'torch.distributed.run', '--nproc-per-node', str(world), '-m'] if world > 1 else ['-m']
    return [
        sys.executable, *launcher, 'captum_adapters', 'evaluate', '--data', str(assets / 'images'), '--out', str(out),
        '--model', 'resnet18', '--weights', str(assets / 'net.pt'), '--size', str(SIZE), '--methods', ','.join(METHODS),
        '--step', '512', '--batch-size', '1', '--forward-batch', '16', '--device', 'cpu', '--quiet',
    ]


def children(pid):
    '''Processes which a process has started.'''
    try:
        return [int(text) for text in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='processes are found in /proc')
def test_kill(assets, tmp_path):
    '''Whatever is killed whenever, the same command ends up with each record once.

    There are two kills, or as many as the environment says in EVALUATION_KILLS.
    '''
    choose = random.Random(0)
    kills = int(os.environ.get('EVALUATION_KILLS', 2))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHELASTIC_ERROR_FILE': os.devnull}
    expected = run(assets, tmp_path / 'expected', batch_size=1, forward_batch=16)
    folder, counts = tmp_path / 'run', []
    for number in range(kills):
        world = choose.choice([1, 2, 3])
        with subprocess.Popen(
            command(assets, folder, world), env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        ) as process:
            # while it starts, or some time after the first record was written
            before = count(folder)
            limit, patience = time.monotonic() + 300, choose.random()
            while time.monotonic() < limit and process.poll() is None and count(folder) <= before:
                time.sleep(0.01)
            time.sleep(patience * 0.3)
            ranks = children(process.pid)
            whom = choose.choice(['launcher', 'rank']) if ranks else 'launcher'
            # a rank may have ended by itself by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(ranks) if whom == 'rank' else process.pid, signal.SIGKILL)
            process.wait()
        counts.append(count(folder))
        if counts[-1] == len(expected.records) and number < kills - 1:
            # there is nothing left to interrupt
            shutil.rmtree(folder)
    world = choose.choice([1, 2, 3])
    subprocess.run(command(assets, folder, world), env=environment, check=True)
    result = read_run(folder)
    assert 0 < counts[0] < len(expected.records)
    assert_same(result, expected)


def count(folder):
    '''Number of records.'''
    return len(read_run(folder).records) if (folder / 'settings.json').exists() else 0
