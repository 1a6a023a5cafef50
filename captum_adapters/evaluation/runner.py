"""The loop of an evaluation: samples, methods and metrics, resumable and sharded.

Samples are cut into batches, always in the same places. Each process computes every
n-th batch, and writes a method's records of a whole batch at once. So whichever process
computes a batch, and whenever it was interrupted, the same images go through the
network together, and the records are the same. Processes exchange nothing.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from captum_adapters.evaluation.computation import Computation
from captum_adapters.evaluation.config import (
    CLASSES,
    Evaluation,
    check,
    check_labels,
    check_masks,
    check_pixels,
    describe,
)
from captum_adapters.evaluation.data import (
    Images,
    Loaded,
    Sample,
    content_of,
    read_samples,
    stamp_of,
)
from captum_adapters.evaluation.estimate import Estimate
from captum_adapters.evaluation.grids import Grids
from captum_adapters.evaluation.methods import CONTROLS, Method
from captum_adapters.evaluation.metrics import Batch, input_size
from captum_adapters.evaluation.records import SETTINGS, RunError, SampleRecord
from captum_adapters.evaluation.store import Store
from zennit_resnet._text import one_line
from zennit_resnet.models import load_classifier

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
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        texts = {name: os.environ.get(name, text) for name, text in defaults.items()}
        for name, text in texts.items():
            if not text.isdecimal():
                raise RunError(f"{name}={text!r} in the environment is not a number")
        rank, world, local_rank = map(int, texts.values())
        if rank >= world:
            raise RunError(f"RANK={rank} does not fit WORLD_SIZE={world}")
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        return cls(rank, world, local_rank, os.getppid() if launched else None)

    def check(self) -> None:
        """Stop if the launcher was killed, as a new one may be about to start."""
        if self.launcher is not None and os.getppid() != self.launcher:
            raise RunError("the launcher was killed, so this process stops as well")


class Progress(NamedTuple):
    """What remains to be done."""

    total: int  # number of records of all samples and methods
    done: int  # number of those that there are, or that are left out
    seconds: float  # estimated time for the rest by one process
    skipped: int  # number of samples that are left out


def evaluate(
    evaluation: Evaluation, *, process: Optional[Process] = None, quiet: bool = False,
    dry_run: bool = False,
) -> Progress:
    """Evaluate methods on a data set.

    The same call goes on where an earlier one has stopped.

    Args:

        evaluation (Evaluation): What is evaluated.
        process (Process, optional): This process among others. By default, what the
                environment says.
        quiet (bool, optional): Whether to print nothing but errors.
        dry_run (bool, optional): Whether only to find out what is left to do. Nothing
                is written then.

    Returns:
        Progress: What remains, which is nothing after an evaluation by a single process.

    Raises:
        RunError: If the folder holds another run, or cannot be written.
        ValueError: If a name or a value is wrong. The message is a single line.
    """
    process = Process.current() if process is None else process
    loop = Loop(evaluation, process, quiet)
    return loop.estimate() if dry_run else loop.run()


class _Item(NamedTuple):
    """What was read of a sample, with the stamp and content of its files."""

    loaded: Loaded
    stamp: str
    content: Optional[str]


def _read(images: Images, rows: Sequence[int]) -> list[_Item]:
    """Read samples. Stamps are taken before, so that a later change is found."""
    items = []
    for row in rows:
        stamp, loaded, content = stamp_of(images.samples[row]), images[row], None
        if loaded.image is not None:
            content = content_of(images.samples[row])
            loaded = Loaded(problem="the image is missing") if content is None else loaded
        items.append(_Item(loaded, stamp, content))
    return items


class _State(NamedTuple):
    """What there is of a batch."""

    known: bool  # whether its samples were written
    left_out: int  # samples that could not be used
    unread: list[int]  # numbers of those that may be readable now
    changed: list[int]  # numbers of samples with other files or labels now
    missing: list[Method]  # those that are not evaluated on it


class Loop:
    """One process of an evaluation, see :func:`evaluate`."""

    def __init__(self, evaluation: Evaluation, process: Process, quiet: bool) -> None:
        self.process = process
        self.quiet = quiet or process.rank > 0
        check(evaluation)
        controls = [name for name in CONTROLS if name not in evaluation.methods]
        names = [*evaluation.methods, *(controls if evaluation.controls else ())]
        self.methods = [Method(name) for name in names]
        methods = tuple(method.text for method in self.methods)
        self.evaluation = evaluation = replace(evaluation, methods=methods)
        self.device = _device(evaluation.device, process)
        self.classifier = load_classifier(evaluation.model, evaluation.weights, evaluation.size)
        size = input_size(self.classifier)
        check_pixels(evaluation, size)
        keys = ("layout", "split", "labels", "limit", "seed")
        options: Any = {key: getattr(evaluation, key) for key in keys}
        data = read_samples(evaluation.data, self.classifier.classes, **options)
        check_labels(evaluation, data)
        for message in filter(None, (*data.messages, check_masks(evaluation, data))):
            self.say(message)
        self.images = Images(data.samples, self.classifier.transform)
        self.settings = describe(evaluation, self.classifier, data, size, self.device.type)

    @property
    def samples(self) -> Sequence[Sample]:
        """Samples, once the folder is open in the order of its batches."""
        return self.images.samples

    def say(self, text: str) -> None:
        """Print a line beside the progress bar."""
        if not self.quiet:
            tqdm.write(one_line(text), file=sys.stderr)

    def prepare(self) -> Computation:
        """Bring everything that costs time or memory to the device."""
        grids = None
        if "grid_pointing" in self.evaluation.metrics:
            model = self.classifier.model.to(self.device)
            grids = Grids(self.samples, self.images, model, self.device)
            if grids.problem and self.evaluation.metrics == ("grid_pointing",):
                raise ValueError(grids.problem)
            if grids.problem:
                self.say(f"{grids.problem}: it is left out")
        return Computation(self.evaluation, self.classifier, self.methods, self.device, grids)

    def _open(self, write: bool) -> None:
        """Open the folder, and put samples in the order of its batches."""
        by_name = {sample.name: sample for sample in self.samples}
        self.store = Store(Path(self.evaluation.out), self.settings, [*by_name], write)
        self.images.samples = [by_name[name] for name in chain(*self.store.batches)]
        numbers = iter(range(len(by_name)))
        self.batches = [[*islice(numbers, len(batch))] for batch in self.store.batches]

    def _look(self, batch: int, files: bool = False) -> _State:
        """Find out what there is of a batch, and whether files have changed."""
        known, stamps = self.store.read_samples(batch) or ([], [])
        left_out, unread, changed = [], [], []
        for number, record, stamp in zip(self.batches[batch], known, stamps):
            sample = self.samples[number]
            if record.problem is not None:
                left_out.append(number)
                if sample.problem is None:
                    unread.append(number)
            elif files and sample.label != record.label:
                changed.append(number)
            elif files and stamp != stamp_of(sample):
                # what is not there now cannot be compared
                there = sample.mask is None or sample.mask.exists()
                if there and content_of(sample) not in (None, record.content):
                    changed.append(number)
        missing = [each for each in self.methods if not self.store.has(batch, each.text)]
        return _State(bool(known), len(left_out), unread, changed, missing)

    def _look_at_all(self, batches: Iterable[int]) -> dict[int, _State]:
        """Find out what there is of batches, and say what is new or wrong.

        Raises:
            RunError: If images have changed that mosaics of others contain.
        """
        states = {batch: self._look(batch, files=True) for batch in batches}
        changed = [number for state in states.values() for number in state.changed]
        for message in self.store.messages:
            self.say(message)
        if changed:
            first = self.samples[changed[0]].name
            text = f"{len(changed)} images, masks or labels have changed, such as {first}"
            if "grid_pointing" in self.evaluation.metrics:
                raise RunError(
                    f"{text}, and mosaics of grid_pointing were made of them: choose"
                    " another folder with --out"
                )
            self.say(f"{text}: their batches are computed again")
        return states

    def _count(self, states: Iterable[Optional[_State]], seconds: float = 0.0) -> Progress:
        """What remains of the whole run, where batches without state are computed again."""
        total = len(self.methods)
        done = skipped = 0
        for numbers, state in zip(self.batches, states):
            if state is not None:
                skipped += state.left_out
                images = len(numbers) - state.left_out
                done += state.left_out * total + images * (total - len(state.missing))
        return Progress(len(self.samples) * total, done, seconds, skipped)

    def estimate(self) -> Progress:
        """What remains, and how long it takes, without writing anything."""
        self._open(write=False)
        states: list[Optional[_State]] = []
        rest = dict.fromkeys(self.methods, 0)
        for batch, state in self._look_at_all(range(len(self.batches))).items():
            again = bool(state.changed) or any(
                self.images[number].problem is None for number in state.unread
            )
            states.append(None if again else state)
            images = len(self.batches[batch]) - (0 if again else state.left_out)
            for method in self.methods if again else state.missing:
                rest[method] += images
        left = [method for method in self.methods if rest[method]]
        known = {method: self.store.read_times(method.text) for method in left}
        untimed = [method for method in left if known[method] is None]
        if untimed:
            self.say(f"timing {len(untimed)} methods on one image")
            known.update(self._time(untimed))
        seconds = 0.0
        # attributions that are computed once for several methods count once
        groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for method in left:
            first, second = known[method] or (0.0, 0.0)
            seconds += rest[method] * (first + second)
            groups[method.attribution].append((rest[method], first))
        for counts, times in (zip(*members) for members in groups.values()):
            seconds -= (sum(counts) - max(counts)) * min(times)
        return self._count(states, seconds)

    def _time(self, methods: Sequence[Method]) -> dict[Method, tuple[float, float]]:
        """Seconds of methods and metrics for the first image that can be read."""
        simple = replace(self.evaluation, compile=False)
        computation = Computation(simple, self.classifier, methods, self.device)
        for row, sample in enumerate(self.samples):
            loaded = self.images[row]
            if loaded.image is not None:
                estimate = Estimate(computation, computation.prepare([sample], [loaded]))
                return {method: estimate.method(method) for method in methods}
        return {}

    def run(self) -> Progress:
        """Compute all records of this process that are not there yet."""
        computation = None
        if not Path(self.evaluation.out, SETTINGS).exists():
            # what cannot be prepared leaves no run that the next one differs from
            computation = self.prepare()
        self._open(write=True)
        batches = range(len(self.batches))
        mine = batches[self.process.rank :: self.process.world]
        states = self._look_at_all(mine)
        # those whose samples are known, and as they were
        settled = {
            batch: state.missing
            for batch, state in states.items()
            if state.known and not state.changed and not state.unread
        }
        todo = [batch for batch in mine if settled.get(batch, self.methods)]
        if todo:
            computation = computation or self.prepare()
            for method in self.methods:
                if any(self.store.has(batch, method.text) for batch in batches):
                    computation.worked.add(method.text)
            done = sum(
                len(self.batches[batch]) * (len(self.methods) - len(missing))
                for batch, missing in settled.items()
            )
            loader: Any = DataLoader(
                range(len(self.samples)),  # type: ignore[arg-type]
                batch_sampler=[self.batches[batch] for batch in todo],
                num_workers=self.evaluation.workers,
                collate_fn=partial(_read, self.images),
            )
            with self._bar(sum(len(self.batches[batch]) for batch in mine), done) as bar:
                for batch, items in zip(todo, loader):
                    self.process.check()
                    self._evaluate(computation, batch, items, bar)
        return self._count(map(self._look, batches))

    def _bar(self, images: int, done: int) -> "tqdm[Any]":
        """Progress bar, or plain lines if there is no terminal."""
        others = f" by 1 of {self.process.world}" if self.process.world > 1 else ""
        options: Any = {
            "total": images * len(self.methods), "initial": done, "unit": "map",
            "desc": f"maps{others}", "disable": self.quiet, "smoothing": 0.05,
        }
        if sys.stderr.isatty():
            return tqdm(**options)
        return _Lines(**options, mininterval=LINE_SECONDS, maxinterval=600.0, ascii=True)

    def _evaluate(
        self, computation: Computation, batch: int, items: Sequence[_Item], bar: "tqdm[Any]"
    ) -> None:
        """Compute what is missing of a batch, and all of it if other images are read."""
        store, numbers = self.store, self.batches[batch]
        pairs = [
            (self.samples[number], item.loaded)
            for number, item in zip(numbers, items)
            if item.content is not None
        ]
        images = computation.prepare(*zip(*pairs)) if pairs else None
        stamps = [item.stamp for item in items]
        samples = self._describe(computation, numbers, items, images)
        known = store.read_samples(batch)
        if known is None:
            # damaged, if there are records: these may be of other files
            again = any(store.has(batch, method.text) for method in self.methods)
        else:
            again = any(
                (old.content, old.label) != (new.content, new.label)
                for old, new in zip(known[0], samples)
            )
        if again:
            # first, so that an interruption leaves none of them beside other files
            store.remove_records(batch)
        if known is None or again:
            store.write_samples(batch, samples, stamps)
        heatmaps = numbers[0] < self.evaluation.pictures
        for method in self.methods:
            if store.has(batch, method.text):
                continue
            if images is not None:
                self.process.check()
                records = computation.run_method(method, images, heatmaps)
                store.write_records(batch, method.text, records)
            bar.update(len(numbers))
        computation.shared.clear()

    def _describe(
        self, computation: Computation, numbers: Sequence[int], items: Sequence[_Item],
        images: Optional[Batch],
    ) -> list[SampleRecord]:
        """What is known about the samples of a batch."""
        labelled = "label" in (getattr(self.evaluation, key) for key in CLASSES)
        rows = count()
        samples = []
        for number, item in zip(numbers, items):
            sample, loaded = self.samples[number], item.loaded
            record = SampleRecord(sample.name, sample.label, problem=loaded.problem)
            if images is not None and item.content is not None:
                row = next(rows)
                unlabelled = "no label, so the prediction was used"
                notes = (loaded.note, unlabelled if labelled and sample.label is None else None)
                target, output = int(images.targets[row]), images.output[row]
                kept = number < self.evaluation.pictures
                record = record._replace(
                    target=target, prediction=int(output.argmax()), content=item.content,
                    probability=float(output.double().softmax(0)[target]),
                    notes=tuple(filter(None, notes)),
                    picture=computation.picture(images.images[row]) if kept else None,
                )
            samples.append(record)
        return samples


class _Lines(tqdm):  # type: ignore[type-arg]
    """A progress bar with a line of its own for each state, for log files."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """How a state is written."""
        return lambda text: print(text.strip(), file=file, flush=True)


def _device(name: Optional[str], process: Process) -> torch.device:
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
