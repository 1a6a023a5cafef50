'''Two metrics of Quantus on photographs. Needs Quantus: pip install "zennit-resnet[quantus,examples]"'''
import sys
from pathlib import Path

import numpy as np
import quantus
import torch

from captum_adapters.quantus import explainer
from zennit_resnet.image import read_image
from zennit_resnet.models import load_classifier

FOLDER = Path(__file__).parent / 'assets' / 'photos'
PHOTOS = [FOLDER / f'gc_{name}.jpg' for name in ('cathedral', 'reimsCathedral', 'monument3', 'arcDeTriomphe')]
# the other class of random logit mostly has a negative logit, from which relevance would be negative
METHODS = {
    'ResNetLRP': explainer('ResNetLRP', initial_relevance='one'),
    'ResNetLRP, symmetric': explainer('ResNetLRP', splitting='symmetric', initial_relevance='one'),
    'RelativeLRP': explainer('RelativeLRP', initial_relevance='one'),
    'InputXGradient': explainer('InputXGradient'),
    'IntegratedGradients': explainer('IntegratedGradients', batch_size=1, attribute_kwargs={'n_steps': 16}),
}


def main(*photos, runs=30, pixels=5000):
    '''Print means and standard errors.'''
    classifier = load_classifier()
    images = torch.stack([classifier.transform(read_image(photo)) for photo in photos or PHOTOS])
    targets = classifier.model(images).argmax(1).numpy()
    settings = {'disable_warnings': True, 'display_progressbar': False}
    metrics = {
        'faithfulness correlation': quantus.FaithfulnessCorrelation(
            nr_runs=runs, subset_size=pixels, return_aggregate=False, **settings
        ),
        'random logit': quantus.RandomLogit(num_classes=len(classifier.classes), **settings),
    }
    batch = {'model': classifier.model, 'x_batch': images.numpy(), 'y_batch': targets, 'device': 'cpu'}
    for name, method in METHODS.items():
        for key, metric in metrics.items():
            np.random.seed(0)  # the same sets of pixels for each method
            scores = np.array(metric(explain_func=method, **batch), dtype=float)
            error = scores.std(ddof=1) / len(scores) ** 0.5
            print(f'{name:20} {key:24} {scores.mean():6.3f} ± {error:.3f}', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
