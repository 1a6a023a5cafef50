"""Records of runs put together: groups of comparable runs, and a row for each method."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd

from captum_adapters.evaluation.columns import column_of
from captum_adapters.evaluation.names import kind_of
from captum_adapters.evaluation.records import Run, SampleRecord, union
from captum_adapters.evaluation.store import brief, differences
from captum_adapters.statistics import bootstrap_interval

# Runs on the same data are comparable if they agree in these settings
COMPARABLE = ("model", "weights", "transform", "classes", "options")
# Runs that differ in these are put together, and it is said
MENTIONED = ("versions", "device", "cross", "files")
# Items that are named in a sentence
NAMED = 5
TIMES = ["seconds", "metric_seconds"]
STATISTICS = ["mean", "low", "high", "examples"]


class Row(NamedTuple):
    """A method of a group of comparable runs."""

    name: str  # that no other row has
    method: str
    kind: str  # "ours", "baseline" or "control"
    group: str  # name of its group
    runs: tuple[Run, ...]  # those that have records of it
    scores: pd.DataFrame  # finite scores of the sound records, indexed by sample
    problems: dict[str, str]  # reasons by sample for which there are no scores
    statistics: pd.DataFrame  # mean, low, high and examples of each score

    @property
    def control(self) -> bool:
        """Whether it does not explain anything."""
        return self.kind == "control"

    @property
    def seconds(self) -> float:
        """Mean time of the attribution of an example."""
        return mean_of(self.scores["seconds"])

    @property
    def top_ties(self) -> float:
        """Share of tied pixels in what the top p % are ranked by."""
        magnitude = "tied_share_magnitude"
        return self.mean(magnitude if self.has(magnitude) else "tied_share")

    def has(self, score: str) -> bool:
        """Whether there is a mean of a score."""
        return score in self.statistics.index

    def mean(self, score: str) -> float:
        """Mean of a score, NaN if there is none."""
        return float(self.statistics.at[score, "mean"]) if self.has(score) else math.nan

    def quality(self, score: str) -> float:
        """Mean of a score, with the sign that makes more better."""
        return column_of(score).sign * self.mean(score)

    def of(self, score: str) -> "pd.Series[float]":
        """A score of the samples that have it."""
        return self.scores.get(score, pd.Series(dtype=float)).dropna()

    def arrays(self, curve: Optional[str] = None) -> "pd.Series[Any]":
        """Curves of this name by sample, or small maps without a name."""
        found = [run.heatmaps if curve is None else run.curves.get(curve) for run in self.runs]
        columns = [each.xs(self.method, level="method") for each in found if each is not None]
        if not columns:
            return pd.Series(dtype=object)
        arrays = pd.concat([each.dropna() for each in columns])
        return arrays[~arrays.index.duplicated()].reindex(self.scores.index).dropna()


class Group(NamedTuple):
    """Comparable runs, with the samples of all of them by name."""

    name: str
    runs: tuple[Run, ...]
    folders: tuple[str, ...]  # names of the runs
    samples: dict[str, SampleRecord]
    rows: tuple[Row, ...] = ()  # methods in the order in which they were given, then controls

    def clusters(self, names: Sequence[str], clusters: Optional[str]) -> Optional[np.ndarray]:
        """Class of each sample, or one of its own if it is not known."""
        if clusters is None:
            return None
        known = {name: f"class {sample.label}" for name, sample in self.samples.items()
                 if sample.label is not None}
        return np.array([known.get(name, f"sample {name}") for name in names])

    def class_name(self, label: Optional[int]) -> str:
        """Name of a class, empty if there is no label."""
        return "" if label is None else str(self.runs[0].settings["classes"][label])


# -- runs ------------------------------------------------------------------------------


def settings_of(run: Run) -> dict[str, Any]:
    """Settings of a run, with those of its identity."""
    return {**run.settings["identity"], **run.settings}


def methods_of(run: Run) -> "pd.Index[str]":
    """Methods that a run has records of."""
    return run.records.index.unique("method")


def unfinished(run: Run) -> str:
    """How much of an interrupted run there is, empty if it is complete."""
    counts = run.records.groupby(level="sample").size()
    left_out = sum(sample.problem is not None for sample in run.samples.values())
    done, total = int((counts == len(methods_of(run))).sum()) + left_out, settings_of(run)["samples"]
    return f"{done} of {total} images, run not complete." if done < total else ""


def mean_of(values: Sequence[float]) -> float:
    """Mean, NaN of nothing. It is not rounded in between, so it is the same in any order."""
    return math.fsum(values) / len(values) if len(values) else math.nan


def span(counts: Iterable[int]) -> str:
    """The least and the largest number, or one if they are equal."""
    counts = [*counts]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def list_some(items: Sequence[str]) -> str:
    """The first items, and how many others there are."""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def _differences(first: Run, second: Run, keys: Sequence[str]) -> str:
    return differences(settings_of(first), settings_of(second), keys)


def _folder_names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs' folders, with as many of their parents as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    count = 1
    while len({path[-count:] for path in paths}) < len(set(paths)):
        count += 1
    names = ["/".join(path[-count:]) for path in paths]
    # bytes that are no text cannot be drawn
    return [name.encode(errors="backslashreplace").decode() for name in names]


def _same_data(first: Run, second: Run) -> bool:
    """Whether samples are of the same data, wherever it is, or further ones of it."""
    old, new = settings_of(first), settings_of(second)
    places = [(os.path.normpath(each["data"]), each["layout"]) for each in (old, new)]
    return old["manifest"] == new["manifest"] or places[0] == places[1]


def _merge_samples(runs: Sequence[Run]) -> dict[str, SampleRecord]:
    """Samples of all runs. What was a problem in one may be none in another."""
    samples: dict[str, SampleRecord] = {}
    for run in runs:
        for name, sample in run.samples.items():
            known = samples.get(name)
            if known is None or (known.problem is not None and sample.problem is None):
                samples[name] = sample
            elif sample.problem is None:
                notes = tuple(dict.fromkeys([*known.notes, *sample.notes]))
                samples[name] = known._replace(notes=notes)
    return dict(sorted(samples.items()))


def group_runs(
    runs: Sequence[Run], warnings: list[str], messages: list[str]
) -> list[Group]:
    """Put comparable runs together."""
    found: list[list[Run]] = []
    for run in runs:
        for members in found:
            same = any(_same_data(member, run) for member in members)
            if same and not _differences(members[0], run, COMPARABLE):
                members.append(run)
                break
        else:
            found.append([run])
    names = dict(zip(map(id, runs), _folder_names(runs)))
    groups: list[Group] = []
    for members in found:
        folders = tuple(names[id(run)] for run in members)
        name = " + ".join(dict.fromkeys(folders))
        groups.append(Group(name, tuple(members), folders, _merge_samples(members)))
        for run, folder in zip(members, folders):
            what = _differences(members[0], run, MENTIONED)
            if what:
                messages.append(f"{folders[0]} and {folder} differ in {what}.")
        first = groups[0].runs[0]
        if len(groups) > 1:
            data = () if _same_data(first, members[0]) else ("data", "layout")
            what = _differences(first, members[0], (*data, *COMPARABLE))
            warnings.append(
                f"Rows of {name} cannot be compared with those of {groups[0].name}: the"
                f" runs differ in {what}."
            )
    return groups


# -- rows ------------------------------------------------------------------------------


def _merge_records(
    runs: Sequence[Run], method: str, messages: list[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Sound records of a method in any run, and reasons of problems, by sample."""
    table = pd.concat([run.records.xs(method, level="method") for run in runs])
    sound = table["problem"].isna()
    problems = table["problem"][~sound & ~table.index.isin(table.index[sound])]
    # another run may have measured something else
    scores = table[sound].drop(columns="problem")
    repeated = scores[scores.index.duplicated(keep=False)].drop(columns=TIMES)
    conflicts = int((repeated.groupby(level=0).nunique() > 1).any(axis=1).sum())
    if conflicts:
        messages.append(
            f"{method}: {conflicts} examples have other scores in a further run; those of"
            " the first are used."
        )
    reasons = {str(name): text for name, text in sorted(problems.items())}
    return scores.groupby(level=0).first().astype(float), reasons


def _statistics(
    scores: pd.DataFrame, clusters: Optional[np.ndarray], **options: Any
) -> pd.DataFrame:
    """Mean and interval of each score."""
    # scores that are defined for the same examples are resampled together
    patterns: dict[bytes, list[str]] = defaultdict(list)
    for name in scores.columns.drop(TIMES):
        patterns[scores[name].notna().to_numpy().tobytes()].append(name)
    found = {}
    for names in patterns.values():
        valid = scores[names[0]].notna().to_numpy()
        if not valid.any():
            continue
        values = scores.loc[valid, names].to_numpy()
        labels = None if clusters is None else clusters[valid]
        interval = bootstrap_interval(values, labels, **options)
        for name, column, low, high in zip(names, values.T, interval.low, interval.high):
            found[name] = (mean_of(column), low, high, len(column))
            if name == "gap":
                found["gap_largest"] = (column.max(), math.nan, math.nan, len(column))
    return pd.DataFrame.from_dict(found, orient="index", columns=STATISTICS)


def _tell_apart(groups: Sequence[Group]) -> list[str]:
    """The settings in which groups differ, or their names if these do not tell."""
    known = []
    for group in groups:
        values = settings_of(group.runs[0])
        weights = values.get("weights_name") or values["weights"]
        names = {"model": values["model"], "weights": Path(weights).name}
        if not all(_same_data(groups[0].runs[0], each.runs[0]) for each in groups):
            names["data"] = Path(values["data"]).name
        known.append({**names, **values["options"]})
    keys = [key for key in known[0] if any(each.get(key) != known[0][key] for each in known)]
    texts = [", ".join(f"{key}={brief(each.get(key), 30)}" for key in keys[:3]) for each in known]
    return texts if len({*texts}) == len(texts) else [group.name for group in groups]


def add_rows(
    groups: Sequence[Group], clusters: Optional[str], messages: list[str], **options: Any
) -> list[Group]:
    """Groups with their rows."""
    found = [union(map(methods_of, group.runs)) for group in groups]
    repeated = Counter(chain(*found))
    order = [text for group in groups for run in group.runs for text in settings_of(run)["methods"]]
    complete = []
    for group, methods, text in zip(groups, found, _tell_apart(groups)):
        rows = []
        for method in methods:
            members = tuple(run for run in group.runs if method in methods_of(run))
            name = f"{method} ({text})" if repeated[method] > 1 else method
            scores, problems = _merge_records(members, method, messages)
            infinite = int(np.isinf(scores.to_numpy()).sum())
            if infinite:
                messages.append(f"{name}: {infinite} infinite scores are left out.")
            scores = scores.replace([math.inf, -math.inf], math.nan)
            if "gap" in scores:
                # gains and losses must not cancel
                scores["gap"] = scores["gap"].abs()
            labels = group.clusters(scores.index.tolist(), clusters)
            statistics = _statistics(scores, labels, **options)
            fields = group.name, members, scores, problems, statistics
            rows.append(Row(name, method, kind_of(method), *fields))
        rows.sort(key=lambda row: (row.control, order.index(row.method)))
        complete.append(group._replace(rows=tuple(rows)))
    return complete
