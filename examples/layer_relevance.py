'''Relevance at the layers of a ResNet, from 7 x 7 to the pixels: sums, the most relevant channels, and a picture.'''
import sys
from pathlib import Path

from PIL import Image

from captum_adapters.attr import LayerRelevance, ResNetLRP
from zennit_resnet.image import draw_comparison, draw_overlay, read_image
from zennit_resnet.models import load_classifier

PHOTO = Path(__file__).parent / 'assets' / 'photos' / 'gc_cathedral.jpg'
LAYERS = ['layer4', 'layer3', 'layer2', 'layer1']


def main(photo=PHOTO, out='layer_relevance.png'):
    '''Explain the predicted class of a photograph.'''
    classifier = load_classifier()
    model, inputs = classifier.model, classifier.transform(read_image(photo))[None]
    target = classifier.model(inputs).argmax(1)
    maps = dict(zip(LAYERS, LayerRelevance(model, LAYERS, initial_relevance='one').attribute(inputs, target=target)))
    maps['pixels'] = ResNetLRP(model, initial_relevance='one').attribute(inputs, target=target)
    picture = classifier.photo(inputs[0])
    row = [picture]
    for name, relevance in maps.items():
        channels = relevance.sum((0, 2, 3)).topk(3)
        largest = ', '.join(f'{num}: {share:.3f}' for num, share in zip(channels.indices.tolist(), channels.values))
        print(f'{name:8} {tuple(relevance.shape[1:])!s:16} sum {relevance.sum():.5f}   largest channels {largest}')
        heatmap = LayerRelevance.interpolate(relevance.sum(1, keepdim=True), inputs.shape[2:], 'bilinear')
        row.append(draw_overlay(picture, heatmap[0, 0].numpy()))
    Image.fromarray(draw_comparison([row], [classifier.classes[int(target)], *maps])).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    main(*sys.argv[1:])
