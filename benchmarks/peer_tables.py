'''Tables of what ``peers.py`` found, as Markdown.'''
import statistics
from collections import defaultdict

from captum_adapters.metrics.statistics import bootstrap_interval, compare

# what others are compared with, unless another is asked for
BASE = 'ours: ratio, half a contrast'
# measure, column of its rows, title, digits
COLUMNS = (
    ('photo', 'gap', 'conservation gap', None),
    ('photo', 'id', 'honest ID', 3),
    ('photo', 'abpc', 'ABPC', 2),
    ('photo', 'abpc_signed', 'ABPC, signed', 2),
    ('grid2', 'share', 'grid pointing', 3),
    ('focus2', 'share', 'Focus', 3),
    ('idsds', 'spearman', 'IDSDS', 3),
    ('photo', 'pearson', 'correlation with the runner-up', 2),
    ('random', 'ssim', 'SSIM, random classifier', 2),
)


def summarize(results, names, base):
    '''Tables of means and of paired differences to a method, as Markdown.'''
    values = defaultdict(dict)
    for row in results.rows.values():
        for measure, column, *_ in COLUMNS:
            if row['measure'] == measure and row['method'] in names:
                values[measure, column, row['method']][row['item']] = float(row[column])
    costs = {method: row for (measure, _, method), row in results.rows.items() if measure == 'cost'}
    shown = [column for column in COLUMNS if any(values[(*column[:2], name)] for name in names)]
    titles = [title for _, _, title, _ in shown] + (['time', 'memory', 'the network afterwards'] if costs else [])
    print(f'| method | {" | ".join(titles)} |\n|---|{"---|" * len(titles)}')
    for name in names:
        cells = [cell(values[measure, column, name], digits) for measure, column, _, digits in shown]
        row = costs.get(name)
        if not any(cells) and row is None:
            continue
        if row is not None:
            left = ', '.join(row['changed'][:2])
            cells += [f'{row["time"]:.2f}', f'{row["memory"]:.2f}', f'changed: {left}' if left else 'as it was']
        elif costs:
            cells += [''] * 3
        print(f'| {name} | {" | ".join(cells)} |')
    shown = [column for column in shown if column[3] == 3 or 'abpc' in column[1]]
    if not shown:
        return
    print(f'\n{base} minus another method, on the images that both have:\n')
    print(f'| minus | {" | ".join(title for _, _, title, _ in shown)} |')
    print(f'|---|{"---|" * len(shown)}')
    for name in names:
        cells = [
            difference(values[measure, column, base], values[measure, column, name], digits)
            for measure, column, _, digits in shown
        ]
        if name != base and any(cells):
            print(f'| {name} | {" | ".join(cells)} |')


def cell(values, digits):
    '''A mean with its interval and the number of items; of conservation the median and the largest.'''
    values = sorted(value for value in values.values() if value == value)  # pylint: disable=comparison-with-itself
    if not values:
        return ''
    if digits is None:
        return f'{statistics.median(values):.0e}, at most {values[-1]:.0e} ({len(values)})'
    mean, low, high, *_ = bootstrap_interval(values)
    return f'{float(mean):.{digits}f} [{float(low):.{digits}f}, {float(high):.{digits}f}] ({len(values)})'


def difference(own, other, digits):
    '''The paired difference with its interval.'''
    common = sorted(own.keys() & other.keys())
    if len(common) < 3:
        return ''
    pair = {'own': [own[key] for key in common], 'other': [other[key] for key in common]}
    found, = compare(pair, baseline='other')
    return f'{found.difference:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]'
