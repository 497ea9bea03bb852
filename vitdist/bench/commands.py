"""`vitdist bench plan|data|train|step`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Add `bench` and its commands to a command line."""
    parser = subparsers.add_parser("bench", help="measure plan, input and step on this machine")
    commands = parser.add_subparsers(required=True, metavar="ACTION")
    _add_plan(commands)
    _add_data(commands)
    _add_train(commands)
    _add_step(commands)


def _add_plan(commands: Subparsers) -> None:
    parser = commands.add_parser("plan", help="time and memory of planning at scale")
    parser.add_argument("--samples", type=int, default=100_000_000, metavar="N")
    parser.add_argument("--shards", type=int, default=100_000, metavar="S")
    parser.add_argument("--world", type=int, default=1024, metavar="W", help="ranks")
    parser.set_defaults(function=plan)


def _add_data(commands: Subparsers) -> None:
    parser = commands.add_parser("data", help="images a second of one core, beside the usual pipelines")
    _takes_recipe(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds (5)")
    parser.add_argument("--alone", action="store_true", help="only this toolkit's own input")
    parser.add_argument("--profile", action="store_true", help="then where the time goes, by function")
    parser.set_defaults(function=data)


def _add_train(commands: Subparsers) -> None:
    parser = commands.add_parser("train", help="the step alone, the input alone, both, and the waiting; one rank")
    _takes_recipe(parser)
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps a round (10)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved rounds (3)")
    parser.set_defaults(function=train)


def _add_step(commands: Subparsers) -> None:
    parser = commands.add_parser("step", help="the training step beside a bare loop and the step of timm's script")
    _takes_recipe(parser)
    parser.add_argument("--variants", default="fp32,bf16,bf16+compile", metavar="LIST", help="(fp32,bf16,bf16+compile)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps a round (10)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds (5)")
    parser.set_defaults(function=step)


def _takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")


def step(args: argparse.Namespace) -> int:
    """Measure each variant in a process of its own: what one leaves on a device must not weigh on the next."""
    variants = args.variants.split(",")
    if len(variants) > 1:
        own = [sys.executable, "-m", "vitdist", "bench", "step", args.recipe, *args.overrides]
        counts = ["--steps", str(args.steps), "--rounds", str(args.rounds)]
        return max(subprocess.run([*own, *counts, "--variants", variant]).returncode for variant in variants)
    from vitdist.bench.step import measure_step

    with tempfile.TemporaryDirectory() as folder:
        wish = (args.recipe, args.overrides, variants[0], Path(folder))
        print(measure_step(*wish, num_steps=args.steps, num_rounds=args.rounds).table(), flush=True)
    return 0


def train(args: argparse.Namespace) -> int:
    """Measure what the input costs the step of a recipe, with untrained weights."""
    from vitdist.bench.inputs import inputs_of
    from vitdist.bench.train import measure_train

    print(measure_train(inputs_of(args.recipe, args.overrides), num_steps=args.steps, num_rounds=args.rounds))
    return 0


def data(args: argparse.Namespace) -> int:
    """Measure the input of a recipe's photographs, of all splits together; the model is not built."""
    from vitdist.bench.inputs import inputs_of
    from vitdist.bench.report import input_report

    for part in input_report(inputs_of(args.recipe, args.overrides), args.rounds, args.alone, args.profile):
        print(part, flush=True)
    return 0


def plan(args: argparse.Namespace) -> int:
    """Plan a few steps of a few ranks of a set that need not exist."""
    from vitdist.bench.plan import measure_plan, table

    figures = measure_plan(args.samples, args.shards, args.world)
    print(f"{args.samples:,} samples in {args.shards:,} shards, {args.world:,} ranks")
    print(table(figures))
    return 0
