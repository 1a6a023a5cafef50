"""Methods of each group compared with the best baseline."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from captum_adapters.evaluation.columns import COLUMNS, column_of
from captum_adapters.evaluation.report.aggregate import Group, Row
from captum_adapters.statistics import Comparison, compare


class Significance(NamedTuple):
    """All methods of a group compared with one of them."""

    group: str  # its name
    column: str  # name of the score
    baseline: str  # name of the row that others are compared with
    results: tuple[Comparison, ...]


def choose_primary(
    rows: Sequence[Row], primary: str, messages: list[str]
) -> Optional[str]:
    """The score by which methods are compared."""
    known = [name for name in COLUMNS if any(row.has(name) for row in rows)]
    directed = [name for name in known if column_of(name).sign]
    if primary in directed:
        return primary
    if not rows:
        return None
    if primary != "id":
        raise ValueError(
            f"primary={primary!r} is not a score of these runs that is better when higher or"
            f" lower. There are {', '.join(directed) or 'none'}."
        )
    if not directed:
        messages.append("No score is better when higher or lower, so nothing is compared.")
        return None
    messages.append(f"There is no score id, so methods are compared by {directed[0]}.")
    return directed[0]


def _choose_baseline(
    rows: Sequence[Row], primary: str, baseline: Optional[str], messages: list[str]
) -> Optional[Row]:
    """What others are compared with, None if it is not in this group."""
    if baseline is not None:
        return next((row for row in rows if baseline in (row.name, row.method)), None)
    candidates = [row for row in rows if row.kind == "baseline"]
    controls = [row for row in rows if row.control]
    if not candidates and controls and len(rows) > 1:
        messages.append(
            "There is no method of others to compare with, so methods are compared with"
            " the best control. Choose another one with --baseline."
        )
    candidates = candidates or controls
    # the best one of few examples may be so by chance
    counts = [row.statistics.at[primary, "examples"] for row in candidates]
    enough = [row for row, count in zip(candidates, counts) if 2 * count >= max(counts)]
    return max(enough, key=lambda row: row.quality(primary), default=None)


def compare_rows(
    groups: Sequence[Group], primary: Optional[str], baseline: Optional[str],
    clusters: Optional[str], messages: list[str], **options: Any,
) -> list[Significance]:
    """Compare the methods of each group with the best baseline."""
    if primary is None:
        return []
    rows = [row for group in groups for row in group.rows]
    if baseline is not None and not any(baseline in (row.name, row.method) for row in rows):
        raise ValueError(
            f"baseline={baseline!r} is not among the methods"
            f" {', '.join(row.name for row in rows)}."
        )
    found = []
    for group in groups:
        members = [row for row in group.rows if row.has(primary)]
        other = _choose_baseline(members, primary, baseline, messages)
        if len(members) < 2 or other is None:
            if members:
                messages.append(
                    f"Nothing to compare in {group.name}: it needs a baseline and a method."
                )
            continue
        samples = other.of(primary).index
        scores = {row.name: row.of(primary).reindex(samples).to_numpy() for row in members}
        for name in [name for name, values in scores.items() if np.isnan(values).all()]:
            messages.append(f"{name} has {primary} of no example that {other.name} has it of.")
            del scores[name]
        if len(scores) < 2:
            continue
        labels = group.clusters(samples.tolist(), clusters)
        results = compare(scores, other.name, labels, **options)
        found.append(Significance(group.name, primary, other.name, tuple(results)))
    return found
