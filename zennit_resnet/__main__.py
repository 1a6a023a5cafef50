'''Run the command line with ``python -m zennit_resnet``.'''
from .cli import main

if __name__ == '__main__':
    main(prog_name='python -m zennit_resnet')
