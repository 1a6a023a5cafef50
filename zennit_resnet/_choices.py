'''What options may be, and the grammar of lists: all that a command line needs before it runs a command.'''
# What relevance starts from, and what a target is compared with
VALUES = ('logit', 'softmax', 'one')
CONTRASTS = ('centred', 'softmax', 'runner_up')

INPUT_X_GRADIENT = 'input_x_gradient'
# Zennit's canonizer merges batch normalization, and splits relevance in proportion to the signed addends
SPLITTING = ('ratio', 'symmetric', 'zennit')
POSTPROCESSING = ('quantize', 'c1c', 'c3')
LEVELS = 8
# more than the colors of a picture can show
MAX_LEVELS = 65536


def split_names(text):
    '''Split names of methods at commas, except within the options of a method, and leave out empty ones.'''
    parts = []
    for part in text.split(','):
        is_option = '=' in part and ':' not in part.partition('=')[0]
        if parts and is_option and ':' in parts[-1] and '+' not in parts[-1]:
            parts[-1] += f',{part}'
        else:
            parts.append(part)
    return [part.strip() for part in parts if part.strip()]
