"""Records of an evaluation, in one SQLite file for each process that writes.

A folder holds one run: `settings.json`, which says what is evaluated, and files of
records. Nothing but that folder is shared between processes. Each writes to a file of
its own, which no other one opens for writing, so the file system need not support
anything but that a file, once it is written, can be read by others.
"""

import hashlib
import io
import json
import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SETTINGS = "settings.json"
PATTERN = "records-*.sqlite"
# how long to wait for a process that is just writing to the file that is to be read
TIMEOUT = 30.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (fingerprint TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS samples (
    sample TEXT PRIMARY KEY, label INTEGER, target INTEGER, prediction INTEGER,
    probability REAL, problem TEXT, notes TEXT NOT NULL, picture BLOB
);
CREATE TABLE IF NOT EXISTS records (
    sample TEXT, method TEXT, problem TEXT, scores TEXT NOT NULL, lengths TEXT NOT NULL,
    curves BLOB NOT NULL, heatmap BLOB, seconds REAL, metric_seconds REAL,
    PRIMARY KEY (sample, method)
);
"""


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
    """What was measured on a method's map for a sample.

    Attributes:

        sample (str): Name of the sample.
        method (str): Name of the method.
        problem (str or None): Why nothing was measured.
        values (dict): Scores by the names of
                :data:`captum_adapters.evaluation.COLUMNS`. NaN where a score
                is not defined for this sample, such as without a mask.
        curves (dict): Arrays by name, float32 of shape (points,).
        heatmap (array or None): The map divided by its largest magnitude, times 127, as
                int8 of 112 x 112 pixels or less.
        seconds (float): Time of the attribution.
        metric_seconds (float): Time of the metrics.
    """

    sample: str
    method: str
    problem: Optional[str]
    values: dict[str, float]
    curves: dict[str, np.ndarray]
    heatmap: Optional[np.ndarray] = None
    seconds: float = 0.0
    metric_seconds: float = 0.0


class Run(NamedTuple):
    """What a folder holds.

    Attributes:

        folder (Path): The folder.
        settings (dict): What was evaluated.
        samples (dict): :class:`SampleRecord` by name, in order.
        records (dict): :class:`Record` by names of sample and method, in order.
        messages (list[str]): What is wrong with the files.
    """

    folder: Path
    settings: dict[str, Any]
    samples: dict[str, SampleRecord]
    records: dict[tuple[str, str], Record]
    messages: list[str]


def fingerprint(identity: dict[str, Any]) -> str:
    """Hash of everything that determines the records.

    Args:

        identity (dict): Anything that can be written as JSON.

    Returns:
        str: 16 hexadecimal digits, the same for the same content in any order.
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_run(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder of a run, or check that it is the same run.

    Args:

        folder (Path): The folder.
        settings (dict): Settings with the keys `fingerprint` and `identity`, of which
                the former is the hash.

    Raises:
        RunError: If the folder holds another run, which message says what differs, or
                can not be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        if not path.exists():
            # complete as soon as it is visible, and never replaced, as there may be
            # many processes that begin at the same time
            own = folder / f".settings-{platform.node()}-{os.getpid()}.json"
            try:
                own.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
                try:
                    os.link(own, path)
                except FileExistsError:
                    pass
                except OSError:
                    # a file system without links
                    if not path.exists():
                        own.replace(path)
            finally:
                own.unlink(missing_ok=True)
    existing = read_settings(folder)
    if existing.get("fingerprint") != settings["fingerprint"]:
        raise RunError(
            f"{folder} holds another run, which differs in"
            f" {differences(existing, settings)}: choose another folder with --out, or"
            " repeat the command of that run to go on with it"
        )


def differences(first: dict[str, Any], second: dict[str, Any]) -> str:
    """What differs between the settings of two runs, for messages."""
    old, new = first.get("identity", {}), second.get("identity", {})
    missing = object()
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, missing), new.get(key, missing)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += [
                f"{name} ({_brief(before.get(name))}, now {_brief(after.get(name))})"
                for name in {**before, **after}
                if before.get(name) != after.get(name)
            ]
        elif isinstance(before, list) and isinstance(after, list):
            gone = [str(elem) for elem in before if elem not in after]
            more = [str(elem) for elem in after if elem not in before]
            parts = [f"without {_brief(gone)}"] * bool(gone)
            parts += [f"with {_brief(more)}"] * bool(more)
            found.append(f"{key} (now {' and '.join(parts) or 'in another order'})")
        else:
            found.append(
                f"{key} ({_brief(None if before is missing else before)}, now"
                f" {_brief(None if after is missing else after)})"
            )
    return ", ".join(found) or "nothing that it says (its settings were edited)"


def _brief(value: Any) -> str:
    """A value for a message."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings of a run.

    Args:

        folder (Path): The folder.

    Returns:
        dict: The settings.

    Raises:
        RunError: If there are none.
    """
    path = folder / SETTINGS
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
    return settings


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say clearly why a folder can not be written."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise RunError(
            f"cannot write to {folder} ({_reason(error)}): what was written before is"
            " kept, and the same command goes on when this is solved"
        ) from error


def _reason(error: Exception) -> str:
    """Why something went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


class Writer:
    """Writes records to a file of its own.

    Args:

        folder (Path): The folder of the run.
        rank (int): Number of the process. The file of an earlier process with this
                number is continued, unless it is damaged, or another process still has
                it open.
        fingerprint (str): Hash of the settings.

    Raises:
        RunError: If nothing can be written.
    """

    def __init__(self, folder: Path, rank: int, fingerprint: str) -> None:
        self.folder = folder
        self.messages: list[str] = []
        number = 0
        with _writing(folder):
            while True:
                suffix = f"-{number}" if number else ""
                self.path = folder / f"records-{rank:05d}{suffix}.sqlite"
                # closed, and thereby unlocked, also if the process is killed
                self._lock = open(self.path.with_suffix(".lock"), "a")
                if self._take(fingerprint):
                    return
                self._lock.close()
                number += 1

    def _take(self, fingerprint: str) -> bool:
        """Open the file if it is free and sound."""
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.messages.append(
                    f"{self.path.name} is in use by another process, so this one writes"
                    " to another file"
                )
                return False
            except OSError:
                # a file system without locks
                pass
        existed = self.path.exists() and self.path.stat().st_size > 0
        connection = sqlite3.connect(self.path, timeout=TIMEOUT, isolation_level=None)
        try:
            if existed:
                sound = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if sound != "ok":
                    raise sqlite3.DatabaseError(sound)
            connection.executescript(SCHEMA)
            connection.execute(
                "INSERT OR IGNORE INTO run VALUES (?)", (fingerprint,)
            )
            (found,), *others = connection.execute("SELECT fingerprint FROM run")
            if found != fingerprint or others:
                raise sqlite3.DatabaseError("it is of another run")
        except sqlite3.OperationalError:
            # full, read-only or busy: another file would not help
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            self.messages.append(
                f"{self.path.name} is damaged ({_reason(error)}), so it is read as far"
                " as possible, and not written any more"
            )
            return False
        self._connection = connection
        return True

    def add_sample(self, sample: SampleRecord) -> None:
        """Write what is known about a sample.

        Args:

            sample (SampleRecord): The sample, which replaces an earlier one.
        """
        row = sample._replace(notes=json.dumps(sample.notes))  # type: ignore[arg-type]
        self._insert("samples", row)

    def add(self, record: Record) -> None:
        """Write a record.

        Args:

            record (Record): The record, which replaces an earlier one.
        """
        curves = {
            name: np.asarray(curve, "<f4") for name, curve in record.curves.items()
        }
        self._insert(
            "records",
            (
                record.sample,
                record.method,
                record.problem,
                json.dumps(record.values),
                json.dumps({name: len(curve) for name, curve in curves.items()}),
                b"".join(curve.tobytes() for curve in curves.values()),
                _to_png(record.heatmap),
                record.seconds,
                record.metric_seconds,
            ),
        )

    def _insert(self, table: str, row: tuple[Any, ...]) -> None:
        with _writing(self.folder):
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            places = ", ".join("?" * len(row))
            self._connection.execute(
                f"INSERT OR REPLACE INTO {table} VALUES ({places})", tuple(row)
            )

    def commit(self) -> None:
        """Make sure that what was written survives whatever comes.

        Raises:
            RunError: If it can not be written, for instance to a full disk.
        """
        with _writing(self.folder):
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file. What is not committed is dropped."""
        self._connection.close()
        self._lock.close()


def _to_png(heatmap: Optional[np.ndarray]) -> Optional[bytes]:
    """Compress a heatmap without loss."""
    if heatmap is None:
        return None
    buffer = io.BytesIO()
    shifted = (heatmap.astype(np.int16) + 128).astype(np.uint8)
    Image.fromarray(shifted).save(buffer, "PNG")
    return buffer.getvalue()


def _from_png(data: Optional[bytes]) -> Optional[np.ndarray]:
    """Reverse of :func:`_to_png`."""
    if data is None:
        return None
    with Image.open(io.BytesIO(data)) as image:
        return (np.asarray(image).astype(np.int16) - 128).astype(np.int8)


def _rows(
    folder: Path, fingerprint: str, columns: str, table: str, messages: list[str]
) -> Iterator[tuple[Any, ...]]:
    """Rows of all files, and of damaged files as many as can be read."""
    for path in sorted(folder.glob(PATTERN)):
        if path.stat().st_size == 0:
            # its process was killed before it wrote anything
            continue
        count = 0
        try:
            with closing(_connect(path)) as connection:
                found = [row[0] for row in connection.execute("SELECT * FROM run")]
                if found != [fingerprint]:
                    messages.append(f"{path.name} is left out, as it is of another run")
                    continue
                for row in connection.execute(f"SELECT {columns} FROM {table}"):
                    count += 1
                    yield row
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                messages.append(
                    f"{path.name} can not be read ({_reason(error)}) beyond {count}"
                    f" {table}, so others in it are missing"
                )
        except sqlite3.DatabaseError as error:
            messages.append(
                f"{path.name} is damaged ({_reason(error)}): {count} {table} were read,"
                " others are missing"
            )


def _connect(path: Path) -> sqlite3.Connection:
    """Open a file for reading."""
    # a process that was killed may have left a journal to be rolled back, for which
    # the file must be opened for writing
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    uri = f"{path.resolve().as_uri()}?mode={'rw' if writable else 'ro'}"
    return sqlite3.connect(uri, uri=True, timeout=TIMEOUT)


def read_done(
    folder: Path, fingerprint: str
) -> tuple[set[str], set[tuple[str, str]], list[str]]:
    """What need not be evaluated any more.

    Args:

        folder (Path): The folder of the run.
        fingerprint (str): Hash of the settings.

    Returns:
        tuple: Names of the samples that are left out with a reason, names of sample and
        method of all records, and messages about files.
    """
    messages: list[str] = []
    columns = "sample, problem IS NULL"
    rows = [*_rows(folder, fingerprint, columns, "samples", [])]
    # another process may have been able to read it
    skipped = {name for name, _ in rows} - {name for name, sound in rows if sound}
    # whole rows, as of damaged files more keys than rows can be read
    done = {row[:2] for row in _rows(folder, fingerprint, "*", "records", messages)}
    return skipped, done, messages


def read_times(folder: Path, fingerprint: str) -> dict[str, tuple[float, float]]:
    """Mean seconds of each method's attributions, and of their metrics."""
    times: dict[str, list[tuple[float, float]]] = {}
    columns = "method, seconds, metric_seconds"
    for method, seconds, metric_seconds in _rows(
        folder, fingerprint, columns, "records", []
    ):
        times.setdefault(method, []).append((seconds, metric_seconds))
    means = {name: np.mean(rows, axis=0).tolist() for name, rows in times.items()}
    return {name: (seconds, rest) for name, (seconds, rest) in means.items()}


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
    key = settings.get("fingerprint", "")
    messages: list[str] = []
    samples: dict[str, SampleRecord] = {}
    records: dict[tuple[str, str], Record] = {}
    for row in _rows(folder, key, "*", "samples", []):
        sample = SampleRecord(*row)._replace(notes=tuple(json.loads(row[6])))
        known = samples.get(sample.sample)
        if known is None or known.problem is not None:
            samples[sample.sample] = sample
    repeated = 0
    for row in _rows(folder, key, "*", "records", messages):
        name, method, problem, scores, lengths, curves, heatmap, *seconds = row
        if (name, method) in records:
            repeated += 1
            continue
        sizes = json.loads(lengths)
        ends = np.cumsum([*sizes.values()])[:-1]
        parts = np.split(np.frombuffer(curves, "<f4"), ends) if sizes else []
        records[name, method] = Record(
            name,
            method,
            problem,
            json.loads(scores),
            dict(zip(sizes, parts)),
            _from_png(heatmap),
            *seconds,
        )
    if repeated:
        messages.append(
            f"{repeated} records are in more than one file, as processes of an earlier"
            " start were still running: each is counted once"
        )
    return Run(
        folder,
        settings,
        dict(sorted(samples.items())),
        dict(sorted(records.items())),
        messages,
    )
