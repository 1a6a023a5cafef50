"""The folder of a run: settings, and one file for each batch of images and method.

Each file is written under a temporary name, synchronized and renamed. So it is complete
or not there, whatever happens to the process that writes it, and what is there need not
be computed again. Nothing is locked, and no file is changed by two processes: if an
earlier process still runs, it writes the same file once more.

    run/settings.json
    run/<fingerprint>/batches.json          names of the samples in each batch
    run/<fingerprint>/00012.json            batch 12: classes, problems, pictures
    run/<fingerprint>/00012-5d41402a.npz    scores, curves and heatmaps of batch 12 by a
                                            method, named by the hash of its name
"""

import base64
import hashlib
import io
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from zennit_resnet._text import one_line

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = "settings.json"
BATCHES = "batches.json"
# files that the mean time of a method is taken from
TIMED = 50


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
        settings (dict): What was evaluated. `settings["labels"]` says how labels became
                classes of the network: `matched_by` is `"name"`, `"index"`, `"wnid"`,
                several of these, `"order"` if that is only a guess, `"order, as asked
                for"`, or `"none"` without labels; `classes` is the name of the class by
                label.
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
    records: "pd.DataFrame"
    curves: "pd.DataFrame"
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
        raise RunError(
            f"cannot read {path} ({_reason(error)}): if it is damaged, delete it, and give"
            " the command of the run again"
        ) from error
    if not isinstance(settings, dict):
        raise RunError(f"cannot read {path}: it is not written by evaluate")
    records = path.parent / str(settings.get("fingerprint"))
    if not (records / BATCHES).exists():
        raise RunError(
            f"{folder} holds a run of an earlier version: make its report by that version,"
            " or evaluate again with another --out"
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

    A run grows by methods and samples: what it has stays as it is, and further samples
    are cut into batches of their own.

    Args:

        folder (Path): The folder, which is created if there is none.
        settings (dict): Settings, whose `fingerprint` is the hash of that part of
                `identity` which can not grow.
        names (sequence of str): Names of all samples, in order.
        write (bool, optional): Whether to write anything.
                Default: True

    Attributes:

        settings (dict): Settings of the run, with all its methods.
        batches (list[list[str]]): Names of the samples in each batch.
        messages (list[str]): What the run grows by, and which files are damaged.

    Raises:
        RunError: If the folder holds another run, which the message says what differs
                in, or can not be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        names: Sequence[str],
        write: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.records = self.folder / settings["fingerprint"]
        self.settings, self.batches = settings, []
        self.messages: list[str] = []
        self._sound: set[Path] = set()
        path, old = self.folder / SETTINGS, None
        if path.exists():
            old = read_settings(self.folder)
            # one that has failed from the start may be left out
            had = self.folder / old["fingerprint"]
            methods, new = (each["identity"]["methods"] for each in (old, settings))
            kept = [
                text
                for text in methods
                if text in new or any(had.glob(f"*-{_key(text)}.npz"))
            ]
            if kept != methods:
                left = ", ".join(text for text in methods if text not in kept)
                self.messages.append(f"the run has nothing of {left}, which is left out")
            old["identity"]["methods"] = kept
            _refuse_other(self.folder, old, settings, names)
            self.batches = _read_batches(self.records)
            self._grow(old["identity"], len(names))
        known = {name for batch in self.batches for name in batch}
        more = [name for name in names if name not in known]
        size = settings["batch_size"]
        self.batches += [more[row : row + size] for row in range(0, len(more), size)]
        if not write:
            return
        if old is None or self.messages:
            with _writing(self.folder):
                self.records.mkdir(parents=True, exist_ok=True)
            # first, as there is a run when there are settings
            _write(self.records / BATCHES, json.dumps(self.batches).encode())
            _write(path, (json.dumps(self.settings, indent=1) + "\n").encode())

    def _grow(self, old: dict[str, Any], count: int) -> None:
        """Add what the run has to the settings, and say what is new."""
        new = self.settings["identity"]
        more = [text for text in new["methods"] if text not in old["methods"]]
        if more:
            self.messages.append(f"the run grows by {', '.join(more)}")
        if count > old["samples"]:
            self.messages.append(
                f"the run grows from {old['samples']} to {count} images"
            )
        identity = {**new, "methods": [*old["methods"], *more]}
        identity["files"] = {**old["files"], **new["files"]}
        self.settings = {**self.settings, "identity": identity}

    def _samples(self, batch: int) -> Path:
        return self.records / f"{batch:05d}.json"

    def _records(self, batch: int, method: str) -> Path:
        return self.records / f"{batch:05d}-{_key(method)}.npz"

    def has(self, batch: int, method: str) -> bool:
        """Whether there are sound records of a method on a batch."""
        path = self._records(batch, method)
        if path not in self._sound and path.exists():
            try:
                found = {record.sample for record in _read_records(path)}
                if not found <= {*self.batches[batch]}:
                    raise ValueError("it is of other samples")
                self._sound.add(path)
            except ValueError as error:
                self._report(path, error)
        return path in self._sound

    def _report(self, path: Path, error: Exception) -> None:
        """Remember a damaged file."""
        text = f"{path.name} is damaged ({_reason(error)}), and computed again"
        if text not in self.messages:
            self.messages.append(text)

    def read_samples(self, batch: int) -> Optional[tuple[list[SampleRecord], list[str]]]:
        """Samples of a batch and their stamps, `None` if there are no sound ones."""
        path = self._samples(batch)
        try:
            samples, stamps = _read_samples(path)
            if [sample.sample for sample in samples] != self.batches[batch]:
                raise ValueError("it is of other samples")
            return samples, stamps
        except FileNotFoundError:
            return None
        except ValueError as error:
            self._report(path, error)
            return None

    def read_times(self, method: str) -> Optional[tuple[float, float]]:
        """Mean seconds of a method's attributions and of their metrics, if known."""
        paths = sorted(self.records.glob(f"*-{_key(method)}.npz"))[:TIMED]
        scores = []
        for path in paths:
            with suppress(ValueError):
                scores += [each.scores for each in _read_records(path)]
        if not scores:
            return None
        import pandas as pd

        means = pd.DataFrame(scores).mean(numeric_only=True)
        return float(means["seconds"]), float(means["metric_seconds"])

    def write_samples(
        self, batch: int, samples: Sequence[SampleRecord], stamps: Sequence[str]
    ) -> None:
        """Write the samples of a batch, with stamps of their files.

        Raises:
            RunError: If that is not possible, as the disk is full.
        """
        rows = [sample._asdict() for sample in samples]
        for row, stamp in zip(rows, stamps):
            row["stamp"] = stamp
            if row["picture"] is not None:
                row["picture"] = base64.b64encode(row["picture"]).decode()
        _write(self._samples(batch), json.dumps(rows).encode())

    def write_records(self, batch: int, method: str, records: Sequence[Record]) -> None:
        """Write the records of a batch by a method. It raises as :meth:`write_samples`."""
        import pandas as pd

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
        np.savez_compressed(buffer, **arrays, checksum=_checksum(arrays))
        _write(self._records(batch, method), buffer.getvalue())
        self._sound.add(self._records(batch, method))


def _refuse_other(
    folder: Path, old: dict[str, Any], new: dict[str, Any], names: Sequence[str]
) -> None:
    """Refuse settings that are not those of a run, or with more methods and samples."""
    first, second = old["identity"], new["identity"]
    what = {key for key in {**first, **second} if first.get(key) != second.get(key)}
    what -= {"manifest", "samples"}
    if {*first["methods"]} <= {*second["methods"]}:
        what -= {"methods"}
    files = second.get("files", {})
    if all(files.get(name) == value for name, value in first.get("files", {}).items()):
        what -= {"files"}
    text = _differing(first, second, sorted(what))
    batches = [] if what else _read_batches(folder / new["fingerprint"])
    known = {name for batch in batches for name in batch}
    gone = sorted(known - {*names})
    if gone:
        what |= {"samples"}
        chosen = [
            {"samples": count, **each.get("evaluation", {})}
            for each, count in ((old, len(known)), (new, len(names)))
        ]
        text = _differing(chosen[0], chosen[1], ["limit", "seed", "split", "layout", "samples"])
        text = f"{text and text + ', '}{len(gone)} samples (now none), such as {gone[0]}"
    elif len(names) > len(known) and "grid_pointing" in first.get("metrics", ()):
        what |= {"samples"}
        text = (
            f"samples ({len(known)}, now {len(names)}), which mosaics of grid_pointing"
            " are made of"
        )
    if what:
        raise RunError(
            f"{folder} holds another run, which differs in {text}: choose another"
            " folder with --out, or repeat the command of that run to go on"
        )


def _differing(first: dict[str, Any], second: dict[str, Any], keys: Sequence[str]) -> str:
    """What differs in some settings."""
    pair = [{key: each.get(key) for key in keys} for each in (first, second)]
    return differences(pair[0], pair[1], ", now ")


def _key(method: str) -> str:
    """What files of a method are named by, whatever other methods there are."""
    return hashlib.sha256(method.encode()).hexdigest()[:8]


def _checksum(arrays: dict[str, Any]) -> str:
    """Hash of arrays and their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _stack(arrays: Sequence[Optional[np.ndarray]], blank: float) -> np.ndarray:
    """Arrays of equal shape, of which some may be missing."""
    like = next(array for array in arrays if array is not None)
    return np.stack(
        [np.full_like(like, blank) if array is None else array for array in arrays]
    )


def _read_batches(folder: Path) -> list[list[str]]:
    """Names of the samples in each batch."""
    path = folder / BATCHES
    try:
        batches = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(name, str) for batch in batches for name in batch):
            raise ValueError("it is not written by evaluate")
        return [list(batch) for batch in batches]
    except (OSError, TypeError, ValueError) as error:
        raise RunError(
            f"cannot read {path} ({_reason(error)}): evaluate again with another --out"
        ) from error


def _read_samples(path: Path) -> tuple[list[SampleRecord], list[str]]:
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
        raise ValueError(_reason(error)) from error


def _read_records(path: Path) -> list[Record]:
    """Records of a file. It is a `ValueError` if it is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("checksum")) != _checksum(arrays):
            raise ValueError("it is not as it was written")
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
    except Exception as error:  # as above
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
    keys = {_key(method): method for method in methods}
    samples: dict[str, SampleRecord] = {}
    found: dict[tuple[str, str], Record] = {}
    messages = []
    for path in sorted((folder / settings["fingerprint"]).glob("[0-9]*")):
        method = keys.get(path.stem.partition("-")[2], "")
        try:
            if path.suffix == ".json":
                samples.update((row.sample, row) for row in _read_samples(path)[0])
            elif method:
                found.update(((row.sample, method), row) for row in _read_records(path))
        except ValueError as error:
            messages.append(
                f"{path.name} is damaged ({error}): the command of the run computes it"
                " again"
            )
    # of files that were replaced by what can not be read
    stale = {name for name, sample in samples.items() if sample.problem is not None}
    found = {key: row for key, row in found.items() if key[0] not in stale}
    import pandas as pd  # a dry run needs none

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
