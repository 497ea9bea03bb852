"""`vitdist bench plan|data|train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Add `bench` and its commands to a command line."""
    parser = subparsers.add_parser("bench", help="measure plan, input and step on this machine")
    commands = parser.add_subparsers(required=True, metavar="ACTION")
    _add_plan(commands)


def _add_plan(commands: Subparsers) -> None:
    parser = commands.add_parser("plan", help="time and memory of planning at scale")
    parser.add_argument("--samples", type=int, default=100_000_000, metavar="N")
    parser.add_argument("--shards", type=int, default=100_000, metavar="S")
    parser.add_argument("--world", type=int, default=1024, metavar="W", help="ranks")
    parser.set_defaults(function=plan)


def plan(args: argparse.Namespace) -> int:
    """Plan a few steps of a few ranks of a set that need not exist."""
    from vitdist.bench.plan import measure_plan, table

    print(f"{args.samples:,} samples in {args.shards:,} shards, {args.world:,} ranks")
    print(table(measure_plan(args.samples, args.shards, args.world)))
    return 0
