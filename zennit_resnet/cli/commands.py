'''Commands that explain photographs. What computes is imported when a command runs, so that ``--help`` is quick.'''
import io
import sys
from pathlib import Path

import click

from .. import __version__
from .._choices import INPUT_X_GRADIENT, SCALES
from .._text import one_line
from .group import Commands
from .options import SPLITTING_OPTION, Tolerance, common_options, heatmap_options, method_options, methods_option

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp', '.gif', '.pdf')
DEFAULT_METHODS = (
    f'resnet_lrp_ratio,resnet_lrp_symmetric,epsilon_plus_flat+zennit,epsilon_plus+zennit,{INPUT_X_GRADIENT}'
)


@click.group(cls=Commands, context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__)
def main():
    '''Explain what residual networks see in photographs, with Layer-wise Relevance Propagation.

    The exit status is 0 if all went well, 1 if relevance is not conserved (ledger), and 2 after any error, also if only
    some photographs could not be explained.
    '''
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names of files and classes may have characters which the encoding of the output has not
            stream.reconfigure(errors='backslashreplace')


@main.command()
@common_options
@heatmap_options
@methods_option('resnet_lrp_ratio')
@SPLITTING_OPTION
@click.option(
    '--out', type=click.Path(path_type=Path), default='heatmaps', show_default=True, help='Folder to write to.'
)
def explain(images, methods, out, **options):
    '''Write heatmaps, overlays and figures of photographs, raw relevance, and a manifest.

    Pictures have the size of the photograph, and positive relevance, red and yellow, is for the class.
    '''
    from tqdm import tqdm

    from ..explanation import file_stem, unique_names
    from ..explanation.result import ENDINGS
    from .session import Session, writing
    session = Session(images, methods, out, options)
    stems = [
        file_stem(name, method, session.rivals) for name in unique_names(session.images) for method in session.methods
    ]
    session.check_free([out / f'{stem}_{ending}' for stem in stems for ending in ENDINGS])
    for path, explanations in session.explanations():
        first = next(each for each in explanations if each is not None)
        top = ', '.join(f'{each["name"]} {100 * each["probability"]:.1f} %' for each in first.describe()['prediction'])
        lines = [
            one_line(path),
            f'  predicted  {top}',
            f'  target     {numbered(first.label, first.target)} {100 * first.probability:.1f} %{first.versus}',
        ]
        for method, each in zip(session.methods, explanations):
            if each is None:
                session.fail(path, f'the relevance by {method.text} is not finite, try another --method')
                continue
            with writing(f'{out / each.stem}_*'):
                written = each.save(out, session.overwrite, **session.style)
            lines += describe(each, session, written)
        tqdm.write('\n'.join(lines), file=sys.stdout)
    session.finish()


def numbered(label, index):
    '''The name of a class and its number, once.'''
    return label if label == f'class {index}' else f'{label} (class {index})'


def describe(explanation, session, written):
    '''What is said about an explanation, as lines.'''
    total = explanation.describe()['relevance']
    kept = f', sinks {total["sinks"]:.6g}' if total['sinks'] else ''
    if explanation.method.name == 'relative_lrp':
        kept += ', ratio without a meaning for relative relevance'
    elif total['contrast'] is not None:
        # both may be zero
        kept += ', for the class less for its rivals'
    elif total['initial']:
        kept += f', ratio {(total["sum"] + total["sinks"]) / total["initial"]:.6f}'
    notes = explanation.notes
    if explanation.method.postprocess != 'none':
        notes.insert(0, f'post-processed by {explanation.method.postprocess}')
    endings = ', '.join(path.name.removeprefix(explanation.stem) for path in written[1:])
    return [
        *([f'  method     {explanation.method.text}'] if len(session.methods) > 1 else []),
        f'  relevance  sum {total["sum"]:.6g}, initial {total["initial"]:.6g} ({total["starts from"]}){kept}',
        *([f'  pictures   {"; ".join(notes)}'] if notes else []),
        f'  written    {one_line(written[0])}, {endings}',
    ]


@main.command()
@common_options
@heatmap_options
@methods_option(DEFAULT_METHODS)
@click.option(
    '--show', type=click.Choice(['heatmap', 'overlay', 'both']), default='heatmap', show_default=True,
    help='What to draw beside the photograph.'
)
@click.option(
    '--scale', type=click.Choice(SCALES), default='own', show_default=True,
    help='What has a color range of its own: each picture, each method, or the figure.'
)
@click.option(
    '--out', type=click.Path(path_type=Path), default='compare.png', show_default=True, help='Picture to write.'
)
def compare(images, methods, show, scale, out, **options):
    '''Draw several methods side by side in one figure, one row for each photograph.'''
    if out.suffix.lower() not in PICTURES:
        raise click.ClickException(f'--out {out} is not a picture: choose a name that ends with {", ".join(PICTURES)}')
    from tqdm import tqdm

    from ..explanation import draw_table
    from .session import Session, save_picture, writing
    session = Session(images, methods, out.parent, options)
    session.check_free([out])
    rows, notes = [], {}
    for path, explanations in session.explanations():
        rows.append(explanations)
        for method, each in zip(session.methods, explanations):
            found = ['left out, as relevance is not finite'] if each is None else each.notes
            session.failed |= each is None
            for note in found:
                notes.setdefault((method.text, note), []).append(path.name)
    if rows:
        kinds = ('heatmap', 'overlay') if show == 'both' else (show,)
        titles = [method.text for method in session.methods]
        try:
            picture = draw_table(rows, kinds, scale, titles, **session.style)
        except ValueError as error:
            raise click.ClickException(one_line(error)) from error
        with writing(out):
            out = save_picture(picture, out, session.overwrite)
        tqdm.write(f'written {one_line(out)}', file=sys.stdout)
        for (text, note), names in notes.items():
            shown, more = names[:3], len(names) - 3
            which = ', '.join(map(one_line, shown)) + (f' and {more} more' if more > 0 else '')
            which = 'all' if len(names) == len(rows) else which
            tqdm.write(f'  {text}: {note} ({which})', file=sys.stdout)
    session.finish()


@main.command()
@common_options
@method_options
@click.option(
    '--tolerance', type=Tolerance(min=0), default=1e-4, show_default=True,
    help='Largest part of the initial relevance that a layer, or the whole network, may lose or gain.'
)
@click.option('--blocks', is_flag=True, help='List blocks in the place of layers.')
@click.option('--only-losses', is_flag=True, help='List only what loses or gains more than the tolerance.')
@click.option(
    '--out', type=click.Path(path_type=Path), default='ledgers', show_default=True, help='Folder to write to.'
)
def ledger(images, method, tolerance, blocks, only_losses, out, **options):
    '''Show how much relevance arrives at each layer and leaves it, and where the rest went.

    Writes a plot, a table (CSV), and all as JSON. The exit status is 1 if relevance is not conserved.
    '''
    from tqdm import tqdm

    from .._files import whole
    from ..explanation import file_stem, unique_names
    from ..explanation.photos import prepare
    from .session import Session, reason_of, writing
    session = Session(images, [method], out, options)
    chosen, classes = session.methods[0], session.classifier.classes
    stems = [file_stem(name, chosen, session.rivals) for name in unique_names(session.images)]
    endings = ('ledger.png', 'ledger.csv', 'ledger.json')
    session.check_free([out / f'{stem}_{ending}' for stem in stems for ending in endings])
    for path, stem in zip(session.images, stems):
        session.bar.update()
        try:
            input = prepare(session.classifier, path)[1][None].to(session.device)
        except (ValueError, OSError) as error:
            session.fail(path, reason_of(error))
            continue
        batch, targets = session.attribute(
            chosen, session.classifier, input, session.target, session.value, session.contrast, what='ledger'
        )
        single, target = batch.example(0), targets[0]
        figure = single.plot(tolerance=tolerance)
        figure.suptitle(one_line(f'{path.name}: {chosen.text}, {classes[target]}'), parse_math=False)
        with writing(f'{out / stem}_ledger.*'):
            for ending, write in zip(endings, (figure.savefig, single.to_csv, single.to_json)):
                with whole(out / f'{stem}_{ending}', session.overwrite) as name:
                    write(name)
        deviation = float(single.deviation())
        is_conserved = deviation <= tolerance
        session.conserved &= is_conserved
        tqdm.write('\n'.join([
            one_line(path),
            f'  target     {numbered(classes[target], target)}',
            f'  written    {one_line(out / stem)}_ledger.png, _ledger.csv, _ledger.json',
            single.table(tolerance=tolerance, blocks=blocks, only_losses=only_losses),
            f'{"conserved" if is_conserved else "not conserved"}: the largest deviation is {deviation:.2g} of the '
            f'initial relevance, the tolerance is {tolerance:g}',
        ]), file=sys.stdout)
    session.finish()
