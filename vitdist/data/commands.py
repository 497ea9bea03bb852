"""`vitdist data ...`: sources to shards, foreign shards to an index, and the check of what lies on disk."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitdist.data.index import INDEX_NAME, DatasetIndex, load_index
from vitdist.errors import DataError, UsageError

Progress = Callable[[int, int], None]


def register(subparsers: Any) -> None:
    """Add the `data` command; each action sets `function(options) -> exit code`."""
    from vitdist.data.table_command import add_table

    data = subparsers.add_parser("data", help="make, index and verify packed data sets")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_cub(actions)
    _add_folder(actions)
    _add_demo(actions)
    _add_index(actions)
    add_table(actions)
    verify = actions.add_parser("verify", help="read every shard, member and hash of a packed set")
    verify.add_argument("path", metavar="PATH")
    verify.set_defaults(function=run_verify)


def _add_cub(actions: Any) -> None:
    parser = actions.add_parser("cub", help="pack CUB-200-2011 (folder or .tgz; all classes or some)")
    add_packing_options(parser, "the CUB_200_2011 folder, or CUB_200_2011.tgz")
    parser.set_defaults(function=run_cub)


def _add_folder(actions: Any) -> None:
    parser = actions.add_parser("folder", help="pack one folder per class, with or without train/, val/ and test/")
    add_packing_options(parser, "the folder that holds a folder per class (or train/ and test/ with those)")
    parser.add_argument(
        "--test-fraction", type=float, default=0.2, help="share of each class for test if there is no test/ (0.2)"
    )
    parser.set_defaults(function=run_folder)


def _add_demo(actions: Any) -> None:
    parser = actions.add_parser("demo", help="draw the embedded set of birds and pack it")
    parser.add_argument("out", metavar="OUT", help="the packed folder; the drawings lie in OUT/source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-per-class", type=int, default=100, metavar="N")
    parser.add_argument("--test-per-class", type=int, default=30, metavar="N")
    parser.add_argument("--overwrite", action="store_true", help="replace another set at OUT")
    parser.set_defaults(function=run_demo)


def _add_index(actions: Any) -> None:
    parser = actions.add_parser("index", help="index WebDataset shards that somebody else wrote, where they lie")
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tar files, folders, 'a-{00..99}.tar', http(s); or test=..."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder that index.json is written to")
    parser.add_argument(
        "--label-key", metavar="KEY", help="the label's key in the json member, or cls (default: found)"
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, a line each, for labels 0, 1...")
    parser.add_argument("--group-key", metavar="KEY", default="group", help="json key of what belongs together")
    add_tree_options(parser)
    parser.set_defaults(function=run_index)


def add_packing_options(parser: argparse.ArgumentParser, source: str, metavar: str = "SOURCE") -> None:
    parser.add_argument("source", metavar=metavar, help=source)
    parser.add_argument("out", metavar="OUT", help="the packed folder; appears complete or not at all")
    parser.add_argument("--short-side", type=int, metavar="PX", help="shrink to this short side (JPEG 90)")
    parser.add_argument("--seed", type=int, default=0, help="of the order within and across shards (default 0)")
    parser.add_argument(
        "--shard-bytes", type=int, default=128 << 20, metavar="BYTES", help="aimed size of a shard at most (128 MiB)"
    )
    add_tree_options(parser)


def add_tree_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--taxonomy", metavar="CSV", help="class tree: one row a class, columns from coarse to fine")
    parser.add_argument("--levels", metavar="A,B,C", help="the levels, coarse to fine: columns, folders or json keys")
    parser.add_argument("--name", help="the set's name in its index")
    parser.add_argument("--on-bad", choices=("raise", "skip"), default="raise", help="broken images: stop, or skip")
    parser.add_argument("--overwrite", action="store_true", help="replace another set at OUT")


def run_cub(options: argparse.Namespace) -> int:
    """`vitdist data cub`."""
    from vitdist.data.packing.pack import write_packed
    from vitdist.data.packing.staging import require_space, staged
    from vitdist.data.sources.cub import read_cub

    source, out = Path(options.source), Path(options.out)
    before = hash_at(out)
    with staged(out, overwrite=options.overwrite) as stage:
        spool = stage / "spool"
        if source.is_file():
            require_space(stage, 2 * source.stat().st_size)  # the spool and the shards
        taxonomy, samples = read_cub(source, taxonomy=taxonomy_of(options), spool=spool)
        write_packed(samples, taxonomy, stage, packing_of(options, "cub", "cub"), progress=progress("packing"))
        spool.unlink(missing_ok=True)
    report_packed(load_index(out), before)
    return 0


def run_folder(options: argparse.Namespace) -> int:
    """`vitdist data folder`."""
    from vitdist.data.packing.pack import pack
    from vitdist.data.sources.folder import read_folder

    out = Path(options.out)
    before = hash_at(out)
    found = read_folder(
        options.source,
        taxonomy=taxonomy_of(options),
        levels=levels_of(options),
        test_fraction=options.test_fraction,
        seed=options.seed,
    )
    packing = packing_of(options, "folder", Path(options.source).absolute().name)
    show = progress("packing")
    index = pack(found.samples, found.taxonomy, out, packing, overwrite=options.overwrite, progress=show)
    report_packed(index, before, found.notes)
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """`vitdist data demo`."""
    from vitdist.data.packing.pack import Packing, write_packed
    from vitdist.data.packing.staging import staged
    from vitdist.data.sources.cub import read_cub
    from vitdist.data.sources.demo import demo_taxonomy, draw_demo

    if options.train_per_class < 1 or options.test_per_class < 0:
        raise UsageError("--train-per-class must be at least 1, and --test-per-class not negative")
    out = Path(options.out)
    before = hash_at(out)
    with staged(out, overwrite=options.overwrite, owned=("source",)) as stage:
        source = stage / "source"
        draw_demo(source, options.seed, options.train_per_class, options.test_per_class)
        taxonomy, samples = read_cub(source, taxonomy=demo_taxonomy())
        packing = Packing("demo", seed=options.seed, source={"source": "demo"})
        write_packed(samples, taxonomy, stage, packing, progress=progress("packing"))
    report_packed(load_index(out), before)
    return 0


def run_index(options: argparse.Namespace) -> int:
    """`vitdist data index`."""
    from vitdist.data.packing.foreign import index_foreign
    from vitdist.data.packing.labels import LabelReader

    taxonomy = taxonomy_of(options)
    reader = LabelReader(
        where=options.label_key,
        levels=None if taxonomy is not None and options.label_key else levels_of(options),
        class_names=_class_names(options.classes),
        taxonomy=taxonomy,
        group_key=options.group_key,
    )
    before = hash_at(Path(options.out))
    found = index_foreign(
        options.shards,
        options.out,
        reader,
        name=options.name,
        overwrite=options.overwrite,
        skip_bad=options.on_bad == "skip",
        progress=progress("indexing"),
    )
    for line in found.skipped:
        print(f"left out: {line}", file=sys.stderr)
    report_packed(found.index, before, found.notes)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """`vitdist data verify`: one line a problem and exit code 4, or what was verified."""
    from vitdist.data.packing.verify import verify

    problems = verify(options.path)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return DataError.exit_code
    splits = load_index(options.path).splits.values()
    print(_size(sum(split.num_samples for split in splits), sum(len(split.shards) for split in splits)), "verified")
    return 0


def progress(what: str) -> Progress | None:
    """A counter on one line of the terminal, or None where standard error is none."""
    if not sys.stderr.isatty():
        return None
    shown = 0.0

    def show(num_done: int, num_all: int) -> None:
        nonlocal shown
        if num_done == num_all or time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            end = "\n" if num_done == num_all else ""
            print(f"\r{what} {num_done}/{num_all}", end=end, file=sys.stderr, flush=True)

    return show


def report_packed(index: DatasetIndex, before: str | None, notes: Sequence[str] = ()) -> None:
    """What now lies there, and what to type next."""
    num_samples = sum(split.num_samples for split in index.splits.values())
    verb = "already held" if before == index.hash else "now holds"
    print(f"{index.root} {verb} {num_samples} photographs of {index.taxonomy.num_classes[-1]} classes")
    tree = index.taxonomy
    levels = (f"{number} {level}" for level, number in zip(tree.levels, tree.num_classes, strict=True))
    print(f"  classes  {', '.join(levels)}")
    for split in index.splits.values():
        size = sum(shard.bytes for shard in split.shards)
        groups = f", {split.num_groups} groups" if split.num_groups else ""
        samples = _size(split.num_samples, len(split.shards))
        print(f"  {split.name:<8} {samples}, {size / 1e6:.1f} MB{groups}")
    for note in notes:
        print(f"  note     {note}")
    if num_skipped := index.preparation.get("skipped"):
        print(f"  skipped  {num_skipped}, listed in {index.root / 'skipped.json'}")
    print(f"  index    sha256 {index.hash}")
    print(f"next: vitdist data verify {index.root}; then train with data.path={index.root}")


def _size(num_samples: int, num_shards: int) -> str:
    return f"{num_samples} samples in {num_shards} shard{'s' * (num_shards != 1)}"


def hash_at(out: Path) -> str | None:
    try:
        return load_index(out).hash if (out / INDEX_NAME).is_file() else None
    except DataError:
        return None


def packing_of(options: argparse.Namespace, source: str, name: str) -> Any:
    from vitdist.data.packing.pack import Packing

    return Packing(
        name=options.name or name,
        seed=options.seed,
        shard_bytes=options.shard_bytes,
        short_side=options.short_side,
        skip_bad=options.on_bad == "skip",
        source={"source": source},
    )


def levels_of(options: argparse.Namespace) -> list[str] | None:
    if options.levels is None:
        return None
    levels = [level.strip() for level in options.levels.split(",")]
    if not all(levels) or len(set(levels)) < len(levels):
        raise UsageError(f"--levels {options.levels!r} is no list of different names like order,family,species")
    return levels


def taxonomy_of(options: argparse.Namespace) -> Any:
    from vitdist.data.sources.trees import read_tree

    return read_tree(options.taxonomy, levels_of(options)) if options.taxonomy else None


def _class_names(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes {path} cannot be read: {error}") from None
    while names and not names[-1]:
        names.pop()
    return names
