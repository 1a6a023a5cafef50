"""Command line: `python -m captum_adapters`."""

import sys

try:
    from captum_adapters.cli import main
except ImportError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main(prog_name="python -m captum_adapters")
