'''Networks of benchmarks/networks.py: what is installed, with random weights. Nothing is downloaded.

Each package has a function that yields names with functions that build a network, and the shape of an input without the batch.
'''
# ruff: noqa: E501
import importlib
import os
import re

import torch
from torch import nn

os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', YOLO_OFFLINE='true', HF_DATASETS_OFFLINE='1')
IMAGE, SMALL, VOLUME, VIDEO = (3, 64, 64), (3, 32, 32), (1, 32, 32, 32), (3, 8, 64, 64)


def parameters(build):
    '''Number of parameters, infinite for what cannot be built without memory.'''
    try:
        with torch.device('meta'):
            return sum(param.numel() for param in build().parameters())
    except Exception:
        return float('inf')


def smallest(names, build, limit=15e6, key=lambda name: re.match(r'[a-z]+', name)[0]):
    '''The smallest network of each family of names, by its number of parameters.'''
    found = {}
    for name in names:
        size = parameters(lambda name=name: build(name))
        if size < found.get(key(name), (limit,))[0]:
            found[key(name)] = size, name
    return [name for _, name in found.values()]


def timm(choose=list):
    '''All networks of timm.'''
    import timm as package

    def build(name):
        return package.create_model(name, num_classes=7)

    def size(name):
        return package.models.get_pretrained_cfg(name).input_size[-1] if package.is_model_pretrained(name) else 224

    for name in choose(package.list_models()):
        yield name, lambda name=name: build(name), [IMAGE, (3, 96, 96), (3, size(name), size(name)), (3, 256, 256)]


def timm_families():
    '''The smallest network of each family of timm.'''
    builds = {name: build for name, build, _ in timm()}
    yield from timm(lambda names: smallest(names, lambda name: builds[name](), 8e6))


def torchvision():
    '''Classification, segmentation, video, and the logits of detectors.'''
    from torchvision import models, ops

    def build(name):
        return models.get_model(name, weights=None)

    names = [name for name in models.list_models(module=models) if name not in ('inception_v3',)]
    for name in smallest(names, build, 15e6, key=lambda name: name):
        yield name, lambda name=name: build(name), [IMAGE, (3, 96, 96), (3, 224, 224)]
    for name in models.list_models(module=models.segmentation):
        if 'resnet101' not in name:
            yield name, lambda name=name: models.get_model(name, weights=None, weights_backbone=None, num_classes=5), [IMAGE]
    for name in models.list_models(module=models.video):
        shape = [(3, 16, 224, 224)] if 'mvit' in name or name == 's3d' else [VIDEO, (3, 16, 112, 112)]
        yield name, lambda name=name: models.get_model(name, weights=None), shape

    class Dense(nn.Module):
        '''Logits of all anchors.'''
        def __init__(self, detector):
            super().__init__()
            self.backbone, self.head = detector.backbone, detector.head

        def forward(self, x):
            features = list(self.backbone(x).values())
            return self.head(features)['cls_logits']

    class Boxes(nn.Module):
        '''Logits of one box for each image.'''
        def __init__(self, detector):
            super().__init__()
            self.backbone, self.head = detector.backbone, detector.roi_heads
            self.register_buffer('box', torch.tensor([[8., 4, 50, 40]]))

        def forward(self, x):
            features = self.backbone(x)
            pooled = self.head.box_roi_pool(features, [self.box.to(x)] * len(x), [x.shape[-2:]] * len(x))
            return self.head.box_predictor(self.head.box_head(pooled))[0]

    for name in ('retinanet_resnet50_fpn', 'ssdlite320_mobilenet_v3_large', 'fcos_resnet50_fpn', 'ssd300_vgg16',
                 'retinanet_resnet50_fpn_v2'):
        shape = [(3, 300, 300)] if 'ssd' in name else [IMAGE]
        yield name, lambda name=name: Dense(models.get_model(name, weights=None, weights_backbone=None, num_classes=5)), shape
    for name in ('fasterrcnn_resnet50_fpn', 'fasterrcnn_mobilenet_v3_large_320_fpn', 'fasterrcnn_resnet50_fpn_v2'):
        yield f'{name}, box', lambda name=name: Boxes(
            models.get_model(name, weights=None, weights_backbone=None, num_classes=5)), [IMAGE]
    yield 'fpn', lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Pyramid(ops.FeaturePyramidNetwork([8, 8], 4))), [SMALL]


class Pyramid(nn.Module):
    '''A feature pyramid of two scales.'''
    def __init__(self, pyramid):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, x):
        '''Finest level.'''
        return self.pyramid({'0': x, '1': nn.functional.max_pool2d(x, 2)})['0']


def segmentation_models_pytorch():
    '''All decoders with a ResNet, one with each of the other small encoders.'''
    import segmentation_models_pytorch as package
    shape = [IMAGE, (3, 128, 128)]
    for decoder in ('Unet', 'UnetPlusPlus', 'MAnet', 'Linknet', 'FPN', 'PSPNet', 'DeepLabV3', 'DeepLabV3Plus', 'PAN',
                    'UPerNet', 'Segformer', 'DPT'):
        if hasattr(package, decoder):
            kind = getattr(package, decoder)
            encoder = 'tu-vit_tiny_patch16_224' if decoder == 'DPT' else 'resnet18'
            yield f'{decoder} {encoder}', lambda kind=kind, encoder=encoder: kind(encoder, encoder_weights=None, classes=5), (
                [(3, 224, 224)] if decoder == 'DPT' else shape)
    for encoder in ('mobilenet_v2', 'efficientnet-b0', 'timm-efficientnet-b0', 'densenet121', 'vgg11_bn', 'mit_b0', 'dpn68',
                    'mobileone_s0', 'timm-mobilenetv3_small_100', 'timm-regnetx_002', 'timm-resnest14d', 'timm-skresnet18',
                    'timm-gernet_s', 'xception', 'se_resnet50', 'timm-tf_efficientnet_lite0', 'tu-ghostnet_050',
                    'tu-convnext_atto', 'tu-hardcorenas_a'):
        yield f'Unet {encoder}', lambda encoder=encoder: package.Unet(encoder, encoder_weights=None, classes=5), shape
    yield 'Unet scse', lambda: package.Unet('resnet18', encoder_weights=None, classes=5, decoder_attention_type='scse'), shape
    yield 'Unet with a label', lambda: package.Unet(
        'resnet18', encoder_weights=None, classes=5, aux_params={'classes': 4, 'pooling': 'max'}), shape


def monai():
    '''Networks for volumes and slices.'''
    from monai.networks import nets
    three = {'spatial_dims': 3, 'in_channels': 1, 'out_channels': 3}
    two = {**three, 'spatial_dims': 2}
    small = {'channels': (4, 8, 16), 'strides': (2, 2)}
    volume, slices = [(1, 16, 16, 16), VOLUME, (1, 64, 64, 64)], [(1, 64, 64), (1, 128, 128)]
    table = {
        'ResNet 3d': lambda: nets.ResNet('basic', [1, 1, 1, 1], [4, 8, 16, 32], n_input_channels=1, num_classes=3),
        'resnet10': lambda: nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=3),
        'resnet10, type A': lambda: nets.resnet10(
            spatial_dims=3, n_input_channels=1, num_classes=3, shortcut_type='A', widen_factor=.25),
        'DenseNet 3d': lambda: nets.DenseNet(**three, init_features=8, growth_rate=4, block_config=(2, 2, 2)),
        'UNet 3d': lambda: nets.UNet(**three, **small, num_res_units=2),
        'UNet 3d, plain': lambda: nets.UNet(**three, **small, act='relu', norm='batch'),
        'BasicUNet 3d': lambda: nets.BasicUNet(**three, features=(4, 4, 8, 8, 16, 4)),
        'BasicUNetPlusPlus 3d': lambda: nets.BasicUNetPlusPlus(**three, features=(4, 4, 8, 8, 16, 4)),
        'SegResNet 3d': lambda: nets.SegResNet(**three, init_filters=8),
        'SegResNetDS 3d': lambda: nets.SegResNetDS(**three, init_filters=8, blocks_down=(1, 1, 1)),
        'SegResNetVAE 3d': lambda: nets.SegResNetVAE((16, 16, 16), 3, 8, in_channels=1, out_channels=3, init_filters=8),
        'DynUNet 3d': lambda: nets.DynUNet(**three, kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2, 2],
                                           filters=[4, 8, 16]),
        'VNet 3d': lambda: nets.VNet(3, 1, 3),
        'HighResNet 3d': lambda: nets.HighResNet(**three),
        'AttentionUnet 3d': lambda: nets.AttentionUnet(**three, **small),
        'AHNet 3d': lambda: nets.AHNet(spatial_dims=3, in_channels=1, out_channels=3, psp_block_num=0),
        'DiNTS': lambda: nets.DiNTS(nets.TopologyInstance(spatial_dims=3), 1, 3),
        'RegUNet 3d': lambda: nets.RegUNet(3, 1, 4, 3, out_channels=3),
        'LocalNet 3d': lambda: nets.LocalNet(3, 1, 4, (0, 1, 2, 3), out_channels=3),
        'GlobalNet 3d': lambda: nets.GlobalNet((16, 16, 16), 3, 1, 4, 3),
        'AutoEncoder 3d': lambda: nets.AutoEncoder(**three, channels=(4, 8), strides=(2, 2)),
        'Classifier 3d': lambda: nets.Classifier((1, 16, 16, 16), 3, **small),
        'Regressor 3d': lambda: nets.Regressor((1, 16, 16, 16), 3, **small),
        'Discriminator 3d': lambda: nets.Discriminator((1, 16, 16, 16), **small),
        'Critic 3d': lambda: nets.Critic((1, 16, 16, 16), **small),
        'UNETR': lambda: nets.UNETR(1, 3, (32, 32, 32), 4, 24, 32, 2),
        'SwinUNETR': lambda: nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12),
        'MedNeXt 3d': lambda: nets.MedNeXt(3, 4, 1, 3),
        'SEResNet50 3d': lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=3),
        'PatchDiscriminator 3d': lambda: nets.PatchDiscriminator(3, 4, 1, num_layers_d=2),
        'AutoencoderKL 3d': lambda: nets.AutoencoderKL(
            3, 1, 3, (1, 1), (8, 8), (False, False), norm_num_groups=4, with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False),
        'VISTA-like SegResNetDS2': lambda: nets.SegResNetDS2(**three, init_filters=8, blocks_down=(1, 1, 1)),
    }
    for name, build in table.items():
        yield name, build, volume
    table = {
        'DenseNet121 2d': lambda: nets.DenseNet121(**two), 'UNet 2d': lambda: nets.UNet(**two, **small, num_res_units=1),
        'EfficientNetBN b0': lambda: nets.EfficientNetBN('efficientnet-b0', False, spatial_dims=2, in_channels=1, num_classes=3),
        'FlexibleUNet': lambda: nets.FlexibleUNet(1, 3, 'resnet18', spatial_dims=2),
        'FlexibleUNet efficientnet': lambda: nets.FlexibleUNet(1, 3, 'efficientnet-b0', spatial_dims=2),
        'Quicknat': lambda: nets.Quicknat(num_classes=3, num_channels=1, num_filters=8),
        'SENet 2d': lambda: nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=3),
        'SEResNeXt50 2d': lambda: nets.SEResNext50(spatial_dims=2, in_channels=1, num_classes=3),
        'ResNet 2d': lambda: nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=3),
        'AHNet 2d': lambda: nets.AHNet(spatial_dims=2, in_channels=1, out_channels=3),
        'AttentionUnet 2d': lambda: nets.AttentionUnet(**two, **small),
        'SegResNet 2d': lambda: nets.SegResNet(**two, init_filters=8),
        'ViT': lambda: nets.ViT(1, (64, 64), (16, 16), 24, 32, 2, 2, classification=True, num_classes=3, spatial_dims=2),
        'VNet 2d': lambda: nets.VNet(2, 1, 3), 'HighResNet 2d': lambda: nets.HighResNet(**two),
        'MultiScalePatchDiscriminator': lambda: nets.MultiScalePatchDiscriminator(2, 2, 2, 4, 1),
    }
    for name, build in table.items():
        yield name, build, slices
    yield 'HoVerNet', lambda: nets.HoVerNet(mode='fast', in_channels=3, out_classes=3), [(3, 256, 256)]
    yield 'MILModel', lambda: nets.MILModel(3, mil_mode='att', pretrained=False, backbone='resnet18'), [(2, 3, 64, 64)]
    yield 'MILModel mean', lambda: nets.MILModel(3, mil_mode='mean', pretrained=False, backbone='resnet18'), [(2, 3, 64, 64)]
    yield 'TorchVisionFCModel', lambda: nets.TorchVisionFCModel('resnet18', 3, pretrained=False), [(3, 224, 224)]
    yield 'FullyConnectedNet', lambda: nets.FullyConnectedNet(20, 3, [16, 8]), [(20,)]


def braindecode():
    '''Networks for signals.'''
    import mne
    from braindecode import models as package

    def electrodes(number):
        info = mne.create_info(mne.channels.make_standard_montage('standard_1020').ch_names[:number], 100, 'eeg')
        return info.set_montage('standard_1020')['chs']

    shapes = {
        'AttnSleep': (1, 3000), 'EMG2QwertyNet': (32, 3000), 'SensingDynamics': (16, 1000), 'NeuroPose': (16, 1000),
        'VEMG2Pose': (16, 2000), 'ZUNA': (8, 1024), 'Labram': (128, 1000),
        'MetaNeuromotorHand': (16, 8000),
    }
    places = ('DANCE', 'DGCNN', 'EEGSym', 'SignalJEPA', 'SignalJEPA_Contextual', 'ZUNA')
    for name in dir(package):
        kind = getattr(package, name)
        # REVE downloads places of electrodes
        is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
        if is_network and not name.startswith(('Interpolated', 'REVE')):
            # networks for sleep need half a minute
            shape = shapes.get(name, (2, 3000) if re.search('[sS]leep', name) else (8, 1000))
            kwargs = {} if name == 'TCN' else dict(n_times=shape[1], sfreq=2000 if name == 'MetaNeuromotorHand' else 100)
            if name in places:
                kwargs['chs_info'] = electrodes(shape[0])
            yield name, lambda kind=kind, shape=shape, kwargs=kwargs: kind(n_chans=shape[0], n_outputs=4, **kwargs), [shape]


def transformers():
    '''Convolutional networks and some others, with small configurations.'''
    package = importlib.import_module('transformers')
    image = [IMAGE, (3, 128, 128), (3, 224, 224)]
    table = {
        'ResNet': dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type='basic'),
        'ResNet, bottleneck': dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 1, 1]),
        'ConvNext': dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        'ConvNextV2': dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        'RegNet': dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], groups_width=8),
        'RegNet, x': dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], groups_width=8, layer_type='x'),
        'MobileNetV1': dict(depth_multiplier=.25), 'MobileNetV2': dict(depth_multiplier=.35),
        'EfficientNet': dict(width_coefficient=.5, depth_coefficient=.5, hidden_dim=640),
        'Bit': dict(embedding_size=32, hidden_sizes=[128] * 4, depths=[1, 1, 1, 1]),
        'PoolFormer': dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        'FocalNet': dict(embed_dim=16, depths=[1, 1, 1, 1]), 'MobileViT': dict(hidden_sizes=[32, 48, 64]),
        'MobileViTV2': {}, 'Cvt': dict(embed_dim=[16, 24, 32], num_heads=[1, 1, 2], depth=[1, 2, 3]),
        'Levit': {}, 'SwiftFormer': {}, 'Swin': dict(embed_dim=12, depths=[1, 1]), 'ViT': dict(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        'DeiT': dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        'Segformer': dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]),
        'HGNetV2': {}, 'DINOv3ConvNext': dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), 'TextNet': {},
        'Data2VecVision': dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        'VAN': {}, 'EfficientFormer': {}, 'PvtV2': dict(depths=[1, 1, 1, 1]), 'TimmWrapper': {},
    }
    for name, settings in table.items():
        stem = name.partition(',')[0]
        stem = {'Segformer': 'Segformer'}.get(stem, stem)
        config = getattr(package, f'{stem}Config', None)
        kind = getattr(package, f'{stem}ForImageClassification', getattr(package, f'{stem}Model', None))
        if config is None or kind is None:
            continue
        yield name, lambda kind=kind, config=config, settings=settings: kind(config(**settings, num_labels=5)), image
    backbone = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type='basic')
    if hasattr(package, 'UperNetForSemanticSegmentation'):
        yield 'UperNet with a ResNet', lambda: package.UperNetForSemanticSegmentation(package.UperNetConfig(
            backbone_config=package.ResNetConfig(**backbone, out_features=['stage1', 'stage2', 'stage3', 'stage4']),
            hidden_size=16, auxiliary_in_channels=24, num_labels=5)), [IMAGE, (3, 128, 128)]


class Raw(nn.Module):
    '''Logits of a network of ultralytics, without the softmax and the boxes that it has in evaluation.'''
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        '''Logits of classes, for all anchors.'''
        output = self.network(x)[1]
        return output if isinstance(output, torch.Tensor) else output.get('one2one', output)['scores']


def ultralytics():
    '''Networks from their descriptions: classes, boxes, masks.'''
    from pathlib import Path

    import ultralytics as package
    from ultralytics.nn import tasks
    folder = Path(package.__file__).parent / 'cfg' / 'models'
    table = {
        'v8/yolov8n-cls': 'ClassificationModel', '11/yolo11n-cls': 'ClassificationModel', '26/yolo26n-cls': 'ClassificationModel',
        'v8/yolov8-cls-resnet50': 'ClassificationModel', '12/yolo12n-cls': 'ClassificationModel', 'v3/yolov3-tiny': 'DetectionModel',
        'v5/yolov5n': 'DetectionModel', 'v6/yolov6n': 'DetectionModel', 'v8/yolov8n': 'DetectionModel',
        'v8/yolov8n-ghost': 'DetectionModel', 'v9/yolov9t': 'DetectionModel', 'v10/yolov10n': 'DetectionModel',
        '11/yolo11n': 'DetectionModel', '12/yolo12n': 'DetectionModel', '26/yolo26n': 'DetectionModel',
        'v8/yolov8n-seg': 'SegmentationModel', '11/yolo11n-seg': 'SegmentationModel', 'v8/yolov8n-pose': 'PoseModel',
        'v8/yolov8n-obb': 'OBBModel',
    }
    for name, kind in table.items():
        yield name, lambda name=name, kind=kind: Raw(
            getattr(tasks, kind)(str(folder / f'{name}.yaml'), verbose=False)), [IMAGE]
        if name in ('v8/yolov8n-cls', 'v8/yolov8n'):
            yield f'{name}, decoded', lambda name=name, kind=kind: getattr(tasks, kind)(
                str(folder / f'{name}.yaml'), verbose=False), [IMAGE]


def speechbrain():
    '''Networks for speakers, of spectrograms.'''
    from speechbrain.lobes.models import ECAPA_TDNN, ResNet, Xvector

    yield 'ECAPA_TDNN', lambda: ECAPA_TDNN.ECAPA_TDNN(
        20, channels=[16, 16, 16, 16, 48], attention_channels=8, se_channels=8, lin_neurons=12), [(50, 20)]
    yield 'ECAPA_TDNN without attention of the context', lambda: ECAPA_TDNN.ECAPA_TDNN(
        20, channels=[16, 16, 16, 16, 48], attention_channels=8, se_channels=8, lin_neurons=12, global_context=False), [(50, 20)]
    yield 'Xvector', lambda: Xvector.Xvector(
        tdnn_channels=[16, 16, 16, 16, 32], lin_neurons=12, in_channels=20), [(50, 20)]
    yield 'ResNet', lambda: ResNet.ResNet(
        20, channels=[8, 8, 16, 16], lin_neurons=12, block_sizes=[1, 1, 1, 1]), [(50, 20), (50, 80)]
    for module, kind, settings in (('CRDNN', 'CRDNN', dict(input_shape=[None, None, 20])), (
            'convolution', 'ConvolutionFrontEnd', dict(input_shape=[None, None, 20]))):
        package = importlib.import_module(f'speechbrain.lobes.models.{module}')
        yield kind, lambda package=package, kind=kind, settings=settings: getattr(package, kind)(**settings), [(50, 20)]


def torchaudio():
    '''Networks for sound.'''
    from torchaudio import models
    table = {
        'Wav2Letter': (lambda: models.Wav2Letter(5, 'mfcc', 13), (13, 60)),
        'Wav2Letter, waveform': (lambda: models.Wav2Letter(5, 'waveform', 1), (1, 8000)),
        'ConvTasNet': (lambda: models.ConvTasNet(2, 16, 16, 3, 16, 8, 2, 1), (1, 400)),
        'DeepSpeech': (lambda: models.DeepSpeech(20, 16, 5), (1, 30, 20)),
        'wav2vec2': (lambda: models.wav2vec2_model(
            'group_norm', [(8, 10, 5), (8, 3, 2)], False, 12, 0., 3, 2, 1, 2, 0., 16, 0., 0., False, 0., 5), (2000,)),
        'HDemucs': (lambda: models.HDemucs(['a', 'b'], 1, 4, depth=4, nfft=1024), (1, 8192)),
        'ConvEmformer-free SquimObjective': (lambda: models.squim_objective_base(), (16000,)),
    }
    for name, (build, shape) in table.items():
        yield name, build, [shape]


PACKAGES = {
    name: value for name, value in list(globals().items())
    if callable(value) and getattr(value, '__module__', '') == __name__ and not isinstance(value, type) and name not in ('smallest', 'parameters')
}
