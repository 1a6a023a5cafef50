"""Mean curves with confidence bands, which need no PyTorch."""

import math
from statistics import NormalDist
from typing import Mapping, Optional, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from captum_adapters.statistics import (
    Clusters,
    Scores,
    bootstrap_interval,
    check_resampling,
    to_numpy,
)

# From so many examples on, means are normally distributed for all that can be seen
MANY = 5000
# Points of curves whose examples have points at different positions
GRID_POINTS = 101
# Methods with the same color differ in these
LINE_STYLES = ("-", "--", ":", "-.")


def _common_positions(
    curves: NDArray[np.float64], positions: NDArray[np.float64], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Curves at positions that all examples share, of shapes (batch, P) and (P,)."""
    fits = curves.ndim == 2 and positions.shape in (curves.shape, curves.shape[1:])
    if not fits or curves.size == 0:
        raise ValueError(
            f"The curves of {name} must be of shape (batch, points), and their positions"
            " of the same shape or of shape (points,), but they are of shapes"
            f" {curves.shape} and {positions.shape}."
        )
    if positions.ndim == 2 and (positions == positions[0]).all():
        positions = positions[0]
    elif positions.ndim == 2:
        rows = np.argsort(positions, 1, kind="stable")
        curves, positions = (np.take_along_axis(each, rows, 1) for each in (curves, positions))
        grid = np.linspace(positions.min(), positions.max(), GRID_POINTS)
        curves = np.stack([np.interp(grid, *each) for each in zip(positions, curves)])
        positions = grid
    order = np.argsort(positions, kind="stable")
    curves, positions = curves[:, order], positions[order]
    # such as the share of no pixels
    defined = ~np.isnan(curves).all(0)
    return curves[:, defined], positions[defined]


def plot_curves(
    curves: Mapping[str, Scores], positions: Union[Scores, Mapping[str, Scores]], *,
    axes: Optional[Axes] = None, confidence: Optional[float] = 0.95,
    clusters: Clusters = None, n_resamples: int = 2000, marker: Optional[str] = None,
) -> Axes:
    """Draw the mean curve of each method, and a band for its confidence interval.

    The bands are for the means of all examples, point by point: by the bootstrap, and
    from 5,000 examples on without clusters by the normal distribution. Two methods may
    well differ although their bands overlap, as both vary with the examples; for that,
    see :func:`captum_adapters.metrics.compare`.

    Args:
        curves (mapping of str to Tensor or array): For each method, curves of shape
            (batch, points). Examples with NaN are left out.
        positions (Tensor, array, or mapping of these): Where points are on the x-axis,
            of shape (points,) for all methods, or (batch, points) if that depends on
            the example, where curves are interpolated linearly before they are
            averaged; or these for each method.
        axes (Axes, optional): What to draw on. Default: None, for a new figure, to be
            found as `axes.figure`
        confidence (float, optional): Level of confidence, `None` for no bands.
        clusters, n_resamples: See :func:`captum_adapters.metrics.bootstrap_interval`.
        marker (str, optional): Marker of points.

    Raises:
        ValueError: If there are no curves, or a shape does not fit.
    """
    if not curves:
        raise ValueError("There are no curves to draw.")
    if axes is None:
        axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for number, (name, values) in enumerate(curves.items()):
        where = positions[name] if isinstance(positions, Mapping) else positions
        points, x = _common_positions(to_numpy(values), to_numpy(where), name)
        valid = ~np.isnan(points).any(1)
        mean = points[valid].mean(0)
        line = axes.plot(
            x, mean, label=name, marker=marker, markersize=4,
            linestyle=LINE_STYLES[number // 10 % len(LINE_STYLES)],
        )[0]
        if confidence is not None:
            if clusters is None and valid.sum() >= MANY:
                check_resampling(confidence, n_resamples)
                width = NormalDist().inv_cdf((1 + confidence) / 2)
                margin = width * points[valid].std(0, ddof=1) / math.sqrt(valid.sum())
                low, high = mean - margin, mean + margin
            else:
                _, low, high, *_ = bootstrap_interval(
                    points, clusters, confidence=confidence, n_resamples=n_resamples
                )
            color = line.get_color()
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes
