'''Two checkpoints of a ResNet-50, explained on the same photographs: how much do they look at the same pixels?

    python examples/compare_checkpoints.py before.pt after.safetensors

Without a second one, it is the first with random weights in layer4, which a method's maps should notice. Without any,
the first is the embedded network.
'''
import copy
import sys
from pathlib import Path

import torch
from PIL import Image

from captum_adapters.attr import ResNetLRP
from zennit_resnet.image import draw_comparison, draw_heatmap, read_image
from zennit_resnet.models import load_classifier

PHOTOS = [Path(__file__).parent / 'assets' / 'photos' / f'gc_{name}.jpg' for name in ('cathedral', 'monument3')]


def main(first=None, second=None, photos=PHOTOS, out='compare_checkpoints.png'):
    '''Compare the explanations of what the first predicts.'''
    classifier = load_classifier(weights=first)
    other = load_classifier(weights=second).model if second else copy.deepcopy(classifier.model)
    for module in () if second else other.layer4.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    inputs = torch.stack([classifier.transform(read_image(photo)) for photo in photos])
    target = classifier.model(inputs).argmax(1)
    methods = [ResNetLRP(model, initial_relevance='one') for model in (classifier.model, other)]
    maps = [method.attribute(inputs, target=target).sum(1) for method in methods]
    ranks = torch.stack([heatmaps.flatten(1).argsort().argsort() for heatmaps in maps]).double()
    for photo, label, pair in zip(photos, target, ranks.movedim(1, 0)):
        print(f'{photo.stem:16} {classifier.classes[label]:16} rank correlation {torch.corrcoef(pair)[0, 1]:.3f}')
    rows = [[classifier.photo(elem), *(draw_heatmap(heatmap.numpy()) for heatmap in pair)]
            for elem, *pair in zip(inputs, *maps)]
    Image.fromarray(draw_comparison(rows, ['photo', 'first', 'second'])).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    main(*sys.argv[1:])
