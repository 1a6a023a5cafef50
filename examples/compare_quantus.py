'''Insertion and deletion beside Quantus' pixel flipping, and beside the published code of the ratio rule's paper.

Quantus is not needed for anything else here: ``pip install quantus "numpy<2" "pandas<3"``, as its area under the curve
needs numpy 1. The definition of the published code (Otsuki et al. 2024) is written down below, one image at a time.
Prints the tables of docs/metrics.md, for which there were ten validation images of Imagenette. Times are
those of the processor, as they depend less on what else it does.

    python examples/compare_quantus.py image.jpg ...

Without arguments, ten of the photographs in examples/assets are used.
'''
import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from zennit.attribution import Gradient

from captum_adapters.metrics import insertion_deletion
from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.image import read_image
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import heat_quantization, sum_channels

PHOTOS = Path(__file__).parent / 'assets' / 'photos'
# Quantus counts channels of pixels, and wants a divisor of the number of pixels. This is one with which every third of
# its points is a whole number of pixels, as many as the same number is for us
STEP = 1792
# Images at a time, as Quantus takes all of a batch at once
CHUNK = 10


def pixel_flipping(model, input, heatmap, target):
    '''Quantus' scores of all points, where each removes as many channels of pixels, and its area.'''
    import quantus
    from quantus.helpers.utils import calculate_auc
    metric = quantus.PixelFlipping(
        features_in_step=STEP, perturb_baseline=0., normalise=False, disable_warnings=True, return_aggregate=False,
    )
    begin = time.process_time()
    curve = metric(
        model, input.numpy(), target.numpy(), heatmap[:, None].numpy(), channel_first=True, softmax=True, device='cpu',
        batch_size=len(input),
    )
    curve = np.array(curve)
    return curve, calculate_auc(curve, batched=True), time.process_time() - begin


def published(classifier, input, heatmap, target, step=500):
    '''Areas of insertion and deletion of one image, by the definition of the published code.

    The i-th mask has all pixels that are not below the value of rank ``min(step * (i + 1), N - 1)``, where ranks start
    at 0. Pixels become black before normalization. The area supposes equal distances.
    '''
    mean, std = classifier.mean, classifier.std
    pixels = input * std + mean
    ranked = np.sort(heatmap.numpy().ravel())[::-1]
    number = -(-len(ranked) // step)
    thresholds = [float(ranked[min(step * (num + 1), len(ranked) - 1)]) for num in range(number)]
    areas = []
    for inserted in (True, False):
        images = []
        for threshold in thresholds:
            mask = heatmap >= threshold if inserted else heatmap < threshold
            images.append((pixels * mask - mean) / std)
        scores = []
        for begin in range(0, number, CHUNK):
            with torch.no_grad():
                output = classifier.model(torch.stack(images[begin:begin + CHUNK]))
            scores.append(output.softmax(1)[:, target])
        scores = torch.cat(scores).double()
        areas.append(float((scores.sum() - scores[0] / 2 - scores[-1] / 2) / (number - 1)))
    return areas


def main():
    '''Print the tables.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='*', type=Path)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter('ignore')

    paths = args.images or sorted(PHOTOS.glob('*.jpg'))[:10]
    classifier = load_classifier()
    model, black = classifier.model, classifier.bounds()[0]
    input = torch.stack([classifier.transform(read_image(path)) for path in paths])
    with torch.no_grad():
        target = model(input).argmax(1)
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        heatmap = sum_channels(attributor(input.clone(), initial_relevance(target, 'softmax'))[1].detach())
    maps = {'ratio': heatmap, 'ratio, 8 levels': heat_quantization(heatmap)}

    flipped, areas, seconds = pixel_flipping(model, input, heatmap, target)
    timing = [('Quantus PixelFlipping, deletion', flipped.size, seconds)]
    begin = time.process_time()
    ours = insertion_deletion(model, input, heatmap, 0, target, step=STEP, max_examples_per_batch=CHUNK)
    number = len(input) * (2 * ours.fractions.shape[1] - 3) + 1
    timing.append(('insertion_deletion, both curves', number, time.process_time() - begin))
    same = np.abs(flipped[:, 2::3] - ours.deletion_curve[:, 1:].numpy()).max(1)

    print('| image | deletion, ours | Quantus, as returned | Quantus / intervals | largest difference of the curves |')
    print('|---|---|---|---|---|')
    for num, path in enumerate(paths):
        print(
            f'| {path.stem} | {ours.deletion[num]:.4f} | {areas[num]:.2f} | {areas[num] / (flipped.shape[1] - 1):.4f} '
            f'| {same[num]:.0e} |'
        )

    print('\n| image | map | ID, default | ID, `keio` | ID, reference | largest difference of the areas |')
    print('|---|---|---|---|---|---|')
    lines, totals = [], {'reference': [0, 0.], 'keio': [0, 0.]}
    for name, values in maps.items():
        default = insertion_deletion(
            model, input, values, black, target, n_steps=25, max_examples_per_batch=CHUNK
        )
        begin = time.process_time()
        result = insertion_deletion(
            model, input, values, black, target, protocol='keio', max_examples_per_batch=CHUNK
        )
        totals['keio'][1] += time.process_time() - begin
        for num, path in enumerate(paths):
            begin = time.process_time()
            insertion, deletion = published(classifier, input[num], values[num], target[num])
            totals['reference'][1] += time.process_time() - begin
            error = max(abs(result.insertion[num] - insertion), abs(result.deletion[num] - deletion))
            lines.append(
                f'| {path.stem} | {name} | {default.id_score[num]:+.4f} | {result.id_score[num]:+.4f} '
                f'| {insertion - deletion:+.4f} | {error:.0e} |'
            )
            points = 2 * result.fractions.shape[1]
            totals['reference'][0] += points
            distinct = len(result.selected[num].unique())
            # the whole image comes once, and the blank one once for all
            totals['keio'][0] += 2 * distinct - 1
        totals['keio'][0] += 1
    print('\n'.join(lines))

    print('\n| what | images evaluated | CPU seconds | milliseconds per image |')
    print('|---|---|---|---|')
    timing += [('published definition, both curves, two maps', *totals['reference'])]
    timing += [("`protocol='keio'`, both curves, two maps", *totals['keio'])]
    for name, number, seconds in timing:
        print(f'| {name} | {number} | {seconds:.1f} | {1e3 * seconds / number:.1f} |')


if __name__ == '__main__':
    main()
