"""`vitdist bench data` and `bench train`: they run, on all photographs, and their numbers agree with one another."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, Recipes
from vitdist.bench import neighbours
from vitdist.bench.cores import bare, streamed
from vitdist.bench.damage import damaged_copy
from vitdist.bench.data import BareLoop, Wish, batch_of
from vitdist.bench.neighbours import KINDS, beside, kinship
from vitdist.bench.photographs import all_photographs, large_photographs
from vitdist.data.index import DatasetIndex
from vitdist.data.pixels.images import read_header
from vitdist.data.pixels.transforms import Augment, Preprocessing
from vitdist.data.storage.shards import DamagedSample, ShardReader

PREPARED = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def command(*words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vitdist", "bench", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def wish(tiny: DatasetIndex, tmp_path: Path) -> Wish:
    split = all_photographs(tiny, tmp_path)
    return Wish(split, PREPARED, Augment(), batch_of(split.num_samples))


def test_all_photographs_are_those_of_every_split(tiny: DatasetIndex, wish: Wish) -> None:
    expected = [ShardReader(split).read(row) for split in tiny.splits.values() for row in range(split.num_samples)]
    reader = ShardReader(wish.split)
    assert [reader.read(row) for row in range(wish.split.num_samples)] == expected
    reader.close()


def test_a_large_set_is_measured_by_its_first_photographs(tiny: DatasetIndex, tmp_path: Path) -> None:
    split = all_photographs(tiny, tmp_path, most=10)
    assert split.num_samples == 5 * len(tiny.splits)
    reader = ShardReader(split)
    assert all(reader.read(row) for row in range(split.num_samples))
    assert split.shard_starts[-1] == split.num_samples


def test_large_photographs_have_12_megapixels(tiny: DatasetIndex, wish: Wish, tmp_path: Path) -> None:
    split = large_photographs(tiny, wish.split, tmp_path / "large").split("train")
    header = read_header(ShardReader(split).read(0))
    assert header.height * header.width == pytest.approx(12e6, rel=0.01)


def test_one_in_a_hundred_is_damaged(wish: Wish, tmp_path: Path) -> None:
    spoiled, count = damaged_copy(wish.split, tmp_path / "damaged", share=0.1)
    reader, kinds = ShardReader(spoiled), []
    for row in range(spoiled.num_samples):
        try:
            reader.read(row)
        except DamagedSample as error:
            kinds.append(error.damage.kind)
    assert len(kinds) == count == round(0.1 * spoiled.num_samples) and set(kinds) == {"checksum", "header"}


def test_the_bare_loop_makes_the_loader_s_very_crops(wish: Wish) -> None:
    plain = Wish(wish.split, PREPARED, Augment(flip=0.0), wish.batch)
    reader = ShardReader(wish.split)
    loop = BareLoop(plain, [reader.read(row) for row in range(wish.split.num_samples)])
    batch = next(iter(plain.loader(num_workers=0)))
    assert all(np.array_equal(loop(n), batch.images[n].numpy()) for n in range(len(batch)))


def test_core_seconds_are_the_worker_s_and_no_more_than_the_clock_s(wish: Wish) -> None:
    taken = streamed(wish.loader, wish.most)
    assert wish.most <= taken.count < wish.most + wish.batch and 0 < taken.core < 1.5 * taken.clock
    taken = bare(range(1000))
    assert taken.count == 1000 and 0 < taken.core < 1.5 * taken.clock


def test_bench_data_prints_every_table(tiny_recipe: Recipes) -> None:
    lines = command("data", str(tiny_recipe()), "--rounds", "1")
    rows = {line[:44].strip(): line[44:].split() for line in lines}
    for name in ("reading", "decoding", "the whole input, one worker", "ImageFolder + PIL + v2 float"):
        assert float(rows[name][0]) > 0
    assert rows["the whole input, one worker"][-2:] == ["1.00", "x"]
    starts = [values for name, values in rows.items() if name.isdigit()]
    assert len(starts) >= 5 and float(starts[0][1]) == 1
    titles = "\n".join(lines)
    assert all(title in titles for title in ("12-megapixel", "5 ms an open", "damaged, skipped"))


def test_bench_train_is_consistent(tiny_recipe: Recipes) -> None:
    recipe = tiny_recipe(augment={"mixup": 0.2, "cutmix": 1.0})
    text = "\n".join(command("train", str(recipe), "--steps", "4", "--rounds", "3"))
    alone, given, both, *beside = (float(number) for number in re.findall(r"([\d.]+) img/s", text))
    waiting = float(re.findall(r"([\d.]+) % waiting for data", text)[0])
    assert both < 1.5 * min(alone, given) and 0 <= waiting <= 100
    (asked,) = re.findall(r"asks for (\d+) %", text)
    assert float(asked) == pytest.approx(100 * alone / given, rel=1.0)
    assert len(beside) == (len(KINDS) if len(os.sched_getaffinity(0)) > 1 else 0) and all(
        0.1 * alone < speed < 2 * alone for speed in beside
    )


def test_a_neighbour_works_on_the_other_core_and_is_gone_afterwards() -> None:
    cores = sorted(os.sched_getaffinity(0))
    before = multiprocessing.active_children()
    for kind in KINDS:
        with beside(kind, {cores[-1]}):
            (child,) = (one for one in multiprocessing.active_children() if one not in before)
            deadline = time.monotonic() + 20
            while seconds_of(child.pid) < 0.3:
                assert child.is_alive() and time.monotonic() < deadline
            assert os.sched_getaffinity(child.pid or 0) == {cores[-1]}
        assert not child.is_alive()


def seconds_of(pid: int | None) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_what_two_processors_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SYSTEM", tmp_path)
    assert "not known" in kinship(0, 1)
    for place, text in (("topology/thread_siblings_list", "0,8-9"), ("cache/index3/shared_cpu_list", "0-3,8-11")):
        (tmp_path / "cpu0" / place).parent.mkdir(parents=True)
        (tmp_path / "cpu0" / place).write_text(text + "\n")
    assert kinship(0, 9) == "two threads of one core"
    assert kinship(0, 2) == "two cores that share a cache"
    assert kinship(0, 4) == "two cores with caches of their own"
