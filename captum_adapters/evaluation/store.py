"""The folder of a run: settings, and one file for each batch of images and method.

Each file is written under a temporary name, synchronized and renamed. So it is complete
or not there, whatever happens to the process that writes it, and what is there need not
be computed again. Nothing is locked, and no file is changed by two processes: if an
earlier process still runs, it writes the same file once more.

    run/settings.json
    run/<fingerprint>/batches.json          names of the samples in each batch
    run/<fingerprint>/00012.json            batch 12: classes, problems, pictures
    run/<fingerprint>/00012-5d41402a.zlib   scores, curves and heatmaps of batch 12 by a
                                            method, named by the hash of its name: a line
                                            of JSON and arrays, compressed
"""

import base64
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import numpy as np

from captum_adapters.evaluation.records import (
    FORMAT,
    SETTINGS,
    Record,
    RunError,
    SampleRecord,
    key_of,
    read_batch,
    read_settings,
    read_table,
    reason_of,
    union,
)
from zennit_resnet._files import whole

BATCHES = "batches.json"
NOW = ", now "
# files that the mean time of a method is taken from
TIMED = 50


def _write(path: Path, data: bytes) -> None:
    """Write a file that is complete as soon as it is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as name:
            Path(name).write_bytes(data)
    except OSError as error:
        raise RunError(
            f"cannot write to {path.parent} ({reason_of(error)}): what was written before is"
            " kept, and the same command goes on when this is solved"
        ) from error


def differences(
    first: dict[str, Any],
    second: dict[str, Any],
    keys: Optional[Sequence[str]] = None,
    sign: str = "; ",
) -> str:
    """What differs between settings, of all or some keys, for messages."""
    found = []
    for key in union([first, second]) if keys is None else keys:
        old: Any = first.get(key)
        new: Any = second.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(differences(old, new, sign=sign))
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
    """The files of a run, to be written and continued.

    A run grows by methods and samples: what it has stays as it is, and further samples are
    cut into batches of their own. `messages` says what it grows by, and what is damaged.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], names: Sequence[str], write: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.records = self.folder / settings["fingerprint"]
        self.settings = {"format": FORMAT, **settings}
        self.batches: list[list[str]] = []
        self.messages: list[str] = []
        self._sound: set[tuple[int, str]] = set()
        path = self.folder / SETTINGS
        is_new = not path.exists()
        if not is_new:
            old = self._read_old(settings["identity"]["methods"])
            _refuse_other(self.folder, old, settings, names)
            self.batches = _read_batches(self.records)
            self._grow(old["identity"], len(names))
        known = {*chain.from_iterable(self.batches)}
        more = [name for name in names if name not in known]
        size = settings["batch_size"]
        self.batches += [more[row : row + size] for row in range(0, len(more), size)]
        if write and (is_new or self.messages):
            # first, as there is a run when there are settings
            _write(self.records / BATCHES, json.dumps(self.batches).encode())
            _write(path, (json.dumps(self.settings, indent=1) + "\n").encode())

    def _read_old(self, new: Sequence[str]) -> dict[str, Any]:
        """Settings of the run, but for methods that have failed from the start."""
        old = read_settings(self.folder)
        records, identity = self.folder / old["fingerprint"], old["identity"]
        kept = [
            text
            for text in identity["methods"]
            if text in new or any(records.glob(f"*-{key_of(text)}.zlib"))
        ]
        left_out = ", ".join(text for text in identity["methods"] if text not in kept)
        if left_out:
            self.messages.append(f"the run has nothing of {left_out}, which is left out")
        identity["methods"] = kept
        return old

    def _grow(self, old: dict[str, Any], count: int) -> None:
        """Add what the run has to the settings, and say what is new."""
        new = self.settings["identity"]
        more = [text for text in new["methods"] if text not in old["methods"]]
        if more:
            self.messages.append(f"the run grows by {', '.join(more)}")
        if count > old["samples"]:
            self.messages.append(f"the run grows from {old['samples']} to {count} images")
        grown = {"methods": [*old["methods"], *more], "files": {**old["files"], **new["files"]}}
        self.settings = {**self.settings, "identity": {**new, **grown}}

    def _samples(self, batch: int) -> Path:
        return self.records / f"{batch:05d}.json"

    def _records(self, batch: int, method: str) -> Path:
        return self.records / f"{batch:05d}-{key_of(method)}.zlib"

    def has(self, batch: int, method: str) -> bool:
        """Whether there are sound records of a method on a batch."""
        if (batch, method) not in self._sound:
            path = self._records(batch, method)
            with self._reporting(path):
                if not {*read_table(path).samples} <= {*self.batches[batch]}:
                    raise ValueError("it is of other samples")
                self._sound.add((batch, method))
        return (batch, method) in self._sound

    def read_samples(self, batch: int) -> Optional[tuple[list[SampleRecord], list[str]]]:
        """Samples of a batch and their stamps, `None` if there are no sound ones."""
        path = self._samples(batch)
        with self._reporting(path):
            samples, stamps = read_batch(path)
            if [sample.sample for sample in samples] != self.batches[batch]:
                raise ValueError("it is of other samples")
            return samples, stamps
        return None

    @contextmanager
    def _reporting(self, path: Path) -> Iterator[None]:
        """Remember a damaged file, and take one that is not there for nothing."""
        try:
            yield
        except FileNotFoundError:
            pass
        except ValueError as error:
            text = f"{path.name} is damaged ({reason_of(error)}), and computed again"
            if text not in self.messages:
                self.messages.append(text)

    def read_times(self, method: str) -> Optional[tuple[float, float]]:
        """Mean seconds of a method's attributions and of their metrics, if known."""
        times = []
        for path in sorted(self.records.glob(f"*-{key_of(method)}.zlib"))[:TIMED]:
            with suppress(ValueError):
                table = read_table(path)
                times += table.align(["seconds", "metric_seconds"]).tolist()
        if not times:
            return None
        first, second = np.mean(times, axis=0)
        return float(first), float(second)

    def write_samples(
        self, batch: int, samples: Sequence[SampleRecord], stamps: Sequence[str]
    ) -> None:
        """Write the samples of a batch, with stamps of their files, else a `RunError`."""
        rows = [sample._asdict() for sample in samples]
        for row, stamp in zip(rows, stamps):
            row["stamp"] = stamp
            if row["picture"] is not None:
                row["picture"] = base64.b64encode(row["picture"]).decode()
        _write(self._samples(batch), json.dumps(rows).encode())

    def remove_records(self, batch: int) -> None:
        """Remove the records of a batch by all methods, else a `RunError`."""
        self._sound = {each for each in self._sound if each[0] != batch}
        for path in self.records.glob(f"{batch:05d}-*.zlib"):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"cannot remove {path} ({reason_of(error)})") from error

    def write_records(self, batch: int, method: str, records: Sequence[Record]) -> None:
        """Write the records of a batch by a method, else a `RunError`."""
        columns = union(record.scores for record in records)
        columns.remove("problem")
        rows = [[record.scores.get(name, math.nan) for name in columns] for record in records]
        arrays = {"values": np.array(rows, np.float64)}
        for name in union(record.curves for record in records):
            curves = [record.curves.get(name) for record in records]
            array = _stack(curves, math.nan)
            # such as positions, which images often have in common
            arrays[f"curve/{name}"] = array[:1] if (array == array[0]).all() else array
        heatmaps = [record.heatmap for record in records]
        if any(heatmap is not None for heatmap in heatmaps):
            arrays["heatmaps"] = _stack(heatmaps, 0)
        header = {
            "samples": [record.sample for record in records],
            "problems": [record.scores["problem"] for record in records],
            "columns": columns,
            "arrays": [[name, str(each.dtype), each.shape] for name, each in arrays.items()],
        }
        parts = [json.dumps(header).encode(), b"\n", *(each.tobytes() for each in arrays.values())]
        _write(self._records(batch, method), zlib.compress(b"".join(parts)))
        self._sound.add((batch, method))


def _refuse_other(
    folder: Path, old: dict[str, Any], new: dict[str, Any], names: Sequence[str]
) -> None:
    """Refuse settings that are not those of a run, or with more methods and samples."""
    first, second = old["identity"], new["identity"]
    # what the new settings have of that which a run may grow by
    part = {**second, "files": {name: second["files"].get(name) for name in first["files"]}}
    if {*first["methods"]} <= {*second["methods"]}:
        part["methods"] = first["methods"]
    keys = [key for key in union([first, part]) if key not in ("manifest", "samples")]
    text = differences(first, part, keys, NOW)
    batches = [] if text else _read_batches(folder / new["fingerprint"])
    known = {*chain.from_iterable(batches)}
    gone = sorted(known - {*names})
    if gone:
        had = {**old.get("evaluation", {}), "samples": len(known)}
        has = {**new.get("evaluation", {}), "samples": len(names)}
        text = differences(had, has, ["limit", "seed", "split", "layout", "samples"], NOW)
        text = f"{text and text + ', '}{len(gone)} samples (now none), such as {gone[0]}"
    elif known and len(names) > len(known) and "grid_pointing" in first.get("metrics", ()):
        text = (
            f"samples ({len(known)}, now {len(names)}), which mosaics of grid_pointing"
            " are made of"
        )
    if text:
        raise RunError(
            f"{folder} holds another run, which differs in {text}: choose another"
            " folder with --out, or repeat the command of that run to go on"
        )


def _stack(arrays: Sequence[Optional[np.ndarray]], blank: float) -> np.ndarray:
    """Arrays of equal shape. Some may be missing."""
    missing = np.full_like(next(array for array in arrays if array is not None), blank)
    return np.stack([missing if array is None else array for array in arrays])


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
            f"cannot read {path} ({reason_of(error)}): evaluate again with another --out"
        ) from error
