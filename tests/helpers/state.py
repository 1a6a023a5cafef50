'''The state of a network, which nothing may change.'''
import io

import torch


def assert_global_state():
    '''No mode of PyTorch is left behind.'''
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.is_autocast_enabled('cpu')


class Snapshot:
    '''All there is to a model: identities, values, orders, flags and hooks.'''
    def __init__(self, model):
        self.model = model
        self.state = self.describe()
        self.values = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.keys = list(self.values)
        self.buffer = io.BytesIO()
        torch.save(model.state_dict(), self.buffer)

    def describe(self):
        '''Flat list of paths and the objects to be found there.'''
        result = []
        for name, module in self.model.named_modules():
            result.append(((name,), module))
            for key, value in module.__dict__.items():
                result.append(((name, key), value))
                if isinstance(value, dict):
                    result.extend(((name, key, inner), elem) for inner, elem in value.items())
        result.extend(
            ((name, 'requires_grad'), param.requires_grad) for name, param in self.model.named_parameters()
        )
        result.extend(((name, 'grad'), param.grad) for name, param in self.model.named_parameters())
        result.extend(((name, 'type'), type(param)) for name, param in self.model.named_parameters())
        return result

    def check(self):
        '''Compare the model with how it was.'''
        state = self.describe()
        assert [path for path, _ in state] == [path for path, _ in self.state]
        for (path, value), (_, former) in zip(state, self.state):
            assert value is former or (isinstance(value, (int, float, str, tuple, bool)) and value == former), path
        assert list(self.model.state_dict()) == self.keys
        for key, value in self.model.state_dict().items():
            assert value.dtype == self.values[key].dtype and torch.equal(value, self.values[key]), key
        self.buffer.seek(0)
        self.model.load_state_dict(torch.load(self.buffer, weights_only=True), strict=True)
        assert_global_state()
