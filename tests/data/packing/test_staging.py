"""D5: packing killed at any moment leaves no final name that fails to verify, and the next packing cleans up."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset.writer  # noqa: F401  imported before forking, or each child would import torch

from tests.data.tiny import tiny_cub, tiny_taxonomy
from vitdist.data.index import load_index
from vitdist.data.packing.pack import Packing, pack
from vitdist.data.packing.staging import staged
from vitdist.data.packing.verify import verify
from vitdist.data.sources.cub import read_cub

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cub(tmp_path_factory.mktemp("d5") / "source", num_classes=20, train_per_class=4, test_per_class=2)


def pack_from(source: Path, out: Path, seed: int, overwrite: bool = False) -> None:
    tree, samples = read_cub(source, taxonomy=tiny_taxonomy(source))
    pack(samples, tree, out, Packing("tiny", seed=seed), overwrite=overwrite)


def forked(action: Callable[[], None]) -> int:
    """Start `action` in a child process; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def dying_at(event_number: int, action: Callable[[], None]) -> Callable[[], None]:
    """`action` that is killed just before its n-th operation on a file name."""

    def run() -> None:
        left = event_number

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()

    return run


def check(out: Path, allowed: set[str]) -> str:
    """`out` is absent or a whole set of one of the allowed hashes; which."""
    if not out.exists():
        return "absent"
    assert verify(out) == []
    found = load_index(out).hash
    assert found in allowed
    return found


def test_killed_at_20_random_moments(source: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    pack_from(source, tmp_path / "good", seed=1)
    duration = time.monotonic() - started
    good = load_index(tmp_path / "good").hash
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"seed {seed}, a packing takes {duration:.3f} s")
    num_killed = 0
    while num_killed < 20:
        child = forked(lambda: pack_from(source, tmp_path / "set", seed=1))
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        was_running = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if check(tmp_path / "set", {good}) == good:
            shutil.rmtree(tmp_path / "set")
        num_killed += was_running
        duration *= 1 if was_running else 0.8  # a child that was done before the kill tells nothing
    pack_from(source, tmp_path / "set", seed=1)
    assert check(tmp_path / "set", {good}) == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "set"]


@pytest.mark.parametrize("is_overwrite", [False, True])
def test_killed_at_every_kind_of_operation(source: Path, tmp_path: Path, is_overwrite: bool) -> None:
    pack_from(source, tmp_path / "old", seed=1)
    pack_from(source, tmp_path / "new", seed=2)
    old, new = (load_index(tmp_path / name).hash for name in ("old", "new"))
    out = tmp_path / "set"
    outcomes = []
    for number in [*range(1, 40, 6), *range(40, 800, 40)]:
        if is_overwrite and not out.exists():
            pack_from(source, out, seed=1)
        child = forked(dying_at(number, lambda: pack_from(source, out, 2, is_overwrite)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        outcomes.append(check(out, {old, new} if is_overwrite else {new}))
        if status == 0:
            break
    assert status == 0 and outcomes[-1] == new and len(outcomes) > 10
    assert sorted({*outcomes[:8]}) == ([old] if is_overwrite else ["absent"])


def test_killed_between_every_two_operations_of_publishing(source: Path, tmp_path: Path) -> None:
    """The last operations one by one: old set aside, new one in, old one deleted."""
    pack_from(source, tmp_path / "old", seed=1)
    pack_from(source, tmp_path / "new", seed=2)
    old, new = (load_index(tmp_path / name).hash for name in ("old", "new"))
    out = tmp_path / "set"

    def publish() -> None:
        with staged(out, overwrite=True) as stage:
            stage.rmdir()
            os.rename(tmp_path / "copy", stage)

    outcomes = set()
    for number in range(1, 200):
        for name, of in (("set", "old"), ("copy", "new")):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(tmp_path / of, tmp_path / name)
        child = forked(dying_at(number, publish))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes.add(check(out, {old, new}))
        for rest in tmp_path.glob("set.*"):
            shutil.rmtree(rest)
        if status == 0:
            break
    assert status == 0 and outcomes == {"absent", old, new}


def test_a_packing_beside_one_that_runs_is_left_alone(source: Path, tmp_path: Path) -> None:
    with staged(tmp_path / "a") as stage:
        child = forked(lambda: pack_from(source, tmp_path / "a", seed=1))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert stage.is_dir()
        pack_from(source, stage / "inner", seed=1)
        os.rename(stage / "inner", tmp_path / "inner")
        stage.rmdir()
        os.rename(tmp_path / "inner", stage)
    assert verify(tmp_path / "a") == []
