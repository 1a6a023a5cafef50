"""A report as pictures and as a page."""

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from PIL import Image

from captum_adapters.evaluation.methods import base_of
from captum_adapters.evaluation.summary import (
    Row,
    cluster_labels,
    column_of,
    protocol_of,
    sign_of,
)
from captum_adapters.evaluation.tables import format_number, to_html, wrap
from captum_adapters.metrics.plots import GRID_POINTS, LINE_STYLES, plot_curves
from zennit_resnet.image import draw_comparison, draw_overlay

if TYPE_CHECKING:
    from captum_adapters.evaluation.contents import Report

# Methods with examples
MONTAGE = 8
# more curves than these can not be told apart
CURVES = 10
RANKS = ("best", "median", "worst")
# Controls are grey
CONTROL_STYLES = {"random": ":", "constant": "--", "gaussian": "-.", "sobel": "-"}
COLORS = [colormaps["tab10"](number) for number in range(10) if number != 7]


class Figure(NamedTuple):
    """A picture as PNG, and what is to be seen."""

    title: str
    data: bytes


# -- pictures --------------------------------------------------------------------------


def _collect(
    row: Row, key: str, where: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of samples, their curves of shape (n, points), and positions (points,)."""
    names, curves, positions = [], [], []
    for name, record in row.records.items():
        y, x = record.curves.get(key), record.curves.get(where)
        if y is None or x is None or len(x) != len(y) or len(x) == 0:
            continue
        if np.isfinite(x).all() and np.isfinite(y).all():
            names.append(name)
            curves.append(np.asarray(y, np.float64))
            positions.append(np.asarray(x, np.float64))
    if not names:
        return names, np.empty((0, 0)), np.empty(0)
    if all(np.array_equal(x, positions[0]) for x in positions):
        return names, np.stack(curves), positions[0]
    grid = np.linspace(
        min(x[0] for x in positions), max(x[-1] for x in positions), GRID_POINTS
    )
    return (
        names,
        np.stack([np.interp(grid, *pair) for pair in zip(positions, curves)]),
        grid,
    )


def _draw_panels(
    report: "Report",
    group: int,
    panels: Sequence[tuple[str, str, str]],
    where: str,
    score: str,
) -> Optional[bytes]:
    """Mean curves with bands, in panels of the name, title and axis of a curve."""
    members = [row for row in report.rows if row.group == group]
    found = {
        (row.name, key): _collect(row, key, where)
        for row in members
        for key, _, _ in panels
    }
    shown = [
        row for row in members if any(found[row.name, key][0] for key, _, _ in panels)
    ]
    if not shown:
        return None
    methods = [row.name for row in shown if not row.control]
    if len(methods) > CURVES:
        sign, means = sign_of(score), {row.name: row.mean(score) for row in shown}
        ranked = sorted(methods, key=lambda name: _last_if_nan(-sign * means[name]))
        methods = [name for name in methods if name in ranked[:CURVES]]
        shown = [row for row in shown if row.control or row.name in methods]
    canvas = Canvas(figsize=(3.4 + 4.2 * len(panels), 4.6), layout="constrained")
    grid = canvas.subplots(1, len(panels), squeeze=False)[0]
    lines: dict[str, Line2D] = {}
    for axes, (key, title, label) in zip(grid, panels):
        for row in shown:
            names, curves, positions = found[row.name, key]
            if not names:
                continue
            labels = cluster_labels(report.groups[group], names, report.clusters)
            plot_curves(
                {row.name: curves},
                positions,
                axes=axes,
                confidence=report.confidence,
                clusters=labels,
                n_resamples=1000,
            )
            line, band = axes.get_lines()[-1], axes.collections[-1]
            if row.control:
                line.set(
                    color="0.45",
                    linestyle=CONTROL_STYLES.get(base_of(row.method), "--"),
                    linewidth=1.2,
                )
            else:
                repeat, number = divmod(methods.index(row.name), len(COLORS))
                line.set(
                    color=COLORS[number],
                    linestyle=LINE_STYLES[repeat % len(LINE_STYLES)],
                )
            # many bands on top of each other hide the lines
            band.set(
                color=line.get_color(),
                alpha=0.18 if len(shown) <= 4 else 0.08,
                linewidth=0,
            )
            lines.setdefault(row.name, line)
        axes.set(title=title, xlabel=label)
        lines.update(_draw_chance(axes, shown, key, where))
    means = {row.name: row.mean(score) for row in shown}
    texts = [
        "\n".join(wrap(name, 30))
        + (
            f" ({format_number(means[name])})"
            if not math.isnan(means.get(name, math.nan))
            else ""
        )
        for name in lines
    ]
    # the legend must not be cut off
    height = 0.6 + 0.17 * sum(text.count("\n") + 1 for text in texts)
    canvas.set_figheight(max(canvas.get_figheight(), height))
    canvas.legend(
        handles=list(lines.values()),
        labels=texts,
        loc="outside right upper",
        title=f"({column_of(score).title})" if score in report.columns else None,
        alignment="left",
        fontsize="small",
        frameon=False,
    )
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=100, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _last_if_nan(value: float) -> float:
    """A key to sort by."""
    return math.inf if math.isnan(value) else value


def _draw_chance(
    axes: Axes, rows: Sequence[Row], key: str, where: str
) -> dict[str, Line2D]:
    """What is to be had without any explanation, and at most."""
    lines = {}
    chance = next((row.mean(f"{key}_chance") for row in rows), math.nan)
    if not math.isnan(chance):
        lines["chance"] = axes.axhline(
            chance, color="black", linewidth=0.8, linestyle=":"
        )
    # the ceiling is that of the examples whose curves are drawn
    drawn = set(_collect(rows[0], key, where)[0])
    names, curves, positions = _collect(rows[0], f"{key}_ceiling", where)
    kept = [number for number, name in enumerate(names) if name in drawn]
    if kept:
        mean = curves[kept].mean(0)
        lines["ceiling"] = axes.plot(positions, mean, color="black", linewidth=0.8)[0]
    return lines


def draw_curves(report: "Report") -> dict[str, Figure]:
    """Curves of the ten best methods and all controls, as far as they were recorded.

    Args:

        report (Report): The report.

    Returns:
        dict: :class:`Figure` by a name for its file.
    """
    figures = {}
    kept = "Kept, in the order of relevance (%)"
    for index, group in enumerate(report.groups):
        suffix = f"_{index + 1}" if len(report.groups) > 1 else ""
        where = f" ({group.name})" if len(report.groups) > 1 else ""
        kinds = {
            key
            for row in report.rows
            if row.group == index
            for record in row.records.values()
            for key in record.curves
        }
        wanted = {
            "insertion_deletion": (
                "Insertion and deletion",
                [
                    ("insertion", "Insertion", "Share of pixels inserted"),
                    ("deletion", "Deletion", "Share of pixels deleted"),
                ],
                "fractions",
                "id",
            ),
            "accuracy": (
                "Accuracy with the top p %",
                [("accuracy", "Accuracy", kept)],
                "percents",
                "accuracy",
            ),
            "pointing": (
                "Share of the top p % inside of the mask",
                [("pointing", "Share inside of the mask", "Top p %")],
                "percents",
                "pointing",
            ),
            "distance": (
                "Distance of the top p % to the mask",
                [("distance", "Distance to the mask", "Top p %")],
                "percents",
                "distance",
            ),
        }
        for key in sorted(kinds):
            if key.startswith("cross_accuracy:"):
                other = key.partition(":")[2]
                title = f"Accuracy of {other} with the top p %"
                wanted[key] = (title, [(key, title, kept)], "percents", "")
        for key, (title, panels, positions, score) in wanted.items():
            data = _draw_panels(report, index, panels, positions, score)
            if data is not None:
                name = re.sub(r"[^\w.-]+", "_", key) + suffix
                figures[name] = Figure(title + where, data)
    return figures


class Example(NamedTuple):
    """A picture, and a heatmap on it.

    Attributes:

        rank (str): `"best"`, `"median"` or `"worst"`.
        sample (str): Name of the sample.
        score (float): Its primary score.
        explained (str): Name of the class that is explained, if it is known.
        picture (array): The picture of shape (height, width, 3).
        overlay (array): The heatmap on it, of the same shape.
    """

    rank: str
    sample: str
    score: float
    explained: str
    picture: np.ndarray
    overlay: np.ndarray


def find_examples(
    report: "Report",
) -> tuple[list[tuple[Row, list[Example]]], list[str]]:
    """The best, median and worst example of each method by the primary score.

    Args:

        report (Report): The report.

    Returns:
        tuple: For at most 8 methods, the row and its examples, and sentences on what is
        not shown.
    """
    found: list[tuple[Row, list[Example]]] = []
    notes: list[str] = []
    primary = report.primary
    if primary is None:
        return found, notes
    sign = sign_of(primary)
    scored = [row for row in report.rows if primary in row.statistics]
    rows = [row for row in scored if not row.control] or scored
    best = sorted(rows, key=lambda row: -sign * row.mean(primary))[:MONTAGE]
    if len(best) < len(rows):
        notes.append(f"The {MONTAGE} best of {len(rows)} methods are shown.")
    for row in rows:
        if row not in best:
            continue
        group = report.groups[row.group]
        scores = row.scores(primary)
        pairs = {}
        for name in sorted(scores, key=lambda name: (-sign * scores[name], name)):
            heatmap, sample = row.records[name].heatmap, group.samples.get(name)
            if (
                heatmap is not None
                and sample is not None
                and sample.picture is not None
            ):
                pairs[name] = sample.picture, heatmap
        names = [*pairs]
        if not names:
            notes.append(f"Pictures and heatmaps of {row.name} were not kept.")
            continue
        if len(names) < len(scores):
            notes.append(
                f"Of {row.name}, pictures and heatmaps of {len(names)} of {len(scores)}"
                " examples were kept."
            )
        chosen = dict(zip((0, len(names) - 1), ("best", "worst")))
        if len(names) > 2:
            chosen = {0: "best", len(names) // 2: "median", len(names) - 1: "worst"}
        examples = []
        classes = group.runs[0].settings.get("classes") or ()
        for number, rank in chosen.items():
            name = names[number]
            target = group.samples[name].target
            explained = (
                classes[target] if target is not None and target < len(classes) else ""
            )
            picture, overlay = _draw_example(*pairs[name])
            examples.append(
                Example(rank, name, scores[name], str(explained), picture, overlay)
            )
        found.append((row, examples))
    return found, notes


def _draw_example(data: bytes, heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture, and the heatmap on it."""
    with Image.open(io.BytesIO(data)) as image:
        picture = np.asarray(image.convert("RGB"))
    scaled = Image.fromarray(heatmap.astype(np.float32)).resize(
        picture.shape[1::-1], Image.Resampling.BILINEAR
    )
    return picture, draw_overlay(picture, np.asarray(scaled))


def draw_montage(report: "Report") -> Optional[bytes]:
    """The examples of :func:`find_examples` as one PNG, `None` if there are none.

    Args:

        report (Report): The report.

    Returns:
        bytes or None: The file.
    """
    rows, captions = [], []
    for row, examples in find_examples(report)[0]:
        by_rank = {example.rank: example for example in examples}
        blank = np.full_like(examples[0].picture, 255)
        tiles: list[np.ndarray] = []
        for rank in RANKS:
            example = by_rank.get(rank)
            tiles += (
                [blank, blank]
                if example is None
                else [example.picture, example.overlay]
            )
        rows.append(tiles)
        scores = [
            f"{example.rank} {format_number(example.score)}" for example in examples
        ]
        captions.append(f"{row.name}: {', '.join(scores)}")
    if not rows:
        return None
    titles = [title for rank in RANKS for title in (rank, "heatmap")]
    buffer = io.BytesIO()
    Image.fromarray(draw_comparison(rows, titles, captions)).save(
        buffer, "PNG", optimize=True
    )
    return buffer.getvalue()


# -- page ------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h2 a { color: inherit; text-decoration: none; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
.scroll { overflow-x: auto; margin-top: 1.5rem; }
table { border-collapse: collapse; font-size: .875rem; }
caption { text-align: left; font-weight: bold; padding: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid; vertical-align: bottom; }
tbody th { font-weight: normal; min-width: 10rem; }
th.section { background: var(--soft); font-style: italic; }
td { overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.note, figcaption, dd { opacity: .75; font-size: .875rem; }
pre { overflow-x: auto; background: var(--soft); padding: .75rem; }
h3 { overflow-wrap: anywhere; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure > img { max-width: 100%; background: #fff; }
.examples { display: flex; flex-wrap: wrap; gap: 1rem; }
.examples figure { margin: .5rem 0; width: 232px; overflow-wrap: anywhere; }
.examples img { width: 112px; margin-right: 2px; }
"""


def _uri(data: bytes, kind: str) -> str:
    """A file as an address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: np.ndarray) -> str:
    """A small photograph as an address."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80)
    return _uri(buffer.getvalue(), "jpeg")


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _examples(report: "Report") -> str:
    """The examples of all methods."""
    found, notes = find_examples(report)
    parts = []
    for row, examples in found:
        parts.append(f'<h3>{escape(row.name)}</h3><div class="examples">')
        for example in examples:
            name = escape(example.sample)
            explained = (
                f", class {escape(example.explained)}" if example.explained else ""
            )
            parts.append(
                f'<figure><img src="{_jpeg(example.picture)}" alt="{name}">'
                f'<img src="{_jpeg(example.overlay)}" alt="Heatmap of'
                f' {escape(row.name)} on {name}"><figcaption><strong>{example.rank}:'
                f" {format_number(example.score)}</strong> {name}{explained}</figcaption></figure>"
            )
        parts.append("</div>")
    return "".join(parts) + (_list(notes) if notes else "")


def make_page(report: "Report", curves: dict[str, Figure]) -> str:
    """The report as one HTML page that needs no other file.

    Args:

        report (Report): The report.
        curves (dict): Pictures of :func:`draw_curves`.

    Returns:
        str: The page.
    """
    runs = [run for group in report.groups for run in group.runs]
    commands = [
        str(run.settings["command"]) for run in runs if run.settings.get("command")
    ]
    about = "".join(
        f"<dt>{escape(column_of(name).title)}, {escape(protocol_of(name))}</dt>"
        f"<dd>{escape(column_of(name).about)}</dd>"
        for name in report.columns
        if column_of(name).about
    )
    pictures = "".join(
        f'<figure><figcaption>{escape(figure.title)}</figcaption><img src="{_uri(figure.data, "png")}"'
        f' alt="{escape(figure.title)}: mean curves of all methods with confidence bands"></figure>'
        for figure in curves.values()
    )
    tables = (
        "".join(map(to_html, report.results()))
        or "<p>There are no records to report.</p>"
    )
    sections = {
        "Settings": (f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else "")
        + "".join(map(to_html, report.settings())),
        "Results": tables
        + (
            f"<details><summary>Columns</summary><dl>{about}</dl></details>"
            if about
            else ""
        ),
        "Paper": "".join(map(to_html, report.printed())),
        "Warnings": _list(report.warnings)
        if report.warnings
        else "<p>There are none.</p>",
        "Messages": _list(report.messages) if report.messages else "",
        "Significance": "".join(map(to_html, report.comparisons())),
        "Curves": pictures,
        "Examples": _examples(report),
        "Problems": "".join(map(to_html, report.problems()))
        or "<p>There are none.</p>",
    }
    shown = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in shown)
    content = "".join(
        f'<section><h2 id="{title.lower()}"><a href="#{title.lower()}">{title}</a></h2>{content}</section>'
        for title, content in shown.items()
    )
    title = escape("Evaluation: " + ", ".join(group.name for group in report.groups))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<h1>{title}</h1><nav>{links}</nav><main>{content}</main></body></html>\n"
    )
