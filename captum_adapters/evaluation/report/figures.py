"""Curves and examples of a report, and the page with all of it."""

import base64
import io
import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import jinja2
import markupsafe
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from captum_adapters.curves import LINE_STYLES, plot_curves
from captum_adapters.evaluation.columns import column_of
from captum_adapters.evaluation.names import base_of
from captum_adapters.evaluation.records import SampleRecord
from captum_adapters.evaluation.report.aggregate import Group, Row, span
from captum_adapters.evaluation.report.tables import format_number, scale_of, wrap

if TYPE_CHECKING:
    from captum_adapters.evaluation.report.report import Report

# Methods and images of a montage
MONTAGE = 8
IMAGES = 6
# more curves than these cannot be told apart
CURVES = 10
# Relevance against the class from blue to cyan, for it from red to yellow, as in
# :func:`zennit_resnet.image.draw_overlay`, which loads PyTorch
RELEVANCE = LinearSegmentedColormap.from_list(
    "relevance",
    [(0, "#0cf"), (0.25, "#00f"), (0.5, "#0000c0"), (0.5, "#c00000"), (0.67, "#f00"),
     (0.83, "#f80"), (1, "#fe0")],
)
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


def _panel(title: str, key: str, label: str, score: str) -> Panel:
    """A single curve of the top p % of pixels."""
    return Panel(title, {key: title}, label, score)


KEPT = "Kept, in the order of relevance (%)"
INSIDE = "Share of the top p % inside of the mask"
PANELS = {
    "insertion_deletion": Panel(
        "Insertion and deletion", {"insertion": "Insertion", "deletion": "Deletion"},
        "Share of pixels inserted or deleted", "id", "fractions",
    ),
    "accuracy": _panel("Accuracy with the top p %", "accuracy", KEPT, "accuracy"),
    "pointing": _panel(INSIDE, "pointing", "Top p %", "pointing"),
    "distance": _panel("Distance of the top p % to the mask", "distance", "Top p %", "distance"),
}


class Picture(NamedTuple):
    """A picture as PNG, and what is to be seen."""

    title: str
    data: bytes
    about: str  # over what curves are means


# -- curves ----------------------------------------------------------------------------


def _collect(row: Row, key: str, where: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of samples with finite curves, the curves and positions, (n, points) each."""
    curves, positions = row.arrays(key), row.arrays(where)
    curves = curves[curves.index.isin(positions.index)]
    if not len(curves):
        return [], np.empty((0, 0)), np.empty((0, 0))
    y, x = np.stack([*curves]), np.stack([*positions[curves.index]])
    finite = (np.isfinite(y) & np.isfinite(x)).all(1)
    return curves.index[finite].tolist(), y[finite], x[finite]


def _draw(report: "Report", group: Group, panel: Panel) -> Optional[Picture]:
    """Mean curves of methods, with bands."""
    shown = [row for row in group.rows if any(len(row.arrays(key)) for key in panel.curves)]
    methods = [row for row in shown if not row.control]
    # those without a mean come last
    rank = {row.name: -row.quality(panel.score) for row in methods if row.has(panel.score)}
    ranked = sorted(methods, key=lambda row: rank.get(row.name, math.inf))
    best = [row.name for row in methods if row in ranked[:CURVES]]
    shown = [row for row in shown if row.control or row.name in best]
    if not shown:
        return None
    titles = panel.curves
    canvas = Figure(figsize=(3.4 + 4.2 * len(titles), 4.6), layout="constrained")
    lines: dict[str, Line2D] = {}
    counts: set[int] = set()
    panels = canvas.subplots(1, len(titles), squeeze=False)[0]
    for axes, (key, title) in zip(panels, titles.items()):
        first: set[str] = set()
        for row in shown:
            names, curves, positions = _collect(row, key, panel.positions)
            if not names:
                continue
            counts.add(len(names))
            if row is shown[0]:
                first = {*names}
            clusters = group.clusters(names, report.clusters)
            plot_curves(
                {row.name: curves}, positions, axes=axes, confidence=report.confidence,
                clusters=clusters, n_resamples=1000,
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
        lines.update(_draw_chance(axes, shown[0], key, panel.positions, first))
    if not counts:
        return None
    means = {row.name: row.mean(panel.score) for row in shown if row.has(panel.score)}
    texts = []
    for name in lines:
        text = wrap(name, 30)
        if name in means:
            text += f" ({format_number(means[name], scale_of(means[name], *means.values()))})"
        texts.append(text)
    # the legend must not be cut off
    height = 0.6 + 0.17 * sum(text.count("\n") + 1 for text in texts)
    canvas.set_figheight(max(canvas.get_figheight(), height))
    score = column_of(panel.score).title
    canvas.legend(
        list(lines.values()), texts, loc="outside right upper", alignment="left",
        title=f"({score})" if score else None, fontsize="small", frameon=False,
    )
    about = f"Means over {span(counts)} images, with {100 * report.confidence:g} % bands."
    if score:
        about += f" The mean {score} is in brackets."
    if len(best) < len(methods):
        about += f" The {len(best)} best of {len(methods)} methods are drawn."
    return Picture(panel.title, _png(canvas), about)


def _draw_chance(
    axes: Axes, row: Row, key: str, where: str, drawn: set[str]
) -> dict[str, Line2D]:
    """What is to be had without any explanation, and at most, for these samples."""
    lines: dict[str, Line2D] = {}
    style: Any = {"color": "black", "linewidth": 0.8}
    if row.has(f"{key}_chance"):
        lines["chance"] = axes.axhline(row.mean(f"{key}_chance"), linestyle=":", **style)
    names, curves, positions = _collect(row, f"{key}_ceiling", where)
    kept = [number for number, name in enumerate(names) if name in drawn]
    if kept:
        lines["ceiling"] = axes.plot(positions[0], curves[kept].mean(0), **style)[0]
    return lines


def draw_curves(report: "Report") -> dict[str, Picture]:
    """Curves of the ten best methods and all controls, by a name for their file."""
    pictures = {}
    several = len(report.groups) > 1
    for number, group in enumerate(report.groups, 1):
        panels = dict(PANELS)
        for key in sorted({str(key) for run in group.runs for key in run.curves}):
            if key.startswith("cross_accuracy:"):
                title = f"Accuracy of {key.partition(':')[2]} with the top p %"
                panels[key] = Panel(title, {key: title}, KEPT, "")
        for key, panel in panels.items():
            picture = _draw(report, group, panel)
            if picture is not None:
                name = re.sub(r"[^\w.-]+", "_", key) + f"_{number}" * several
                title = panel.title + f" ({group.name})" * several
                pictures[name] = picture._replace(title=title)
    return pictures


# -- examples --------------------------------------------------------------------------


class Tile(NamedTuple):
    """A heatmap on its picture, and the primary score."""

    overlay: Image.Image
    score: float


class Example(NamedTuple):
    """An image, and what methods say about it."""

    sample: str
    place: str  # such as "1 of 24", which is the best
    about: str  # the class that is explained, and what else is known
    picture: Image.Image
    tiles: list[Optional[Tile]]  # of each method, `None` if it has none


class Montage(NamedTuple):
    """The same images for all methods."""

    title: str  # empty if there is only one
    score: str  # title of the primary score
    rows: list[Row]
    examples: list[Example]
    note: str


def make_montages(report: "Report") -> list[Montage]:
    """For each group, images from best to worst with the maps of at most 8 methods."""
    found, primary = [], report.primary or ""
    for group in report.groups:
        title = f"Examples of {group.name}" if len(report.groups) > 1 else ""
        scored = [row for row in group.rows if row.has(primary)]
        rows = [row for row in scored if not row.control] or scored
        if rows:
            found.append(_make_montage(group, rows, primary, title))
    return found


def _make_montage(
    group: Group, methods: Sequence[Row], primary: str, title: str
) -> Montage:
    """The images that most methods have in common, evenly from best to worst."""
    score, sign = column_of(primary).title, column_of(primary).sign
    best = sorted(methods, key=lambda row: -row.quality(primary))[:MONTAGE]
    rows = [row for row in methods if row in best]
    # the score and map of each sample that has both
    scores, heatmaps = [row.of(primary) for row in rows], [row.arrays() for row in rows]
    found = [
        {name: (float(value), maps[name]) for name, value in values.items() if name in maps}
        for values, maps in zip(scores, heatmaps)
    ]
    known: dict[str, list[float]] = {}
    for name, (value, _) in chain.from_iterable(map(dict.items, found)):
        if name in group.samples and group.samples[name].picture is not None:
            known.setdefault(name, []).append(value)
    most = max(map(len, known.values()), default=0)
    means = {name: math.fsum(each) for name, each in known.items() if len(each) == most}
    order = sorted(means, key=lambda name: (-sign * means[name], name))
    note = ""
    if len(rows) < len(methods):
        note = f"The {len(rows)} best of {len(methods)} methods are shown. "
    if not order:
        return Montage(title, score, rows, [], f"{note}No pictures and heatmaps were kept.")
    places = np.unique(np.linspace(0, len(order) - 1, min(IMAGES, len(order))).round())
    examples = []
    for place in places.astype(int).tolist():
        name = order[place]
        sample = group.samples[name]
        picture = Image.open(io.BytesIO(sample.picture or b"")).convert("RGB")
        pairs = [each.get(name) for each in found]
        tiles = [pair and Tile(_draw_overlay(picture, pair[1]), pair[0]) for pair in pairs]
        rank = f"{place + 1} of {len(order)}"
        examples.append(Example(name, rank, _about(group, sample), picture, tiles))
    total = sum(sample.problem is None for sample in group.samples.values())
    note += (
        f"{len(examples)} of {len(order)} images, evenly from the best to the worst by the"
        f" mean {score} of these methods."
    )
    if len(order) < total:
        note += f" Of {total - len(order)} others, not all pictures and maps were kept."
    return Montage(title, score, rows, examples, note)


def _about(group: Group, sample: SampleRecord) -> str:
    """What is explained, and the label if it is another class."""
    about = group.class_name(sample.target)
    if sample.probability is not None and about:
        # kept together
        about += f" ({100 * sample.probability:.0f}\u00a0%)"
    if sample.label is not None and sample.label != sample.target:
        about += f", label: {group.class_name(sample.label)}"
    return about


def _draw_overlay(picture: Image.Image, heatmap: np.ndarray) -> Image.Image:
    """A heatmap in color on the picture in grey."""
    scaled = Image.fromarray(heatmap.astype(np.float32)).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    values = np.asarray(scaled)
    largest = np.percentile(np.abs(values), 99.5) or np.abs(values).max() or 1
    values = (values / largest).clip(-1, 1)
    opacity = Image.fromarray((230 * np.abs(values)).astype(np.uint8))
    color = Image.fromarray(RELEVANCE((values + 1) / 2, bytes=True)).convert("RGB")
    return Image.composite(color, picture.convert("L").convert("RGB"), opacity)


def draw_montage(montage: Montage) -> bytes:
    """A montage as PNG: a row for each image, a column for each method."""
    height, width = len(montage.examples), len(montage.rows) + 1
    canvas = Figure(figsize=(1.7 * width, 1.95 * height + 0.6), layout="constrained")
    panels = canvas.subplots(height, width, squeeze=False)
    titles = ["Image", *(row.name for row in montage.rows)]
    for example, line in zip(montage.examples, panels):
        scored = [tile and f"{montage.score} {tile.score:.3f}" for tile in example.tiles]
        pictures = [example.picture, *(tile and tile.overlay for tile in example.tiles)]
        for axes, picture, text in zip(line, pictures, [example.about, *scored]):
            axes.set(xticks=[], yticks=[], frame_on=False)
            axes.set_xlabel(wrap(text or "no map", 26), fontsize="x-small")
            if picture is not None:
                axes.imshow(picture)
    about = "Relevance for the class: red to yellow, against it: blue to cyan"
    canvas.suptitle(about, fontsize="small")
    for axes, title in zip(panels[0], titles):
        axes.set_title(wrap(title, 22), fontsize="x-small")
    return _png(canvas)


def _png(canvas: Figure) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=100, pil_kwargs={"optimize": True})
    return buffer.getvalue()


# -- page ------------------------------------------------------------------------------


def _uri(data: bytes, kind: str = "png") -> str:
    """A file as an address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _uri(buffer.getvalue(), "jpeg")


def _breaks(text: str) -> markupsafe.Markup:
    """A name that is broken at its joints."""
    escaped = str(markupsafe.escape(text))
    return markupsafe.Markup(re.sub(r"([_+:,/=])", r"\1<wbr>", escaped))


def make_page(
    report: "Report", curves: dict[str, Picture], montages: Sequence[Montage]
) -> str:
    """The report as one HTML page that needs no other file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("captum_adapters.evaluation.report", "."),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(uri=_uri, jpeg=_jpeg, number=format_number, breaks=_breaks)
    results = report.results()
    # those that are shown beside their table are not repeated
    titles = {table.title for table in results}
    shown = {text for title, text in report.beside if title in titles}
    return environment.get_template("report.html.jinja").render(
        report=report, results=results, curves=curves.values(), montages=montages,
        warnings=[text for text in report.warnings if text not in shown],
        columns=map(column_of, report.columns),
    )
