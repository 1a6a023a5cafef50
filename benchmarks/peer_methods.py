'''Attribution methods of other libraries behind one interface, as their own documentation says to use them.

``METHODS`` has them by their names in tables. What they need is installed by

    pip install captum grad-cam==1.5.7 torchcam lxt==2.1 'transformers<5'

where LXT does not import with transformers 5. DynamicLRP has no package, see :func:`add_dynamic_lrp`.
'''
import copy
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

CONVOLUTIONAL, TRANSFORMER = 'convolutional', 'transformer'
CNN, ALL = frozenset((CONVOLUTIONAL,)), frozenset((CONVOLUTIONAL, TRANSFORMER))
ZENNIT = metadata.version('zennit')


class Peer(NamedTuple):
    '''A method of a library.

    Attributes
    ----------
    create: callable
        From a model, which the method may change, and a classifier to ``explain``: a function of normalized images of
        shape (N, 3, height, width) and classes of shape (N,) that returns relevance of shape (N, 3, height, width), or
        (N, height, width) from methods with one value per pixel. The classifier has ``bounds()`` (normalized black and
        white), ``cam_layer`` (a module of the model) and ``forward_batch``.
    sums_to: str, optional
        What the relevance of an image is supposed to sum to: ``'logit'``, ``'one'``, or ``'difference to baseline'``
        (of the logit, to that of zeros).
    needs: str
        The module that has to be there.
    kinds: frozenset[str]
        Networks that it is made for.
    '''
    create: Callable
    sums_to: Optional[str]
    needs: str
    kinds: frozenset


def available(names, kind):
    '''Methods whose modules are installed, and which are made for that kind of network, by name.

    What is missing is said on stderr. A ValueError is raised if there is no such method.
    '''
    found = {}
    for name in names:
        if name not in METHODS:
            raise ValueError(f'there is no method {name!r}, only {", ".join(METHODS)}')
        peer = METHODS[name]
        if find_spec(peer.needs) is None:
            print(f'{name}: left out, as the module {peer.needs} is not installed', file=sys.stderr)
        elif kind in peer.kinds:
            found[name] = peer
    return found


# -- Zennit ------------------------------------------------------------------------------------------------------------

def _zennit(model, classifier, composite):
    '''A composite of Zennit, with the canonizer that Zennit has for the network.'''
    from torchvision.models import VGG, ResNet
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    kind = ResNetCanonizer if isinstance(model, ResNet) else VGGCanonizer if isinstance(model, VGG) else None
    # others get what the canonizers of torchvision's networks begin with
    canonizers = [kind() if kind else SequentialMergeBatchNorm()]
    options = {}
    if composite == 'EpsilonGammaBox':
        options['low'], options['high'] = classifier.bounds()
    made = getattr(import_module('zennit.composites'), composite)(canonizers=canonizers, **options)

    def explain(images, targets):
        with Gradient(model=model, composite=made) as attributor:
            # from the logit: started from one, epsilon at the classifier turns maps of negative logits over
            return attributor(images.clone(), lambda output: output * F.one_hot(targets, output.shape[1]))[1]

    return explain


# -- Captum ------------------------------------------------------------------------------------------------------------

def _captum(model, classifier, name, **options):
    '''A method of Captum's that needs nothing but the network.'''
    method = getattr(import_module('captum.attr'), name)(model)
    return lambda images, targets: method.attribute(images.clone().requires_grad_(), target=targets, **options)


def _integrated_gradients(model, classifier, n_steps=20):
    '''Integrated gradients from zeros, the default of Captum.'''
    size = classifier.forward_batch
    return lambda images, targets: import_module('captum.attr').IntegratedGradients(model).attribute(
        images, target=targets, n_steps=n_steps, internal_batch_size=max(size, len(images))
    )


def _guided_grad_cam(model, classifier):
    '''Guided backpropagation times Grad-CAM.'''
    method = import_module('captum.attr').GuidedGradCam(model, classifier.cam_layer)
    return lambda images, targets: method.attribute(images.clone().requires_grad_(), target=targets)


def separate_relus(model):
    '''A copy of a network in which every call of a ReLU is a module of its own, and not in place.

    DeepLift needs this: its hooks know modules only, and keep one input for each. ``torch.fx`` has to trace the model.
    '''
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    modules, functions = dict(traced.named_modules()), (F.relu, F.relu_, torch.relu, torch.relu_)
    for num, node in enumerate(traced.graph.nodes):
        is_module = node.op == 'call_module' and isinstance(modules[node.target], torch.nn.ReLU)
        is_method = node.op == 'call_method' and node.target in ('relu', 'relu_')
        if is_module or is_method or node.op == 'call_function' and node.target in functions:
            name = f'separate_relu_{num}'
            traced.add_submodule(name, torch.nn.ReLU())
            node.op, node.target, node.args, node.kwargs = 'call_module', name, node.args[:1], {}
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.train(model.training)


def _deep_lift(model, classifier):
    '''DeepLift from zeros, the default of Captum, of a network with separate ReLUs.'''
    return _captum(separate_relus(model), classifier, 'DeepLift')


# -- class activation maps ---------------------------------------------------------------------------------------------

def _grad_cam(model, classifier, name):
    '''A method of pytorch-grad-cam, which normalizes each map to values from zero to one.'''
    from pytorch_grad_cam.utils import model_targets
    method = getattr(import_module('pytorch_grad_cam'), name)

    def explain(images, targets):
        asked = [model_targets.ClassifierOutputTarget(target) for target in targets.tolist()]
        with method(model=model, target_layers=[classifier.cam_layer]) as cam:
            return torch.from_numpy(cam(input_tensor=images, targets=asked)).to(images)

    return explain


def _finer_cam(model, classifier, alpha=1., count=3):
    '''FinerCAM beside the classes with the most similar logits.

    Its own choice of them is for the largest logit, or for one class in the whole batch. So the same choice is made
    here for each image. With plain targets it would be Grad-CAM.
    '''
    from pytorch_grad_cam import FinerCAM
    from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget

    def explain(images, targets):
        with torch.no_grad():
            logits = model(images)
        distance = (logits - logits.gather(1, targets[:, None])).abs().scatter(1, targets[:, None], -1)
        others = distance.argsort(1)[:, 1:count + 1].tolist()
        asked = [FinerWeightedTarget(*each, alpha) for each in zip(targets.tolist(), others)]
        with FinerCAM(model=model, target_layers=[classifier.cam_layer]) as cam:
            return torch.from_numpy(cam(input_tensor=images, targets=asked)).to(images)

    return explain


def _score_cam(model, classifier):
    '''Score-CAM of torch-cam.'''
    from torchcam.methods import ScoreCAM
    size = classifier.forward_batch

    def explain(images, targets):
        with torch.no_grad(), ScoreCAM(model, classifier.cam_layer, batch_size=size) as cam:
            model(images)
            maps, = cam(targets.tolist())
        return F.interpolate(maps[:, None], images.shape[2:], mode='bilinear', align_corners=False)[:, 0]

    return explain


# -- others ------------------------------------------------------------------------------------------------------------

def _rise(model, classifier, count=1000):
    '''RISE of this project.'''
    from captum_adapters.attr import RISE
    size = classifier.forward_batch
    return lambda images, targets: RISE(model).attribute(
        images, targets, n_masks=count, perturbations_per_eval=size
    )[:, 0]


@contextmanager
def _as_it_was(*classes):
    '''Take back at the end what is patched in classes, which LXT has no function for.'''
    before = [dict(vars(each)) for each in classes]
    try:
        yield
    finally:
        for each, attributes in zip(classes, before):
            for key in vars(each).keys() - attributes.keys():
                delattr(each, key)
            for key, value in attributes.items():
                if vars(each)[key] is not value:
                    setattr(each, key, value)


def lxt(model, classifier, gamma=None):
    '''LXT for torchvision's transformers: gradient times input with patched classes, gamma rules by patched Zennit.'''
    from lxt.efficient import monkey_patch, monkey_patch_zennit
    from torchvision.models import vision_transformer
    from zennit.composites import LayerMapComposite
    from zennit.core import BasicHook
    from zennit.rules import Gamma

    def explain(images, targets):
        images = images.clone().requires_grad_()
        with _as_it_was(torch.nn.GELU, torch.nn.LayerNorm, torch.nn.MultiheadAttention, BasicHook):
            monkey_patch(vision_transformer)
            composite = None
            if gamma:
                monkey_patch_zennit()
                composite = LayerMapComposite([
                    (torch.nn.Conv2d, Gamma(gamma[0])), (torch.nn.Linear, Gamma(gamma[1])),
                ])
                composite.register(model)
            try:
                logits = model(images).gather(1, targets[:, None])
                gradient, = torch.autograd.grad(logits.sum(), images)
            finally:
                if composite:
                    composite.remove()
        return images.detach() * gradient

    return explain


def add_dynamic_lrp(path):
    '''Add DynamicLRP, given a checkout of https://github.com/keeinlev/dynamicLRP.

    It needs the packages einops and transformers, and no change for PyTorch 2.14. Batch normalization before an
    addition stops it in evaluation mode: networks are given as a copy with batch normalization merged by ``torch.fx``.
    Relevance starts with the logit; rules are those of its experiment on a VGG-16 (gamma 125 for convolutions), as its
    default fails for strides. Errors of its first pass are returned by the library, and raised here.
    '''
    folder = Path(path) / 'src'
    if not (folder / 'lrp_engine' / 'lrp.py').is_file():
        raise ValueError(f'{path} is no checkout of DynamicLRP: there is no src/lrp_engine/lrp.py')
    sys.path.append(str(folder))
    METHODS['DynamicLRP'] = Peer(_dynamic_lrp, 'logit', 'lrp_engine', ALL)


def _dynamic_lrp(model, classifier):
    '''DynamicLRP.'''
    from lrp_engine.lrp import LRPEngine
    from torch.fx.experimental.optimization import fuse

    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        # biases that it adds have no gradients, which the engine takes for missing ones
        model = fuse(model).requires_grad_(True)

    def explain(images, targets):
        images = images.clone().requires_grad_()
        output = model(images)
        engine = LRPEngine(
            params_to_interpret=[images], use_gamma=(True, False), conv_gamma=125., dtype=images.dtype,
            # its own start is wrong for batches, and turns maps of negative logits over, as one does
            starting_relevance=output.detach() * F.one_hot(targets, output.shape[1]),
        )
        found = engine.run(output)
        if len(found) != 2:
            raise found[-1] if isinstance(found[-1], Exception) else RuntimeError('no node is left to go on with')
        return found[1][0]

    return explain


METHODS = {
    **{
        f'Zennit {ZENNIT} {name}': Peer(partial(_zennit, composite=name), 'logit', 'zennit', CNN)
        for name in ('EpsilonPlus', 'EpsilonPlusFlat', 'EpsilonGammaBox')
    },
    'Captum LRP': Peer(partial(_captum, name='LRP'), 'logit', 'captum', ALL),
    'Captum Input x Gradient': Peer(partial(_captum, name='InputXGradient'), None, 'captum', ALL),
    'Captum Integrated Gradients': Peer(_integrated_gradients, 'difference to baseline', 'captum', ALL),
    'Captum Guided Backprop': Peer(partial(_captum, name='GuidedBackprop'), None, 'captum', CNN),
    'Captum Guided Grad-CAM': Peer(_guided_grad_cam, None, 'captum', CNN),
    'Captum DeepLift': Peer(partial(_captum, name='DeepLift'), 'difference to baseline', 'captum', ALL),
    'Captum DeepLift, ReLUs apart': Peer(_deep_lift, 'difference to baseline', 'captum', CNN),
    **{
        f'grad-cam {name}': Peer(partial(_grad_cam, name=name), None, 'pytorch_grad_cam', CNN)
        for name in ('GradCAM', 'GradCAMPlusPlus', 'LayerCAM')
    },
    'grad-cam FinerCAM': Peer(_finer_cam, None, 'pytorch_grad_cam', CNN),
    # the same for all classes
    'grad-cam EigenCAM': Peer(partial(_grad_cam, name='EigenCAM'), None, 'pytorch_grad_cam', CNN),
    'torch-cam ScoreCAM': Peer(_score_cam, None, 'torchcam', CNN),
    'RISE': Peer(_rise, None, 'captum_adapters', ALL),
    # patches classes of torch.nn, and with gamma of Zennit, for the whole process; taken back here
    'LXT': Peer(lxt, 'logit', 'lxt', frozenset((TRANSFORMER,))),
    'LXT, gamma': Peer(partial(lxt, gamma=(.25, .05)), 'logit', 'lxt', frozenset((TRANSFORMER,))),
}
