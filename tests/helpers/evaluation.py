'''A small data set and network for the evaluator, and records made by hand.'''
import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from captum_adapters.evaluation import Evaluation, Process, Run, SampleRecord, evaluate, read_run
from captum_adapters.evaluation.metrics import Batch
from helpers.networks import narrow_resnet18

CLASSES = ('circle', 'square', 'stripes')
SIZE = 32
METHODS = ('resnet_lrp_ratio', 'resnet_lrp_ratio+quantize8', 'input_x_gradient')


def make_assets(folder, network=narrow_resnet18):
    '''Write a small data set, and the weights of a small network.'''
    torch.manual_seed(0)
    torch.save(network(num_classes=len(CLASSES)).state_dict(), folder / 'net.pt')
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / 'images' / name).mkdir(parents=True)
        for number in range(4):
            picture = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / 'images' / name / f'{number}.png')
    return folder


def setting(assets, out, **options):
    '''An evaluation of the small network on the small data set.'''
    options = {
        'methods': METHODS, 'step': 512, 'batch_size': 4, 'forward_batch': 16, 'device': 'cpu',
        'model': 'narrow_resnet18', 'weights': str(assets / 'net.pt'), 'size': SIZE, 'data': str(assets / 'images'),
        **options,
    }
    return Evaluation(out=str(out), **options)


def run(assets, out, process=None, **options):
    '''Evaluate quietly, and read the records.'''
    evaluate(setting(assets, out, **options), process=process or Process(), quiet=True)
    return read_run(out)


def make_batch(images, target, **fields):
    '''Images without names that tell anything, without masks and mosaics.'''
    none = torch.zeros(len(images), 0)
    defaults = {
        'output': torch.zeros(len(images), 3), 'scored': target, 'published': target, 'labels': target, 'masks': none,
        'mosaics': none, 'cells': none,
    }
    return Batch(names=[*map(str, range(len(images)))], images=images, targets=target, **{**defaults, **fields})


def assert_same(first, other):
    '''Records of two runs are the same to the last digit, but for times.'''
    assert first.samples == other.samples
    times = ['seconds', 'metric_seconds']
    pd.testing.assert_frame_equal(
        first.records.drop(columns=times), other.records.drop(columns=times), check_exact=True, check_like=True
    )
    assert set(first.curves) == set(other.curves)
    for name in first.curves:
        for one, two in zip(first.curves[name], other.curves[name]):
            np.testing.assert_array_equal(one, two)
    for one, two in zip(first.heatmaps, other.heatmaps):
        np.testing.assert_array_equal(one, two)


def jpeg(number):
    '''A grey picture as a file.'''
    buffer = io.BytesIO()
    Image.new('RGB', (16, 12), (10 * number,) * 3).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()


SETTINGS = {
    'fingerprint': 'f', 'installed': {}, 'batch_size': 8, 'data': 'data', 'layout': 'folder', 'preset': [],
    'classes': ['tench', 'church'], 'command': 'python -m captum_adapters evaluate --data data --out run',
}
IDENTITY = {
    'manifest': 'm1', 'model': 'resnet50', 'weights': 'w1', 'options': {'step': 500, 'initial': 'softmax', 'amp': None},
    'versions': {'torch': '2.4'}, 'files': {}, 'cross': [], 'device': 'cpu',
}


def make_run(
    scores, folder='run', curves=None, pictures=None, problems=None, samples=None, **settings
):
    '''A run from, for each method, either a list of its primary scores or lists of scores by column.'''
    rows, arrays, heatmaps = {}, {}, {}
    for method, columns in scores.items():
        columns = columns if isinstance(columns, dict) else {'id': columns}
        for number in range(len(next(iter(columns.values())))):
            key = f'{number:03d}.jpg', method
            values = {name: column[number] for name, column in columns.items()}
            rows[key] = {'problem': None, 'seconds': 0.5, 'metric_seconds': 1., **values}
            arrays[key] = {} if curves is None else curves(number)
            heatmaps[key] = np.zeros((8, 8), np.int8)
            heatmaps[key][number % 8] = 127
    for key, reason in (problems or {}).items():
        rows[key] = {'problem': reason, 'seconds': 0.5, 'metric_seconds': 1.}
        arrays[key], heatmaps[key] = {}, None
    names = sorted({name for name, _ in rows})
    known = {
        name: SampleRecord(name, number % 2, number % 2, 0, 0.5, picture=pictures and pictures(number))
        for number, name in enumerate(names)
    }
    known.update(samples or {})
    identity = {**IDENTITY, 'samples': len(known), 'methods': list(scores)}
    identity.update((key, settings.pop(key)) for key in identity if key in settings)
    index = pd.MultiIndex.from_tuples(sorted(rows), names=['sample', 'method'])
    records = pd.DataFrame([rows[key] for key in index], index)
    records = records if len(rows) else pd.DataFrame(index=index, columns=['problem', 'seconds', 'metric_seconds'])
    records['problem'] = records['problem'].astype(object)
    return Run(
        Path('/runs') / folder, {**SETTINGS, 'identity': identity, **settings}, dict(sorted(known.items())), records,
        pd.DataFrame([arrays[key] for key in index], index, dtype=object),
        pd.Series([heatmaps[key] if pictures else None for key in index], index, dtype=object), [],
    )
