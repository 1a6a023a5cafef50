'''What the sums of a ledger must be.'''
from zennit_resnet.conservation.losses import CAUSES


def check_sums(ledger, tolerance=1e-9):
    '''All rows together lose what is lost between output and input, and causes are complete.'''
    scale = sum(row.arrives_magnitude for row in ledger) + ledger.scale
    assert bool(((sum(row.lost for row in ledger) - (ledger.initial - ledger.final)).abs() <= tolerance * scale).all())
    for row in (*ledger.rows, *ledger.blocks):
        assert tuple(row.lost_by) == tuple(CAUSES)
        assert bool(((sum(row.lost_by.values()) - row.lost).abs() <= tolerance * scale).all())
