'''Methods on a folder of photographs: insertion and deletion, controls, significance, and a page with all of it.

The same as ``python -m captum_adapters evaluate`` and ``report``. Started again, it goes on where it was interrupted.
'''
import sys
from pathlib import Path

from captum_adapters.evaluation import Evaluation, evaluate, read_run, summarize

PHOTOS = Path(__file__).parent / 'assets' / 'photos'


def main(folder=PHOTOS, out='evaluation', limit=8, size=None):
    '''Evaluate methods on some photographs.'''
    size = None if size is None else int(size)
    evaluation = Evaluation(
        data=str(folder),
        out=f'{out}/run',
        methods=('resnet_lrp_ratio', 'resnet_lrp_ratio+quantize8', 'grad_cam', 'epsilon_plus+zennit'),
        # a point of the curves for each 2,000 of the 224 x 224 pixels
        step=2000 if size is None else size ** 2 // 25,
        limit=int(limit),
        size=size,
    )
    evaluate(evaluation)
    report = summarize([read_run(Path(out, 'run'))])
    print(report.text())
    for path in report.write(Path(out)):
        print(f'written {path}')


if __name__ == '__main__':
    main(*sys.argv[1:])
