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
        yield name, lambda name=name: build(name), [IMAGE, (3, 96, 96), (3, size(name), size(name)), (3, 256, 256), (3, 160, 160)]


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


def vit_pytorch():
    '''Variants of transformers for images, videos and signals, all small.'''
    import inspect
    import pkgutil

    import vit_pytorch as package
    common = dict(
        image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=24, dim_head=8, mlp_mult=2, cls_depth=1,
        sm_dim=16, lg_dim=24, sm_enc_heads=2, lg_enc_heads=2, sm_enc_mlp_dim=24, lg_enc_mlp_dim=24, sm_enc_dim_head=8,
        lg_enc_dim_head=8, cross_attn_heads=2, cross_attn_dim_head=8, sm_patch_size=8, lg_patch_size=16, lg_enc_depth=1,
        cross_attn_depth=1, frames=4, image_patch_size=8, frame_patch_size=2, spatial_depth=1, temporal_depth=1,
        freq_patch_size=8, num_residual_streams=2, seq_len=32, num_hierarchies=2, block_repeats=1, ndim=2, input_shape=(32, 32),
        max_tokens_per_depth=(8, 6), num_slots=4, pre_loop_depth=1, post_loop_depth=1, num_looped_blocks=1, loop_depth=2,
        highres_patch_size=8, window_size=4,
    )
    pyramid = dict(dim=(8, 8, 16, 16), depth=(1, 1, 1, 1), window_size=2, num_classes=5)
    special = {
        'crossformer.CrossFormer': {**pyramid, 'dim': (32,) * 4, 'global_window_size': (4, 2, 2, 1), 'local_window_size': 2},
        'regionvit.RegionViT': {**pyramid, 'window_size': 2}, 'look_vit.LookViT': {**common, 'patch_size': 16},
        'scalable_vit.ScalableViT': {
            'num_classes': 5, 'dim': 8, 'depth': (1, 1, 1, 1), 'heads': (1, 1, 2, 2), 'reduction_factor': (4, 2, 1, 1),
            'window_size': (4, 4, None, None), 'iwsa_dim_key': 8, 'iwsa_dim_value': 8, 'ssa_dim_key': 8, 'ssa_dim_value': 8},
        'sep_vit.SepViT': {'num_classes': 5, 'dim': 8, 'depth': (1, 1, 1, 1), 'heads': (1, 1, 2, 2), 'dim_head': 8},
        'max_vit.MaxViT': {'num_classes': 5, 'dim': 8, 'depth': (1, 1), 'dim_head': 8, 'window_size': 4, 'dim_conv_stem': 8},
        'max_vit_with_registers.MaxViT': {
            'num_classes': 5, 'dim': 8, 'depth': (1, 1), 'dim_head': 8, 'window_size': 4, 'dim_conv_stem': 8},
        'mobile_vit.MobileViT': {
            'image_size': (64, 64), 'dims': [16, 16, 24], 'channels': [8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 32], 'num_classes': 5},
        'twins_svt.TwinsSVT': {
            'num_classes': 5, **{f's{num}_{key}': value for num in range(1, 5) for key, value in {
                'emb_dim': 8 * num, 'patch_size': 2, 'local_patch_size': 2, 'global_k': 2, 'depth': 1}.items()}},
        'cvt.CvT': {'num_classes': 5, **{f's{num}_{key}': value for num in range(1, 4) for key, value in {
            'emb_dim': 8 * num, 'heads': 1, 'depth': 1}.items()}},
        'pit.PiT': {**common, 'depth': (1, 1), 'patch_size': 8}, 'levit.LeViT': {
            **common, 'dim': (16, 16, 24), 'depth': 1, 'heads': (2, 2, 2), 'image_size': 64},
        't2t.T2TViT': common, 'nest.NesT': {**common, 'patch_size': 4},
    }
    for _, stem, _ in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f'vit_pytorch.{stem}')
        except ImportError:
            continue
        for name, kind in vars(module).items():
            if not isinstance(kind, type) or not issubclass(kind, nn.Module) or kind.__module__ != module.__name__:
                continue
            params = inspect.signature(kind.__init__).parameters
            settings = special.get(f'{stem}.{name}', common)
            if 'num_classes' not in params or name == 'TransformerClassifier' or not settings.keys() >= {
                key for key, param in params.items() if param.default is param.empty and key != 'self'
                and param.kind not in (param.VAR_KEYWORD, param.VAR_POSITIONAL)
            }:
                continue
            settings = {key: value for key, value in settings.items() if key in params}
            shapes = [(3, 4, 32, 32)] if '3d' in stem or 'vivit' in stem else [(3, 32)] if '1d' in stem else [
                SMALL, IMAGE, (3, 128, 128), (3, 224, 224)]
            yield f'{stem}.{name}', lambda kind=kind, settings=settings: kind(**settings), shapes
    from vit_pytorch.cct import CCT
    from vit_pytorch.efficient import ViT
    from x_transformers import Encoder
    yield 'cct.CCT', lambda: CCT(
        img_size=32, embedding_dim=16, n_conv_layers=2, num_layers=1, num_heads=2, mlp_ratio=1, num_classes=5,
        positional_embedding='learnable'), [SMALL]
    for key in ('alibi_pos_bias', 'rotary_pos_emb', 'ff_glu', 'use_rmsnorm', 'sandwich_norm', 'residual_attn', 'macaron',
                'attn_pre_talking_heads', 'attn_sparse_topk', 'gate_residual', 'shift_tokens', 'attn_one_kv_head', 'attn_qk_norm',
                'ff_swish', 'ff_relu_squared', 'ff_post_act_ln', 'pre_norm', 'scale_residual', 'attn_gate_values',
                'attn_on_attn', 'use_scalenorm', 'attn_flash', 'learned_value_residual_mix', 'add_value_residual'):
        value = {'attn_sparse_topk': 4, 'shift_tokens': 1, 'pre_norm': False}.get(key, True)
        extra = {'ff_swish': {'ff_glu': True}, 'learned_value_residual_mix': {'add_value_residual': True}}.get(key, {})
        yield f'x_transformers {key}', lambda key=key, value=value, extra=extra: ViT(
            image_size=32, patch_size=8, num_classes=5, dim=16,
            transformer=Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, **{key: value}, **extra)), [SMALL]


def pytorchcv():
    '''The smallest network of each family, with less than 8 million parameters.'''
    from pytorchcv import model_provider

    def build(name):
        return model_provider.get_model(name, pretrained=False)

    shapes = [IMAGE, (3, 96, 96), SMALL, (3, 224, 224), (3, 299, 299), (3, 256, 256), (3, 480, 480)]
    for name in smallest(model_provider._models, build, 8e6):
        yield name, lambda name=name: build(name), shapes


class Call(nn.Module):
    '''A network that is called with further arguments, or by one of its methods.'''
    def __init__(self, network, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x):
        '''What the function returns.'''
        return self.call(self.network, x)


def diffusers():
    '''Networks that remove noise, autoencoders.'''
    import diffusers as package
    blocks = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    unet = dict(sample_size=16, in_channels=3, out_channels=3, **blocks)
    yield 'UNet2DModel', lambda: Call(package.UNet2DModel(
        **unet, down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
        attention_head_dim=4), lambda net, x: net(x, 3).sample), [(3, 16, 16)]
    yield 'UNet2DConditionModel', lambda: Call(package.UNet2DConditionModel(
        **unet, cross_attention_dim=8, attention_head_dim=4, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D')), lambda net, x: net(
            x, 3, torch.ones(len(x), 4, 8).to(x)).sample), [(3, 16, 16)]
    yield 'AutoencoderKL', lambda: Call(package.AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2, latent_channels=2, **blocks),
        lambda net, x: net.encode(x).latent_dist.mean), [SMALL]
    yield 'VQModel', lambda: Call(package.VQModel(
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2, latent_channels=2, **blocks),
        lambda net, x: net.encode(x).latents), [SMALL]
    yield 'DiTTransformer2DModel', lambda: Call(package.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=1, sample_size=16, patch_size=4,
        num_embeds_ada_norm=10, norm_num_groups=4), lambda net, x: net(
            x, torch.tensor([3] * len(x)), class_labels=torch.tensor([1] * len(x))).sample), [(3, 16, 16)]
    yield 'AutoencoderTiny', lambda: Call(package.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1)), lambda net, x: net.encode(x).latents), [SMALL]
    yield 'AutoencoderDC', lambda: Call(package.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=('ResBlock', 'EfficientViTBlock'),
        decoder_block_types=('ResBlock', 'EfficientViTBlock'), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), decoder_norm_types='rms_norm'), lambda net, x: net.encode(x).latent), [SMALL]


def open_clip():
    '''Similarities of images with texts of random tokens.'''
    from open_clip.model import CLIP
    text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)

    def build(vision):
        network = CLIP(16, vision, text).eval()
        network.register_buffer('texts', network.encode_text(torch.arange(24).view(3, 8), normalize=True).detach())
        return Call(network, lambda network, x: (
            network.logit_scale.exp() * network.encode_image(x, normalize=True) @ network.texts.T
        ))

    for name, vision in {
        'RN': dict(layers=[1, 1, 1, 1], width=8, image_size=64), 'ViT': dict(layers=2, width=16, head_width=8, patch_size=16, image_size=64),
        'ViT, pooled by attention': dict(
            layers=1, width=16, head_width=8, patch_size=16, image_size=64, attentional_pool=True, attn_pooler_heads=2,
            attn_pooler_queries=4),
        'timm convnext': dict(timm_model_name='convnext_atto', timm_pool='', timm_proj='linear', image_size=64),
        'timm vit': dict(timm_model_name='test_vit', timm_pool='', timm_proj='linear', image_size=160),
    }.items():
        yield name, lambda vision=vision: build(vision), [IMAGE, (3, 160, 160)]


def others():
    '''Packages of one or two networks.'''
    import efficientnet_pytorch
    import facenet_pytorch
    import pretrainedmodels
    import torchxrayvision
    yield 'torchxrayvision DenseNet', lambda: torchxrayvision.models.DenseNet(
        growth_rate=4, block_config=(1, 1, 1, 1), num_init_features=8, num_classes=5), [(1, 64, 64)]
    yield 'torchxrayvision ResNetAE', lambda: Call(
        torchxrayvision.autoencoders._ResNetAE(torchxrayvision.autoencoders.Bottleneck,
                                               torchxrayvision.autoencoders.DeconvBottleneck, [1, 1, 1, 1], 1),
        lambda net, x: net.encode(x)), [(1, 224, 224)]
    yield 'facenet InceptionResnetV1', lambda: facenet_pytorch.InceptionResnetV1(classify=False), [(3, 96, 96), (3, 160, 160)]
    yield 'efficientnet_pytorch b0', lambda: efficientnet_pytorch.EfficientNet.from_name('efficientnet-b0', num_classes=5), [IMAGE]
    for name in ('se_resnet50', 'fbresnet152', 'bninception', 'dpn68', 'polynet', 'pnasnet5large', 'nasnetamobile', 'xception',
                 'resnext101_32x4d', 'inceptionresnetv2', 'inceptionv4', 'senet154', 'cafferesnet101'):
        build = getattr(pretrainedmodels.models, name, None)
        if build:
            yield f'pretrainedmodels {name}', lambda build=build: build(num_classes=5, pretrained=None), [
                IMAGE, (3, 96, 96), (3, 224, 224), (3, 299, 299), (3, 331, 331)]


PACKAGES = {
    name: value for name, value in list(globals().items())
    if callable(value) and getattr(value, '__module__', '') == __name__ and not isinstance(value, type) and name not in ('smallest', 'parameters')
}
