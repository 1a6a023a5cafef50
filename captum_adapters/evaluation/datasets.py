"""Samples of a data set with labels, masks and boxes: finding and reading them.

Nothing is decoded before it is needed, and a file that cannot be used never stops a
run: it has a `problem`, which says why.
"""

import csv
import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional, Union
from xml.etree import ElementTree

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from captum_adapters.metrics import boxes_to_masks
from zennit_resnet.image import read_image

Box = tuple[float, float, float, float]

LAYOUTS = ("folder", "csv", "imagenet", "cub")
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
MANIFESTS = ("manifest.csv", "labels.csv")
CORNERS = ("x0", "y0", "x1", "y1")
SPLITS = ("train", "val", "valid", "validation", "test")
WNID = re.compile(r"n\d{8}")
ILSVRC = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
CUB_FILES = ("images", "image_class_labels", "train_test_split", "classes")


class Sample(NamedTuple):
    """An image of a data set, which has not been read yet.

    Attributes:

        name (str): Path relative to the root of the data, with `/`. Unique.
        path (Path): Path of the image.
        label (int, optional): Index of its class in the network, `None` if unknown.
        mask (Path, optional): Path of the mask of the object.
        boxes (tuple): Bounding boxes (x0, y0, x1, y1) of the object in pixels of the
                stored image, see :func:`captum_adapters.metrics.boxes_to_masks`.
        problem (str, optional): Why it cannot be used, as known without reading it.
    """

    name: str
    path: Path
    label: Optional[int]
    mask: Optional[Path] = None
    boxes: tuple[Box, ...] = ()
    problem: Optional[str] = None


class Samples(NamedTuple):
    """What a folder or a CSV file has.

    Attributes:

        layout (str): One of :data:`LAYOUTS`.
        root (Path): Folder that names are relative to.
        samples (tuple[Sample]): Samples in the order of their names.
        messages (tuple[str]): What the user should know of how labels were understood,
                and of what was left out, a line each.
    """

    layout: str
    root: Path
    samples: tuple[Sample, ...]
    messages: tuple[str, ...] = ()


class Loaded(NamedTuple):
    """An image ready for the network.

    Attributes:

        image (Tensor, optional): Normalized image of shape (3, height, width), `None`
                if it could not be read.
        mask (Tensor, optional): Bool of shape (height, width), in the geometry of the
                image. `None` if there is none.
        problem (str, optional): Why there is no image.
        note (str, optional): Why there is no mask, although the sample lists one.
    """

    image: Optional[Tensor]
    mask: Optional[Tensor]
    problem: Optional[str]
    note: Optional[str]


class LoadedBatch(NamedTuple):
    """The fields of several :class:`Loaded`, as lists of equal length."""

    images: list[Optional[Tensor]]
    masks: list[Optional[Tensor]]
    problems: list[Optional[str]]
    notes: list[Optional[str]]


class _Entry(NamedTuple):
    """A sample with its label as the data gives it: a name, or already an index."""

    name: str
    path: Path
    label: Optional[str] = None
    target: Optional[int] = None
    mask: Optional[Path] = None
    boxes: tuple[Box, ...] = ()
    problem: Optional[str] = None


class _Listing(NamedTuple):
    """What a layout has, before labels become classes of the network.

    `order` are labels in the order of the classes, used if they match none by name.
    """

    root: Path
    entries: list[_Entry]
    order: Sequence[str] = ()
    numbers: Mapping[str, int] = {}
    annotations: Optional[Path] = None


def read_samples(
    path: Union[str, Path],
    classes: Sequence[str],
    layout: Optional[str] = None,
    split: Optional[str] = None,
    labels: str = "given",
    limit: Optional[int] = None,
    seed: int = 0,
) -> Samples:
    """Find the images of a data set, with their labels, masks and boxes.

    Labels become classes of the network by name, in upper or lower case, with
    underscores or spaces, with or without a number in front as CUB-200-2011 has them
    (`001.Black_footed_Albatross`), and with or without synonyms as ImageNet has them
    (`tench, Tinca tinca`). If no folder is named as a class, but there are as many
    folders as classes, these are taken in sorted order, which
    :class:`torchvision.datasets.ImageFolder` does, and a message says so. A label that
    the network does not have, or that several classes have, makes a `problem`.

    Args:

        path (str or Path): Folder, or a CSV file.
        classes (sequence of str): Names of the network's classes.
        layout (str, optional): How the data is laid out. `None` recognizes it.

                - `"folder"`: the label is the name of the top folder that an image is
                  in, at any depth. Images outside of folders have no label.
                - `"csv"`: a CSV file, or a folder with `manifest.csv` or `labels.csv`.
                  Paths are relative to it. The column `image` or `file` is necessary.
                  Others are `label` (name or index from 0), `wnid`, `class_index` (used
                  if its largest value is that of the network's last class, unless
                  labels tell another order), `imagenet_index` (for 1000 classes),
                  `mask`, `split`, and boxes as `x0`, `y0`, `x1`, `y1`. An image with
                  several boxes has several rows, or has them in `boxes.csv` beside it.
                - `"imagenet"`: validation images of ImageNet, in folders named by
                  wnid, or in one folder with the development kit's ground truth and
                  `meta.mat`, or with annotations, somewhere near. Boxes are from
                  `Annotations/CLS-LOC/val`, if it is there.
                - `"cub"`: CUB-200-2011, with boxes and segmentations if they are there.

                Default: `None`
        split (str, optional): Part of the data: `"train"` or `"test"` of CUB-200-2011,
                which is `"test"` by default; the name of a folder in `path`, or a value
                in the column `split` of a CSV file.
                Default: `None`
        labels (str, optional): `"given"`, or `"ignore"` to have none at all.
                Default: `"given"`
        limit (int, optional): Take a random choice of this many images, if there are
                more. It is drawn from those without a problem, unless all have one, and
                with as many of each label as possible: numbers differ by at most one,
                except where a label has no more images. A larger limit adds images to
                those of a smaller.
                Default: `None`
        seed (int, optional): Seed of the choice, which depends on nothing else but the
                names and labels of the images.
                Default: `0`

    Returns:
        Samples: The samples in the order of their names.

    Raises:
        ValueError: If there are no images, or the layout does not fit. The message is a
                single line.

    Examples::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from captum_adapters.evaluation.datasets import read_samples
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for label in ("sea_lion", "unicorn"):
        ...         Path(folder, label).mkdir()
        ...         Image.new("RGB", (9, 9)).save(Path(folder, label, "1.png"))
        ...     samples = read_samples(folder, ["otter", "Sea lion"]).samples
        >>> [(sample.name, sample.label, sample.problem) for sample in samples]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('sea_lion/1.png', 1, None),
         ('unicorn/1.png', None, "label 'unicorn' is not a class of the network")]
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if labels not in ("given", "ignore"):
        raise ValueError(f"labels={labels!r} is neither 'given' nor 'ignore'")
    if labels == "given" and not classes:
        raise ValueError("there are no names of classes, which labels need")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not at least 1")
    # not resolved, as names are those that the user sees
    root = Path(os.path.abspath(path))
    if not root.exists():
        raise ValueError(f"there is no file or folder {path}")
    messages: list[str] = []
    try:
        if layout is None:
            layout = _recognize(root, split)
        if layout != "csv" and not root.is_dir():
            raise ValueError(f"{root} is not a folder, as the layout {layout!r} needs")
        readers: dict[str, Callable[..., _Listing]] = {
            "folder": _read_folder,
            "csv": _read_csv,
            "imagenet": _read_imagenet,
            "cub": _read_cub,
        }
        # without classes, labels are not looked for
        wanted = () if labels == "ignore" else classes
        listing = readers[layout](root, split, wanted, messages)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_line(error)})") from error
    if not listing.entries:
        part = "" if split is None else f" with split {split!r}"
        raise ValueError(f"there are no images in {path}{part}")
    if labels == "ignore":
        messages.clear()
        samples = [_sample(entry, None) for entry in listing.entries]
    else:
        samples = _assign(listing, classes, messages)
    samples.sort(key=lambda sample: sample.name)
    if limit is not None and limit < len(samples):
        samples = _choose(samples, limit, seed, messages)
    if listing.annotations is not None:
        samples = [_annotate(sample, listing.annotations) for sample in samples]
    return Samples(layout, listing.root, tuple(samples), tuple(messages))


# -- layouts ---------------------------------------------------------------------------


def _recognize(root: Path, split: Optional[str]) -> str:
    """Name of the layout."""
    if root.is_file() or any((root / name).is_file() for name in MANIFESTS):
        return "csv"
    if (_cub_root(root) / "images.txt").is_file():
        return "cub"
    if split in (None, "val"):
        found = _imagenet_images(root)
        # without either, a folder of these images has no labels
        known = _truth(root) is not None or _annotations(root) is not None
        if found is not None and (found[1] or known):
            return "imagenet"
    return "folder"


def _read_folder(
    root: Path, split: Optional[str], classes: Sequence[str], messages: list[str]
) -> _Listing:
    """A folder of images, or of a folder for each class."""
    folder = root if split is None else root / split
    if not folder.is_dir():
        raise ValueError(f"there is no folder {split!r} in {root} for this split")
    tops = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    if split is None and tops and set(tops) <= set(SPLITS):
        raise ValueError(
            f"{root} has the folders {', '.join(tops)}: choose one of them as the split"
        )
    entries = []
    for image in _walk(folder):
        parts = image.relative_to(folder).parts
        label = parts[0] if len(parts) > 1 else None
        entries.append(_Entry(_name(image, root), image, label))
    numbers: Mapping[str, int] = {}
    if len(classes) == 1000 and any(WNID.fullmatch(name) for name in tops):
        numbers = {wnid: index for index, wnid in enumerate(_wnids(root))}
    return _Listing(root, entries, tops, numbers)


def _read_csv(
    root: Path, split: Optional[str], classes: Sequence[str], messages: list[str]
) -> _Listing:
    """A CSV file, with a row for each image or box."""
    file = root
    if root.is_dir():
        found = [root / name for name in MANIFESTS if (root / name).is_file()]
        if not found:
            raise ValueError(f"there is no {' or '.join(MANIFESTS)} in {root}")
        file = found[0]
    root = file.parent
    columns, rows = _table(file)
    if split is not None:
        if "split" not in columns:
            raise ValueError(f"{file} has no column 'split' to choose {split!r} from")
        rows = [row for row in rows if row["split"] == split]
    label_of = _row_labels(columns, rows, classes, messages)
    entries: dict[str, _Entry] = {}
    for row in rows:
        path = root / row["image"]
        mask = root / row["mask"] if row.get("mask") else None
        entry = _Entry(_name(path, root), path, *label_of(row), mask, _row_boxes(row))
        first = entries.setdefault(entry.name, entry)
        if first is not entry:
            entries[entry.name] = _merge(first, entry)
    beside = root / "boxes.csv"
    if beside.is_file() and beside != file:
        boxes: dict[str, list[Box]] = defaultdict(list)
        for row in _table(beside, CORNERS)[1]:
            boxes[_name(root / row["image"], root)].extend(_row_boxes(row))
        for name in boxes.keys() & entries.keys():
            entry = entries[name]
            entries[name] = entry._replace(boxes=(*entry.boxes, *boxes[name]))
    wnids = sorted({entry.label for entry in entries.values() if entry.label})
    order = wnids if all(WNID.fullmatch(wnid) for wnid in wnids) else ()
    return _Listing(root, list(entries.values()), order)


def _table(
    file: Path, needed: Sequence[str] = ()
) -> tuple[set[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file, with the path of the image as `image`."""
    try:
        # spreadsheets write a byte order mark
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            columns = [name.strip() for name in next(reader, [])]
            rows: list[dict[str, str]] = []
            column = next((name for name in ("image", "file") if name in columns), None)
            if column is None:
                raise ValueError(
                    f"{file} has no column 'image' or 'file', but"
                    f" {', '.join(columns[:20]) or 'none at all'}"
                )
            if needed or not set(CORNERS).isdisjoint(columns):
                missing = [name for name in CORNERS if name not in columns]
                if missing:
                    raise ValueError(f"{file} has no column {missing[0]!r} for boxes")
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                row = dict.fromkeys(columns, "")
                row.update(zip(columns, (cell.strip() for cell in cells)))
                row.update(image=row[column], where=f"{file}, line {reader.line_num}")
                if not row["image"]:
                    raise ValueError(f"{row['where']}: the image's path is missing")
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8 ({error})") from error
    return set(columns), rows


def _row_boxes(row: Mapping[str, str]) -> tuple[Box, ...]:
    """The box of a row, if it has one."""
    texts = [row.get(name, "") for name in CORNERS]
    if not any(texts):
        return ()
    try:
        x0, y0, x1, y1 = map(float, texts)
    except ValueError:
        raise ValueError(
            f"{row['where']}: the box ({', '.join(texts)}) is not four numbers"
        ) from None
    return ((x0, y0, x1, y1),)


def _row_labels(
    columns: set[str],
    rows: Sequence[Mapping[str, str]],
    classes: Sequence[str],
    messages: list[str],
) -> Callable[[Mapping[str, str]], tuple[Optional[str], Optional[int]]]:
    """Function for the label of a row as a text and, if a column has it, an index."""
    known = {"label", "wnid", "class_index", "imagenet_index"} & columns
    if not known:
        messages.append("the CSV file has no column 'label': the labels are unknown")
    index: Optional[str] = None
    if "imagenet_index" in columns and len(classes) == 1000:
        index = "imagenet_index"
    elif "class_index" in columns:
        numbers = [_number(row["class_index"]) for row in rows]
        count = 1 + max((num for num in numbers if num is not None), default=-1)
        names = _Names(classes)
        found = [names.find(row.get("label", "")) for row in rows]
        if any(
            len(hits) == 1 and num not in (None, hits[0])
            for hits, num in zip(found, numbers)
        ):
            messages.append(
                "class_index has other classes than the network, or another order:"
                " labels are matched by name"
            )
        elif count == len(classes):
            index = "class_index"
        elif not any(found):
            messages.append(
                f"class_index suggests {count} classes, but the network has"
                f" {len(classes)}: it is not used"
            )

    def label_of(row: Mapping[str, str]) -> tuple[Optional[str], Optional[int]]:
        number = _number(row[index]) if index else None
        text = row.get("label") or row.get("wnid")
        if number is None and not text:
            # what is given, but cannot be used, has to become a problem
            given = [f"{key} {row[key]}" for key in sorted(known) if row[key]]
            text = given[0] if given else None
        elif index and number is not None and not 0 <= number < len(classes):
            return f"{index} {number}", None
        return text, number

    return label_of


def _number(text: str) -> Optional[int]:
    """An integer, or None if the text is none."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


def _merge(first: _Entry, other: _Entry) -> _Entry:
    """Join two rows of the same image."""
    label = first.label if first.label is not None else other.label
    target = first.target if first.target is not None else other.target
    mask = first.mask or other.mask
    problem = first.problem
    if (other.label or label, other.mask or mask) != (label, mask):
        problem = "it is listed several times, with different labels or masks"
    elif other.target not in (None, target):
        problem = "it is listed several times, with different classes"
    boxes = tuple(dict.fromkeys((*first.boxes, *other.boxes)))
    return first._replace(
        label=label, target=target, mask=mask, boxes=boxes, problem=problem
    )


def _read_imagenet(
    root: Path, split: Optional[str], classes: Sequence[str], messages: list[str]
) -> _Listing:
    """Validation images of ImageNet."""
    if split not in (None, "val"):
        raise ValueError(
            f"there is no split {split!r} of ImageNet's validation images: choose"
            " layout 'folder' for another folder"
        )
    images = _imagenet_images(root)
    if images is None:
        raise ValueError(
            f"{root} has neither folders named by wnid, nor images named"
            " ILSVRC2012_val_00000001.JPEG, directly or in val"
        )
    folder, tops = images
    annotations = _annotations(root)
    paths = list(_walk(folder))
    order: Sequence[str] = tops
    found: dict[str, str] = {}
    truth = _truth(root)
    if tops:
        entries = [
            _Entry(_name(path, root), path, path.relative_to(folder).parts[0])
            for path in paths
            if path.parent != folder
        ]
    else:
        paths = [path for path in paths if ILSVRC.fullmatch(path.name)]
        if truth is not None and classes:
            found = _ground_truth(truth, root)
        elif annotations is not None and classes:
            for path in paths:
                wnid = _parse(annotations / f"{path.stem}.xml")[0]
                if wnid is not None:
                    found[path.stem] = wnid
            order = sorted(set(found.values()))
        else:
            messages.append(
                "there is neither a ground truth nor annotations near the images: the"
                " labels are unknown"
            )
        entries = [
            _Entry(_name(path, root), path, found.get(path.stem)) for path in paths
        ]
    numbers: Mapping[str, int] = {}
    if len(classes) == 1000:
        numbers = {wnid: index for index, wnid in enumerate(_wnids(root))}
    return _Listing(root, entries, order, numbers, annotations)


def _imagenet_images(root: Path) -> Optional[tuple[Path, list[str]]]:
    """Folder with images of ImageNet, and its folders named by wnid, if any."""
    for name in ("val", "Data/CLS-LOC/val", ""):
        folder = root / name
        if not folder.is_dir():
            continue
        items = _visible(folder)
        tops = sorted(item.name for item in items if item.is_dir())
        if tops and all(WNID.fullmatch(top) for top in tops):
            return folder, tops
        if any(ILSVRC.fullmatch(item.name) for item in items):
            return folder, []
    return None


def _near(root: Path, names: Iterable[str]) -> Optional[Path]:
    """The first of the paths, in the folder or in one of the three above."""
    bases = (root, *list(root.parents)[:3])
    paths = (base / name for name in names for base in bases)
    return next((path for path in paths if path.exists()), None)


def _devkit(name: str) -> list[str]:
    kit = "ILSVRC2012_devkit_t12"
    return [f"{folder}{name}" for folder in ("", "data/", f"{kit}/", f"{kit}/data/")]


def _truth(root: Path) -> Optional[Path]:
    return _near(root, _devkit("ILSVRC2012_validation_ground_truth.txt"))


def _annotations(root: Path) -> Optional[Path]:
    return _near(root, ("Annotations/CLS-LOC/val",))


def _meta(root: Path) -> Optional[dict[int, str]]:
    """The wnid of each ILSVRC id from the development kit, if it is there."""
    file = _near(root, _devkit("meta.mat"))
    if file is None:
        return None
    try:
        synsets = np.atleast_1d(scipy.io.loadmat(file, squeeze_me=True)["synsets"])
        # what has children is no class, but a group of them
        return {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
            for synset in synsets
            if int(synset["num_children"]) == 0
        }
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{file} is not ILSVRC2012's ({_line(error)})") from error


def _wnids(root: Path) -> list[str]:
    """The 1000 wnids in the order of ImageNet's classes, empty if not known."""
    meta = _meta(root)
    if meta is not None:
        wnids = set(meta.values())
    else:
        file = _near(root, ("LOC_synset_mapping.txt", "synset_words.txt"))
        wnids = set()
        if file is not None:
            lines = file.read_text(encoding="utf-8").splitlines()
            wnids = {line.split()[0] for line in lines if line.strip()}
    return sorted(wnids) if len(wnids) == 1000 else []


def _ground_truth(file: Path, root: Path) -> dict[str, str]:
    """The wnid of each image by its name without suffix."""
    meta = _meta(root)
    if meta is None:
        raise ValueError(f"there is no meta.mat of the development kit beside {file}")
    try:
        numbers = [int(line) for line in file.read_text(encoding="utf-8").split()]
        return {
            f"ILSVRC2012_val_{num:08d}": meta[number]
            for num, number in enumerate(numbers, 1)
        }
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} does not fit meta.mat ({error})") from error


def _parse(file: Path) -> tuple[Optional[str], tuple[Box, ...]]:
    """Wnid and boxes of an annotation, which has none if it cannot be read."""
    try:
        objects = ElementTree.parse(file).getroot().findall("object")
        boxes = []
        for item in objects:
            corners = [float(item.findtext(f"bndbox/{key}", "")) for key in
                       ("xmin", "ymin", "xmax", "ymax")]
            # pixels are counted from 1, and the last is inside
            boxes.append((corners[0] - 1, corners[1] - 1, corners[2], corners[3]))
        return (objects[0].findtext("name") if objects else None), tuple(boxes)
    except (OSError, ElementTree.ParseError, ValueError):
        return None, ()


def _annotate(sample: Sample, folder: Path) -> Sample:
    """Add the boxes of the image's annotation."""
    return sample._replace(boxes=_parse(folder / f"{sample.path.stem}.xml")[1])


def _cub_root(root: Path) -> Path:
    inner = root / "CUB_200_2011"
    return inner if (inner / "images.txt").is_file() else root


def _read_cub(
    root: Path, split: Optional[str], classes: Sequence[str], messages: list[str]
) -> _Listing:
    """CUB-200-2011 in its official layout."""
    if split not in (None, "train", "test"):
        raise ValueError(f"CUB-200-2011 has no split {split!r}: choose train or test")
    base = _cub_root(root)
    for name in CUB_FILES:
        if not (base / f"{name}.txt").is_file():
            raise ValueError(f"{base} is not CUB-200-2011: {name}.txt is missing")
    images, numbers, train, names = (_pairs(base / f"{name}.txt") for name in CUB_FILES)
    boxes = {}
    if (base / "bounding_boxes.txt").is_file():
        boxes = _pairs(base / "bounding_boxes.txt")
    # unpacked inside of the folder, or beside it
    folders = (base / "segmentations", base.parent / "segmentations")
    masks = next((folder for folder in folders if folder.is_dir()), None)
    entries = []
    for key, file in images.items():
        try:
            if (train[key] == "1") != (split == "train"):
                continue
            label = names[numbers[key]]
            box: tuple[Box, ...] = ()
            if key in boxes:
                x, y, width, height = map(float, boxes[key].split())
                box = ((x, y, x + width, y + height),)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{base}: the tables do not fit for image {key} ({error})"
            ) from error
        path = base / "images" / file
        mask = None if masks is None else masks / Path(file).with_suffix(".png")
        entries.append(_Entry(_name(path, root), path, label, None, mask, box))
    order = sorted(names, key=lambda key: (len(key), key))
    return _Listing(root, entries, [names[key] for key in order])


def _pairs(file: Path) -> dict[str, str]:
    """Lines of a number and anything else."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error})") from error
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return {key: value.strip() for key, _, value in pairs}


# -- files -----------------------------------------------------------------------------


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder by name, without hidden ones."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(found, key=lambda entry: entry.name)


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Images at any depth, through links as well, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _visible(folder):
        path = folder / entry.name
        if entry.is_dir():
            yield from _walk(path, (*above, real))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _name(path: Path, root: Path) -> str:
    """Path relative to the root, which may begin with `..`, as valid Unicode."""
    try:
        name = os.path.relpath(path, root)
    except ValueError:  # on another drive
        name = os.path.abspath(path)
    # file systems allow any bytes in names
    raw = Path(name).as_posix().encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")


# -- labels ----------------------------------------------------------------------------


class _Names:
    """Classes by their names, from the most to the least exact way to compare these."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.count = len(classes)
        self.levels: list[dict[str, list[int]]] = []
        for index, name in enumerate(classes):
            for level, keys in enumerate(self.keys(name)):
                if level == len(self.levels):
                    self.levels.append({})
                for key in keys:
                    self.levels[level].setdefault(key, []).append(index)

    @staticmethod
    def keys(name: str) -> tuple[set[str], ...]:
        plain = " ".join(name.replace("_", " ").lower().split())
        bare = re.sub(r"^[0-9]{1,4}\. ?", "", plain)
        synonyms = [part.strip() for part in bare.split(",")]
        first, others = {synonyms[0]}, {part for part in synonyms if part}
        return {name.strip()}, {plain}, {bare}, first, others

    def find(self, label: str) -> list[int]:
        """Indices of classes with this name, or with this number."""
        if not label:
            return []
        for keys, level in zip(self.keys(label), self.levels):
            hits = sorted({index for key in keys for index in level.get(key, ())})
            if hits:
                return hits
        number = _number(label)
        return [number] if number is not None and 0 <= number < self.count else []


def _assign(
    listing: _Listing, classes: Sequence[str], messages: list[str]
) -> list[Sample]:
    """Find the classes of all labels."""
    names = _Names(classes)
    texts = {entry.label for entry in listing.entries if entry.target is None}
    found = {text: names.find(text) for text in texts if text is not None}
    for text, hits in found.items():
        if not hits and text in listing.numbers:
            found[text] = [listing.numbers[text]]
    order = listing.order
    if found and not any(found.values()):
        if not any(map(names.find, order)) and len(order) == len(classes):
            found = {text: [order.index(text)] for text in found}
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
    return [_sample(entry, found) for entry in listing.entries]


def _sample(entry: _Entry, found: Optional[Mapping[str, list[int]]]) -> Sample:
    """Sample of an entry, with the classes of labels, or none at all."""
    index, problem = entry.target, entry.problem
    if found is None:
        index, problem = None, None
    elif problem is None and index is None and entry.label is not None:
        hits = found[entry.label]
        if not hits:
            problem = f"label {entry.label!r} is not a class of the network"
        elif len(hits) > 1:
            problem = (
                f"label {entry.label!r} is ambiguous: the network's classes"
                f" {', '.join(map(str, hits))} have this name"
            )
        else:
            index = hits[0]
    if problem is not None:
        index = None
    return Sample(entry.name, entry.path, index, entry.mask, entry.boxes, problem)


def _choose(
    samples: Sequence[Sample], limit: int, seed: int, messages: list[str]
) -> list[Sample]:
    """A random choice, with as many samples of each label as possible."""

    def draw(*values: object) -> bytes:
        # the same with any version of Python, and for any other samples
        text = "\0".join(map(str, (seed, *values)))
        return hashlib.sha256(text.encode("utf-8")).digest()

    usable = [sample for sample in samples if sample.problem is None]
    if usable and len(usable) < len(samples):
        messages.append(
            f"{len(samples) - len(usable)} of {len(samples)} images have a problem, and"
            f" {limit} are drawn from the others"
        )
    groups: dict[Optional[int], list[Sample]] = defaultdict(list)
    for sample in sorted(usable or samples, key=lambda sample: draw(sample.name)):
        groups[sample.label].append(sample)
    # the first of each label, then the second of each, and so on
    turns = [
        (turn, draw("label", label), sample)
        for label, group in groups.items()
        for turn, sample in enumerate(group)
    ]
    turns.sort(key=lambda item: item[:2])
    return sorted((item[2] for item in turns[:limit]), key=lambda sample: sample.name)


# -- reading ---------------------------------------------------------------------------


class Images(torch.utils.data.Dataset[Loaded]):
    """Reads samples, for :class:`torch.utils.data.DataLoader` with :func:`collate`.

    A mask is a file of the size of the stored image, in any mode. 0 is outside, and
    anything else inside. If there are values in between, what exceeds half of the
    largest possible value is inside: of the annotators of CUB-200-2011, whose votes are
    gray values, it is the majority. In palettes with colors, all but black is inside.
    What is transparent is outside. Without a file, the mask is that of all boxes.

    Masks and boxes belong to the image as it is stored, and are turned as the image by
    the orientation in its EXIF data. The transform is applied to the mask as to a
    photograph in black and white, and what is brighter than the mean of black and white
    is inside: this resizes and crops the mask as the image, whatever the normalization.

    Nothing is raised for files which cannot be used, see :class:`Loaded`.

    Args:

        samples (Samples or sequence of Sample): What to read.
        transform (callable): Preprocessing, from an RGB image of PIL to a tensor of
                shape (3, height, width), such as that of
                :func:`zennit_resnet.models.load_classifier`. It must treat equal images
                equally, and be picklable for workers that are spawned.

    Examples::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from torchvision.transforms.functional import to_tensor
        >>> from captum_adapters.evaluation.datasets import Images, Sample
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "white.png")
        ...     Image.new("RGB", (3, 2), "white").save(path)
        ...     sample = Sample("white.png", path, None, boxes=((1, 0, 3, 1),))
        ...     loaded = Images([sample], to_tensor)[0]
        >>> loaded.image.shape, loaded.mask.int().tolist()
        (torch.Size([3, 2, 3]), [[0, 1, 1], [0, 0, 0]])
    """

    def __init__(
        self,
        samples: Union[Samples, Sequence[Sample]],
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.samples = samples.samples if isinstance(samples, Samples) else samples
        self.transform = transform
        self._levels: Optional[tuple[Tensor, Tensor]] = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Loaded:
        """Read a sample."""
        sample = self.samples[index]
        if sample.problem is not None:
            return Loaded(None, None, sample.problem, None)
        try:
            photo = read_image(sample.path)
        except FileNotFoundError:
            return Loaded(None, None, "the image is missing", None)
        except Exception as error:  # damaged files raise anything
            return Loaded(None, None, f"the image is unusable: {_line(error)}", None)
        try:
            image = self.transform(photo)
        except Exception as error:  # for instance out of memory for a very long image
            problem = f"the image cannot be preprocessed: {_line(error)}"
            return Loaded(None, None, problem, None)
        if sample.mask is None and not sample.boxes:
            return Loaded(image, None, None, None)
        try:
            return Loaded(image, self._mask(sample, photo.size), None, None)
        except FileNotFoundError:
            return Loaded(image, None, None, "the mask is missing")
        except Exception as error:  # as above
            return Loaded(image, None, None, f"the mask is unusable: {_line(error)}")

    def _mask(self, sample: Sample, size: tuple[int, int]) -> Tensor:
        """The mask of a sample, of which the image has this size when it is upright."""
        with Image.open(sample.path) as photo:
            orientation = photo.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = size
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        if sample.mask is None:
            inside = boxes_to_masks([sample.boxes], (height, width))[0].numpy()
        else:
            inside = _read_mask(sample.mask)
        if inside.shape != (height, width):
            raise ValueError(
                f"it is of {inside.shape[1]} x {inside.shape[0]} pixels, but the image"
                f" as stored of {width} x {height}"
            )
        mask = Image.fromarray(inside.astype(np.uint8) * 255).convert("RGB")
        mask.getexif()[ExifTags.Base.Orientation] = orientation
        mask = ImageOps.exif_transpose(mask)
        if self._levels is None:
            # in the middle, so that padding does not matter
            black, white = (
                values[:, values.shape[1] // 2, values.shape[2] // 2, None, None]
                for color in ("black", "white")
                for values in [self.transform(Image.new("RGB", (64, 64), color))]
            )
            self._levels = (black + white) / 2, white - black
        middle, contrast = self._levels
        return ((self.transform(mask) - middle) * contrast).sum(0) > 0


def collate(batch: Sequence[Loaded]) -> LoadedBatch:
    """Lists of what was read, as the `collate_fn` of a data loader.

    Args:

        batch (sequence of Loaded): What :class:`Images` gives. Images may differ in
                shape, or be missing.

    Returns:
        LoadedBatch: A named tuple of lists.
    """
    return LoadedBatch(*map(list, zip(*batch)))


def _read_mask(path: Path) -> NDArray[np.bool_]:
    """Which pixels are inside, of shape (height, width)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            file.load()
    image: Image.Image = file
    palette = image.mode in ("P", "PA")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    if image.mode not in ("1", "L") and not image.mode.startswith(("I", "F")):
        image = image.convert("RGB")
    kind, values = image.mode, np.asarray(image)
    if values.ndim == 3:
        if palette and (values != values[..., :1]).any():
            return np.any(values, axis=2)
        values = values.max(2)
    largest = values.max()
    if np.count_nonzero((values > 0) & (values < largest)) == 0:
        return values > 0
    # these modes do not say how bright white is
    limit = 255.0
    if kind.startswith("I;16") or largest > 255:
        limit = 65535.0
    elif kind == "F" and largest <= 1:
        limit = 1.0
    return values > limit / 2


def _line(error: BaseException) -> str:
    """The message of an exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__
