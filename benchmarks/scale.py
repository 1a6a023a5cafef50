'''Time and memory of the evaluator with many records: opening a run, finding out that nothing is left, and reports.

The records are random, and written by the evaluator's own code, in its usual batches, with curves and pictures as many
as usual. Each command that is measured is a process of its own. The time of the first write is given as well.
'''
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet18

from captum_adapters.evaluation import Evaluation, Process, SampleRecord
from captum_adapters.evaluation.data import content_of, stamp_of
from captum_adapters.evaluation.records import Record
from captum_adapters.evaluation.runner import Loop

METHODS = (
    'resnet_lrp_ratio', 'resnet_lrp_ratio+quantize8', 'relative_lrp', 'grad_cam', 'input_x_gradient', 'captum_lrp'
)
CLASSES = 10
SCORES = (
    'relevance_sum', 'initial', 'gap', 'negative', 'insertion', 'deletion', 'id', 'insertion_keio', 'deletion_keio',
    'id_keio', 'tied_share', 'distinct_levels', 'score_full', 'score_blank',
)
PIXELS, STEP = 224 ** 2, 500
# the side of maps and pictures that are kept
SIDE = 112


def make_data(folder, images):
    '''Folders of classes with one picture many times, and a small network.'''
    for number in range(CLASSES):
        (folder / 'data' / f'{number}').mkdir(parents=True)
    Image.radial_gradient('L').save(folder / 'picture.png')
    for number in range(images):
        os.link(folder / 'picture.png', folder / 'data' / str(number % CLASSES) / f'{number:06d}.png')
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=CLASSES).state_dict(), folder / 'net.pt')


def options(folder, batch):
    '''The evaluation, and the arguments of its command.'''
    given = {
        'data': f'{folder}/data', 'out': f'{folder}/run', 'methods': ','.join(METHODS), 'model': 'resnet18',
        'weights': f'{folder}/net.pt', 'device': 'cpu', 'step': STEP, 'batch_size': batch,
    }
    arguments = [word for name, value in given.items() for word in (f'--{name.replace("_", "-")}', str(value))]
    return Evaluation(**{**given, 'methods': METHODS}), arguments


def make_records(names, generator, heatmaps, tied):
    '''Random records of a batch, with curves that fall or rise. Points of maps with ties have their own positions.'''
    count = 2 + PIXELS // STEP
    size = len(names), count
    fractions = np.broadcast_to(np.linspace(0, 1, count, dtype=np.float32), size)
    if tied:
        fractions = np.sort(generator.random(size, np.float32))
    rising = np.sort(generator.random(size, np.float32))
    curves = {'fractions': fractions, 'insertion': rising, 'deletion': 1 - rising}
    values = generator.random((len(names), len(SCORES)))
    maps = generator.integers(-127, 128, (len(names), SIDE, SIDE), np.int8) if heatmaps else [None] * len(names)
    return [
        Record(
            name, {'problem': None, 'seconds': 0.1, 'metric_seconds': 0.5, **dict(zip(SCORES, values[row].tolist()))},
            {key: curve[row] for key, curve in curves.items()}, maps[row],
        )
        for row, name in enumerate(names)
    ]


def write(folder, batch, rank, world):
    '''What one of several processes writes.'''
    evaluation, _ = options(folder, batch)
    loop = Loop(evaluation, Process(rank, world), True)
    loop._open(write=True)
    picture = (folder / 'picture.png').read_bytes()
    for number, rows in list(enumerate(loop.batches))[rank::world]:
        generator = np.random.default_rng(number)
        kept = rows[0] < evaluation.pictures
        samples = [loop.samples[row] for row in rows]
        loop.store.write_samples(number, [
            SampleRecord(each.name, each.label, 0, 0, 0.9, picture=picture if kept else None, content=content_of(each))
            for each in samples
        ], [*map(stamp_of, samples)])
        for method in loop.methods:
            names = [each.name for each in samples]
            records = make_records(names, generator, kept, 'quantize' in method.text)
            loop.store.write_records(number, method.text, records)


def measure(title, command, ranks=1):
    '''Print time and the largest memory of processes that run at once, and give back what the first one has printed.'''
    begin, running = time.perf_counter(), []
    for rank in range(ranks):
        environment = {**os.environ, 'RANK': str(rank), 'WORLD_SIZE': str(ranks)}
        output = tempfile.TemporaryFile('w+')
        running.append((subprocess.Popen([sys.executable, *command], stdout=output, env=environment), output))
    found = [os.wait4(process.pid, 0) for process, _ in running]
    seconds = time.perf_counter() - begin
    if any(status for _, status, _ in found):
        raise SystemExit(f'{title} has failed')
    user = max(usage.ru_utime + usage.ru_stime for *_, usage in found)
    memory = max(usage.ru_maxrss for *_, usage in found) / 2 ** 20
    print(f'{title:<26}{seconds:8.1f} s{user:8.1f} s{memory:8.2f} GB', flush=True)
    running[0][1].seek(0)
    return running[0][1].read()


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=50000)
    parser.add_argument('--batch', type=int, default=8, help='images in a batch')
    parser.add_argument('--ranks', type=int, default=1, help='processes that write, and that find nothing left')
    parser.add_argument('--folder', type=Path, help='where to write, and to keep the run')
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    if not (folder / 'run').exists():
        make_data(folder, args.images)
        begin = time.perf_counter()
        # the first one makes the folder of the run
        context, given = get_context('spawn'), (folder, args.batch)
        writers = [context.Process(target=write, args=(*given, rank, args.ranks)) for rank in range(args.ranks)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        print(f'written in {time.perf_counter() - begin:.0f} s')
    files = [path.stat().st_size for path in (folder / 'run').rglob('*') if path.is_file()]
    print(f'{args.images} images, batches of {args.batch}, {len(files)} files, {sum(files) / 2 ** 20:.0f} MiB')
    print(f'{"":<26}{"clock":>10}{"processor":>10}{"memory":>11}')
    run = str(folder / 'run')
    script = 'import sys; from captum_adapters.evaluation import read_run; read_run(sys.argv[1])'
    measure('open', ['-c', script, run])
    arguments = ['-m', 'captum_adapters', 'evaluate', *options(folder, args.batch)[1]]
    found = measure('nothing left', arguments, args.ranks)
    total = args.images * (len(METHODS) + 4)
    if f'{total} of {total} records' not in found:
        raise SystemExit(f'something is left: {found}')
    measure('report', ['-m', 'captum_adapters', 'report', run])
    measure('report --out', ['-m', 'captum_adapters', 'report', run, '--out', str(folder / 'report')])
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == '__main__':
    main()
