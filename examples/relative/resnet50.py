'''Both readings of Card(J), and the range of the classic rules, on a ResNet-50.

Eq. (7) of R-LRP multiplies with the number Card(J) of neurons that an input is connected to. Counted for each position,
it depends on the position's parity under strides. As a constant, it does not matter. A figure shows both.

Section 5.2 of R-LRP reports that LRP-epsilon overflows on ResNet-50. A table shows how large relevance becomes,
depending on what the paper leaves open: the bias in the denominator, and what additions do. A figure shows heatmaps.
'''
from pathlib import Path

import numpy as np
import torch
from common import attribute, device, load_network, predict, run, save_picture, write_table
from tqdm import tqdm
from zennit.attribution import Gradient

from captum_adapters.metrics import top_fraction
from zennit_resnet import initial_relevance
from zennit_resnet.classic import SETTINGS, ClassicLRP
from zennit_resnet.image import draw_comparison, draw_heatmap, read_image

PHOTOS = Path(__file__).resolve().parents[1] / 'assets' / 'photos'
READINGS = {'constant': 'relative_lrp', 'per position': 'relative_lrp_per_position'}
CHOICES = [(with_bias, addition) for addition in ('rule', 'ratio', 'duplicate') for with_bias in (False, True)]
SHOWN = [choice for choice in CHOICES if choice[1] == 'rule' or not choice[0]]
DRAWN = ('lrp_0', 'lrp_epsilon_0.01', 'lrp_epsilon_1', 'lrp_gamma_0.25', 'lrp_alpha_beta_0.5_0.5')


def main(parser):
    '''Write a table and draw figures.'''
    stems = ('gc_monument3', 'gc_dog')
    parser.add_argument('images', nargs='*', type=Path, default=[PHOTOS / f'{stem}.jpg' for stem in stems])
    parser.add_argument('--network', default='embedded', metavar='NAME=WEIGHTS', help='as for curves.py (embedded)')
    parser.add_argument('--size', type=int, help='side of the images for local weights (224)')
    parser.add_argument('--out', type=Path, default=Path('resnet50'), help='folder for table and figures (%(default)s)')
    parser.add_argument('--quick', action='store_true', help='a few rules only, to see whether it works')
    args = parser.parse_args()
    name, classifier = load_network(args.network, args.size)
    images = torch.stack([classifier.transform(read_image(path)) for path in args.images])
    targets = predict(classifier.model, images)
    photos = [classifier.photo(image) for image in images]
    draw_readings(args.out / 'cardinality.png', classifier.model, images, targets, photos)

    rows, maps = [], {}
    rules = DRAWN[:2] if args.quick else tuple(SETTINGS)
    for rule, (with_bias, addition) in tqdm([(rule, choice) for rule in rules for choice in CHOICES], leave=False):
        settings = {**SETTINGS[rule], 'with_bias': with_bias, 'addition': addition}
        relevance, _ = propagate(classifier.model, images, targets, settings)
        exact, logit = propagate(classifier.model.double(), images.double(), targets, settings)
        classifier.model.float()
        rows.append({
            'rule': rule, 'addition': addition, 'bias': 'yes' if with_bias else 'no',
            'largest / logit': float((exact.abs().flatten(1).amax(1) / logit.abs()).median()),
            'sum / logit': float((exact.sum((1, 2, 3)) / logit).median()),
            'NaN or infinity': f'{int((~relevance.isfinite()).flatten(1).any(1).sum())} of {len(images)}',
            'rank correlation': rank_correlation(relevance, exact),
        })
        maps[rule, with_bias, addition] = relevance[0]
    write_table(args.out / 'range', f'Range of the classic rules on {name}', rows, [
        f'Medians (of an even number, the lower one) over {len(images)} photographs. Magnitudes are those of a '
        'computation in double precision. Maps with NaN or infinity are those of single precision. The correlation is '
        'that between the ranks of pixels in both.',
    ])
    draw_range(args.out / 'range.png', photos[0], maps, [rule for rule in DRAWN if rule in rules])


def draw_range(path, photo, maps, rules):
    '''Heatmaps of half the size for a photograph, in a row for each rule. What is not finite is black.'''
    tiles = []
    for rule in rules:
        tiles.append([photo[::2, ::2]])
        for choice in SHOWN:
            # sums may be beyond single precision
            heatmap = maps[(rule, *choice)].double().sum(0, keepdim=True).nan_to_num(0., 0., 0.)
            tiles[-1].append(draw_heatmap(torch.nn.functional.avg_pool2d(heatmap, 2)[0].numpy()))
    titles = ['photo', *(f'{addition}{", bias" if with_bias else ""}' for with_bias, addition in SHOWN)]
    save_picture(path, draw_comparison(tiles, titles, rules))


def draw_readings(path, model, images, targets, photos):
    '''Heatmaps of magnitudes, a section of them, and the most relevant 10 % of pixels, for both readings of Card(J).'''
    maps = {
        title: attribute(model, images, targets, method)[0].sum(1).abs() for title, method in READINGS.items()
    }
    rows = []
    for num, photo in enumerate(photos):
        row = [photo]
        for values in maps.values():
            heatmap = draw_heatmap(values[num].numpy(), percentile=99)
            row.append(heatmap)
            # the section of 56 x 56 pixels in which there is most, so that single pixels can be seen
            if not row[1:-1]:
                windows = torch.nn.functional.avg_pool2d(values[num][None], 56, 28)[0]
                top, left = (28 * int(elem) for elem in divmod(int(windows.argmax()), windows.shape[1]))
            row.append(heatmap[top:top + 56, left:left + 56].repeat(4, 0).repeat(4, 1))
            chosen = top_fraction(values[num:num + 1], 10)[0, ..., None].numpy()
            row.append(np.where(chosen, photo, np.uint8(0)))
        rows.append(row)
    titles = ['photo', *(text for title in maps for text in (title, 'section', 'top 10 %'))]
    save_picture(path, draw_comparison(rows, titles))
    cosine = torch.nn.functional.cosine_similarity(*(values.flatten(1) for values in maps.values()))
    overlap = [
        float((top_fraction(left[None], 10) & top_fraction(right[None], 10)).sum() / (left.numel() // 10))
        for left, right in zip(*maps.values())
    ]
    print('constant and per position: cosine', [round(float(elem), 3) for elem in cosine],
          'common pixels among the top 10 %', [round(elem, 3) for elem in overlap])


def propagate(model, images, targets, settings):
    '''Relevance of the shape of the images, with NaN and infinity, and the logit of each target.'''
    images = images.to(device(), copy=True)
    with Gradient(model=model, composite=ClassicLRP(**settings)) as attributor:
        output, relevance = attributor(images, initial_relevance(targets))
    return relevance.detach().cpu(), output.detach().cpu().gather(1, targets[:, None])[:, 0]


def rank_correlation(left, right):
    '''Median of the correlations of ranks of pixels, 0 where there is NaN or infinity.'''
    ranks = [
        values.double().sum(1).flatten(1).argsort(1).argsort(1).double() for values in (left, right)
    ]
    centered = [elem - elem.mean(1, keepdim=True) for elem in ranks]
    correlation = torch.nn.functional.cosine_similarity(*centered)
    return float((correlation * left.isfinite().flatten(1).all(1)).median())


if __name__ == '__main__':
    run(main, __doc__)
