"""Thin entry point: the same as `python -m vitdist predict`."""

import sys

from vitdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
