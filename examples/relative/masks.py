'''Whether the most relevant pixels are on the object, section 6 of R-LRP.

It measures how many of the most relevant pixels are inside of the object's mask, and how far they are from it on
average, beside what is expected by chance, and the best that is possible. Images whose mask covers less than 1 % or
more than 99 % are left out, as in the paper. The predicted class is explained, or with --target label the one that
the label names.

    python examples/relative/masks.py pairs.csv --network vgg16=DEFAULT
    python examples/relative/masks.py ../shared/data/imagenette --boxes ../shared/data/imagenette/boxes.csv
'''
import csv
from pathlib import Path

import numpy as np
import torch
from common import (
    DEFAULT,
    PERCENTS,
    SHARED,
    add_options,
    attribute,
    check_methods,
    curve_rows,
    draw_curves,
    draw_selections,
    load_images,
    load_network,
    predict,
    read_set,
    run,
    write_table,
)
from PIL import Image

from captum_adapters.metrics import mask_distance, mask_pointing
from zennit_resnet.image import read_image

SHOWN = ('lrp_alpha_beta_0.5_0.5', 'relative_lrp')


def read_boxes(path):
    '''Boxes (x0, y0, x1, y1) in pixels by the name of the image.'''
    boxes = {}
    with open(path, encoding='utf-8', newline='') as file:
        for row in csv.DictReader(file):
            boxes.setdefault(row['file'], []).append([float(row[key]) for key in ('x0', 'y0', 'x1', 'y1')])
    return boxes


def load_mask(item, boxes, classifier):
    '''The mask of an image, bool of shape (height, width), resized and cropped as the network's input.'''
    if boxes is None:
        picture = np.asarray(Image.open(item.mask).convert('L')) > 127
    else:
        width, height = read_image(item.image).size
        picture = np.zeros((height, width), dtype=bool)
        for x0, y0, x1, y1 in boxes[item.image.name]:
            picture[round(y0):round(y1), round(x0):round(x1)] = True
    picture = Image.fromarray(picture.astype(np.uint8) * 255).convert('RGB')
    return torch.from_numpy(classifier.photo(classifier.transform(picture))[..., 0] > 127)


def main(parser):
    '''Write tables and draw figures.'''
    parser.add_argument(
        'pairs', nargs='?', type=Path, default=SHARED / 'masks',
        help='CSV file with the columns image or file, mask (a grayscale image) and label, or a folder with it, named '
        'manifest.csv (default: the data set of masks beside the project)',
    )
    parser.add_argument('--boxes', type=Path, help='CSV file with boxes instead of masks: file, x0, y0, x1, y1')
    parser.add_argument('--network', default='embedded', metavar='NAME=WEIGHTS', help='as for curves.py (embedded)')
    parser.add_argument('--size', type=int, help='side of the images for local weights (224)')
    parser.add_argument(
        '--target', choices=['prediction', 'label'], default='prediction', help='the class to explain (%(default)s)'
    )
    add_options(parser, 'masks', DEFAULT, 200)
    args = parser.parse_args()
    check_methods(args.methods)
    if not args.pairs.exists():
        raise ValueError(f'there is no {args.pairs}: name a CSV file with pairs of images and masks')
    boxes = None if args.boxes is None else read_boxes(args.boxes)
    items = [
        item for item in read_set(args.pairs)
        if (item.mask is not None if boxes is None else item.image.name in boxes)
    ]
    name, classifier = load_network(args.network, args.size)
    if args.target == 'label':
        items = [item for item in items if find_label(item, classifier) is not None]
    if not items:
        raise ValueError(f'{args.pairs} has no images with a mask{" and a known label" * (args.target == "label")}')
    masks = [load_mask(item, boxes, classifier) for item in items]
    pairs = [
        (item, mask) for item, mask in zip(items, masks) if .01 <= float(mask.float().mean()) <= .99
    ][:min(args.limit, 4) if args.quick else args.limit]
    print(f'{len(pairs)} of {len(items)} images have a mask of 1 % to 99 %')
    if not pairs:
        raise ValueError('all masks are smaller than 1 % or larger than 99 % of the image')
    items, masks = [item for item, _ in pairs], torch.stack([mask for _, mask in pairs])
    images = load_images(items, classifier)
    if args.target == 'label':
        targets = torch.tensor([find_label(item, classifier) for item in items])
    else:
        targets = predict(classifier.model, images)

    shares, distances, shown = {}, {}, {}
    for method in args.methods:
        relevance, num_invalid = attribute(classifier.model, images, targets, method, args.batch_size, args.seed)
        if num_invalid:
            print(f'{method}: {num_invalid} of {len(images)} maps had NaN or overflowed')
        pointing, distance = mask_pointing(relevance, masks), mask_distance(relevance, masks)
        shares[method], distances[method] = pointing.share, distance.distance
        if method in SHOWN or len(args.methods) == 1:
            shown[method] = relevance[:3]
    shares['chance'] = pointing.chance[:, None].expand(-1, len(PERCENTS))
    shares['ceiling'] = pointing.ceiling
    distances['chance'] = distance.chance[:, None].expand(-1, len(PERCENTS))

    columns = {'network': name, 'images': len(images)}
    write_table(
        args.out / 'pointing', 'Share of the most relevant pixels inside of the mask', curve_rows(shares, **columns)
    )
    write_table(
        args.out / 'distance', 'Mean distance of the most relevant pixels to the mask, relative to the diagonal',
        curve_rows(distances, **columns), digits=4,
    )
    draw_curves(args.out / 'pointing.png', {name: shares}, 'share inside of the mask')
    draw_curves(args.out / 'distance.png', {name: distances}, 'distance / diagonal')
    if shown:
        white = [np.where(mask[..., None], np.uint8(255), np.uint8(0)).repeat(3, 2) for mask in masks[:3]]
        photos = [classifier.photo(image) for image in images[:3]]
        draw_selections(args.out / 'selections.png', photos, shown, True, extra=('mask', white))


def find_label(item, classifier):
    '''Index of the class that the label names, or None.'''
    try:
        return classifier.find_class(item.label.replace('_', ' '))
    except ValueError:
        return None


if __name__ == '__main__':
    run(main, __doc__)
