"""Records of runs put together: groups, rows and means."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from captum_adapters.evaluation.controls import CONTROLS
from captum_adapters.evaluation.measures import COLUMNS, Column
from captum_adapters.evaluation.methods import base_of, group_of
from captum_adapters.evaluation.records import Record, Run, SampleRecord
from captum_adapters.metrics.statistics import bootstrap_interval

PROTOCOLS = {
    "default": "our protocol",
    "keio": "published code of Otsuki et al. 2024",
    "rise": "published code of RISE",
    "c3": "text of C³-LRP",
}
# Runs on the same data are comparable if they agree in these settings
COMPARABLE = ("model", "weights_hash", "transform", "classes", "options", "dtype")
# Of comparable runs, records of a method are put together if they agree in these
SAME = ("versions", "device", "cross")
# Items that are named in a sentence
NAMED = 5


class Statistic(NamedTuple):
    """Mean of a score over examples, and its confidence interval."""

    mean: float
    low: float
    high: float
    num_examples: int


class Row(NamedTuple):
    """A method of a group of comparable runs.

    Attributes:

        name (str): Name that no other row has.
        method (str): Name of the method.
        kind (str): `"ours"`, `"baseline"` or `"control"`.
        group (int): Index of the group.
        records (dict): Sound records by name of the sample, in order.
        problems (dict): Reasons by name of the sample for which there are no scores.
        seconds (float): Mean time of the attribution of an example.
        statistics (dict): :class:`Statistic` by name of the column.
    """

    name: str
    method: str
    kind: str
    group: int
    records: dict[str, Record]
    problems: dict[str, str]
    seconds: float
    statistics: dict[str, Statistic]

    @property
    def control(self) -> bool:
        """Whether it does not explain anything."""
        return self.kind == "control"

    def mean(self, column: str) -> float:
        """Mean of a column, NaN if there is none."""
        return self.statistics[column].mean if column in self.statistics else math.nan

    def scores(self, column: str) -> dict[str, float]:
        """Scores by name of the sample, of those that are finite."""
        found = (
            (name, record.values.get(column)) for name, record in self.records.items()
        )
        return {
            name: value
            for name, value in found
            if value is not None and math.isfinite(value)
        }


class Group(NamedTuple):
    """Comparable runs.

    Attributes:

        name (str): Names of the runs' folders.
        runs (tuple[Run]): The runs.
        samples (dict): :class:`SampleRecord` of all runs by name, in order.
    """

    name: str
    runs: tuple[Run, ...]
    samples: dict[str, SampleRecord]


# -- columns ---------------------------------------------------------------------------


def column_of(name: str) -> Column:
    """What is known about a column, also if it is of another version."""
    return COLUMNS.get(name, Column(name, None, "default", ""))


def protocol_of(name: str) -> str:
    """What the protocol of a column is called."""
    protocol = column_of(name).protocol
    return PROTOCOLS.get(protocol, protocol)


def title_of(name: str) -> str:
    """Title of a column, with an arrow to where it is better."""
    title, better, *_ = column_of(name)
    return title + {"higher": " ↑", "lower": " ↓"}.get(better or "", "")


def sign_of(name: str) -> int:
    """1 if more is better, -1 if less is, 0 if neither."""
    return {"higher": 1, "lower": -1}.get(column_of(name).better or "", 0)


def counterpart_of(name: str) -> Optional[str]:
    """The column of our protocol for one of a published protocol."""
    protocol = column_of(name).protocol
    ours = name.removesuffix(f"_{protocol}")
    return ours if protocol != "default" and ours != name and ours in COLUMNS else None


# -- runs ------------------------------------------------------------------------------


def settings_of(run: Run) -> dict[str, Any]:
    """Settings of a run, those of its identity among them."""
    settings = {**run.settings.get("identity", {}), **run.settings}
    settings.pop("identity", None)
    return settings


def describe(value: Any, limit: int = 60) -> str:
    """A setting in one line."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}={describe(elem)}" for key, elem in value.items())
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
    else:
        text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def list_some(items: Sequence[str]) -> str:
    """The first items, and how many others there are."""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def _differences(first: Run, second: Run, keys: Sequence[str]) -> str:
    """Which settings differ, and how."""
    old, new = settings_of(first), settings_of(second)
    found = []
    for key in keys:
        pairs = [(key, old.get(key), new.get(key))]
        if isinstance(pairs[0][1], dict) and isinstance(pairs[0][2], dict):
            names = {**old[key], **new[key]}
            pairs = [
                (f"{key}.{name}", old[key].get(name), new[key].get(name))
                for name in names
            ]
        found += [
            f"{name} ({describe(before)}; {describe(after)})"
            for name, before, after in pairs
            if before != after
        ]
    return ", ".join(found)


def folder_names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs' folders, with as many of their parents as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    count = 1
    while len({path[-count:] for path in paths}) < len(set(paths)):
        count += 1
    names = ["/".join(path[-count:]) for path in paths]
    # bytes that are no text can not be drawn
    return [name.encode(errors="backslashreplace").decode() for name in names]


def _same_data(first: Run, second: Run) -> bool:
    """Whether samples are of the same data, wherever it is, or further ones of it."""
    old, new = settings_of(first), settings_of(second)
    if old.get("manifest") is not None and old["manifest"] == new.get("manifest"):
        return True
    # earlier runs have the path as it was typed
    places = [os.path.normpath(values.get("data") or "") for values in (old, new)]
    return places[0] == places[1] and old.get("layout") == new.get("layout")


def _merge_samples(runs: Sequence[Run]) -> dict[str, SampleRecord]:
    """Samples of all runs. What was a problem in one may be none in another."""
    samples: dict[str, SampleRecord] = {}
    for run in runs:
        for name, sample in run.samples.items():
            known = samples.get(name)
            if known is None or (known.problem is not None and sample.problem is None):
                samples[name] = sample
            elif sample.problem is None:
                notes = dict.fromkeys([*known.notes, *sample.notes])
                samples[name] = known._replace(notes=tuple(notes))
    return dict(sorted(samples.items()))


def group_runs(runs: Sequence[Run], warnings: list[str]) -> list[Group]:
    """Put comparable runs together."""
    found: list[list[Run]] = []
    for run in runs:
        for members in found:
            if not _differences(members[0], run, COMPARABLE) and any(
                _same_data(member, run) for member in members
            ):
                members.append(run)
                break
        else:
            found.append([run])
    names = dict(zip(map(id, runs), folder_names(runs)))
    groups = [
        Group(
            " + ".join(dict.fromkeys(names[id(run)] for run in members)),
            tuple(members),
            _merge_samples(members),
        )
        for members in found
    ]
    for group in groups[1:]:
        first, other = groups[0].runs[0], group.runs[0]
        keys = (
            COMPARABLE if _same_data(first, other) else ("data", "layout", *COMPARABLE)
        )
        warnings.append(
            f"Rows of {group.name} can not be compared with those of {groups[0].name}: the"
            f" runs differ in {_differences(first, other, keys)}."
        )
    return groups


# -- rows ------------------------------------------------------------------------------


def _agree(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether scores that are in both are the same."""
    return all(
        value == second[name] or (math.isnan(value) and math.isnan(second[name]))
        for name, value in first.items()
        if name in second
    )


def _merge_records(
    runs: Sequence[Run], method: str, messages: list[str]
) -> tuple[dict[str, Record], dict[str, str]]:
    """Sound records of a method, and reasons of problems, by name of the sample."""
    merged: dict[str, Record] = {}
    conflicts = 0
    for run in runs:
        for (name, other), record in run.records.items():
            if other != method:
                continue
            known = merged.get(name)
            if known is None or (known.problem is not None and record.problem is None):
                merged[name] = record
            elif record.problem is None:
                conflicts += not _agree(known.values, record.values)
                # another run may have measured something else
                merged[name] = known._replace(
                    values={**record.values, **known.values},
                    curves={**record.curves, **known.curves},
                )
    if conflicts:
        messages.append(
            f"{method}: {conflicts} examples have other scores in a further run; those of"
            " the first are used."
        )
    sound, problems = {}, {}
    for name, record in sorted(merged.items()):
        if record.problem is None:
            sound[name] = record
        else:
            problems[name] = record.problem
    return sound, problems


def cluster_labels(
    group: Group, names: Sequence[str], clusters: Optional[str]
) -> Optional[list[str]]:
    """Cluster of each sample; one of its own if the class is not known."""
    if clusters is None:
        return None
    labels = [
        group.samples[name].label if name in group.samples else None for name in names
    ]
    return [
        f"sample {name}" if label is None else f"class {label}"
        for name, label in zip(names, labels)
    ]


def _statistics(
    records: dict[str, Record],
    labels: Optional[list[str]],
    confidence: float,
    n_resamples: int,
) -> tuple[dict[str, Statistic], int]:
    """Mean and interval of each score, and the number of infinite scores."""
    columns = [
        *dict.fromkeys(name for record in records.values() for name in record.values)
    ]
    table = np.full((len(records), len(columns)), math.nan)
    for index, record in enumerate(records.values()):
        table[index] = [record.values.get(name, math.nan) for name in columns]
    valid = np.isfinite(table)
    # scores that are defined for the same examples are resampled together
    patterns: dict[bytes, list[int]] = {}
    for index in np.flatnonzero(valid.any(0)).tolist():
        patterns.setdefault(valid[:, index].tobytes(), []).append(index)
    statistics = {}
    for indices in patterns.values():
        kept = valid[:, indices[0]]
        values = table[kept][:, indices]
        interval = bootstrap_interval(
            values,
            None if labels is None else np.array(labels)[kept],
            confidence=confidence,
            n_resamples=n_resamples,
        )
        for index, scores, low, high in zip(
            indices, values.T, interval.low, interval.high
        ):
            # this sum is not rounded in between, so it is the same in any order
            mean = math.fsum(scores) / len(scores)
            statistics[columns[index]] = Statistic(
                mean, float(low), float(high), len(scores)
            )
    return statistics, int(np.isinf(table).sum())


def _names_file(text: str, name: str) -> bool:
    """Whether a method or another network is from a file, as `abn:weights=FILE`."""
    # earlier runs know files without their folders
    pattern = rf"=(?:[^,+]*/)?{re.escape(name)}(?=[,+]|$)"
    return re.search(pattern, text) is not None


def _way(run: Run, method: str) -> str:
    """In what way records of a method were computed."""
    settings = settings_of(run)
    files = settings.get("files") or {}
    used = [
        [value for name, value in files.items() if _names_file(text, name)]
        for text in (method, *(settings.get("cross") or ()))
    ]
    return json.dumps([*(settings.get(key) for key in SAME), used], sort_keys=True)


def build_rows(
    groups: Sequence[Group],
    confidence: float,
    clusters: Optional[str],
    n_resamples: int,
    messages: list[str],
) -> list[Row]:
    """Rows of all groups, each with its controls last."""
    runs = [run for group in groups for run in group.runs]
    folders = dict(zip(map(id, runs), folder_names(runs)))
    found: dict[tuple[int, str, str], list[Run]] = {}
    for index, group in enumerate(groups):
        for run in group.runs:
            evaluated = sorted({method for _, method in run.records})
            listed = settings_of(run).get("methods") or ()
            ordered = [name for name in listed if name in evaluated]
            for method in dict.fromkeys([*ordered, *evaluated]):
                found.setdefault((index, method, _way(run, method)), []).append(run)
    ways: dict[tuple[int, str], list[Run]] = {}
    for (index, method, _), members in found.items():
        ways.setdefault((index, method), []).append(members[0])
    apart: dict[str, list[str]] = {}
    for (_, method), (first, *others) in ways.items():
        for other in others:
            what = _differences(first, other, (*SAME, "files"))
            both = f"{folders[id(first)]} and {folders[id(other)]} differ in {what}"
            apart.setdefault(both, []).append(method)
    messages += [
        f"{both}: methods of both are shown for each, {list_some(names)}."
        for both, names in apart.items()
    ]
    repeated = Counter(method for _, method, _ in found)
    rows = []
    for (index, method, _), members in found.items():
        name = (
            f"{method} ({folders[id(members[0])]})" if repeated[method] > 1 else method
        )
        records, problems = _merge_records(members, method, messages)
        labels = cluster_labels(groups[index], [*records], clusters)
        statistics, infinite = _statistics(records, labels, confidence, n_resamples)
        if infinite:
            messages.append(f"{name}: {infinite} infinite scores are left out.")
        times = [record.seconds for record in records.values()]
        seconds = math.fsum(times) / len(times) if times else math.nan
        kind = group_of(method)
        rows.append(
            Row(name, method, kind, index, records, problems, seconds, statistics)
        )
    position = {name: number for number, name in enumerate(CONTROLS)}
    # methods stay in their order, controls come in that of their definition
    return sorted(
        rows,
        key=lambda row: (row.group, row.control, position.get(base_of(row.method), 0)),
    )
