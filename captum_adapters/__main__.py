"""Command line: `python -m captum_adapters`."""

import sys

try:
    from captum_adapters.cli import main
    from zennit_resnet.cli.group import start
except ImportError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def run() -> None:
    """Run the program `captum-adapters`."""
    start(main)


if __name__ == "__main__":
    start(main, prog_name="python -m captum_adapters")
