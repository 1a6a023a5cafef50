"""What a report says, as tables, text and files."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

from captum_adapters.evaluation import tables
from captum_adapters.evaluation.methods import stands_for
from captum_adapters.evaluation.presets import Preset
from captum_adapters.evaluation.summary import (
    Group,
    Row,
    column_of,
    counterpart_of,
    describe,
    folder_names,
    protocol_of,
    settings_of,
    sign_of,
    title_of,
)
from captum_adapters.evaluation.tables import Cell, Table, format_number
from captum_adapters.metrics.statistics import Comparison
from zennit_resnet.messages import one_line

# Tables of columns that are the same by all protocols
TOPICS = {
    "Top pixels": ("accuracy", "cross_accuracy", "pointing", "distance"),
    "Attention": (
        "attention_coverage",
        "attention_precision",
        "attention_correct",
        "attention_insufficient",
        "attention_over",
        "attention_wrong",
    ),
    "Ties": ("tied_share", "tied_share_magnitude", "distinct_levels", "negative"),
    "Conservation": ("gap", "relevance_sum", "initial"),
}
# Examples that are named of each problem, and different problems that are listed
EXAMPLES = 5
REASONS = 20


class Significance(NamedTuple):
    """All methods of a group compared with one of them.

    Attributes:

        group (int): Index of the group.
        column (str): Name of the score.
        baseline (str): Name of the row that others are compared with.
        results (tuple[Comparison]): The comparisons.
    """

    group: int
    column: str
    baseline: str
    results: tuple[Comparison, ...]


class Report(NamedTuple):
    """Result of :func:`captum_adapters.evaluation.summarize`.

    Attributes:

        groups (tuple[Group]): Groups of comparable runs.
        rows (tuple[Row]): Methods of each group, followed by its controls.
        columns (tuple[str]): Names of the scores that any method has.
        primary (str or None): Name of the score by which methods are compared.
        confidence (float): Level of confidence of intervals.
        clusters (str or None): `"class"` if whole classes were resampled.
        significance (tuple[Significance]): Comparisons with a baseline by group.
        warnings (tuple[str]): What may mislead.
        messages (tuple[str]): What is missing, or was left out.
        presets (tuple[Preset]): What papers have printed.
    """

    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    primary: Optional[str]
    confidence: float
    clusters: Optional[str]
    significance: tuple[Significance, ...]
    warnings: tuple[str, ...]
    messages: tuple[str, ...]
    presets: tuple[Preset, ...] = ()

    def results(self) -> list[Table]:
        """Tables of the means: insertion and deletion by our protocol and by published
        ones, other scores, and what it took to get them."""
        if not self.rows:
            return []
        topics: dict[str, list[str]] = {}
        for name in self.columns:
            topics.setdefault(_topic(name), []).append(name)
        resampled = " of classes" if self.clusters else ""
        note = f"Means with {100 * self.confidence:g} % bootstrap intervals{resampled}."
        found = []
        for topic, names in topics.items():
            notes = [note] if any(map(sign_of, names)) else []
            sections = self._sections(partial(self._cells, names))
            notes += self._counts(names)
            found.append(
                Table(
                    topic, ("Method", *map(title_of, names)), sections, " ".join(notes)
                )
            )
        header = ("Method", "Examples", "Problems", "Seconds per image")
        sections = self._sections(
            lambda row: [
                Cell(str(len(row.records))),
                Cell(str(len(row.problems))),
                Cell(format_number(row.seconds)),
            ]
        )
        return [*found, Table("Examples and time", header, sections)]

    def comparisons(self) -> list[Table]:
        """Tables of the significance of differences."""
        found = []
        for item in self.significance:
            where = f" ({self.groups[item.group].name})" if len(self.groups) > 1 else ""
            rows = tuple(
                (
                    Cell(result.method),
                    Cell(str(result.num_examples)),
                    Cell(format_number(result.mean)),
                    Cell(_interval(result.difference, result.low, result.high)),
                    Cell(
                        "< 0.001"
                        if result.p_holm < 0.001
                        else format_number(result.p_holm)
                    ),
                )
                for result in item.results
            )
            baseline = next(row for row in self.rows if row.name == item.baseline)
            found.append(
                Table(
                    title=f"{column_of(item.column).title} compared with {item.baseline}{where}",
                    header=("Method", "Examples", "Mean", "Difference", "p (Holm)"),
                    sections=(("", rows),),
                    note=f"Paired differences to {item.baseline}"
                    f" ({format_number(baseline.mean(item.column))}) on the examples that both have a"
                    f" score of, {100 * self.confidence:g} % bootstrap intervals, and p-values of"
                    f" permutation tests, corrected for {len(item.results)} comparisons.",
                )
            )
        return found

    def printed(self) -> list[Table]:
        """Tables of papers' figures beside those that were measured here."""
        return [self._printed(preset) for preset in self.presets if self.rows]

    def _printed(self, preset: Preset) -> Table:
        """The table of a paper."""
        header = ["Method"]
        fields: list[tuple[bool, str]] = []
        for name in preset.columns:
            title, ours = title_of(name), counterpart_of(name)
            if any(name in figures for figures in preset.printed.values()):
                header.append(f"{title} printed")
                fields.append((True, name))
            header.append(
                f"{title} here, {'our protocol' if ours is None else 'as published'}"
            )
            fields.append((False, name))
            if ours is not None:
                header.append(f"{title} here, our protocol")
                fields.append((False, ours))
        lines = []
        for method, title in preset.rows.items():
            figures = preset.printed.get(method, {})
            measured: list[Optional[Row]] = [
                row for row in self.rows if stands_for(row.method, method)
            ]
            for row in measured or [None]:
                values = [
                    figures.get(name, math.nan)
                    if printed
                    else math.nan
                    if row is None
                    else row.mean(name)
                    for printed, name in fields
                ]
                label = f"{title}: {method if row is None else row.name}"
                lines.append(
                    (Cell(label), *(Cell(format_number(value)) for value in values))
                )
        sections = (("", tuple(lines)),)
        return Table(preset.title, tuple(header), sections, preset.about)

    def classes(self) -> list[Table]:
        """Tables of each method's best and worst class, where a paper shows these."""
        names = [
            name
            for preset in self.presets
            if preset.by_class
            for name in preset.columns
        ]
        return [
            self._classes(name) for name in dict.fromkeys(names) if name in self.columns
        ]

    def _classes(self, name: str) -> Table:
        """The table of the best and worst class by a column."""

        def cells(row: Row) -> list[Cell]:
            samples = self.groups[row.group].samples
            scores: dict[int, list[float]] = {}
            for sample, score in row.scores(name).items():
                label = samples[sample].label if sample in samples else None
                if label is not None:
                    scores.setdefault(label, []).append(score)
            means = {
                label: math.fsum(found) / len(found) for label, found in scores.items()
            }
            order = sorted(
                means, key=lambda label: (-sign_of(name) * means[label], label)
            )
            titles = self.groups[row.group].runs[0].settings.get("classes") or ()
            return [
                Cell(text)
                for label in (order[:1] + order[-1:] if order else ())
                for text in (
                    titles[label] if label < len(titles) else f"class {label}",
                    f"{format_number(means[label])} ({len(scores[label])})",
                )
            ] or [Cell("")] * 4

        header = (
            "Method",
            "Best class",
            "Mean (examples)",
            "Worst class",
            "Mean (examples)",
        )
        title = f"{column_of(name).title} by class"
        return Table(title, header, self._sections(cells))

    def problems(self) -> list[Table]:
        """The table of what was left out, by reason."""
        found: dict[tuple[str, str], list[str]] = {}
        for group in self.groups:
            for name, sample in group.samples.items():
                if sample.problem is not None:
                    found.setdefault(("left out", sample.problem), []).append(name)
                for note in sample.notes:
                    found.setdefault(("note", note), []).append(name)
        for row in self.rows:
            for name, reason in row.problems.items():
                found.setdefault((f"no values of {row.name}", reason), []).append(name)
        if not found:
            return []
        ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
        rows = [
            (
                Cell(what),
                Cell(one_line(reason)),
                Cell(
                    ", ".join(map(one_line, names[:EXAMPLES]))
                    + ", …" * (len(names) > EXAMPLES)
                ),
                Cell(str(len(names))),
            )
            for (what, reason), names in ordered[:REASONS]
        ]
        if len(ordered) > REASONS:
            others = ordered[REASONS:]
            count = str(sum(len(names) for _, names in others))
            rows.append(
                (
                    Cell("others"),
                    Cell(f"{len(others)} other reasons"),
                    Cell(""),
                    Cell(count),
                )
            )
        header = ("What", "Reason", "Such as", "Number")
        return [
            Table("Problems and notes", header, (("", tuple(rows)),), text_columns=3)
        ]

    def settings(self) -> list[Table]:
        """The table of the runs' settings."""
        runs = [run for group in self.groups for run in group.runs]
        settings = [settings_of(run) for run in runs]
        keys = dict.fromkeys(key for values in settings for key in values)
        # shown apart, and a repetition
        for key in ("command", "evaluation"):
            keys.pop(key, None)
        rows = [
            (Cell(key), *(Cell(describe(values.get(key), 2000)) for values in settings))
            for key in keys
        ]
        header = ("Setting", *folder_names(runs))
        return [
            Table("Settings", header, (("", tuple(rows)),), text_columns=len(header))
        ]

    def table(self, format: str = "terminal") -> str:
        """Means of all methods.

        Args:

            format (str, optional): `"terminal"` for plain text of 100 columns,
                    `"markdown"`, `"latex"` for the package booktabs, or `"csv"` with
                    all digits.
                    Default: `"terminal"`

        Returns:
            str: The tables, of which there is one with all columns as CSV.

        Raises:
            ValueError: If the format is unknown.
        """
        if format == "csv":
            return self._csv()
        if format not in tables.RENDERERS:
            known = ", ".join([*tables.RENDERERS, "csv"])
            raise ValueError(f"format={format!r} is not one of {known}.")
        if not self.rows:
            return (
                f"{'% ' if format == 'latex' else ''}There are no records to report.\n"
            )
        shown = self.results() + self.printed() + self.classes()
        return "\n".join(tables.RENDERERS[format](table) for table in shown)

    def text(self, format: str = "terminal") -> str:
        """All that the report says.

        Args:

            format (str, optional): `"terminal"` or `"markdown"`.
                    Default: `"terminal"`

        Returns:
            str: Tables, warnings, messages, comparisons and problems.

        Raises:
            ValueError: If the format is another one.
        """
        if format not in ("terminal", "markdown"):
            raise ValueError(f"format={format!r} is not one of terminal, markdown.")
        parts = [self.table(format)]
        for title, lines in (("Warnings", self.warnings), ("Messages", self.messages)):
            if lines:
                parts.append(tables.render_list(title, lines, format))
        parts += map(tables.RENDERERS[format], self.comparisons() + self.problems())
        return "\n".join(parts)

    def write(self, folder: Path) -> list[Path]:
        """Write the report to files. The same records give the same files.

        Args:

            folder (Path): Where to. It is made if there is none. Files of an earlier
                    report are replaced.

        Returns:
            list[Path]: What was written: `report.html`, the tables, and the pictures of
            which there is anything to see.
        """
        # drawing takes long to import
        from captum_adapters.evaluation import page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        curves = page.draw_curves(self)
        texts = {
            "report.html": page.make_page(self, curves),
            "report.md": self.text("markdown"),
            "table.md": self.table("markdown"),
            "table.csv": self.table("csv"),
            "table.tex": self.table("latex"),
            "significance.csv": self._significance_csv(),
        }
        files: dict[str, bytes] = {
            # paths may have bytes that are no text
            **{name: text.encode(errors="replace") for name, text in texts.items()},
            **{f"curves_{name}.png": figure.data for name, figure in curves.items()},
        }
        montage = page.draw_montage(self)
        if montage is not None:
            files["montage.png"] = montage
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return [folder / name for name in files]

    def _sections(
        self, cells: Callable[[Row], Sequence[Cell]]
    ) -> tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]:
        """Rows that are not empty, methods and controls of each group apart."""
        sections = []
        for index, group in enumerate(self.groups):
            where = f"{group.name}: " if len(self.groups) > 1 else ""
            for control, title in ((False, "methods"), (True, "controls")):
                rows = []
                for row in self.rows:
                    if row.group == index and row.control == control:
                        found = cells(row)
                        if any(cell.text for cell in found):
                            rows.append((Cell(row.name), *found))
                if rows:
                    sections.append((where + title, tuple(rows)))
        return tuple(sections)

    def _cells(self, names: Sequence[str], row: Row) -> list[Cell]:
        """Means of columns."""
        return [self._cell(row, name) for name in names]

    def _cell(self, row: Row, name: str) -> Cell:
        """A mean with its interval, and whether it is the best."""
        if name not in row.statistics:
            return Cell("")
        statistic = row.statistics[name]
        sign = sign_of(name)
        if sign == 0:
            # for information only, and much of it has no variance
            return Cell(format_number(statistic.mean))
        text = _interval(statistic.mean, statistic.low, statistic.high)
        means = [
            other.mean(name)
            for other in self.rows
            if other.group == row.group and not other.control
        ]
        means = [mean for mean in means if not math.isnan(mean)]
        if not means:
            return Cell(text)
        ahead = sign * statistic.mean >= max(sign * mean for mean in means)
        return Cell(text, ("above" if row.control else "best") if ahead else "")

    def _counts(self, names: Sequence[str]) -> Iterator[str]:
        """Sentences on scores that are not defined for some of the examples."""
        for name in names:
            counts = [
                (row.statistics[name].num_examples, len(row.records))
                for row in self.rows
                if name in row.statistics
            ]
            low, high = (
                min(count for count, _ in counts),
                max(count for count, _ in counts),
            )
            if any(count < number for count, number in counts):
                number = max(number for _, number in counts)
                span = str(low) if low == high else f"{low} to {high}"
                yield f"{column_of(name).title} is defined for {span} of {number} examples."

    def _csv(self) -> str:
        """The table with all digits."""
        header = ["run", "method", "kind", "examples", "problems", "seconds"]
        for name in self.columns:
            header += [f"{name} {what}" for what in ("mean", "low", "high", "examples")]
        lines: list[list[Any]] = [header]
        for row in self.rows:
            values: list[Any] = [
                self.groups[row.group].name,
                row.name,
                row.kind,
                len(row.records),
                len(row.problems),
                row.seconds,
            ]
            for name in self.columns:
                values += row.statistics.get(name, ("", "", "", 0))
            lines.append(values)
        return _to_csv(lines)

    def _significance_csv(self) -> str:
        """All comparisons with all digits."""
        lines: list[list[Any]] = [["run", "column", *Comparison._fields]]
        for item in self.significance:
            name = self.groups[item.group].name
            lines += [[name, item.column, *result] for result in item.results]
        return _to_csv(lines)


def _topic(name: str) -> str:
    """Title of the table in which a column is."""
    for topic, names in TOPICS.items():
        if name.removesuffix("_chance") in names:
            return topic
    return f"Insertion and deletion, {protocol_of(name)}"


def _to_csv(lines: list[list[Any]]) -> str:
    """Lines of a CSV file, with nothing for NaN."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for line in lines:
        writer.writerow(
            "" if isinstance(value, float) and math.isnan(value) else value
            for value in line
        )
    return stream.getvalue()


def _interval(mean: float, low: float, high: float) -> str:
    """A mean with its interval, if there is one."""
    text = format_number(mean)
    if math.isnan(low):
        return text
    return f"{text} [{format_number(low, mean)}, {format_number(high, mean)}]"
