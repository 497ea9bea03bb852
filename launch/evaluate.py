"""Thin entry point: the same as `python -m vitdist evaluate`."""

import sys

from vitdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
