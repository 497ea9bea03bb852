"""`vitdist doctor` and `vitdist fetch`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vitdist.errors import ResourceError, UsageError
from vitdist.runtime.ranks import Ranks, discover

if TYPE_CHECKING:
    from vitdist.doctor.findings import Finding
    from vitdist.recipe.schema import Recipe

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Add `doctor` and `fetch` to a command line."""
    parser = subparsers.add_parser("doctor", help="look at this machine or allocation before a run meets it")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="also what this recipe asks for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument("--slurm", action="store_true", help="also what ranks are together; under srun or alone")
    parser.add_argument("--resume", action="store_true", help="train, interrupt and resume here: is it identical?")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --resume: processes (one a GPU, else 1)")
    parser.add_argument("--steps", default="4,4", metavar="K,M", help="with --resume: before and after (4,4)")
    parser.set_defaults(function=doctor)
    fetching = subparsers.add_parser("fetch", help="bring the weights that a recipe names, for nodes without internet")
    fetching.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    fetching.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    fetching.set_defaults(function=fetch)


def fetch(args: argparse.Namespace) -> int:
    """Fetch, verify, and say where they are."""
    from vitdist.recipe.load import load_recipe
    from vitdist.recipe.shipped import find_recipe

    recipe = load_recipe(find_recipe(args.recipe), args.overrides)
    from vitdist.doctor.weights import fetch_weights

    print(fetch_weights(recipe))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """0, or 7 when something needs a mend."""
    if args.resume:
        return _resume(args)
    recipe = _recipe(args)
    # looking must not download; and timm reads this when it is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    ranks = discover()
    if ranks.world > 1:
        return _on_all_ranks(recipe, ranks)
    from vitdist.doctor.findings import show

    return _answer(show(_alone(recipe, between=args.slurm)))


def _recipe(args: argparse.Namespace) -> Recipe | None:
    from vitdist.recipe.load import load_recipe
    from vitdist.recipe.shipped import find_recipe

    return None if args.recipe is None else load_recipe(find_recipe(args.recipe), args.overrides)


def _resume(args: argparse.Namespace) -> int:
    if args.recipe is None:
        raise UsageError("--resume trains a recipe: vitdist doctor RECIPE --resume")
    words = args.steps.split(",")
    if len(words) != 2 or not all(word.isdigit() and 0 < int(word) <= 10_000 for word in words):
        raise UsageError(f"--steps is {args.steps!r}; give two numbers of steps: 4,4")
    from torch.cuda import device_count

    from vitdist.doctor.resume import check_resume

    ranks = args.ranks if args.ranks is not None else max(1, device_count())
    if ranks < 1:
        raise UsageError(f"--ranks is {ranks}; at least one process trains")
    print(check_resume(args.recipe, args.overrides, ranks=ranks, steps=(int(words[0]), int(words[1]))))
    return 0


def _alone(recipe: Recipe | None, *, between: bool) -> Iterator[Finding]:
    from vitdist.doctor import machine

    yield machine.software()
    yield from _host()
    yield from _once(recipe, world=1, local_world=1)
    if between:
        from vitdist.doctor.together import between_local_ranks

        yield between_local_ranks()


def _host() -> Iterator[Finding]:
    """What each host is asked for itself."""
    from vitdist.doctor import machine

    yield from machine.devices()
    yield machine.cores()
    yield machine.shared_memory()
    yield from machine.network()


def _once(recipe: Recipe | None, world: int, local_world: int) -> Iterator[Finding]:
    """What is the same for all ranks."""
    from vitdist.doctor.disk import disk

    yield from disk(Path(recipe.out if recipe is not None else "."))
    if recipe is not None:
        from vitdist.doctor.wishes import wishes

        yield from wishes(recipe, world, local_world)


def _on_all_ranks(recipe: Recipe | None, ranks: Ranks) -> int:
    """Rank 0 speaks for all. Collective."""
    import socket

    from vitdist.doctor import machine, together
    from vitdist.doctor.findings import Finding, show

    own = [asdict(finding) for finding in _host()] if ranks.local_rank == 0 else []
    engine = together.meet()
    heard = engine.gather_json({"host": socket.gethostname(), "findings": own})
    places, measured = together.places(engine), together.measure(engine)
    num_bad = 0
    if engine.is_main:
        found = [
            Finding(f["topic"], f"{said['host']}: {f['text']}", f["mend"]) for said in heard for f in said["findings"]
        ]
        num_bad = show([machine.software(), *found, *together.by_host(places), together.bandwidth(measured)])
        num_bad += show(_once(recipe, ranks.world, ranks.local_world))
    num_bad = engine.from_main(num_bad)
    engine.close()
    return _answer(num_bad, speak=ranks.is_main)


def _answer(num_bad: int, *, speak: bool = True) -> int:
    if num_bad and speak:
        print(f"{num_bad} finding{'s' * (num_bad > 1)} to mend")
    return ResourceError.exit_code if num_bad else 0
