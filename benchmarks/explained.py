'''A network explained by one composite after the other, and what may be wrong with it, for sweep.py and networks.py.'''
import linecache
import re
import traceback
from pathlib import Path

import torch
from zennit.attribution import Gradient

from zennit_resnet import RelativeLRP, UnsupportedOperation, initial_relevance

TOLERANCE = 1e-9
SEED = 2


def snapshot(model):
    '''What must be the same after an explanation.'''
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks),
         len(module._backward_pre_hooks), module.training, sorted(module.__dict__), list(module._modules))
        for name, module in model.named_modules()
    ]
    tensors = [(name, id(param), param.requires_grad, param.grad is None) for name, param in model.named_parameters()]
    return hooks, tensors


def describe(error):
    '''Outcome of an exception: a refusal if this package has raised it, a crash otherwise, and its first sentence.'''
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno).strip()
    is_ours = 'zennit_resnet' in Path(last.filename).parts and line.startswith('raise')
    text = ' '.join(str(error).split())
    if isinstance(error, UnsupportedOperation) or is_ours:
        return 'refuses', re.split(r'(?<=[.!])\s', text)[0]
    return 'crash', f'{type(error).__name__} ({Path(last.filename).name}:{last.lineno}): {text[:160]}'


def differ(one, other, tolerance=TOLERANCE):
    '''Largest difference of relevance, relative to the largest magnitude, if it is beyond a tolerance.'''
    difference = float((one - other).abs().max() / one.abs().max().clamp(min=1e-300))
    return 0. if difference <= tolerance else difference


class Explained:
    '''A network with images and their targets. Some networks add noise also in evaluation, by the same seed.'''
    def __init__(self, network, images, targets=None):
        self.network, self.images = network, images
        self.plain = self._forward()
        # some kernels depend on whether parameters need a gradient
        trainable = [param.requires_grad_(False) for param in network.parameters() if param.requires_grad]
        self.frozen = self._forward()
        for param in trainable:
            param.requires_grad_(True)
        self.targets = targets or ([1, 2] if self.plain.shape[1] > 2 else [0, 0])

    def _forward(self):
        torch.manual_seed(SEED)
        return self.network(self.images.clone().requires_grad_()).detach()

    def explain(self, composite, images=None, targets=None, network=None):
        '''Output and relevance.'''
        images = self.images if images is None else images
        torch.manual_seed(SEED)
        with Gradient(model=network or self.network, composite=composite) as attributor:
            output, relevance = attributor(images.clone(), initial_relevance(targets or self.targets, 'one'))
        return output.detach(), relevance.detach()

    def run(self, composite):
        '''Relevance, and an outcome with a note if anything is wrong that needs no other run to be seen.'''
        before, state = snapshot(self.network), {key: value.clone() for key, value in self.network.state_dict().items()}
        relevance = failed = None
        try:
            output, relevance = self.explain(composite)
        except Exception as error:
            failed = describe(error)
        after = self.network.state_dict()
        if before != snapshot(self.network) or any(not torch.equal(after[key], value) for key, value in state.items()):
            failed = 'network changed', failed[1] if failed else 'state, hooks or flags'
        elif failed is None and not torch.equal(output, self.plain) and not torch.equal(output, self.frozen):
            failed = 'output changed', f'by {float((output - self.plain).abs().max()):.1e}'
        elif failed is None and not relevance.isfinite().all():
            failed = 'silent', 'relevance is not finite'
        return relevance, failed

    def alone(self, composite, relevance, num, tolerance=TOLERANCE):
        '''An outcome with a note if the map of an image alone is another one. None where the network takes no such.'''
        image = self.images[num:num + 1]
        try:
            with torch.no_grad():
                output = self.network(image)
        except Exception:
            return None
        if output.shape != self.plain[:1].shape:
            return None
        try:
            alone, whole = self.explain(composite, image, self.targets[num:num + 1])[1][0], relevance[num]
        except Exception as error:
            return describe(error)[0], f'image {num} alone: {describe(error)[1]}'
        if isinstance(composite, RelativeLRP):
            # which is rescaled for each example
            alone, whole = (elem / elem.abs().sum().clamp(min=1e-300) for elem in (alone, whole))
        difference = differ(whole, alone, tolerance)
        return ('depends on the batch', f'image {num} alone differs by {difference:.1e}') if difference else None
