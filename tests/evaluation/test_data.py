'''Tests for finding and reading the samples of a data set.'''
import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from captum_adapters.evaluation.data import Images, Loaded, Sample, read_samples
from zennit_resnet.models import as_classifier

pytestmark = pytest.mark.once

CLASSES = ['tench', 'English springer', 'church']
XML = '''<annotation><object><name>{wnid}</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax>
</bndbox></object><object><name>{wnid}</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>
</object></annotation>'''
SQUARE = as_classifier(torch.nn.Identity(), size=32).transform
CROP = ImageClassification(crop_size=24, resize_size=32)


def touch(root, *names):
    '''Create small images.'''
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path, 'PNG')


def write(root, name, text):
    '''Create a text file.'''
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def labels(samples):
    '''Labels by name.'''
    return {sample.name: sample.label for sample in samples.samples}


# -- folders and labels ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('label,name', [
    ('tench', 'tench'),
    ('english_SPRINGER', 'English springer'),
    ('001.Black_footed_Albatross', 'Black footed albatross'),
    ('Black_footed_Albatross', '001.Black_footed_Albatross'),
    ('tench', 'tench, Tinca tinca'),
    ('tench, Tinca tinca', 'tench'),
    ('Tinca_tinca', 'tench, Tinca tinca'),
])
def test_label_is_matched_by_name(tmp_path, label, name):
    '''Labels may differ from names of classes in case, underscores, numbers and synonyms.'''
    touch(tmp_path, f'{label}/a.png')
    found = read_samples(tmp_path, ['goldfish, carp', 'other', name])
    assert labels(found) == {f'{label}/a.png': 2} and found.messages == () and found.layout == 'folder'


def test_best_match_wins(tmp_path):
    '''An exact name comes before one in other case, and a first synonym before others.'''
    write(tmp_path, 'labels.csv', 'file,label\na,Cardigan\nb,cardigan\nc,"projectile, missile"\nd,CARDIGAN\n')
    found = read_samples(tmp_path, ['Cardigan', 'cardigan', 'missile', 'projectile'])
    assert labels(found) == {'a': 0, 'b': 1, 'c': 3, 'd': None}
    assert found.samples[3].problem == "label 'CARDIGAN' is ambiguous: the network's classes 0, 1 have this name"


def test_folder(tmp_path):
    '''The label is the top folder at any depth; other files and hidden ones are left out; links are followed once.'''
    data = tmp_path / 'data'
    touch(data, 'church/deep/er/a.PNG', 'tench/b.jpeg', 'top.png', 'unicorn/c.png', '.hidden/d.png', 'tench/.e.png')
    touch(tmp_path, 'elsewhere/f.webp')
    write(data, 'tench/notes.txt', '')
    (data / 'English_springer').symlink_to(tmp_path / 'elsewhere')
    (data / 'tench' / 'circle').symlink_to(data)
    (data / 'church' / 'gone.png').symlink_to(data / 'nowhere.png')
    found = read_samples(data, CLASSES)
    assert labels(found) == {
        'English_springer/f.webp': 1, 'church/deep/er/a.PNG': 2, 'church/gone.png': 2, 'tench/b.jpeg': 0,
        'top.png': None, 'unicorn/c.png': None,
    }
    assert [sample.name for sample in found.samples] == sorted(labels(found))
    problems = {sample.name: sample.problem for sample in found.samples if sample.problem}
    assert problems == {'unicorn/c.png': "label 'unicorn' is not a class of the network"}
    assert found.root == data and all(sample.path == data / sample.name for sample in found.samples)
    ignored = read_samples(data, CLASSES, labels='ignore')
    assert [sample.name for sample in ignored.samples] == [sample.name for sample in found.samples]
    assert {(sample.label, sample.problem) for sample in ignored.samples} == {(None, None)}


def test_folder_without_labels(tmp_path):
    '''Images in a single folder have no label, without a problem.'''
    touch(tmp_path, 'b.png', 'a.png')
    assert read_samples(tmp_path, CLASSES).samples == tuple(
        Sample(name, tmp_path / name, None) for name in ('a.png', 'b.png')
    )


def test_sorted_order(tmp_path):
    '''As many folders as classes are taken in sorted order if none has a class's name, also if some are empty.'''
    touch(tmp_path, 'n3/a.png', 'n1/a.png')
    (tmp_path / 'n2').mkdir()
    found = read_samples(tmp_path, CLASSES)
    assert labels(found) == {'n1/a.png': 0, 'n3/a.png': 2}
    assert len(found.messages) == 1 and 'in order' in found.messages[0]
    # with another number of classes, or a name that is known, this would be a guess
    assert set(labels(read_samples(tmp_path, CLASSES[:2])).values()) == {None}
    (tmp_path / 'n2').rename(tmp_path / 'tench')
    assert set(labels(read_samples(tmp_path, CLASSES)).values()) == {None}


def test_how_labels_are_matched(tmp_path):
    '''It is known whether labels were matched by name, by number, or only by order, and to which classes.'''
    touch(tmp_path, 'a/1.png', 'b/1.png', 'c/1.png')
    for names, found in (
        (['B', 'c', 'a'], ('name', {'a': 'a', 'b': 'B', 'c': 'c'})),
        (CLASSES, ('order', dict(zip('abc', CLASSES)))),
        (['a', 'x', 'y'], ('name', {'a': 'a'})),
        (['x', 'y'], ('none', {})),
    ):
        samples = read_samples(tmp_path, names)
        assert (samples.matched_by, samples.classes) == found
    asked = read_samples(tmp_path, ['b', 'a', 'x'], labels='order')
    assert asked.matched_by == 'order, as asked for' and labels(asked) == {'a/1.png': 0, 'b/1.png': 1, 'c/1.png': 2}
    assert read_samples(tmp_path, CLASSES, labels='ignore').matched_by == 'none'
    with pytest.raises(ValueError, match='2 classes, but there are 3 .a, b, c'):
        read_samples(tmp_path, CLASSES[:2], labels='order')
    for text, found in (('1\n2', 'index'), ('tench\n2', 'index, name'), ('church\nx', 'name')):
        rows = [f'{number}.png,{label}' for number, label in enumerate(text.split())]
        file = write(tmp_path, 'labels.csv', '\n'.join(['file,label', *rows]))
        assert read_samples(file, CLASSES).matched_by == found
    # indices have no order to be asked for
    indices = read_samples(write(tmp_path, 'labels.csv', 'file,class_index\na,2\nb,0\n'), CLASSES, labels='order')
    assert labels(indices) == {'a': 2, 'b': 0} and indices.matched_by == 'index'


def test_folder_split(tmp_path):
    '''Folders of splits are not taken for classes.'''
    touch(tmp_path, 'train/church/a.png', 'val/tench/b.png')
    with pytest.raises(ValueError, match='train, val: choose'):
        read_samples(tmp_path, CLASSES)
    assert labels(read_samples(tmp_path, CLASSES, split='val')) == {'val/tench/b.png': 0}
    with pytest.raises(ValueError, match="no folder 'test'"):
        read_samples(tmp_path, CLASSES, split='test')


@pytest.mark.skipif(os.name == 'nt', reason='names are Unicode there')
def test_names_are_unicode(tmp_path):
    '''Names of files in any encoding can be stored as text.'''
    try:
        touch(tmp_path, os.fsdecode(b'caf\xe9.png'))
    except OSError:
        pytest.skip('the file system has only names in UTF-8')
    sample, = read_samples(tmp_path, CLASSES).samples
    assert sample.name == 'caf\\xe9.png' and sample.path.is_file()


# -- CSV ---------------------------------------------------------------------------------------------------------------

def test_csv(tmp_path):
    '''Labels are names or indices, rows of an image are joined, and paths may leave the folder.'''
    touch(tmp_path, 'in/a.png', 'out/b.png')
    absolute = tmp_path / 'out' / 'b.png'
    write(tmp_path, 'in/list.csv', (
        '\ufeffimage, label,mask,x0,y0,x1,y1,more\n'
        'a.png,church,m.png,0,1,2,3,x\n./a.png,,,1,1,2,2.5\n../out/b.png,1,,,,,\n\n'
        f'{absolute},1,,,,,\nc.png,9,,,,,\nd.png,,,,,,\n"e.png",yeti,,,,,\nf.png,tench,,,,,\nf.png,church,,,,,\n'
    ))
    found = read_samples(tmp_path / 'in' / 'list.csv', CLASSES)
    assert found.layout == 'csv' and found.root == tmp_path / 'in'
    message, = found.messages
    assert "2 of 5 labels are no class of the network ('9', 'yeti')" in message
    assert labels(found) == {
        '../out/b.png': 1, 'a.png': 2, 'c.png': None, 'd.png': None, 'e.png': None, 'f.png': None
    }
    outside, first, *others = found.samples
    assert outside.path.samefile(absolute) and outside.boxes == ()
    assert first.boxes == ((0, 1, 2, 3), (1, 1, 2, 2.5)) and first.mask == tmp_path / 'in' / 'm.png'
    assert [sample.problem for sample in others] == [
        "label '9' is not a class of the network", None, "label 'yeti' is not a class of the network",
        'it is listed several times, with different labels or masks',
    ]
    assert {sample.problem for sample in read_samples(
        tmp_path / 'in' / 'list.csv', [], labels='ignore').samples} == {None}


def test_short_rows(tmp_path):
    '''Cells that are missing at the end of a row are empty.'''
    file = write(tmp_path, 'labels.csv', 'file,label,mask\na.png\nb.png,tench\n')
    assert [sample[2:] for sample in read_samples(file, CLASSES).samples] == [
        (None, None, (), None), (0, None, (), None)
    ]


def test_csv_indices(tmp_path):
    '''Columns with indices are used for as many classes as they are for, and names where the order differs.'''
    write(tmp_path, 'labels.csv', (
        'file,wnid,label,class_index,imagenet_index,split\n'
        'a.jpg,n1,tench,0,0,one\nb.jpg,n2,crane,1,134,one\nc.jpg,n3,crane,2,517,two\n'
    ))
    write(tmp_path, 'boxes.csv', 'file,x0,y0,x1,y1\na.jpg,1,2,3,4\nz.jpg,1,2,3,4\na.jpg,5,6,7,8\n')
    found = read_samples(tmp_path, ['tench', 'crane', 'crane'])
    assert labels(found) == {'a.jpg': 0, 'b.jpg': 1, 'c.jpg': 2}
    assert found.samples[0].boxes == ((1, 2, 3, 4), (5, 6, 7, 8)) and found.samples[1].boxes == ()
    assert labels(read_samples(tmp_path, ['tench', *['x'] * 999])) == {'a.jpg': 0, 'b.jpg': 134, 'c.jpg': 517}
    assert labels(read_samples(tmp_path, ['tench', *['x'] * 999], split='two')) == {'c.jpg': 517}
    moved = read_samples(tmp_path, ['crane', 'other', 'tench'])
    assert labels(moved) == {'a.jpg': 2, 'b.jpg': 0, 'c.jpg': 0} and 'by name' in moved.messages[0]
    unknown = read_samples(tmp_path, ['u', 'v'])
    assert '3 classes' in unknown.messages[0] and all(sample.problem for sample in unknown.samples)


@pytest.mark.parametrize('text,expected,problem', [
    ('class_index\na.jpg,2', 2, None),
    ('class_index\na.jpg,1', None, "label 'class_index 1' is not a class of the network"),
    ('class_index,label\na.jpg,2,church\nb.jpg,-1,', 2, None),
    ('depicts\na.jpg,church', None, None),
    ('wnid\na.jpg,n00000003\nb.jpg,n00000001\nc.jpg,n00000002', 2, None),
])
def test_csv_columns(tmp_path, text, expected, problem):
    '''Other columns with labels are understood, or give a problem.'''
    sample, *others = read_samples(write(tmp_path, 'x.csv', f'file,{text}\n'), CLASSES).samples
    assert (sample.label, sample.problem) == (expected, problem)
    if '-1' in text:
        assert others[0].problem == "label 'class_index -1' is not a class of the network"


# -- ImageNet and CUB --------------------------------------------------------------------------------------------------

def wnid(index):
    '''A wnid for each index, in sorted order.'''
    return f'n{index * 7:08d}'


def test_imagenet_folders(tmp_path):
    '''All 1000 folders are in the order of classes; few need a list of wnids, or as many classes.'''
    classes = [f'name {index}' for index in range(1000)]
    names = [f'val/{wnid(index)}/ILSVRC2012_val_{index:08d}.JPEG' for index in (999, 5)]
    touch(tmp_path, *names)
    write(tmp_path, 'Annotations/CLS-LOC/val/ILSVRC2012_val_00000005.xml', XML.format(wnid=wnid(5)))
    write(tmp_path, 'Annotations/CLS-LOC/val/ILSVRC2012_val_00000999.xml', '<broken')
    few = read_samples(tmp_path, classes)
    assert few.layout == 'imagenet' and all(sample.problem for sample in few.samples)
    assert [sample.boxes for sample in few.samples] == [((0, 1, 5, 6), (2, 2, 4, 4)), ()]
    assert labels(read_samples(tmp_path / 'val', ['x', 'y'])) == {names[1][4:]: 0, names[0][4:]: 1}
    mapping = write(tmp_path, 'LOC_synset_mapping.txt', ''.join(f'{wnid(num)} name, x\n' for num in range(1000)))
    assert labels(read_samples(tmp_path, classes)) == {names[1]: 5, names[0]: 999}
    assert read_samples(tmp_path, classes).matched_by == 'wnid'
    assert labels(read_samples(tmp_path, classes, layout='folder', split='val')) == {names[1]: 5, names[0]: 999}
    mapping.unlink()
    for index in range(1000):
        (tmp_path / 'val' / wnid(index)).mkdir(exist_ok=True)
    assert labels(read_samples(tmp_path, classes, split='val')) == {names[1]: 5, names[0]: 999}
    assert read_samples(tmp_path, classes, split='val').matched_by == 'wnid'
    with pytest.raises(ValueError, match="split 'train'"):
        read_samples(tmp_path, classes, 'imagenet', 'train')


def test_imagenet_flat(tmp_path):
    '''The development kit's ids are not in the order of classes; without it, annotations have labels.'''
    classes = [f'name {index}' for index in range(1000)]
    data = tmp_path / 'ILSVRC'
    names = [f'ILSVRC2012_val_{index:08d}.JPEG' for index in (1, 2, 3)]
    touch(data, *names)
    assert read_samples(data, classes).layout == 'folder'
    ids = random.Random(0).sample(range(1, 1001), 1000)
    kit = tmp_path / 'ILSVRC2012_devkit_t12' / 'data'
    truth = write(kit, 'ILSVRC2012_validation_ground_truth.txt', f'{ids[7]}\n{ids[0]}\n{ids[999]}\n{ids[3]}\n')
    with pytest.raises(ValueError, match='meta.mat'):
        read_samples(data, classes)
    assert set(labels(read_samples(data, classes, labels='ignore')).values()) == {None}
    rows = [(number, wnid(index), 0) for index, number in enumerate(ids)] + [(1001, wnid(2000), 4)]
    synsets = np.array(rows, [('ILSVRC2012_ID', float), ('WNID', object), ('num_children', float)])
    scipy.io.savemat(kit / 'meta.mat', {'synsets': synsets})
    found = read_samples(data, classes)
    assert found.layout == 'imagenet' and found.messages == ()
    assert labels(found) == dict(zip(names, (7, 0, 999)))
    truth.write_text('1\n5000\n')
    with pytest.raises(ValueError, match='does not fit meta.mat'):
        read_samples(data, classes)
    (kit / 'meta.mat').write_bytes(b'nothing')
    with pytest.raises(ValueError, match="is not ILSVRC2012's"):
        read_samples(data, classes)
    for name, index in zip(names, (2, 0, 0)):
        write(data, f'Annotations/CLS-LOC/val/{name[:-5]}.xml', XML.format(wnid=wnid(index)))
    truth.unlink()
    (kit / 'meta.mat').unlink()
    assert list(labels(read_samples(data, ['first', 'second'])).values()) == [1, 0, 0]


def make_cub(root):
    '''Three images of two classes in the official layout.'''
    write(root, 'images.txt', '1 001.Sooty_Tern/a.jpg\n2 002.Crow/b.jpg\n3 002.Crow/c.jpg\n')
    write(root, 'image_class_labels.txt', '1 1\n2 2\n3 2\n')
    write(root, 'train_test_split.txt', '1 0\n2 1\n3 0\n')
    write(root, 'classes.txt', '1 001.Sooty_Tern\n2 002.Crow\n')


def test_cub(tmp_path):
    '''Split, boxes and segmentations are those of the official files.'''
    root = tmp_path / 'CUB_200_2011'
    make_cub(root)
    found = read_samples(root, ['crow', 'sooty tern'])
    assert found.layout == 'cub'
    assert labels(found) == {'images/001.Sooty_Tern/a.jpg': 1, 'images/002.Crow/c.jpg': 0}
    assert {(sample.mask, sample.boxes) for sample in found.samples} == {(None, ())}
    write(root, 'bounding_boxes.txt', '1 60.0 27.0 325.0 304.0\n2 1 2 3 4\n3 0 0 9 8.5\n')
    (tmp_path / 'segmentations').mkdir()
    train = read_samples(tmp_path, ['class 0', 'class 1'], split='train')
    name = 'CUB_200_2011/images/002.Crow/b.jpg'
    assert train.samples == (
        Sample(name, tmp_path / name, 1, tmp_path / 'segmentations' / '002.Crow' / 'b.png', ((1, 2, 4, 6),)),
    )
    assert '001.Sooty_Tern' in train.messages[0]
    assert read_samples(tmp_path, ['crow'], split='test').samples[0].boxes == ((60, 27, 385, 331),)


# -- errors ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options,message', [
    ({'path': 'missing'}, 'there is no file or folder'),
    ({'path': 'empty'}, 'there are no images in'),
    ({'layout': 'coco'}, "layout='coco' is not one of None, 'folder', 'csv', 'imagenet', 'cub'"),
    ({'labels': 'guess'}, "labels='guess'"),
    ({'limit': 0}, 'limit=0'),
    ({'classes': []}, 'no names of classes'),
    ({'layout': 'csv'}, 'no manifest.csv or labels.csv'),
    ({'path': 'x.csv', 'layout': 'folder'}, 'is not a folder'),
    ({'path': 'x.csv'}, "no column 'image' or 'file', but name, label"),
    ({'path': 'none.csv'}, 'none at all'),
    ({'path': 'a.png'}, 'is not a CSV file'),
    ({'path': 'split.csv', 'split': 'val'}, "no column 'split'"),
    ({'path': 'parts.csv', 'split': 'val'}, "with split 'val'"),
    ({'path': 'box.csv'}, "no column 'y1' for boxes"),
    ({'path': 'text.csv'}, r'text.csv, .* 2: .*\(1, 2, 3, four\)'),
    ({'path': 'relative.csv'}, r'relative.csv: .*\(0.1, 0.2, 0.5, 1.0\) of a.png'),
    ({'path': 'sides.csv'}, 'width and height'),
    ({'path': 'long.csv'}, 'long.csv'),
    ({'path': 'longer.csv'}, 'longer.csv'),
    ({'path': 'blank.csv'}, 'blank.csv, .* 1: '),
    ({'layout': 'imagenet'}, 'neither folders named by wnid'),
    ({'layout': 'cub'}, 'images.txt is missing'),
    ({'path': 'cub'}, 'train_test_split.txt is missing'),
    ({'path': 'misfit'}, 'do not fit for image 3'),
    ({'path': 'misfit', 'split': 'val'}, 'choose train or test'),
])
def test_errors(tmp_path, options, message):
    '''What does not fit is told in a line.'''
    touch(tmp_path, 'a.png')
    (tmp_path / 'empty').mkdir()
    write(tmp_path, 'x.csv', 'name,label\na,b\n')
    write(tmp_path, 'none.csv', '')
    write(tmp_path, 'split.csv', 'file\na.png\n')
    write(tmp_path, 'parts.csv', 'file,split\na.png,train\n')
    write(tmp_path, 'box.csv', 'file,x0,y0,x1\na.png,1,2,3\n')
    write(tmp_path, 'text.csv', 'file,x0,y0,x1,y1\na.png,1,2,3,4\na.png,1,2,3,four\n')
    write(tmp_path, 'relative.csv', 'file,x0,y0,x1,y1\na.png,0.1,0.2,0.5,1\nb.png,0,0,1,1\n')
    write(tmp_path, 'sides.csv', 'file,x0,y0,x1,y1\na.png,30,20,10,5\nb.png,40,9,12,6\n')
    write(tmp_path, 'long.csv', 'file,label\na.png,projectile, missile\n')
    write(tmp_path, 'longer.csv', 'file,label\na.png,tench\nb.png,projectile, missile\n')
    write(tmp_path, 'blank.csv', 'file,label\n,tench\n')
    make_cub(tmp_path / 'cub')
    (tmp_path / 'cub' / 'train_test_split.txt').unlink()
    make_cub(tmp_path / 'misfit')
    write(tmp_path, 'misfit/image_class_labels.txt', '1 1\n2 2\n')
    options = {'classes': CLASSES, **options, 'path': tmp_path / options.get('path', '')}
    with pytest.raises(ValueError, match=message) as caught:
        read_samples(**options)
    assert '\n' not in str(caught.value)


# -- limit -------------------------------------------------------------------------------------------------------------

def test_limit(tmp_path, monkeypatch):
    '''A choice is even over labels, nested, and depends on the seed but not on the order of files.'''
    touch(tmp_path, *[f'{name}/{num}.png' for name, count in zip(CLASSES, (9, 2, 9)) for num in range(count)])
    touch(tmp_path, 'yeti/1.png')
    everything = read_samples(tmp_path, CLASSES)
    assert read_samples(tmp_path, CLASSES, limit=21) == everything
    chosen = read_samples(tmp_path, CLASSES, limit=10)
    assert Counter(sample.label for sample in chosen.samples) == {0: 4, 1: 2, 2: 4}
    assert set(chosen.samples) < set(everything.samples)
    assert [sample.name for sample in chosen.samples] == sorted(sample.name for sample in chosen.samples)
    assert chosen.messages[1:] == ('1 of 21 images have a problem, and 10 are drawn from the others',)
    assert sorted(Counter(
        sample.label for sample in read_samples(tmp_path, CLASSES, limit=4).samples).values()) == [1, 1, 2]
    assert set(read_samples(tmp_path, CLASSES, limit=5).samples) < set(chosen.samples)
    assert len({read_samples(tmp_path, CLASSES, limit=1, seed=seed).samples for seed in range(20)}) > 3
    scandir = os.scandir

    class Backwards:
        '''Entries of a folder in reverse order.'''
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return self.entries

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(os, 'scandir', Backwards)
    assert read_samples(tmp_path, CLASSES, limit=10) == chosen
    assert len(read_samples(tmp_path, ['a', 'b'], limit=3).samples) == 3


def test_limit_does_not_prefer_common_labels(tmp_path):
    '''Which labels have one image more is random, whatever their number of images.'''
    write(tmp_path, 'labels.csv', 'file,label\nrare,tench\n' + ''.join(f'{num},church\n' for num in range(30)))
    rare = sum(read_samples(tmp_path, CLASSES, limit=1, seed=seed).samples[0].label == 0 for seed in range(20))
    assert 5 <= rare <= 15


# -- reading -----------------------------------------------------------------------------------------------------------

def scene(width=40, height=30):
    '''An object in the upper left quarter, which no flip or rotation leaves as it is.'''
    inside = np.zeros((height, width), bool)
    inside[2:height // 2, 3:width // 2 + 4] = True
    return inside


def save(path, inside, orientation=None):
    '''White where the mask is, so that the image itself shows where the mask must be.'''
    image = Image.fromarray(inside.astype(np.uint8) * 255).convert('RGB')
    options = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options = {'exif': exif}
    image.save(path, **options)


@pytest.mark.parametrize('transform', [SQUARE, CROP], ids=['square', 'crop'])
@pytest.mark.parametrize('suffix', ['png', 'tiff'])
@pytest.mark.parametrize('orientation', [None, *range(1, 9)])
def test_mask_is_where_the_object_is(tmp_path, transform, suffix, orientation):
    '''Masks and boxes are turned, resized and cropped as the image.'''
    inside = scene()
    path = tmp_path / f'a.{suffix}'
    save(path, inside, orientation)
    Image.fromarray(inside).save(tmp_path / 'mask.png')
    samples = [Sample('a', path, 0, tmp_path / 'mask.png'), Sample('b', path, 0, None, ((3, 2, 24, 15),))]
    for image, mask, problem, note in Images(samples, transform):
        assert (problem, note) == (None, None) and mask.dtype == torch.bool
        # zero is between the normalized values of black and white
        assert 0.1 < mask.double().mean() < 0.6 and mask.shape == image.shape[1:]
        assert torch.equal(mask, image.mean(0) > (image.amin((1, 2)) + image.amax((1, 2))).mean() / 2)


def shift(photo):
    '''A transform that makes black brighter than white, and both negative.'''
    return -5 - functional.to_tensor(photo)


def test_mask_with_any_normalization(tmp_path):
    '''Mean and standard deviation need not be known.'''
    save(tmp_path / 'a.png', scene())
    loaded = Images([Sample('a', tmp_path / 'a.png', 0, tmp_path / 'a.png')], shift)[0]
    assert torch.equal(loaded.mask, torch.from_numpy(scene()))


def palette(colors):
    '''Numbers 0, 1 and 2 with a palette.'''
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([value for color in colors for value in color])
    return image


@pytest.mark.parametrize('image,expected', [
    (Image.fromarray(np.array([[0, 1, 0]], np.uint8)), [0, 1, 0]),
    (Image.fromarray(np.array([[0, 255, 255]], np.uint8)), [0, 1, 1]),
    (Image.fromarray(np.array([[7, 7, 7]], np.uint8)), [1, 1, 1]),
    (Image.fromarray(np.array([[0, 0, 0]], np.uint8)), [0, 0, 0]),
    # votes of the annotators of CUB
    (Image.fromarray(np.array([[102, 153, 255]], np.uint8)), [0, 1, 1]),
    (Image.fromarray(np.array([[0, 51, 102]], np.uint8)), [0, 0, 0]),
    (Image.fromarray(np.array([[False, True, False]])), [0, 1, 0]),
    (Image.fromarray(np.array([[0, 300, 65535]], np.uint16)), [0, 0, 1]),
    (Image.fromarray(np.array([[0, 1, 0]], np.uint16)), [0, 1, 0]),
    # floats are from 0 to 1, or from 0 to 255
    (Image.fromarray(np.array([[0, .4, 1]], np.float32)), [0, 0, 1]),
    (Image.fromarray(np.array([[0, 100, 200]], np.float32)), [0, 0, 1]),
    (Image.fromarray(np.array([[[0, 0, 0], [0, 0, 200], [0, 90, 0]]], np.uint8)), [0, 1, 0]),
    (Image.fromarray(np.array([[[9, 9, 9, 0], [255, 255, 255, 255], [0, 0, 0, 255]]], np.uint8)), [0, 1, 0]),
    (palette([(0, 0, 0), (64, 0, 0), (128, 0, 0)]), [0, 1, 1]),
    (palette([(255, 255, 255), (9, 9, 9), (0, 0, 0)]), [1, 0, 0]),
])
def test_mask_modes(tmp_path, image, expected):
    '''Masks are of any mode.'''
    Image.new('RGB', (3, 1)).save(tmp_path / 'image.png')
    mask = tmp_path / ('mask.tiff' if image.mode == 'F' else 'mask.png')
    image.save(mask)
    sample = Sample('a', tmp_path / 'image.png', 0, mask)
    assert Images([sample], functional.to_tensor)[0].mask.int().tolist() == [expected]


def test_bad_files(tmp_path, monkeypatch):
    '''Files that cannot be used have a reason, and raise nothing.'''
    touch(tmp_path, 'good.png', 'folder/x.png')
    good = tmp_path / 'good.png'
    Image.effect_noise((60, 60), 50).save(tmp_path / 'half.png')
    (tmp_path / 'half.png').write_bytes((tmp_path / 'half.png').read_bytes()[:-999])
    (tmp_path / 'text.png').write_text('text')
    Image.new('L', (5, 4)).save(tmp_path / 'mask.png')
    Image.new('L', (100, 100)).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)

    def load(path, mask=None, boxes=(), problem=None):
        sample = Sample('a', tmp_path / path, 0, mask and tmp_path / mask, boxes, problem)
        return Images([sample], SQUARE)[0]

    assert load('good.png', problem='it has a reason') == Loaded(None, None, 'it has a reason', None)
    for path, reason in {
        'gone.png': 'the image is missing', 'half.png': 'trunc', 'text.png': 'not an image',
        'bomb.png': '5000 pixels', 'folder': 'the image is unusable',
    }.items():
        loaded = load(path)
        assert loaded.image is None and reason in loaded.problem and loaded.note is None
        loaded = load('good.png', path)
        assert loaded.image is not None and loaded.mask is None and loaded.problem is None
        assert loaded.note.startswith('the mask is ') and '\n' not in loaded.note
    assert load('good.png', 'gone.png').note == 'the mask is missing'
    assert '5 x 4 pixels, but the image as stored of 4 x 4' in load('good.png', 'mask.png').note
    assert '(3, 0, 1, 2) is not of left' in load('good.png', boxes=((3, 0, 1, 2),)).note
    assert load('good.png').note is None and load('good.png').mask is None

    def fail(photo):
        raise RuntimeError('not\nenough memory')

    loaded = Images([Sample('a', good, 0)], fail)[0]
    assert loaded.problem.endswith(': not enough memory')


@pytest.mark.parametrize('box', [
    (0.1, 0.2, 0.5, 0.9), (0, 0, 1, 1), (-9, 1, 3, 4), (1, -2, 3, 4), (1, 1, 42, 4), (1, 1, 4, 39.5), (50, 50, 60, 60),
])
def test_boxes_outside(tmp_path, box):
    '''Boxes that are relative or outside of the image are no masks, and the note has their values.'''
    touch(tmp_path, 'a.png')
    Image.new('RGB', (40, 38)).save(tmp_path / 'a.png')
    for boxes in ((box,), ((1, 1, 5, 5), box)):
        loaded = Images([Sample('a', tmp_path / 'a.png', 0, None, boxes)], SQUARE)[0]
        assert loaded.mask is None and str(box) in loaded.note and loaded.image is not None
    # by another counting of pixels
    for box in ((-1, 0, 41, 39), (0, 0, 40, 38), (0.5, 0.5, 2, 2)):
        loaded = Images([Sample('a', tmp_path / 'a.png', 0, None, (box,))], SQUARE)[0]
        assert loaded.note is None and loaded.mask.any()


def test_loader(tmp_path):
    '''Samples are pickled for workers, and batches are lists.'''
    touch(tmp_path, 'church/a.png', 'church/b.png', 'yeti/c.png')
    images = Images(read_samples(tmp_path, CLASSES).samples, SQUARE)
    copy = pickle.loads(pickle.dumps(images))
    assert len(copy) == 3 and torch.equal(copy[0].image, images[0].image)
    first, second = DataLoader(copy, batch_size=2, collate_fn=list)
    assert [item.image.shape for item in first] == [(3, 32, 32)] * 2
    assert [item[1:] for item in first] == [(None, None, None)] * 2
    assert second[0].image is None and 'yeti' in second[0].problem
    assert isinstance(images.samples[0].path, Path)
