'''Recurrences of PyTorch, which run all steps at once: relevance goes to what gates multiply (Arras et al. 2017).'''
import pytest
import torch
import torch.nn.functional as F
from helpers.operations import explain
from helpers.state import Snapshot
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from zennit_resnet import GammaLRP, RelativeLRP, ResNetLRP, UnsupportedOperation
from zennit_resnet.tracing import trace

KINDS = {'lstm': nn.LSTM, 'gru': nn.GRU, 'rnn': nn.RNN}
SETTINGS = {
    'one': {}, 'deep': {'num_layers': 2, 'bidirectional': True}, 'no bias': {'bias': False},
    'relu': {'nonlinearity': 'relu'}, 'projected': {'num_layers': 2, 'proj_size': 3},
}
CASES = [(kind, name) for kind in KINDS for name in SETTINGS
         if name not in ('relu', 'projected') or (kind, name) in (('rnn', 'relu'), ('lstm', 'projected'))]


class Reader(nn.Module):
    '''Logits of what a layer has read: its last output, or its last state.'''
    def __init__(self, layer, width=5, is_state=False):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.layer, self.is_state = nn.Linear(3, 4), layer, is_state
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        '''Logits of sequences (batch, steps, 3).'''
        output, state = self.layer(self.first(x).relu())
        if self.is_state:
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])
        return self.head(output[:, -1])


class Steps(nn.Module):
    '''A layer as a user writes it, with the weights of the one of PyTorch.'''
    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]
        self.joint = nn.Linear(9, len(layer.weight_ih_l0)).double()
        self.added, self.gated = nn.Linear(4, 5).double(), nn.Linear(5, 5).double()
        with torch.no_grad():
            self.joint.weight.copy_(torch.cat([layer.weight_ih_l0, layer.weight_hh_l0], 1))
            self.joint.bias.copy_(layer.bias_ih_l0 + layer.bias_hh_l0)
            for linear, name in ((self.added, 'ih'), (self.gated, 'hh')):
                linear.weight.copy_(getattr(layer, f'weight_{name}_l0')[-5:])
                linear.bias.copy_(getattr(layer, f'bias_{name}_l0')[-5:])

    def rows(self, x, h, start, stop):
        '''The linear layer of some rows, of the input alone before there is a state.'''
        weight, bias = self.joint.weight[5 * start:5 * stop], self.joint.bias[5 * start:5 * stop]
        return F.linear(x, weight[:, :4], bias) if h is None else F.linear(torch.cat([x, h], -1), weight, bias)

    def forward(self, x):
        '''Outputs of all steps, and no state.'''
        h = c = None
        outputs = []
        for step in x.unbind(1):
            if isinstance(self.layer[0], nn.LSTM):
                value = self.rows(step, h, 0, 1).sigmoid() * self.rows(step, h, 2, 3).tanh()
                c = value if c is None else self.rows(step, h, 1, 2).sigmoid() * c + value
                h = self.rows(step, h, 3, 4).sigmoid() * c.tanh()
            elif isinstance(self.layer[0], nn.GRU):
                gate, keep = (self.rows(step, h, num, num + 1).sigmoid() for num in (0, 1))
                if h is None:
                    h = (1 - keep) * (self.added(step) + (gate * self.gated.bias).detach()).tanh()
                else:
                    h = (1 - keep) * (self.added(step) + gate * self.gated(h)).tanh() + keep * h
            else:
                h = self.rows(step, h, 0, 1).tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), None


def sequences(number=2):
    '''Sequences of five steps.'''
    torch.manual_seed(2)
    return torch.randn(number, 5, 3).double()


def reader(kind, name='one', is_state=False):
    '''A network with a layer of PyTorch.'''
    torch.manual_seed(0)
    settings = SETTINGS[name]
    layer = KINDS[kind](4, 5, batch_first=True, **settings)
    width = settings.get('proj_size', 5) * (2 if settings.get('bidirectional') and not is_state else 1)
    return Reader(layer, width, is_state).double().eval()


@pytest.mark.parametrize('is_state', [False, True], ids=['output', 'state'])
@pytest.mark.parametrize('kind, name', CASES)
def test_laws(kind, name, is_state):
    '''Sums, the same bits, images alone, and a network that is left as it was.'''
    model, x = reader(kind, name, is_state), sequences()
    plain, before = model(x), Snapshot(model)
    output, relevance = explain(model, x, ResNetLRP())
    assert torch.equal(output, plain)
    before.check()
    assert torch.allclose(relevance.sum((1, 2)), torch.ones(2).double(), atol=1e-12)
    _, alone = explain(model, x[:1], ResNetLRP())
    assert torch.allclose(alone, relevance[:1], atol=1e-12)


@pytest.mark.parametrize('composite', [ResNetLRP, GammaLRP, RelativeLRP])
@pytest.mark.parametrize('kind', KINDS)
def test_as_written_out(kind, composite):
    '''The map is that of the steps as a user writes them.'''
    model, x = reader(kind), sequences(1)
    _, expected = explain(Reader(Steps(model.layer)).double().eval(), x, composite())
    output, relevance = explain(model, x, composite())
    assert torch.allclose(output, model(x))
    assert torch.allclose(relevance, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_equation():
    '''Two steps of an LSTM with a single unit, by hand.'''
    layer = nn.LSTM(1, 1, batch_first=True, bias=False).double()
    with torch.no_grad():
        # rows of i, f, g and o
        layer.weight_ih_l0.copy_(torch.tensor([[.3], [-.4], [.8], [.1]]))
        layer.weight_hh_l0.copy_(torch.tensor([[-.2], [.5], [.6], [.7]]))

    class Output(nn.Module):
        '''The last output.'''
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            '''Of shape (batch, 1).'''
            return self.layer(x)[0][:, -1]

    first, second = torch.tensor([1.5, 2.]).double()
    i, f, g, o = layer.weight_ih_l0[:, 0] * first
    cell = i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    i, f, g, o = layer.weight_ih_l0[:, 0] * second + layer.weight_hh_l0[:, 0] * hidden
    kept, new = f.sigmoid() * cell, i.sigmoid() * g.tanh()
    share = new / (kept + new)
    part = .8 * second / (.8 * second + .6 * hidden)
    composite = ResNetLRP().context(Output())
    with composite as modified:
        x = torch.stack([first, second]).view(1, 2, 1).requires_grad_()
        relevance, = torch.autograd.grad(modified(x), x, torch.ones(1, 1).double())
    assert torch.allclose(relevance.flatten(), torch.stack([1 - share + share * (1 - part), share * part]))


@pytest.mark.parametrize('cell, kind', [(nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU), (nn.RNNCell, nn.RNN)])
def test_cells(cell, kind):
    '''Cells, which run one step, have the map of the layer.'''
    class Cells(nn.Module):
        '''A layer of one cell.'''
        def __init__(self, layer):
            super().__init__()
            self.cell = cell(4, 5)
            self.cell.load_state_dict({key.removesuffix('_l0'): elem for key, elem in layer.state_dict().items()})

        def forward(self, x):
            '''Outputs.'''
            state, outputs = None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs, 1), state

    layer, x = kind(4, 5, batch_first=True), sequences()
    _, expected = explain(Reader(layer).double().eval(), x, ResNetLRP())
    _, relevance = explain(Reader(Cells(layer)).double().eval(), x, ResNetLRP())
    assert torch.allclose(relevance, expected)


def test_keywords():
    '''Arguments of functions may be given by name.'''
    class Named(nn.Module):
        '''Two steps of a cell as a function.'''
        def __init__(self, function):
            super().__init__()
            torch.manual_seed(0)
            self.function, self.cell = function, nn.GRUCell(3, 4)

        def forward(self, x):
            '''Logits.'''
            state = x.new_zeros(len(x), 4)
            for step in x[:, :2].unbind(1):
                state = self.function(self.cell, step, state)
            return state

    x = sequences()
    _, expected = explain(Named(lambda cell, step, state: cell(step, state)).double().eval(), x, ResNetLRP())
    _, relevance = explain(Named(lambda cell, step, state: torch.gru_cell(
        step, hx=state, w_ih=cell.weight_ih, w_hh=cell.weight_hh, b_hh=cell.bias_hh, b_ih=cell.bias_ih,
    )).double().eval(), x, ResNetLRP())
    assert torch.equal(relevance, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_state_from_input(kind):
    '''A layer that starts from features of the input, and reads constants.'''
    class Captioner(nn.Module):
        '''Words of an image, in the order of time.'''
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.head = nn.Linear(15, 5), KINDS[kind](4, 5), nn.Linear(5, 4)
            self.register_buffer('words', torch.randn(3, 1, 4))

        def forward(self, x):
            '''Logits after three words.'''
            state = self.first(x.flatten(1)).relu()[None]
            state = (state, torch.zeros_like(state)) if kind == 'lstm' else state
            return self.head(self.layer(self.words.expand(-1, len(x), -1), state)[0][-1])

    torch.manual_seed(0)
    model, x = Captioner().double().eval(), sequences()
    output, relevance = explain(model, x, ResNetLRP())
    assert torch.equal(output, model(x))
    assert torch.allclose(relevance.sum((1, 2)), torch.ones(2).double())


@pytest.mark.parametrize('kind', KINDS)
def test_traced(kind):
    '''A graph of another batch.'''
    model, x = reader(kind), sequences(3)[:, :2]
    output, relevance = explain(model, x[:2], ResNetLRP())
    start = torch.eye(4).double()[[1, 2]]
    actual = trace(model, ResNetLRP(), x[2:])(x[:2], start)
    assert torch.equal(actual[0], output)
    assert torch.allclose(actual[1], relevance, atol=1e-12)


def test_packed():
    '''Packed sequences name the remedy, as do layers that drop out.'''
    model, x = reader('lstm', 'deep'), sequences()
    model.layer.dropout = .5
    model.layer.train()
    with pytest.raises(UnsupportedOperation, match=r'dropout.*model\.eval\(\)'):
        explain(model, x[:1], ResNetLRP())

    class Packed(nn.Module):
        '''An LSTM of packed sequences.'''
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            '''Logits.'''
            return self.head(self.layer(pack_padded_sequence(x, [5, 3], batch_first=True))[1][0][-1])

    with pytest.raises(UnsupportedOperation, match='pack'):
        explain(Packed().double().eval(), x, ResNetLRP())


@pytest.mark.parametrize('is_first', [False, True])
def test_padded(is_first):
    '''Sequences of two lengths, padded by PyTorch and by hand.'''
    def pad(x):
        output = pad_sequence([x[0, :2], x[1]], batch_first=is_first)
        return output if is_first else output.transpose(0, 1)

    class Padded(nn.Module):
        '''A sum over steps.'''
        def __init__(self, function):
            super().__init__()
            torch.manual_seed(0)
            self.function, self.first, self.head = function, nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x):
            '''Logits.'''
            return self.head(self.first(self.function(x)).relu().sum(1))

    x = sequences()
    _, expected = explain(
        Padded(lambda x: torch.stack([F.pad(x[0, :2], (0, 0, 0, 3)), x[1]])).double().eval(), x, ResNetLRP()
    )
    _, relevance = explain(Padded(pad).double().eval(), x, ResNetLRP())
    assert torch.allclose(relevance, expected)
    assert torch.allclose(relevance.sum((1, 2)), torch.ones(2).double())
