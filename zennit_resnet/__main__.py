'''Run the command line with ``python -m zennit_resnet``.'''
from .cli import main
from .cli.group import start


def run():
    '''Run the program ``zennit-resnet``.'''
    start(main)


if __name__ == '__main__':
    start(main, prog_name='python -m zennit_resnet')
