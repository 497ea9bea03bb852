"""`python -m vitdist`: the same as the `vitdist` command, with train, evaluate and predict."""

from __future__ import annotations

import sys

from vitdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
