"""The loop of an evaluation: samples, methods and metrics, resumable and sharded.

Samples are cut into blocks, always in the same places. Each process computes every
n-th block, and commits a method's records for a whole block at once. So whichever
process computes a block, and whenever it was interrupted, the same images go through
the network together, and the records are the same. Processes need not know of each
other: there is nothing that they exchange.
"""

import contextlib
import io
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from captum_adapters.evaluation.blocks import Computation
from captum_adapters.evaluation.controls import CONTROLS
from captum_adapters.evaluation.datasets import (
    Images,
    Loaded,
    LoadedBatch,
    collate,
    read_samples,
)
from captum_adapters.evaluation.measures import MASKED
from captum_adapters.evaluation.methods import Method
from captum_adapters.evaluation.records import (
    RunError,
    SampleRecord,
    Writer,
    open_run,
    read_done,
    read_times,
)
from captum_adapters.evaluation.settings import (
    Evaluation,
    check,
    check_pixels,
    describe,
    input_size,
)
from zennit_resnet.messages import one_line
from zennit_resnet.models import load_classifier

# records are committed after a method at the latest, if as many seconds have passed
COMMIT_SECONDS = 5.0
# at least between two lines of progress, if there is no terminal
LINE_SECONDS = 60.0


class Process(NamedTuple):
    """This process among those that were started together, as torchrun tells."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: Optional[int] = None

    @classmethod
    def current(cls) -> "Process":
        """Read the environment that torchrun, or the user, has set."""
        values = []
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise RunError(f"{name}={text!r} in the environment is not a number")
            values.append(int(text))
        rank, world, local_rank = values
        if rank >= world:
            raise RunError(f"RANK={rank} does not fit WORLD_SIZE={world}")
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        return cls(rank, world, local_rank, os.getppid() if launched else None)

    def check(self) -> None:
        """Stop if the launcher was killed, as a new one may be about to start."""
        if self.launcher is not None and os.getppid() != self.launcher:
            raise RunError("the launcher was killed, so this process stops as well")


class Progress(NamedTuple):
    """What remains to be done.

    Attributes:

        total (int): Number of records of all samples and methods.
        done (int): Number of those that there are, or that are left out.
        seconds (float): Estimated time for the rest by one process.
        skipped (int): Number of samples that are left out.
    """

    total: int
    done: int
    seconds: float
    skipped: int


def evaluate(
    evaluation: Evaluation,
    *,
    process: Optional[Process] = None,
    quiet: bool = False,
    dry_run: bool = False,
) -> Progress:
    """Evaluate methods on a data set.

    The same call goes on where an earlier one has stopped.

    Args:

        evaluation (Evaluation): What is evaluated.
        process (Process, optional): This process among others. By default, what the
                environment says.
                Default: None
        quiet (bool, optional): Whether to print nothing but errors.
                Default: False
        dry_run (bool, optional): Whether only to find out what is left to do. Nothing
                is written then.
                Default: False

    Returns:
        Progress: What remains to be done, which is nothing after an evaluation by a
        single process.

    Raises:
        RunError: If the folder holds another run, or can not be written.
        ValueError: If a name or a value is wrong. The message is a single line.
    """
    process = Process.current() if process is None else process
    loop = Loop(evaluation, process, quiet)
    return loop.estimate() if dry_run else loop.run()


class Loop:
    """One process of an evaluation, see :func:`evaluate`."""

    def __init__(self, evaluation: Evaluation, process: Process, quiet: bool) -> None:
        self.process = process
        self.quiet = quiet or process.rank > 0
        check(evaluation)
        names = list(evaluation.methods)
        if evaluation.controls:
            names += [name for name in CONTROLS if name not in names]
        self.methods = [Method(name) for name in names]
        self.evaluation = replace(
            evaluation, methods=tuple(method.text for method in self.methods)
        )
        if len(set(self.evaluation.methods)) < len(self.methods):
            raise ValueError(f"a method is named twice: {', '.join(names)}")
        self.device = _device(evaluation.device, process)
        self.classifier = load_classifier(
            evaluation.model, evaluation.weights, evaluation.size
        )
        check_pixels(evaluation, input_size(self.classifier))
        self.data = read_samples(
            evaluation.data,
            self.classifier.classes,
            layout=evaluation.layout,
            split=evaluation.split,
            labels=evaluation.labels,
            limit=evaluation.limit,
            seed=evaluation.seed,
        )
        for message in self.data.messages:
            self.say(message)
        self._check_masks()
        self.folder = Path(evaluation.out)
        self.settings = describe(
            self.evaluation, self.classifier, self.data, self.device.type
        )
        self.fingerprint = self.settings["fingerprint"]

    def say(self, text: str) -> None:
        """Print a line beside the progress bar."""
        if not self.quiet:
            tqdm.write(one_line(text), file=sys.stderr)

    def _check_masks(self) -> None:
        """Say if there is no mask for metrics that need one."""
        metrics = self.evaluation.metrics
        needed = [name for name in MASKED if name in metrics]
        if not needed or any(sample.mask or sample.boxes for sample in self.data.samples):
            return
        reason = f"there are no masks or boxes in {self.evaluation.data}"
        if len(needed) == len(metrics):
            raise ValueError(f"{reason}, which the metrics {', '.join(needed)} need")
        self.say(f"{reason}, so there are no scores {', '.join(needed)}")

    # -- what is left

    def _count(
        self, skipped: set[str], done: set[tuple[str, str]], seconds: float = 0.0
    ) -> Progress:
        """What remains of the whole run."""
        names = [sample.name for sample in self.data.samples]
        total = len(names) * len(self.methods)
        kept = sum(
            name in skipped or (name, method.text) in done
            for name in names
            for method in self.methods
        )
        return Progress(total, kept, seconds, sum(name in skipped for name in names))

    def _read_done(
        self, numbers: Iterable[int]
    ) -> tuple[set[str], set[tuple[str, str]]]:
        """Samples that are left out and records that there are.

        Of these samples, those that could not be read are tried again, as the reason
        may have been that a disk was missing.
        """
        skipped, done, messages = read_done(self.folder, self.fingerprint)
        for message in messages:
            self.say(message)
        loaded = Images(self.data.samples, self.classifier.transform)
        for number in numbers:
            name = self.data.samples[number].name
            if name in skipped and loaded[number].problem is None:
                skipped.remove(name)
        return skipped, done

    def estimate(self) -> Progress:
        """What remains, and how long it takes, without writing anything."""
        skipped: set[str] = set()
        done: set[tuple[str, str]] = set()
        times: dict[str, tuple[float, float]] = {}
        if (self.folder / "settings.json").exists():
            open_run(self.folder, self.settings)
            skipped, done = self._read_done(range(len(self.data.samples)))
            times = read_times(self.folder, self.fingerprint)
        rest = {
            method.text: sum(
                sample.name not in skipped and (sample.name, method.text) not in done
                for sample in self.data.samples
            )
            for method in self.methods
        }
        missing = [name for name, count in rest.items() if count and name not in times]
        if missing:
            self.say(f"timing {len(missing)} methods on one image")
            times.update(self._time(missing))
        seconds = sum(
            count * sum(times[name]) for name, count in rest.items() if count
        )
        return self._count(skipped, done, seconds - self._shared(rest, times))

    def _shared(
        self, rest: Mapping[str, int], times: Mapping[str, tuple[float, float]]
    ) -> float:
        """Time of attributions that are computed once for several methods."""
        groups: dict[str, list[str]] = defaultdict(list)
        for method in self.methods:
            if rest[method.text]:
                groups[method.attribution].append(method.text)
        seconds = 0.0
        for names in groups.values():
            counts = [rest[name] for name in names]
            # that of the one with the least post-processing
            shared = min(times[name][0] for name in names)
            seconds += (sum(counts) - max(counts)) * shared
        return seconds

    def _time(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Time methods on one image."""
        computation = self.prepare()
        loaded = Images(self.data.samples, self.classifier.transform)
        for number in range(len(loaded)):
            item = loaded[number]
            if item.image is not None:
                break
        else:
            return {name: (0.0, 0.0) for name in names}
        block = computation.block([self.data.samples[number]], [item])
        times = {}
        for method in self.methods:
            if method.text in names:
                record = computation.explain(method, block, [0], False)[0]
                times[method.text] = (record.seconds, record.metric_seconds)
        return times

    # -- the loop

    def run(self) -> Progress:
        """Compute all records of this process that are not there yet."""
        evaluation, process = self.evaluation, self.process
        computation = None
        if not (self.folder / "settings.json").exists():
            # what can not be prepared leaves no run that the next one differs from
            computation = self.prepare()
        open_run(self.folder, self.settings)
        every = [*range(len(self.data.samples))]
        size = evaluation.batch_size
        starts = every[::size][process.rank :: process.world]
        own = [every[start : start + size] for start in starts]
        skipped, done = self._read_done(chain.from_iterable(own))
        blocks = [
            numbers
            for numbers in own
            if any(
                self.data.samples[number].name not in skipped
                and (self.data.samples[number].name, method.text) not in done
                for number in numbers
                for method in self.methods
            )
        ]
        count = sum(map(len, blocks)) * len(self.methods)
        known = sum(
            (self.data.samples[number].name, method.text) in done
            for block in blocks
            for number in block
            for method in self.methods
        )
        if not blocks:
            return self._count(skipped, done)
        computation = computation or self.prepare()
        computation.worked.update(method for _, method in done)
        writer = Writer(self.folder, process.rank, self.fingerprint)
        for message in writer.messages:
            self.say(message)
        try:
            with self._bar(count, known) as bar:
                for numbers, batch in zip(blocks, self._load(blocks)):
                    process.check()
                    items = [Loaded(*fields) for fields in zip(*batch)]
                    self._evaluate_block(
                        computation, numbers, items, writer, done, bar
                    )
                    writer.commit()
        finally:
            # everything that was added is complete
            with contextlib.suppress(RunError):
                writer.commit()
            writer.close()
        # other processes may have written as well
        skipped, done, _ = read_done(self.folder, self.fingerprint)
        return self._count(skipped, done)

    def _bar(self, count: int, known: int) -> "tqdm[Any]":
        """Progress bar, or plain lines if there is no terminal."""
        others = f" by 1 of {self.process.world}" if self.process.world > 1 else ""
        terminal = sys.stderr.isatty()
        return tqdm(
            total=count,
            initial=known,
            unit="map",
            desc=f"maps{others}",
            disable=self.quiet,
            mininterval=0.1 if terminal else LINE_SECONDS,
            maxinterval=10.0 if terminal else 600.0,
            ascii=None if terminal else True,
            # a new line for each state instead of overwriting the last one
            file=sys.stderr if terminal else _Lines(sys.stderr),
            smoothing=0.05,
        )

    def prepare(self) -> Computation:
        """Bring everything that costs time or memory to the device."""
        return Computation(
            self.evaluation, self.classifier, self.methods, self.device
        )

    def _load(self, blocks: list[list[int]]) -> Iterator[LoadedBatch]:
        """Read the images of blocks, in other processes if there are workers."""
        return iter(
            DataLoader(
                Images(self.data.samples, self.classifier.transform),
                batch_sampler=blocks,
                num_workers=self.evaluation.workers,
                collate_fn=collate,
                pin_memory=False,
            )
        )

    def _evaluate_block(
        self,
        computation: Computation,
        numbers: Sequence[int],
        items: Sequence[Loaded],
        writer: Writer,
        done: set[tuple[str, str]],
        bar: "tqdm[Any]",
    ) -> None:
        """Compute what is missing of a block."""
        samples = [self.data.samples[number] for number in numbers]
        block = computation.block(samples, items)
        for row, (number, sample, item) in enumerate(zip(numbers, samples, items)):
            if sample.name in block.problems:
                problem = block.problems[sample.name]
                # nothing is missing if it could be read when that was computed
                if any((sample.name, method.text) not in done for method in self.methods):
                    writer.add_sample(
                        SampleRecord(sample.name, sample.label, problem=problem)
                    )
                bar.update(len(self.methods))
                continue
            place = block.valid.index(row)
            explained = int(block.explained[place])
            notes = [] if item.note is None else [item.note]
            if sample.label is None and "label" in (
                self.evaluation.explain,
                self.evaluation.score,
                self.evaluation.published,
            ):
                notes.append("no label, so the prediction was used")
            writer.add_sample(
                SampleRecord(
                    sample.name,
                    sample.label,
                    explained,
                    int(block.output[place].argmax()),
                    float(block.output[place].double().softmax(0)[explained]),
                    notes=tuple(notes),
                    picture=computation.picture(block.images[place])
                    if number < self.evaluation.pictures
                    else None,
                )
            )
        committed = time.monotonic()
        for method in self.methods:
            rows = [
                row
                for row, name in enumerate(block.names)
                if (name, method.text) not in done
            ]
            if not rows:
                continue
            self.process.check()
            heatmaps = numbers[0] < self.evaluation.pictures
            for record in computation.explain(method, block, rows, heatmaps):
                writer.add(record)
            if time.monotonic() - committed > COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()
            bar.update(len(rows))


class _Lines(io.TextIOBase):
    """Writes each state of a progress bar as a line of its own, for log files."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
        for line in filter(None, lines):
            self.stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def _device(name: Optional[str], process: Process) -> torch.device:
    """The device of a process."""
    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            name = f"cuda:{process.local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        # some devices hold no values
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: try --device cpu") from error
    return device
