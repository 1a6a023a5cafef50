'''A plot of a ledger.'''
import numpy as np

from .losses import CAUSES


def plot_ledger(ledger, example=0, tolerance=1e-4):
    '''Plot what each layer loses or gains by cause, and what is left, from the output to the input.'''
    # takes long to import, and is not needed for anything else
    from matplotlib.figure import Figure
    scale = float(ledger.scale[example]) or 1.
    rows = ledger.visible(example, tolerance * scale)
    positions = np.arange(len(rows))
    initial, final = float(ledger.initial[example]) / scale, float(ledger.final[example]) / scale
    lost = {key: np.array([row.lost_by[key] for row in rows]) / scale for key in CAUSES}
    left = initial - np.cumsum(sum(lost.values()))
    arrives = np.array([row.arrives for row in rows]) / scale

    figure = Figure(figsize=(min(max(7., .11 * len(rows)), 24.), 6.), layout='tight')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    upper.bar(positions, np.nan_to_num(arrives, posinf=0, neginf=0), color='#cccccc', label='arrives at the layer')
    upper.step(positions, left, where='mid', color='black', label='left in the network')
    upper.axhline(initial, color='black', linewidth=.8, linestyle=':', label='initial')
    upper.set_ylabel('relevance / initial')
    upper.set_title(f'from output to input, where {final:.6g} of the initial relevance arrives', fontsize='medium')
    upper.legend(loc='best', fontsize='small')
    total = np.nan_to_num(sum(map(np.abs, lost.values())), posinf=0, neginf=0)
    smallest = max(tolerance, .005 * total.max(initial=0))
    # losses above gains, each stacked by cause
    for sign in (1, -1):
        base = np.zeros(len(rows))
        for key, values in lost.items():
            part = np.nan_to_num(values.clip(0) if sign > 0 else values.clip(max=0), posinf=0, neginf=0)
            if np.abs(part).max(initial=0) > smallest:
                lower.bar(positions, part, bottom=base, color=CAUSES[key][1], label=key.replace('_', ' '))
            base += part
    lower.axhline(0, color='black', linewidth=.8)
    lower.set_ylabel('lost / initial')
    for axis, values in ((upper, np.append(arrives, left)), (lower, total)):
        if np.abs(values[np.isfinite(values)]).max(initial=0) > 100:
            axis.set_yscale('symlog', linthresh=1.)
    bottom, top = lower.get_ylim()
    reach = 2 * min(tolerance, 1.)
    lower.set_ylim(min(1.1 * bottom, -reach), max(1.1 * top, reach))
    # a cause may both take and give
    handles = dict(zip(*lower.get_legend_handles_labels()[::-1]))
    if handles:
        lower.legend(handles.values(), handles.keys(), loc='best', fontsize='small')
    # of many rows, only the first of each stage or block is labelled
    names = ['.'.join(row.name.split('.')[:2]) for row in rows]
    ticks = [num for num in range(len(rows)) if len(rows) <= 40 or num == 0 or names[num] != names[num - 1]]
    lower.set_xticks(ticks, [rows[num].label if len(rows) <= 40 else names[num] for num in ticks], rotation=90)
    lower.tick_params('x', labelsize=6)
    lower.set_xlim(-1, len(rows))
    return figure
