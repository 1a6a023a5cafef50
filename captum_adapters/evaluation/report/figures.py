"""Curves and examples of a report, and the page with all of it."""

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import jinja2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from captum_adapters.curves import LINE_STYLES, plot_curves
from captum_adapters.evaluation.names import base_of
from captum_adapters.evaluation.report.aggregate import (
    Row,
    column_of,
    protocol_of,
    sign_of,
)
from captum_adapters.evaluation.report.tables import format_number, wrap
from zennit_resnet.image import draw_comparison, draw_overlay

if TYPE_CHECKING:
    from captum_adapters.evaluation.report.report import Report

# Methods with examples
MONTAGE = 8
# more curves than these can not be told apart
CURVES = 10
RANKS = ("best", "median", "worst")
# Controls are grey
CONTROL_STYLES = {"random": ":", "constant": "--", "gaussian": "-.", "sobel": "-"}
COLORS = [colormaps["tab10"](number) for number in range(10) if number != 7]


class Panel(NamedTuple):
    """Curves beside each other."""

    title: str
    curves: dict[str, str]  # titles by name
    label: str  # of the x-axis
    score: str  # that methods are sorted by
    positions: str = "percents"


KEPT = "Kept, in the order of relevance (%)"
PANELS = {
    "insertion_deletion": Panel(
        "Insertion and deletion",
        {"insertion": "Insertion", "deletion": "Deletion"},
        "Share of pixels inserted or deleted",
        "id",
        "fractions",
    ),
    "accuracy": Panel(
        "Accuracy with the top p %", {"accuracy": "Accuracy"}, KEPT, "accuracy"
    ),
    "pointing": Panel(
        "Share of the top p % inside of the mask",
        {"pointing": "Share inside of the mask"},
        "Top p %",
        "pointing",
    ),
    "distance": Panel(
        "Distance of the top p % to the mask",
        {"distance": "Distance to the mask"},
        "Top p %",
        "distance",
    ),
}


class Picture(NamedTuple):
    """A picture as PNG, and what is to be seen."""

    title: str
    data: bytes


# -- curves ----------------------------------------------------------------------------


def _collect(
    row: Row, key: str, where: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of samples with finite curves, the curves and positions, (n, points) each.

    Curves of another number of points than most are left out.
    """
    curves, positions = row.curve(key), row.curve(where)
    pairs = {
        name: (positions[name].astype(float), curve.astype(float))
        for name, curve in curves.items()
        if name in positions and np.isfinite([positions[name], curve]).all()
    }
    if not pairs:
        return [], np.empty((0, 0)), np.empty((0, 0))
    sizes = [len(curve) for _, curve in pairs.values()]
    usual = max(sizes, key=sizes.count)
    names = [name for name, (_, curve) in pairs.items() if len(curve) == usual]
    x, y = (np.stack([pairs[name][place] for name in names]) for place in (0, 1))
    return names, y, x


def _draw(report: "Report", members: Sequence[Row], panel: Panel) -> Optional[bytes]:
    """Mean curves of methods, with bands."""
    found = {
        (row.name, key): _collect(row, key, panel.positions)
        for row in members
        for key in panel.curves
    }
    means = {row.name: row.mean(panel.score) for row in members}
    shown = [
        row for row in members if any(found[row.name, key][0] for key in panel.curves)
    ]
    methods = [row.name for row in shown if not row.control]
    sign = sign_of(panel.score)
    # those without a mean come last
    ranked = sorted(
        methods, key=lambda name: (math.isnan(means[name]), -sign * means[name])
    )
    best = [name for name in methods if name in ranked[:CURVES]]
    shown = [row for row in shown if row.control or row.name in best]
    if not shown:
        return None
    width = 3.4 + 4.2 * len(panel.curves)
    canvas = Figure(figsize=(width, 4.6), layout="constrained")
    lines: dict[str, Line2D] = {}
    for axes, (key, title) in zip(
        canvas.subplots(1, len(panel.curves), squeeze=False)[0], panel.curves.items()
    ):
        for row in shown:
            names, curves, positions = found[row.name, key]
            if not names:
                continue
            plot_curves(
                {row.name: curves},
                positions,
                axes=axes,
                confidence=report.confidence,
                clusters=report.groups[row.group].clusters(names, report.clusters),
                n_resamples=1000,
            )
            line, band = axes.get_lines()[-1], axes.collections[-1]
            if row.control:
                style = CONTROL_STYLES.get(base_of(row.method), "--")
                line.set(color="0.45", linestyle=style, linewidth=1.2)
            else:
                repeat, number = divmod(best.index(row.name), len(COLORS))
                line.set(color=COLORS[number], linestyle=LINE_STYLES[repeat])
            # many bands on top of each other hide the lines
            alpha = 0.18 if len(shown) <= 4 else 0.08
            band.set(color=line.get_color(), alpha=alpha, linewidth=0)
            lines.setdefault(row.name, line)
        axes.set(title=title, xlabel=panel.label)
        drawn = {*found[shown[0].name, key][0]}
        lines.update(_draw_chance(axes, shown[0], key, panel.positions, drawn))
    texts = []
    for name in lines:
        mean = means.get(name, math.nan)
        score = "" if math.isnan(mean) else f" ({format_number(mean)})"
        texts.append(wrap(name, 30) + score)
    # the legend must not be cut off
    height = 0.6 + 0.17 * sum(text.count("\n") + 1 for text in texts)
    canvas.set_figheight(max(canvas.get_figheight(), height))
    canvas.legend(
        handles=list(lines.values()),
        labels=texts,
        loc="outside right upper",
        title=f"({column_of(panel.score).title})" if panel.score else None,
        alignment="left",
        fontsize="small",
        frameon=False,
    )
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=100, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _draw_chance(
    axes: Axes, row: Row, key: str, where: str, drawn: set[str]
) -> dict[str, Line2D]:
    """What is to be had without any explanation, and at most, for these samples."""
    lines = {}
    chance = row.mean(f"{key}_chance")
    if not math.isnan(chance):
        lines["chance"] = axes.axhline(
            chance, color="black", linewidth=0.8, linestyle=":"
        )
    names, curves, positions = _collect(row, f"{key}_ceiling", where)
    kept = [number for number, name in enumerate(names) if name in drawn]
    if kept:
        mean = curves[kept].mean(0)
        lines["ceiling"] = axes.plot(positions[0], mean, color="black", linewidth=0.8)[0]
    return lines


def draw_curves(report: "Report") -> dict[str, Picture]:
    """Curves of the ten best methods and all controls, by a name for their file."""
    pictures = {}
    several = len(report.groups) > 1
    for index, group in enumerate(report.groups):
        panels = dict(PANELS)
        for key in sorted({str(key) for run in group.runs for key in run.curves}):
            if key.startswith("cross_accuracy:"):
                title = f"Accuracy of {key.partition(':')[2]} with the top p %"
                panels[key] = Panel(title, {key: title}, KEPT, "")
        members = [row for row in report.rows if row.group == index]
        for key, panel in panels.items():
            data = _draw(report, members, panel)
            if data is not None:
                name = re.sub(r"[^\w.-]+", "_", key) + f"_{index + 1}" * several
                title = panel.title + f" ({group.name})" * several
                pictures[name] = Picture(title, data)
    return pictures


# -- examples --------------------------------------------------------------------------


class Example(NamedTuple):
    """A picture, and a heatmap on it."""

    rank: str  # "best", "median" or "worst"
    sample: str
    score: float  # its primary score
    explained: str  # name of the class, if it is known
    picture: np.ndarray  # of shape (height, width, 3)
    overlay: np.ndarray


def find_examples(
    report: "Report",
) -> tuple[list[tuple[Row, list[Example]]], list[str]]:
    """The best, median and worst example of at most 8 methods by the primary score.

    Returned are pairs of a row and its examples, and sentences on what is not shown.
    """
    found: list[tuple[Row, list[Example]]] = []
    notes: list[str] = []
    primary = report.primary
    if primary is None:
        return found, notes
    scored = [row for row in report.rows if primary in row.statistics.index]
    rows = [row for row in scored if not row.control] or scored
    best = sorted(rows, key=lambda row: -sign_of(primary) * row.mean(primary))[:MONTAGE]
    if len(best) < len(rows):
        notes.append(f"The {MONTAGE} best of {len(rows)} methods are shown.")
    for row in (row for row in rows if row in best):
        group, heatmaps = report.groups[row.group], row.heatmaps()
        scores = row.of(primary)
        order = (-sign_of(primary) * scores).sort_values(kind="stable").index
        kept = [
            name
            for name in order
            if name in heatmaps and group.samples[name].picture is not None
        ]
        if not kept:
            notes.append(f"Pictures and heatmaps of {row.name} were not kept.")
            continue
        if len(kept) < len(scores):
            notes.append(
                f"Of {row.name}, pictures and heatmaps of {len(kept)} of {len(scores)}"
                " examples were kept."
            )
        last = len(kept) - 1
        chosen = {0: "best", (last + 1) // 2: "median", last: "worst"}
        if last < 2:
            chosen = dict(zip((0, last), ("best", "worst")))
        examples = []
        for number, rank in chosen.items():
            name = kept[number]
            sample = group.samples[name]
            pictures = _draw_example(sample.picture or b"", heatmaps[name])
            explained = group.class_name(sample.target)
            examples.append(Example(rank, name, scores[name], explained, *pictures))
        found.append((row, examples))
    return found, notes


def _draw_example(data: bytes, heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture, and the heatmap on it."""
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    scaled = Image.fromarray(heatmap.astype(np.float32)).resize(
        picture.shape[1::-1], Image.Resampling.BILINEAR
    )
    return picture, draw_overlay(picture, np.asarray(scaled))


def _encode(picture: np.ndarray, kind: str, **options: Any) -> bytes:
    """A file of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def draw_montage(report: "Report") -> Optional[bytes]:
    """The examples of :func:`find_examples` as one PNG, `None` if there are none."""
    rows, captions = [], []
    for row, examples in find_examples(report)[0]:
        tiles = {item.rank: [item.picture, item.overlay] for item in examples}
        blank = [np.full_like(examples[0].picture, 255)] * 2
        rows.append([tile for rank in RANKS for tile in tiles.get(rank, blank)])
        scores = [f"{item.rank} {format_number(item.score)}" for item in examples]
        captions.append(f"{row.name}: {', '.join(scores)}")
    if not rows:
        return None
    titles = [title for rank in RANKS for title in (rank, "heatmap")]
    return _encode(draw_comparison(rows, titles, captions), "PNG", optimize=True)


# -- page ------------------------------------------------------------------------------


def _uri(data: bytes, kind: str = "png") -> str:
    """A file as an address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: np.ndarray) -> str:
    """A small photograph as an address."""
    return _uri(_encode(picture, "JPEG", quality=80), "jpeg")


def make_page(report: "Report", curves: dict[str, Picture]) -> str:
    """The report as one HTML page that needs no other file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("captum_adapters.evaluation.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(uri=_uri, jpeg=_jpeg, number=format_number)
    commands = [run.settings.get("command") for run in report.runs]
    examples, notes = find_examples(report)
    return environment.get_template("report.html.jinja").render(
        report=report,
        commands=[command for command in commands if command],
        columns=[
            (column_of(name), protocol_of(name))
            for name in report.columns
            if column_of(name).about
        ],
        curves=curves.values(),
        examples=examples,
        notes=notes,
    )
