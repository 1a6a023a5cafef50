'''Tests of one call from photographs to pictures and files.'''
import errno
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import narrow_resnet18
from PIL import Image
from torchvision import transforms
from torchvision.models.vision_transformer import VisionTransformer
from zennit.attribution import Gradient
from zennit.cmap import ColorMap
from zennit.composites import EpsilonPlus

import zennit_resnet
from zennit_resnet import ResNetLRP, explain, initial_relevance
from zennit_resnet.explanation import Explanations, draw_table, list_images
from zennit_resnet.explanation.result import ENDINGS
from zennit_resnet.image import draw_heatmap, draw_legend, draw_overlay
from zennit_resnet.models import IMAGENET_MEAN, IMAGENET_STD, as_classifier, load_classifier, read_classes

pytestmark = pytest.mark.once

SIZE = 32
CLASSES = ['tabby cat', 'golf ball', 'church']


@pytest.fixture(name='model', scope='module')
def fixture_model():
    '''A ResNet-18 of three classes.'''
    torch.manual_seed(3)
    model = narrow_resnet18(num_classes=3)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


@pytest.fixture(name='photo')
def fixture_photo():
    '''A photograph of 40 x 60 pixels.'''
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (60, 40, 3), dtype=np.uint8))


def normalized(photo, size=(SIZE, SIZE)):
    '''The network's input, independent of the package.'''
    values = torch.from_numpy(np.array(photo.resize(size, Image.Resampling.BILINEAR))).movedim(-1, 0) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std


def test_is_attribution(model, photo):
    '''What it holds is what Zennit's attributor computes.'''
    found = explain(model, photo, target=1, size=SIZE, classes=CLASSES)
    output, relevance = Gradient(model, ResNetLRP())(normalized(photo)[None], initial_relevance(1, 'one'))
    torch.testing.assert_close(torch.from_numpy(found.relevance), relevance[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(found.output), output[0].detach(), rtol=1e-4, atol=1e-5)
    assert (found.target, found.label, found.prediction) == (1, 'golf ball', int(output.argmax()))
    assert found.initial == 1. and abs(found.delta) < 1e-5 and found.sinks == 0
    assert found.probability == pytest.approx(float(output.detach().softmax(1)[0, 1]), rel=1e-4)
    assert found.heatmap.shape == (60, 40)
    assert found.heatmap.sum() == pytest.approx(found.relevance.sum(), rel=0.01)
    assert 'golf ball' in repr(found)


def test_kinds_of_images(model, photo, tmp_path):
    '''A path, image, array, tensor and batch of the same photograph have the same relevance.'''
    path = tmp_path / 'folder' / 'photo.png'
    path.parent.mkdir()
    photo.save(path)
    (path.parent / 'notes.txt').write_text('not a photograph')
    values = np.array(photo)
    expected = explain(model, photo, size=SIZE)
    for image in (
        path, str(path), values, values.astype(np.float32) / 255, torch.from_numpy(values).movedim(-1, 0),
        normalized(photo),
    ):
        found = explain(model, image, size=SIZE)
        np.testing.assert_allclose(found.relevance, expected.relevance, atol=1e-3 * np.abs(expected.relevance).max())
    batches = [path.parent, [path], values[None], normalized(photo)[None], [photo]]
    for images in batches:
        found = explain(model, images, size=SIZE)
        assert isinstance(found, Explanations) and len(found) == 1
        np.testing.assert_allclose(
            found[0].relevance, expected.relevance, atol=1e-3 * np.abs(expected.relevance).max()
        )
    for gray in (values[..., 0], torch.from_numpy(values[..., 0]), torch.from_numpy(values[..., 0])[None]):
        assert (explain(model, gray, size=SIZE).photo == values[..., :1]).all()


def test_batches_and_shapes(model, photo):
    '''Images of several shapes, with a target each, in their order.'''
    inputs = [normalized(photo, size) for size in ((32, 32), (48, 32), (32, 32), (32, 48), (48, 32))]
    together = explain(model, inputs, target=[0, 1, 2, 0, 'church'], classes=CLASSES, batch_size=4)
    assert [each.target for each in together] == [0, 1, 2, 0, 2]
    for each, input, target in zip(together, inputs, [0, 1, 2, 0, 2]):
        alone = explain(model, input, target=target)
        assert each.relevance.shape == input.shape
        np.testing.assert_allclose(each.relevance, alone.relevance, atol=1e-4 * np.abs(alone.relevance).max())


@pytest.mark.parametrize('transform, box', [
    (None, (0, 0, 40, 60)),
    ([transforms.Resize(32), transforms.CenterCrop(32)], (0, 10, 40, 50)),
    ([transforms.Resize(40), transforms.CenterCrop(32)], (4, 14, 36, 46)),
    ([transforms.Pad((10, 0)), transforms.Resize((32, 32))], (-10, 0, 50, 60)),
    ([transforms.Pad((10, 0), fill=114), transforms.Resize((32, 32))], (-10, 0, 50, 60)),
    ([transforms.Pad((10, 0), padding_mode='reflect'), transforms.Resize((32, 32))], (-10, 0, 50, 60)),
    ([transforms.Pad((10, 0), padding_mode='edge'), transforms.Resize((64, 64))], (-10, 0, 50, 60)),
])
def test_geometry(model, photo, transform, box):
    '''The heatmap is where the network saw the photograph, whatever was done to it, and zero elsewhere.'''
    if transform is not None:
        transform = transforms.Compose([
            *transform, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        ])
    found = explain(model, photo, size=SIZE, transform=transform)
    np.testing.assert_allclose(found.box, box, atol=0.7)
    assert found.heatmap.shape == found.photo.shape[:2] == (60, 40)
    left, top, right, bottom = (round(edge) for edge in found.box)
    outside = np.ones((60, 40), dtype=bool)
    outside[max(top, 0):bottom, max(left, 0):right] = False
    assert (found.heatmap[outside] == 0).all()
    assert (found.heatmap[~outside] != 0).mean() > 0.9
    # an isolated pixel of relevance is drawn at its place
    side = found.relevance.shape[1]
    relevance = np.zeros((3, side, side), dtype=np.float32)
    relevance[:, side // 4, 5 * side // 8] = 1
    moved = type(found)(**{**vars_of(found), 'relevance': relevance})
    y, x = np.unravel_index(moved.heatmap.argmax(), moved.heatmap.shape)
    assert abs(x + 0.5 - (left + (5 * side // 8 + 0.5) / side * (right - left))) <= 1.1
    assert abs(y + 0.5 - (top + (side // 4 + 0.5) / side * (bottom - top))) <= 1.1


def test_padding_is_said(model, photo):
    '''Relevance outside of the photograph is not in the heatmap, which a note says.'''
    transform = transforms.Compose([
        transforms.Pad((40, 0)), transforms.Resize((SIZE, SIZE)), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])
    found = explain(model, photo, transform=transform)
    lost = 1 - found.heatmap.sum() / found.relevance.sum()
    assert lost > 0.1 and any(f'{lost:.0%} of the relevance is on padding' in note for note in found.notes)
    assert explain(model, photo, size=SIZE).notes == []


@pytest.mark.parametrize('normalize', [[], [transforms.Normalize([.5] * 3, [.5] * 3)]])
def test_other_normalization(model, photo, normalize):
    '''A transform that normalizes in another way than mean and std say would be drawn wrongly.'''
    transform = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), *normalize])
    with pytest.raises(ValueError, match='mean and std'):
        explain(model, photo, transform=transform)
    mean, std = ((.5,) * 3, (.5,) * 3) if normalize else ((0,) * 3, (1,) * 3)
    assert explain(model, photo, transform=transform, mean=mean, std=std).box == (0, 0, 40, 60)


def vars_of(explanation):
    '''Fields of an explanation.'''
    return {name: getattr(explanation, name) for name in explanation.__dataclass_fields__}


def test_other_preprocessing(model, photo):
    '''What rotates the photograph is drawn on what the network sees.'''
    transform = transforms.Compose([
        transforms.RandomRotation((90, 90), expand=True), transforms.Resize((SIZE, SIZE)), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])
    found = explain(model, photo, transform=transform)
    assert found.photo.shape == (SIZE, SIZE, 3) and found.box == (0, 0, SIZE, SIZE)


def test_keep_aspect(model, photo):
    '''The whole photograph in its own shape.'''
    found = explain(model, photo, size=SIZE, keep_aspect=True)
    assert found.relevance.shape == (3, 48, 32) and found.box == (0, 0, 40, 60)


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_model_is_left(model, photo, context):
    '''Mode, gradients and weights are as before, also in training mode and without gradients.'''
    expected = explain(model, photo, size=SIZE).relevance
    model.train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    try:
        with context():
            found = explain(model, photo, size=SIZE)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    np.testing.assert_array_equal(found.relevance, expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(param.grad is None and param.requires_grad for param in model.parameters())


def test_composite_as_method(model, photo):
    '''Composites of Zennit and of this package, with options of all kinds.'''
    ours = explain(model, photo, method=ResNetLRP('symmetric'), size=SIZE)
    by_name = explain(model, photo, method='resnet_lrp_symmetric', size=SIZE)
    np.testing.assert_array_equal(ours.relevance, by_name.relevance)
    stock = explain(model, photo, method=EpsilonPlus(), size=SIZE)
    assert stock.value == 'logit' and stock.stem == 'image_EpsilonPlus'


class Late(torch.nn.Module):
    '''The last layer is not the last one that is registered.'''
    def __init__(self):
        super().__init__()
        self.head, self.trunk = torch.nn.Linear(4, 2), torch.nn.Conv2d(3, 4, 3)
        self.unused = torch.nn.Conv2d(3, 4, 3)

    def forward(self, input):
        return self.head(self.trunk(input).relu().mean((2, 3))) - 3


@pytest.mark.parametrize('method', ['epsilon_plus', 'epsilon_plus+ratio', 'epsilon_alpha2_beta1', 'lrp_epsilon_1'])
def test_last_layer(photo, method):
    '''What relevance starts from depends on the layer that is called last.'''
    torch.manual_seed(0)
    model = Late().eval()
    model.head.bias.data -= 2
    state = torch.get_rng_state()
    assert explain(model, photo, method=method, size=SIZE).value == 'logit'
    # nothing random is drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('method, value', [
    ('epsilon_plus', 'one'), ('resnet_lrp_ratio', 'logit'), ('block_lrp', 'one'), ('guided_backprop', 'logit'),
])
def test_contrasts_have_a_sign(model, photo, method, value):
    '''Started from something else, contributions of the target and its rivals would have signs of their logits.'''
    with pytest.raises(ValueError, match=f'{method}.*{value}'):
        explain(model, photo, method=method, value=value, contrast=2, target=0, size=SIZE)
    found = explain(model, photo, method=method, contrast='x', target=0, size=SIZE, classes=['y', 'z', 'x'])
    assert found.value != value and found.relevance.any() and found.versus == ' rather than x'


def test_contrast_of_each(model, photo):
    '''One row for each image, however they are cut into batches.'''
    photos, contrast = [photo, photo.rotate(180), photo], torch.tensor([[1], [2], [2]])
    found = explain(model, photos, 0, contrast=contrast, size=SIZE, batch_size=2)
    for each, image, rival in zip(found, photos, (1, 2, 2)):
        alone = explain(model, image, 0, contrast=rival, size=SIZE)
        np.testing.assert_allclose(each.relevance, alone.relevance, atol=1e-3 * np.abs(alone.relevance).max())
    with pytest.raises(ValueError, match='2 contrasts for 3'):
        explain(model, photos, 0, contrast=contrast[:2], size=SIZE)
    assert 'contrasted with itself' in explain(model, photo, 1, contrast=1, size=SIZE).notes[0]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_precision(photo, dtype):
    '''Networks of other precision get inputs of it.'''
    torch.manual_seed(0)
    model = Late().eval().to(dtype)
    found = explain(model, photo, size=SIZE)
    assert found.relevance.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert abs(found.delta) < (1e-12 if dtype == torch.float64 else 0.1)


def test_networks_that_cannot(photo):
    '''A network that does not take the input says so, with what to do.'''
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3).eval()
    with pytest.raises(ValueError, match=r'\(1, 3, 48, 32\).*keep_aspect'):
        explain(model, photo, size=SIZE, keep_aspect=True)
    with pytest.raises(ValueError, match=r'\(1, 3, 32, 32\)'):
        explain(torch.nn.Conv2d(1, 2, 3), photo, size=SIZE)
    with pytest.raises(TypeError, match='classes'):
        explain(as_classifier(model), photo, classes=CLASSES)
    with pytest.raises(TypeError, match='resnet18'):
        explain('resnet18', photo)


def test_sinks_count(photo):
    '''What a class token keeps is no loss.'''
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    torch.nn.init.normal_(model.heads.head.weight)
    found = explain(model.eval(), photo, size=SIZE)
    assert abs(found.sinks) > 1e-3 and abs(found.delta) < 1e-4


def test_save(model, photo, tmp_path):
    '''Pictures in the size of the photograph, arrays, and a manifest that says how they were made.'''
    found = explain(model, photo, method='resnet_lrp_ratio:first_layer=ones', size=SIZE, classes=CLASSES)
    paths = found.save(tmp_path / 'new' / 'folder', smooth=1., cmap='safe')
    stem = 'image_resnet_lrp_ratio-first_layer=ones'
    assert [path.name for path in paths] == [f'{stem}_{ending}' for ending in ENDINGS]
    assert sorted(path.parent for path in paths) == [tmp_path / 'new' / 'folder'] * 6
    assert all(Image.open(path).size == photo.size for path in paths[:2])
    np.testing.assert_array_equal(np.load(paths[3]), found.relevance)
    np.testing.assert_allclose(np.load(paths[4]), found.heatmap, rtol=1e-6)
    manifest = json.loads(paths[5].read_text())
    assert manifest['method'] == 'resnet_lrp_ratio:first_layer=ones'
    assert manifest['prediction'][0]['name'] == CLASSES[found.prediction]
    assert manifest['relevance']['initial'] == 1 and manifest['style'] == {'smooth': 1., 'cmap': 'safe'}
    assert manifest['versions']['torch'] == torch.__version__ and len(manifest['weights sha256']) == 64
    assert all((paths[0].parent / name).exists() for name in manifest['files'])
    text = Image.open(paths[0]).text
    assert text['method'] == manifest['method'] and json.loads(text['target']) == manifest['target']
    assert text['weights sha256'] == manifest['weights sha256']


def test_anything_is_saved(model, photo, tmp_path):
    '''Options of other types do not keep a manifest from being written, long names are cut.'''
    path = tmp_path / f'{"n" * 225}.png'
    photo.save(path)
    found = explain(model, path, size=SIZE, target=0, contrast=np.array([1, 2]))
    written = found.save(tmp_path / 'out', cmap=ColorMap('00f,fff,f00'), percentile=np.float32(99))
    manifest = json.loads(written[-1].read_text())
    assert manifest['relevance']['contrast'] == [1, 2] and manifest['style']['percentile'] == 99
    assert len(written[-1].name) < 220 and manifest['source'] == str(path)


def test_folders(photo, tmp_path):
    '''What is no photograph by its name is left out.'''
    for name in ('a.jpg', 'b.PNG'):
        photo.save(tmp_path / name)
    for name in ('._a.jpg', 'paper.pdf', 'notes.txt'):
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'folder.jpg').mkdir()
    assert [path.name for path in list_images(tmp_path)[0]] == ['a.jpg', 'b.PNG']


def test_large_pictures():
    '''They are drawn in strips, as small ones are.'''
    rng = np.random.default_rng(0)
    heatmap, photo = rng.standard_normal((1100, 1000)), rng.integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
    for draw in (lambda *args: draw_heatmap(args[1], bound=2.), lambda *args: draw_overlay(*args, bound=2.)):
        large, small = draw(photo, heatmap).astype(int), draw(photo[500:520], heatmap[500:520])
        assert large.shape == photo.shape and np.abs(large[500:520] - small).max() <= 1


def test_weights_have_a_hash(model, photo):
    '''It changes with a single weight.'''
    before = explain(model, photo, size=SIZE).settings['weights sha256']
    assert before == explain(model, photo, size=SIZE).settings['weights sha256']
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    after = explain(model, photo, size=SIZE).settings['weights sha256']
    with torch.no_grad():
        model.fc.bias[0] -= 1e-3
    assert after != before


def test_nothing_is_overwritten(model, photo, tmp_path):
    '''Without a word, nothing is replaced, and other methods have other names.'''
    pair = explain(model, [photo, photo], size=SIZE)
    written = pair.save(tmp_path)
    assert len({path.name for path in written}) == 12
    content = {path: path.read_bytes() for path in written}
    with pytest.raises(FileExistsError, match='image_'):
        pair[1].save(tmp_path)
    explain(model, photo, method='block_lrp', size=SIZE).save(tmp_path)
    assert all(path.read_bytes() == content[path] for path in written)
    pair.save(tmp_path, overwrite=True, smooth=3.)
    assert any(path.read_bytes() != content[path] for path in written)


@pytest.mark.parametrize('number', range(6))
def test_full_disk(model, photo, tmp_path, monkeypatch, number):
    '''Files are whole or not there, and without all there is no manifest.'''
    found = explain(model, photo, size=SIZE)
    calls, save, array, text = [], Image.Image.save, np.save, Path.write_text

    def full(function):
        '''Write a part, and fail.'''
        def write(*args, **kwargs):
            calls.append(function)
            if len(calls) > number:
                name = args[1] if function is save else args[0]
                Path(name).write_bytes(b'part')
                raise OSError(errno.ENOSPC, 'No space left on device')
            return function(*args, **kwargs)
        return write

    monkeypatch.setattr(Image.Image, 'save', full(save))
    monkeypatch.setattr(np, 'save', full(array))
    monkeypatch.setattr(Path, 'write_text', full(text))
    with pytest.raises(OSError, match='No space'):
        found.save(tmp_path)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == number
    assert not any(name.endswith('manifest.json') or name.startswith('.') for name in names)


def test_colors_have_one_meaning():
    '''Red is for the class and blue against it, in heatmaps, overlays and legends.'''
    heatmap = np.array([[1., 0.], [-1., 0.]])
    for cmap in ('coldnhot', 'safe'):
        drawn = draw_heatmap(np.array([[.5, 0.], [-.5, 1.]]), 100, cmap).astype(int)
        assert drawn[0, 0, 0] > drawn[0, 0, 2] + 100 and drawn[1, 0, 2] > drawn[1, 0, 0] + 100
        legend = draw_legend(200, cmap).astype(int)
        assert legend[6, 50, 2] > legend[6, 50, 0] + 50 and legend[6, 150, 0] > legend[6, 150, 2] + 50
    assert heatmap.shape == (2, 2)


def test_figures(model, photo):
    '''Figures with legends, for notebooks, and of several explanations.'''
    found = explain(model, [photo, photo], size=SIZE, classes=CLASSES)
    image = Image.open(io.BytesIO(found[0]._repr_png_()))
    assert image.format == 'PNG' and image.size == found[0].figure().size
    assert Image.open(io.BytesIO(found._repr_png_())).height > 1.5 * image.height
    other = explain(model, photo, method='input_x_gradient', size=SIZE)
    table = draw_table([[None, found[0]], [other, found[1]]], ('heatmap', 'overlay'), 'method')
    assert table.width > 4 * 140
    with pytest.raises(ValueError, match='logit and one'):
        draw_table([[found[0], other]], scale='all')
    plain, outlined = (found[0].draw('overlay', contours=percent).astype(int) for percent in (None, 10))
    changed = (plain != outlined).any(-1)
    assert 0.01 < changed.mean() < 0.9
    assert not np.array_equal(found[0].draw('heatmap'), found[0].draw('heatmap', smooth=2))
    bright, dark = (found[0].draw('heatmap', bound=bound).mean() for bound in (1e-4, 1e-2))
    assert bright > 2 * dark


@pytest.mark.parametrize('arguments, error, value', [
    ({'images': 'missing.png'}, FileNotFoundError, 'missing.png'),
    ({'images': np.zeros((4, 4, 5), dtype=np.uint8)}, ValueError, r'\(4, 4, 5\)'),
    ({'images': np.full((4, 4, 3), 7.)}, ValueError, '7'),
    ({'images': np.full((4, 4, 3), np.nan)}, ValueError, 'nan'),
    ({'images': np.zeros((4, 4, 3), dtype=int)}, ValueError, 'int64'),
    ({'images': torch.zeros(1, 4, 4)}, ValueError, r'\(1, 4, 4\)'),
    ({'images': torch.full((3, 32, 32), torch.nan)}, ValueError, 'finite'),
    ({'images': 3}, TypeError, 'int'),
    ({'images': []}, ValueError, 'no image'),
    ({'target': 3}, ValueError, '3'),
    ({'target': -1}, ValueError, '-1'),
    ({'target': [0, 1]}, ValueError, '2 targets'),
    ({'target': 'curch', 'classes': CLASSES}, ValueError, 'curch.*church'),
    ({'classes': ['one']}, ValueError, '1 names of classes, but 3'),
    ({'method': 'resnet'}, ValueError, 'resnet'),
    ({'mean': (0.5, 0.5)}, ValueError, 'mean'),
    ({'std': (0.5, 0., 0.5)}, ValueError, 'std'),
    ({'mean': 'gray'}, ValueError, "mean='gray' is not made of three numbers"),
    ({'batch_size': 0}, ValueError, 'batch_size'),
    ({'batch_size': 1.5}, ValueError, 'batch_size=1.5'),
    ({'method': None}, TypeError, 'method=None'),
    ({'method': ResNetLRP}, TypeError, r'ResNetLRP\(\)'),
    # as a tensor, channels come first
    ({'images': torch.zeros(9, 8, 3, dtype=torch.uint8)}, ValueError, r'\(9, 8, 3\), not \(3, height, width\)'),
    ({'images': Image.fromarray(np.float32([[-1., 1.]]))}, ValueError, 'values from -1 to 1'),
])
def test_errors(model, photo, arguments, error, value):
    '''What is wrong is named.'''
    with pytest.raises(error, match=value):
        explain(**{'model': model, 'images': photo, 'size': SIZE, **arguments})


def test_style_errors(model, photo, tmp_path):
    '''Options of pictures are checked before anything is written.'''
    found = explain(model, photo, size=SIZE)
    for style, error in (
        ({'smooth': -1}, ValueError), ({'percentile': 0}, ValueError), ({'contours': 101}, ValueError),
        ({'cmap': 'rainbow'}, ValueError), ({'colour': 1}, TypeError), ({'bound': -1}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(style))):
            found.save(tmp_path, **style)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match='bound=-1 '):
        found.draw(bound=-1)
    with pytest.raises(ValueError, match='picture'):
        found.draw('picture')
    for rows, options, message in (
        ([[found], [found, found]], {}, 'Row 1 has 2 explanations, the first 1'),
        ([[found, found]], {'titles': ['a']}, '1 titles for 2 columns'),
        ([[found]], {'kinds': ()}, r'kinds=\(\)'), ([[found]], {'kinds': 'overlay'}, "kinds='overlay'"),
        ([[found]], {'kinds': ['picture']}, "kinds='picture'"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_table(rows, **options)


def test_other_outputs(photo):
    '''A network that returns no logits is refused, one of 1000 classes has ImageNet's names.'''
    class Pair(torch.nn.Module):
        '''Two outputs.'''
        def forward(self, input):
            return input.mean((2, 3)), input

    with pytest.raises(ValueError, match='tuple'):
        explain(Pair(), photo)
    torch.manual_seed(0)
    assert explain(narrow_resnet18().eval(), photo, target='golf ball', size=SIZE).target == 574


def test_forgotten_normalization(model):
    '''Inputs that look like RGB from 0 to 1 are explained with a warning.'''
    with pytest.warns(UserWarning, match='normalized'):
        explain(model, torch.rand(3, SIZE, SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        explain(model, torch.rand(3, SIZE, SIZE), mean=(0, 0, 0), std=(1, 1, 1))
        explain(model, torch.randn(3, SIZE, SIZE))


def test_public_names():
    '''It is found at the top of the package, which does not load it by itself.'''
    assert zennit_resnet.explain is explain
    with pytest.raises(AttributeError, match='nothing'):
        _ = zennit_resnet.nothing


# -- classifiers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('wrap', [
    lambda state: {'epoch': 1, 'state_dict': {f'model.{key}': value for key, value in state.items()}
                   | {'loss.weight': torch.ones(3)}},
    lambda state: {f'_orig_mod.{key}': value for key, value in state.items()},
    lambda state: {'state_dict': {f'model._orig_mod.module.{key}': value for key, value in state.items()}},
    lambda state: {'model': {'state_dict': state}},
    lambda state: {'net': {f'backbone.{key}': value for key, value in state.items()}},
], ids=['Lightning', 'compiled', 'Lightning, compiled, parallel', 'nested', 'own'])
def test_checkpoints(model, tmp_path, wrap):
    '''State dicts are found within what training scripts write.'''
    torch.save(wrap(dict(model.state_dict())), tmp_path / 'last.ckpt')
    classifier = load_classifier('narrow_resnet18', tmp_path / 'last.ckpt', SIZE)
    input = torch.randn(1, 3, SIZE, SIZE)
    torch.testing.assert_close(classifier.model(input), model(input))


def test_two_networks_in_a_checkpoint(model, tmp_path):
    '''Which one is meant is not guessed.'''
    state = {f'{name}.{key}': value for name in ('student', 'teacher') for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / 'both.pt')
    with pytest.raises(ValueError, match='student., teacher.'):
        load_classifier('narrow_resnet18', tmp_path / 'both.pt')


def test_names_and_normalization(model, tmp_path):
    '''Names of classes from files, and other means.'''
    torch.save(model.state_dict(), tmp_path / 'net.pt')
    for text in ('cat\ndog\nbird\n', '["cat", "dog", "bird"]', '{"0": ["n01", "cat"], "2": "bird", "1": "dog"}'):
        (tmp_path / 'names').write_text(text)
        found = load_classifier('narrow_resnet18', tmp_path / 'net.pt', SIZE, tmp_path / 'names', (0, 0, 0), (1, 1, 1))
        assert found.classes == ['cat', 'dog', 'bird']
    assert read_classes({1: 'dog', 0: 'cat'}) == ['cat', 'dog']
    assert float(found.transform(Image.new('RGB', (5, 5), 'white')).min()) == 1.
    (tmp_path / 'names').write_text('cat\ndog')
    with pytest.raises(ValueError, match='2 names of classes.*have 3'):
        load_classifier('narrow_resnet18', tmp_path / 'net.pt', SIZE, tmp_path / 'names')
    for text in ('', '{"a": 1}', '3'):
        (tmp_path / 'names').write_text(text)
        with pytest.raises(ValueError, match='no names of classes') if text != '3' else pytest.raises(ValueError):
            read_classes(tmp_path / 'names')
            load_classifier('narrow_resnet18', tmp_path / 'net.pt', SIZE, tmp_path / 'names')
    with pytest.raises(ValueError, match='missing'):
        read_classes(tmp_path / 'missing')


def test_ambiguous_number(model):
    '''A number that is also a name of another class is not guessed.'''
    classifier = as_classifier(model, ['1', '0', 'x'])
    with pytest.raises(ValueError, match='name:1 or index:1'):
        classifier.find_class('1')
    assert classifier.find_class('name:1') == 0 and classifier.find_class('index:1') == 1
    assert classifier.find_class('2') == 2 and classifier.find_class('X') == 2
    # where both agree, and where it is no index, nothing is ambiguous
    assert as_classifier(model, ['0', '1', '7']).find_class('1') == 1
    assert as_classifier(model, ['0', '1', '7']).find_class('7') == 2


def test_settings_of_timm(model):
    '''A network that knows its preprocessing is asked.'''
    model.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5), 'input_size': (3, 48, 48)}
    try:
        classifier = as_classifier(model)
    finally:
        del model.pretrained_cfg
    assert classifier.transform(Image.new('RGB', (9, 9), 'white')).shape == (3, 48, 48)
    assert classifier.mean.flatten().tolist() == [0.5] * 3
