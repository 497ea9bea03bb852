"""`vitdist sweep RECIPE key=v1,v2` and `vitdist sweep RECIPE --lr-range`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vitdist.errors import UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MAX_SEEDS, MAX_STEPS = 100, 100_000


def register(subparsers: Subparsers) -> None:
    """Add `sweep` to a command line."""
    parser = subparsers.add_parser("sweep", help="several runs of one recipe, or a learning-rate range test")
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=v1,v2", help="values to run with, every combination")
    parser.add_argument(
        "--seeds", type=int, default=0, metavar="K", help="each setting with K seeds, from the recipe's on"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the runs' folders go (the recipe's out + _sweep)"
    )
    parser.add_argument("--launcher", metavar="WORDS", help='such as "torchrun --nproc-per-node 2" (one process)')
    parser.add_argument("--lr-range", action="store_true", help="one short run whose learning rate rises to the end")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of the range test (100)")
    parser.add_argument("--lr-low", type=float, default=1e-6, metavar="LR", help="where it begins (1e-6)")
    parser.add_argument("--lr-high", type=float, default=1.0, metavar="LR", help="where it ends (1)")
    parser.set_defaults(function=sweep)


def sweep(args: argparse.Namespace) -> int:
    """Run the list, or the range test."""
    from vitdist.recipe.load import load_recipe
    from vitdist.recipe.shipped import find_recipe
    from vitdist.sweep.grid import settings_of, values_of

    file = find_recipe(args.recipe)
    fixed = [text for text in args.overrides if len(values_of(text)) == 1]
    recipe = load_recipe(file, fixed)
    folder = args.out or Path(f"{recipe.out}_sweep")
    if args.lr_range:
        return _range(args, file, folder)
    if not 0 <= args.seeds <= MAX_SEEDS:
        raise UsageError(f"--seeds {args.seeds}: give a number from 1 to {MAX_SEEDS}, or leave it out")
    settings = settings_of(args.overrides, range(recipe.seed, recipe.seed + args.seeds))
    from vitdist.sweep.runs import Runner, prepare
    from vitdist.sweep.table import side_by_side

    runs = prepare(file, settings, folder, args.launcher)
    code = Runner().all(runs)
    print(side_by_side(runs))
    return code


def _range(args: argparse.Namespace, file: Path, folder: Path) -> int:
    from vitdist.sweep.grid import values_of
    from vitdist.sweep.lr_range import Wish, lr_range

    listed = next((text for text in args.overrides if len(values_of(text)) > 1), None)
    if listed is not None or args.seeds or args.launcher:
        what = listed or ("--seeds" if args.seeds else "--launcher")
        raise UsageError(f"--lr-range is one run on one device; leave out {what}")
    if not 10 <= args.steps <= MAX_STEPS or not 0 < args.lr_low < args.lr_high < float("inf"):
        raise UsageError(f"--lr-range wants 10 to {MAX_STEPS:,} --steps, and 0 < --lr-low < --lr-high")
    print(lr_range(file, args.overrides, folder, Wish(args.steps, args.lr_low, args.lr_high)))
    return 0
