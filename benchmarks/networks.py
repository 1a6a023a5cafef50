'''Which networks of timm can be explained: sums of relevance, outputs, and what is left behind.

    python benchmarks/networks.py --names 'resnet*' --names 'ghostnet*'

Networks have random weights. Without names, all with less than 15 million parameters are run, which takes an hour.
'''
import argparse
import collections
import fnmatch
import warnings

import timm
import torch
from zennit.attribution import Gradient

from zennit_resnet import RelativeLRP, ResNetLRP, UnsupportedOperation, initial_relevance

COMPOSITES = {
    'ratio': ResNetLRP,
    'symmetric': lambda: ResNetLRP('symmetric'),
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'relative': RelativeLRP,
    'half': lambda: ResNetLRP(attention='half'),
}


def build(name):
    '''A network in double precision, and images of a size that it takes.'''
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, .2)
                module.running_var.uniform_(.5, 1.5)
    for size in (64, 96, model.default_cfg['input_size'][-1]):
        images = torch.randn(2, 3, size, size, dtype=torch.double)
        try:
            # the bits of functions for attention depend on whether weights need a gradient, which they do not here
            plain = model.requires_grad_(False)(images.clone().requires_grad_()).detach()
            model.requires_grad_(True)
            return model, images, plain
        except (RuntimeError, AssertionError, ValueError):
            continue
    raise RuntimeError('no size of images works')


def explain(model, images, plain, composite):
    '''What is wrong with an explanation, empty if nothing is.'''
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    try:
        with Gradient(model=model, composite=composite) as attributor:
            output, relevance = attributor(images.clone(), initial_relevance([1, 2], 'one'))
    except (UnsupportedOperation, ValueError) as error:
        return f'{type(error).__name__}: {error}'.partition(', and ')[0]
    # class tokens keep a part
    gap = float((relevance.sum((1, 2, 3)) + sum(composite.sinks.values()) - 1).abs().max())
    if not torch.equal(output.detach(), plain):
        return 'another output'
    if not bool(relevance.isfinite().all()) or isinstance(composite, ResNetLRP) and composite.attention == 'value' and (
        gap > 1e-6
    ):
        return f'gap {gap:.1e}'
    after = model.state_dict()
    if names != [name for name, _ in model.named_modules()] or any(
        not torch.equal(value, after[key]) for key, value in state.items()
    ):
        return 'another network'
    return ''


def main():
    '''Run networks, and print a line for each, and a summary.'''
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--names', action='append', help='pattern of names, all small networks by default')
    parser.add_argument('--parameters', type=float, default=15e6, help='largest number of parameters without names')
    parser.add_argument('--composites', nargs='+', default=list(COMPOSITES), choices=list(COMPOSITES), help='all')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    results = collections.Counter()
    for name in timm.list_models():
        if args.names and not any(fnmatch.fnmatch(name, pattern) for pattern in args.names):
            continue
        if not args.names:
            try:
                with torch.device('meta'):
                    size = sum(param.numel() for param in timm.create_model(name, num_classes=7).parameters())
            except (RuntimeError, NotImplementedError):
                continue
            if size > args.parameters:
                continue
        model, images, plain = build(name)
        found = {label: explain(model, images, plain, COMPOSITES[label]()) for label in args.composites}
        result = next(iter(found.values())) or 'conserved'
        if len(set(found.values())) > 1:
            result = ', '.join(f'{label}: {text or "conserved"}' for label, text in found.items())
        results[result] += 1
        print(f'{name:40} {images.shape[-1]:4} {result}', flush=True)
    print('\n'.join(f'{count:5} {result}' for result, count in results.most_common()))


if __name__ == '__main__':
    main()
