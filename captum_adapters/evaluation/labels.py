"""How labels of data become classes of a network."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from captum_adapters.evaluation.layouts import Listing, Sample


def to_number(text: str) -> Optional[int]:
    """An integer, or None if the text is none."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


class ClassMatcher:
    """Finds classes by their names, from the most to the least exact comparison."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.count = len(classes)
        self.levels: list[dict[str, list[int]]] = [{} for _ in range(5)]
        for index, name in enumerate(classes):
            for level, keys in zip(self.levels, self._keys(name)):
                for key in keys:
                    level.setdefault(key, []).append(index)

    @staticmethod
    def _keys(name: str) -> tuple[set[str], ...]:
        """As it is, in lower case, without a number, its first synonym, any synonym."""
        plain = " ".join(name.replace("_", " ").lower().split())
        bare = re.sub(r"^[0-9]{1,4}\. ?", "", plain)
        synonyms = [part.strip() for part in bare.split(",")]
        return {name.strip()}, {plain}, {bare}, {synonyms[0]}, {*synonyms} - {""}

    def find(self, label: str) -> list[int]:
        """Indices of classes with this name, or with this number."""
        for keys, level in zip(self._keys(label), self.levels) if label else ():
            hits = sorted({index for key in keys for index in level.get(key, ())})
            if hits:
                return hits
        number = to_number(label)
        return [number] if number is not None and 0 <= number < self.count else []


def match_labels(
    listing: "Listing", classes: Sequence[str], messages: list[str], ordered: bool
) -> dict[Any, tuple[list[int], str]]:
    """The indices of classes that each label may mean, and how they were found."""
    names = ClassMatcher(classes)
    labels = {sample.label for sample in listing.samples} - {None}
    numbers = {label: ([label], "index") for label in labels if isinstance(label, int)}
    texts = sorted(labels - {*numbers})
    order = listing.order
    # what has nothing but indices needs no order
    if ordered and (texts or not numbers):
        order = order or texts
        if len(order) != len(classes):
            raise ValueError(
                f"labels='order' needs a label for each of the network's {len(classes)}"
                f" classes, but there are {len(order)} ({', '.join(order[:5])})"
            )
        asked = "order, as asked for"
        return {**numbers, **{text: ([order.index(text)], asked) for text in texts}}
    found = {text: (names.find(text), "name") for text in texts}
    for text, (hits, _) in found.items():
        if hits == [to_number(text)]:
            found[text] = (hits, "index")
        elif not hits and text in listing.numbers:
            found[text] = ([listing.numbers[text]], "wnid")
    if found and not any(hits for hits, _ in found.values()):
        if not any(map(names.find, order)) and len(order) == len(classes):
            found = {text: ([order.index(text)], "order") for text in found}
            messages.append(
                "no label is the name of a class of the network: its"
                f" {len(classes)} classes are taken to be the labels in order, from"
                f" {order[0]!r} ({classes[0]}) to {order[-1]!r} ({classes[-1]})"
            )
        else:
            messages.append(
                f"no label is a class of the network, for instance {min(found)!r},"
                f" where the first class is {classes[0]!r}"
            )
    missing = [text for text in texts if not found[text][0]]
    if 0 < len(missing) < len(found):
        messages.append(
            f"{len(missing)} of {len(found)} labels are no class of the network"
            f" ({', '.join(map(repr, missing[:3]))}), and their images are left out: rename"
            " them, or leave labels out by labels='ignore' (--labels ignore)"
        )
    return {**numbers, **found}


def find_class(
    sample: "Sample", found: Mapping[Any, tuple[list[int], str]]
) -> "Sample":
    """A sample with the index of its class, or the problem that there is none."""
    label, problem = sample.label, sample.problem
    if problem is None and isinstance(label, str):
        hits = found[label][0]
        if not hits:
            problem = f"label {label!r} is not a class of the network"
        elif len(hits) > 1:
            problem = (
                f"label {label!r} is ambiguous: the network's classes"
                f" {', '.join(map(str, hits))} have this name"
            )
        else:
            label = hits[0]
    return sample._replace(label=label if problem is None else None, problem=problem)
