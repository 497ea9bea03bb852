"""`vitdist checkpoint list|verify|export`: what a run has kept, whether it is sound, the weights alone. No torch."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vitdist.checkpoint.manifest import MANIFEST, read_manifest, seal, verify
from vitdist.checkpoint.store import FOLDER, Store, find_checkpoint, neither
from vitdist.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# what is needed to use a model, as opposed to going on training it
USED = ("model.safetensors", "recipe.yaml", "taxonomy.json", "preprocessing.json")


def register(subparsers: Subparsers) -> None:
    """Add `checkpoint` and its commands to a command line."""
    parser = subparsers.add_parser("checkpoint", help="list, verify and export checkpoints")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="what a run has kept, oldest first")
    listing.add_argument("run", type=Path, metavar="RUN")
    listing.set_defaults(function=list_checkpoints)
    verifying = commands.add_parser(
        "verify", help="read every byte of a run's checkpoints, or of one; exit code 3 on damage"
    )
    verifying.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    verifying.set_defaults(function=verify_checkpoints)
    exporting = commands.add_parser("export", help="copy what using the model needs, without the state of its training")
    exporting.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    exporting.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    exporting.set_defaults(function=export)


def list_checkpoints(args: argparse.Namespace) -> int:
    """One line a checkpoint: step, size, age, and what points to it. Nothing is read but manifests."""
    store = Store(args.run)
    published = _published(store, args.run)
    names = {store.pointed(name): name for name in ("last", "best")}
    both = store.pointed("last") == store.pointed("best")
    for step, path in published:
        size = sum(file.lstat().st_size for file in path.iterdir()) / 1e6
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        pointer = "last, best" if both and path in names else names.get(path, "")
        print(f"{path.name}  step {step}  {size:.1f} MB  {age}  {pointer}".rstrip())
    for path in sorted(store.folder.glob("aside_*")):
        print(f"{path.name}  set aside; delete it when nothing in it is wanted")
    return 0


def verify_checkpoints(args: argparse.Namespace) -> int:
    """Every problem, one a line."""
    if not (args.path / MANIFEST).exists() and not (args.path / FOLDER).is_dir():
        raise neither(args.path)
    if (args.path / MANIFEST).exists():
        found: list[tuple[int | None, Path]] = [(None, args.path)]
    else:
        found = [(step, path) for step, path in _published(Store(args.path), args.path)]
    num_damaged = 0
    for step, path in found:
        problems = verify(path, step=step)
        num_damaged += bool(problems)
        for problem in problems:
            print(f"{path}: {problem}")
        if not problems:
            print(f"{path}: sound")
    if num_damaged:
        raise CheckpointError(f"{num_damaged} of {len(found)} checkpoints are damaged; a resume passes them over")
    return 0


def export(args: argparse.Namespace) -> int:
    """The weights, recipe, tree and preprocessing of a checkpoint, under a manifest of their own, verified."""
    source = find_checkpoint(args.path)
    if args.out.exists():
        raise UsageError(f"{args.out} is there already; name a folder that is not")
    manifest = read_manifest(source)
    about = {key: value for key, value in manifest.items() if key not in ("format", "step", "files")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stage = args.out.with_name(f".{args.out.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        for name in USED:
            shutil.copyfile(source / name, stage / name)
        seal(stage, manifest["step"], about)
        problems = verify(stage, step=manifest["step"])
        if problems:
            raise CheckpointError(f"{args.out} did not read back as written: {problems[0]}")
        stage.rename(args.out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    print(f"{source} exported to {args.out}: vitdist predict {args.out} IMAGES... and model.weights={args.out} take it")
    return 0


def _published(store: Store, run: Path) -> list[tuple[int, Path]]:
    published = store.published()
    if not published:
        raise CheckpointError(f"{run} has no checkpoints (a run folder has them in {FOLDER}/)")
    return published
