'''Networks and layers of golden cases.'''
import torch
from golden_cases import tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

FIRST_LAYER = {'literal': 'literal', 'ones': 'ones', 'alpha1beta0': 'zplus'}


def build_layer(arrays, layer):
    '''The layer of a golden case.'''
    if layer['type'] == 'dense':
        module = torch.nn.Linear(layer['in_features'], layer['out_features'], bias=layer['has_bias'])
    elif layer['type'] == 'conv2d':
        module = torch.nn.Conv2d(
            layer['in_shape'][0], layer['out_channels'], layer['kernel_size'], layer['stride'], layer['padding'],
            layer['dilation'], layer['groups'], layer['has_bias'],
        )
    elif layer['type'] == 'avgpool2d':
        module = torch.nn.AvgPool2d(
            layer['kernel_size'], layer['stride'], layer['padding'], count_include_pad=layer['count_include_pad']
        )
    elif layer['type'] == 'adaptive_avgpool2d':
        module = torch.nn.AdaptiveAvgPool2d(layer['output_size'])
    elif layer['type'] == 'maxpool2d':
        module = torch.nn.MaxPool2d(layer['kernel_size'], layer['stride'], layer['padding'], layer['dilation'])
    module = module.double()
    module.load_state_dict({key: tensor(arrays, key)[0] for key in ('weight', 'bias') if key in arrays.files})
    return module


def build_network(arrays, arch):
    '''The network of a golden case, from torchvision's blocks.'''
    class Network(ResNet):
        '''A ResNet of any blocks.'''
        def __init__(self):
            torch.nn.Module.__init__(self)
            stem = arch['stem']
            channels = stem['channels']
            self.conv1 = torch.nn.Conv2d(
                3, channels, stem['kernel'], stem['stride'], stem['padding'], bias=False
            )
            self.bn1 = torch.nn.BatchNorm2d(channels)
            self.relu = torch.nn.ReLU(inplace=True)
            pool = stem['maxpool']
            self.maxpool = torch.nn.Identity() if pool is None else torch.nn.MaxPool2d(
                pool['kernel'], pool['stride'], pool['padding']
            )
            layers = {f'layer{num}': [] for num in range(1, 5)}
            for block in arch['blocks']:
                kind = {'basic': BasicBlock, 'bottleneck': Bottleneck}[block['type']]
                width = block['planes'] * kind.expansion
                downsample = torch.nn.Sequential(
                    torch.nn.Conv2d(channels, width, 1, block['stride'], bias=False), torch.nn.BatchNorm2d(width)
                ) if block['downsample'] else None
                # torchvision scales the inner width by groups * base_width / 64
                groups = block.get('groups', 1)
                layers[block['name'].split('.')[0]].append(kind(
                    channels, block['planes'], block['stride'], downsample, groups,
                    block.get('base_width', 64),
                ))
                channels = width
            for name, blocks in layers.items():
                setattr(self, name, torch.nn.Sequential(*blocks))
            self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
            self.fc = torch.nn.Linear(channels, arch['classes'])

    network = Network().double().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = arch.get('bn_eps', module.eps)
    state = {key[len('param.'):]: tensor(arrays, key)[0] for key in arrays.files if key.startswith('param.')}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith('num_batches_tracked') for key in missing)
    return network


class Capture:
    '''Relevance at the inputs and outputs of modules.'''
    def __init__(self, model, names):
        self.relevance, self.inputs = {}, {}
        modules = dict(model.named_modules())
        self.handles = [modules[name].register_forward_pre_hook(self.keep(f'{name}.input')) for name in names]

    def keep(self, key):
        '''A forward hook which keeps the gradient of the input.'''
        def hook(module, args):
            self.inputs[key] = args[0].detach().clone()
            args[0].register_hook(lambda grad: self.relevance.__setitem__(key, grad.detach().clone()))
        return hook
