"""Thin entry point: the same as `python -m vitdist train`."""

import sys

from vitdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
