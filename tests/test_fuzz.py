'''Files of others: damaged, huge, odd and malicious photographs and weights, and odd names, on the command line.'''
import contextlib
import functools
import io
import os
import pickle
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from click.testing import CliRunner
from helpers.networks import narrow_resnet18
from helpers.profile import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model, get_model_weights

from zennit_resnet.cli import main
from zennit_resnet.image import read_image
from zennit_resnet.models import load_classifier

pytestmark = pytest.mark.once

SIZE = 64
COLOR = 200, 60, 30
# the same in black and white, as in ITU-R BT.601
GRAY = 98
SMALL_MODEL = 'squeezenet1_1'


@pytest.fixture(name='tiny', scope='module')
def fixture_tiny():
    '''State dict of a ResNet-18 with three classes, and statistics of batch normalization that fit its activations.'''
    torch.manual_seed(1)
    model = narrow_resnet18(num_classes=3)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, SIZE, SIZE))
        model.fc.bias.copy_(torch.tensor([3., 3.5, 4.]))
    return dict(model.state_dict())


@pytest.fixture(name='weights', scope='module')
def fixture_weights(tiny, tmp_path_factory):
    '''Path of its weights.'''
    path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
    save_file(tiny, path)
    return path


@pytest.fixture(name='run')
def fixture_run(weights, tmp_path):
    '''Run a command, which must end as commands end. Returns the result, and what it was to write to.'''
    def run(command, *args, charset='utf-8'):
        '''Run it on files.'''
        out = tmp_path / {'explain': 'explained', 'compare': 'compared.png', 'ledger': 'ledgers'}[command]
        options = ['--model', 'narrow_resnet18', '--weights', weights, '--size', SIZE, '--out', out, '--overwrite']
        if command == 'compare':
            options += ['--methods', 'resnet_lrp_ratio,input_x_gradient']
        result = CliRunner(charset=charset).invoke(main, [command, *map(str, [*options, *args])])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert 'Traceback' not in result.output
        return result, out
    return run


@pytest.fixture(name='good')
def fixture_good(tmp_path):
    '''Paths of two photographs with nothing wrong.'''
    rng, paths = np.random.default_rng(0), [tmp_path / 'good_1.png', tmp_path / 'good_2.jpg']
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(path)
    return paths


def assert_one_line(text):
    '''A message which is a single line, with nothing that moves the cursor.'''
    assert text.strip() and text.isprintable(), text


# -- damaged photographs -----------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def samples():
    '''Small files of all formats and modes that Pillow writes, by name.'''
    rng, result = np.random.default_rng(0), {}
    image = Image.fromarray(rng.integers(0, 256, (16, 23, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010e] = 6, 'text'
    Image.init()
    # the first two are no photographs, and newer versions of Pillow do not write the last
    for kind in sorted(set(Image.SAVE) - {'PDF', 'EPS', 'IM'}):
        for mode in ('RGB', 'L', 'P', '1', 'RGBA', 'CMYK', 'I;16', 'F'):
            file = io.BytesIO()
            stored = Image.fromarray(rng.integers(0, 65536, (9, 7)).astype(np.uint16)) if mode == 'I;16' else (
                image.convert(mode)
            )
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                stored.save(file, kind, **({'exif': exif} if kind in ('JPEG', 'PNG', 'TIFF', 'WEBP', 'AVIF') else {}))
                result[f'{kind} {mode}'] = file.getvalue()
    for compression in ('tiff_lzw', 'jpeg', 'tiff_adobe_deflate', 'packbits'):
        file = io.BytesIO()
        image.save(file, 'TIFF', compression=compression)
        result[f'TIFF {compression}'] = file.getvalue()
    for kind in ('GIF', 'WEBP', 'PNG', 'TIFF'):
        file = io.BytesIO()
        image.save(file, kind, save_all=True, append_images=[image.rotate(180)])
        result[f'{kind} frames'] = file.getvalue()
    return result


@st.composite
def damages(draw):
    '''What becomes of the bytes of a file: the end is missing, a part is missing, or bytes are others.'''
    where, kind = st.floats(0, 1), draw(st.sampled_from(['cut', 'part', 'header', 'header', 'bytes']))
    if kind == 'cut':
        return kind, draw(where)
    if kind == 'part':
        return kind, *sorted([draw(where), draw(where)])
    byte = st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255))
    return kind, draw(st.lists(st.tuples(where, byte), min_size=1, max_size=8))


def damage(data, kind, *args):
    '''Damage bytes.'''
    data, length = bytearray(data), min(len(data), 200) if kind == 'header' else len(data)
    if kind == 'cut':
        return bytes(data[:int(args[0] * len(data))])
    if kind == 'part':
        return bytes(data[:int(args[0] * len(data))] + data[int(args[1] * len(data)):])
    for position, value in args[0]:
        data[min(int(position * length), len(data) - 1)] = value
    return bytes(data)


@settings(PROFILE, max_examples=10 * PROFILE.max_examples)
@given(st.data())
def test_damaged_image(tmp_path_factory, data):
    '''A damaged file is read as far as it can be, or refused in one line. Decoders print nothing by themselves.'''
    name = data.draw(st.sampled_from(sorted(samples())), 'file')
    path = tmp_path_factory.getbasetemp() / 'damaged'
    path.write_bytes(damage(samples()[name], *data.draw(damages(), 'damage')))
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter('always')
        try:
            image = read_image(path)
        except ValueError as error:
            assert_one_line(str(error))
        else:
            assert image.mode == 'RGB' and min(image.size) > 0
            assert np.asarray(image).shape == (image.height, image.width, 3)
    assert not printed


def broken_images(folder):
    '''Files in a folder which are no photographs.'''
    rng, paths = np.random.default_rng(1), []

    def write(name, data):
        paths.append(folder / name)
        paths[-1].write_bytes(data)

    for kind in ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'PPM', 'AVIF'):
        data = samples().get(f'{kind} RGB')
        if data is not None:
            write(f'magic.{kind}', b'\0\1' + data[2:])
            write(f'cut 10.{kind}', data[:10])
            write(f'cut 40 %.{kind}', data[:int(.4 * len(data))])
    write('empty.png', b'')
    write('text.jpg', 'a text, nothing else\n'.encode())
    write('page.png', b'<html><body>404</body></html>')
    write('vector.svg', b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    write('noise.png', rng.bytes(5000))
    write('program.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(pwned) print\nshowpage\n')
    (folder / 'folder.png').mkdir()
    return [*paths, folder / 'folder.png', folder / 'missing.png', folder / 'text.jpg' / 'below.png']


@pytest.mark.parametrize('command', ['explain', 'compare', 'ledger'])
def test_broken_images(run, good, tmp_path, command):
    '''Each file that is no photograph gives one line with its name, and those beside them are processed.'''
    (tmp_path / 'broken').mkdir()
    broken = broken_images(tmp_path / 'broken')
    alone, out = run(command, *good)
    assert alone.exit_code == 0 and alone.stderr == ''
    expected = {path.name: np.load(path) for path in out.glob('*_relevance.npy')}
    pictures = {path: Image.open(path).size for path in [*out.glob('*.png'), *[out] * out.is_file()]}
    assert pictures
    for path in pictures:
        path.unlink()
    result, _ = run(command, good[0], *broken, good[1], '--batch-size', 5)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(broken) > 20
    for line, path in zip(lines, broken):
        assert line.startswith(f'Error: {path}: ')
        assert_one_line(line)
    assert pictures == {path: Image.open(path).size for path in [*out.glob('*.png'), *[out] * out.is_file()]}
    for name, relevance in expected.items():
        np.testing.assert_allclose(np.load(out / name), relevance, atol=1e-5 * np.abs(relevance).max())


def test_program():
    '''An EPS file, which Pillow would have another program run, is refused before it does.'''
    with pytest.raises(ValueError, match='PNG') as info, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr('subprocess.check_call', lambda *args, **kwargs: pytest.fail('a program was run'))
        monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', 'gs')
        file = io.BytesIO()
        Image.new('RGB', (4, 4)).save(file, 'EPS')
        file.seek(0)
        read_image(file)
    assert 'EPS' in str(info.value)


# -- huge photographs --------------------------------------------------------------------------------------------------

def chunk(name, data):
    '''A chunk of a PNG file.'''
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def huge_images(side):
    '''Small files which say that they are large.'''
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(bytes(10 ** 6))
    ) + chunk(b'IEND', b'')
    small = Image.new('RGB', (300, 200))

    def patch(kind, fmt):
        '''Replace the size.'''
        file = io.BytesIO()
        small.save(file, kind)
        data, former = file.getvalue(), struct.pack(fmt, *((200, 300) if kind == 'JPEG' else (300, 200)))
        assert former in data
        return data.replace(former, struct.pack(fmt, side, side))

    result = {
        'large.png': png, 'large.jpg': patch('JPEG', '>HH'), 'large.gif': patch('GIF', '<HH'),
        'large.bmp': patch('BMP', '<ii'), 'large.ppm': f'P6 {side} {side} 255\n'.encode() + bytes(100),
        'large.tga': patch('TGA', '<HH'), 'large.pgm': f'P5 {side} {side} 255\n'.encode() + bytes(100),
        # an icon of 16 x 16, which is a picture that says otherwise
        'large.ico': struct.pack('<HHHBBBBHHII', 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png,
    }
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (278, side), (279, 100)]
    result['large.tif'] = b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(
        struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags
    ) + bytes(104)
    return result


@contextlib.contextmanager
def limited_memory(amount):
    '''Allow for some more memory only, where this can be limited.'''
    resource = pytest.importorskip('resource')
    status = Path('/proc/self/statm')
    if not status.exists():
        pytest.skip('needs to know the memory in use')
    used, limits = int(status.read_text().split()[0]) * resource.getpagesize(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + amount, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_huge_images(run, good, tmp_path):
    '''Decompression bombs are refused in one line without memory for them, and others are explained.'''
    paths = []
    # Pillow itself refuses twice as many pixels as it warns of
    for side in (50000, 10000):
        for name, data in huge_images(side).items():
            paths.append(tmp_path / f'{side}_{name}')
            paths[-1].write_bytes(data)
    with limited_memory(10 ** 9):
        result, out = run('explain', good[0], *paths, good[1])
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and len(lines) == len(paths)
    for line, path in zip(lines, paths):
        assert line.startswith(f'Error: {path}: it has more than') and 'refused' in line
        assert_one_line(line)
    assert len(list(out.glob('*_relevance.npy'))) == 2


def test_huge_images_would_be_read(tmp_path):
    '''The same files with a smaller size are not refused for their size.'''
    for name, data in huge_images(2000).items():
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(ValueError):
            read_image(tmp_path / name)
            continue
        with pytest.raises(ValueError, match='cannot be decoded'):
            read_image(tmp_path / name)


# -- odd photographs ---------------------------------------------------------------------------------------------------

def odd_images():
    '''Photographs of one color in many forms: name, picture, arguments for saving, and color.'''
    image, size = Image.new('RGB', (30, 20), COLOR), (30, 20)
    gray = np.full((20, 30), GRAY)
    clear = Image.new('RGBA', size, (*COLOR, 0))
    palette = image.convert('P', palette=Image.Palette.ADAPTIVE)
    frames = {'save_all': True, 'append_images': [Image.new('RGB', size, 'blue')] * 2}
    half = Image.new('RGBA', size, (0, 0, 0, 128))
    rows = [
        ('cmyk.jpg', image.convert('CMYK'), {}, COLOR), ('cmyk.tif', image.convert('CMYK'), {}, COLOR),
        ('progressive.jpg', image, {'progressive': True}, COLOR),
        ('palette.png', palette, {}, COLOR), ('palette.gif', palette, {}, COLOR), ('palette.bmp', palette, {}, COLOR),
        ('transparent.png', palette, {'transparency': palette.getpixel((0, 0))}, (255, 255, 255)),
        ('transparent.gif', palette, {'transparency': palette.getpixel((0, 0))}, (255, 255, 255)),
        ('key.png', image, {'transparency': COLOR}, (255, 255, 255)),
        ('clear.webp', clear, {'lossless': True, 'exact': True}, (255, 255, 255)), ('half.png', half, {}, (127,) * 3),
        ('half.tif', half, {}, (127,) * 3), ('alpha.png', image.convert('RGBA'), {}, COLOR),
        ('la.png', Image.new('LA', size, (GRAY, 255)), {}, (GRAY,) * 3), ('l.jpg', image.convert('L'), {}, (GRAY,) * 3),
        ('clear la.png', Image.new('LA', size, (GRAY, 0)), {}, (255,) * 3),
        ('16.png', Image.fromarray((gray * 257).astype(np.uint16)), {}, (GRAY,) * 3),
        ('16.tif', Image.fromarray((gray * 257).astype(np.uint16)), {}, (GRAY,) * 3),
        ('32.tif', Image.fromarray((gray * 257).astype(np.int32)), {}, (GRAY,) * 3),
        ('float.tif', Image.fromarray((gray / 255).astype(np.float32)), {}, (GRAY,) * 3),
        ('float 255.tif', Image.fromarray(gray.astype(np.float32)), {}, (GRAY,) * 3),
        ('1 white.png', Image.new('1', size, 1), {}, (255,) * 3), ('1 black.tif', Image.new('1', size), {}, (0,) * 3),
        ('frames.gif', image, frames, COLOR), ('frames.webp', image, {**frames, 'lossless': True}, COLOR),
        ('frames.png', image, frames, COLOR), ('pages.tif', image, frames, COLOR), ('frames.mpo', image, frames, COLOR),
        ('pixel.png', Image.new('RGB', (1, 1), COLOR), {}, COLOR), ('wide.png', image.resize((3000, 2)), {}, COLOR),
        ('tall.jpg', image.resize((2, 3000)), {}, COLOR), ('pixel.gif', Image.new('L', (1, 1), GRAY), {}, (GRAY,) * 3),
        ('jpeg without suffix', image, {'format': 'JPEG'}, COLOR), ('png.jpg', image, {'format': 'PNG'}, COLOR),
    ]
    if 'JPEG2000' in Image.SAVE:
        rows.append(('photo.jp2', image, {}, COLOR))
    if int(PIL.__version__.split('.', 1)[0]) >= 13:
        # which Pillow 12, the last one for Python 3.10, writes but cannot read
        rows.append(('ycbcr.tif', image.convert('YCbCr'), {}, COLOR))
    return rows


def test_odd_images(run, tmp_path):
    '''All kinds of photographs are read as what they look like, and explained.'''
    paths, expected = [], []
    for name, image, options, color in odd_images():
        paths.append(tmp_path / name)
        image.save(paths[-1], **options)
        pixels = np.asarray(read_image(paths[-1])).reshape(-1, 3).astype(int)
        assert np.abs(pixels - color).max() <= 8, name
        expected.append(image.size)
        assert read_image(paths[-1]).size == image.size
    result, out = run('explain', *paths, '--batch-size', 16)
    assert result.exit_code == 0 and result.stderr == ''
    relevance = [np.load(path) for path in out.glob('*_relevance.npy')]
    assert len(relevance) == len(paths)
    assert all(elem.shape == (3, SIZE, SIZE) and np.isfinite(elem).all() and elem.any() for elem in relevance)
    ratios = [float(number) for number in re.findall('ratio ([0-9.]+)', result.stdout)]
    np.testing.assert_allclose(ratios, np.ones(len(paths)), atol=1e-3)


# how cameras store an upright picture for each EXIF orientation
STORED = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize('suffix, options', [
    ('png', {}), ('jpg', {'quality': 100, 'subsampling': 0}), ('tif', {}), ('webp', {'lossless': True}),
])
def test_rotated_images(run, tmp_path, suffix, options):
    '''Photographs are upright, however the camera was held, and give the same relevance.'''
    upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f'{orientation}.{suffix}'
        Image.fromarray(np.ascontiguousarray(store(upright))).save(path, exif=exif, **options)
        assert np.abs(np.asarray(read_image(path)).astype(int) - upright).max() <= (8 if suffix == 'jpg' else 0)
    if suffix == 'png':
        result, out = run('explain', *sorted(tmp_path.glob('*.png')))
        assert result.exit_code == 0
        first, *others = [np.load(path) for path in sorted(out.glob('*_relevance.npy'))]
        assert len(others) == 7
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-6 * np.abs(first).max())


@pytest.mark.parametrize('exif', [
    b'Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x09\0\0\0\0\0\0\0',
    b'Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0',
    b'Exif\0\0II*\0\x08\0\0\0\xff\xff', b'Exif\0\0garbage', b'Exif\0\0', b'\0',
])
def test_broken_orientation(tmp_path, exif):
    '''A photograph with an orientation that there is not, or with EXIF data that is damaged, is read or refused.'''
    Image.new('RGB', (30, 20), COLOR).save(tmp_path / 'photo.jpg', exif=exif)
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter('always')
        try:
            assert read_image(tmp_path / 'photo.jpg').size == (30, 20)
        except ValueError as error:
            assert_one_line(str(error))
    assert not printed


# -- odd names ---------------------------------------------------------------------------------------------------------

NAMES = [
    'two words.png', '日本 🐱 café.png', '-dash.png', '--help.png', '$1_$2.png', '%s{0}.png', '.png', 'a.b.c.png',
    "it's.png", 'new\nline.png', 'red\x1b[31m.png', os.fsdecode(b'not utf-8 \xff.png'), 'x' * 150 + '.png', '*.png',
    'no suffix',
]


@pytest.fixture(name='named')
def fixture_named(good, tmp_path):
    '''Photographs with odd names, those that the file system allows for.'''
    (tmp_path / 'named').mkdir()
    data, paths = good[0].read_bytes(), []
    for name in NAMES:
        with contextlib.suppress(OSError, ValueError):
            (tmp_path / 'named' / name).write_bytes(data)
            paths.append(tmp_path / 'named' / name)
    return paths


@pytest.mark.parametrize('charset', ['utf-8', 'ascii'])
@pytest.mark.parametrize('command', ['explain', 'compare'])
def test_names(run, named, command, charset):
    '''Whatever the name of a photograph and the encoding of the output, it is processed, and named in one line.'''
    result, out = run(command, *named, charset=charset)
    assert result.exit_code == 0 and result.stderr == ''
    if command == 'compare':
        assert result.stdout.splitlines() == [f'written {out}']
        return
    assert len(list(out.glob('*_relevance.npy'))) == len(named)
    lines = [line for line in result.stdout.splitlines() if not line.startswith('  ')]
    assert len(lines) == len(named)
    for line in lines:
        assert_one_line(line)


def test_names_in_plots(run, named):
    '''Names are no formulas in the plots of ledgers.'''
    chosen = [path for path in named if any(char in path.name for char in '$\n\udcff')]
    result, out = run('ledger', *chosen)
    assert result.exit_code == 0 and len(chosen) > 1
    assert len(list(out.glob('*.png'))) == len(chosen)


def test_names_of_missing(run, tmp_path):
    '''A photograph that is not there is named in one line, too.'''
    result, _ = run('explain', *(tmp_path / 'nowhere' / name for name in NAMES), charset='ascii')
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(NAMES) and all(line.startswith('Error: ') for line in lines)
    for line in lines:
        assert_one_line(line)


def test_leading_dash(run, named, monkeypatch):
    '''A name that begins with a dash is an option, unless two dashes come before it.'''
    dash = next(path for path in named if path.name == '-dash.png')
    monkeypatch.chdir(dash.parent)
    result, _ = run('explain', dash.name)
    assert result.exit_code == 2 and 'No such option' in result.stderr
    result, out = run('explain', '--', dash.name, '--help.png')
    assert result.exit_code == 0
    assert len(list(out.glob('*_relevance.npy'))) == 2


# -- weights -----------------------------------------------------------------------------------------------------------

class Malicious:
    '''An object which creates a file when it is loaded.'''
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(value, **kwargs):
    '''What torch.save writes.'''
    file = io.BytesIO()
    torch.save(value, file, **kwargs)
    return file.getvalue()


def tensors(**kwargs):
    '''What safetensors writes for one tensor of two numbers, with another header.'''
    header = str({'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8], **kwargs}}).replace("'", '"').encode()
    return struct.pack('<Q', len(header)) + header + bytes(8)


def bad_weights(tiny, marker):
    '''Files which are no weights of the model, by name, and what is said of each.'''
    layer = {'w': torch.ones(2, 2)}
    single, bad = saved(layer), Malicious(marker)
    unsafe, other, misfit = 'loaded safely', 'not a safetensors file', 'do not fit the model narrow_resnet18'
    result = {
        'empty.pt': (b'', unsafe), 'text.pth': (b'text', unsafe),
        'noise.pt': (np.random.default_rng(0).bytes(999), unsafe),
        'half.pt': (single[:len(single) // 2], unsafe), 'begin.pt': (single[:40], unsafe),
        'code.pt': (saved({'w': bad}), unsafe), 'old code.pt': (
            saved({'w': bad}, _use_new_zipfile_serialization=False), unsafe
        ),
        'pickle.pt': (pickle.dumps(bad), unsafe), 'pickle.bin': (pickle.dumps(bad), unsafe),
        'pickle.safetensors': (pickle.dumps(bad), other), 'code.safetensors': (saved({'w': bad}), other),
        'list.pt': (saved([torch.ones(2)]), 'not a state dict'), 'number.pt': (saved(3), 'not a state dict'),
        'keys.pt': (saved({1: torch.ones(2)}), 'not a state dict'), 'nested.pt': (
            saved({'w': [torch.ones(2)]}), 'not a state dict'
        ),
        'sparse.pt': (saved({'w': torch.eye(3).to_sparse()}), 'w in a form that is no dense tensor'),
        'complex.pt': (saved({'w': torch.ones(3, dtype=torch.complex64)}), 'no dense tensor of real numbers'),
        'view.pt': (saved({'w': torch.ones(1).expand(10 ** 12)}), 'no dense tensor'),
        'nan.pt': (saved({'w': torch.tensor([1., float('nan')])}), 'w holds NaN'),
        'half nan.pt': (saved({'w': torch.tensor([float('nan')]).half()}), 'w holds NaN'),
        'other.pt': (single, misfit), 'nothing.pt': (saved({}), misfit),
        'scalar.pt': (saved({'fc.weight': torch.ones(())}), misfit),
        'no classes.pt': (saved({'fc.weight': torch.ones(0, 64)}), f'{misfit}.*\\(0, 64\\)'),
        'one layer.pt': (saved({'fc.weight': torch.ones(3, 64)}), f'{misfit}.*missing'),
        'begin.safetensors': (tensors()[:20], other), 'short.safetensors': (tensors()[:-1], other),
        'zero.safetensors': (bytes(8), other), 'long.safetensors': (struct.pack('<Q', 2 ** 60) + b'{}', other),
        'json.safetensors': (struct.pack('<Q', 5) + b'{"w":', other),
        'type.safetensors': (tensors(dtype='F33'), other), 'other.safetensors': (tensors(), misfit),
        'outside.safetensors': (tensors(data_offsets=[0, 80]), other), 'shape.safetensors': (tensors(shape=[3]), other),
        'large.safetensors': (tensors(shape=[2 ** 40, 2 ** 40]), other),
    }
    shapes = {'classes.pt': ('fc.bias', torch.ones(4)), 'shape.pt': ('conv1.weight', torch.ones(64, 3, 3, 3))}
    for name, (key, value) in shapes.items():
        result[name] = saved({**tiny, key: value}), f'{misfit}.*of other shape such as {key}'
    return result


def test_bad_weights(run, good, tmp_path, tiny):
    '''Weights that are damaged, do not fit, or would run code, are refused with one line that names the file.'''
    marker = tmp_path / 'marker'
    # it is what it is meant to be
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()
    files = bad_weights(tiny, marker)
    (tmp_path / 'folder.pt').mkdir()
    for name in (*files, 'folder.pt', 'missing.pt'):
        path = tmp_path / name
        if name in files:
            path.write_bytes(files[name][0])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            result, out = run('explain', good[0], '--weights', path)
        assert result.exit_code == 2 and result.stdout == '' and not out.exists(), name
        line, = result.stderr.splitlines()
        assert_one_line(line)
        assert line.startswith('Error: ') and str(path) in line
        assert re.search(files[name][1] if name in files else 'there is no file', line), line
        assert not marker.exists(), name


@PROFILE
@given(st.sampled_from(['pt', 'old', 'safetensors', 'code']), damages())
def test_damaged_weights(tmp_path_factory, kind, how):
    '''Whatever becomes of a file, it is refused with one line, and no code in it is run.'''
    folder = tmp_path_factory.getbasetemp()
    value = {'w': Malicious(folder / 'marker') if kind == 'code' else torch.ones(2)}
    content = tensors() if kind == 'safetensors' else saved(value, _use_new_zipfile_serialization=kind != 'old')
    path = folder / f'damaged.{"safetensors" if kind == "safetensors" else "pt"}'
    path.write_bytes(damage(content, *how))
    with pytest.raises(ValueError, match=re.escape(str(path))) as info, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        load_classifier(SMALL_MODEL, path, SIZE)
    assert_one_line(str(info.value))
    assert not (folder / 'marker').exists()


@pytest.fixture(name='checkpoints')
def fixture_checkpoints(tmp_path, monkeypatch):
    '''Where torchvision looks for weights before it downloads them, which it cannot.'''
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr('torch.hub.download_url_to_file', lambda *args, **kwargs: pytest.fail('it is not found'))
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    return folder


def test_bad_named_weights(checkpoints, tmp_path):
    '''No code is run of a file in the place of a download, and one line tells to delete what is not as it should be.'''
    entry = get_model_weights(SMALL_MODEL).DEFAULT
    path, marker = checkpoints / Path(entry.url).name, tmp_path / 'marker'
    state, bad = get_model(SMALL_MODEL).state_dict(), Malicious(marker)
    odd = get_model(SMALL_MODEL).state_dict()
    odd._metadata = 3
    unsafe, other, misfit = 'loaded safely', 'not a state dict', f'do not fit the model {SMALL_MODEL}'
    files = [
        (saved({**state, 'w': bad}), unsafe), (saved({'w': bad}, _use_new_zipfile_serialization=False), unsafe),
        (pickle.dumps(bad), unsafe), (b'', unsafe), (saved(state)[:999], unsafe), (saved([bad]), unsafe),
        (saved(3), other), (saved({**state, 'w': 3}), other), (saved({'w': torch.ones(2)}), misfit),
        (saved({**state, 'classifier.1.bias': torch.ones(4)}), misfit), (saved(odd), misfit),
        (saved({'w': torch.ones(1).expand(10 ** 12)}), 'no dense tensor'),
    ]
    for content, message in files:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as info, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            load_classifier(SMALL_MODEL, 'IMAGENET1K_V1')
        assert_one_line(str(info.value))
        assert str(path) in str(info.value) and 'delete this file' in str(info.value)
        assert not marker.exists()


@pytest.mark.parametrize('name', [SMALL_MODEL, 'densenet121', 'googlenet'])
def test_named_weights(checkpoints, name):
    '''Networks are those of torchvision, with whatever comes with their weights.'''
    torch.manual_seed(0)
    entry = get_model_weights(name).DEFAULT
    kwargs = {'init_weights': False, 'aux_logits': True} if name == 'googlenet' else {}
    # densenets were written with other keys
    state = {
        re.sub(r'(denselayer\d+\.(?:norm|conv))', r'\1.', key): value
        for key, value in get_model(name, **kwargs).state_dict().items() if 'num_batches' not in key
    }
    torch.save(state, checkpoints / Path(entry.url).name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = get_model(name, weights=entry).eval()
        classifier = load_classifier(name, 'DEFAULT')
    assert str(classifier.model) == str(expected) and classifier.classes == entry.meta['categories']
    weights = classifier.model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.state_dict().items())
    for key in ('aux_logits', 'transform_input'):
        assert getattr(classifier.model, key, None) == getattr(expected, key, None)
    # nothing of torchvision has changed
    assert get_model_weights(name).DEFAULT is entry and 'get_state_dict' not in vars(entry)


def test_infinite_weights(run, good, tmp_path, tiny):
    '''Weights with which nothing is finite are never drawn as if nothing had happened.'''
    path = tmp_path / 'infinite.pt'
    cases = ('bn1.weight', float('inf'), 'check image and weights'), ('conv1.weight', 1e38, 'finite')
    for key, factor, message in cases:
        torch.save({**tiny, key: tiny[key] * factor}, path)
        result, out = run('explain', *good, '--weights', path)
        assert result.exit_code == 2 and not list(out.iterdir())
        lines = result.stderr.splitlines()
        assert len(lines) == 2
        for line, photo in zip(lines, good):
            assert line.startswith(f'Error: {photo}: ') and message in line
    result, out = run('compare', *good, '--weights', path)
    assert result.exit_code == 2 and not out.exists()
    assert len(result.stderr.splitlines()) == 2
    result, _ = run('ledger', good[0], '--weights', path)
    assert result.exit_code == 1 and 'not conserved' in result.stdout
