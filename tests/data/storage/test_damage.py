"""D1 and D2: every kind of damage to a packed set is met by its name, counted exactly, and never used."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.tiny import tiny_packed
from vitdist.data.index import DatasetIndex, Split, load_index
from vitdist.data.loading.batch import Batch
from vitdist.data.loading.load import Load, Unseeded
from vitdist.data.loading.loader import batches
from vitdist.data.loading.places import EvaluationSource, TrainSource
from vitdist.data.pixels.transforms import Augment, Draws, EvalTransform, Preprocessing, TrainTransform
from vitdist.data.plan import TrainPlan, evaluation_span, make_plan
from vitdist.data.storage.shards import DamagedSample, ShardReader
from vitdist.data.views import everything

PREPARED = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH = 24

Account = Counter[tuple[str, str]]  # (kind, shard) -> samples
Damaging = Callable[[Path, np.ndarray], dict[int, str]]  # a shard file, its rows -> kind by number within the shard


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """120 samples in a couple of dozen shards."""
    return tiny_packed(tmp_path_factory.mktemp("pristine") / "set", num_classes=20, train_per_class=6, test_per_class=1)


@pytest.fixture
def own(pristine: DatasetIndex, tmp_path: Path) -> DatasetIndex:
    """A copy to damage."""
    shutil.copytree(pristine.root, tmp_path / "own")
    return load_index(tmp_path / "own")


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        byte = file.read(1)[0]
    overwrite(path, offset, bytes([byte ^ 0x10]))


NAMELESS = b"no suffix".ljust(100, b"\0")
EIGHT_GIB = b"\x80" + (8 << 30).to_bytes(11, "big")


def rewrite_header(path: Path, row: np.void, position: int, field: bytes) -> None:
    """Change a field of an image's header as somebody would who knows tar: its checksum is right again."""
    offset = int(row["offset"]) - 512
    with path.open("rb") as file:
        file.seek(offset)
        block = bytearray(file.read(512))
    block[position : position + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    overwrite(path, offset, bytes(block))


def start_of(row: np.void) -> int:
    return int(row["offset"]) - 512 * int(row["header_blocks"])


def cut(path: Path, size: int, first_lost: int, rows: np.ndarray) -> dict[int, str]:
    os.truncate(path, size)
    return {number: "truncated" for number in range(first_lost, len(rows))}


def whole(kind: str, rows: np.ndarray) -> dict[int, str]:
    return {number: kind for number in range(len(rows))}


def replaced(path: Path, data: bytes, kind: str, rows: np.ndarray) -> dict[int, str]:
    path.write_bytes(data)
    return whole(kind, rows)


def html(path: Path, rows: np.ndarray) -> dict[int, str]:
    """A server's error page, as long as the shard."""
    size = path.stat().st_size
    page = b"<!DOCTYPE html><html><body><h1>503 Service Unavailable</h1></body></html>\n"
    return replaced(path, (page * (size // len(page) + 1))[:size], "checksum", rows)


def one(kind: str, damage: Callable[[Path, np.void], None]) -> Damaging:
    def apply(path: Path, rows: np.ndarray) -> dict[int, str]:
        damage(path, rows[1])
        return {1: kind}

    return apply


def missing(path: Path, rows: np.ndarray) -> dict[int, str]:
    path.unlink()
    return whole("unreadable", rows)


def a_folder(path: Path, rows: np.ndarray) -> dict[int, str]:
    path.unlink()
    path.mkdir()
    return whole("unreadable", rows)


def a_pipe(path: Path, rows: np.ndarray) -> dict[int, str]:
    path.unlink()
    os.mkfifo(path)
    return whole("unreadable", rows)


def growing(path: Path, rows: np.ndarray) -> dict[int, str]:
    """Somebody is still writing, or appended to it; what was indexed is still where it was."""
    with path.open("ab") as file:
        file.write(bytes(10_240))
    return {}


def swapped(path: Path, rows: np.ndarray) -> dict[int, str]:
    """Another shard's content: sound members, sound pictures, and not one of them what was indexed."""
    other = next(other for other in sorted(path.parent.glob("*.tar")) if other != path)
    path.write_bytes(other.read_bytes() + path.read_bytes())
    return whole("checksum", rows)


IN_SHARD: dict[str, Damaging] = {
    "cut at a sample's boundary": lambda path, rows: cut(path, start_of(rows[2]), 2, rows),
    "cut between members": lambda path, rows: cut(path, end_of(rows[1]), 2, rows),
    "cut inside a header": lambda path, rows: cut(path, start_of(rows[2]) + 100, 2, rows),
    "cut inside data": lambda path, rows: cut(path, int(rows[2]["offset"] + rows[2]["length"] // 2), 2, rows),
    "cut by the last byte": lambda path, rows: cut(path, end_of_data(rows[-1]) - 1, len(rows) - 1, rows),
    "name in a header": one("header", lambda path, row: flip(path, int(row["offset"]) - 512 + 3)),
    "size in a header": one("header", lambda path, row: flip(path, int(row["offset"]) - 512 + 130)),
    "checksum in a header": one("header", lambda path, row: flip(path, int(row["offset"]) - 512 + 150)),
    "a hard link": one("header", lambda path, row: rewrite_header(path, row, 156, b"1")),
    "a symbolic link": one("header", lambda path, row: rewrite_header(path, row, 156, b"2")),
    "a device": one("header", lambda path, row: rewrite_header(path, row, 156, b"3")),
    "a folder for a file": one("header", lambda path, row: rewrite_header(path, row, 156, b"5")),
    "8 GiB in a header": one("header", lambda path, row: rewrite_header(path, row, 124, EIGHT_GIB)),
    "another name in a header": one("header", lambda path, row: rewrite_header(path, row, 0, NAMELESS)),
    "zeroed header": one("header", lambda path, row: overwrite(path, int(row["offset"]) - 512, bytes(512))),
    "zeroed block of data": one("checksum", lambda path, row: overwrite(path, int(row["offset"]) + 512, bytes(64))),
    "zeroed from a header on": one("checksum", lambda path, row: overwrite(path, int(row["offset"]) - 512, bytes(700))),
    "flipped byte of a JPEG header": one("checksum", lambda path, row: flip(path, int(row["offset"]) + 1)),
    "changed scan bytes": one("checksum", lambda path, row: flip(path, int(row["offset"] + row["length"]) - 40)),
    "empty": lambda path, rows: replaced(path, b"", "truncated", rows),
    "a short page of HTML": lambda path, rows: replaced(path, b"<html>404</html>", "truncated", rows),
    "HTML": html,
    "missing": missing,
    "a folder": a_folder,
    "a pipe": a_pipe,
    "growing": growing,
    "another shard's bytes": swapped,
}  # fmt: skip


def end_of_data(row: np.void) -> int:
    return int(row["offset"]) + int(row["length"])


def end_of(row: np.void) -> int:
    """Where the image's member ends: its JSON member comes next."""
    return int(row["offset"]) + -(-int(row["length"]) // 512) * 512


def inject(index: DatasetIndex, damaging: Damaging, shard: int = 3) -> tuple[Account, set[int]]:
    """Damage one shard of train: (what an exact account must say, the rows hit)."""
    split = index.split("train")
    first, stop = split.shard_starts[shard : shard + 2].tolist()
    rows = np.array(split.samples[first:stop])
    assert len(rows) >= 4
    kinds = damaging(Path(split.shard_file(shard)), rows)
    path = split.shards[shard].path
    return Counter((kind, path) for kind in kinds.values()), {first + number for number in kinds}


class Witness:
    """A transform that notes what it was given: nothing but indexed bytes may ever reach it."""

    def __init__(self, split: Split) -> None:
        self.known = set(split.samples["checksum"].tolist())
        self.strangers = 0
        self._transform = TrainTransform(PREPARED, Augment())

    def draw(self, seeds: list[int]) -> list[Draws]:
        return self._transform.draw(seeds)

    def __call__(self, data: bytes, drawn: Draws, out: np.ndarray) -> None:
        self.strangers += zlib.crc32(data) not in self.known
        self._transform(data, drawn, out)


def plan_of(split: Split) -> TrainPlan:
    none = np.empty(0, np.int32)
    return make_plan(everything(split.shard_starts), none, sampling="uniform", global_batch_size=BATCH, seed=4)


def epoch(split: Split, world: int, *, skip: bool, witness: Witness, number: int = 0) -> list[Batch]:
    """All batches of one epoch, of all ranks."""
    found: list[Batch] = []
    for rank in range(world):
        plan = plan_of(split)
        start = number * plan.steps_per_epoch
        source = TrainSource(plan, rank=rank, world=world, micro_batch_size=BATCH // world, start=start)
        load = Load(split, witness, replacement=plan.replacement if skip else None)
        loader = batches(source, load, 32, BATCH // world, num_workers=0)
        found += itertools.islice(loader, plan.steps_per_epoch)
    return found


def account(found: list[Batch]) -> Account:
    return Counter((damage.kind, damage.shard) for batch in found for damage in batch.damages)


def used(found: list[Batch]) -> list[tuple[int, int, int]]:
    """(position, slot, row) of each picture that a step would see."""
    rows = [(batch.position, batch.slot + n, row) for batch in found for n, row in enumerate(batch.rows.tolist())]
    return sorted(rows)


@pytest.mark.parametrize("what", IN_SHARD)
def test_skip_counts_exactly_and_the_epoch_is_complete(what: str, own: DatasetIndex) -> None:
    injected, hit = inject(own, IN_SHARD[what])
    split = load_index(own.root).split("train")
    assert split.num_samples % BATCH == 0, "so that nothing is left out"
    for number in (0, 1):
        witness = Witness(split)
        by_world = {world: epoch(split, world, skip=True, witness=witness, number=number) for world in (1, 2)}
        for found in by_world.values():
            assert account(found) == injected
            damaged = {damage.row for batch in found for damage in batch.damages}
            assert damaged == hit
            rows = [row for _, _, row in used(found)]
            assert set(rows) == set(range(split.num_samples)) - hit
            assert len(rows) == split.num_samples, "a damaged sample's slot is filled"
            assert all(batch.valid.all() for batch in found)
            labels = split.samples["label"]
            assert all(batch.labels.tolist() == labels[batch.rows].tolist() for batch in found)
        assert used(by_world[1]) == used(by_world[2])
        assert witness.strangers == 0


def test_a_damaged_stand_in_is_not_counted_twice(own: DatasetIndex) -> None:
    """With half of the shards gone half of the stand-ins are damaged too: each counts where the plan has it."""
    injected: Account = Counter()
    for shard in range(0, len(own.split("train").shards), 2):
        injected += inject(own, missing, shard)[0]
    split = load_index(own.root).split("train")
    by_world = [epoch(split, world, skip=True, witness=Witness(split)) for world in (1, 2, 3)]
    assert [account(found) for found in by_world] == [injected] * 3
    assert used(by_world[0]) == used(by_world[1]) == used(by_world[2])
    assert all(batch.valid.all() for found in by_world for batch in found)


@pytest.mark.parametrize("what", IN_SHARD)
def test_raise_names_shard_sample_and_kind(what: str, own: DatasetIndex) -> None:
    injected, hit = inject(own, IN_SHARD[what])
    split = load_index(own.root).split("train")
    witness = Witness(split)
    found = epoch(split, 1, skip=False, witness=witness)
    assert account(found) == injected and witness.strangers == 0
    gaps = {row for batch in found for row in batch.rows[~batch.valid].tolist()}
    assert gaps == hit
    for damage in (damage for batch in found for damage in batch.damages):
        assert f"shard {damage.shard}, sample {damage.row} at byte " in str(damage) and damage.kind in str(damage)


@pytest.mark.parametrize("what", IN_SHARD)
def test_evaluation_leaves_exactly_the_damaged_out(what: str, own: DatasetIndex) -> None:
    injected, hit = inject(own, IN_SHARD[what])
    split = load_index(own.root).split("train")
    view = everything(split.shard_starts)
    for world in (1, 2, 3):
        found: list[Batch] = []
        for rank in range(world):
            source = EvaluationSource(view, evaluation_span(view.num_samples, rank, world), 7)
            load = Load(split, Unseeded(EvalTransform(PREPARED)))
            found += batches(source, load, 32, 7, num_workers=0)
        assert account(found) == injected
        seen = [row for batch in found for row in batch.rows[batch.valid].tolist()]
        assert sorted([*seen, *hit]) == list(range(view.num_samples))


def with_errors(monkeypatch: pytest.MonkeyPatch, path: str, times: float) -> list[int]:
    """Let reads of one file answer EIO so many times; the offsets at which they did."""
    real, failed = os.pread, []

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if len(failed) < times and os.readlink(f"/proc/self/fd/{descriptor}") == path:
            failed.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    return failed


def test_an_input_output_error_once_is_asked_again(own: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    split = own.split("train")
    expected = ShardReader(split).read(20)
    failed = with_errors(monkeypatch, split.shard_file(int(split.samples[20]["shard"])), 1)
    reader = ShardReader(split)
    assert reader.read(20) == expected and len(failed) == 1
    assert reader.key(20) == ShardReader(split).key(20)
    failed.clear()
    assert account(epoch(split, 1, skip=True, witness=Witness(split))) == Counter() and len(failed) == 1
    reader.close()


def test_an_input_output_error_always_is_damage(own: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    split = own.split("train")
    shard = int(split.samples[20]["shard"])
    failed = with_errors(monkeypatch, split.shard_file(shard), float("inf"))
    found = epoch(split, 1, skip=True, witness=Witness(split))
    assert account(found) == {("unreadable", split.shards[shard].path): split.shards[shard].samples}
    assert len(failed) == 2 * split.shards[shard].samples
    with pytest.raises(DamagedSample, match="Input/output error"):
        ShardReader(split).read(20)


def test_descriptors_stay_few_whatever_fails(own: DatasetIndex) -> None:
    inject(own, IN_SHARD["a folder"])
    split, before = own.split("train"), len(os.listdir("/proc/self/fd"))
    reader = ShardReader(split)
    for row in [*range(split.num_samples)] * 2:
        with contextlib.suppress(DamagedSample):
            reader.read(row)
    assert len(os.listdir("/proc/self/fd")) <= before + len(split.shards) + 1  # and the table's
    reader.close()


def test_a_forgotten_reader_keeps_no_file_open(pristine: DatasetIndex) -> None:
    split = pristine.split("train")
    num_rows = len(split.samples)  # the table stays mapped
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(split)
    for row in range(num_rows):
        reader.read(row)
    during = len(os.listdir("/proc/self/fd"))
    del reader
    assert during > before == len(os.listdir("/proc/self/fd"))
