'''Tests for reading photographs and drawing heatmaps.'''
import numpy as np
import pytest
import torch
from PIL import Image
from zennit.cmap import ColorMap

from zennit_resnet.image import (
    SAFE,
    draw_comparison,
    draw_heatmap,
    draw_overlay,
    draw_signal,
    draw_strip,
    read_image,
)


def quadrants():
    '''An upright picture whose corners all differ: red, green, blue and gray.'''
    picture = np.zeros((32, 48, 3), dtype=np.uint8)
    picture[:16, :24, 0] = 200
    picture[:16, 24:, 1] = 200
    picture[16:, :24, 2] = 200
    picture[16:, 24:] = 90
    return picture


def write(path, image, **kwargs):
    '''Write an image, and read it again as an array.'''
    image.save(path, **kwargs)
    result = read_image(path)
    assert result.mode == 'RGB'
    return np.asarray(result).astype(int)


# transpose operations that undo each EXIF orientation
@pytest.mark.parametrize('orientation, operation', [
    (1, None),
    (3, Image.Transpose.ROTATE_180),
    (6, Image.Transpose.ROTATE_90),
    (8, Image.Transpose.ROTATE_270),
    (5, Image.Transpose.TRANSPOSE),
])
def test_exif_orientation(tmp_path, orientation, operation):
    '''A photograph that the camera stored turned is upright after reading.'''
    image = Image.fromarray(quadrants())
    stored = image if operation is None else image.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = write(tmp_path / 'photo.png', stored, exif=exif)
    np.testing.assert_array_equal(result, quadrants())


@pytest.mark.parametrize('suffix, mode', [
    ('png', 'L'), ('png', 'P'), ('png', '1'), ('jpg', 'CMYK'), ('jpg', 'L'), ('gif', 'P')
])
def test_modes(tmp_path, suffix, mode):
    '''Gray, palette and CMYK pictures become the RGB pictures they look like.'''
    image = Image.fromarray(quadrants())
    if mode in ('L', '1'):
        image = Image.fromarray(np.repeat(np.uint8([[0, 255]] * 16), 16, 1))
    expected = np.asarray(image.convert('RGB')).astype(int)
    result = write(tmp_path / f'photo.{suffix}', image.convert(mode, **({'palette': 1} if mode == 'P' else {})))
    assert result.shape == expected.shape
    assert np.abs(result - expected).mean() < 8


def test_transparency_on_white(tmp_path):
    '''Transparent pixels become white, half transparent ones a mix, also with gray and palettes.'''
    alpha = np.uint8([[0, 128, 255]])
    color = np.concatenate([np.full((1, 3, 3), 100, dtype=np.uint8), alpha[..., None]], -1)
    assert write(tmp_path / 'rgba.png', Image.fromarray(color))[0].tolist() == [[255] * 3, [177] * 3, [100] * 3]
    gray = Image.merge('LA', [Image.fromarray(np.full((1, 3), 100, dtype=np.uint8)), Image.fromarray(alpha)])
    assert write(tmp_path / 'la.png', gray)[0].tolist() == [[255] * 3, [177] * 3, [100] * 3]
    palette = Image.fromarray(np.uint8([[0, 1, 1]]), mode='L').convert('P')
    palette.putpalette([9, 9, 9, 50, 60, 70])
    result = write(tmp_path / 'p.png', palette, transparency=0)
    assert result[0].tolist() == [[255] * 3, [50, 60, 70], [50, 60, 70]]


def test_16_bit(tmp_path):
    '''16-bit gray is scaled, and not cut off at 255.'''
    values = np.uint16([[0, 257 * 10, 257 * 128, 65535]])
    assert write(tmp_path / 'gray.png', Image.fromarray(values))[0, :, 0].tolist() == [0, 10, 128, 255]
    assert write(tmp_path / 'gray.tif', Image.fromarray(values.astype(np.int32)))[0, :, 0].tolist() == [0, 10, 128, 255]
    values = np.float32([[-1e-4, 0.5, 1.]])
    assert write(tmp_path / 'float.tif', Image.fromarray(values))[0, :, 0].tolist() == [0, 128, 255]
    # what would be cut off is another photograph
    for wrong in (np.int32([[0, 70000]]), np.int32([[-5, 200]]), np.float32([[-1., 1.]]), np.float32([[0., 90000.]])):
        with pytest.raises(ValueError, match=f'values from {wrong.min():g} to {wrong.max():g}'):
            write(tmp_path / 'wrong.tif', Image.fromarray(wrong))


def test_missing(tmp_path):
    '''A missing file is told from a damaged one.'''
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / 'missing.png')


def test_damaged(tmp_path):
    '''A file which is no image, one that is cut off, and a folder raise an error of one line.'''
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'empty.png').write_bytes(b'')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / 'whole.png')
    data = (tmp_path / 'whole.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(data[:len(data) // 2])
    for name in ('text.jpg', 'empty.png', 'cut.png', '.'):
        with pytest.raises(ValueError) as info:
            read_image(tmp_path / name)
        assert '\n' not in str(info.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    '''A picture of too many pixels is refused before it is decoded.'''
    path = tmp_path / 'large.png'
    Image.new('RGB', (40, 40)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1600)
    assert read_image(path).size == (40, 40)
    # Pillow itself warns above the limit, and raises an error above twice of it only
    for limit in (1599, 100):
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
        with pytest.raises(ValueError, match=f'more than {limit} pixels'):
            read_image(path)


def test_heatmap_colors():
    '''Zero is black, positive values are red to white, and negative values are blue to cyan.'''
    picture = draw_heatmap(np.array([[0., 0.25, 1., -0.25, -1.]]), percentile=100)
    assert picture.shape == (1, 5, 3)
    assert picture.dtype == np.uint8
    zero, weak, strong, negative, lowest = picture[0].astype(int)
    assert max(zero) <= 2
    assert weak[0] > 100 and max(weak[1:]) <= 2
    assert min(strong) >= 253
    assert negative[2] > 100 and max(negative[:2]) <= 2
    assert lowest[0] <= 2 and min(lowest[1:]) >= 253


def test_heatmap_is_robust():
    '''A single outlier does not make everything else black, unless the range is to end there.'''
    heatmap = np.random.default_rng(0).random((40, 40))
    outlier = heatmap.copy()
    outlier[3, 4] = 1e6
    assert np.abs(draw_heatmap(outlier).astype(int) - draw_heatmap(heatmap).astype(int)).mean() < 2
    assert np.delete(draw_heatmap(outlier, percentile=100).reshape(-1, 3), 3 * 40 + 4, 0).max() <= 2


def test_heatmap_scale_invariance():
    '''The picture does not depend on the unit of relevance, however large or small.'''
    heatmap = np.random.default_rng(0).normal(size=(8, 9))
    for factor in (1e-30, 2.**40):
        np.testing.assert_allclose(draw_heatmap(heatmap * factor), draw_heatmap(heatmap), atol=1)


def test_heatmap_degenerate():
    '''Zero relevance is drawn in the color of zero, and a single relevant pixel is visible.'''
    assert draw_heatmap(np.zeros((4, 4))).max() <= 2
    heatmap = np.zeros((100, 100))
    heatmap[5, 6] = 1e-9
    picture = draw_heatmap(heatmap)
    assert picture[5, 6].min() > 250
    assert np.delete(picture.reshape(-1, 3), 506, 0).max() <= 2


def test_overlay():
    '''Without relevance the photograph is gray, with relevance it is covered by color.'''
    photo = quadrants()
    heatmap = np.zeros((32, 48))
    heatmap[0, :10] = 1.
    heatmap[31, :10] = -1.
    before = photo.copy(), heatmap.copy()
    picture = draw_overlay(photo, heatmap)
    np.testing.assert_array_equal(photo, before[0])
    np.testing.assert_array_equal(heatmap, before[1])
    gray = np.asarray(Image.fromarray(photo).convert('L')).astype(int)
    np.testing.assert_allclose(picture[1:31].astype(int), gray[1:31, :, None].repeat(3, -1), atol=1)
    assert (picture[0, :10].astype(int) @ [1, 0, -1] > 150).all()
    assert (picture[31, :10].astype(int) @ [-1, 0, 1] > 150).all()
    np.testing.assert_array_equal(draw_overlay(photo, heatmap, opacity=0)[1:31], picture[1:31])


def test_overlay_opacity():
    '''More relevance covers more.'''
    picture = draw_overlay(np.zeros((1, 5, 3), dtype=np.uint8), np.array([[0., 0.1, 0.4, 0.7, 1.]]), percentile=100)
    assert (np.diff(picture[0, :, 0].astype(int)) > 10).all()


def test_comparison():
    '''Pictures are placed side by side unchanged, rows may differ in height.'''
    rng = np.random.default_rng(0)
    rows = [
        [rng.integers(0, 250, (20, 64, 3), dtype=np.uint8) for _ in range(3)],
        [rng.integers(0, 250, (33, 50, 3), dtype=np.uint8) for _ in range(3)],
    ]
    figure = draw_comparison(rows, ['a', 'b', 'a very long title that cannot fit its column'], ['first', 'second'])
    assert figure.dtype == np.uint8
    for row in rows:
        lefts = []
        for tile in row:
            height, width = tile.shape[:2]
            windows = np.lib.stride_tricks.sliding_window_view(figure, tile.shape)[..., 0, :, :, :]
            top, left = np.argwhere((windows[..., :4, :4, :] == tile[:4, :4]).all((-1, -2, -3)))[0]
            np.testing.assert_array_equal(figure[top:top + height, left:left + width], tile)
            lefts.append(left)
        assert lefts == sorted(lefts)
    # text is drawn in the header, and nothing else than pictures reaches the margin
    assert figure[:30].min() < 100
    assert figure[:, :4].min() == figure[:, -4:].min() == 255


def test_comparison_scale():
    '''Each pixel becomes a square.'''
    tile = quadrants()
    figure = draw_comparison([[tile]], [''], scale=3)
    large = tile.repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(figure[-8 - len(large):-8, 8:-8], large)


@pytest.mark.parametrize('function, message', [
    (lambda: draw_heatmap(np.zeros((3, 4, 5))), r'\(height, width\).*\(3, 4, 5\)'),
    (lambda: draw_heatmap(np.array([[0., np.nan]])), 'NaN'),
    (lambda: draw_heatmap(np.zeros((4, 5)), percentile=0), 'percentile=0'),
    (lambda: draw_overlay(np.zeros((3, 4, 5), dtype=np.uint8), np.zeros((4, 5))), r'photograph.*\(3, 4, 5\)'),
    (lambda: draw_overlay(np.zeros((4, 5, 3)), np.zeros((4, 5))), 'uint8.*float64'),
    (lambda: draw_overlay(np.zeros((4, 5, 3), dtype=np.uint8), np.zeros((5, 4))), r'\(4, 5, 3\).*\(5, 4\)'),
    (lambda: draw_overlay(np.zeros((4, 5, 3), dtype=np.uint8), np.zeros((4, 5)), opacity=2), 'opacity=2'),
    (lambda: draw_comparison([], []), 'at least one'),
    (lambda: draw_comparison([[quadrants()]], ['a', 'b']), '2 titles, but 1 pictures in row 0'),
    (lambda: draw_comparison([[quadrants()]], ['a'], ['b', 'c']), '2 captions for 1 rows'),
    (lambda: draw_comparison([[quadrants()[..., 0]]], ['a']), r'Picture 0 of row 0.*\(32, 48\)'),
    (lambda: draw_comparison([[quadrants()]], ['a'], scale=0.5), 'scale=0.5'),
    (lambda: draw_signal(np.zeros(5), np.zeros(5), size=100), 'size=100'),
    (lambda: draw_signal(np.zeros(5), np.zeros(5), size=(100,)), r'size=\(100,\)'),
])
def test_errors(function, message):
    '''Errors name the offending shape or value.'''
    with pytest.raises(ValueError, match=message):
        function()


@pytest.mark.parametrize('dtype', [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.bool
])
def test_tensors(dtype):
    '''Tensors of any type, also those which require a gradient, are drawn as their arrays.'''
    heatmap = (torch.arange(20.).view(4, 5) - 7).to(dtype)
    expected = draw_heatmap(heatmap.double().numpy())
    photo = torch.arange(60, dtype=torch.uint8).view(4, 5, 3)
    overlay = draw_overlay(photo.numpy(), heatmap.double().numpy())
    given = [heatmap, heatmap[None], heatmap[None, None]]
    given += [heatmap.clone().requires_grad_()] if heatmap.is_floating_point() else []
    for value in given:
        np.testing.assert_array_equal(draw_heatmap(value), expected)
        np.testing.assert_array_equal(draw_overlay(photo, value), overlay)
    np.testing.assert_array_equal(draw_comparison([[photo]], ['a']), draw_comparison([[photo.numpy()]], ['a']))


@pytest.mark.parametrize('draw', [
    lambda cmap: draw_heatmap(np.eye(3), cmap=cmap),
    lambda cmap: draw_overlay(np.zeros((3, 3, 3), dtype=np.uint8), np.eye(3), cmap=cmap),
])
def test_color_maps(draw):
    '''The error names the color map and those that there are.'''
    for cmap in ('viridis', 'jet', '', 'RdBu_r'):
        with pytest.raises(ValueError) as info:
            draw(cmap)
        assert repr(cmap) in str(info.value) and "'coldnhot'" in str(info.value) and "'bwr'" in str(info.value)
    for cmap in (None, 3, len):
        with pytest.raises(TypeError, match='cmap='):
            draw(cmap)
    for cmap in ('bwr', '00f,fff,f00', ColorMap('000,fff')):
        draw(cmap)


@pytest.mark.parametrize('name, function', [
    ('percentile', lambda value: draw_heatmap(np.eye(3), percentile=value)),
    ('opacity', lambda value: draw_overlay(np.zeros((3, 3, 3), dtype=np.uint8), np.eye(3), opacity=value)),
    ('scale', lambda value: draw_comparison([[quadrants()]], ['a'], scale=value)),
])
def test_numbers(name, function):
    '''What is no number, or is NaN, is named.'''
    for value in (float('nan'), -1, 1000 if name != 'scale' else float('inf')):
        with pytest.raises(ValueError, match=f'{name}='):
            function(value)
    for value in ('1', None, True):
        with pytest.raises(TypeError, match=f'{name}='):
            function(value)


def test_what_is_no_heatmap():
    '''Types that are no numbers, and batches.'''
    for value in ('map', np.array([['a']]), np.eye(2) * 1j, torch.eye(2) * 1j):
        with pytest.raises(TypeError, match='real numbers'):
            draw_heatmap(value)
    with pytest.raises(ValueError, match=r'\(2, 3, 3\)'):
        draw_heatmap(torch.zeros(2, 3, 3))


def test_signal():
    '''The curve goes through the values, red and blue where relevance is positive and negative, and gray elsewhere.'''
    signal, heatmap = np.zeros(101), np.zeros(101)
    signal[50:] = 1.
    heatmap[10:20], heatmap[70:80] = 1., -1.
    picture = draw_signal(signal, heatmap, size=(208, 100))
    assert picture.shape == (100, 208, 3) and picture.dtype == np.uint8
    # the first value is at the lower left, the last at the upper right, both at a distance from the border
    dark = picture.min(2) < 230
    rows, columns = np.nonzero(dark)
    assert (columns.min(), columns.max()) == (4, 203) and 3 <= rows.min() <= 4 and 95 <= rows.max() <= 97
    assert rows[columns < 90].min() >= 94 and rows[columns > 110].max() <= 5
    # sample n is at column 4 + 2 n
    red = dark & (picture[..., 0] > picture[..., 2].astype(int) + 100)
    blue = dark & (picture[..., 2] > picture[..., 0].astype(int) + 100)
    for mask, first, last in ((red, 9, 20), (blue, 69, 80)):
        columns = np.nonzero(mask.any(0))[0]
        np.testing.assert_allclose((columns.min(), columns.max()), (4 + 2 * first, 4 + 2 * last), atol=1)
        assert mask[:, columns].any(0).all()
    gray = picture[dark & ~red & ~blue].astype(int)
    assert (np.ptp(gray, 1) < 100).all() and np.median(np.ptp(gray, 1)) == 0


def test_signal_channels():
    '''Each channel has its own panel and relevance, on one color range; a single heatmap is for all of them.'''
    signal = np.stack([np.linspace(-1, 1, 30), np.linspace(3, 2, 30)])
    heatmap = np.stack([np.ones(30), np.full(30, .5)])
    picture = draw_signal(signal, heatmap, (100, 40))
    assert picture.shape == (80, 100, 3)
    np.testing.assert_array_equal(picture[:40], draw_signal(signal[0], heatmap[0], (100, 40)))
    assert np.abs(picture[40:].astype(int) - draw_signal(signal[1], heatmap[1], (100, 40))).max() > 50
    shared = draw_signal(signal, heatmap[0], (100, 40))
    np.testing.assert_array_equal(shared[40:], draw_signal(signal[1], heatmap[0], (100, 40)))
    np.testing.assert_array_equal(draw_signal(torch.tensor(signal), torch.tensor(heatmap), (100, 40)), picture)


def test_signal_degenerate():
    '''A constant signal is a line in the middle, and a relevant sample of a long one is visible.'''
    picture = draw_signal(np.full(5, 7.), np.zeros(5), (60, 41))
    assert set(np.nonzero(picture.min(2) < 230)[0]) <= {19, 20, 21} and (picture[20, 5:55] == picture[20, 30]).all()
    signal, heatmap = np.random.default_rng(0).normal(size=20000), np.zeros(20000)
    heatmap[10000] = 1e-9
    picture = draw_signal(signal, heatmap, (200, 50)).astype(int)
    assert (picture[..., 0] - picture[..., 2])[:, 98:102].max() > 60
    np.testing.assert_array_equal(picture[:, :90], draw_signal(signal, 0 * heatmap, (200, 50))[:, :90])


@pytest.mark.parametrize('draw, cmap', [
    (lambda values, cmap: draw_signal(values[0, 0], values[0, 0], (60, 41), cmap=cmap), SAFE['overlay']),
    (lambda values, cmap: draw_strip(values, cmap=cmap), SAFE['heatmap']),
    (lambda values, cmap: draw_strip(values, np.full((2, 4, 5, 3), 99, np.uint8), cmap=cmap), SAFE['overlay']),
], ids=['signal', 'slices', 'frames'])
def test_safe_colors(draw, cmap):
    '''Signals, slices and frames have the colors for the color-blind by their name, too.'''
    values = np.random.default_rng(0).normal(size=(2, 4, 5))
    np.testing.assert_array_equal(draw(values, 'safe'), draw(values, cmap))


def test_strip():
    '''Slices are those of draw_heatmap and draw_overlay on one color range, chosen evenly with both ends.'''
    heatmap = np.random.default_rng(0).normal(size=(9, 6, 5)) * np.arange(1, 10)[:, None, None]
    frames = np.random.default_rng(1).integers(0, 256, (9, 6, 5, 3), dtype=np.uint8)
    strip, covered, alone = draw_strip(heatmap, count=3), draw_strip(heatmap, frames, 3), draw_strip(None, frames, 3)
    assert strip.shape == covered.shape == alone.shape == (6, 3 * 5 + 2 * 2, 3)
    whole = draw_heatmap(heatmap.reshape(54, 5)).reshape(9, 6, 5, 3)
    overlay = draw_overlay(frames.reshape(54, 5, 3), heatmap.reshape(54, 5)).reshape(9, 6, 5, 3)
    for left, num in zip((0, 7, 14), (0, 4, 8)):
        np.testing.assert_array_equal(strip[:, left:left + 5], whole[num])
        np.testing.assert_array_equal(covered[:, left:left + 5], overlay[num])
        np.testing.assert_array_equal(alone[:, left:left + 5], frames[num])
    assert (strip[:, 5:7] == 255).all() and (strip[:, 12:14] == 255).all()
    assert draw_strip(torch.tensor(heatmap)[None, None]).shape == (6, 8 * 5 + 7 * 2, 3)
    assert draw_strip(heatmap[:2]).shape == (6, 2 * 5 + 2, 3)


FRAMES = np.zeros((3, 4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize('function, message', [
    (lambda: draw_signal(np.zeros((1, 2, 3)), np.zeros(3)), r'\(1, 2, 3\)'),
    (lambda: draw_signal(np.zeros(1), np.zeros(1)), r'\(1,\)'),
    (lambda: draw_signal(np.zeros((2, 9)), np.zeros(8)), r'\(2, 9\).*\(8,\)'),
    (lambda: draw_signal(np.zeros(9), np.zeros((2, 9))), r'\(9,\).*\(2, 9\)'),
    (lambda: draw_signal(np.full(9, np.nan), np.zeros(9)), 'NaN'),
    (lambda: draw_signal(np.zeros(9), np.full(9, np.inf)), 'NaN or infinite'),
    (lambda: draw_signal(np.zeros(9), np.zeros(9), size=(640, 3)), 'size=3'),
    (lambda: draw_signal(np.zeros(9), np.zeros(9), opacity=-1), 'opacity=-1'),
    (lambda: draw_strip(np.zeros((4, 5))), r'\(depth, height, width\).*\(4, 5\)'),
    (lambda: draw_strip(np.zeros((2, 3, 4, 5))), r'\(2, 3, 4, 5\)'),
    (lambda: draw_strip(np.zeros((3, 4, 6)), FRAMES), r'\(3, 4, 5, 3\).*\(3, 4, 6\)'),
    (lambda: draw_strip(np.zeros((3, 4, 5)), FRAMES[..., 0]), r'\(3, 4, 5\)'),
    (lambda: draw_strip(np.zeros((3, 4, 5)), FRAMES / 255), 'uint8.*float64'),
    (lambda: draw_strip(np.zeros((3, 4, 5)), count=0), 'count=0'),
    (lambda: draw_strip(None), 'heatmap=None'),
])
def test_signal_and_strip_errors(function, message):
    '''Errors name the offending shape or value.'''
    with pytest.raises(ValueError, match=message):
        function()
