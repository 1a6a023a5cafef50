'''Constants that a network computes from its input without a gradient, where relevance has no way on.'''
import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from zennit_resnet import (
    BlockLRP,
    RelativeLRP,
    ResidualCanonizer,
    ResNetLRP,
    UnsupportedOperation,
    initial_relevance,
    with_splitting,
)

pytestmark = pytest.mark.once

COMPOSITES = {
    'ratio': ResNetLRP, 'symmetric': lambda: ResNetLRP('symmetric'), 'relative': RelativeLRP, 'block': BlockLRP,
    'splitting': lambda: with_splitting(EpsilonPlus()),
}


class Net(nn.Module):
    '''Maps of four classes, and a function of these.'''
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.head, self.other, self.function = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), function

    def forward(self, x):
        '''What the function makes of the maps, flattened to (batch, classes, positions).'''
        x = self.stem(x).relu()
        x = (x + self.branch(x)).relu()
        return self.function(self, x)


def maps(m, x):
    '''Maps of classes.'''
    return m.head(x).flatten(2)


def explain(function, composite, target):
    '''Relevance for one output of two images.'''
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    with Gradient(model=Net(function).double().eval(), composite=composite) as attributor:
        return attributor(images, initial_relevance(target, 'one'))[1]


def scores_of(m, x):
    '''The largest score of each class.'''
    return maps(m, x).amax(2)


def assigned(values, places):
    '''Values and places in one tensor that is filled piece by piece.'''
    output = torch.zeros(len(values), 8, dtype=values.dtype)
    output[:, 4:] = places
    output[:, :4] = values
    return output


def without_gradient(m, x):
    '''The largest entries of a layer that is frozen by its user.'''
    with torch.no_grad():
        return m.other(x).flatten(2).amax(2)


def last_module(m, x):
    '''A layer that is run last without gradients.'''
    with torch.no_grad():
        return m.other(x.mean((2, 3), keepdim=True)).detach()[:, :, 0, 0] + 1


def counted(m, x):
    '''Numbers of entries that exceed a threshold, in a buffer that is written to.'''
    output = torch.ones(len(x), 4, dtype=x.dtype)
    output[:, :4] += (maps(m, x) > 0).sum(2)
    return output


def viewed(m, x):
    '''Places that are copied into a view.'''
    output = torch.ones(len(x), 5, dtype=x.dtype)
    output[:, 1:].copy_(maps(m, x).argmax(2))
    return output[:, 1:]


# what is computed from the input, and the name in the error
DERIVED = {
    'max': (lambda m, x: maps(m, x).max(2).indices.double() + 1, 'max'),
    'argmax': (lambda m, x: maps(m, x).argmax(2).type_as(x) + 1, 'argmax'),
    'topk': (lambda m, x: maps(m, x).topk(1, 2)[1][:, :, 0].to(x) % 7 + 1, 'topk'),
    'sort': (lambda m, x: maps(m, x).sort(2, descending=True).indices[..., 0].double() + 1, 'sort'),
    'pool': (lambda m, x: F.max_pool2d(m.head(x), 7, return_indices=True)[1][:, :, 0, 0].double() + 1, 'max_pool2d'),
    'comparison': (lambda m, x: (maps(m, x) > -1e3).any(2).double(), 'gt'),
    'integer': (lambda m, x: (maps(m, x).amax(2) * 100).int().double() + 1, 'int'),
    'bucketize': (lambda m, x: torch.bucketize(maps(m, x).amax(2), torch.zeros(1).double()).double() + 1, 'bucketize'),
    'detached': (lambda m, x: maps(m, x).amax(2).detach(), 'detach'),
    'data': (lambda m, x: maps(m, x).amax(2).data * 2, 'data'),
    'without gradient': (without_gradient, '(Conv2d|flatten|conv2d)'),
    'last module': (last_module, '(Conv2d|mean)'),
    'in place': (counted, 'gt'),
    'view': (viewed, 'argmax'),
    'one hot': (lambda m, x: torch.zeros(2, 4).double().scatter(1, maps(m, x).argmax(2)[:, :1] % 4, 1.) + 1, 'argmax'),
}
# how it comes beside the scores
PLACES = {
    'cat': lambda a, b: torch.cat((a, b), 1), 'cat, before': lambda a, b: torch.cat((b, a), 1).roll(4, 1),
    'stack': lambda a, b: torch.stack((a, b), 1).flatten(1), 'hstack': lambda a, b: torch.hstack((a, b)),
    'keywords': lambda a, b: torch.cat(dim=-1, tensors=[a, b]),
    'setitem': assigned,
    'where': lambda a, b: torch.where(torch.arange(8) < 4, a.repeat(1, 2), b.repeat(1, 2)),
    'scatter': lambda a, b: F.pad(b, (4, 0)).scatter(1, torch.arange(4).expand(2, 4), a),
    'index_put': lambda a, b: F.pad(b, (4, 0)).index_put((torch.arange(2)[:, None], torch.arange(4)), a),
    'copy': lambda a, b: F.pad(a, (0, 4)).index_copy(1, torch.arange(4, 8), b),
    'masked_scatter': lambda a, b: F.pad(a, (0, 4)).masked_scatter(torch.arange(8) >= 4, b),
}


def placed(derived, place):
    '''Scores, and what is computed from the input, as eight classes.'''
    return lambda m, x: place(scores_of(m, x), derived(m, x))


@pytest.mark.parametrize('name', COMPOSITES)
@pytest.mark.parametrize('kind', DERIVED)
def test_refused(kind, name):
    '''Relevance of coordinates, classes and the like is not lost without a word.'''
    derived, source = DERIVED[kind]
    if name == 'splitting' and kind in ('without gradient', 'last module'):
        pytest.skip('rules of Zennit need gradients')
    with pytest.raises(UnsupportedOperation, match=f'The model .Net. uses \'cat\'.* at what \'{source}'):
        explain(placed(derived, PLACES['cat']), COMPOSITES[name](), [5, 6])


@pytest.mark.parametrize('name', ['ratio', 'block'])
@pytest.mark.parametrize('kind', ['max', 'integer', 'detached'])
@pytest.mark.parametrize('place', PLACES)
def test_places(place, kind, name):
    '''It does not matter how they are put beside elements that have a gradient.'''
    function = placed(DERIVED[kind][0], PLACES[place])
    with pytest.raises(UnsupportedOperation, match=DERIVED[kind][1]):
        explain(function, COMPOSITES[name](), [5, 6])


@functools.cache
def scores_alone(name):
    '''Relevance by a composite where the network returns scores only.'''
    return explain(scores_of, COMPOSITES[name](), [1, 2])


def pairs():
    '''Each kind at each place, by one of the composites. Each composite gets each kind and each place.'''
    for (row, kind), (column, place) in itertools.product(enumerate(DERIVED), enumerate(PLACES)):
        names = [name for name in COMPOSITES if not (
            # rules of Zennit need gradients
            name == 'splitting' and kind in ('without gradient', 'last module')
            # these move elements along the first dimension
            or name == 'relative' and place in ('index_put', 'masked_scatter')
        )]
        yield kind, place, names[(row + column) % len(names)]


@pytest.mark.parametrize('kind, place, name', pairs())
def test_scores_beside_them(kind, place, name):
    '''Scores are explained as if nothing else was returned.'''
    relevance = explain(placed(DERIVED[kind][0], PLACES[place]), COMPOSITES[name](), [1, 2])
    expected = scores_alone(name)
    torch.testing.assert_close(relevance, expected, rtol=1e-9, atol=1e-12)
    if name in ('ratio', 'symmetric'):
        torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.ones(2).double())


def keypoints(m, x):
    '''Coordinates and score of the peak of each class, moved by a quarter of the slope beside it.'''
    heat = m.head(x)
    scores, indices = heat.flatten(2).max(2, keepdim=True)
    points = torch.cat((indices % 7 * 1., indices // 7 * 1., scores), 2)
    for image in range(len(points)):
        for num in range(4):
            column, row = (int(elem) for elem in points[image, num, :2])
            if 0 < column < 6:
                slope = heat[image, num, row, column + 1] - heat[image, num, row, column - 1]
                points[image, num, 0] += slope.sign() * .25
    return points


@pytest.mark.parametrize('name', ['ratio', 'symmetric', 'block', 'splitting'])
def test_keypoints(name):
    '''The sum of coordinates and scores is refused, scores alone are explained.'''
    with pytest.raises(UnsupportedOperation, match='\'max\''):
        explain(lambda m, x: keypoints(m, x).sum(2), COMPOSITES[name](), [1, 2])
    relevance = explain(lambda m, x: keypoints(m, x)[:, :, 2], COMPOSITES[name](), [1, 2])
    expected = explain(scores_of, COMPOSITES[name](), [1, 2])
    torch.testing.assert_close(relevance, expected, rtol=1e-9, atol=1e-12)


def boxes(m, x):
    '''Boxes around the strongest entries, their classes and scores.'''
    heat, size = m.head(x), m.other(x)
    scores, indices = heat.flatten(1).topk(3)
    classes, positions = indices // 49, indices % 49
    sizes = size[:, :2].flatten(2).gather(2, positions[:, None].expand(-1, 2, -1))
    centers = torch.stack((positions % 7, positions // 7), 1) + sizes
    return torch.cat((centers, classes[:, None] + 1., scores[:, None]), 1)


@pytest.mark.parametrize('name', COMPOSITES)
def test_boxes(name):
    '''Classes are refused. Centers, which are constants with something added, and scores are explained.'''
    with pytest.raises(UnsupportedOperation, match='\'topk\''):
        explain(lambda m, x: boxes(m, x)[:, :, 0], COMPOSITES[name](), 2)
    for target in (0, 3):
        relevance = explain(lambda m, x: boxes(m, x)[:, :, 0], COMPOSITES[name](), target)
        assert bool((relevance.abs().sum((1, 2, 3)) > 0).all())
        if name == 'ratio':
            torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.ones(2).double())


# what is computed from the input is an index, a mask or a gate, or only a shape is
PASSED = {
    'gate': lambda m, x: scores_of(m, x) * (maps(m, x) > 0).double().mean(2),
    'shift': lambda m, x: scores_of(m, x) + maps(m, x).argmax(2),
    'straight through': lambda m, x: scores_of(m, x) + (scores_of(m, x).round() - scores_of(m, x)).detach(),
    'index': lambda m, x: maps(m, x).gather(2, maps(m, x).argmax(2, keepdim=True))[:, :, 0],
    'mask': lambda m, x: maps(m, x).masked_fill(maps(m, x) < maps(m, x).mean(2, keepdim=True).detach(), 0).amax(2),
    'where': lambda m, x: torch.where(maps(m, x) > 0, maps(m, x), torch.zeros_like(maps(m, x))).amax(2),
    'zeros': lambda m, x: torch.cat((scores_of(m, x), (maps(m, x) > 1e3).double().amax(2)), 1),
    'unpooling': lambda m, x: F.max_unpool2d(
        *F.max_pool2d(m.head(x[..., :6, :6]), 2, return_indices=True), 2).flatten(2).amax(2),
}


@pytest.mark.parametrize('kind', PASSED)
def test_passed(kind):
    '''Relevance does not arrive there.'''
    for name, create in COMPOSITES.items():
        relevance = explain(PASSED[kind], create(), [1, 2])
        if name in ('ratio', 'symmetric'):
            torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.ones(2).double())


@pytest.mark.parametrize('constant', [
    lambda x: torch.linspace(0, 1, 7).double().expand(2, 1, 7, 7), lambda x: torch.ones_like(x[:, :1]),
    lambda x: torch.arange(7).to(x).view(1, 1, 1, 7).expand_as(x[:, :1]), lambda x: x.new_full((2, 1, 7, 7), 2),
    lambda x: torch.linspace(0, 1, 7).type_as(x).expand(2, 1, 7, 7),
    lambda x: torch.meshgrid(torch.arange(7), torch.arange(7), indexing='ij')[0].double().expand(2, 1, 7, 7),
])
def test_true_constants(constant):
    '''Those that depend on no more than the shape of the input keep their part, as coordinate channels do.'''
    def function(m, x):
        x = torch.cat((x[:, :5], constant(x)), 1)
        return m.head(x).flatten(2).mean(2)

    total = explain(function, ResNetLRP(), [1, 2]).sum((1, 2, 3))
    assert bool(((total > .1) & (total < 1 - 1e-6)).any())


def test_warning():
    '''With strict=False, there is a warning, and relevance is lost.'''
    composite = ResNetLRP(canonizers=[ResidualCanonizer(strict=False)])
    function = placed(DERIVED['max'][0], PLACES['cat'])
    with pytest.warns(UserWarning, match='\'max\''):
        relevance = explain(function, composite, [5, 6])
    assert not relevance.any()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        explain(function, composite, [1, 2])


def test_nothing_is_left_on_parameters():
    '''A parameter is one for the next network, too, if a chosen row of it is used.'''
    tokens = torch.nn.Parameter(torch.rand(5, 4))

    class Chosen(torch.nn.Module):
        '''Adds the row of the largest element.'''
        def __init__(self):
            super().__init__()
            self.tokens, self.fc = tokens, torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x + self.tokens[x[0].argmax()])

    class Joined(Chosen):
        '''Puts a row beside the input.'''
        def forward(self, x):
            return self.fc(torch.cat([self.tokens[:1], x]))[1:]

    for cls in (Joined, Chosen, Joined):
        with Gradient(cls().eval(), ResNetLRP()) as attributor:
            assert attributor(torch.rand(1, 4), initial_relevance(1, 'one'))[1].any()
    assert not vars(tokens)
