'''What a stabilizer does to a residual block as one layer: the cosine of BlockLRP with Gradient x Input.'''
from pathlib import Path

import torch
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, initial_relevance
from zennit_resnet.image import read_image
from zennit_resnet.models import find_embedded, load_classifier

PHOTOS = Path(__file__).resolve().parent / 'assets' / 'photos'
NAMES = ('gc_dog', 'gc_cathedral', 'gc_fish9', 'skimage_chelsea')
EPSILONS = (0., 1e-6, 1e-4, 1e-3, 1e-2, .1, 1.)


def main():
    '''Print the lowest cosine of the photographs for each stabilizer.'''
    classifier = load_classifier(weights=find_embedded())
    model = classifier.model.double()
    images = torch.stack([classifier.transform(read_image(PHOTOS / f'{name}.jpg')) for name in NAMES]).double()
    with torch.no_grad():
        target = model(images).argmax(1)
    with Gradient(model=model) as attributor:
        # of the logit, which may be negative
        expected = images * attributor(images, initial_relevance(target, 'one'))[1]
    for epsilon in EPSILONS:
        with Gradient(model=model, composite=BlockLRP(epsilon)) as attributor:
            relevance = attributor(images, initial_relevance(target))[1]
        cosine = torch.cosine_similarity(relevance.flatten(1), expected.flatten(1)).amin()
        print(f'epsilon {epsilon:<8g} lowest cosine {cosine:.6f} (1 - {1 - cosine:.0e})')


if __name__ == '__main__':
    main()
