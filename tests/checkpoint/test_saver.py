"""Saving beside the training: its failures arrive, a full disk says how full, and no NaN is kept (K1, H3)."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import disks
from vitdist.checkpoint import state as files
from vitdist.checkpoint.manifest import MANIFEST, verify
from vitdist.checkpoint.saver import Saver
from vitdist.checkpoint.state import Snapshot
from vitdist.checkpoint.store import Retention, Store
from vitdist.errors import CheckpointError, LostError, NonFiniteError, ResourceError

KEEP_TWO = Retention(keep_last=2, keep_best=0)
ORDER = (files.MODEL, files.TRAINING, files.STATE, files.RECIPE, files.TAXONOMY, files.PREPROCESSING, MANIFEST)


def snapshot(step: int, value: float = 1.0) -> Snapshot:
    """Every file has 40,000 bytes and more, so that each can be the one that no longer fits."""
    words = {"words": "x" * 40_000}
    return Snapshot(
        step=step,
        model={"weight": torch.full((10_000,), value)},
        training={"optimizer/weight/exp_avg": torch.ones(10_000)},
        state=words,
        recipe="# " + "x" * 40_000 + "\n",
        taxonomy=words,
        preprocessing=words,
        weights="raw",
    )


def may() -> None:
    """Nobody else has the lock."""


def save(saver: Saver, step: int, **options: float) -> None:
    saver.save(snapshot(step, **options), is_best=False, retention=KEEP_TWO, values={})


def test_the_training_goes_on_while_the_thread_writes(tmp_path: Path) -> None:
    gate = threading.Event()
    store = Store(tmp_path, mark=lambda phase, step: gate.wait(20) and None)
    saver = Saver(store, may=may)
    save(saver, 1)
    assert store.published() == [] and saver.busy_seconds > 0, "save returned before anything was published"
    gate.set()
    saver.wait()
    assert not verify(store.path_of(1)) and saver.busy_seconds == 0


def test_the_best_pointer_and_pruning_follow_in_the_thread(tmp_path: Path) -> None:
    store = Store(tmp_path)
    saver = Saver(store, may=may)
    for step in (1, 2, 3, 4):
        saver.save(snapshot(step), is_best=step == 1, retention=KEEP_TWO, values={})
    saver.wait()
    assert [step for step, _ in store.published()] == [1, 3, 4]
    assert store.pointed("best") == store.path_of(1)
    assert store.pointed("last") == store.path_of(4)


def test_a_failure_of_the_thread_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    def may_not() -> None:
        raise LostError("taken over")

    saver = Saver(Store(tmp_path), may=may_not)
    save(saver, 1)
    with pytest.raises(LostError):
        save(saver, 2)
    saver.wait()
    assert Store(tmp_path).published() == []


def test_a_nan_is_never_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    saver = Saver(store, may=may)
    save(saver, 1)
    save(saver, 2, value=math.nan)
    with pytest.raises(NonFiniteError, match="weight at step 2"):
        saver.wait()
    assert store.newest() == (store.path_of(1), [])


def test_a_slow_disk_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Launchers kill 30 s after their signal: a save that takes most of that is said before it matters (S2)."""
    monkeypatch.setattr("vitdist.checkpoint.saver._WARN_SECONDS", 0.0)
    monkeypatch.setattr(logging.getLogger("vitdist"), "propagate", True)
    saver = Saver(Store(tmp_path), may=may)
    for step in (1, 2):
        save(saver, step)
    saver.wait()
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "launchers kill 30 s after" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path, "size=1m") as disk:
        yield disk


@pytest.mark.parametrize("name", ORDER)
def test_a_disk_that_is_full_at_any_file_of_a_save(name: str, small_disk: Path) -> None:
    store = Store(small_disk)
    saver = Saver(store, may=may)
    save(saver, 1)
    saver.wait()
    page = os.sysconf("SC_PAGE_SIZE")
    blocks = [-(-(store.path_of(1) / file).stat().st_size // page) * page for file in ORDER]
    room = sum(blocks[: ORDER.index(name)]) + blocks[ORDER.index(name)] // 2 // page * page
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize - room))
    save(saver, 2)
    with pytest.raises(ResourceError) as caught:
        saver.wait()
    line = str(caught.value)
    assert str(store.folder) in line and "80000 bytes" in line and f"{room} are free" in line and "\n" not in line
    assert store.newest() == (store.path_of(1), [])
    assert store.pointed("last") == store.path_of(1)
    assert not list(store.folder.glob(".stage*"))
    (small_disk / "filler").unlink()
    save(saver, 2)
    saver.wait()
    assert store.newest() == (store.path_of(2), [])


def test_json_and_tensors_of_a_checkpoint_are_only_data(tmp_path: Path) -> None:
    """Sizes are looked at before anything is parsed."""
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "nan.json").write_text('{"step": NaN}')
    (tmp_path / "pickle.json").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for name in ("deep", "nan", "pickle", "link", "missing"):
        with pytest.raises(CheckpointError):
            files.read_json(tmp_path / f"{name}.json")
    (tmp_path / "huge.safetensors").write_bytes((90_000_000).to_bytes(8, "little") + b" " * 90_000_000)
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    (tmp_path / "overlap.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    for name in ("huge", "pickle", "overlap", "missing"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            files.read_tensors(tmp_path / f"{name}.safetensors")
