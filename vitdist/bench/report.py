"""What `vitdist bench data` prints: the parts, the rivals, starts in mid-epoch, damage, large files, slow storage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from vitdist.bench import damage, far, starts
from vitdist.bench.cores import streamed
from vitdist.bench.data import FOLDER, OURS, Wish, batch_of, measure, others, our_parts, profile, table
from vitdist.bench.inputs import Inputs
from vitdist.bench.photographs import all_photographs, large_photographs
from vitdist.data import rivals
from vitdist.data.pixels.transforms import prepare_worker


def input_report(inputs: Inputs, num_rounds: int, alone: bool, with_profile: bool) -> Iterator[str]:
    """One table after the other, each as it is measured."""
    prepare_worker()
    with tempfile.TemporaryDirectory(prefix="vitdist-bench-") as scratch:
        folder = Path(scratch)
        split = all_photographs(inputs.index, folder)
        wish = Wish(split, inputs.preprocessing, inputs.augment, batch_of(split.num_samples))
        yield f"{split.num_samples:,} photographs at {wish.preprocessing.image_size} px, {num_rounds} rounds, one core"
        candidates = our_parts(wish)
        if not alone:
            candidates |= others(wish, folder / "files")
        yield table(measure(candidates, num_rounds), "seconds of the worker's core", OURS)
        if with_profile:
            yield profile(wish)
        if not alone:
            yield starts.table(starts.measure_starts(wish, num_rounds))
            yield _damaged(wish, folder, num_rounds)
            yield _large(inputs, wish, folder, num_rounds)
            yield _far(inputs, wish, folder, num_rounds)


def _damaged(wish: Wish, folder: Path, num_rounds: int) -> str:
    """Clean and damaged in turn, so that a busy machine is as unfair to one as to the other."""
    split, count = damage.damaged_copy(wish.split, folder / "damaged")
    spoiled = wish.of(split)
    clean, dirty = "all sound", f"{count} of {split.num_samples:,} damaged, skipped"
    candidates = {
        clean: lambda: streamed(wish.loader, wish.most),
        dirty: lambda: streamed(spoiled.loader, spoiled.most),
    }
    return table(measure(candidates, 2 * num_rounds), "damage; seconds of the worker's core", clean, "sound is")


def _large(inputs: Inputs, wish: Wish, folder: Path, num_rounds: int) -> str:
    """Photographs of 12 megapixels: they are decoded at a half, a quarter or an eighth."""
    split = large_photographs(inputs.index, wish.split, folder / "large").split("train")
    camera = Wish(split, wish.preprocessing, wish.augment, 1)
    rivals.unpack(split, folder / "large-files")
    usual = rivals.usual_transform(wish.preprocessing, wish.augment)
    candidates = {
        OURS: lambda: streamed(camera.loader, camera.most),
        FOLDER: lambda: streamed(lambda: rivals.image_folder(folder / "large-files", usual, 1), camera.most),
    }
    return table(measure(candidates, min(3, num_rounds)), "12-megapixel photographs", OURS)


def _far(inputs: Inputs, wish: Wish, folder: Path, num_rounds: int) -> str:
    """One split of the set from a server that takes its time; timed by the clock, since most of it is waiting."""
    near = wish.of(inputs.split)
    if inputs.split.is_remote:
        return "slow storage is measured with a set on this machine"
    rivals.unpack(near.split, folder / "near-files")
    with far.slow_server(inputs.index.root) as address:
        candidates = far.far_and_near(near, address, inputs.split.name, folder / "near-files", folder)
        found = measure(candidates, min(3, num_rounds), by_clock=True)
    return table(found, "5 ms an open and a read; seconds by the clock", far.FAR)
