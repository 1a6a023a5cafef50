'''The state of networks and of the process, and threads which change it.'''
import threading

import torch


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
