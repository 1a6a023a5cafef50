'''Accuracy with only the most relevant pixels or inputs, section 5 of R-LRP, and across networks, section 5.3.

For each network, the most relevant pixels of each image are kept, all others replaced, and the class that is predicted
is compared with that of the whole image. With several networks, each is also given the pixels that are most relevant to
the others.

    python examples/relative/curves.py
    python examples/relative/curves.py photos/ --network vgg16=DEFAULT --network vgg19=DEFAULT

With DEFAULT, torchvision downloads its weights. The network named embedded (the default) is a ResNet-50 that comes with
the project, trained on the ten classes of Imagenette.
'''
from pathlib import Path

import torch
from common import (
    DEFAULT,
    add_options,
    attribute,
    check_methods,
    curve_rows,
    default_images,
    device,
    draw_curves,
    draw_selections,
    load_images,
    load_network,
    predict,
    read_set,
    restrict,
    run,
    write_table,
)
from tqdm import tqdm

from captum_adapters.evaluation.metrics import adapt
from captum_adapters.metrics import cross_model_accuracy, pixel_accuracy

VARIANTS = {
    f'{unit}-{kind}': {'unit': unit, 'absolute': kind == 'absolute'}
    for unit in ('pixel', 'input') for kind in ('absolute', 'signed')
}
SHOWN = ('lrp_gamma_0.25', 'lrp_alpha_beta_0.5_0.5', 'lrp_alpha_beta_2_-1', 'relative_lrp')


def main(parser):
    '''Write tables and draw figures.'''
    parser.add_argument(
        'images', nargs='?', type=Path, default=default_images(),
        help='folder of images, or CSV file with the column file or image (default: Imagenette beside the project if '
        'it is there, or the embedded photographs)',
    )
    parser.add_argument(
        '--network', action='append', metavar='NAME=WEIGHTS',
        help='embedded, a model of torchvision with =DEFAULT or =path of a state dict, or efficientnet_lite0; may be '
        'repeated (default: embedded)',
    )
    add_options(parser, 'curves', DEFAULT, 100)
    parser.add_argument('--size', type=int, help='side of the images for local weights (224)')
    parser.add_argument(
        '--variants', type=lambda text: text.split(','), default=['pixel-absolute'], metavar='NAMES',
        help=f'what is ranked, separated by commas, among {", ".join(VARIANTS)} (pixel-absolute)',
    )
    parser.add_argument('--fill', choices=['black', 'mean'], default='black', help='what others are replaced with')
    parser.add_argument('--cross', default='relative_lrp', metavar='NAME', help='method across networks (relative_lrp)')
    parser.add_argument('--show', type=int, default=3, help='number of images in the figure (%(default)s)')
    args = parser.parse_args()
    check_methods([*args.methods, args.cross])
    for name in args.variants:
        if name not in VARIANTS:
            raise ValueError(f'unknown variant {name!r}: choose among {", ".join(VARIANTS)}')
    items = read_set(args.images, min(args.limit, 4) if args.quick else args.limit, args.seed)

    networks = {}
    for text in args.network or ['embedded']:
        name, classifier = load_network(text, args.size)
        networks[name if name not in networks else text] = classifier
    fewest = min((classifier.classes for classifier in networks.values()), key=len)
    networks = {name: restrict(classifier, fewest) for name, classifier in networks.items()}

    panels, rows = {name: {} for name in args.variants}, {name: [] for name in args.variants}
    kept = {}
    for name, classifier in networks.items():
        images = load_images(items, classifier)
        targets = predict(classifier.model, images)
        results = {variant: {} for variant in args.variants}
        shown = {}
        for method in dict.fromkeys((*args.methods, args.cross)):
            if method not in args.methods and len(networks) == 1:
                continue
            relevance, num_invalid = attribute(
                classifier.model, images, targets, method, args.batch_size, args.seed
            )
            if num_invalid:
                print(f'{name}, {method}: {num_invalid} of {len(images)} maps had NaN or overflowed')
            if method == args.cross:
                kept[name] = images, relevance, targets
            if method in SHOWN or len(args.methods) == 1:
                shown[method] = relevance[:args.show]
            for variant in args.variants if method in args.methods else ():
                results[variant][method] = pixel_accuracy(
                    classifier.model, images.to(device()), relevance.to(device()), target=targets, **VARIANTS[variant],
                    baselines=black(classifier) if args.fill == 'black' else 0, max_examples_per_batch=32,
                    show_progress=True,
                ).correct.cpu()
        for variant in args.variants:
            panels[variant][name] = results[variant]
            rows[variant] += curve_rows(results[variant], network=name, images=len(images))
        order = [method for method in SHOWN if method in shown] or list(shown)
        if order and args.show > 0:
            draw_selections(
                args.out / f'selections_{name}.png', [classifier.photo(image) for image in images[:args.show]],
                {method: shown[method] for method in order}, True,
            )

    for variant in args.variants:
        title = f'Accuracy with only the most relevant {variant.split("-")[0]}s, {variant.split("-")[1]} contributions'
        write_table(args.out / f'accuracy_{variant}', title, rows[variant])
        draw_curves(
            args.out / f'accuracy_{variant}.png', panels[variant], f'accuracy, {variant.split("-")[1]} contributions',
            xlabel=f'most relevant {variant.split("-")[0]}s [%]',
        )
    if len(networks) > 1:
        cross(args, networks, kept)


def cross(args, networks, kept):
    '''Give each network the pixels that are relevant to another one.'''
    panels, rows, agreement = {}, [], []
    for seeing, classifier in networks.items():
        curves = {}
        for ranking, (images, relevance, targets) in kept.items():
            source = networks[ranking]
            transform = adapt(source, classifier)
            curves[f'pixels of {ranking}'] = cross_model_accuracy(
                classifier.model, images.to(device()), relevance.to(device()), reference='prediction',
                baselines=black(source) if args.fill == 'black' else 0, transform=transform, max_examples_per_batch=32,
                show_progress=True,
            ).correct.cpu()
            if seeing > ranking:
                with torch.no_grad():
                    predicted = torch.cat([
                        classifier.model(transform(batch.to(device()))).argmax(1).cpu()
                        for batch in tqdm(images.split(32), leave=False)
                    ])
                agreement.append({
                    'network': ranking, 'other network': seeing, 'images': len(images),
                    'same class': int((predicted == targets).sum()),
                })
        panels[f'{seeing} sees'] = curves
        rows += curve_rows(curves, network=seeing, images=len(images))
    title = f'Accuracy with only the pixels that are most relevant to another network, by {args.cross}'
    notes = [
        f'{row["network"]} and {row["other network"]} predict the same class for {row["same class"]} of '
        f'{row["images"]} whole images.' for row in agreement
    ]
    write_table(args.out / 'cross', title, rows, notes)
    draw_curves(args.out / 'cross.png', panels, 'accuracy')


def black(classifier):
    '''Black as the network sees it, of shape (1, 3, 1, 1).'''
    return classifier.bounds()[0].to(device())


if __name__ == '__main__':
    run(main, __doc__)
