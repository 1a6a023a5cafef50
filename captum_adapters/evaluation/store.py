"""The folder of a run: settings, and one file for each batch of images and method.

Each file is written under a temporary name, synchronized and renamed. So it is complete
or not there, whatever happens to the process that writes it, and what is there need not
be computed again. Nothing is locked, and no file is changed by two processes: if an
earlier process still runs, it writes the same file once more.

    run/settings.json
    run/<fingerprint>/00012.json       the samples of batch 12: classes, problems, pictures
    run/<fingerprint>/00012-003.npz    scores, curves and heatmaps of batch 12 by method 3
"""

import base64
import io
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd

from zennit_resnet._text import one_line

SETTINGS = "settings.json"


class RunError(Exception):
    """What keeps a run from going on, in one line that says what to do."""


class SampleRecord(NamedTuple):
    """What is known about a sample.

    Attributes:

        sample (str): Its name, which is its path relative to the data.
        label (int or None): Index of its class.
        target (int or None): Index of the class that is explained.
        prediction (int or None): Index of the class that is predicted.
        probability (float or None): Probability of the explained class.
        problem (str or None): Why it is left out. Then there are no records of it.
        notes (tuple[str]): What could not be used of it, such as its mask.
        picture (bytes or None): What the network sees, as a JPEG of 112 x 112 pixels or
                less.
    """

    sample: str
    label: Optional[int] = None
    target: Optional[int] = None
    prediction: Optional[int] = None
    probability: Optional[float] = None
    problem: Optional[str] = None
    notes: tuple[str, ...] = ()
    picture: Optional[bytes] = None


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
        settings (dict): What was evaluated.
        samples (dict): :class:`SampleRecord` by name, in order.
        records (DataFrame): `problem` (why nothing was measured), `seconds`,
                `metric_seconds` and scores, indexed by `sample` and `method`, in
                order. NaN where a score is not defined, such as without a mask.
        curves (DataFrame): Arrays of shape (points,) by name, with the same index.
        heatmaps (Series): Small maps, with the same index. `None` where there is none.
        messages (list[str]): What is wrong with the files.
    """

    folder: Path
    settings: dict[str, Any]
    samples: dict[str, SampleRecord]
    records: pd.DataFrame
    curves: pd.DataFrame
    heatmaps: "pd.Series[Any]"
    messages: list[str]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say clearly why a folder can not be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {folder} ({_reason(error)}): what was written before is"
            " kept, and the same command goes on when this is solved"
        ) from error


def _reason(error: Exception) -> str:
    """Why something went wrong, in one line."""
    return one_line(getattr(error, "strerror", None) or error)


def _write(path: Path, data: bytes) -> None:
    """Write a file that is complete as soon as it is there."""
    own = path.with_name(f".{path.name}-{platform.node()}-{os.getpid()}")
    with _writing(path.parent):
        try:
            with open(own, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings of a run.

    Raises:
        RunError: If there are none, or they are of an earlier version.
    """
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{folder} holds no run: give a folder that evaluate --out has written"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {_reason(error)}") from error
    if not isinstance(settings, dict):
        raise RunError(f"cannot read {path}: it is not written by evaluate")
    if "installed" not in settings:
        raise RunError(
            f"{folder} holds a run of an earlier version, with records in SQLite: make"
            " its report by that version, or evaluate again with another --out"
        )
    return settings


def differences(first: dict[str, Any], second: dict[str, Any], sign: str = "; ") -> str:
    """What differs between settings, for messages."""
    found = []
    for key in {**first, **second}:
        old: Any = first.get(key)
        new: Any = second.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(differences(old, new, sign))
            continue
        if isinstance(old, list) and isinstance(new, list) and sorted(old) != sorted(new):
            gone = [elem for elem in old if elem not in new]
            more = [elem for elem in new if elem not in old]
            old, new = gone or "none", more or "none"
        found.append(f"{key} ({brief(old)}{sign}{brief(new)})")
    return ", ".join(found)


def brief(value: Any, limit: int = 60) -> str:
    """A setting in one line."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}={brief(elem)}" for key, elem in value.items())
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Store:
    """The files of a run.

    Args:

        folder (Path): The folder, which is created if there is none.
        settings (dict): Settings with the key `fingerprint`, the hash of `identity`.
        write (bool, optional): Whether to create the folder.
                Default: True

    Raises:
        RunError: If the folder holds another run, which the message says what differs
                in, or can not be written.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], write: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.records = self.folder / settings["fingerprint"]
        path = self.folder / SETTINGS
        if write and not path.exists():
            with _writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, (json.dumps(settings, indent=1) + "\n").encode())
        if path.exists():
            self.settings = read_settings(self.folder)
            if self.settings["fingerprint"] != settings["fingerprint"]:
                old, new = self.settings["identity"], settings["identity"]
                what = differences(old, new, ", now ")
                raise RunError(
                    f"{folder} holds another run, which differs in {what}: choose another"
                    " folder with --out, or repeat the command of that run to go on"
                )
        if write:
            with _writing(self.folder):
                self.records.mkdir(exist_ok=True)

    @property
    def batch_size(self) -> int:
        """Number of samples in a file, which stays as it was when the run began."""
        return int(self.settings["batch_size"])

    def _samples(self, batch: int) -> Path:
        return self.records / f"{batch:05d}.json"

    def _records(self, batch: int, method: int) -> Path:
        return self.records / f"{batch:05d}-{method:03d}.npz"

    def has(self, batch: int, method: int) -> bool:
        """Whether a method was evaluated on a batch."""
        return self._records(batch, method).exists()

    def read_samples(self, batch: int) -> Optional[list[SampleRecord]]:
        """Samples of a batch, `None` if they were not written yet, or are damaged."""
        try:
            return _read_samples(self._samples(batch))
        except (FileNotFoundError, ValueError):
            return None

    def read_times(self, method: int) -> Optional[tuple[float, float]]:
        """Mean seconds of a method's attributions and of their metrics, if known."""
        paths = self.records.glob(f"*-{method:03d}.npz")
        scores = [each.scores for path in paths for each in _read_records(path)]
        if not scores:
            return None
        means = pd.DataFrame(scores).mean(numeric_only=True)
        return float(means["seconds"]), float(means["metric_seconds"])

    def write_samples(self, batch: int, samples: Sequence[SampleRecord]) -> None:
        """Write the samples of a batch.

        Raises:
            RunError: If that is not possible, as the disk is full.
        """
        rows = [sample._asdict() for sample in samples]
        for row in rows:
            if row["picture"] is not None:
                row["picture"] = base64.b64encode(row["picture"]).decode()
        _write(self._samples(batch), json.dumps(rows).encode())

    def write_records(self, batch: int, method: int, records: Sequence[Record]) -> None:
        """Write the records of a batch by a method. It raises as :meth:`write_samples`."""
        values = pd.DataFrame([each.scores for each in records]).drop(columns="problem")
        arrays: dict[str, Any] = {
            "samples": np.array([each.sample for each in records]),
            "problems": np.array([each.scores["problem"] or "" for each in records]),
            "columns": np.array([*values], dtype=str),
            "values": values.to_numpy(np.float64),
        }
        for name in {name: None for record in records for name in record.curves}:
            curves = [record.curves.get(name) for record in records]
            arrays[f"curve/{name}"] = _stack(curves, np.nan)
        heatmaps = [record.heatmap for record in records]
        if any(heatmap is not None for heatmap in heatmaps):
            arrays["heatmaps"] = _stack(heatmaps, 0)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        _write(self._records(batch, method), buffer.getvalue())


def _stack(arrays: Sequence[Optional[np.ndarray]], blank: float) -> np.ndarray:
    """Arrays of equal shape, of which some may be missing."""
    like = next(array for array in arrays if array is not None)
    return np.stack(
        [np.full_like(like, blank) if array is None else array for array in arrays]
    )


def _read_samples(path: Path) -> list[SampleRecord]:
    """Samples of a file."""
    samples = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        if row["picture"] is not None:
            row["picture"] = base64.b64decode(row["picture"])
        samples.append(SampleRecord(**{**row, "notes": tuple(row["notes"])}))
    return samples


def _read_records(path: Path) -> list[Record]:
    """Records of a file. It is a `ValueError` if it is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        names, heatmaps = arrays["columns"].tolist(), arrays.get("heatmaps")
        curves = {
            name.removeprefix("curve/"): array
            for name, array in arrays.items()
            if name.startswith("curve/")
        }
        found = []
        for row, sample in enumerate(arrays["samples"].tolist()):
            problem = str(arrays["problems"][row]) or None
            values = dict(zip(names, arrays["values"][row].tolist()))
            record = Record(sample, {"problem": problem, **values})
            if problem is None:
                record = record._replace(
                    curves={name: array[row] for name, array in curves.items()},
                    heatmap=None if heatmaps is None else heatmaps[row],
                )
            found.append(record)
        return found
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(_reason(error)) from error


def accuracy(run: Run) -> tuple[int, int]:
    """Number of samples that the network classifies correctly, and of those with a label.

    Samples that are left out do not count.
    """
    known = [
        sample
        for sample in run.samples.values()
        if sample.problem is None and sample.label is not None
    ]
    return sum(sample.prediction == sample.label for sample in known), len(known)


def read_run(folder: Path) -> Run:
    """Read the records of a run, whichever processes wrote them.

    Args:

        folder (Path): The folder of the run. It may still be written to.

    Returns:
        Run: The records, sorted by sample and method, each once.

    Raises:
        RunError: If the folder holds no run.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    methods = settings["identity"]["methods"]
    samples: dict[str, SampleRecord] = {}
    found: dict[tuple[str, str], Record] = {}
    messages = []
    for path in sorted((folder / settings["fingerprint"]).glob("[0-9]*")):
        try:
            if path.suffix == ".json":
                samples.update((row.sample, row) for row in _read_samples(path))
            else:
                method = methods[int(path.stem.partition("-")[2])]
                found.update(((row.sample, method), row) for row in _read_records(path))
        except ValueError as error:
            messages.append(
                f"{path.name} is damaged ({error}): delete it, and the command of the run"
                " computes it again"
            )
    index = pd.MultiIndex.from_tuples(sorted(found), names=["sample", "method"])
    rows = [found[key] for key in index]
    columns = None if rows else ["problem", "seconds", "metric_seconds"]
    records = pd.DataFrame([row.scores for row in rows], index, columns)
    problems = [row.scores["problem"] for row in rows]
    records["problem"] = pd.Series(problems, index, dtype=object)
    return Run(
        folder,
        settings,
        dict(sorted(samples.items())),
        records,
        pd.DataFrame([row.curves for row in rows], index, dtype=object),
        pd.Series([row.heatmap for row in rows], index, dtype=object),
        messages,
    )
