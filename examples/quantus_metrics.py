'''Quantus on the embedded ResNet-50: two of its metrics, for methods of this package and of Captum.

Faithfulness correlation (higher is better) blackens random pixels, and correlates the drop of the predicted class with
the sum of their relevance. Random logit (lower is better) is the structural similarity with the explanation of another
class. Means and standard errors over photographs are printed.

Needs Quantus: pip install "zennit-resnet[quantus,examples]"
'''
import argparse
from pathlib import Path

import numpy as np
import torch

from captum_adapters.quantus import explainer
from zennit_resnet.image import read_image
from zennit_resnet.models import load_classifier

# the other class of random logit mostly has a negative logit, from which relevance would be negative
METHODS = {
    'ResNetLRP': explainer('ResNetLRP', initial_relevance='one'),
    'ResNetLRP, symmetric': explainer('ResNetLRP', splitting='symmetric', initial_relevance='one'),
    'RelativeLRP': explainer('RelativeLRP', initial_relevance='one'),
    'InputXGradient': explainer('InputXGradient'),
    'IntegratedGradients': explainer('IntegratedGradients', batch_size=1, attribute_kwargs={'n_steps': 16}),
}
PHOTOS = ('gc_cathedral', 'gc_reimsCathedral', 'gc_monument3', 'gc_arcDeTriomphe')


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = Path(__file__).parent / 'assets' / 'photos'
    parser.add_argument('images', nargs='*', type=Path, default=[assets / f'{name}.jpg' for name in PHOTOS])
    parser.add_argument('--methods', nargs='*', choices=METHODS, default=[*METHODS])
    parser.add_argument('--runs', type=int, default=30, help='random sets of pixels per photograph')
    parser.add_argument('--pixels', type=int, default=5000, help='pixels in a set')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    try:
        import quantus
    except ImportError:
        parser.error('Quantus is not installed: pip install "zennit-resnet[quantus]"')

    classifier = load_classifier()
    model = classifier.model.to(args.device)
    images = torch.stack([classifier.transform(read_image(path)) for path in args.images])
    with torch.no_grad():
        targets = model(images.to(args.device)).argmax(1).cpu().numpy()
    for path, target in zip(args.images, targets):
        print(f'{path.name}: {classifier.classes[target]}')

    settings = {'disable_warnings': True, 'display_progressbar': False}
    metrics = {
        'faithfulness': quantus.FaithfulnessCorrelation(
            nr_runs=args.runs, subset_size=args.pixels, return_aggregate=False, **settings
        ),
        'random logit': quantus.RandomLogit(num_classes=len(classifier.classes), **settings),
    }
    print(f'{"":24}' + ''.join(f'{name:>18}' for name in metrics))
    for name in args.methods:
        cells = []
        for metric in metrics.values():
            # the same sets of pixels for each method
            np.random.seed(0)
            scores = np.array(metric(
                model=model, x_batch=images.numpy(), y_batch=targets, explain_func=METHODS[name], device=args.device
            ), dtype=float)
            error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.
            cells.append(f'{scores.mean():9.3f} ± {error:.3f}')
        print(f'{name:24}' + ''.join(f'{cell:>18}' for cell in cells), flush=True)


if __name__ == '__main__':
    main()
