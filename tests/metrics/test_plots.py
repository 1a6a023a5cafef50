'''Plots of metrics show what they should, and leave no trace.'''
import io

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from captum_adapters.metrics import bootstrap_interval, insertion_deletion, pixel_accuracy
from captum_adapters.metrics.plots import plot_accuracy, plot_curves, plot_insertion_deletion

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def untouched():
    '''There are no figures in pyplot, and the settings are as before.'''
    settings = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


def band(axes, number):
    '''Positions, lower and upper ends of a band.'''
    x, y = axes.collections[number].get_paths()[0].vertices.T
    positions = np.unique(x)
    return positions, *np.array([(y[x == position].min(), y[x == position].max()) for position in positions]).T


def draw(figure):
    '''Draw a figure to a file, without any backend that was chosen.'''
    target = io.BytesIO()
    figure.savefig(target, format='png', dpi=40)
    assert target.tell() > 1000


def test_curves():
    '''Lines are means, bands are bootstrap intervals, and neither depends on the order of points.'''
    curves = {'a': torch.rand(15, 4), 'b': np.random.default_rng(0).random((9, 4))}
    positions = torch.tensor([0.5, 0., 1., 0.25])
    axes = plot_curves(curves, positions, confidence=0.8, n_resamples=300)
    order = [1, 3, 0, 2]
    for number, values in enumerate(curves.values()):
        line = axes.get_lines()[number]
        values = np.asarray(values, dtype=np.float64)[:, order]
        assert line.get_xdata().tolist() == [0, 0.25, 0.5, 1]
        assert line.get_ydata() == pytest.approx(values.mean(0))
        expected = bootstrap_interval(values, confidence=0.8, n_resamples=300)
        x, low, high = band(axes, number)
        assert x == pytest.approx(line.get_xdata())
        assert low == pytest.approx(expected.low) and high == pytest.approx(expected.high)
        assert to_rgba(axes.collections[number].get_facecolor()[0], 1) == to_rgba(line.get_color())
    assert [line.get_label() for line in axes.get_lines()] == ['a', 'b']
    assert isinstance(axes.figure, Figure)
    draw(axes.figure)


def test_curves_options():
    '''Axes, clusters, no bands, and enough line styles.'''
    axes = Figure().subplots()
    values = torch.rand(10, 1).repeat_interleave(5, 0).repeat(1, 3)
    assert plot_curves({'a': values}, range(3), axes=axes, confidence=None) is axes
    assert len(axes.collections) == 0
    plot_curves({'a': values}, range(3), axes=axes)
    plot_curves({'a': values}, range(3), axes=axes, clusters=torch.arange(10).repeat_interleave(5))
    (_, *narrow), (_, *wide) = band(axes, 0), band(axes, 1)
    assert (wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])).all()
    many = plot_curves({str(number): values for number in range(12)}, range(3), confidence=None).get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 12


def test_curves_positions():
    '''Examples with points at different positions are averaged at common ones.'''
    positions = torch.tensor([[0., 0.2, 1.], [0., 0.6, 1.]])
    curves = positions * 2 + 1
    axes = plot_curves({'linear': curves}, positions, confidence=None)
    x, y = axes.get_lines()[0].get_data()
    assert x == pytest.approx(np.linspace(0, 1, 101)) and y == pytest.approx(2 * x + 1)
    axes = plot_curves({'kinks': torch.tensor([[0., 1., 1.], [0., 0., 1.]])}, {'kinks': positions}, confidence=None)
    x, y = axes.get_lines()[0].get_data()
    expected = (np.minimum(x / 0.2, 1) + np.maximum((x - 0.6) / 0.4, 0)) / 2
    assert y == pytest.approx(expected)
    # in any order of points
    order = [2, 0, 1]
    shuffled = plot_curves({'linear': curves[:, order]}, positions[:, order], confidence=None).get_lines()[0]
    assert shuffled.get_ydata() == pytest.approx(2 * shuffled.get_xdata() + 1, abs=1e-6)
    same = plot_curves({'same': curves}, positions[:1].expand(2, 3), confidence=None).get_lines()[0]
    assert same.get_xdata().tolist() == pytest.approx([0, 0.2, 1])


def test_curves_nan():
    '''Examples with NaN are left out, and points where nothing is defined.'''
    values = torch.rand(6, 3)
    values[:, 0] = float('nan')
    values[4] = float('nan')
    axes = plot_curves({'share': values}, (1, 5, 10))
    line, = axes.get_lines()
    assert line.get_xdata().tolist() == [5, 10]
    assert line.get_ydata() == pytest.approx(values[[0, 1, 2, 3, 5], 1:].double().mean(0).numpy())
    assert np.isfinite(band(axes, 0)[1]).all()


@pytest.mark.parametrize('curves, positions, message', [
    ({}, [1], 'no curves'),
    ({'a': torch.rand(3, 4)}, torch.rand(3), r'of a .*\(3, 4\) and \(3,\)'),
    ({'a': torch.rand(4)}, torch.rand(4), r'\(4,\) and \(4,\)'),
    ({'a': torch.rand(0, 4)}, torch.rand(4), r'\(0, 4\)'),
])
def test_errors(curves, positions, message):
    '''Curves that do not fit are named.'''
    with pytest.raises(ValueError, match=message):
        plot_curves(curves, positions)


def test_insertion_deletion():
    '''Both curves next to each other, with their areas.'''
    images = torch.rand(12, 1, 6, 6)

    def model(images):
        return images.mean((1, 2, 3))

    results = {
        'same': insertion_deletion(model, images, images), 'other': insertion_deletion(model, images, 1 - images),
    }
    figure = plot_insertion_deletion(results, n_resamples=200)
    left, right = figure.axes
    for axes, name in ((left, 'insertion'), (right, 'deletion')):
        assert axes.get_title().lower() == name
        assert name[:5] in axes.get_xlabel()
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert texts == [f'{key} ({float(getattr(result, name).mean()):.3f})' for key, result in results.items()]
        for line, result in zip(axes.get_lines(), results.values()):
            assert line.get_ydata() == pytest.approx(getattr(result, f'{name}_curve').double().mean(0).numpy())
            assert line.get_xdata() == pytest.approx(result.fractions[0].double().numpy())
        assert len(axes.collections) == 2
    draw(figure)
    mine = Figure()
    assert plot_insertion_deletion(results, figure=mine, confidence=None) is mine
    assert len(mine.axes) == 2 and not mine.axes[0].collections
    with pytest.raises(ValueError, match='no curves'):
        plot_insertion_deletion({})


def test_accuracy():
    '''Accuracy against the percentage of pixels.'''
    images = torch.randn(20, 3, 6, 6)
    labels = images.mean((2, 3)).argmax(1)
    results = {
        name: pixel_accuracy(lambda images: images.mean((2, 3)), images, maps, (50, 5, 100), labels)
        for name, maps in (('a', images), ('b', torch.rand(20, 6, 6)))
    }
    axes = plot_accuracy(results)
    for line, result in zip(axes.get_lines(), results.values()):
        assert line.get_xdata().tolist() == [5, 50, 100]
        assert line.get_ydata() == pytest.approx(result.correct[:, [1, 0, 2]].double().mean(0).numpy())
        assert line.get_ydata()[-1] == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['a', 'b']
    assert axes.get_xlim() == (0, 100) and axes.get_ylabel() == 'Accuracy'
    draw(axes.figure)
    assert plot_accuracy(results, axes=axes) is axes
