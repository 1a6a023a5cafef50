'''Pictures: reading photographs, and drawing heatmaps of images, signals and volumes, overlays and comparisons.'''
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from zennit.cmap import ColorMap
from zennit.image import CMAPS, get_cmap

from .arguments import as_integer, check_number, map_shape

# Zennit's map of black for zero, red to white for positive, and blue to cyan for negative values
HEATMAP_CMAP = 'coldnhot'
# The same order of colors without black, as weak relevance is transparent instead
OVERLAY_CMAP = '0cf,00f,7f:0000c0,80:c00000,f00,f80,fe0'
# As this for curves on white, on which yellow and cyan would hardly be seen
CURVE_CMAP = '00a,00f,7f:4080ff,80:ff8040,f00,a00'

MARGIN = 8
SMALLEST_LEGEND = 80
# Number of pixels above which pictures are drawn in strips
LARGE = 2 ** 20
FONT_SIZE = 16

# Brightness of red, green and blue as in ITU-R BT.601
BRIGHTNESS = np.array([0.299, 0.587, 0.114])
# Colors that are told apart with any kind of color vision, by the name 'safe': blue, black and orange on black, and
# blue to orange without black
SAFE = {'heatmap': '8ecdff,0072b2,000,d55e00,ffc48a', 'overlay': '8ecdff,0072b2,7f:00507d,80:a04600,d55e00,ffc48a'}
# Gray level of a curve without relevance, its width in pixels, and how much larger it is drawn before it is reduced
CURVE_GRAY, CURVE_WIDTH, OVERSAMPLING = 0.78, 2, 4


def read_image(path):
    '''Read a photograph as 8-bit RGB of Pillow, upright as its EXIF orientation says, in any format that Pillow reads.

    Transparent pixels are composed on white, 16-bit values are scaled to 8 bit, and of animations the first frame is
    used. A FileNotFoundError is raised if there is no such file, a ValueError if it is not an image that can be
    decoded, has values that are neither of 8 nor of 16 bit nor from 0 to 1, or so many pixels that decoding it might
    exhaust the memory (``PIL.Image.MAX_IMAGE_PIXELS``).
    '''
    is_path = isinstance(path, (str, os.PathLike))
    if is_path and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        # reading one may wait forever
        raise ValueError('it is a pipe or device: save the photograph to a file first')
    try:
        with warnings.catch_warnings():
            # what is wrong with a file is raised, and names the file, which warnings of decoders do not
            warnings.simplefilter('ignore')
            # Pillow itself only refuses twice as many pixels
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == 'EPS':
                    raise ValueError('EPS is a program for another program, save it as PNG first')
                image.load()
                return to_rgb(image)
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise ValueError('it is a folder, name the photographs in it') from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f'it has more than {Image.MAX_IMAGE_PIXELS} pixels and is refused, make it smaller first'
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError('it is not an image in a format that Pillow reads') from error
    except Exception as error:  # decoders raise anything for damaged files
        raise ValueError(f'it cannot be decoded ({" ".join(str(error).split()) or type(error).__name__})') from error


def to_rgb(image):
    '''Convert an image of Pillow's to 8-bit RGB, upright as its EXIF orientation says, or raise a ValueError.'''
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(('I', 'F')):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError('it holds NaN or infinite values')
        # these modes do not say how bright white is, so choose the smallest common maximum that fits
        largest = values.max(initial=0.)
        if image.mode.startswith('I;16') or largest > 255:
            white = 65535
        else:
            white = 1 if image.mode == 'F' and largest <= 1 else 255
        scaled = (values * (255 / white)).round()
        if scaled.min(initial=0.) < 0 or scaled.max(initial=0.) > 255:
            # what is cut off would be another photograph
            raise ValueError(
                f'it has values from {values.min():g} to {largest:g}: convert them to 8 or 16 bit, or from 0 to 1'
            )
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def _as_numbers(values, name):
    '''Get an array or tensor as a float64 array, or raise a TypeError if it is not of real numbers.'''
    # numpy has no bfloat16
    values = _as_array(values.float() if getattr(values, 'dtype', None) == torch.bfloat16 else values)
    if not np.isrealobj(values) or values.dtype.kind not in 'fiub':
        raise TypeError(f'{name} must be of real numbers, but is of type {values.dtype}!')
    return values.astype(np.float64)


def _check_heatmap(heatmap, dims=2):
    '''Get a heatmap as a float64 array, or raise a ValueError if it is not a finite array of shape (height, width).'''
    heatmap = _as_numbers(heatmap, 'A heatmap')
    shape = heatmap.shape
    while heatmap.ndim > dims and len(heatmap) == 1:
        heatmap = heatmap[0]
    if heatmap.ndim != dims or heatmap.size == 0:
        advice = ': draw one after the other, of relevance with channels the sum of them' if len(shape) > dims else ''
        raise ValueError(f'A heatmap must be of shape {map_shape(dims)}, but is {shape}{advice}!')
    if not np.isfinite(heatmap).all():
        raise ValueError('The heatmap contains NaN or infinite values!')
    return heatmap


def _as_array(value):
    return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)


def _check_picture(picture, name='A picture'):
    '''Get a picture as an array, or raise a ValueError if it is not 8-bit RGB of shape (height, width, 3).'''
    picture = _as_array(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(f'{name} must be of shape (height, width, 3), but is {picture.shape}!')
    if picture.dtype != np.uint8:
        raise ValueError(f'{name} must be of type uint8, but is {picture.dtype}!')
    return picture


def color_range(heatmap, percentile=99.5):
    '''End of the color range of heatmaps: a percentile of the magnitudes, or the largest if that is zero.'''
    check_number('percentile', percentile, 0, 100)
    if not percentile:
        raise ValueError(f'percentile={percentile} leaves no range of colors: it must be above 0!')
    magnitudes = np.abs(heatmap)
    return float(np.percentile(magnitudes, percentile)) or float(magnitudes.max())


def _scale(heatmap, percentile, bound=None):
    '''Divide by the end of the color range, and clip to [-1, 1].'''
    found = color_range(heatmap, percentile)
    if bound is not None:
        check_number('bound', bound, 0)
        found = bound
    return np.zeros_like(heatmap) if found == 0 else (heatmap / found).clip(-1, 1)


def _to_uint8(picture):
    return (picture * 255).round().clip(0, 255).astype(np.uint8)


def _color(scaled, cmap):
    '''Map values in [-1, 1] to colors, or raise an error which names color maps that there are.'''
    if not isinstance(cmap, (str, ColorMap)):
        raise TypeError(f'cmap={cmap!r} is neither the name of a color map of Zennit nor one of its color maps!')
    try:
        colors = get_cmap(SAFE['heatmap'] if cmap == 'safe' else cmap)
        if scaled.size <= LARGE:
            return colors((scaled + 1) / 2)
        # a table is faster, and finer than 8 bit
        table = colors(np.linspace(0, 1, 4097)[None])[0]
        return table[((scaled + 1) * 2048).round().astype(np.int16)]
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f'cmap={cmap!r} is no color map of Zennit: choose one of {", ".join(map(repr, CMAPS))}, or colors in '
            'hexadecimal notation such as \'00f,fff,f00\'.'
        ) from error


def check_cmap(cmap):
    '''Raise an error unless it is a color map, its name, or None, see :py:func:`draw_heatmap`.'''
    if cmap is not None:
        _color(np.zeros((1, 1)), cmap)


def draw_heatmap(heatmap, percentile=99.5, cmap=HEATMAP_CMAP, bound=None):
    '''Draw a heatmap in color, as an array of shape (height, width, 3) and type uint8.

    The color range is symmetric around zero, so that zero has the same color in each heatmap, also in one without
    negative values.

    Parameters
    ----------
    heatmap: :py:obj:`numpy.ndarray` or :py:obj:`torch.Tensor`
        Heatmap of shape (height, width), or with further axes of size one before.
    percentile: float, optional
        The color range ends at this percentile of the magnitudes. With 100 it ends at the largest, and a single bright
        pixel may make all others vanish. Default is 99.5.
    cmap: str or :py:obj:`zennit.cmap.ColorMap`, optional
        A color map of Zennit for values from minus to plus the end of the color range. Default is ``'coldnhot'``, with
        black for zero, red to white for positive, and blue to cyan for negative values. ``'safe'`` has orange instead
        of red, for any kind of color vision.
    bound: float, optional
        End of the color range instead of the percentile, for several heatmaps on one scale, see :py:func:`color_range`.

    A ValueError is raised if shapes do not match, a heatmap is not finite, an argument is out of range, or there is no
    such color map, and a TypeError if ``heatmap`` is not of real numbers, or another argument of a wrong type. The same
    holds for all functions that draw, whose arguments of the same name mean the same.
    '''
    scaled = _scale(_check_heatmap(heatmap), percentile, bound)
    # the color map is called instead of using zennit.image.imgify, whose palettes recent versions of Pillow reject
    return _in_strips(lambda part: _to_uint8(_color(part, cmap)), scaled)


def draw_overlay(photo, heatmap, percentile=99.5, opacity=0.9, cmap=OVERLAY_CMAP, bound=None):
    '''Draw a heatmap on the photograph it explains, as an array of shape (height, width, 3) and type uint8.

    The photograph, of this shape and type, turns gray, and color covers it in proportion to the magnitude of relevance:
    from red to yellow for positive, and from blue to cyan for negative relevance. The robust end of the color range
    prevents that the most relevant pixels alone are colored, and the opacity there is from 0 to 1, 0.9 by default. For
    all else, see :py:func:`draw_heatmap`.
    '''
    photo = _check_picture(photo, 'A photograph')
    heatmap = _check_heatmap(heatmap)
    if photo.shape[:2] != heatmap.shape:
        raise ValueError(
            f'Photograph and heatmap must be of the same height and width, but are of shape {photo.shape} and '
            f'{heatmap.shape}!'
        )
    check_number('opacity', opacity, 0, 1)
    return _in_strips(
        lambda photo, scaled: _cover(_gray(photo), scaled, opacity, cmap), photo, _scale(heatmap, percentile, bound)
    )


def _in_strips(draw, *arrays):
    '''Draw arrays of some height a few lines at a time, so that little memory is necessary.'''
    lines = max(LARGE // max(arrays[-1].shape[1], 1), 1)
    return np.concatenate([
        draw(*(array[start:start + lines] for array in arrays)) for start in range(0, len(arrays[-1]), lines)
    ])


def _gray(picture):
    '''Gray levels from 0 to 1, of shape (height, width, 1).'''
    return (picture @ BRIGHTNESS / 255)[..., None]


def _cover(gray, scaled, opacity, cmap):
    '''Cover gray levels from 0 to 1 with color in proportion to the magnitude of scaled relevance.'''
    alpha, cmap = opacity * np.abs(scaled)[..., None], SAFE['overlay'] if cmap == 'safe' else cmap
    return _to_uint8((1 - alpha) * gray + alpha * _color(scaled, cmap))


def draw_signal(signal, heatmap, size=(640, 160), percentile=99.5, opacity=1., cmap=CURVE_CMAP):
    '''Draw a signal as a curve colored by its relevance, as an array of shape (height, width, 3) and type uint8.

    Each channel has a panel of its own, one above the other, on a scale from its lowest to its highest value. The curve
    is gray where there is no relevance, and color covers it in proportion to the magnitude of relevance, as in
    :py:func:`draw_overlay`. A piece between two samples has the color of the one with the larger relevance. Of long
    signals, several samples share a pixel, which shows the most relevant one.

    The signal is of shape (length,) or (channels, length), with at least two samples, and its relevance of this shape,
    or of shape (length,) for all channels, which have the same color range. The size is the width and height of a panel
    in pixels. By default, positive relevance is orange to dark red, and negative relevance is light to dark blue. For
    all else, see :py:func:`draw_heatmap`.
    '''
    values, heatmap = _as_numbers(signal, 'A signal'), _as_numbers(heatmap, 'A heatmap')
    if values.ndim not in (1, 2) or values.size == 0 or values.shape[-1] < 2:
        raise ValueError(f'A signal must be of shape (length,) or (channels, length), but is {values.shape}!')
    if heatmap.shape not in (values.shape, values.shape[-1:]):
        raise ValueError(
            f'Signal and heatmap must be of the same length, but are of shape {values.shape} and {heatmap.shape}!'
        )
    if not np.isfinite(values).all() or not np.isfinite(heatmap).all():
        raise ValueError('The signal or its heatmap contains NaN or infinite values!')
    check_number('opacity', opacity, 0, 1)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f'size={size!r} is not a width and a height in pixels!')
    width, height = size
    for side in size:
        check_number('size', side, 2 * MARGIN)
    values = np.atleast_2d(values)
    scaled = np.broadcast_to(np.atleast_2d(_scale(heatmap, percentile)), values.shape)
    return np.concatenate([_draw_curve(*rows, int(width), int(height), opacity, cmap) for rows in zip(values, scaled)])


def _draw_curve(values, scaled, width, height, opacity, cmap):
    '''Draw a curve of at least two values in the colors of its scaled relevance.'''
    factor, margin = OVERSAMPLING, MARGIN / 2
    span = np.ptp(values)
    level = (values - values.min()) / span if span > 0 else np.full_like(values, 0.5)
    horizontal = (margin + np.linspace(0, 1, len(values)) * (width - 2 * margin)) * factor
    vertical = (margin + (1 - level) * (height - 2 * margin)) * factor
    larger = np.where(np.abs(scaled[1:]) > np.abs(scaled[:-1]), scaled[1:], scaled[:-1])
    colors = _cover(np.full((len(larger), 1), CURVE_GRAY), larger, opacity, cmap)
    canvas = Image.new('RGB', (width * factor, height * factor), 'white')
    draw = ImageDraw.Draw(canvas)
    # the most relevant ones last, as they would vanish below others
    for num in np.argsort(np.abs(larger), kind='stable'):
        points = [(horizontal[end], vertical[end]) for end in (num, num + 1)]
        draw.line(points, fill=tuple(map(int, colors[num])), width=CURVE_WIDTH * factor)
    return np.asarray(canvas.reduce(factor))


def draw_strip(heatmap, frames=None, count=8, percentile=99.5, opacity=0.9, cmap=None):
    '''Draw slices of a volume or frames of a video side by side, as an array of shape (height, width, 3).

    All of them, also those that are not drawn, have the same color range, so that it is seen in which there is most
    relevance. There are ``count`` of them (8, or all if there are fewer), evenly chosen from the first to the last.

    The heatmap is of shape (depth, height, width), or with further axes of size one before, or None for the frames
    alone. These, of shape (depth, height, width, 3) and type uint8, are covered as by :py:func:`draw_overlay`. Without
    them, the heatmap is drawn as by :py:func:`draw_heatmap`, see there for all else, also for color maps by default.
    '''
    check_number('count', count, 1)
    check_number('opacity', opacity, 0, 1)
    if heatmap is None and frames is None:
        raise ValueError('There is nothing to draw: give heatmap=None only with frames!')
    scaled = None if heatmap is None else _scale(_check_heatmap(heatmap, 3), percentile)
    if frames is not None:
        frames = _as_array(frames)
        if frames.ndim != 4:
            raise ValueError(f'Frames must be of shape (depth, height, width, 3), but are {frames.shape}!')
        if scaled is not None and frames.shape[:3] != scaled.shape:
            raise ValueError(
                f'Frames and heatmap must be of the same depth, height and width, but are of shape {frames.shape} and '
                f'{scaled.shape}!'
            )
    depth = len(frames if scaled is None else scaled)
    tiles = []
    for num in np.unique(np.linspace(0, depth - 1, min(int(count), depth)).round().astype(int)):
        tile = None if frames is None else _check_picture(frames[num], 'A frame')
        if scaled is not None and tile is None:
            tile = _to_uint8(_color(scaled[num], HEATMAP_CMAP if cmap is None else cmap))
        elif scaled is not None:
            tile = _cover(_gray(tile), scaled[num], opacity, OVERLAY_CMAP if cmap is None else cmap)
        if tiles:
            tiles.append(np.full_like(tile[:, :MARGIN // 4], 255))
        tiles.append(tile)
    return np.concatenate(tiles, 1)


def draw_comparison(rows, titles, captions=None, scale=1):
    '''Draw pictures in a table, for instance a photograph and its heatmaps by several methods in each row.

    All pictures, also the one returned, are arrays of shape (height, width, 3) and type uint8, and may be of different
    size. There are rows of the same number of pictures, titles of the columns, and captions above each row. Pictures
    are enlarged by an integer ``scale``, each pixel to a square.

    A ValueError is raised if there are no pictures, or a picture or the numbers of these do not fit.
    '''
    if not rows or not titles:
        raise ValueError('There is nothing to draw: a comparison needs at least one row and one column!')
    for num, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f'There are {len(titles)} titles, but {len(row)} pictures in row {num}!')
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f'There are {len(captions)} captions for {len(rows)} rows!')
    scale = as_integer('scale', scale, 1)
    rows = [
        [_check_picture(tile, f'Picture {col} of row {num}').repeat(scale, 0).repeat(scale, 1)
         for col, tile in enumerate(row)]
        for num, row in enumerate(rows)
    ]

    line = FONT_SIZE * scale + MARGIN
    heights = [max(tile.shape[0] for tile in row) for row in rows]
    widths = [max(row[col].shape[1] for row in rows) for col in range(len(titles))]
    lefts = MARGIN + np.cumsum([0] + [width + MARGIN for width in widths])
    above = 0 if captions is None else line
    canvas = Image.new(
        'RGB', (int(lefts[-1]), MARGIN + line + sum(above + height + MARGIN for height in heights)), 'white'
    )
    draw = ImageDraw.Draw(canvas)
    for title, left, width in zip(titles, lefts, widths):
        text, font = _fit(title, width, FONT_SIZE * scale)
        draw.text((left + width / 2, MARGIN + line / 2), text, fill='black', font=font, anchor='mm')
    top = MARGIN + line
    for num, row in enumerate(rows):
        if captions is not None:
            text, font = _fit(captions[num], canvas.width - 2 * MARGIN, FONT_SIZE * scale)
            draw.text((MARGIN, top + line / 2), text, fill='#404040', font=font, anchor='lm')
            top += above
        for tile, left, width in zip(row, lefts, widths):
            offset = (width - tile.shape[1]) // 2, (heights[num] - tile.shape[0]) // 2
            canvas.paste(Image.fromarray(tile), (int(left) + offset[0], top + offset[1]))
        top += heights[num] + MARGIN
    return np.asarray(canvas)


def draw_contours(picture, heatmap, percent=10.):
    '''Outline the most relevant pixels in white on black, as an array like the picture.

    The picture is of shape (height, width, 3) and type uint8, the heatmap of shape (height, width). Smooth ones have
    simple outlines. They enclose the ``percent`` (10 by default) pixels of the highest positive values. A ValueError is
    raised if it is not between 0 and 100, or if shapes do not match.
    '''
    import cv2
    picture, heatmap = _check_picture(picture), _check_heatmap(heatmap)
    check_number('percent', percent, 0, 100)
    if picture.shape[:2] != heatmap.shape:
        raise ValueError(f'Picture and heatmap are of shape {picture.shape} and {heatmap.shape}!')
    mask = (heatmap >= np.percentile(heatmap, 100 - percent)) & (heatmap > 0)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    # many small ones would hide the picture
    areas = [cv2.contourArea(outline) for outline in outlines]
    outlines = [outline for outline, area in zip(outlines, areas) if area >= max(areas) / 20]
    width = max(1, round(max(picture.shape) / 400))
    canvas = np.ascontiguousarray(picture).copy()
    for color, thickness in (((0, 0, 0), 3 * width), ((255, 255, 255), width)):
        cv2.drawContours(canvas, outlines, -1, color, thickness)
    return canvas


def draw_legend(width, cmap=HEATMAP_CMAP, bound=None, transparent=False, labels=('against', 'for')):
    '''Draw a color bar from minus to plus the end of the color range, as an array of shape (height, width, 3).

    The width is in pixels, at least 80. The end of the color range is written if ``bound`` is given. Weak relevance may
    be transparent, as in :py:func:`draw_overlay`. Labels say what negative and positive relevance mean.
    '''
    width = max(width, SMALLEST_LEGEND)
    ramp = np.linspace(-1, 1, width - 2)[None].repeat(FONT_SIZE - 4, 0)
    bar = _cover(np.full((*ramp.shape, 1), 0.5), ramp, 0.9, cmap) if transparent else _to_uint8(_color(ramp, cmap))
    line = FONT_SIZE
    canvas = Image.new('RGB', (width, len(bar) + 4 + line), 'white')
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 1, width - 1, len(bar) + 2), outline='#808080')
    canvas.paste(Image.fromarray(bar), (1, 2))
    texts = labels if bound is None else (f'-{bound:.2g} {labels[0]}', f'{labels[1]} {bound:.2g}')
    for text, left, anchor in ((texts[0], 0, 'lm'), (texts[1], width - 1, 'rm')):
        text, font = _fit(text, width // 2 - MARGIN, FONT_SIZE - 4)
        draw.text((left, canvas.height - line / 2), text, fill='black', font=font, anchor=anchor)
    return np.asarray(canvas)


def _fit(text, width, size):
    '''Find the font, at most of a size, in which a text fits a width, and shorten the text if none is readable.'''
    text = ' '.join(text.split())
    smallest = min(size, 10)
    for points in range(size, smallest - 1, -1):
        font = ImageFont.load_default(points)
        if font.getlength(text) <= width:
            return text, font
    while text and font.getlength(text + '…') > width:
        text = text[:-1]
    return text + '…', font
