'''The state of networks and of the process, and threads which change it.'''
import io
import threading

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


def state_of(model):
    '''All that must be as it was.'''
    return [
        (name, module, {key: id(value) for key, value in module._parameters.items()},
         {key: id(value) for key, value in module._buffers.items()}, dict(module._modules), module.training,
         sorted(vars(module)), *(list(getattr(module, key)) for key in (
             '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
         )), [(elem.requires_grad, elem.grad) for elem in module._parameters.values() if elem is not None])
        for name, module in model.named_modules()
    ], {key: value.clone() for key, value in model.state_dict().items()}


def assert_state(model, state):
    '''Everything is as it was.'''
    now = state_of(model)
    assert now[0] == state[0]
    assert list(now[1]) == list(state[1]) and all(torch.equal(now[1][key], state[1][key]) for key in now[1])


def in_threads(*functions):
    '''Run functions in threads at the same time, and get their results or errors.'''
    results, barrier = [None] * len(functions), threading.Barrier(len(functions))

    def run(num, function):
        barrier.wait()
        try:
            results[num] = function()
        except Exception as error:  # pylint: disable=broad-except
            results[num] = error

    threads = [threading.Thread(target=run, args=elem) for elem in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def resident():
    '''Resident memory of the process in MB.'''
    with open('/proc/self/statm', encoding='utf-8') as file:
        return int(file.read().split()[1]) * 4096 / 2 ** 20
