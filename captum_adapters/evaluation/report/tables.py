"""Tables of texts, as plain text, Markdown and LaTeX."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import pandas as pd

from captum_adapters.evaluation.columns import COLUMNS, column_of, counterpart_of
from captum_adapters.evaluation.report.aggregate import Row

# Scores of the top p % of pixels
TOP = [name for name, each in COLUMNS.items() if each.topic == "Top pixels" and each.sign]
# Width of a terminal
WIDTH = 100
KEY_WIDTH = 36
MARKED = "Bold: best method; !: control that is as good as that or better."


class Table(NamedTuple):
    """A table of texts."""

    title: str
    frame: pd.DataFrame
    note: str = ""
    texts: int = 1  # columns at the beginning that are no numbers
    # of each cell: "best", "above" (as good, but a control), or nothing
    marks: Optional[pd.DataFrame] = None

    @property
    def explained(self) -> str:
        """The note, with what marks mean."""
        marked = self.marks is not None and bool((self.marks != "").any(axis=None))
        return f"{self.note} {MARKED if marked else ''}".strip()

    @property
    def align(self) -> list[str]:
        """Alignment of columns."""
        numbers = len(self.frame.columns) - self.texts
        return ["left"] * self.texts + ["right"] * numbers

    def with_marks(
        self, best: str, above: str, escape: Callable[[str], str]
    ) -> pd.DataFrame:
        """The texts, with marks around them."""
        texts = self.frame.map(escape)
        if self.marks is not None:
            for mark, pattern in (("best", best), ("above", above)):
                texts = texts.where(self.marks != mark, texts.map(pattern.format))
        return texts


def format_number(value: float, like: Optional[float] = None) -> str:
    """A number with about three digits, or as many as another one has."""
    if math.isnan(value):
        return "–"
    size = abs(value if like is None else like)
    if size != 0 and not 5e-4 <= size < 1e6:
        return f"{value:.2e}"
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    text = f"{value:.{digits}f}"
    # no negative zero
    return text[1:] if text.startswith("-") and not float(text) else text


def scale_of(value: float, *others: float) -> float:
    """What a number is like: one near zero needs no more digits than those beside it."""
    known = [abs(other) for other in others if not math.isnan(other)]
    return value if abs(value) >= 5e-4 else max(known, default=value)


def format_interval(mean: float, low: float, high: float) -> str:
    """A mean with its interval, if there is one."""
    if math.isnan(low):
        return format_number(mean)
    like = scale_of(mean, low, high)
    return "{} [{}, {}]".format(*(format_number(value, like) for value in (mean, low, high)))


def cells_of(row: Row, names: Sequence[str]) -> dict[str, str]:
    """Cells of a method in a table of means, none if it has none of the scores."""
    known = [name for name in names if row.has(name)]
    if not known:
        return {}
    cells = {column_of(name).heading: "" for name in names}
    for name in known:
        column, (mean, *interval, _) = column_of(name), row.statistics.loc[name]
        # others are for information only
        text = format_interval(mean, *interval) if column.sign else format_number(mean)
        cells[column.heading] = text
    # where scores depend on how ties are treated
    published = any(map(counterpart_of, names))
    tied = row.mean("tied_share") if published else row.top_ties
    if (published or {*TOP} & {*names}) and not math.isnan(tied):
        cells["Ties"] = f"{100 * tied:.0f} %"
    most = max(row.statistics.loc[known, "examples"])
    return {**cells, "Images": f"{most:.0f}"}


def wrap(text: str, width: int) -> str:
    """Lines of a text, which is broken where names of methods and files have a joint."""
    lines = [""]
    for part in re.findall(rf"[^ ,:+/]{{0,{width - 1}}}[ ,:+/]?|.", text):
        if len(lines[-1] + part.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def escape_markdown(text: str) -> str:
    """Text that is not taken for markup."""
    text = re.sub(r"([\\|*<`])", r"\\\1", " ".join(text.split()))
    return text.replace("](", "]\\(")


def to_text(table: Table) -> str:
    """A table as plain text, in parts if it is too wide."""
    width = KEY_WIDTH if table.texts < len(table.frame.columns) else 40
    frame = table.with_marks("*{}", "!{}", lambda text: wrap(text, width))
    frame.columns = [wrap(title, 22) for title in frame.columns]
    widths = [
        2 + max(len(line) for text in [name, *frame[name]] for line in text.split("\n"))
        for name in frame
    ]
    keys = [*range(table.texts)]
    parts = [[*keys]]
    for number in range(table.texts, len(widths)):
        if sum(widths[each] for each in (*parts[-1], number)) > WIDTH and parts[-1] != keys:
            parts.append([*keys])
        parts[-1].append(number)
    texts = [
        _markdown(frame.iloc[:, part], [table.align[number] for number in part], "simple")
        for part in parts
    ]
    note = wrap(table.explained.replace("Bold:", "*:"), WIDTH)
    return "\n\n".join(filter(None, [table.title, *texts, note])) + "\n"


def _markdown(frame: pd.DataFrame, align: Sequence[str], style: str = "pipe") -> str:
    return frame.to_markdown(
        index=False, tablefmt=style, disable_numparse=True, colalign=align
    )


def to_markdown(table: Table) -> str:
    """A table as GitHub's Markdown."""
    frame = table.with_marks("**{}**", "{} !", escape_markdown)
    text = _markdown(frame.rename(columns=escape_markdown), table.align)
    parts = [f"### {escape_markdown(table.title)}", text, escape_markdown(table.explained)]
    return "\n\n".join(filter(None, parts)) + "\n"


LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "³": "$^3$"},
    **{"α": "$\\alpha$", "β": "$\\beta$", "γ": "$\\gamma$", "ε": "$\\varepsilon$"},
    **{"−": "$-$", "–": "--", "…": "\\ldots{}"},
}


def escape_latex(text: str) -> str:
    """Text that is not taken for commands, with minus signs before numbers."""
    text = "".join(LATEX.get(char, char) for char in " ".join(text.split()))
    text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)
    # at the beginning of a row, it would be taken for an option
    return f"{{}}{text}" if text.startswith("[") else text


def to_latex(table: Table) -> str:
    """A table for the package booktabs."""
    frame = table.with_marks("\\textbf{{{}}}", "{} !", escape_latex)
    frame.columns = [escape_latex(title) for title in frame.columns]
    return frame.to_latex(
        index=False,
        caption=escape_latex(f"{table.title}. {table.explained}".strip()),
        column_format="".join(side[0] for side in table.align),
    )


RENDERERS: dict[str, Callable[[Table], str]] = {
    "terminal": to_text,
    "markdown": to_markdown,
    "latex": to_latex,
}


def render_list(title: str, lines: Sequence[str], format: str) -> str:
    """Sentences under a title, for the terminal or as Markdown."""
    head = [f"{title}:"]
    if format == "markdown":
        head, lines = [f"### {title}", ""], [*map(escape_markdown, lines)]
    return "\n".join([*head, *(f"- {line}" for line in lines)]) + "\n"
