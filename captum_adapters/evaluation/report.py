"""Reports on runs of the evaluator: comparisons, and all that there is to say."""

import math
from collections.abc import Sequence
from typing import Optional

from captum_adapters.evaluation.caveats import find_gaps, find_warnings
from captum_adapters.evaluation.contents import Report, Significance
from captum_adapters.evaluation.measures import COLUMNS
from captum_adapters.evaluation.presets import PRESETS, Preset
from captum_adapters.evaluation.records import Run
from captum_adapters.evaluation.summary import (
    Group,
    Row,
    build_rows,
    cluster_labels,
    group_runs,
    settings_of,
    sign_of,
)
from captum_adapters.metrics.statistics import compare

# Number of clusters below which intervals of the bootstrap are clearly too narrow
FEW_CLASSES = 20


def _choose_primary(
    rows: Sequence[Row], primary: str, messages: list[str]
) -> Optional[str]:
    """The score by which methods are compared."""
    known = [name for name in COLUMNS if any(name in row.statistics for row in rows)]
    if primary in known and sign_of(primary):
        return primary
    directed = [name for name in known if sign_of(name)]
    if not rows:
        return None
    if primary != "id":
        raise ValueError(
            f"primary={primary!r} is not a score of these runs that is better when higher or"
            f" lower. There are {', '.join(directed) or 'none'}."
        )
    if not directed:
        messages.append(
            "No score is better when higher or lower, so nothing is compared."
        )
        return None
    messages.append(f"There is no score id, so methods are compared by {directed[0]}.")
    return directed[0]


def _choose_baseline(
    rows: Sequence[Row], primary: str, baseline: Optional[str], messages: list[str]
) -> Optional[Row]:
    """What others are compared with, None if it is not in this group."""
    if baseline is not None:
        named = [row for row in rows if baseline in (row.name, row.method)]
        return named[0] if named else None
    scored = [row for row in rows if not math.isnan(row.mean(primary))]
    candidates = [row for row in scored if row.kind == "baseline"]
    if not candidates:
        candidates = [row for row in scored if row.control]
        if candidates and len(scored) > 1:
            messages.append(
                "There is no method of others to compare with, so methods are compared with the"
                " best control. Choose another one with --baseline."
            )
    # the best one of few examples may be so by chance
    most = max((row.statistics[primary].num_examples for row in candidates), default=0)
    candidates = [
        row for row in candidates if 2 * row.statistics[primary].num_examples >= most
    ]
    return max(
        candidates, key=lambda row: sign_of(primary) * row.mean(primary), default=None
    )


def _compare(
    groups: Sequence[Group],
    rows: Sequence[Row],
    primary: Optional[str],
    baseline: Optional[str],
    confidence: float,
    clusters: Optional[str],
    n_resamples: int,
    messages: list[str],
) -> list[Significance]:
    """Compare the methods of each group with the best baseline."""
    if primary is None:
        return []
    names = {name for row in rows for name in (row.name, row.method)}
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"baseline={baseline!r} is not among the methods"
            f" {', '.join(row.name for row in rows)}."
        )
    found = []
    for index, group in enumerate(groups):
        members = [
            row for row in rows if row.group == index and primary in row.statistics
        ]
        other = _choose_baseline(members, primary, baseline, messages)
        if len(members) < 2 or other is None:
            if members:
                messages.append(
                    f"Nothing to compare in {group.name}: it needs a baseline and a method."
                )
            continue
        samples = sorted(other.scores(primary))
        scores = {}
        for row in members:
            values = row.scores(primary)
            if values.keys().isdisjoint(samples):
                messages.append(
                    f"{row.name} has {primary} of no example that {other.name} has it of."
                )
                continue
            scores[row.name] = [values.get(sample, math.nan) for sample in samples]
        if len(scores) < 2:
            continue
        results = compare(
            scores,
            other.name,
            cluster_labels(group, samples, clusters),
            confidence=confidence,
            n_resamples=n_resamples,
        )
        found.append(Significance(index, primary, other.name, tuple(results)))
    return found


def summarize(
    runs: Sequence[Run],
    *,
    baseline: Optional[str] = None,
    primary: str = "id",
    confidence: float = 0.95,
    clusters: Optional[str] = None,
    presets: Optional[Sequence[Preset]] = None,
    n_resamples: Optional[int] = None,
) -> Report:
    """Put the records of runs together.

    Runs of other methods on the same data, or of the same methods on further samples of
    it, are merged. Runs that differ in data, model or options are reported side by side,
    and not compared.

    Args:

        runs (sequence of Run): The runs, see
                :func:`captum_adapters.evaluation.records.read_run`.
        baseline (str, optional): Name of the method that others are compared with. By
                default, it is the best one by the primary score that is neither ours nor
                a control, of those with at least half as many examples as any other.
                Default: None
        primary (str, optional): Name of the score by which methods are compared. If
                there is no `"id"`, it is the first one there is.
                Default: `"id"`
        confidence (float, optional): Level of confidence of intervals.
                Default: 0.95
        clusters (str, optional): `"class"` to resample whole classes instead of
                examples, for intervals that hold for other classes too.
                Default: None
        presets (sequence of Preset, optional): What papers have printed, to be shown
                beside the scores, see
                :data:`captum_adapters.evaluation.presets.PRESETS`. By default, the
                presets that the runs name.
                Default: None
        n_resamples (int, optional): Number of resamples of intervals and tests. By
                default, it is 9999 for up to 10,000 examples, and less for more, where
                intervals vary little, but not less than 1999.
                Default: None

    Returns:
        Report: The means, comparisons and warnings, to be shown or written.

    Raises:
        ValueError: If there are no runs, or an argument is not among what there is.

    Examples::

        >>> from pathlib import Path
        >>> from captum_adapters.evaluation.records import Record, Run
        >>> from captum_adapters.evaluation.report import summarize
        >>> records = {
        ...     (f"{number}.jpg", method): Record(
        ...         f"{number}.jpg", method, None, {"id": score + number / 10}, {}
        ...     )
        ...     for method, score in (("grad_cam", 0.2), ("random", 0.0))
        ...     for number in range(3)
        ... }
        >>> report = summarize([Run(Path("run"), {}, {}, records, [])])
        >>> [(row.name, round(row.mean("id"), 2)) for row in report.rows]
        [('grad_cam', 0.3), ('random', 0.1)]
    """
    if not runs:
        raise ValueError("There are no runs: give the folder of one or more.")
    if clusters not in (None, "none", "class"):
        raise ValueError(f"clusters={clusters!r} is not one of 'class' and 'none'.")
    clusters = None if clusters == "none" else clusters
    warnings: list[str] = []
    messages: list[str] = []
    groups = group_runs(runs, warnings)
    if n_resamples is None:
        largest = max(len(group.samples) for group in groups)
        n_resamples = max(1999, min(9999, 10**8 // max(largest, 1)))
    rows = build_rows(groups, confidence, clusters, n_resamples, messages)
    messages[:0] = find_gaps(groups, rows)
    known = dict.fromkeys(
        [*COLUMNS, *sorted({name for row in rows for name in row.statistics})]
    )
    columns = [name for name in known if any(name in row.statistics for row in rows)]
    chosen = _choose_primary(rows, primary, messages)
    significance = _compare(
        groups, rows, chosen, baseline, confidence, clusters, n_resamples, messages
    )
    warnings += find_warnings(groups, rows)
    for group in groups if clusters else ():
        labels = {sample.label for sample in group.samples.values()} - {None}
        if not labels:
            messages.append(f"{group.name} has no labels, so examples are resampled.")
        elif len(labels) < FEW_CLASSES:
            warnings.append(
                f"Intervals of {group.name} are from {len(labels)} classes: they are too"
                " narrow, as there are so few."
            )
    if presets is None:
        presets = _find_presets(runs, messages)
    return Report(
        tuple(groups),
        tuple(rows),
        tuple(columns),
        chosen,
        confidence,
        clusters,
        tuple(significance),
        tuple(dict.fromkeys(warnings)),
        tuple(dict.fromkeys(messages)),
        tuple(presets),
    )


def _find_presets(runs: Sequence[Run], messages: list[str]) -> list[Preset]:
    """The presets that the runs name."""
    names: dict[str, None] = {}
    for run in runs:
        named = settings_of(run).get("preset") or ()
        names.update(dict.fromkeys([named] if isinstance(named, str) else named))
    unknown = [name for name in names if name not in PRESETS]
    if unknown:
        messages.append(
            f"There are no printed figures of the preset {', '.join(unknown)}."
        )
    return [PRESETS[name] for name in names if name in PRESETS]
