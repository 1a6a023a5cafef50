'''Networks and labelled images of ``evidence.py`` and ``peers.py``: a folder of photographs, CIFAR-10, or digits.'''
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from attention import digits, train
from torch import nn
from torchvision.models import VGG, VisionTransformer, resnet18
from torchvision.models.vgg import make_layers

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ('examples/relative', 'tests')]

# pylint: disable=wrong-import-position
from common import load_network  # noqa: E402
from helpers.networks import CifarResNet  # noqa: E402

from captum_adapters.evaluation.data import Images, read_samples  # noqa: E402
from zennit_resnet.models import IMAGENET_MEAN, IMAGENET_STD, Classifier, load_classifier  # noqa: E402

CIFAR = {'cifar_resnet20': 3, 'cifar_resnet56': 9}
CIFAR_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
DIGITS = {'digits_resnet18': 3, 'digits_vgg': 6, 'digits_vit': 20}  # epochs of training
SIDE = 56  # of images of digits, which are half as large


class Photo(NamedTuple):
    '''A labelled image, ready for the network.

    ``cell`` is what a cell of a mosaic shows, if not the whole image.
    '''
    name: str
    label: int
    image: torch.Tensor
    cell: Optional[torch.Tensor] = None


def find_network(model, weights):
    '''A classifier: of CIFAR-10 with a state dict, of digits, ``efficientnet_lite0``, or what torchvision has.'''
    if model == 'efficientnet_lite0':
        return load_network(model)[1]
    if model in DIGITS:
        return _digits_network(model, Path(weights or f'{model}.pt'))
    if model not in CIFAR:
        return load_classifier(model, weights)
    if weights is None:
        raise ValueError(f'--model {model} needs --weights, a file')
    state = torch.load(weights, map_location='cpu', weights_only=True)
    state = {key.removeprefix('module.'): value for key, value in state.get('state_dict', state).items()}
    network = CifarResNet(CIFAR[model])
    result = network.load_state_dict(state, strict=False)
    # which old checkpoints do not have
    missing = [key for key in result.missing_keys if not key.endswith('num_batches_tracked')]
    if missing or result.unexpected_keys:
        raise ValueError(f'{weights} does not fit {model}: {(missing + result.unexpected_keys)[0]}')
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Classifier(network.eval(), CIFAR_CLASSES, _normalize, mean, std)


def _normalize(photo):
    '''From an array or image of PIL to the input of a network of CIFAR-10.'''
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(np.array(photo)).movedim(-1, 0) / 255 - mean) / std


def _digits_network(model, path):
    '''A ResNet-18, a network of the kind of VGG, or a transformer, for digits anywhere in an image; trained once.'''
    torch.manual_seed(0)
    if model == 'digits_vit':
        network = VisionTransformer(SIDE, 7, 4, 4, 64, 128, num_classes=10)
        network.conv_proj = nn.Conv2d(1, 64, 7, 7)
        nn.init.normal_(network.heads.head.weight, std=.02)
    elif model == 'digits_resnet18':
        network = resnet18(num_classes=10)
        # of one channel, and with a last map of 4 x 4 positions
        network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    else:
        network = VGG(make_layers([16, 16, 'M', 32, 32, 'M', 64, 64, 'M', 64, 64, 'M'], batch_norm=True), 10)
        network.features[0] = nn.Conv2d(1, 16, 3, padding=1)
        network.avgpool = nn.AdaptiveAvgPool2d(3)
        network.classifier = nn.Sequential(nn.Linear(64 * 9, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        images, classes = digits()
        places = torch.randint(0, SIDE // 2 + 1, (2, 4000, 2)).tolist()
        canvases = torch.stack([_place(image, place) for row in places for image, place in zip(images, row)])
        train(network, canvases, classes[:4000].repeat(2), DIGITS[model])
        torch.save(network.state_dict(), path)
    # of pixels between black and white
    low, high = (value.view(1, 1, 1) for value in digits()[0].aminmax())
    return Classifier(network.eval(), [*map(str, range(10))], None, -low / (high - low), 1 / (high - low))


def _place(digit, place):
    '''A digit on a black image of twice its size.'''
    top, left = place
    rest = SIDE - digit.shape[-1]
    return F.pad(digit, (left, rest - left, top, rest - top), value=float(digit.min()))


def read_photos(path, classifier):
    '''All labelled images: of a folder or CSV file, arrays ``x`` and ``y`` of NumPy, ``digits`` or ``digits_train``.'''
    if path in ('digits', 'digits_train'):
        part = slice(4000) if path == 'digits_train' else slice(4000, None)
        images, classes = (elem[part] for elem in digits())
        return [
            Photo(f'{num:05}', int(label), _place(image, (SIDE // 4, SIDE // 4)), image)
            for num, (image, label) in enumerate(zip(images, classes))
        ]
    if Path(path).suffix == '.npz':
        arrays = np.load(path)
        return [
            Photo(f'{num:05}', int(label), _normalize(values))
            for num, (values, label) in enumerate(zip(arrays['x'], arrays['y']))
        ]
    samples = read_samples(path, classifier.classes).samples
    samples = [sample for sample in samples if sample.problem is None and sample.label is not None]
    images = Images(samples, classifier.transform)
    return [Photo(sample.name, sample.label, images[num].image) for num, sample in enumerate(samples)]
