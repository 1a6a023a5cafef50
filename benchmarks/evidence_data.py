'''Networks and labelled images of ``evidence.py``: photographs in a folder, or an array of CIFAR-10.'''
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ('examples/relative', 'tests')]

# pylint: disable=wrong-import-position
from common import load_network  # noqa: E402
from helpers.networks import CifarResNet  # noqa: E402

from captum_adapters.evaluation.data import Images, read_samples  # noqa: E402
from zennit_resnet.models import IMAGENET_MEAN, IMAGENET_STD, Classifier, load_classifier  # noqa: E402

CIFAR = {'cifar_resnet20': 3, 'cifar_resnet56': 9}
CIFAR_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


class Photo(NamedTuple):
    '''A labelled image, ready for the network.'''
    name: str
    label: int
    image: torch.Tensor


def find_network(model, weights):
    '''A classifier: of CIFAR-10 with a state dict, ``efficientnet_lite0``, or what torchvision has.'''
    if model not in CIFAR:
        return load_network(model)[1] if model == 'efficientnet_lite0' else load_classifier(model, weights)
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


def read_photos(path, classifier):
    '''All labelled images: of a folder or CSV file, or arrays ``x`` and ``y`` of a file of NumPy.'''
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
