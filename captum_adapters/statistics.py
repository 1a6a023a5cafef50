"""Statistics for comparisons of methods on the same examples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from captum_adapters._light import check_choice, positive_integer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Comparison", "Interval", "bootstrap_interval", "compare", "holm"]

Scores = Union["Tensor", ArrayLike]
Clusters = Optional[Union["Tensor", Sequence[object], NDArray[np.generic]]]

# Numbers that resampling holds in memory at a time
BLOCK = 2**22
# Numbers of draws that are kept for the next call
KEPT = 2**27


class Interval(NamedTuple):
    """Result of :func:`bootstrap_interval`, for values of shape (n, ...).

    Attributes:
        mean (array): Mean of the examples, of shape (...).
        low, high (array): Ends of the confidence interval, of shape (...). NaN if there
            are less than two examples, or clusters.
        num_examples (int): Number of examples without NaN.
        num_nan (int): Number of examples that are left out, as there is NaN.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    num_examples: int
    num_nan: int


class Comparison(NamedTuple):
    """One method compared with another one, `baseline`, by :func:`compare`.

    What is not defined, as for too few examples, is NaN.

    Attributes:
        num_examples (int): Number of examples with a score of both.
        num_nan (int): Number of examples that are left out, as a score is NaN.
        num_clusters (int): Number of clusters, or of examples without clusters.
        mean, baseline_mean (float): Mean scores of both methods.
        difference (float): Mean of the paired differences, method - baseline.
        low, high (float): Ends of the confidence interval of the difference.
        effect_size (float): Mean of the paired differences in units of their standard
            deviation. NaN if all differences are the same, or there is only one.
        rank_biserial (float): Sum of the signed ranks of the differences, from -1
            (always lower) to 1 (always higher).
        p_value (float): Two-sided p-value of the test, for this comparison alone.
        p_holm (float): p-value corrected for all comparisons, see :func:`holm`.
    """

    method: str
    baseline: str
    num_examples: int
    num_nan: int
    num_clusters: int
    mean: float
    baseline_mean: float
    difference: float
    low: float
    high: float
    effect_size: float
    rank_biserial: float
    p_value: float
    p_holm: float


def to_numpy(values: Scores) -> NDArray[np.float64]:
    """Values in double precision."""
    return np.asarray(_of_tensor(values), dtype=np.float64)


def _of_tensor(values: Any) -> Any:
    """A tensor as an array, and anything else as it is."""
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    # NumPy does not know all of PyTorch's floating point numbers
    return (values.double() if values.is_floating_point() else values).numpy()


def _check_values(values: Scores, name: str) -> NDArray[np.float64]:
    """Values of examples as an array in double precision."""
    array = to_numpy(values)
    if array.ndim == 0:
        raise ValueError(f"{name} must have one value per example, but are a number.")
    if np.isinf(array).any():
        raise ValueError(f"{name} contain infinity, which has no mean.")
    return array


def _cluster_index(clusters: Clusters, size: int) -> NDArray[np.int64]:
    """For each example, the number of its cluster; its own one without clusters."""
    if clusters is None:
        return np.arange(size)
    labels = np.asarray(_of_tensor(clusters))
    if labels.shape != (size,):
        raise ValueError(
            f"clusters must have one label for each of {size} examples, but are of"
            f" shape {labels.shape}."
        )
    kinds = {isinstance(label, str) for label in clusters}
    # all NaN would be the same cluster
    is_nan = labels.dtype.kind == "f" and np.isnan(labels).any()
    if labels.dtype == object or len(kinds) > 1 or is_nan:
        raise TypeError(
            f"clusters must all be numbers or all be names, but are {[*clusters][:5]}:"
            " give examples without a cluster one of their own."
        )
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _cluster_sums(
    values: NDArray[np.float64], index: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sums over each cluster, of shape (clusters, ...)."""
    # clusters may have lost all their examples
    _, index = np.unique(index, return_inverse=True)
    sums = np.zeros((index.max(initial=-1) + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def check_resampling(confidence: float, n_resamples: int) -> None:
    """Check arguments that functions have in common."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not between 0 and 1.")
    positive_integer("n_resamples", n_resamples)


def _interval(
    values: NDArray[np.float64], index: NDArray[np.int64], confidence: float,
    n_resamples: int, seed: int, method: str,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the bootstrap confidence interval of the mean over the first axis."""
    sums = _cluster_sums(values, index)
    sizes = _cluster_sums(np.ones(len(values)), index)
    groups, *shape = sums.shape
    if groups < 2:
        return np.full(shape, math.nan), np.full(shape, math.nan)
    columns = sums.reshape(groups, -1)
    mean = columns.sum(0) / sizes.sum()
    # the same examples in another order differ by rounding
    rounding = 1e-12 * np.abs(columns).sum(0) / sizes.sum()
    # methods are resampled alike, so draws are kept unless they take too much memory
    draw = _kept_draws if groups * n_resamples <= KEPT else _draw
    drawn = np.concatenate([
        (counts @ columns) / (counts @ sizes)[:, None]
        for counts in (each.astype(float) for each in draw(groups, n_resamples, seed))
    ])
    drawn = np.where(np.abs(drawn - mean) <= rounding, mean, drawn)
    below = (1 - confidence) / 2
    levels = np.array([[below], [1 - below]]).repeat(len(mean), 1)
    if method == "bca":
        corrected = _correct(levels, drawn, mean, columns, sizes)
        # without any variation there is nothing to correct
        levels = np.where(np.isfinite(corrected), corrected, levels)
    low, high = (
        np.array([np.quantile(each, level) for each, level in zip(drawn.T, row)])
        for row in levels
    )
    return low.reshape(shape)[()], high.reshape(shape)[()]


@lru_cache(1)
def _kept_draws(groups: int, n_resamples: int, seed: int) -> list[NDArray[np.uint8]]:
    """All draws in little memory, as no cluster is ever drawn more than 255 times."""
    return [each.astype(np.uint8) for each in _draw(groups, n_resamples, seed)]


def _draw(groups: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each cluster is drawn in some resamples, (resamples, clusters)."""
    generator, block = np.random.default_rng(seed), max(1, BLOCK // groups)
    for begin in range(0, n_resamples, block):
        count = min(block, n_resamples - begin)
        rows = generator.integers(0, groups, (count, groups))
        # counts instead of a copy of all values
        rows += groups * np.arange(count)[:, None]
        counts = np.bincount(rows.ravel(), minlength=count * groups)
        yield counts.reshape(count, groups)


def _correct(
    levels: NDArray[np.float64], drawn: NDArray[np.float64], mean: NDArray[np.float64],
    columns: NDArray[np.float64], sizes: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Levels of quantiles corrected for bias and skewness (Efron 1987)."""
    from scipy.special import ndtr, ndtri  # slow to load

    with np.errstate(all="ignore"):
        bias = ndtri(((drawn < mean).mean(0) + (drawn <= mean).mean(0)) / 2)
        # means without one of the clusters
        without = (columns.sum(0) - columns) / (sizes.sum() - sizes)[:, None]
        spread = without.mean(0) - without
        skewness = (spread**3).sum(0) / (6 * (spread**2).sum(0) ** 1.5)
        shifted = bias + ndtri(levels)
        return ndtr(bias + shifted / (1 - skewness * shifted))


def bootstrap_interval(
    values: Scores, clusters: Clusters = None, *, confidence: float = 0.95,
    n_resamples: int = 9999, method: str = "bca", seed: int = 0,
) -> Interval:
    """Confidence interval of a mean over examples, by the bootstrap.

    Examples are drawn with replacement, or whole `clusters`: examples of a class
    resemble each other, so that they tell less than their number suggests. The interval
    is too narrow for few clusters: of intervals of 95 %, 93 % contained the mean with
    20 or 40 normally distributed clusters, 90 % with 10, and 84 % with 5.

    Args:
        values (Tensor or array): One value per example of shape (n,), or several, as
            for the points of curves, of shape (n, ...). Each has an interval of its
            own. Examples with NaN are left out.
        clusters (Tensor or sequence, optional): The cluster of each example, for
            instance its class, as numbers or names of shape (n,).
        confidence (float, optional): Level of confidence.
        n_resamples (int, optional): Number of resamples.
        method (str, optional): `"bca"` corrects the percentiles of the resamples for
            bias and skewness (Efron 1987), `"percentile"` does not.
        seed (int, optional): Seed of the resamples.

    Raises:
        ValueError: If there is infinity, a shape does not fit, or an argument is out of
            range.

    Examples:
        >>> from captum_adapters.metrics import bootstrap_interval
        >>> interval = bootstrap_interval([0.1, 0.4, float("nan"), 0.2, 0.3])
        >>> round(float(interval.mean), 2), interval.num_nan
        (0.25, 1)
        >>> bool(0.1 < interval.low < 0.25 < interval.high < 0.4)
        True
    """
    check_resampling(confidence, n_resamples)
    check_choice("method", method, ("bca", "percentile"))
    array = _check_values(values, "values")
    index = _cluster_index(clusters, len(array))
    valid = ~np.isnan(array).any(tuple(range(1, array.ndim)))
    kept = array[valid]
    mean = kept.mean(0) if len(kept) else np.full(array.shape[1:], math.nan)
    low, high = _interval(kept, index[valid], confidence, n_resamples, seed, method)
    return Interval(np.asarray(mean), low, high, len(kept), len(array) - len(kept))


def _sign_flip_test(sums: NDArray[np.float64], n_resamples: int, seed: int) -> float:
    """Two-sided p-value of a sum, if each term could as well have the other sign."""
    sums = sums[sums != 0]
    groups = len(sums)
    observed = abs(sums.sum())
    # sums of the same terms in another order differ by rounding
    limit = observed - 1e-12 * np.abs(sums).sum()
    exact = groups < 63 and 2**groups <= n_resamples
    total = 2**groups if exact else n_resamples
    rng = np.random.default_rng(seed)
    extreme = 0
    block = max(1, BLOCK // max(groups, 1))
    for begin in range(0, total, block):
        count = min(block, total - begin)
        if exact:
            numbers = np.arange(begin, begin + count)[:, None]
            positive = (numbers >> np.arange(groups)) & 1
        else:
            positive = rng.integers(0, 2, (count, groups), dtype=np.int8)
        flipped = positive @ (2 * sums) - sums.sum()
        extreme += int((np.abs(flipped) >= limit).sum())
    # the observed signs are among all signs, and one more sample of random ones
    return extreme / total if exact else (extreme + 1) / (total + 1)


def _signed_ranks(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wilcoxon's signed ranks, zero for differences of zero, which take no rank."""
    ranks = np.zeros_like(differences)
    nonzero = differences != 0
    sizes = np.abs(differences[nonzero])
    _, places, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    # equal ones share the mean of their ranks
    ranks[nonzero] = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks * np.sign(differences)


def holm(p_values: Scores) -> NDArray[np.float64]:
    """Holm's correction of p-values for several comparisons (Holm 1979).

    The probability that any true null hypothesis is rejected stays below the level, no
    matter how the tests depend on each other.

    Args:
        p_values (Tensor or array): p-values of shape (n,). NaN, as of a test without
            examples, is kept and not counted.

    Returns:
        array: Adjusted p-values in the order of the given ones.

    Raises:
        ValueError: If the p-values are not of shape (n,) or not between 0 and 1.
    """
    values = _check_values(p_values, "p_values")
    if values.ndim != 1 or ((values < 0) | (values > 1)).any():
        raise ValueError(
            "p_values must be of shape (n,) and between 0 and 1, but are"
            f" {values.tolist()}."
        )
    adjusted = values.copy()
    tests = np.flatnonzero(~np.isnan(values))
    order = tests[np.argsort(values[tests], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return adjusted


def _differences(
    scores: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Paired differences. Magnitudes that only rounding of the scores tells apart are
    made equal, those near to zero zero, as signs and ranks would tell them apart."""
    differences, magnitudes = scores - others, np.abs([scores, others])
    # not the largest score of all, as an outlier would hide the differences of others
    typical = np.median(magnitudes) if magnitudes.size else 0
    rounding = 1e-12 * magnitudes.max(0).clip(typical)
    sizes = np.where(np.abs(differences) > rounding, np.abs(differences), 0)
    order = np.argsort(sizes, kind="stable")
    ordered, rounding = sizes[order], rounding[order]
    new = np.ones(len(sizes), dtype=bool)
    new[1:] = np.diff(ordered) > np.maximum(rounding[1:], rounding[:-1])
    new[1:] |= (ordered[:-1] == 0) & (ordered[1:] > 0)
    sizes[order] = ordered[new][new.cumsum() - 1]
    return np.sign(differences) * sizes


def _describe(
    scores: NDArray[np.float64], others: NDArray[np.float64],
    differences: NDArray[np.float64],
) -> dict[str, float]:
    """Means, and sizes of effects."""
    if not len(scores):
        names = "mean", "baseline_mean", "difference", "effect_size", "rank_biserial"
        return dict.fromkeys(names, math.nan)
    deviation = differences.std(ddof=1) if len(scores) > 1 else math.nan
    # the same difference everywhere has no standard deviation to compare with
    effect = differences.mean() / deviation if np.ptp(differences) else math.nan
    ranks = _signed_ranks(differences)
    weight = np.abs(ranks).sum()
    return {
        "mean": float(scores.mean()),
        "baseline_mean": float(others.mean()),
        "difference": float(differences.mean()),
        "effect_size": float(effect),
        "rank_biserial": float(ranks.sum() / weight) if weight else 0.0,
    }


def compare(
    scores: Mapping[str, Scores], baseline: Optional[str] = None,
    clusters: Clusters = None, *, test: str = "permutation", confidence: float = 0.95,
    n_resamples: int = 9999, seed: int = 0,
) -> list[Comparison]:
    """Compare methods by their scores on the same examples.

    Scores usually differ far more from example to example than from method to method,
    so the differences per example are what is informative.

    Args:
        scores (mapping of str to Tensor or array): For each method, its scores on the
            same examples in the same order, of shape (n,). Examples with NaN in one of
            two scores are left out of their comparison.
        baseline (str, optional): Name of the method that all others are compared with.
            Default: None, for all pairs of methods
        test (str, optional): Two-sided test of paired differences. `"permutation"`:
            whether the mean is zero, by the signs of the differences (of a cluster, all
            together), which are as likely to be reversed if methods do not differ. It
            is exact if all combinations of signs are at most `n_resamples`.
            `"wilcoxon"`: the signed-rank test, for scores with outliers. With clusters,
            the ranks' sum is tested by reversing signs as above.
        clusters, confidence, n_resamples, seed: See :func:`bootstrap_interval`.

    Raises:
        ValueError: If there are less than two methods, scores have different shapes or
            infinity, or an argument is unknown or out of range.

    Examples:
        >>> from captum_adapters.metrics import compare
        >>> scores = {
        ...     "ratio": [0.9, 0.7, 0.8, 0.6, 0.9, 0.8],
        ...     "symmetric": [0.7, 0.6, 0.5, 0.5, 0.7, float("nan")],
        ... }
        >>> result, = compare(scores, baseline="symmetric")
        >>> round(result.difference, 2), result.p_value, result.num_nan
        (0.18, 0.0625, 1)
    """
    check_resampling(confidence, n_resamples)
    check_choice("test", test, ("permutation", "wilcoxon"))
    if len(scores) < 2:
        raise ValueError(f"scores are of {len(scores)} methods: give two or more.")
    if baseline is not None and baseline not in scores:
        raise ValueError(
            f"baseline={baseline!r} is not among the methods {', '.join(scores)}."
        )
    arrays = {key: _check_values(scores[key], f"scores of {key}") for key in scores}
    shapes = {name: array.shape for name, array in arrays.items()}
    if {len(shape) for shape in shapes.values()} != {1} or len({*shapes.values()}) > 1:
        raise ValueError(
            f"scores must all be of the same shape (n,), but are of shapes {shapes}."
        )
    index = _cluster_index(clusters, next(iter(arrays.values())).size)
    pairs = list(combinations(scores, 2))
    if baseline is not None:
        pairs = [(name, baseline) for name in scores if name != baseline]
    results = []
    for method, other in pairs:
        valid = ~np.isnan(arrays[method] + arrays[other])
        first, second = arrays[method][valid], arrays[other][valid]
        differences, groups = _differences(first, second), index[valid]
        low, high = _interval(differences, groups, confidence, n_resamples, seed, "bca")
        if not valid.any():
            p_value = math.nan
        elif test == "wilcoxon" and clusters is None and differences.any():
            from scipy import stats  # slow to load

            p_value = float(stats.wilcoxon(differences).pvalue)
        else:
            terms = _signed_ranks(differences) if test == "wilcoxon" else differences
            p_value = _sign_flip_test(_cluster_sums(terms, groups), n_resamples, seed)
        results.append(Comparison(
            method, other, len(first), len(valid) - len(first), len(np.unique(groups)),
            low=float(low), high=float(high), p_value=p_value, p_holm=math.nan,
            **_describe(first, second, differences),
        ))
    adjusted = holm([result.p_value for result in results])
    return [each._replace(p_holm=float(p)) for each, p in zip(results, adjusted)]
