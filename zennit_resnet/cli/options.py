'''Options that commands share. Nothing here loads PyTorch, so that ``--help`` is quick.'''
import math
from pathlib import Path

import click

from .._choices import INPUT_X_GRADIENT, LEVELS, POSTPROCESSING, SPLITTING, VALUES, split_names


class Tolerance(click.FloatRange):
    '''A number in a range, which nan is not for Python.'''
    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f'{value} is not a number', param, ctx)
        return number


class Several(click.ParamType):
    '''Names or numbers separated by commas, a tuple of them, of some length if a count is given.'''
    def __init__(self, kind=str, count=None):
        self.kind, self.count = kind, count
        self.name = 'names' if kind is str else 'numbers'

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return tuple(value)
        try:
            found = tuple(self.kind(part) for part in split_names(value))
        except ValueError:
            self.fail(f'{value!r} is not made of numbers separated by commas', param, ctx)
        if self.count is not None and len(found) != self.count:
            self.fail(f'{value!r} is not made of {self.count} {self.name}, separated by commas', param, ctx)
        return found or self.fail(f'there are no {self.name} in {value!r}', param, ctx)


def _list_methods(context, _, is_given):
    if is_given and not context.resilient_parsing:
        from ..methods import find_entries
        click.echo('\n'.join(find_entries()))
        context.exit()


def add_options(options):
    '''Create a function that adds options to a command, listed in their order.'''
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command
    return decorate


NETWORK_OPTIONS = [
    click.option('--model', help='Classification model of torchvision.  [default: resnet50]'),
    click.option(
        '--weights', metavar='NAME|PATH',
        help='Name of weights which torchvision downloads, such as DEFAULT, or a state dict or checkpoint (.pt, .pth, '
        '.ckpt, .safetensors).  [default without --model: the embedded ResNet-50 with 10 classes]'
    ),
    click.option(
        '--classes', type=click.Path(path_type=Path), metavar='FILE',
        help='Names of the classes in the order of the outputs, one in each line, or a list in JSON.'
    ),
    click.option(
        '--size', type=click.IntRange(min=1),
        help='For local weights, photographs are resized to a square of this side.  [default: 224]'
    ),
    click.option(
        '--mean', type=Several(float, 3), help='Means of red, green and blue, from 0 to 1.  [default: ImageNet\'s]'
    ),
    click.option('--std', type=Several(float, 3), help='Standard deviations.  [default: ImageNet\'s]'),
]
START_OPTIONS = [
    click.option(
        '--value', type=click.Choice(VALUES),
        help='What relevance starts from: the target\'s logit, its softmax probability, or one.  [default: what makes '
        'relevance positive that is for the class: one, or the logit if the rule of the last layer divides by it]'
    ),
    click.option(
        '--contrast', metavar='centred|softmax|runner_up|NUMBER|NAME',
        help='Why the target and not something else: all other classes evenly, all others by their probabilities, the '
        'most probable other class, or a class.'
    ),
]
KEEP_ASPECT = click.option(
    '--keep-aspect', is_flag=True,
    help='Resize the shorter side instead, and give the network the whole photograph.'
)
OVERWRITE = click.option('--overwrite', is_flag=True, help='Replace files that are there.')
common_options = add_options([
    click.argument('images', metavar='IMAGE|FOLDER...', nargs=-1, required=True, type=click.Path(path_type=Path)),
    *NETWORK_OPTIONS,
    KEEP_ASPECT,
    click.option(
        '--target', metavar='NUMBER|NAME',
        help='The class to explain, also as index:5 or name:5.  [default: the predicted class]'
    ),
    *START_OPTIONS,
    click.option('--device', help='Device of PyTorch.  [default: cuda if available, else cpu]'),
    click.option('--batch-size', type=click.IntRange(min=1), default=8, show_default=True),
    OVERWRITE,
    click.option(
        '--list', is_flag=True, is_eager=True, expose_value=False, callback=_list_methods,
        help='List names of methods, and exit.'
    ),
])
heatmap_options = add_options([
    click.option(
        '--postprocess', type=click.Choice(['none', *POSTPROCESSING]), default='none', show_default=True,
        help='What is done to heatmaps before they are drawn: heat quantization, the largest connected component '
        '(C1C), or what it and the largest contour have in common (C3).'
    ),
    click.option(
        '--quantize', metavar='LEVELS', type=click.IntRange(min=0), default=0,
        help=f'The same as --postprocess quantize, to this number of levels.  [default: {LEVELS}]'
    ),
    click.option(
        '--smooth', type=Tolerance(min=0), default=0., help='Smooth heatmaps by a Gaussian of this standard deviation, '
        'in pixels of the network\'s input.'
    ),
    click.option(
        '--percentile', type=Tolerance(0, 100, min_open=True), default=99.5, show_default=True,
        help='Where the color range ends, so that a few bright pixels do not make all others vanish.'
    ),
    click.option(
        '--contours', type=Tolerance(0, 100), metavar='PERCENT',
        help='Outline so many of the most relevant pixels in overlays.'
    ),
    click.option(
        '--cmap', metavar='NAME|COLORS',
        help='Color map of Zennit, colors as in 00f,fff,f00, or safe for any kind of color vision.'
    ),
])
METHOD_HELP = (
    f'composites in Zennit\'s COMPOSITES, classic rules and {INPUT_X_GRADIENT}, with options and suffixes as in '
    'resnet_lrp_ratio:first_layer=ones+quantize8. The suffixes +ratio, +symmetric and +zennit add splitting at skip '
    'connections, +quantize8, +c1c and +c3 post-processing instead of that of --postprocess.'
)
SPLITTING_OPTION = click.option(
    '--splitting', type=click.Choice(['none', *SPLITTING]), default='none', show_default=True,
    help='Splitting at skip connections for methods that do not split by themselves: by our rules, or as Zennit\'s '
    'ResNetCanonizer.'
)


def methods_option(default):
    return click.option(
        '--method', '--methods', 'methods', type=Several(), default=default, show_default=True, metavar='NAMES',
        help=f'Methods, separated by commas: {METHOD_HELP}'
    )


method_options = add_options([
    click.option(
        '--method', default='resnet_lrp_ratio', show_default=True, metavar='NAME', help=f'One of the {METHOD_HELP}'
    ),
    SPLITTING_OPTION,
])
