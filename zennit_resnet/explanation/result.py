'''What an explanation is, how it is drawn and written.'''
import io
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from .._choices import SCALES
from .._files import check_free, whole
from ..arguments import check_choice, check_number
from ..image import (
    HEATMAP_CMAP,
    OVERLAY_CMAP,
    check_cmap,
    color_range,
    draw_comparison,
    draw_contours,
    draw_heatmap,
    draw_legend,
    draw_overlay,
)
from ..methods import Method

# Bounds of the longer side of a picture in a table, in pixels
SMALLEST_TILE, LARGEST_TILE = 224, 448
CONTRAST_TEXTS = {'centred': 'others', 'softmax': 'others by probability', 'runner_up': 'the next'}
# Outlines of noise would cover everything, so that they are of a heatmap smoothed by at least this
CONTOUR_SMOOTH = 4.
KINDS = ('heatmap', 'overlay')
# What is written for an explanation. The manifest comes last: where it is, all is.
ENDINGS = ('heatmap.png', 'overlay.png', 'figure.png', 'relevance.npy', 'heatmap.npy', 'manifest.json')


class _Pictures:
    '''What is shown as a figure, in notebooks by itself.'''
    def show(self, **style):
        '''Show the figure, in a notebook or the program for pictures.'''
        picture = self.figure(**style)
        try:
            from IPython import get_ipython
            from IPython.display import display
            is_notebook = get_ipython() is not None
        except ImportError:
            is_notebook = False
        if is_notebook:
            display(picture)
        else:
            picture.show()

    def _repr_png_(self):
        file = io.BytesIO()
        self.figure().save(file, 'PNG')
        return file.getvalue()


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(_Pictures):
    '''Why a network sees a class in a photograph.

    Pictures and the heatmap are in the geometry of the photograph, and positive values are for the class. Options of
    pictures are ``percentile``, ``cmap`` (also ``'safe'``, for any kind of color vision) and ``bound``, see
    :py:func:`zennit_resnet.image.draw_heatmap`; ``smooth``, the standard deviation of a Gaussian in pixels of the
    network's input; and ``contours``, the percentage of most relevant pixels to outline in overlays.

    Attributes
    ----------
    relevance, output: :py:obj:`numpy.ndarray`
        Relevance of the network's input, of shape (channels, height, width), and logits of shape (classes,).
    target, classes: int, list[str]
        Index of the class explained, and names of the classes.
    photo, box: :py:obj:`numpy.ndarray`, tuple[float, float, float, float]
        The photograph, of shape (height, width, 3) and type uint8, and left, top, right and bottom of what the network
        sees of it, in its pixels.
    method: :py:class:`~zennit_resnet.methods.Method`
        How relevance was computed.
    initial, sinks, value, contrast: float, float, str, str or None
        The sum of what relevance starts from, what parameters such as a class token keep of it, what it starts from,
        and what the target is compared with.
    sign: int
        1, or -1 where positive relevance is against the class, see :py:class:`~zennit_resnet.methods.Attributed`.
        Pictures and :py:attr:`heatmap` are turned.
    name, source, settings: str, str, dict
        What files are named, where the image is from, and network, preprocessing, hash of the weights, versions.
    '''
    relevance: np.ndarray
    output: np.ndarray
    target: int
    classes: list
    photo: np.ndarray
    box: tuple
    method: Method
    initial: float
    sinks: float = 0.
    value: str = 'one'
    contrast: object = None
    sign: int = 1
    name: str = 'image'
    source: str = ''
    settings: dict = field(default_factory=dict)

    def __repr__(self):
        return (
            f'<Explanation of {self.name!r}: {self.label} {self.probability:.1%} by {self.method.text}, '
            f'delta {self.delta:.2g}>'
        )

    @property
    def prediction(self):
        '''Index of the class with the highest logit.'''
        return int(self.output.argmax())

    @property
    def label(self):
        '''Name of the class explained.'''
        return self.classes[self.target]

    @property
    def versus(self):
        '''What the class is compared with, for captions, unless the name of the method says it.'''
        rivals = self.rivals
        return f' rather than {CONTRAST_TEXTS.get(rivals, rivals)}' if rivals else ''

    @property
    def rivals(self):
        '''Names of the classes, or the word, of the contrast, unless the name of the method says it.'''
        return '' if self.method.contrast is not None else name_rivals(self.contrast, self.classes)

    @property
    def _rivals(self):
        '''The contrast: that of the method, if it has one.'''
        return self.contrast if self.method.contrast is None else self.method.contrast

    @cached_property
    def probabilities(self):
        '''Softmax of the logits, of shape (classes,).'''
        return torch.from_numpy(self.output).double().softmax(0).numpy()

    @property
    def probability(self):
        '''Softmax probability of the class explained.'''
        return float(self.probabilities[self.target])

    @property
    def delta(self):
        '''What relevance, and what sinks keep, sums to more than it started from: 0 if it is conserved.'''
        return float(self.relevance.sum(dtype=np.float64)) + self.sinks - self.initial

    @cached_property
    def heatmap(self):
        '''Relevance of the photograph (height, width), of about the same sum, 0 outside of what the network sees.'''
        return self._place(self._map(0.)[0], self.photo.shape[1::-1])

    @property
    def notes(self):
        '''What is unusual about the heatmap.'''
        notes = [*self._map(0.)[1]]
        seen = float(np.abs(self.heatmap).sum(dtype=np.float64)) / max(float(np.abs(self._map(0.)[0]).sum()), 1e-30)
        (left, top, right, bottom), (height, width) = self.box, self.photo.shape[:2]
        is_padded = left < -1 or top < -1 or right > width + 1 or bottom > height + 1
        if not self.relevance.any() and not notes:
            is_own = isinstance(self._rivals, torch.Tensor) and bool((self._rivals == self.target).all())
            reason = f'{self.label} is contrasted with itself' if is_own else 'relevance is zero everywhere'
            notes.append(f'empty, as {reason}')
        elif seen < 0.95 and self.method.postprocess == 'none' and is_padded:
            notes.append(f'{1 - seen:.0%} of the relevance is on padding, outside of the photograph')
        is_plain = self._rivals is None and self.sign > 0
        if self.value == 'logit' and is_plain and self.output[self.target] < 0:
            notes.append('the logit is negative: there is more against the class than for it')
        return notes

    def _map(self, smooth):
        '''The heatmap in the geometry of the network, and notes, each computed once.'''
        if smooth not in self._maps:
            self._maps[smooth] = self.method.heatmap(self.relevance, self.sign, smooth)
        return self._maps[smooth]

    @cached_property
    def _maps(self):
        return {}

    def _place(self, heatmap, size):
        '''Put a heatmap in the geometry of the network into a photograph of a size.'''
        left, top, right, bottom = (
            round(edge * size[num % 2] / self.photo.shape[1 - num % 2]) for num, edge in enumerate(self.box)
        )
        width, height = max(right - left, 1), max(bottom - top, 1)
        # levels and masks have no values in between
        method = Image.Resampling.BILINEAR if self.method.postprocess == 'none' else Image.Resampling.NEAREST
        canvas = Image.new('F', size)
        canvas.paste(Image.fromarray(heatmap.astype(np.float32)).resize((width, height), method), (left, top))
        return np.asarray(canvas) * (heatmap.size / (width * height))

    def draw(self, kind='overlay', size=None, **style):
        '''Draw the ``'heatmap'`` or ``'overlay'`` (height, width, 3), uint8, as large as the photo or of a size.'''
        style = Style(**style)
        check_choice('kind', kind, KINDS)
        photo = self.photo if size is None else np.asarray(
            Image.fromarray(self.photo).resize(size, Image.Resampling.LANCZOS)
        )
        heatmap = self._place(self._map(style.smooth)[0], photo.shape[1::-1])
        # ends of the color range do not depend on the size
        width, height = (
            (self.box[num + 2] - self.box[num]) * photo.shape[1 - num] / self.photo.shape[1 - num] for num in (0, 1)
        )
        bound = self.color_range(style) * self._map(0.)[0].size / max(width * height, 1)
        if kind == 'heatmap':
            return draw_heatmap(heatmap, style.percentile, style.cmap or HEATMAP_CMAP, bound)
        picture = draw_overlay(photo, heatmap, style.percentile, cmap=style.cmap or OVERLAY_CMAP, bound=bound)
        if style.contours is None:
            return picture
        outlined = self._place(self._map(max(style.smooth, CONTOUR_SMOOTH))[0], photo.shape[1::-1])
        return draw_contours(picture, outlined, style.contours)

    def color_range(self, style=None):
        '''End of the color range, in relevance of a pixel of the network's input.'''
        style = style or Style()
        if style.bound is not None:
            return style.bound
        # all levels of a quantized heatmap get their own color
        percentile = 100 if self.method.postprocess == 'quantize' else style.percentile
        return color_range(self._map(style.smooth)[0], percentile)

    def figure(self, **style):
        '''Draw photograph, heatmap and overlay side by side with a legend, as an image of Pillow.'''
        return draw_table([[self]], KINDS, **style)

    @property
    def stem(self):
        '''What names of files begin with: that of the image, the method and the contrast.'''
        return file_stem(self.name, self.method, self.rivals)

    def save(self, folder, overwrite=False, **style):
        '''Write heatmap, overlay and figure as PNG, relevance and heatmap as arrays, and a manifest, and get the paths.

        Each file is written as a whole or not at all, the manifest last. The folder is made if it is not there. A
        FileExistsError is raised if a file is there and is not to be overwritten, an OSError if one cannot be written.
        '''
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f'{self.stem}_{ending}' for ending in ENDINGS]
        for path in paths:
            check_free(path, overwrite)
        info = PngImagePlugin.PngInfo()
        for key, entry in self.describe().items():
            info.add_itxt(key, _encodable(entry if isinstance(entry, str) else _as_json(entry)))
        manifest = {**self.describe(), 'style': style, 'files': [path.name for path in paths[:-1]]}
        contents = [Image.fromarray(self.draw(kind, **style)) for kind in KINDS] + [self.figure(**style)]
        contents += [self.relevance, self.heatmap, _encodable(_as_json(manifest, indent=2))]
        # of an earlier explanation
        paths[-1].unlink(missing_ok=True)
        for path, content in zip(paths, contents):
            with whole(path, overwrite) as name:
                if isinstance(content, Image.Image):
                    content.save(name, pnginfo=info)
                elif isinstance(content, str):
                    Path(name).write_text(f'{content}\n', encoding='utf-8')
                else:
                    np.save(name, content.astype(np.float32))
        return paths

    def describe(self):
        '''All that is not an array, as a dict for JSON.'''
        best = np.argsort(-self.output, kind='stable')[:3].tolist()
        return {
            'source': self.source,
            'method': self.method.text,
            'target': {'index': self.target, 'name': self.label, 'probability': self.probability,
                       'logit': float(self.output[self.target])},
            'prediction': [{'index': num, 'name': self.classes[num], 'probability': float(self.probabilities[num])}
                           for num in best],
            'relevance': {
                'starts from': self.value, 'initial': self.initial,
                'contrast': self._rivals,
                'sum': float(self.relevance.sum(dtype=np.float64)), 'sinks': self.sinks, 'delta': self.delta,
                'positive is': 'for the class' if self.sign > 0 else 'against the class, and turned in pictures',
            },
            'geometry': {
                'photograph': list(self.photo.shape[1::-1]), 'seen': [round(edge, 2) for edge in self.box],
                'input': list(self.relevance.shape[:0:-1]),
            },
            'notes': self.notes,
            **self.settings,
        }


def _shared_range(explanations, style):
    present = [each for each in explanations if each is not None]
    starts = {each.value for each in present}
    if len(starts) > 1:
        raise ValueError(
            f'scale: relevance of these methods starts from {" and ".join(sorted(starts))}, so they have no color '
            'range in common: choose \'method\' or \'own\', or a value for all of them'
        )
    values = [each._map(style.smooth)[0].ravel() for each in present]
    percentile = 100 if any(each.method.postprocess == 'quantize' for each in present) else style.percentile
    return color_range(np.concatenate(values), percentile) if values else None


def name_rivals(contrast, classes):
    '''A contrast as a word, or as names of its classes.'''
    if isinstance(contrast, torch.Tensor):
        return ', '.join(classes[num] if classes else f'class {num}' for num in contrast.flatten().tolist())
    return contrast or ''


def file_stem(name, method, rivals=''):
    '''What names of files of an image, a method and a contrast begin with.'''
    # names of files have a limit
    text = f'{method.text}_rather than {rivals[:32]}' if rivals and method.contrast is None else method.text
    return f'{name}_{re.sub("[^0-9A-Za-z_.=+-]+", "-", text)}'


class Explanations(_Pictures, tuple):
    '''Several explanations, see :py:class:`Explanation`.'''
    def figure(self, **style):
        '''Draw a row for each image.'''
        return draw_table([[each] for each in self], KINDS, **style)

    def save(self, folder, overwrite=False, **style):
        '''Write the files of each, and return their paths.'''
        for each in self:
            for ending in ENDINGS:
                check_free(Path(folder, f'{each.stem}_{ending}'), overwrite)
        return [path for each in self for path in each.save(folder, overwrite, **style)]


@dataclass(frozen=True)
class Style:
    '''Options of pictures.'''
    percentile: float = 99.5
    smooth: float = 0.
    contours: float | None = None
    cmap: object = None
    bound: float | None = None

    def __post_init__(self):
        check_number('smooth', self.smooth, 0)
        if self.bound is not None:
            check_number('bound', self.bound, 0)
        check_cmap(self.cmap)
        if self.contours is not None:
            check_number('contours', self.contours, 0, 100)


def draw_table(rows, kinds=('heatmap',), scale='own', titles=None, **style):
    '''Draw photographs with explanations side by side, a row for each, with a legend, as an image of Pillow.

    Each row has explanations of a photograph by the same methods, where None leaves a place empty. Of each, ``kinds``
    are drawn: ``'heatmap'``, ``'overlay'`` or both. The ``scale`` is what has a color range of its own: each picture
    (``'own'``), each ``'method'``, or the figure (``'all'``). One that is shared tells where there is more relevance.
    Titles are those of the columns of each method, by default their names, or that of a single one is in captions. For
    the style, see :py:class:`Explanation`.

    A ValueError is raised if there is nothing to draw, or an argument is out of range.
    '''
    found = Style(**style)
    known = [[each for each in row if each is not None] for row in rows]
    if not any(known):
        raise ValueError('There is nothing to draw: each row needs an explanation.')
    check_choice('scale', scale, SCALES)
    columns = len(rows[0])
    for num, row in enumerate(rows):
        if len(row) != columns:
            raise ValueError(f'Row {num} has {len(row)} explanations, the first {columns}: put None in empty places.')
    if not kinds or isinstance(kinds, str):
        raise ValueError(f'kinds={kinds!r} is not a list of {" or ".join(map(repr, KINDS))}.')
    for kind in kinds:
        check_choice('kinds', kind, KINDS)
    if titles is not None and len(titles) != columns:
        raise ValueError(f'There are {len(titles)} titles for {columns} columns.')
    bounds = [found.bound] * columns
    if scale != 'own' and found.bound is None:
        groups = [[row[num] for row in rows] for num in range(columns)] if scale == 'method' else [sum(known, [])]
        bounds = [_shared_range(group, found) for group in groups] * (columns // len(groups))
    elif found.bound is None and len(rows) == 1:
        bounds = [None if each is None else each.color_range(found) for each in rows[0]]
    tiles, captions = [], []
    for row, present in zip(rows, known):
        if not present:
            continue
        first, width = present[0], present[0].photo.shape[1]
        scale = np.clip(max(first.photo.shape[:2]), SMALLEST_TILE, LARGEST_TILE) / max(first.photo.shape[:2])
        size = max(round(width * scale), 1), max(round(len(first.photo) * scale), 1)
        photo = np.asarray(Image.fromarray(first.photo).resize(size, Image.Resampling.LANCZOS))
        tiles.append([photo] + [
            photo * 0 if each is None else each.draw(kind, size, **{**style, 'bound': bound})
            for each, bound in zip(row, bounds) for kind in kinds
        ])
        best = first.prediction
        other = '' if best == first.target else f' (predicted {first.classes[best]} {first.probabilities[best]:.1%})'
        method = f', {first.method.text}' if titles is None and len(row) == 1 else ''
        captions.append(f'{first.name}: {first.label}{first.versus} {first.probability:.1%}{other}{method}')
    if titles is None:
        titles = [next((each.method.text for each in column if each), '') for column in zip(*rows)]
        titles = titles if columns > 1 else ['']
    titles = ['photograph'] + [
        ', '.join(filter(None, (title, kind if len(kinds) > 1 else ''))) for title in titles for kind in kinds
    ]
    widths = [max(row[num].shape[1] for row in tiles) for num in range(len(titles))]
    legend = [np.full((1, widths[0], 3), 255, dtype=np.uint8)]
    for width, (bound, kind) in zip(widths[1:], product(bounds, kinds)):
        default = HEATMAP_CMAP if kind == 'heatmap' else OVERLAY_CMAP
        legend.append(draw_legend(width, found.cmap or default, bound, kind == 'overlay'))
    return Image.fromarray(draw_comparison([*tiles, legend], titles, [*captions, '']))


def _as_json(value, **kwargs):
    '''JSON, with what it does not know as text.'''
    def convert(each):
        return each.tolist() if hasattr(each, 'tolist') else str(each)

    return json.dumps(value, ensure_ascii=False, default=convert, **kwargs)


def _encodable(text):
    '''Text in which bytes of file names that are no characters are escaped, also as JSON.'''
    return text.encode('utf-8', 'backslashreplace').decode()
