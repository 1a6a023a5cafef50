"""What a run holds: its settings, samples and records, and how they are read.

The files are described in :mod:`captum_adapters.evaluation.store`.
"""

import base64
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import numpy as np

from zennit_resnet._text import one_line

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = "settings.json"
# of the files, in the settings
FORMAT = 2


class RunError(Exception):
    """What keeps a run from going on, in one line that says what to do."""


class SampleRecord(NamedTuple):
    """What is known about a sample.

    Attributes:

        sample (str): Its name, which is its path relative to the data.
        label, target, prediction (int or None): Indices of its class, and of the classes
                that are explained and predicted.
        probability (float or None): Probability of the explained class.
        problem (str or None): Why it is left out. Then there are no records of it.
        notes (tuple[str]): What could not be used of it, such as its mask.
        picture (bytes or None): What the network sees, a JPEG of at most 112 x 112 pixels.
        content (str or None): Hash of the bytes of its image and mask, and of its boxes.
    """

    sample: str
    label: Optional[int] = None
    target: Optional[int] = None
    prediction: Optional[int] = None
    probability: Optional[float] = None
    problem: Optional[str] = None
    notes: tuple[str, ...] = ()
    picture: Optional[bytes] = None
    content: Optional[str] = None


class Record(NamedTuple):
    """What was measured on a method's map for a sample."""

    sample: str
    # problem (why nothing was measured, else None), seconds, metric_seconds, and scores
    scores: dict[str, Any]
    curves: dict[str, np.ndarray] = {}  # float32 of shape (points,)
    # divided by its largest magnitude, times 127, as int8 of 112 x 112 pixels or less
    heatmap: Optional[np.ndarray] = None


class Run(NamedTuple):
    """What a folder holds.

    Attributes:

        folder (Path): The folder.
        settings (dict): What was evaluated. `settings["labels"]` has `matched_by` and
                `classes` of :class:`captum_adapters.evaluation.Samples`.
        samples (dict): :class:`SampleRecord` by name, in order.
        records (DataFrame): `problem` (why nothing was measured), `seconds`,
                `metric_seconds` and scores, indexed by `sample` and `method`, in order.
                NaN where a score is not defined, such as without a mask.
        curves (DataFrame): Arrays of shape (points,) by name, with the same index.
        heatmaps (Series): Small maps or `None`, with the same index.
        messages (list[str]): What is wrong with the files.
    """

    folder: Path
    settings: dict[str, Any]
    samples: dict[str, SampleRecord]
    records: "pd.DataFrame"
    curves: "pd.DataFrame"
    heatmaps: "pd.Series[Any]"
    messages: list[str]


def reason_of(error: Exception) -> str:
    """Why something went wrong, in one line."""
    return one_line(getattr(error, "strerror", None) or error)


@lru_cache(None)
def key_of(method: str) -> str:
    """What files of a method are named by, whatever other methods there are."""
    return hashlib.sha256(method.encode()).hexdigest()[:8]


def union(names: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once, in order."""
    return [*dict.fromkeys(chain.from_iterable(names))]


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings of a run. Without any, or of an earlier version, it is a `RunError`."""
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{folder} holds no run: give a folder that evaluate --out has written"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path} ({reason_of(error)}): if it is damaged, delete it, and give"
            " the command of the run again"
        ) from error
    if not isinstance(settings, dict):
        raise RunError(f"cannot read {path}: it is not written by evaluate")
    if settings.get("format") != FORMAT:
        raise RunError(
            f"{folder} holds a run of an earlier version: make its report by that version,"
            " or evaluate again with another --out"
        )
    return settings


def read_batch(path: Path) -> tuple[list[SampleRecord], list[str]]:
    """Samples of a file, and their stamps. It is a `ValueError` if it is damaged."""
    try:
        samples, stamps = [], []
        for row in json.loads(path.read_text(encoding="utf-8")):
            if row["picture"] is not None:
                row["picture"] = base64.b64decode(row["picture"])
            stamps.append(row.pop("stamp"))
            samples.append(SampleRecord(**{**row, "notes": tuple(row["notes"])}))
        return samples, stamps
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise anything
        raise ValueError(reason_of(error)) from error


class Table(NamedTuple):
    """Records of a batch by a method, as they are in a file."""

    samples: list[str]
    problems: list[Optional[str]]
    columns: list[str]
    values: np.ndarray  # of shape (samples, columns)
    curves: dict[str, np.ndarray]  # of shape (samples, points), or (1, points) if equal
    heatmaps: Optional[np.ndarray]

    def align(self, columns: list[str]) -> np.ndarray:
        """Values of these columns, NaN where there are none."""
        if columns == self.columns:
            return self.values
        values = np.full((len(self.samples), len(columns)), math.nan)
        for place, name in enumerate(columns):
            if name in self.columns:
                values[:, place] = self.values[:, self.columns.index(name)]
        return values


def read_table(path: Union[Path, str]) -> Table:
    """Records of a file. It is a `ValueError` if it is damaged."""
    try:
        with open(path, "rb") as file:
            # this compares a checksum
            data = zlib.decompress(file.read())
        place = data.index(b"\n") + 1
        header, arrays = json.loads(data[:place]), {}
        for name, dtype, shape in header.pop("arrays"):
            array = np.frombuffer(data, dtype, math.prod(shape), place)
            arrays[name] = array.reshape(shape)
            place += array.nbytes
        values, heatmaps = arrays.pop("values"), arrays.pop("heatmaps", None)
        curves = {name.removeprefix("curve/"): array for name, array in arrays.items()}
        return Table(**header, values=values, curves=curves, heatmaps=heatmaps)
    except FileNotFoundError:
        raise
    except Exception as error:  # as above
        raise ValueError(reason_of(error)) from error


def accuracy(run: Run) -> tuple[int, int]:
    """Number of samples that the network classifies correctly, and of those with a label.

    Samples that are left out do not count.
    """
    samples = [each for each in run.samples.values() if each.problem is None]
    right = [each.prediction == each.label for each in samples if each.label is not None]
    return sum(right), len(right)


def read_run(folder: Path) -> Run:
    """Read the records of a run, whichever processes wrote them, or still do.

    They are sorted by sample and method, each once. It is a :class:`RunError` if the
    folder holds no run.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    keys = {key_of(method): method for method in settings["identity"]["methods"]}
    records = folder / settings["fingerprint"]
    samples: dict[str, SampleRecord] = {}
    tables: list[tuple[str, Table]] = []
    messages = []
    for name in sorted(name for name in os.listdir(records) if name[0].isdigit()):
        key, _, kind = name.partition("-")[2].partition(".")
        try:
            if name.endswith(".json"):
                samples.update((row.sample, row) for row in read_batch(records / name)[0])
            elif kind == "zlib" and key in keys:
                tables.append((keys[key], read_table(f"{records}/{name}")))
        except ValueError as error:
            messages.append(
                f"{name} is damaged ({error}): the command of the run computes it again"
            )
    # of files that were replaced by what cannot be read
    stale = {name for name, sample in samples.items() if sample.problem is not None}
    return Run(folder, settings, dict(sorted(samples.items())), *_join(tables, stale), messages)


def _join(
    tables: Sequence[tuple[str, Table]], stale: set[str]
) -> tuple["pd.DataFrame", "pd.DataFrame", "pd.Series[Any]"]:
    """Records, curves and heatmaps of methods in order, but for those of some samples."""
    import pandas as pd  # a dry run needs none

    names, methods, problems = [], [], []
    heatmaps: list[Any] = []
    columns = union(table.columns for _, table in tables) or ["seconds", "metric_seconds"]
    curves: dict[str, list[Any]] = {
        name: [] for name in union(table.curves for _, table in tables)
    }
    values = [np.empty((0, len(columns)))]
    # arrays are parts of what was read, as copies would take twice the memory
    for method, table in tables:
        blank = [None] * len(table.samples)
        names += table.samples
        methods += [method] * len(table.samples)
        problems += table.problems
        values.append(table.align(columns))
        for name, column in curves.items():
            rows = [*table.curves.get(name, blank)]
            column += rows if len(rows) == len(blank) else rows * len(blank)
        heatmaps += blank if table.heatmaps is None else [*table.heatmaps]
    index = pd.MultiIndex.from_arrays([names, methods], names=["sample", "method"])
    records = pd.DataFrame(np.concatenate(values), index, columns)
    records.insert(0, "problem", pd.Series(problems, index, dtype=object))
    frame = pd.DataFrame(curves, index, dtype=object)
    series = pd.Series(heatmaps, index, dtype=object)
    sound = records["problem"].isna().to_numpy()
    frame, series = frame.where(sound[:, None] & frame.notna()), series.where(sound, None)
    order = np.lexsort(index.codes[::-1])
    order = order[~(index.get_level_values(0).isin(stale) | index.duplicated("last"))[order]]
    return records.iloc[order], frame.iloc[order], series.iloc[order]
