'''Train an attention branch network (Fukui et al. 2019) from a trained residual network, in minutes.

The feature extractor, up to the third stage, stays as it is, including the statistics of its batch normalization. So
its features are computed once, for each image and its mirror image, and kept in memory in half precision. On these,
the attention branch, the last stage and the last layer are trained, with the sum of both branches' cross-entropies.

Images are in one of the layouts of the evaluator (docs/evaluation.md): a folder of folders, one for each class, or a
CSV file (or a folder with labels.csv or manifest.csv) with the columns file or image, relative to the CSV file, and
label or class_index. Folders which are not named as the network's classes are these classes in alphabetical order.
'''
import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from captum_adapters.attr.abn import AttentionBranchNetwork, save_abn
from captum_adapters.evaluation.data import read_samples
from zennit_resnet.image import read_image
from zennit_resnet.models import SUFFIXES, load_classifier


def main():
    '''Train, report accuracy, and write weights.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='images for training')
    parser.add_argument('--validation', type=Path, help='images for validation (a tenth of those for training)')
    parser.add_argument('--model', help='residual network of torchvision (the one that comes with the examples)')
    parser.add_argument('--weights', help='its weights: a name in torchvision, or a state dict')
    parser.add_argument('--size', type=int, help='side of the images for local weights (224)')
    parser.add_argument('--epochs', type=int, default=10, help='(%(default)s)')
    parser.add_argument('--batch-size', type=int, default=32, help='(%(default)s)')
    parser.add_argument('--rate', type=float, default=1e-4, help='learning rate of trained layers (%(default)s)')
    parser.add_argument('--new-rate', type=float, default=3e-3, help='learning rate of new layers (%(default)s)')
    parser.add_argument('--keep', action='store_true', help='do not change the last stage and the last layer either')
    parser.add_argument('--amp', action='store_true', help='train in bfloat16, where that is faster')
    parser.add_argument('--seed', type=int, default=0, help='seed of everything random (%(default)s)')
    parser.add_argument('--limit', type=int, help='largest number of images for training, and for validation')
    parser.add_argument('--quick', action='store_true', help='one epoch on 64 images, to see whether it works')
    parser.add_argument('--out', type=Path, default=Path('abn.safetensors'), help='weights to write (%(default)s)')
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.limit = 1, min(args.limit or 64, 64)
    try:
        train(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def train(args):
    '''Train with the command line's arguments.'''
    for name in ('epochs', 'batch_size', 'limit'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")} must be positive')
    # found out before training, not after it
    if args.out.suffix.lower() not in SUFFIXES or not args.out.parent.is_dir():
        raise ValueError(f'--out {args.out} must end in one of {", ".join(SUFFIXES)}, and be in a folder that exists')
    torch.manual_seed(args.seed)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    classifier = load_classifier(args.model, args.weights, args.size)
    network = AttentionBranchNetwork(classifier.model.eval())
    network.to(device, memory_format=torch.channels_last)
    training, validation = read_sets(args, classifier)
    labels, labels_valid = (torch.tensor([label for _, label in items]) for items in (training, validation))

    features_valid = compute_features(network, classifier, validation, [False], 'validation')[0]
    classifier.model.to(device)
    before, = accuracy(lambda batch: [classify(classifier.model, batch)], features_valid, labels_valid, device)
    features = compute_features(network, classifier, training, [False, True], 'training')
    fit(network, features, labels, device, args)
    attention, perception = accuracy(
        lambda batch: network.classify_features(batch)[:2], features_valid, labels_valid, device
    )
    print(f'accuracy on {len(validation)} images: classifier {before:.3f}, perception branch {perception:.3f}, '
          f'attention branch {attention:.3f}')
    save_abn(network, args.out, classifier.classes)
    print(f'written {args.out}')


def fit(network, features, labels, device, args):
    '''Train on features of shape (2, n, channels, height, width), of images and mirror images.'''
    network.eval().requires_grad_(False)
    for module in (network.attention_branch, *(() if args.keep else (network.layer4, network.fc))):
        module.train().requires_grad_()
    # what the classifier brings along, and what is new
    groups = [], []
    for name, param in network.named_parameters():
        if param.requires_grad:
            groups[name.startswith('attention_branch.') and '.stage.' not in name].append(param)
    optimizer = torch.optim.AdamW([{'params': params} for params in groups])
    n_batches = max(len(labels) // args.batch_size, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [args.rate, args.new_rate], args.epochs * n_batches, cycle_momentum=False
    )
    with tqdm(total=args.epochs * n_batches, desc='training') as progress:
        for epoch in range(args.epochs):
            losses, order = [], torch.randperm(len(labels))
            # each batch has the same size, since statistics of few images are noisy
            for chosen in order[:n_batches * args.batch_size].tensor_split(n_batches):
                mirrored = torch.randint(2, (len(chosen),))
                batch, target = to_device(features[mirrored, chosen], device), labels[chosen].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    attention_logits, logits, _ = network.classify_features(batch)
                loss = cross_entropy(attention_logits.float(), target) + cross_entropy(logits.float(), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.update()
                progress.set_postfix(epoch=epoch + 1, loss=f'{sum(losses) / len(losses):.3f}')
    network.eval().requires_grad_()


@torch.no_grad()
def compute_features(network, classifier, items, mirrored, name):
    '''Features of images in half precision, of shape (len(mirrored), n, channels, height, width).'''
    features = None
    parameter = next(network.parameters())
    with tqdm(total=len(items), desc=f'features for {name}') as progress:
        for begin in range(0, len(items), 16):
            chunk = items[begin:begin + 16]
            images = to_device(torch.stack([load(path, classifier) for path, _ in chunk]), parameter.device)
            for num, mirror in enumerate(mirrored):
                batch = network.extract_features(images.flip(-1) if mirror else images).half().cpu()
                if not bool(batch.isfinite().all()):
                    raise ValueError('features are too large for half precision, or not finite')
                if features is None:
                    shape = (len(mirrored), len(items), *batch.shape[1:])
                    progress.write(
                        f'features for {name}: {" x ".join(map(str, shape))} in half precision, '
                        f'{2 * torch.Size(shape).numel() / 1e6:.1f} MB of memory'
                    )
                    features = torch.empty(shape, dtype=torch.float16)
                features[num, begin:begin + len(chunk)] = batch
            progress.update(len(chunk))
    return features


@torch.no_grad()
def accuracy(function, features, labels, device):
    '''Accuracy of each of the class scores that a function returns for a batch of features.'''
    correct = [
        torch.stack([scores.argmax(1) == target.to(device) for scores in function(to_device(batch, device))])
        for batch, target in zip(features.split(32), labels.split(32))
    ]
    return torch.cat(correct, 1).double().mean(1).tolist()


def classify(model, features):
    '''The part of a residual network that follows on features of its third stage.'''
    return model.fc(model.avgpool(model.layer4(features)).flatten(1))


def to_device(batch, device):
    '''A batch in single precision and the order of memory in which convolutions are fastest.'''
    return batch.to(device, torch.float32, memory_format=torch.channels_last)


def load(path, classifier):
    '''Read and preprocess an image.'''
    try:
        return classifier.transform(read_image(path))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def read_sets(args, classifier):
    '''Paths and class indices of the images for training, and of those for validation.'''
    training = shuffle(read_items(args.data, classifier))
    if args.validation is None:
        count = len(training) // 10
        validation, training = training[:count], training[count:]
    else:
        validation = shuffle(read_items(args.validation, classifier))
    training, validation = training[:args.limit], validation[:args.limit]
    if not training or not validation:
        raise ValueError(f'{args.data} has too few images to leave out a tenth of them: give --validation')
    return training, validation


def shuffle(items):
    '''Items in random order, as they are sorted by class.'''
    return [items[num] for num in torch.randperm(len(items)).tolist()]


def read_items(path, classifier):
    '''Paths and class indices of the images of a folder or CSV file.'''
    found = read_samples(path, classifier.classes)
    for message in found.messages:
        print(message)
    for sample in found.samples:
        if sample.label is None or sample.problem:
            raise ValueError(f'{sample.path}: {sample.problem or "it has no label"}')
    return [(sample.path, sample.label) for sample in found.samples]


if __name__ == '__main__':
    main()
