"""Reports on runs of the evaluator: comparisons, and all that there is to say."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import pandas as pd

from captum_adapters._light import check_choice
from captum_adapters.evaluation.columns import COLUMNS, column_of, counterpart_of
from captum_adapters.evaluation.names import stands_for
from captum_adapters.evaluation.presets import PRESETS, Preset
from captum_adapters.evaluation.records import Run, union
from captum_adapters.evaluation.report.aggregate import (
    STATISTICS,
    Group,
    Row,
    add_rows,
    group_runs,
    settings_of,
    span,
)
from captum_adapters.evaluation.report.checks import find_gaps, find_warnings, introduce
from captum_adapters.evaluation.report.significance import (
    Significance,
    choose_primary,
    compare_rows,
)
from captum_adapters.evaluation.report.tables import (
    RENDERERS,
    Table,
    cells_of,
    format_interval,
    format_number,
    render_list,
    scale_of,
)
from captum_adapters.evaluation.store import brief
from captum_adapters.statistics import Comparison
from zennit_resnet._text import one_line

# Number of clusters below which intervals of the bootstrap are clearly too narrow
FEW_CLASSES = 20
# Examples that are named of each problem, and different problems that are listed
EXAMPLES = 5
REASONS = 20


class Report(NamedTuple):
    """Result of :func:`captum_adapters.evaluation.summarize`.

    Attributes:

        groups (tuple[Group]): Groups of comparable runs.
        columns (tuple[str]): Names of the scores that any method has.
        primary (str or None): Name of the score by which methods are compared.
        confidence (float): Level of confidence of intervals.
        clusters (str or None): `"class"` if whole classes were resampled.
        significance (tuple[Significance]): Comparisons with a baseline by group.
        warnings (tuple[str]): What may mislead.
        messages (tuple[str]): What is missing, or was left out.
        presets (tuple[Preset]): What papers have printed.
        beside (tuple[tuple[str, str]]): Those warnings that are about a table of
                :meth:`results`, after its title.
    """

    groups: tuple[Group, ...]
    columns: tuple[str, ...]
    primary: Optional[str]
    confidence: float
    clusters: Optional[str]
    significance: tuple[Significance, ...]
    warnings: tuple[str, ...]
    messages: tuple[str, ...]
    presets: tuple[Preset, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def rows(self) -> list[Row]:
        """Methods of each group, followed by its controls."""
        return [row for group in self.groups for row in group.rows]

    def frame(self) -> pd.DataFrame:
        """All means with their intervals and numbers of examples, a row for a method."""
        wanted = [f"{name} {what}" for name in self.columns for what in STATISTICS]
        lines = []
        for row in self.rows:
            means = row.statistics.reindex(self.columns).fillna({"examples": 0})
            line = {
                "run": row.group,
                "method": row.name,
                "kind": row.kind,
                "examples": len(row.scores),
                "problems": len(row.problems),
                "seconds": row.seconds,
            }
            lines.append({**line, **dict(zip(wanted, means.to_numpy().ravel()))})
        counts = [name for name in wanted if name.endswith(" examples")]
        return pd.DataFrame(lines).astype(dict.fromkeys(counts if lines else (), int))

    def introduction(self) -> list[str]:
        """What to know first: whether the network is right, and what its labels are."""
        return [*introduce(self.groups)]

    # -- tables

    def _table(self, title: str, cells: list[dict[str, str]], note: str = "") -> Table:
        """A table of all rows, but for those without any cell."""
        several = len(self.groups) > 1
        lines = [
            {"Run": row.group, "Method": row.name, "Kind": row.kind, **line}
            for row, line in zip(self.rows, cells)
            if line
        ]
        frame = pd.DataFrame(lines).fillna("")
        return Table(title, frame if several else frame.drop(columns="Run"), note, 2 + several)

    def results(self) -> list[Table]:
        """Tables of the means: insertion and deletion by our protocol and by published
        ones, other scores, and what it took to get them."""
        if not self.rows:
            return []
        topics: dict[str, list[str]] = {}
        for name in self.columns:
            topics.setdefault(column_of(name).table, []).append(name)
        resampled = " of classes" if self.clusters else ""
        interval = f", with {100 * self.confidence:g} % bootstrap intervals{resampled},"
        samples = [elem for group in self.groups for elem in group.samples.values()]
        left_out = sum(sample.problem is not None for sample in samples)
        missing = f"; {left_out} of {len(samples)} are left out, see Problems"
        found = []
        for topic, names in topics.items():
            cells = [cells_of(row, names) for row in self.rows]
            directed = any(column_of(name).sign for name in names)
            note = (
                f"Means{interval * directed} over the number of images in the last column"
                f"{missing * bool(left_out)}."
            )
            table = self._table(topic, cells, " ".join([note, *self._counts(names)]))
            found.append(table._replace(marks=self._marks(table, names)))
        cells = [
            {
                "Images": str(len(row.scores)),
                "Problems": str(len(row.problems)),
                "Seconds per image": format_number(row.seconds),
            }
            for row in self.rows
        ]
        return [*found, self._table("Images and time", cells)]

    def _marks(self, table: Table, names: Sequence[str]) -> pd.DataFrame:
        """Which means are the best of all methods, or of controls that are as good."""
        marks = pd.DataFrame("", table.frame.index, table.frame.columns)
        for name in [name for name in names if column_of(name).sign]:
            for group in self.groups:
                scored = [row for row in group.rows if row.has(name)]
                best = max([row.quality(name) for row in scored if not row.control], default=math.inf)
                for row in [row for row in scored if row.quality(name) >= best]:
                    places = table.frame["Method"] == row.name
                    marks.loc[places, column_of(name).heading] = "above" if row.control else "best"
        return marks

    def _counts(self, names: Sequence[str]) -> list[str]:
        """Sentences on scores that are not defined for some of the examples."""
        sentences = []
        for name in names:
            rows = [row for row in self.rows if row.has(name)]
            counts = [int(row.statistics.at[name, "examples"]) for row in rows]
            sizes = [len(row.scores) for row in rows]
            if counts != sizes:
                title = column_of(name).title
                sentences.append(f"{title} is defined for {span(counts)} of {max(sizes)} images.")
        return sentences

    def comparisons(self) -> list[Table]:
        """Tables of the significance of differences."""
        found = []
        for item in self.significance:
            where = f" ({item.group})" if len(self.groups) > 1 else ""
            lines = []
            for each in item.results:
                like = scale_of(each.mean, each.baseline_mean)
                lines.append({
                    "Method": each.method,
                    "Images": str(each.num_examples),
                    "Mean": format_number(each.mean, like),
                    "Difference": format_interval(each.difference, each.low, each.high),
                    "p (Holm)": "< 0.001" if each.p_holm < 0.001 else format_number(each.p_holm),
                })
            baseline = next(row for row in self.rows if row.name == item.baseline)
            title = f"{column_of(item.column).title} compared with {item.baseline}{where}"
            note = (
                f"Paired differences to {item.baseline}"
                f" ({format_number(baseline.mean(item.column))}) on the images for which"
                f" both have a score, {100 * self.confidence:g} % bootstrap intervals, and"
                " p-values of permutation tests, corrected for"
                f" {len(item.results)} comparisons."
            )
            found.append(Table(title, pd.DataFrame(lines), note))
        return found

    def printed(self) -> list[Table]:
        """Tables of papers' figures beside those that were measured here."""
        return [self._printed(preset) for preset in self.presets if self.rows]

    def _printed(self, preset: Preset) -> Table:
        known = {name for figures in preset.printed.values() for name in figures}
        lines = []
        for method, title in preset.rows.items():
            figures = preset.printed.get(method, {})
            rows: Sequence[Optional[Row]] = [
                row for row in self.rows if stands_for(row.method, method)
            ]
            for row in rows or [None]:
                means = row.statistics["mean"] if row else {}
                line = {"Method": f"{title}: {row.name if row else method}"}
                for name in preset.columns:
                    score, ours = column_of(name).heading, counterpart_of(name)
                    cells = {"here, our protocol": means.get(ours or name)}
                    if ours is not None:
                        cells = {"here, as published": means.get(name), **cells}
                    if name in known:
                        cells = {"printed": figures.get(name), **cells}
                    for what, value in cells.items():
                        line[f"{score} {what}"] = "–" if value is None else format_number(value)
                lines.append({**line, "Images": str(len(row.scores)) if row else "–"})
        return Table(preset.title, pd.DataFrame(lines), preset.about)

    def problems(self) -> list[Table]:
        """The table of what was left out, by reason."""
        found: list[tuple[str, str, str]] = []
        for name, sample in (item for group in self.groups for item in group.samples.items()):
            if sample.problem is not None:
                found.append(("left out", sample.problem, name))
            found += [("note", note, name) for note in sample.notes]
        for row in self.rows:
            what = f"no values of {row.name}"
            found += [(what, reason, name) for name, reason in row.problems.items()]
        if not found:
            return []
        frame = pd.DataFrame(found, columns=["What", "Reason", "Such as"]).map(one_line)
        names = frame.groupby(["What", "Reason"])["Such as"]
        frame = names.agg([_name_some, "size"]).reset_index()
        frame = frame.sort_values("size", ascending=False, kind="stable", ignore_index=True)
        frame.columns = ["What", "Reason", "Such as", "Number"]
        others = frame["Number"].iloc[REASONS:]
        if len(others):
            last = ["others", f"{len(others)} other reasons", "", others.sum()]
            frame = pd.concat([frame.iloc[:REASONS], pd.DataFrame([last], columns=frame.columns)])
        return [Table("Problems and notes", frame.astype(str), texts=3)]

    def settings(self) -> Table:
        """The table of the runs' settings."""
        settings = [settings_of(run) for run in self.runs]
        lines = [
            [key, *(brief(values.get(key), 2000) for values in settings)]
            for key in union(settings)
            # shown apart, and a repetition
            if key not in ("command", "evaluation", "format", "identity")
        ]
        folders = [folder for group in self.groups for folder in group.folders]
        frame = pd.DataFrame(lines, columns=["Setting", *folders])
        return Table("Settings", frame, texts=len(frame.columns))

    # -- output

    def table(self, format: str = "terminal") -> str:
        """Means of all methods as `"terminal"`, `"markdown"`, `"latex"` for the package
        booktabs, or `"csv"`: one table with all columns and digits. Another format is a
        `ValueError`."""
        check_choice("format", format, (*RENDERERS, "csv"))
        if format == "csv":
            return self.frame().to_csv(index=False)
        if not self.rows:
            return f"{'% ' if format == 'latex' else ''}There are no records to report.\n"
        shown = self.results() + self.printed()
        return "\n".join(RENDERERS[format](table) for table in shown)

    def text(self, format: str = "terminal") -> str:
        """All that the report says, as `"terminal"` or `"markdown"`, else a `ValueError`."""
        check_choice("format", format, ("terminal", "markdown"))
        lists = {"Warnings": self.warnings, "Messages": self.messages}
        found = self.comparisons() + self.problems()
        return "\n".join([
            render_list("Network and labels", self.introduction(), format),
            self.table(format),
            *(render_list(title, lines, format) for title, lines in lists.items() if lines),
            *map(RENDERERS[format], found),
        ])

    def significance_csv(self) -> str:
        """All comparisons with all digits."""
        lines = [
            [item.group, item.column, *result]
            for item in self.significance
            for result in item.results
        ]
        columns = ["run", "column", *Comparison._fields]
        return pd.DataFrame(lines, columns=columns).to_csv(index=False)

    def write(self, folder: Path) -> list[Path]:
        """Write `report.html`, tables and pictures to a folder, and return their paths.

        The same records give the same files, which replace those of an earlier report.
        """
        # drawing takes long to import
        from captum_adapters.evaluation.report import figures

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        curves, montages = figures.draw_curves(self), figures.make_montages(self)
        texts = {
            "report.html": figures.make_page(self, curves, montages),
            "report.md": self.text("markdown"),
            "table.md": self.table("markdown"),
            "table.csv": self.table("csv"),
            "table.tex": self.table("latex"),
            "significance.csv": self.significance_csv(),
        }
        files: dict[str, bytes] = {
            # paths may have bytes that are no text
            **{name: text.encode(errors="replace") for name, text in texts.items()},
            **{f"curves_{name}.png": curve.data for name, curve in curves.items()},
        }
        for number, montage in enumerate(montages, 1):
            if montage.examples:
                name = f"montage_{number}.png" if len(montages) > 1 else "montage.png"
                files[name] = figures.draw_montage(montage)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return [folder / name for name in files]


def _name_some(names: "pd.Series[str]") -> str:
    return ", ".join(names[:EXAMPLES]) + ", …" * (len(names) > EXAMPLES)


def summarize(
    runs: Sequence[Run],
    *,
    baseline: Optional[str] = None,
    primary: str = "id",
    confidence: float = 0.95,
    clusters: Optional[str] = None,
    presets: Optional[Sequence[Preset]] = None,
    n_resamples: Optional[int] = None,
) -> Report:
    """Put the records of runs together.

    Runs of other methods on the same data, or of the same methods on further samples of
    it, are merged. Runs that differ in data, model or options are reported side by side,
    and not compared.

    Args:

        runs (sequence of Run): The runs, see
                :func:`captum_adapters.evaluation.read_run`.
        baseline (str, optional): Name of the method that others are compared with. By
                default, it is the best one by the primary score that is neither ours nor
                a control, of those with at least half as many examples as any other.
        primary (str, optional): Name of the score by which methods are compared. If
                there is no `"id"`, it is the first one there is.
        confidence (float, optional): Level of confidence of intervals.
        clusters (str, optional): `"class"` to resample whole classes instead of
                examples, for intervals that hold for other classes too, or `"none"`.
        presets (sequence of Preset, optional): What papers have printed, to be shown
                beside the scores. By default, the presets that the runs name.
        n_resamples (int, optional): Number of resamples of intervals and tests. By
                default, it is 9999 for up to 10,000 examples, and less for more, where
                intervals vary little, but not less than 1999.

    Raises:
        ValueError: If there are no runs, or an argument is not among what there is.
    """
    if not runs:
        raise ValueError("There are no runs: give the folder of one or more.")
    check_choice("clusters", clusters, (None, "none", "class"))
    clusters = None if clusters == "none" else clusters
    warnings: list[str] = []
    messages: list[str] = []
    groups = group_runs(runs, warnings, messages)
    if n_resamples is None:
        largest = max(len(group.samples) for group in groups)
        n_resamples = max(1999, min(9999, 10**8 // max(largest, 1)))
    options = {"confidence": confidence, "n_resamples": n_resamples}
    groups = add_rows(groups, clusters, messages, **options)
    rows = [row for group in groups for row in group.rows]
    messages[:0] = find_gaps(groups)
    known = {name for row in rows for name in row.statistics.index}
    names = [*filter(known.__contains__, COLUMNS), *sorted(known - {*COLUMNS})]
    chosen = choose_primary(rows, primary, messages)
    significance = compare_rows(groups, chosen, baseline, clusters, messages, **options)
    beside = dict.fromkeys(find_warnings(groups))
    warnings += [text for _, text in beside]
    for group in groups if clusters else ():
        labels = {sample.label for sample in group.samples.values()} - {None}
        if not labels:
            messages.append(f"{group.name} has no labels, so examples are resampled.")
        elif len(labels) < FEW_CLASSES:
            warnings.append(
                f"Intervals of {group.name} are from {len(labels)} classes: they are too"
                " narrow, as there are so few."
            )
    if presets is None:
        asked = dict.fromkeys(name for run in runs for name in run.settings["preset"])
        presets = [PRESETS[name] for name in asked if name in PRESETS]
        unknown = ", ".join(name for name in asked if name not in PRESETS)
        if unknown:
            messages.append(f"There are no printed figures of the preset {unknown}.")
    return Report(
        tuple(groups), tuple(names), chosen, confidence, clusters,
        tuple(significance), tuple(dict.fromkeys(warnings)), tuple(dict.fromkeys(messages)),
        tuple(presets), tuple(beside),
    )
