"""Command line: `python -m captum_adapters`."""

from captum_adapters.cli import main

if __name__ == "__main__":
    main(prog_name="python -m captum_adapters")
