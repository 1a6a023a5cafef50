"""Samples of a data set with labels, masks and boxes: finding and reading them.

Nothing is decoded before it is needed, and a file that cannot be used never stops a
run: it has a `problem`, which says why.
"""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from captum_adapters._light import check_choice, positive_integer
from captum_adapters.evaluation.labels import find_class, match_labels
from captum_adapters.evaluation.layouts import (
    READERS,
    Box,
    Sample,
    find_annotations,
    is_relative,
    is_turned,
    read_annotation,
    recognize,
)
from captum_adapters.evaluation.names import LABELS, LAYOUTS
from captum_adapters.metrics import boxes_to_masks
from zennit_resnet._text import one_line
from zennit_resnet.image import read_image


class Samples(NamedTuple):
    """What a folder or a CSV file has.

    Attributes:

        layout (str): One of :data:`LAYOUTS`.
        root (Path): Folder that names are relative to.
        samples (tuple[Sample]): Samples in the order of their names.
        messages (tuple[str]): How labels were understood, and what was left out.
        matched_by (str): How labels became classes of the network: `"name"`, `"index"`,
                `"wnid"`, several of these, `"order"` if that is only a guess, `"order,
                as asked for"`, or `"none"` without labels.
        classes (dict): Name of the network's class by label of the data.
    """

    layout: str
    root: Path
    samples: tuple[Sample, ...]
    messages: tuple[str, ...] = ()
    matched_by: str = "none"
    classes: Mapping[str, str] = {}


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
    folders as classes, these are taken in sorted order, and a message says so. A label
    that the network does not have, or that several classes have, makes a `problem`.

    Args:

        path (str or Path): Folder, or a CSV file.
        classes (sequence of str): Names of the network's classes.
        layout (str, optional): How the data is laid out. By default, it is recognized.

                - `"folder"`: the label is the name of the top folder that an image is
                  in, at any depth. Images outside of folders have no label.
                - `"csv"`: a CSV file, or a folder with `manifest.csv` or `labels.csv`.
                  Paths are relative to it. The column `image` or `file` is necessary.
                  Others are `label` (name or index from 0), `wnid`, `class_index` (used
                  if its largest value is that of the network's last class, unless
                  labels tell another order), `imagenet_index` (for 1000 classes),
                  `mask`, `split`, and boxes as `x0`, `y0`, `x1`, `y1`. An image with
                  several boxes has several rows, or has them in `boxes.csv` beside it.
                - `"imagenet"`: validation images in folders named by wnid, or in one
                  folder with the development kit's ground truth and `meta.mat`, or with
                  annotations (`Annotations/CLS-LOC/val`), which give boxes, near it.
                - `"cub"`: CUB-200-2011, with boxes and segmentations if they are there.

        split (str, optional): `"train"` or `"test"` (the default) of CUB-200-2011; the
                name of a folder in `path`, or a value in the column `split` of a CSV.
        labels (str, optional): `"given"`, `"order"` if the labels in sorted order are
                the network's classes whatever their names, or `"ignore"` to have none.
        limit (int, optional): Draw this many images, if there are more, from those
                without a problem, unless all have one, and with as many of each label
                as possible. A larger limit adds images to those of a smaller.
        seed (int, optional): Seed of the choice, which depends on nothing else but the
                names and labels of the images.

    Raises:
        ValueError: If there are no images, or the layout does not fit. The message is a
                single line.

    Examples::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from captum_adapters.evaluation.data import read_samples
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
    check_choice("layout", layout, (None, *LAYOUTS))
    check_choice("labels", labels, LABELS)
    if labels != "ignore" and not classes:
        raise ValueError("there are no names of classes, which labels need")
    if limit is not None:
        positive_integer("limit", limit)
    # not resolved, as names are those that the user sees
    root = Path(os.path.abspath(path))
    if not root.exists():
        raise ValueError(f"there is no file or folder {path}")
    try:
        layout = layout or recognize(root, split)
        if layout != "csv" and not root.is_dir():
            raise ValueError(f"{root} is not a folder, as the layout {layout!r} needs")
        # without classes, labels are not looked for
        listing = READERS[layout](root, split, () if labels == "ignore" else classes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
    if not listing.samples:
        part = "" if split is None else f" with split {split!r}"
        raise ValueError(f"there are no images in {path}{part}")
    messages: list[str] = []
    found: dict[Any, tuple[list[int], str]] = {}
    if labels == "ignore":
        samples = [item._replace(label=None, problem=None) for item in listing.samples]
    else:
        messages += listing.messages
        found = match_labels(listing, classes, messages, labels == "order")
        samples = [find_class(sample, found) for sample in listing.samples]
    samples.sort(key=lambda sample: sample.name)
    if limit is not None and limit < len(samples):
        samples = _choose(samples, limit, seed, messages)
    annotations = find_annotations(listing.root) if layout == "imagenet" else None
    if annotations is not None:
        samples = [
            sample._replace(boxes=read_annotation(sample.path, annotations)[1])
            for sample in samples
        ]
    known = {label: pair for label, pair in found.items() if len(pair[0]) == 1}
    return Samples(
        layout,
        listing.root,
        tuple(samples),
        tuple(messages),
        ", ".join(sorted({how for _, how in known.values()})) or "none",
        {str(label): classes[hits[0]] for label, (hits, _) in known.items()},
    )


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
    groups: dict[Any, list[Sample]] = defaultdict(list)
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


class Loaded(NamedTuple):
    """An image ready for the network, or the `problem` that there is none."""

    image: Optional[Tensor] = None  # of shape (3, height, width)
    mask: Optional[Tensor] = None  # bool of shape (height, width)
    problem: Optional[str] = None
    note: Optional[str] = None  # why there is no mask, although the sample lists one


def stamp_of(sample: Sample) -> str:
    """What changes when the files of a sample may have changed, without reading them."""
    marks: list[Any] = [sample.boxes]
    for path in (sample.path, sample.mask):
        try:
            stat = None if path is None else path.stat()
        except OSError:
            stat = None
        marks.append(stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _read_file(path: Path) -> Optional[bytes]:
    try:
        # a pipe would be waited for
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def content_of(sample: Sample) -> Optional[str]:
    """Hash of a sample's image, mask and boxes, `None` if there is no image to read."""
    image, mask = _read_file(sample.path), None
    if image is None:
        return None
    digest = hashlib.sha256(repr(sample.boxes).encode() + image)
    if sample.mask is not None:
        mask = _read_file(sample.mask)
        digest.update(b"no mask" if mask is None else b"mask" + mask)
    return digest.hexdigest()[:16]


class Images(torch.utils.data.Dataset[Loaded]):
    """Reads samples, for :class:`torch.utils.data.DataLoader` with `collate_fn=list`.

    A mask is a file of the size of the stored image, in any mode. 0 is outside, and
    anything else inside. If there are values in between, what exceeds half of the
    largest possible value is inside: of the annotators of CUB-200-2011, whose votes are
    gray values, it is the majority. In palettes with colors, all but black is inside.
    What is transparent is outside. Without a file, the mask is that of all boxes.

    Masks and boxes belong to the image as it is stored, and are turned by the orientation
    in its EXIF data. The transform (of RGB images, to tensors of shape (3, height,
    width), picklable) resizes and crops the mask as a photograph in black and white:
    what is brighter than their mean is inside. Nothing is raised for files which cannot
    be used, see :class:`Loaded`.
    """

    def __init__(
        self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.samples = samples
        self.transform = transform
        self._levels: Optional[tuple[Tensor, Tensor]] = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Loaded:
        """Read a sample."""
        sample = self.samples[index]
        if sample.problem is not None:
            return Loaded(problem=sample.problem)
        step = "unusable"
        try:
            photo = read_image(sample.path)
            step = "not fit for preprocessing"
            image = self.transform(photo)
        except FileNotFoundError:
            return Loaded(problem="the image is missing")
        except Exception as error:  # damaged files, and very long ones, raise anything
            return Loaded(problem=f"the image is {step}: {one_line(error)}")
        if sample.mask is None and not sample.boxes:
            return Loaded(image)
        try:
            return Loaded(image, self._mask(sample, photo.size))
        except FileNotFoundError:
            return Loaded(image, note="the mask is missing")
        except Exception as error:  # as above
            return Loaded(image, note=f"the mask is unusable: {one_line(error)}")

    def _mask(self, sample: Sample, size: tuple[int, int]) -> Tensor:
        """The mask of a sample, whose image has this size when it is upright."""
        with Image.open(sample.path) as photo:
            orientation = photo.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = size
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        if sample.mask is None:
            _check_boxes(sample.boxes, (width, height))
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
            photos = (Image.new("RGB", (64, 64), name) for name in ("black", "white"))
            plain = [self.transform(photo) for photo in photos]
            # in the middle, so that padding does not matter
            row, column = plain[0].shape[1] // 2, plain[0].shape[2] // 2
            black, white = (values[:, row, column, None, None] for values in plain)
            self._levels = (black + white) / 2, white - black
        middle, contrast = self._levels
        return ((self.transform(mask) - middle) * contrast).sum(0) > 0


def _check_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> None:
    """Refuse boxes that are not of this image, but for a pixel by another counting."""
    for box in boxes:
        what = f"the box ({', '.join(f'{number:g}' for number in box)}) is"
        if is_turned(box):
            raise ValueError(f"{what} not of left, top, right and bottom")
        if is_relative(box) and max(size) > 1:
            raise ValueError(f"{what} relative, or of one pixel: give pixels from 0 on")
        if min(box[:2]) < -1 or max(box[2] - size[0], box[3] - size[1]) > 1:
            raise ValueError(
                f"{what} outside of the image as stored, {size[0]} x {size[1]} pixels"
            )


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
    colored = values.ndim == 3 and palette and (values != values[..., :1]).any()
    values = values.max(2) if values.ndim == 3 else values
    largest: Any = values.max()
    if colored or not ((values > 0) & (values < largest)).any():
        return values > 0
    # these modes do not say how bright white is
    limit = 255.0
    if kind.startswith("I;16") or largest > 255:
        limit = 65535.0
    elif kind == "F" and largest <= 1:
        limit = 1.0
    return values > limit / 2
