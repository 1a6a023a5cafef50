'''The command that writes an explanation as one file.'''
from pathlib import Path

import click

from .._choices import CONTRASTS
from .._text import one_line
from .commands import main
from .options import NETWORK_OPTIONS, OVERWRITE, START_OPTIONS, add_options, method_options

# Largest part of the largest value by which a map of another runtime may differ.
TOLERANCE = 1e-4


@main.command()
@add_options([*NETWORK_OPTIONS, *START_OPTIONS])
@method_options
@click.option(
    '--batch-size', type=click.IntRange(min=1), default=1, show_default=True,
    help='Number of images of each call, which is fixed in the file.'
)
@click.option(
    '--normalize', is_flag=True,
    help='Let the file normalize images, so that it takes RGB values from 0 to 1.  [default: it takes normalized ones]'
)
@click.option('--relevance', is_flag=True, help='Let the file also return the relevance of each color channel.')
@OVERWRITE
@click.option(
    '--out', type=click.Path(path_type=Path), default='explain.onnx', show_default=True,
    help='File to write: .onnx, or .pt2 for torch.export.load.'
)
def export(
    model, weights, size, classes, mean, std, value, contrast, method, splitting, batch_size, normalize, relevance,
    overwrite, out
):
    '''Write one file that maps an image and a target class to logits and a heatmap, without this package.

    Inputs are image and target, the index of a class for each image, or -1 for the predicted one. ONNX needs the
    packages onnx and onnxscript, and the comparison that is printed onnxruntime.
    '''
    import torch

    from ..canonizers import UnsupportedOperation
    from ..export import check_path
    from ..export import export as write
    from ..methods import Method
    from ..models import load_classifier
    from ..tracing import trace
    from .session import writing
    if out.exists() and not overwrite:
        raise click.ClickException(f'{out} exists already: choose another --out, or --overwrite it')
    try:
        with writing(out):
            check_path(out, overwrite)
        chosen = Method(method if splitting == 'none' else f'{method}+{splitting}')
        if chosen.entry.composite is None:
            raise ValueError(f'{chosen.text} is no composite: choose a method of rules')
        if chosen.postprocess != 'none' or chosen.magnitude:
            raise ValueError(f'{chosen.text}: a file returns the heatmap as it is, leave what is done to it out')
        if chosen.splitting == 'zennit':
            raise ValueError(f'{chosen.text} cannot be exported: choose +ratio or +symmetric')
        classifier = load_classifier(model, weights, size, classes, mean, std)
        if contrast is not None and contrast not in CONTRASTS:
            contrast = classifier.find_class(contrast)
        if chosen.contrast is not None:
            contrast = chosen.contrast
        input, target = draw_input(classifier, batch_size), torch.full((batch_size,), -1)
        explain = trace(classifier.model, chosen.composite(classifier), input)
        with writing(out):
            metadata = write(
                explain, input, out, chosen.initial or value, contrast, chosen.contrast_weight, relevance,
                (classifier.mean, classifier.std) if normalize else None,
                {'method': chosen.text, 'classes': classifier.classes,
                 'preprocessing': describe_preprocessing(classifier, input, normalize)}, overwrite,
            )
    except (ValueError, TypeError, IndexError, ImportError, UnsupportedOperation) as error:
        raise click.ClickException(one_line(error)) from error
    except RuntimeError as error:
        if chosen.entry.kind == 'ours':
            raise
        raise click.ClickException(
            f'{chosen.text} cannot be used with this network ({one_line(error)}): choose another method'
        ) from error
    output, expected, *_ = chosen.attribute(classifier, input, None, metadata['value'], contrast)
    image = input * classifier.std + classifier.mean if normalize else input
    click.echo('\n'.join([
        f'written {one_line(out)}, {out.stat().st_size / 1e6:.1f} MB',
        f'  method     {chosen.text}, which is {metadata["composite"]} from {metadata["value"]}',
        f'  inputs     {metadata["inputs"]}',
        f'  outputs    {metadata["outputs"]}',
        f'  check      {compare_file(out, image, target, output, expected.sum(1))}',
    ]))


def draw_input(classifier, batch_size):
    '''A batch of inputs like those of photographs: spots and noise, with no even areas, where maxima would be tied.'''
    import numpy as np
    import torch
    from PIL import Image
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(batch_size):
        spots = Image.fromarray(rng.integers(64, 192, (8, 8, 3), dtype=np.uint8))
        noise = rng.integers(-32, 32, (512, 512, 3))
        spots = np.asarray(spots.resize((512, 512), Image.Resampling.BILINEAR)) + noise
        photos.append(classifier.transform(Image.fromarray(spots.astype(np.uint8))))
    return torch.stack(photos)


def describe_preprocessing(classifier, input, normalize):
    '''What has to be done to photographs.'''
    transform = classifier.transform
    resize = getattr(transform, 'resize_size', None)
    return {
        'resize': list(input.shape[2:]) if resize is None else f'shorter side to {resize[0]}',
        'interpolation': getattr(getattr(transform, 'interpolation', None), 'value', 'bilinear'),
        'size': list(input.shape[2:]),
        'crop': 'none' if resize is None else 'center',
        'channels': 'RGB',
        'range': [0, 1],
        **({} if normalize else {
            name: [round(number, 6) for number in value.flatten().tolist()]
            for name, value in (('mean', classifier.mean), ('std', classifier.std))
        }),
    }


def compare_file(path, image, target, output, heatmap):
    '''How much what a file returns differs from what was computed.'''
    import numpy as np

    from ..export import run_file
    try:
        found = run_file(path, image, target)
    except ImportError:
        return 'not done, as onnxruntime is not installed'
    gaps = []
    for name, expected in (('logits', output), ('heatmap', heatmap)):
        expected = expected.numpy()
        largest = np.abs(expected).max()
        gaps.append(float(np.abs(found[name] - expected).max() / largest) if largest else 0.)
    text = f'the largest difference is {gaps[1]:.1e} of the largest value of the heatmap, and {gaps[0]:.1e} of logits'
    if not all(gap <= TOLERANCE for gap in gaps):
        text += f', more than {TOLERANCE:g}: look at a few of your own images'
    return text
