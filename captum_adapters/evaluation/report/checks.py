"""What to be wary of in a report: what is missing, and what may mislead."""

import math
from collections.abc import Iterator, Sequence

from captum_adapters.evaluation.columns import COLUMNS, column_of, counterpart_of
from captum_adapters.evaluation.names import base_of
from captum_adapters.evaluation.records import accuracy
from captum_adapters.evaluation.report.aggregate import (
    Group,
    Row,
    list_some,
    methods_of,
    settings_of,
    unfinished,
)
from captum_adapters.evaluation.report.tables import TOP, format_number, scale_of

# Share of tied pixels above which it matters how they are treated
TIED_SHARE = 0.05
# What runs on the same data have in common, and what it is called
SAMPLE_FIELDS = {
    "target": "explained class",
    "label": "label",
    "prediction": "predicted class",
    "content": "image or mask",
}


def introduce(groups: Sequence[Group]) -> Iterator[str]:
    """What to know first: whether the network is right, what its labels are, and how
    much of an interrupted run there is."""
    for group in groups:
        text = _introduce(group)
        yield f"{group.name}: {text}" if len(groups) > 1 else text
    for group in groups:
        for run, folder in zip(group.runs, group.folders):
            if unfinished(run):
                yield f"{folder}: {unfinished(run)}"


def _introduce(group: Group) -> str:
    """A sentence on the network of a group, and on its labels."""
    settings = settings_of(group.runs[0])
    network = " with ".join(
        str(settings[key]) for key in ("model", "weights_name") if settings.get(key)
    )
    # what is known of a run is known of a group, too
    right, total = accuracy(group.runs[0]._replace(samples=group.samples))
    if not total:
        return f"{network}: no image has a label, so its accuracy is not known."
    how = (settings.get("labels") or {}).get("matched_by")
    matched = f"Labels were matched to its classes by {how}"
    if how is None:
        matched = "How labels were matched to its classes was not kept"
    elif how == "order":
        matched += ", which is a guess: check it if the accuracy is low"
    share = f"{right} of {total} images ({100 * right / total:.1f} %)"
    return f"{network} classifies {share} as their labels say. {matched}."


def find_gaps(groups: Sequence[Group]) -> Iterator[str]:
    """Sentences on what is missing."""
    for group in groups:
        for run, name in zip(group.runs, group.folders):
            yield from (f"{name}: {message}" for message in run.messages)
            evaluated = set(methods_of(run))
            missing = [text for text in settings_of(run)["methods"] if text not in evaluated]
            if not evaluated:
                yield f"{name} has no records."
            elif missing:
                yield f"{name} has no records of {list_some(missing)}."
        left_out = sum(sample.problem is not None for sample in group.samples.values())
        if left_out:
            yield (
                f"{left_out} of {len(group.samples)} samples of {group.name} are left out,"
                " for the reasons under Problems."
            )
        rows = group.rows
        if any(not row.scores.index.equals(rows[0].scores.index) for row in rows):
            counts = {row.name: len(row.scores) for row in rows}
            most = max(counts.values())
            fewer = [f"{name} {count}" for name, count in counts.items() if count < most]
            listed = f" ({list_some(fewer)} of {most})" if fewer else ""
            yield (
                f"Methods of {group.name} are not evaluated on the same examples{listed}."
                " Means are over those of each method, comparisons over those that a method"
                " and the baseline have in common."
            )
        own = [row.name for row in rows if base_of(row.method) == "abn"]
        if own and len(rows) > len(own):
            yield f"{', '.join(own)}: explained and measured with its own network."


def find_warnings(groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    """What a reader may take for better than it is, after the title of the table that
    it is about, which is empty if it is about all."""
    for group in groups:
        yield from (("", text) for text in _warn_samples(group))
    known = {name for group in groups for row in group.rows for name in row.scores}
    names = [name for name in COLUMNS if name in known]
    # published protocols first
    names.sort(key=lambda name: counterpart_of(name) is None)
    for group in groups:
        for name in names:
            for text in _warn_score(group.rows, name, names):
                yield column_of(name).table, text
        for row in group.rows:
            listed = [name for name in TOP if row.has(name)]
            if listed and row.top_ties > TIED_SHARE:
                titles = ", ".join(column_of(name).title for name in listed)
                yield column_of(listed[0]).table, (
                    f"{row.name}: {100 * row.top_ties:.1f} % of pixels are tied with others,"
                    f" and have no order among these: {titles}"
                    f" {'are means' if len(listed) > 1 else 'is the mean'} over their orders,"
                    " and partly chance."
                )
        for row in group.rows:
            if row.mean("negative") > 0:
                yield column_of("negative").table, (
                    f"{row.name}: {100 * row.mean('negative'):.1f} % of its maps have no"
                    " positive value. Their top pixels are the least negative ones."
                )


def _warn_score(rows: Sequence[Row], name: str, names: Sequence[str]) -> Iterator[str]:
    """What there is to be said of a score."""
    ours = counterpart_of(name)
    # insertion and deletion are summed up in their difference
    if column_of(name).sign and not name.startswith(("insertion", "deletion")):
        yield from _warn_controls(rows, name)
    if name.startswith("id") and ours is not None and ours in names:
        if column_of(name).protocol == "keio":
            yield from _warn_ties(rows, name, ours)
        yield from _warn_ranks(rows, name, ours)
        yield from _warn_suffixes(rows, name, ours)


def _warn_samples(group: Group) -> Iterator[str]:
    """Where runs that are put together are not about the same classes."""
    for field, title in SAMPLE_FIELDS.items():
        found: dict[str, set[object]] = {}
        for run in group.runs:
            for name, sample in run.samples.items():
                if sample.problem is None:
                    found.setdefault(name, set()).add(getattr(sample, field))
        differing = [name for name, values in found.items() if len(values) > 1]
        if differing:
            yield (
                f"The runs of {group.name} differ in the {title} of {len(differing)} of"
                f" {len(found)} examples ({list_some(differing)}), so methods of different"
                " runs are not compared on the same grounds there."
            )


def _ranking(rows: Sequence[Row], name: str) -> list[Row]:
    """Methods that have a score, from best to worst."""
    methods = [row for row in rows if not row.control and row.has(name)]
    return sorted(methods, key=lambda row: (-row.quality(name), row.name))


def _warn_controls(rows: Sequence[Row], name: str) -> Iterator[str]:
    """Where maps that do not explain anything are better than methods."""
    methods, parts = _ranking(rows, name), []
    for control in rows:
        beaten = [row for row in methods if control.quality(name) > row.quality(name)]
        if control.control and beaten:
            parts.append(
                f"{control.name} ({format_number(control.mean(name))}) is better than"
                f" {len(beaten)} of {len(methods)} methods, up to {beaten[0].name}"
                f" ({format_number(beaten[0].mean(name))})"
            )
    if parts:
        yield f"Controls in {column_of(name).title}, {column_of(name).by}: {'; '.join(parts)}."


def _warn_ties(rows: Sequence[Row], published: str, ours: str) -> Iterator[str]:
    """What pixels of the same value gain by entering at once."""
    column = column_of(published)
    for row in rows:
        share, own = row.mean("tied_share"), row.mean(ours)
        gap = row.mean(published) - own
        if share > TIED_SHARE and not math.isnan(gap):
            yield (
                f"{row.name}: {100 * share:.1f} % of pixels are tied with others, and"
                f" {column.title} is {format_number(row.mean(published))} by the {column.by},"
                f" {format_number(own, scale_of(own, gap))} by our protocol, a difference of"
                f" {format_number(gap)}."
            )


def _warn_ranks(rows: Sequence[Row], published: str, ours: str) -> Iterator[str]:
    """Where methods change their order by the protocol."""
    after = [row.name for row in _ranking(rows, published) if row.has(ours)]
    before = [row.name for row in _ranking(rows, ours) if row.name in after]
    moves = [(before.index(name) + 1, new, name) for new, name in enumerate(after, 1)]
    moves = sorted(moves, key=lambda move: -abs(move[0] - move[1]))
    texts = [f"{name} from {old} to {new}" for old, new, name in moves if old != new]
    if texts:
        column = column_of(published)
        yield (
            f"{len(texts)} of {len(after)} methods change their rank in {column.title} from"
            f" our protocol to the {column.by}: {list_some(texts)}."
        )


def _warn_suffixes(rows: Sequence[Row], published: str, ours: str) -> Iterator[str]:
    """Where post-processing gains by a published protocol only."""
    column = column_of(published)
    for row, other in ((row, other) for row in rows for other in rows):
        if row.method.startswith(f"{other.method}+"):
            means = [item.mean(name) for name in (published, ours) for item in (row, other)]
            if means[0] > means[1] and means[2] <= means[3]:
                new, old, own, former = map(format_number, means)
                yield (
                    f"{row.name} is better than {other.name} in {column.title} by the"
                    f" {column.by} ({new} and {old}), but not by our protocol ({own} and"
                    f" {former})."
                )
