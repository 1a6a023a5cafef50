'''Metrics of the evaluator: all fill known columns, whatever is tied or missing.'''
import inspect
import math
import shutil

import numpy as np
import pytest
import torch
from helpers.evaluation import SIZE, make_batch, run
from helpers.networks import narrow_resnet18
from PIL import Image

from captum_adapters import metrics
from captum_adapters.evaluation import COLUMNS, Evaluation, RunError, summarize
from captum_adapters.evaluation.columns import METRICS as NAMES
from captum_adapters.evaluation.config import PERCENTS
from captum_adapters.evaluation.metrics import MetricSettings, measure

pytestmark = pytest.mark.once


def test_all_metrics(assets, tmp_path):
    '''All metrics fill columns that are known, and curves with their positions.'''
    result = run(
        assets, tmp_path / 'run', metrics=NAMES, cross=(f"narrow_resnet18={assets / 'net.pt'}",), limit=2,
        methods=('resnet_lrp_ratio',), percents=(10, 50), rank_by='magnitude', step=512, controls=False,
    )
    scores = result.records.drop(columns=['problem', 'seconds', 'metric_seconds'])
    assert set(scores) <= set(COLUMNS)
    masked = [name for name in scores if name.startswith(('pointing', 'distance', 'attention'))]
    # there are no masks, and too few classes for mosaics
    missing = [*masked, 'grid_pointing', 'grid_pointing_chance']
    assert scores[missing].isna().all(axis=None) and scores.drop(columns=missing).notna().all(axis=None)
    evidence = {name for name, column in COLUMNS.items() if column.topic == 'Class evidence'}
    assert {'id', 'id_keio', 'id_rise', 'id_c3', 'accuracy', 'cross_accuracy', 'gap', *masked, *evidence} <= set(scores)
    for _, curves in result.curves.iterrows():
        np.testing.assert_array_equal(curves['percents'], [10, 50])
        assert len(curves['accuracy']) == len(curves['cross_accuracy:narrow_resnet18']) == 2


def test_attention(assets, tmp_path):
    '''Maps are sorted by the attention that they pay to the object, as 0 or 1 for each image with a mask.'''
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images' / 'circle', images)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for name, side in (('center', SIZE // 2), ('corner', SIZE // 8)):
        mask[:] = 0
        start = (SIZE - side) // 2 if name == 'center' else 0
        mask[start:start + side, start:start + side] = 255
        Image.fromarray(mask).save(images / f'{name}.png')
    (images / 'manifest.csv').write_text('image,mask\n0.png,center.png\n1.png,corner.png\n2.png,\n')
    result = run(
        assets, tmp_path / 'run', data=str(images / 'manifest.csv'), methods=('gaussian:sigma=0.1', 'constant'),
        metrics=('attention',), controls=False,
    )
    types = ('correct', 'insufficient', 'over', 'wrong')

    def found(image, method):
        values = result.records.loc[(image, method)]
        return [name for name in types if values[f'attention_{name}'] == 1]

    assert found('0.png', 'gaussian:sigma=0.1') == ['correct']
    assert found('1.png', 'gaussian:sigma=0.1') == ['wrong']
    assert found('0.png', 'constant') == found('1.png', 'constant') == ['insufficient']
    values = result.records.loc[('0.png', 'gaussian:sigma=0.1')]
    heatmap = result.heatmaps['0.png', 'gaussian:sigma=0.1'] / 127
    attended = heatmap > heatmap.mean()
    inside = attended[SIZE // 4:-SIZE // 4, SIZE // 4:-SIZE // 4].sum()
    assert values['attention_coverage'] == pytest.approx(inside / (SIZE // 2) ** 2, abs=0.05)
    assert values['attention_precision'] == pytest.approx(inside / attended.sum(), abs=0.05)
    without = result.records.loc[('2.png', 'constant')]
    assert all(math.isnan(without[f'attention_{name}']) for name in (*types, 'coverage', 'precision'))
    table = summarize([result], n_resamples=99).table('markdown')
    assert '## Attention' in table and 'Insertion' not in table


@pytest.mark.parametrize('rank_by', ['value', 'magnitude', None])
def test_ties(rank_by):
    '''Top pixels are the expected ones over orders of ties. The share of ties is kept, also without curves.'''
    settings = MetricSettings(
        percents=(1, 30), fill=torch.zeros(1, 3, 1, 1), others={'other': (lambda x: x.flatten(1), lambda x: x)},
        **({} if rank_by is None else {'rank_by': rank_by}),
    )
    suffix = '' if rank_by == 'value' else '_magnitude'
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, :10], masks[1, 10:] = True, True
    target = torch.tensor([0, 1])
    batch = make_batch(torch.randn(2, 3, 20, 20), target, masks=masks)
    levels = torch.ones(20, 20)
    levels[:, 5:] = -1
    levels[:, 0] = torch.linspace(2, 3, 20)
    settings = settings._replace(step=50)
    for chosen in (
        ('pointing',), ('distance',), ('accuracy',), ('cross',), ('insertion_deletion', 'pointing', 'cross')
    ):
        values, _ = measure(chosen, lambda x: x.mean((2, 3)), batch, levels.expand(2, -1, -1), settings)
        assert set(values) <= set(COLUMNS)
        assert values['tied_share'] == pytest.approx([380 / 400] * 2)
        assert values['distinct_levels'].tolist() == [22, 22]
        assert values[f'tied_share{suffix}'] == pytest.approx([380 / 400] * 2)
        assert ('tied_share_magnitude' in values) == (suffix != '')
        if 'pointing' in chosen:
            # of the four highest pixels, none is above; of 30 %, the rest is tied
            shares = [0, (10 + 50) / 120], [1, 1 - 60 / 120]
            assert values['pointing'] == pytest.approx([np.mean(row) for row in shares])
    values, _ = measure(('pointing', 'distance'), None, batch, torch.ones(2, 20, 20), settings)
    for name in ('pointing', 'distance'):
        np.testing.assert_array_equal(values[name], values[f'{name}_chance'])
    assert values[f'tied_share{suffix}'].tolist() == [1, 1]


def test_published_settings():
    '''RISE deletes to its own baseline in its own steps, C3-LRP to that of the settings.'''
    target, published = torch.tensor([0, 1]), torch.tensor([2, 0])
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    images, maps, fill = torch.rand(2, 3, 20, 20), torch.rand(2, 20, 20), torch.full((1, 3, 1, 1), -2.)
    batch = make_batch(images, target, published=published, masks=masks)
    settings = MetricSettings(step=50, fill=fill)
    for name, own in (('rise', {}), ('c3', {'step': 50, 'baselines': fill})):
        values, _ = measure((name,), network, batch, maps, settings)
        expected = metrics.insertion_deletion(network, images, maps, target=published, protocol=name, **own)
        for field in ('insertion', 'deletion', 'id_score'):
            actual = values[f'{field.removesuffix("_score")}_{name}']
            np.testing.assert_allclose(actual, getattr(expected, field), rtol=1e-6)


def network(images):
    '''Logits of three classes.'''
    return 9 * images.mean((2, 3))


def test_other_networks(assets, tmp_path):
    '''Other networks of the same name, from files of the same name, are told apart.'''
    cross = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        torch.manual_seed(number + 1)
        torch.save(narrow_resnet18(num_classes=3).state_dict(), tmp_path / str(number) / 'net.pt')
        cross.append(f'narrow_resnet18={tmp_path / str(number) / "net.pt"}')
    options = {
        'metrics': ('cross',), 'cross': tuple(cross), 'methods': ('random',), 'controls': False, 'limit': 2,
        'percents': (50, 100),
    }
    result = run(assets, tmp_path / 'run', **options)
    assert set(result.curves) == {'percents', *(f'cross_accuracy:{text}' for text in cross)}
    shutil.copy(tmp_path / '1' / 'net.pt', tmp_path / '0' / 'net.pt')
    with pytest.raises(RunError, match='differs in .*/0/net.pt'):
        run(assets, tmp_path / 'run', **options)
    with pytest.raises(ValueError, match='twice'):
        run(assets, tmp_path / 'run', **{**options, 'cross': (cross[0], cross[0])})


def test_defaults():
    '''Functions, evaluations and their settings rank by the same.'''
    assert Evaluation('data', 'out').rank_by == MetricSettings().rank_by == 'magnitude'
    for function in (metrics.pixel_accuracy, metrics.cross_model_accuracy, metrics.keep_top, metrics.mask_pointing,
                     metrics.mask_distance):
        assert inspect.signature(function).parameters['absolute'].default is True
    assert inspect.signature(metrics.pixel_accuracy).parameters['percents'].default == PERCENTS
    assert Evaluation('data', 'out', percents=5).percents == (5,)
