"""Plots of metrics, without any global state of matplotlib."""

from typing import Any, Mapping, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_adapters.curves import plot_curves
from captum_adapters.metrics.insertion_deletion import InsertionDeletion
from captum_adapters.metrics.pixel_accuracy import PixelAccuracy
from captum_adapters.statistics import to_numpy

__all__ = ["plot_accuracy", "plot_curves", "plot_insertion_deletion"]


def plot_insertion_deletion(
    results: Mapping[str, InsertionDeletion], *, figure: Optional[Figure] = None,
    **options: Any,
) -> Figure:
    """Draw the mean insertion and deletion curves of methods, with confidence bands.

    Args:
        results (mapping of str to InsertionDeletion): The result of
            :func:`captum_adapters.metrics.insertion_deletion` for each method.
        figure (Figure, optional): What to draw on, a new one by default.
        **options: See :func:`plot_curves`.

    Returns:
        Figure: The figure, with insertion to the left and deletion to the right. The
        legends give the mean areas.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import insertion_deletion
        >>> from captum_adapters.metrics.plots import plot_insertion_deletion
        >>> images = torch.rand(8, 1, 4, 4)
        >>> result = insertion_deletion(lambda x: x.mean((1, 2, 3)), images, images)
        >>> figure = plot_insertion_deletion({"brightness": result})
        >>> figure.savefig("insertion_deletion.pdf")  # doctest: +SKIP
    """
    if figure is None:
        figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    fractions = {name: result.fractions for name, result in results.items()}
    for axes, key, what in (
        (left, "insertion", "inserted"), (right, "deletion", "deleted")
    ):
        curves = {name: getattr(each, f"{key}_curve") for name, each in results.items()}
        plot_curves(curves, fractions, axes=axes, **options)
        areas = (np.nanmean(to_numpy(getattr(each, key))) for each in results.values())
        labels = [f"{name} ({area:.3f})" for name, area in zip(results, areas)]
        axes.legend(axes.get_lines(), labels, title="mean area", fontsize="small")
        axes.set(title=key.capitalize(), xlabel=f"Share of pixels {what}")
    left.set_ylabel("Score of the target")
    return figure


def plot_accuracy(results: Mapping[str, PixelAccuracy], **options: Any) -> Axes:
    """Draw the accuracy of methods against the percentage that is kept.

    These are the figures 9 to 22 of R-LRP by Nyiri & Gibaru, with confidence bands.

    Args:
        results (mapping of str to PixelAccuracy): For each method, the result of
            :func:`captum_adapters.metrics.pixel_accuracy`, or for each network, that of
            :func:`captum_adapters.metrics.cross_model_accuracy`.
        **options: See :func:`plot_curves`.
    """
    axes = plot_curves(
        {name: result.accuracy for name, result in results.items()},
        {name: result.percents for name, result in results.items()},
        **{"marker": "o", **options},
    )
    axes.set(
        xlabel="Kept, in the order of relevance (%)", ylabel="Accuracy", xlim=(0, 100),
        ylim=(-0.02, 1.02),
    )
    axes.legend()
    return axes
