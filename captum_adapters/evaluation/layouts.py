"""Layouts of data sets: which files there are, and what belongs to each image."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union
from xml.etree import ElementTree

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from captum_adapters.evaluation.labels import ClassMatcher, to_number
from zennit_resnet._text import one_line

if TYPE_CHECKING:
    import pandas as pd

Box = tuple[float, float, float, float]

SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".pnm")
MANIFESTS = ("manifest.csv", "labels.csv")
CORNERS = ("x0", "y0", "x1", "y1")
SPLITS = {"train", "val", "valid", "validation", "test"}
WNID = re.compile(r"n\d{8}")
ILSVRC = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG", re.IGNORECASE)
KITS = ("", "data/", "ILSVRC2012_devkit_t12/", "ILSVRC2012_devkit_t12/data/")
CUB_FILES = ("images", "image_class_labels", "train_test_split", "classes")


class Sample(NamedTuple):
    """An image of a data set, which has not been read yet.

    Attributes:

        name (str): Path relative to the root of the data, with `/`. Unique.
        path (Path): Path of the image.
        label (int, optional): Index of its class in the network, `None` if unknown. At
                first, it may be the name that the data gives.
        mask (Path, optional): Path of the mask of the object.
        boxes (tuple): Bounding boxes (x0, y0, x1, y1) of the object in pixels of the
                stored image, see :func:`captum_adapters.metrics.boxes_to_masks`.
        problem (str, optional): Why it cannot be used, as known without reading it.
    """

    name: str
    path: Path
    label: Any = None
    mask: Optional[Path] = None
    boxes: tuple[Box, ...] = ()
    problem: Optional[str] = None


class Listing(NamedTuple):
    """What a layout has, before labels become classes of the network."""

    root: Path
    samples: list[Sample]
    order: Sequence[str] = ()  # of labels as of classes, if they match none by name
    numbers: Mapping[str, int] = {}  # indices of classes by label
    messages: Sequence[str] = ()


def recognize(root: Path, split: Optional[str]) -> str:
    """Name of the layout."""
    if root.is_file() or any((root / name).is_file() for name in MANIFESTS):
        return "csv"
    if (_cub_root(root) / "images.txt").is_file():
        return "cub"
    found = _imagenet_images(root) if split in (None, "val") else None
    # without either, a folder of these images has no labels
    if found and (found[1] or _truth(root) or find_annotations(root)):
        return "imagenet"
    return "folder"


def _read_folder(root: Path, split: Optional[str], classes: Sequence[str]) -> Listing:
    """A folder of images, or of a folder for each class."""
    folder = root if split is None else root / split
    if not folder.is_dir():
        raise ValueError(f"there is no folder {split!r} in {root} for this split")
    tops = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    if split is None and tops and set(tops) <= SPLITS:
        raise ValueError(
            f"{root} has the folders {', '.join(tops)}: choose one of them as the split"
        )
    samples = [Sample(_name(path, root), path, _top(path, folder)) for path in _walk(folder)]
    return Listing(root, samples, tops, _numbers(root, classes, tops))


def _top(image: Path, folder: Path) -> Optional[str]:
    """Name of the top folder that an image is in, `None` if it is in none."""
    return next(iter(image.relative_to(folder).parts[:-1]), None)


def _read_csv(root: Path, split: Optional[str], classes: Sequence[str]) -> Listing:
    """A CSV file, with a row for each image or box."""
    files = [root / name for name in MANIFESTS] if root.is_dir() else [root]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise ValueError(f"there is no {' or '.join(MANIFESTS)} in {root}")
    root = file.parent
    table = _table(file)
    if split is not None:
        if "split" not in table:
            raise ValueError(f"{file} has no column 'split' to choose {split!r} from")
        table = table[table["split"] == split]
    rows = table.to_dict("records")
    row_labels, messages = _row_labels({*table}, rows, classes)
    samples: dict[str, Sample] = {}
    for row, label in zip(rows, row_labels):
        path = root / row["image"]
        mask = root / row["mask"] if row.get("mask") else None
        sample = Sample(_name(path, root), path, label, mask, _row_boxes(row))
        samples[sample.name] = _merge(samples.get(sample.name, sample), sample)
    beside = root / "boxes.csv"
    if beside.is_file() and beside != file:
        for row in _table(beside, boxes=True).to_dict("records"):
            known = samples.get(_name(root / row["image"], root))
            if known is not None:
                samples[known.name] = known._replace(boxes=(*known.boxes, *_row_boxes(row)))
    boxed = [sample for sample in samples.values() if sample.boxes]
    if boxed and all(is_relative(box) for sample in boxed for box in sample.boxes):
        raise ValueError(
            f"{file}: the box {boxed[0].boxes[0]} of {boxed[0].name} and all others are"
            " relative, where pixels of the image as stored are expected"
        )
    turned = [sample for sample in boxed if any(map(is_turned, sample.boxes))]
    if len(turned) > len(boxed) / 2:
        raise ValueError(
            f"{file}: the box {turned[0].boxes[0]} of {turned[0].name} and most others are"
            " not of left, top, right and bottom, as with a width and height in their place"
        )
    labels = sorted({item.label for item in samples.values() if type(item.label) is str})
    order = labels if all(map(WNID.fullmatch, labels)) else ()
    return Listing(root, list(samples.values()), order, messages=messages)


def _table(file: Path, boxes: bool = False) -> "pd.DataFrame":
    """A CSV file of texts, with the path of the image as `image`."""
    import pandas as pd  # slow to load

    try:
        with warnings.catch_warnings():
            # rows that are longer than the header
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # spreadsheets write a byte order mark
            options = {"dtype": str, "keep_default_na": False, "index_col": False}
            table = pd.read_csv(file, encoding="utf-8-sig", **options)
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8 ({one_line(error)})") from error
    table = table.rename(columns=str.strip).fillna("")
    table = table.apply(lambda column: column.str.strip())
    table = table[(table != "").any(axis=1)] if len(table.columns) else table
    column = next((name for name in ("image", "file") if name in table), None)
    if column is None:
        known = ", ".join(table.columns[:20]) or "none at all"
        raise ValueError(f"{file} has no column 'image' or 'file', but {known}")
    for name in CORNERS if boxes or {*CORNERS} & {*table} else ():
        if name not in table:
            raise ValueError(f"{file} has no column {name!r} for boxes")
    where = [f"{file}, row {row + 1}" for row in table.index]
    table = table.assign(image=table[column], where=where)
    missing = table["where"][table["image"] == ""]
    if len(missing):
        raise ValueError(f"{missing.iloc[0]}: the image's path is missing")
    return table


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


def is_turned(box: Box) -> bool:
    """Whether a box is not of left, top, right and bottom."""
    return box[2] <= box[0] or box[3] <= box[1]


def is_relative(box: Box) -> bool:
    """Whether a box seems to be given in sides of the image, from 0 to 1."""
    return min(box) >= 0 and max(box) <= 1


def _row_labels(
    columns: set[str], rows: Sequence[Mapping[str, str]], classes: Sequence[str]
) -> tuple[list[Union[int, str, None]], list[str]]:
    """The label of each row, as an index or a text, and messages."""
    messages = []
    known = {"label", "wnid", "class_index", "imagenet_index"} & columns
    if not known:
        messages.append("the CSV file has no column 'label': the labels are unknown")
    index: Optional[str] = None
    if "imagenet_index" in columns and len(classes) == 1000:
        index = "imagenet_index"
    elif "class_index" in columns:
        numbers = [to_number(row["class_index"]) for row in rows]
        count = 1 + max((num for num in numbers if num is not None), default=-1)
        names = ClassMatcher(classes)
        found = [names.find(row.get("label", "")) for row in rows]
        pairs = zip(found, numbers)
        if any(len(hits) == 1 and num not in (None, hits[0]) for hits, num in pairs):
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

    labels: list[Union[int, str, None]] = []
    for row in rows:
        number = to_number(row[index]) if index else None
        # what is given, but cannot be used, has to become a problem
        given = [f"{key} {row[key]}" for key in sorted(known) if row[key]]
        if number is None:
            labels.append(row.get("label") or row.get("wnid") or next(iter(given), None))
        else:
            labels.append(number if 0 <= number < len(classes) else f"{index} {number}")
    return labels, messages


def _merge(first: Sample, other: Sample) -> Sample:
    """Join two rows of the same image."""
    label = first.label if first.label is not None else other.label
    mask = first.mask or other.mask
    problem = first.problem
    if other.label not in (None, label) or other.mask not in (None, mask):
        problem = "it is listed several times, with different labels or masks"
    boxes = tuple(dict.fromkeys((*first.boxes, *other.boxes)))
    return first._replace(label=label, mask=mask, boxes=boxes, problem=problem)


def _read_imagenet(root: Path, split: Optional[str], classes: Sequence[str]) -> Listing:
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
    folder, order = images
    truth, annotations = _truth(root), find_annotations(root)
    messages = []
    paths = list(_walk(folder))
    found: dict[str, Optional[str]] = {}
    if order:
        paths = [path for path in paths if path.parent != folder]
        found = {path.stem: _top(path, folder) for path in paths}
    else:
        paths = [path for path in paths if ILSVRC.fullmatch(path.name)]
        if truth is not None and classes:
            found = _ground_truth(truth, root)
        elif annotations is not None and classes:
            found = {path.stem: read_annotation(path, annotations)[0] for path in paths}
            order = sorted(filter(None, {*found.values()}))
        else:
            messages.append(
                "there is neither a ground truth nor annotations near the images: the"
                " labels are unknown"
            )
    samples = [Sample(_name(path, root), path, found.get(path.stem)) for path in paths]
    numbers = _numbers(root, classes, (*order, *filter(None, found.values())))
    return Listing(root, samples, order, numbers, messages)


def _imagenet_images(root: Path) -> Optional[tuple[Path, list[str]]]:
    """Folder with images of ImageNet, and its folders named by wnid, if any."""
    for name in ("val", "Data/CLS-LOC/val", ""):
        folder = root / name
        items = _visible(folder) if folder.is_dir() else []
        tops = sorted(item.name for item in items if item.is_dir())
        if tops and all(WNID.fullmatch(top) for top in tops):
            return folder, tops
        if any(ILSVRC.fullmatch(item.name) for item in items):
            return folder, []
    return None


def _near(root: Path, *names: str) -> Optional[Path]:
    """The first of the paths, in the folder or in one of the three above."""
    bases = (root, *list(root.parents)[:3])
    paths = (base / name for name in names for base in bases)
    return next((path for path in paths if path.exists()), None)


def _truth(root: Path) -> Optional[Path]:
    return _near(root, *(f"{kit}ILSVRC2012_validation_ground_truth.txt" for kit in KITS))


def find_annotations(root: Path) -> Optional[Path]:
    return _near(root, "Annotations/CLS-LOC/val")


def _meta(root: Path) -> Optional[dict[int, str]]:
    """The wnid of each ILSVRC id from the development kit, if it is there."""
    file = _near(root, *(f"{kit}meta.mat" for kit in KITS))
    if file is None:
        return None
    try:
        import scipy.io

        synsets = np.atleast_1d(scipy.io.loadmat(file, squeeze_me=True)["synsets"])
        # what has children is no class, but a group of them
        return {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
            for synset in synsets
            if int(synset["num_children"]) == 0
        }
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{file} is not ILSVRC2012's ({one_line(error)})") from error


def _numbers(
    root: Path, classes: Sequence[str], labels: Iterable[str]
) -> dict[str, int]:
    """Indices of ImageNet's 1000 classes by wnid, empty if they are not known."""
    labels = [*filter(WNID.fullmatch, {*labels})]
    if len(classes) != 1000 or not labels:
        return {}
    if len(labels) == 1000:
        return dict(zip(sorted(labels), range(1000)))
    meta, file = _meta(root), _near(root, "LOC_synset_mapping.txt", "synset_words.txt")
    wnids = {*meta.values()} if meta else set()
    if meta is None and file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        wnids = {line.split()[0] for line in lines if line.strip()}
    return dict(zip(sorted(wnids), range(1000))) if len(wnids) == 1000 else {}


def _ground_truth(file: Path, root: Path) -> dict[str, Optional[str]]:
    """The wnid of each image by its name without suffix."""
    meta = _meta(root)
    if meta is None:
        raise ValueError(f"there is no meta.mat of the development kit beside {file}")
    try:
        numbers = enumerate(map(int, file.read_text(encoding="utf-8").split()), 1)
        return {f"ILSVRC2012_val_{image:08d}": meta[number] for image, number in numbers}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} does not fit meta.mat ({error})") from error


def read_annotation(image: Path, folder: Path) -> tuple[Optional[str], tuple[Box, ...]]:
    """Wnid and boxes of an image's annotation, none if it cannot be read."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    try:
        objects = ElementTree.parse(folder / f"{image.stem}.xml").findall("object")
        boxes = []
        for item in objects:
            texts = (item.findtext(f"bndbox/{key}", "") for key in corners)
            x0, y0, x1, y1 = map(float, texts)
            # pixels are counted from 1, and the last is inside
            boxes.append((x0 - 1, y0 - 1, x1, y1))
        return (objects[0].findtext("name") if objects else None), tuple(boxes)
    except (OSError, ElementTree.ParseError, ValueError):
        return None, ()


def _cub_root(root: Path) -> Path:
    inner = root / "CUB_200_2011"
    return inner if (inner / "images.txt").is_file() else root


def _read_cub(root: Path, split: Optional[str], classes: Sequence[str]) -> Listing:
    """CUB-200-2011 in its official layout."""
    if split not in (None, "train", "test"):
        raise ValueError(f"CUB-200-2011 has no split {split!r}: choose train or test")
    base = _cub_root(root)
    for name in CUB_FILES:
        if not (base / f"{name}.txt").is_file():
            raise ValueError(f"{base} is not CUB-200-2011: {name}.txt is missing")
    images, numbers, train, names = (_pairs(base / f"{name}.txt") for name in CUB_FILES)
    corners = base / "bounding_boxes.txt"
    boxes = _pairs(corners) if corners.is_file() else {}
    # unpacked inside of the folder, or beside it
    folders = (base / "segmentations", base.parent / "segmentations")
    masks = next((folder for folder in folders if folder.is_dir()), None)
    samples = []
    for key, file in images.items():
        path = base / "images" / file
        mask = None if masks is None else masks / Path(file).with_suffix(".png")
        try:
            if (train[key] == "1") != (split == "train"):
                continue
            sample = Sample(_name(path, root), path, names[numbers[key]], mask)
            if key in boxes:
                x, y, width, height = map(float, boxes[key].split())
                sample = sample._replace(boxes=((x, y, x + width, y + height),))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{base}: the tables do not fit for image {key} ({error})"
            ) from error
        samples.append(sample)
    order = sorted(names, key=lambda key: (len(key), key))
    return Listing(root, samples, [names[key] for key in order])


def _pairs(file: Path) -> dict[str, str]:
    """Lines of a number and anything else."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error})") from error
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return {key: value.strip() for key, _, value in pairs}


READERS = {
    "folder": _read_folder, "csv": _read_csv, "imagenet": _read_imagenet, "cub": _read_cub,
}


def _visible(folder: Path) -> list["os.DirEntry[str]"]:
    """Entries of a folder by name, without hidden ones."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    return [entry for entry in found if not entry.name.startswith(".")]


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Images at any depth, through links as well, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _visible(folder):
        path = folder / entry.name
        if entry.is_dir():
            yield from _walk(path, (*above, real))
        elif entry.name.lower().endswith(SUFFIXES):
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
