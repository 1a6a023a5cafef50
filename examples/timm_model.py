'''A network of timm: what relevance sums to, and a heatmap.

    python examples/timm_model.py photo.jpg seresnet50.a1_in1k model.safetensors

Without weights they are random, which needs no download, and explains nothing: only the sums are of interest then.
'''
import sys
from pathlib import Path

import timm
from PIL import Image
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.image import draw_heatmap, read_image
from zennit_resnet.postprocess import sum_channels

PHOTO = Path(__file__).parent / 'assets' / 'photos' / 'gc_cathedral.jpg'


def main(photo=PHOTO, name='seresnext26t_32x4d', weights='', out='timm_model.png'):
    '''Explain the predicted class of a photograph.'''
    model = timm.create_model(name, checkpoint_path=str(weights)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = transform(read_image(photo))[None]
    target = model(image).argmax(1)
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        output, relevance = attributor(image, initial_relevance(target))
        operations = [name for name, module in model.named_modules() if name.rpartition('.')[2].startswith('addition')]
    print(f'class {int(target)}: logit {output[0, target].item():.5f}, sum of relevance {relevance.sum():.5f}')
    print(f'{len(operations)} additions: {", ".join(operations[:3])}, ...')
    # all of z+ relevance has the sign of the logit
    Image.fromarray(draw_heatmap(sum_channels(relevance.abs())[0].numpy())).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    main(*sys.argv[1:])
