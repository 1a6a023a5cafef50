'''The gallery of the documentation: heatmaps of several methods, for several networks, on the embedded photographs.

    python examples/gallery.py --out docs/images
    python examples/gallery.py --network resnet101=DEFAULT --network regnet_y_400mf=DEFAULT

Networks are ``embedded``, ``efficientnet_lite0``, and torchvision's with their weights.
'''
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from captum_adapters.evaluation import Method
from captum_adapters.evaluation.methods import Context
from zennit_resnet.image import draw_comparison, draw_heatmap, read_image

sys.path.insert(0, str(Path(__file__).parent / 'relative'))
from common import load_network  # noqa: E402

PHOTOS = Path(__file__).parent / 'assets' / 'photos'
# of what each network has classes for
CHOICE = {'resnet50': ('gc_cathedral', 'gc_dog', 'gc_fish9', 'gc_reimsCathedral')}
ANIMALS = ('alibi_tabby_cat', 'gc_dog', 'gc_lemur', 'gc_scarlet_macaw')
METHODS = (
    'resnet_lrp_ratio', 'resnet_lrp_symmetric', 'epsilon_plus_flat+ratio', 'relative_lrp', 'block_lrp:initial=logit',
    'resnet_lrp_ratio+c3', 'epsilon_plus+zennit', 'grad_cam', 'input_x_gradient',
)


def draw(name, classifier, side):
    '''Draw the photographs of a network, with a column for each method.'''
    rows, captions = [], []
    context = Context(classifier)
    explainers = [Method(text).create(context) for text in METHODS]
    for photo in tqdm(CHOICE.get(name, ANIMALS), name, leave=False):
        image = classifier.transform(read_image(PHOTOS / f'{photo}.jpg'))[None]
        with torch.no_grad():
            output = classifier.model(image)
        target = output.argmax(1)
        row = [classifier.photo(image[0])]
        for explainer in explainers:
            heatmap = explainer(image, target, output, [photo])[0]
            row.append(draw_heatmap(heatmap.numpy()))
        rows.append([np.asarray(Image.fromarray(picture).resize((side, side))) for picture in row])
        captions.append(f'{classifier.classes[int(target)]}: {output.softmax(1).max():.0%}')
    # long names in two lines would not fit
    titles = ['photo', *(text.replace(':initial=logit', '') for text in METHODS)]
    return Image.fromarray(draw_comparison(rows, titles, captions))


def main():
    '''Draw a picture for each network.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', action='append', metavar='NAME=WEIGHTS', help='may be repeated (embedded)')
    parser.add_argument('--out', type=Path, default=Path('gallery'), help='folder for the pictures (%(default)s)')
    parser.add_argument('--side', type=int, default=180, help='side of a picture (%(default)s)')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for text in args.network or ['embedded']:
        try:
            name, classifier = load_network(text)
        except ValueError as error:
            parser.error(str(error))
        path = args.out / f'gallery_{name}.jpg'
        draw(name, classifier, args.side).save(path, quality=88, optimize=True)
        print(f'written {path}')


if __name__ == '__main__':
    main()
