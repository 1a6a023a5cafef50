'''Whatever is killed whenever, nothing is lost and nothing is there twice.'''
import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.evaluation import METHODS, SIZE, assert_same, make_assets, run
from torchvision.models import resnet18

from captum_adapters.evaluation import read_run

pytestmark = pytest.mark.once

# Starts evaluations as torchrun does, by processes that need not import anything. For each line of the input, which has
# the number of processes and the arguments, it prints the process to kill.
LAUNCHER = '''
import os, shlex, signal, sys
import torch
import captum_adapters.evaluation.runner
from captum_adapters.cli import main

torch.set_num_threads(1)


def fork(function, *args):
    pid = os.fork()
    if not pid:
        try:
            os._exit(function(*args) or 0)
        finally:
            os._exit(1)
    return pid


def rank(number, world, args):
    if world > 1:
        os.environ.update(RANK=str(number), WORLD_SIZE=str(world), LOCAL_RANK=str(number), TORCHELASTIC_RUN_ID='test')
    main(args, standalone_mode=False)


def launch(world, args):
    ranks = [fork(rank, number, world, args) for number in range(world)]
    for _ in range(world):
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGTERM)


for line in sys.stdin:
    world, *args = shlex.split(line)
    pid = fork(*((launch, int(world), args) if world != '1' else (rank, 0, 1, args)))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print('done', flush=True)
'''


def arguments(assets, out):
    '''Arguments of the command.'''
    return [
        'evaluate', '--data', str(assets / 'images'), '--out', str(out), '--model', 'resnet18', '--weights',
        str(assets / 'net.pt'), '--size', str(SIZE), '--methods', ','.join(METHODS), '--step', '512', '--batch-size',
        '1', '--forward-batch', '16', '--device', 'cpu', '--quiet',
    ]


def children(pid):
    '''Processes which a process has started.'''
    try:
        return [int(text) for text in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='processes are found in /proc')
def test_kill(tmp_path):
    '''Whatever is killed whenever, the same command ends up with each record once.

    There are four kills, or as many as the environment says in EVALUATION_KILLS.
    '''
    assets, choose = make_assets(tmp_path, resnet18), random.Random(0)
    kills = int(os.environ.get('EVALUATION_KILLS', 4))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHELASTIC_ERROR_FILE': os.devnull}
    expected = run(assets, tmp_path / 'expected', batch_size=1, forward_batch=16, model='resnet18')
    folder, counts = tmp_path / 'run', []
    with subprocess.Popen(
        [sys.executable, '-c', LAUNCHER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as launcher:
        for number in range(kills):
            world = choose.choice([1, 2, 3])
            # while it starts, or some time after the first record was written
            before = count(folder)
            print(world, shlex.join(arguments(assets, folder)), file=launcher.stdin, flush=True)
            pid = int(launcher.stdout.readline())
            limit, patience = time.monotonic() + 300, choose.random()
            while time.monotonic() < limit and Path(f'/proc/{pid}').exists() and count(folder) <= before:
                time.sleep(0.01)
            time.sleep(patience * 0.3)
            ranks = children(pid)
            whom = choose.choice(['launcher', 'rank']) if ranks else 'launcher'
            # a rank may have ended by itself by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(ranks) if whom == 'rank' else pid, signal.SIGKILL)
            assert launcher.stdout.readline() == 'done\n'
            counts.append(count(folder))
            if counts[-1] == len(expected.records) and number < kills - 1:
                # there is nothing left to interrupt
                shutil.rmtree(folder)
        launcher.stdin.close()
    # by the launcher of PyTorch
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '1', '-m', 'captum_adapters',
         *arguments(assets, folder)], env=environment, check=True,
    )
    result = read_run(folder)
    assert 0 < counts[0] < len(expected.records)
    assert_same(result, expected)


def count(folder):
    '''Number of records.'''
    return len(read_run(folder).records) if (folder / 'settings.json').exists() else 0
