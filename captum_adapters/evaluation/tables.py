"""Tables as plain text, Markdown, LaTeX and HTML."""

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple, Optional

WIDTH = 100
# Names of methods are broken to leave space for three means with intervals
KEY_WIDTH = 28
# How cells are marked in plain text
MARKS = {"best": "*", "above": "!"}
MARKED = "Bold: best method; !: control that is as good as that or better."


class Cell(NamedTuple):
    """Text in a table, and `"best"` or `"above"` (better, but a control)."""

    text: str
    mark: str = ""


class Table(NamedTuple):
    """A table in any format.

    Attributes:

        title (str): Its title.
        header (tuple[str]): Titles of the columns.
        sections (tuple): Pairs of a title, which may be empty, and rows of
                :class:`Cell`.
        note (str): What to know about it.
        text_columns (int): Number of columns at the beginning that are text.
    """

    title: str
    header: tuple[str, ...]
    sections: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    note: str = ""
    text_columns: int = 1

    @property
    def marked(self) -> bool:
        """Whether there is anything to explain about marks."""
        return any(
            cell.mark for _, rows in self.sections for row in rows for cell in row
        )


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


def wrap(text: str, width: int) -> list[str]:
    """Lines of a text, which are broken where names of methods and files have a joint."""
    lines = [""]
    for part in re.findall(r"[^ ,:+/]*[ ,:+/]?", text):
        while len(lines[-1]) + len(part.rstrip()) > width:
            if lines[-1]:
                lines.append("")
            else:
                lines[-1:], part = [part[:width], ""], part[width:]
        lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()] or [""]


def _share(widths: Sequence[int], space: int) -> list[int]:
    """Widths of which the widest are cut to an equal one, so that all fit."""
    shares = dict.fromkeys(range(len(widths)), 0)
    for left, number in enumerate(sorted(shares, key=lambda number: widths[number])):
        shares[number] = min(widths[number], max(8, space // (len(widths) - left)))
        space -= shares[number]
    return [*shares.values()]


def _to_text(table: Table) -> str:
    """A table as plain text, in parts if it is too wide."""
    keys = table.text_columns
    body = [row for _, rows in table.sections for row in rows]
    marks = [
        [MARKS.get(cell.mark, " ") + cell.text for cell in row[keys:]] for row in body
    ]
    widths = [
        max([10, *(len(row[number]) for row in marks)])
        for number in range(len(table.header) - keys)
    ]
    titles = [wrap(title, width) for title, width in zip(table.header[keys:], widths)]
    full = [
        max([len(table.header[number]), *(len(row[number].text) for row in body)])
        for number in range(keys)
    ]
    space = (
        KEY_WIDTH
        if keys == 1 < len(table.header)
        else WIDTH - sum(widths) - 2 * len(table.header)
    )
    spaces = _share(full, space)
    texts = [
        [wrap(cell.text, limit) for cell, limit in zip(row, spaces)] for row in body
    ]
    heads = [wrap(title, limit) for title, limit in zip(table.header, spaces)]
    left = sum(spaces) + 2 * (keys - 1)

    def line(
        cells: Sequence[list[str]], values: Sequence[list[str]], chunk: Sequence[int]
    ) -> list[str]:
        lines = []
        for number in range(max(map(len, [*cells, *values]))):
            parts = [
                (cell[number] if number < len(cell) else "").ljust(space)
                for cell, space in zip(cells, spaces)
            ]
            parts += [
                (value[number] if number < len(value) else "").rjust(widths[index])
                for index, value in zip(chunk, values)
            ]
            lines.append("  ".join(parts).rstrip())
        return lines

    chunks: list[list[int]] = [[]]
    for number, width in enumerate(widths):
        used = left + sum(widths[index] + 2 for index in chunks[-1])
        if chunks[-1] and used + width + 2 > WIDTH:
            chunks.append([])
        chunks[-1].append(number)
    lines = [*wrap(table.title, WIDTH), ""]
    for chunk in chunks:
        lines += line(heads, [titles[index] for index in chunk], chunk)
        lines.append("-" * (left + sum(widths[index] + 2 for index in chunk)))
        position = 0
        for title, rows in table.sections:
            lines += [f"{title}:"] if title else []
            for row in range(position, position + len(rows)):
                lines += line(
                    texts[row], [[marks[row][index]] for index in chunk], chunk
                )
            position += len(rows)
        lines.append("")
    marks_note = "*: best method; !: control that is as good as that or better."
    for note in (table.note, marks_note if table.marked else ""):
        lines += wrap(note, WIDTH) if note else []
    return "\n".join(lines).rstrip() + "\n"


def _mark(cell: Cell, text: str, bold: str) -> str:
    """The text of a cell with its mark, where there is bold type."""
    return (
        bold.format(text) if cell.mark == "best" else f"{text} !" if cell.mark else text
    )


def _markdown(text: str) -> str:
    """Text that is not taken for markup."""
    text = re.sub(r"([\\|*<`])", r"\\\1", " ".join(text.split()))
    return text.replace("](", "]\\(")


def _to_markdown(table: Table) -> str:
    """A table as GitHub's Markdown."""
    lines = [f"### {_markdown(table.title)}", ""]
    align = ["---"] * table.text_columns + ["---:"] * (
        len(table.header) - table.text_columns
    )
    for cells in (map(_markdown, table.header), align):
        lines.append(f"| {' | '.join(cells)} |")
    for title, rows in table.sections:
        if title:
            lines.append(f"| *{_markdown(title)}* |{' |' * (len(table.header) - 1)}")
        for row in rows:
            texts = []
            for cell in row:
                texts.append(_mark(cell, _markdown(cell.text), "**{}**"))
            lines.append(f"| {' | '.join(texts)} |")
    note = " ".join([_markdown(table.note), MARKED if table.marked else ""]).strip()
    return "\n".join([*lines, *(["", note] if note else [])]) + "\n"


LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "³": "$^3$",
    "α": "$\\alpha$",
    "β": "$\\beta$",
    "γ": "$\\gamma$",
    "ε": "$\\varepsilon$",
    "−": "$-$",
    "–": "--",
    "…": "\\ldots{}",
}


def _latex(text: str) -> str:
    """Text that is not taken for commands, with minus signs before numbers."""
    text = "".join(LATEX.get(char, char) for char in " ".join(text.split()))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)


def _to_latex(table: Table) -> str:
    """A table for the package booktabs."""
    columns = len(table.header)
    align = "l" * table.text_columns + "r" * (columns - table.text_columns)
    note = f"{table.title}. {table.note} {MARKED if table.marked else ''}".strip()
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(note)}}}",
        f"\\begin{{tabular}}{{{align}}}",
        "\\toprule",
        f"{' & '.join(map(_latex, table.header))} \\\\",
    ]
    for title, rows in table.sections:
        lines.append("\\midrule")
        if title:
            lines.append(
                f"\\multicolumn{{{columns}}}{{l}}{{\\emph{{{_latex(title)}}}}} \\\\"
            )
        for row in rows:
            texts = []
            for cell in row:
                texts.append(_mark(cell, _latex(cell.text), "\\textbf{{{}}}"))
            # a row that begins with a bracket would be taken for an option
            lines.append(f"{{}}{' & '.join(texts)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


RENDERERS: dict[str, Callable[[Table], str]] = {
    "terminal": _to_text,
    "markdown": _to_markdown,
    "latex": _to_latex,
}


def render_list(title: str, lines: Sequence[str], format: str) -> str:
    """Sentences under a title, for the terminal or as Markdown."""
    if format == "markdown":
        return (
            "\n".join([f"### {title}", "", *(f"- {_markdown(line)}" for line in lines)])
            + "\n"
        )
    wrapped = [
        ("- " if number == 0 else "  ") + part
        for line in lines
        for number, part in enumerate(wrap(line, WIDTH - 2))
    ]
    return "\n".join([f"{title}:", *wrapped]) + "\n"


def to_html(table: Table) -> str:
    """A table that scrolls if there is no space for it."""
    keys = table.text_columns
    parts = [
        f'<div class="scroll" tabindex="0"><table><caption>{escape(table.title)}</caption><thead><tr>'
    ]
    parts += [
        f'<th scope="col"{"" if number < keys else " class=number"}>{escape(title)}</th>'
        for number, title in enumerate(table.header)
    ]
    parts.append("</tr></thead>")
    for title, rows in table.sections:
        parts.append("<tbody>")
        if title:
            parts.append(
                f'<tr><th scope="rowgroup" class="section" colspan="{len(table.header)}">'
                f"{escape(title)}</th></tr>"
            )
        for row in rows:
            parts.append("<tr>")
            for number, cell in enumerate(row):
                # names of methods and files may be broken at their joints
                text = re.sub(
                    r"(?<=[^\s,:+/])([,:+/])(?=\S)", r"\1<wbr>", escape(cell.text)
                )
                text = _mark(cell, text, "<strong>{}</strong>")
                if number == 0:
                    parts.append(f'<th scope="row">{text}</th>')
                else:
                    parts.append(
                        f"<td{'' if number < keys else ' class=number'}>{text}</td>"
                    )
            parts.append("</tr>")
        parts.append("</tbody>")
    note = " ".join([table.note, MARKED if table.marked else ""]).strip()
    parts.append(
        "</table></div>" + (f'<p class="note">{escape(note)}</p>' if note else "")
    )
    return "".join(parts)
