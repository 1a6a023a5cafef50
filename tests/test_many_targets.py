'''Several questions by one forward pass: the relevance is that of one question after the other.'''
import pytest
import torch
from helpers.flops import Counter
from helpers.networks import CifarResNet, UserNetwork, build_torchvision, randomize
from helpers.state import Snapshot
from zennit.attribution import Gradient
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat

from zennit_resnet import BlockLRP, ManyTargets, RelativeLRP, ResNetLRP, SelectOutput, initial_relevance, with_splitting
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.rules import SymmetricSplit, ZPlus

pytestmark = pytest.mark.once

CLASSES = 5
COMPOSITES = {
    'ratio': ResNetLRP,
    'symmetric': lambda: ResNetLRP('symmetric'),
    'merged': lambda: ResNetLRP(batch_norm='merge'),
    'without identity': lambda: ResNetLRP(identity_skip=False),
    'literal': lambda: ResNetLRP(projection='literal', dead_units='drop', first_layer='literal'),
    'stabilizer': lambda: ResNetLRP(stabilizer=1e-3, dead_units='drop', maxpool='average'),
    'zbox': lambda: ResNetLRP(first_layer='zbox', low=-5., high=5.),
    'epsilon': lambda: ResNetLRP(classifier='epsilon'),
    'relative': RelativeLRP,
    'relative, l1': lambda: RelativeLRP(normalization='l1', cardinality='per_position'),
    'block': BlockLRP,
    'zennit': lambda: with_splitting(EpsilonPlus()),
    'zennit, flat': lambda: with_splitting(EpsilonPlusFlat(), SymmetricSplit()),
    'zennit, box': lambda: with_splitting(EpsilonGammaBox(low=-5., high=5.)),
    'gradient': lambda: None,
}


class Pooled(torch.nn.Module):
    '''A strided projection, max pooling, and a convolution with more units than a few of its inputs need.'''
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        self.conv = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.skip = torch.nn.Conv2d(6, 8, 1, stride=2)
        self.group = torch.nn.Conv2d(8, 8, 1, groups=2)
        self.head = torch.nn.Linear(8, CLASSES)

    def forward(self, x):
        '''Logits.'''
        h = self.pool(self.stem(x).relu())
        h = (self.norm(self.conv(h)) + self.skip(h)).relu()
        return self.head((h + self.group(h)).relu().mean((2, 3)))


NETWORKS = {
    'user': lambda: UserNetwork(classes=CLASSES), 'pooled': Pooled, 'cifar': lambda: CifarResNet(1),
}


def build(name='user'):
    '''A network in double precision.'''
    torch.manual_seed(0)
    return randomize(NETWORKS[name]()).double().eval()


def images(num=2):
    '''Inputs.'''
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def one_by_one(model, composite, input, questions):
    '''A forward and a backward pass for each question.'''
    return torch.stack([Gradient(model, composite())(input.clone(), elem)[1] for elem in questions])


QUESTIONS = [
    initial_relevance(0), initial_relevance([3, 1]), initial_relevance(4, 'softmax'), initial_relevance(2, 'one'),
    initial_relevance([1, 2], 'one', contrast='centred'), initial_relevance(3, 'logit', contrast=1),
    initial_relevance(lambda output: output[:, :2].sum(1), 'one'),
]


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('name', COMPOSITES)
def test_one_by_one(network, name):
    '''All maps are the same, of two images, for targets, contrasts and functions, whatever the composite.'''
    model, composite, input = build(network), COMPOSITES[name], images()
    expected = one_by_one(model, composite, input, QUESTIONS)
    before = Snapshot(model)
    output, actual = ManyTargets(model, composite())(input.clone(), QUESTIONS)
    if not name.startswith('zennit'):
        # rules of Zennit 1.0.0 leave other objects
        before.check()
    assert actual.shape == (len(QUESTIONS), *input.shape)
    for index, (one, other) in enumerate(zip(actual, expected)):
        assert other.abs().max() > 0
        assert float((one - other).abs().max() / other.abs().max()) < 1e-12, index
    torch.testing.assert_close(output, model(input), rtol=1e-12, atol=0)


def test_kinds_of_questions():
    '''Functions, tensors, a stack of tensors, and a function of the output that returns any of these.'''
    model, input = build(), images()
    eye = torch.eye(CLASSES).double()[:3, None].expand(-1, 2, -1)
    functions = [initial_relevance(num, 'one') for num in range(3)]
    expected = one_by_one(model, ResNetLRP, input, functions)
    for questions in (
        functions, tuple(functions), list(eye), eye, lambda output: eye, lambda output: [eye[0], *functions[1:]],
    ):
        assert torch.equal(ManyTargets(model, ResNetLRP())(input, questions)[1], expected)
    attributor = ManyTargets(model, ResNetLRP(), functions)
    assert torch.equal(attributor(input)[1], expected)
    with attributor:
        for _ in range(2):
            assert torch.equal(attributor(input)[1], expected)


def test_dense_outputs():
    '''A map of logits, and a network that returns a dict.'''
    class Dense(torch.nn.Module):
        '''Logits for each position.'''
        def __init__(self):
            super().__init__()
            self.stem, self.head = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 2, 1)

        def forward(self, x):
            '''A dict.'''
            return {'out': self.head(self.stem(x).relu())}

    torch.manual_seed(0)
    dense, input = SelectOutput(Dense().double().eval(), 'out'), images()
    questions = [initial_relevance(lambda output, num=num: output[:, num, :3].sum((1, 2))) for num in range(2)]
    expected = one_by_one(dense, ResNetLRP, input, questions)
    torch.testing.assert_close(ManyTargets(dense, ResNetLRP())(input, questions)[1], expected, rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match="SelectOutput.*'out'"):
        ManyTargets(dense.model, ResNetLRP())(input, questions)


@pytest.mark.parametrize('dead_units', ['spread', 'drop'])
def test_dead_units(dead_units):
    '''Units without contributions have relevance in some questions only.'''
    model, input = build('pooled'), images()
    with torch.no_grad():
        # the first class has the dead units, which the second ignores
        model.head.weight.abs_()
        model.head.weight[1, :4] = 0.
        for layer in (model.conv, model.skip):
            layer.weight[:4] = -layer.weight[:4].abs()
        model.norm.bias[:4] = 3.
    questions = [initial_relevance(num, 'one') for num in (1, 0, 1, 2)]
    maps = []
    for order in (questions, questions[::-1]):
        output, relevance = ManyTargets(model, ResNetLRP(dead_units=dead_units))(input, order)
        maps.append(relevance)
    expected = one_by_one(model, lambda: ResNetLRP(dead_units=dead_units), input, questions)
    torch.testing.assert_close(maps[0], expected, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(maps[1].flip(0), expected, rtol=1e-12, atol=1e-300)
    lost = 1 - expected.sum((2, 3, 4))
    if dead_units == 'spread':
        assert lost.abs().max() < 1e-9
    else:
        assert lost[0].abs().max() < lost[1].abs().min()
    assert output.shape == (2, CLASSES)


def test_scale_of_relative_contributions():
    '''Each backward pass has a scale of its own, whatever there was before.'''
    model, input, scales = build(), images(), []
    for questions in (QUESTIONS[:1], QUESTIONS[:3][::-1]):
        composite = RelativeLRP()
        with ManyTargets(model, composite) as attributor:
            attributor(input, [lambda output, elem=elem: elem(output) * 2. ** 60 for elem in questions[:-1]] + [
                questions[-1]
            ])
        scales.append((composite.log_scale, composite.num_replaced))
    assert torch.equal(scales[0][0], scales[1][0]) and torch.equal(scales[0][1], scales[1][1])


def test_prepared_once(monkeypatch):
    '''What has nothing to do with the question is computed once for each layer, and not kept afterwards.'''
    model, calls, kept = build(), [], []
    prepare = ZPlus.prepare
    monkeypatch.setattr(ZPlus, 'prepare', lambda self, module, *args: (calls.append(module), prepare(
        self, module, *args
    ))[1])
    output, _ = ManyTargets(model, ResNetLRP(), retain_graph=True)(images(), QUESTIONS)
    assert len(calls) == len(set(map(id, calls))) > 3
    queue = [output.grad_fn]
    while queue:
        node = queue.pop()
        kept.append(getattr(node, 'prepared', None))
        queue.extend(parent for parent, _ in node.next_functions if parent is not None)
    assert len(kept) > 10 and not any(kept)


def test_cost():
    '''Ten questions need the multiplications of four attributions: forward pass and denominators are shared.'''
    model, flops = build_torchvision('resnet50').eval(), []
    for count in (1, 10):
        with Counter() as counter, ManyTargets(model, ResNetLRP()) as attributor:
            attributor(torch.randn(1, 3, 64, 64), [initial_relevance(num % 7) for num in range(count)])
        flops.append(counter.flops)
    assert 0 < flops[1] <= 4.1 * flops[0]


def test_errors_leave_the_network():
    '''Whatever is wrong with a question, the network is as it was, and answers the next one.'''
    model, input = build(), images()
    before, expected = Snapshot(model), one_by_one(model, ResNetLRP, input, QUESTIONS[:2])

    def fail(output):
        raise KeyError('no such question')

    for questions, error, match in (
        ([], ValueError, 'empty'),
        ([QUESTIONS[0], fail], KeyError, 'no such question'),
        ([QUESTIONS[0], 3], TypeError, r'initial_relevance\(3\)'),
        ([QUESTIONS[0], torch.ones(2, 4)], ValueError, r'question 1.*\(2, 4\)'),
        (torch.ones(2, 5), ValueError, r'\(2, 5\)'),
        (QUESTIONS[0], ValueError, r'\(2, 5\)'),
        (None, ValueError, r'\(2, 5\)'),
        ({0: QUESTIONS[0]}, TypeError, 'dict'),
        ([initial_relevance(5)], IndexError, '5'),
    ):
        with pytest.raises(error, match=match):
            ManyTargets(model, ResNetLRP())(input, questions)
        before.check()
    with torch.no_grad(), pytest.raises(RuntimeError, match='no_grad'):
        ManyTargets(model, ResNetLRP())(input, QUESTIONS)
    before.check()
    assert torch.equal(ManyTargets(model, ResNetLRP())(input, QUESTIONS[:2])[1], expected)


def test_error_in_a_backward_pass():
    '''A rule that fails at the second question leaves nothing behind.'''
    model, input = build(), images()
    before, count = Snapshot(model), []

    def fail(gradient):
        count.append(1)
        if len(count) == 2:
            raise ValueError('second')

    handle = model.head.register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(ValueError, match='second'):
        ManyTargets(model, ResNetLRP())(input, QUESTIONS)
    handle.remove()
    before.check()


def test_weights_between_questions():
    '''Weights that are changed meanwhile are noticed, although what was made of them is kept.'''
    model, input = build(), images()

    def change(output):
        with torch.no_grad():
            model.stem.weight.mul_(2)
        return initial_relevance(0)(output)

    with pytest.raises(RuntimeError, match='changed in place'):
        ManyTargets(model, ResNetLRP())(input, [QUESTIONS[0], change])


def test_precision():
    '''Half precision keeps relevance in single precision.'''
    model, input = build().bfloat16(), images().bfloat16()
    expected = one_by_one(model, ResNetLRP, input, QUESTIONS[:3])
    actual = ManyTargets(model, ResNetLRP())(input, QUESTIONS[:3])[1]
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize('questions', [QUESTIONS[:2], torch.ones(2, 2, CLASSES).double()], ids=['list', 'tensor'])
def test_ledger_is_of_one_question(questions):
    '''The ledger refuses several questions.'''
    with pytest.raises(ValueError, match='attr_output|2, 2, 5'):
        conservation_ledger(build(), images(), ResNetLRP(), questions)
