'''Splitting at skip connections in place of Zennit's ResNetCanonizer: three composites, their sums, and a picture.'''
import sys
from pathlib import Path

from PIL import Image
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat
from zennit.torchvision import ResNetCanonizer

from zennit_resnet import ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.image import draw_comparison, draw_heatmap, read_image
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import sum_channels

PHOTO = Path(__file__).parent / 'assets' / 'photos' / 'gc_cathedral.jpg'
COMPOSITES = {
    'EpsilonPlusFlat, Zennit': EpsilonPlusFlat(canonizers=[ResNetCanonizer()]),
    'EpsilonPlusFlat, by ratio': with_splitting(EpsilonPlusFlat()),
    'ResNetLRP': ResNetLRP(),
}


def main(photo=PHOTO, out='zennit_dropin.png'):
    '''Explain the predicted class of a photograph.'''
    classifier = load_classifier()
    image = classifier.transform(read_image(photo))[None]
    target = int(classifier.model(image).argmax())
    row = [classifier.photo(image[0])]
    for name, composite in COMPOSITES.items():
        with Gradient(model=classifier.model, composite=composite) as attributor:
            output, relevance = attributor(image, initial_relevance(target))
        print(f'{name:28} logit {output[0, target]:.4f}   sum of relevance {relevance.sum():.4f}')
        row.append(draw_heatmap(sum_channels(relevance)[0].numpy()))
    Image.fromarray(draw_comparison([row], [classifier.classes[target], *COMPOSITES])).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    main(*sys.argv[1:])
