'''One class name changed in a Captum workflow: attributions, their delta, and a picture.'''
import sys
from pathlib import Path

import torch
from captum.attr import InputXGradient
from PIL import Image

from captum_adapters.attr import C3LRP, RelativeLRP, ResNetLRP
from zennit_resnet.image import draw_comparison, draw_heatmap, read_image
from zennit_resnet.models import load_classifier

PHOTO = Path(__file__).parent / 'assets' / 'photos' / 'gc_cathedral.jpg'
METHODS = (InputXGradient, ResNetLRP, C3LRP, RelativeLRP)


def main(photo=PHOTO, out='captum_dropin.png'):
    '''Attribute the predicted class of a photograph to its pixels.'''
    classifier = load_classifier()
    inputs = classifier.transform(read_image(photo))[None].requires_grad_()
    output = classifier.model(inputs).detach()
    target = output.argmax(1)
    row = [classifier.photo(inputs[0].detach())]
    for method in METHODS:
        attributions = method(classifier.model).attribute(inputs, target=target).detach()
        delta = output[0, target] - attributions.sum()
        print(f'{method.__name__:16} logit {output[0, target].item():.4f}   delta {delta.item():.4f}')
        # only ratios within a map have a meaning for RelativeLRP
        heatmap = attributions.sum(1) / attributions.abs().max()
        row.append(draw_heatmap(torch.squeeze(heatmap, 0).numpy()))
    titles = [classifier.classes[int(target)], *(method.__name__ for method in METHODS)]
    Image.fromarray(draw_comparison([row], titles)).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    main(*sys.argv[1:])
