'''Statistics, against scipy, closed forms, all combinations, and their rates of error; and plots of curves.'''
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy import stats

from captum_adapters import statistics
from captum_adapters.metrics import bootstrap_interval, compare, holm
from captum_adapters.metrics.statistics import Comparison

pytestmark = pytest.mark.once


@pytest.fixture
def rng():
    '''A generator of random numbers.'''
    return np.random.default_rng(0)


def one(scores, others, clusters=None, **options):
    '''Compare a single pair.'''
    result, = compare({'a': scores, 'b': others}, 'b', clusters, **options)
    return result


@pytest.mark.parametrize('method', ['bca', 'percentile'])
@pytest.mark.parametrize('size', [8, 60])
def test_interval_scipy(rng, method, size):
    '''The interval is that of scipy.'''
    values = rng.exponential(size=(size, 3))
    interval = bootstrap_interval(values, method=method, confidence=0.9, n_resamples=20000)
    assert interval.mean.shape == interval.low.shape == interval.high.shape == (3,)
    for column, *ends in zip(values.T, interval.low, interval.high):
        # the same resamples
        expected = stats.bootstrap(
            (column,), np.mean, method={'bca': 'BCa'}.get(method, method), confidence_level=0.9, n_resamples=20000,
            random_state=np.random.default_rng(0),
        )
        error = 0.02 * expected.standard_error
        assert ends == pytest.approx(list(expected.confidence_interval), abs=error)
    assert interval.mean == pytest.approx(values.mean(0))
    assert (interval.num_examples, interval.num_nan) == (size, 0)
    single = bootstrap_interval(torch.from_numpy(values[:, 1]), method=method, confidence=0.9, n_resamples=20000)
    assert (single.low, single.high) == pytest.approx((interval.low[1], interval.high[1]))


def test_draws_are_shared(rng, monkeypatch):
    '''All scores of as many examples are resampled by the same draws, as if these were drawn again.'''
    values = rng.exponential(size=(3, 40, 2))
    statistics._kept_draws.cache_clear()
    kept = [bootstrap_interval(each, n_resamples=500) for each in values]
    assert statistics._kept_draws.cache_info()[:2] == (2, 1)
    # in parts, as for many examples
    monkeypatch.setattr(statistics, 'BLOCK', 40 * 7)
    monkeypatch.setattr(statistics, 'KEPT', 0)
    for interval, each in zip(kept, values):
        again = bootstrap_interval(each, n_resamples=500)
        np.testing.assert_allclose([again.low, again.high], [interval.low, interval.high], rtol=1e-12)
    assert statistics._kept_draws.cache_info()[:2] == (2, 1)


def test_interval_clusters(rng):
    '''Copies of an example in its cluster add nothing, and clusters of one are none.'''
    values = rng.normal(size=(30, 2)) ** 2
    expected = bootstrap_interval(values)
    names = [f'class {number}' for number in range(100, 130)]
    result = bootstrap_interval(values, names)
    assert np.array_equal(result.low, expected.low) and np.array_equal(result.high, expected.high)
    order = rng.permutation(120)
    copies, labels = np.repeat(values, 4, 0)[order], np.repeat(np.arange(30), 4)[order]
    for clusters in (labels, torch.from_numpy(labels), labels.tolist()):
        result = bootstrap_interval(copies, clusters)
        assert result.low == pytest.approx(expected.low) and result.high == pytest.approx(expected.high)
        assert result.num_examples == 120
    narrow = bootstrap_interval(copies)
    assert (narrow.high - narrow.low < 0.6 * (expected.high - expected.low)).all()
    # clusters of different sizes: the mean is that of the examples
    values, labels = np.array([1., 1., 1., 5.]), [0, 0, 0, 1]
    result = bootstrap_interval(values, labels, method='percentile')
    assert (result.mean, result.low, result.high) == (2, 1, 5)


@pytest.mark.parametrize('clustered', [False, True])
def test_interval_coverage(rng, clustered):
    '''The mean of the population is in as many intervals as it should.'''
    repeats, groups, size = 500, 40, 5
    effects = rng.exponential(size=(groups, 1, repeats))
    values = (effects + 0.5 * rng.normal(size=(groups, size, repeats))).reshape(-1, repeats)
    clusters = np.repeat(np.arange(groups), size)
    if not clustered:
        values, clusters = rng.exponential(size=(60, repeats)), None
    interval = bootstrap_interval(values, clusters, n_resamples=999)
    coverage = ((interval.low < 1) & (1 < interval.high)).mean()
    assert 0.91 < coverage < 0.98
    if clustered:
        wrong = bootstrap_interval(values, n_resamples=999)
        assert ((wrong.low < 1) & (1 < wrong.high)).mean() < 0.75


def test_interval_edges():
    '''NaN, constants, too few examples, and reproducibility.'''
    values = np.random.default_rng(1).normal(size=(20, 2))
    values[3, 1] = values[7] = math.nan
    result = bootstrap_interval(values, n_resamples=500)
    expected = bootstrap_interval(np.delete(values, [3, 7], 0), n_resamples=500)
    assert (result.num_examples, result.num_nan) == (18, 2)
    assert all(np.array_equal(*pair) for pair in zip(result[:3], expected[:3]))
    other = bootstrap_interval(values, n_resamples=500, seed=1)
    assert not np.array_equal(other.low, result.low)
    assert other.low == pytest.approx(result.low, abs=0.1)
    constant = bootstrap_interval([0.1] * 5)
    assert (constant.low, constant.high) == pytest.approx((0.1, 0.1))
    for few, mean in (([], math.nan), ([2.], 2.), ([2., math.nan], 2.)):
        result = bootstrap_interval(few)
        assert math.isnan(result.low) and math.isnan(result.high)
        assert float(result.mean) == pytest.approx(mean, nan_ok=True)
    assert math.isnan(bootstrap_interval([1., 2.], ['a', 'a']).low)


def test_permutation_blocks(monkeypatch, rng):
    '''Signs that do not fit into memory at a time are still as many.'''
    monkeypatch.setattr('captum_adapters.statistics.BLOCK', 50 * 7)
    scores, others = rng.normal(size=(2, 50))
    blocks = one(scores, others, n_resamples=2000)
    monkeypatch.undo()
    assert blocks.p_value == pytest.approx(one(scores, others, n_resamples=2000).p_value, abs=0.04)
    exact = one(scores[:10], others[:10], n_resamples=1024)
    monkeypatch.setattr('captum_adapters.statistics.BLOCK', 33)
    assert one(scores[:10], others[:10], n_resamples=1024).p_value == exact.p_value


def test_permutation_exact(rng):
    '''Among all combinations of signs, as in scipy and by enumeration, with and without clusters.'''
    scores, others = rng.normal(size=(2, 9)).round(1)
    differences = scores - others
    result = one(scores, others)
    expected = stats.permutation_test(
        (scores, others), lambda x, y: (x - y).mean(), permutation_type='samples', n_resamples=512
    )
    assert result.p_value == pytest.approx(expected.pvalue)
    clusters = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])
    sums = [differences[clusters == cluster].sum() for cluster in range(5)]
    flipped = [abs(np.dot(signs, sums)) for signs in product((1, -1), repeat=5)]
    share = np.mean(np.array(flipped) >= abs(sum(sums)) - 1e-9)
    assert one(scores, others, clusters).p_value == share
    assert one(scores, others, clusters, n_resamples=32).p_value == share
    assert one(scores, others, clusters).num_clusters == 5


def test_permutation_random(rng):
    '''A sample of all combinations of signs gives about the same, and is never zero.'''
    scores, others = rng.normal(size=(2, 14))
    exact = one(scores + 0.4, others, n_resamples=2 ** 14).p_value
    assert exact * 2 ** 14 == round(exact * 2 ** 14)
    sampled = one(scores + 0.4, others, n_resamples=2 ** 14 - 1).p_value
    assert exact != sampled == pytest.approx(exact, abs=5 * math.sqrt(exact / 2 ** 14))
    assert one(scores + 100, others, n_resamples=99).p_value == 1 / 100


def test_wilcoxon(rng):
    '''As in scipy; by signs of the ranks, for clusters.'''
    scores, others = rng.normal(size=(2, 10))
    result = one(scores, others, test='wilcoxon')
    assert result.p_value == pytest.approx(stats.wilcoxon(scores, others).pvalue)
    # all combinations of signs are the exact distribution
    exact = stats.wilcoxon(scores, others, method='exact').pvalue
    assert one(scores, others, range(10), test='wilcoxon').p_value == pytest.approx(exact)
    assert one(scores, others, [0] * 5 + [1] * 5, test='wilcoxon').p_value in (0.5, 1)
    # of tenths, differences have the ranks of integers, whatever rounding makes of them
    many = (10 * rng.normal(size=(2, 80))).round()
    assert one(*many / 10, test='wilcoxon').p_value == pytest.approx(stats.wilcoxon(*many).pvalue)
    assert one(scores, scores, test='wilcoxon').p_value == one(scores, scores).p_value == 1
    # an outlier decides the mean, but not the ranks
    others = np.arange(12.)
    scores = others + 1 + np.arange(12) / 100
    scores[0] = -50
    assert one(scores, others).p_value > 0.5
    assert one(scores, others, test='wilcoxon').p_value < 0.05
    # nor does one that is so large that it has no digits for what others differ by
    for last in (1e15, 1.5e15):
        wide, wider = np.append(others, 1e15), np.append(scores, last)
        expected = stats.wilcoxon(wider - wide).pvalue
        result = one(wider, wide, test='wilcoxon')
        assert result.p_value == pytest.approx(expected) and not math.isnan(result.effect_size)


def test_effects():
    '''Closed forms of means and effect sizes.'''
    result = one([1., 2., 3., 6.], [1., 1., 5., 2.])
    # differences 0, 1, -2, 4
    assert result.mean == 3 and result.baseline_mean == 2.25 and result.difference == 0.75
    assert result.effect_size == pytest.approx(0.75 / math.sqrt((0.75 ** 2 + 0.25 ** 2 + 2.75 ** 2 + 3.25 ** 2) / 3))
    assert result.rank_biserial == pytest.approx((1 - 2 + 3) / 6)
    assert (result.method, result.baseline) == ('a', 'b')
    assert result.num_examples == result.num_clusters == 4
    higher = one([2., 3.5, 4.], [1., 2., 3.])
    assert higher.rank_biserial == 1 and higher.effect_size > 1
    assert one([1., 2.], [2., 4.]).rank_biserial == -1
    same = one([1., 2.], [1., 2.])
    assert same.rank_biserial == same.difference == 0 and math.isnan(same.effect_size)
    assert same.low == same.high == 0
    # the same difference, but for rounding
    others = np.random.default_rng(0).random(30)
    for scale in (1., 1e6):
        constant = one(scale * others + 0.1, scale * others)
        assert constant.difference == pytest.approx(0.1) and math.isnan(constant.effect_size)
        assert one(scale * others * 1.001, scale * others).effect_size < 3


@pytest.mark.parametrize('test', ['permutation', 'wilcoxon'])
def test_rounding(test):
    '''Methods whose scores differ by rounding do not differ, and such magnitudes have the same rank.'''
    same = one([0.3] * 9, [0.1 + 0.2] * 9, test=test)
    assert same.p_value == 1 and same.difference == same.rank_biserial == same.low == same.high == 0
    # 0.3 - 0.2 is below 0.1
    assert one([0.3, 0.1, 0.5], [0.2, 0.2, 0.5], test=test).rank_biserial == 0
    exact = one([3., 1., 5., 7., 4.], [2., 2., 5., 6., 2.], test=test)
    rounded = one([0.3, 0.1, 0.5, 0.7, 0.4], [0.2, 0.2, 0.5, 0.6, 0.2], test=test)
    assert rounded.rank_biserial == exact.rank_biserial and rounded.p_value == exact.p_value
    # small scores differ by more
    assert one([3e-20, 4e-20, 6e-20], [1e-20, 2e-20, 1e-20], test=test).rank_biserial == 1
    # unless they are what is left of larger numbers
    assert one([0.5 - 0.4 - 0.1, 0.5, 0.6], [0., 0.5, 0.4], test=test).rank_biserial == 1


@pytest.mark.parametrize('clusters', [[None, 'a', 'a'], ['1', 1, 1], [0, None, 1], [0, math.nan, math.nan]])
def test_mixed_clusters(clusters):
    '''Names are not numbers, and what has no name is in no cluster.'''
    with pytest.raises(TypeError, match='clusters must all be numbers or all be names'):
        bootstrap_interval([1., 2., 3.], clusters)


def test_swap(rng):
    '''Swapped methods have the opposite difference.'''
    scores, others = rng.exponential(size=(2, 30))
    result, swapped = one(scores, others), one(others, scores)
    assert swapped.difference == pytest.approx(-result.difference)
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low))
    assert swapped.p_value == result.p_value
    assert swapped.effect_size == pytest.approx(-result.effect_size)
    assert swapped.rank_biserial == pytest.approx(-result.rank_biserial)
    for clusters in (None, np.arange(30) // 4):
        result = one(scores, others, clusters)
        interval = bootstrap_interval(scores - others, clusters)
        assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


def test_compare(rng):
    '''All pairs or one baseline, NaN left out by pair, and Holm's correction over all.'''
    scores = {name: rng.normal(shift, 0.4, size=40) for name, shift in (('a', 0), ('b', 0.2), ('c', 0.5))}
    scores['b'][:3] = scores['c'][2:4] = math.nan
    results = compare(scores)
    assert [(result.method, result.baseline) for result in results] == list(combinations('abc', 2))
    assert [result.num_nan for result in results] == [3, 2, 4]
    assert [result.num_examples for result in results] == [37, 38, 36]
    assert [result.p_holm for result in results] == pytest.approx(holm([result.p_value for result in results]))
    assert results[0].p_value < results[0].p_holm
    valid = slice(4, None)
    assert results[2].mean == scores['b'][valid].mean() and results[2].baseline_mean == scores['c'][valid].mean()
    results = compare({name: torch.from_numpy(values) for name, values in scores.items()}, 'b', confidence=0.5)
    assert [(result.method, result.baseline) for result in results] == [('a', 'b'), ('c', 'b')]
    assert results[0].high - results[0].low < 0.5 * (compare(scores, 'b')[0].high - compare(scores, 'b')[0].low)
    assert results == compare(scores, 'b', confidence=0.5)
    assert results != compare(scores, 'b', confidence=0.5, seed=1)
    assert list(results[0]._asdict()) == list(Comparison._fields)
    # a cluster with nothing left
    result = one(scores['b'], scores['a'], [0] * 3 + [1] * 17 + [2] * 20)
    assert result.num_clusters == 2 and result.p_value in (0.5, 1)


def test_compare_too_few():
    '''Nothing is made up where there are no examples.'''
    empty, full = compare({'a': [math.nan] * 5, 'b': [1.] * 5, 'c': [1., 2., 3., 4., 5.]}, 'c')
    assert empty.num_examples == 0 and empty.num_nan == 5
    names = 'mean', 'baseline_mean', 'difference', 'low', 'high', 'effect_size', 'rank_biserial', 'p_value', 'p_holm'
    assert all(math.isnan(getattr(empty, name)) for name in names)
    assert full.p_holm == full.p_value
    single = one([1.], [0.])
    assert math.isnan(single.low) and math.isnan(single.effect_size)
    assert single.difference == 1 and single.p_value == 1


def test_holm(rng):
    '''By definition: step down, and stop at the first that is not rejected.'''
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert holm(torch.tensor([0.25, math.nan, 0.125])) == pytest.approx([0.25, math.nan, 0.25], nan_ok=True)
    assert holm([]).shape == (0,)
    values = rng.random(12) ** 3
    adjusted = holm(values)
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = np.zeros(12, dtype=bool)
        for step, index in enumerate(np.argsort(values)):
            if values[index] > level / (12 - step):
                break
            rejected[index] = True
        assert np.array_equal(adjusted <= level, rejected)
    for wrong in ([1.5], [-0.1], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match='between 0 and 1'):
            holm(wrong)


@pytest.mark.parametrize('changes, message', [
    ({'test': 't'}, "'t'"),
    ({'confidence': 95}, '95'),
    ({'n_resamples': 0}, 'n_resamples=0'),
    ({'baseline': 'c'}, "'c' .*a, b"),
    ({'scores': {'a': [1., 2.]}}, '1 methods'),
    ({'scores': {'a': [1., 2.], 'b': [1.]}}, r'\(2,\).*\(1,\)'),
    ({'scores': {'a': [[1., 2.]], 'b': [[1., 2.]]}}, r'\(1, 2\)'),
    ({'scores': {'a': [1., math.inf], 'b': [1., 2.]}}, 'of a contain infinity'),
    ({'scores': {'a': 1., 'b': 1.}}, 'number'),
    ({'clusters': [1]}, r'2 examples.*\(1,\)'),
])
def test_compare_errors(changes, message):
    '''Arguments that do not fit are named.'''
    arguments = {'scores': {'a': [1., 2.], 'b': [2., 2.]}, **changes}
    with pytest.raises(ValueError, match=message):
        compare(**arguments)


def test_interval_errors():
    '''Arguments that do not fit are named.'''
    for options, message in (
        ({'method': 'normal'}, "'normal'"), ({'confidence': 0}, 'confidence=0'), ({'clusters': [[1, 2]]}, r'\(1, 2\)'),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval([1., 2.], **options)
