"""`vitdist plan RECIPE`: what a run will be on so many nodes, without any of them."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from vitdist.errors import UsageError
from vitdist.recipe import sizes

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MAX_WORLD = 100_000


def register(subparsers: Subparsers) -> None:
    """Add `plan` to a command line."""
    parser = subparsers.add_parser("plan", help="batches, steps, bytes and memory of a run; no GPU needed")
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="G", help="ranks on each (1)")
    parser.add_argument("--gpu-memory", metavar="80GB", help="of one device: says what fits and what would")
    parser.add_argument("--disk-rate", metavar="500MB", help="bytes a second that the run folder's disk takes")
    parser.add_argument(
        "--simulate", type=int, metavar="W", help="hold the order of samples of W ranks against the plan"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="instead of the recipe's data: so many samples")
    parser.add_argument("--shards", type=int, metavar="S", help="with --samples: in so many shards")
    parser.set_defaults(function=plan)


def plan(args: argparse.Namespace) -> int:
    """Print the plan of a recipe, or hold W ranks' plans against each other."""
    from vitdist.recipe.load import load_recipe
    from vitdist.recipe.shipped import find_recipe

    memory, rate = (_size(name, getattr(args, name)) for name in ("gpu_memory", "disk_rate"))
    for name in ("nodes", "gpus_per_node", "simulate"):
        _check_count(name, getattr(args, name))
    if args.shards is not None and args.samples is None:
        raise UsageError("--shards says how --samples are packed; give --samples too, or leave it out")
    recipe = load_recipe(find_recipe(args.recipe), args.overrides)
    from vitdist.sizing import report
    from vitdist.sizing.source import source_of

    source = source_of(recipe, args.samples, args.shards)
    if args.simulate is not None:
        started = time.perf_counter()
        text, broken = report.simulated(recipe, source, args.simulate)
        print(f"{text}\n{time.perf_counter() - started:.1f} s")
        return 1 if broken else 0
    print(report.planned(recipe, source, nodes=args.nodes, per_node=args.gpus_per_node, memory=memory, rate=rate))
    return 0


def _size(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return sizes.num_bytes(text)
    except ValueError as error:
        raise UsageError(f"--{name.replace('_', '-')} {text!r} {error}; write a size like 80GB or 80GiB") from None


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= MAX_WORLD:
        raise UsageError(f"--{name.replace('_', '-')} {value}: give a number from 1 to {MAX_WORLD:,}")
