"""The store, files only: one checkpoint verifies at every instant, and damage is passed over by name (R5, R6, R9)."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.damage import DAMAGES, FILES
from vitdist.checkpoint.manifest import verify
from vitdist.checkpoint.store import Retention, Store, find_checkpoint
from vitdist.errors import CheckpointError, LostError

KEEP_ONE = Retention(keep_last=1, keep_best=0)


def may() -> None:
    """Nobody else has the lock."""


def content(step: int) -> Any:
    def write(stage: Path) -> dict[str, Any]:
        for name in FILES:
            (stage / name).write_text(f"{name} of step {step} " * 50)
        return {"weights": "raw"}

    return write


def publish(store: Store, *steps: int, retention: Retention | None = None) -> None:
    for step in steps:
        store.publish(step, content(step), may=may)
        if retention is not None:
            store.prune(retention, {})


def steps_of(store: Store) -> list[int]:
    return [step for step, _ in store.published()]


class Watcher(threading.Thread):
    """Looks every few milliseconds whether some checkpoint verifies; a look that a change overlapped counts as none."""

    def __init__(self, store: Store) -> None:
        super().__init__(daemon=True)
        self._store = store
        self.stop = threading.Event()
        self.num_looks = 0
        self.bare: list[str] = []

    def run(self) -> None:
        while not self.stop.wait(0.005):
            self.num_looks += 1
            before = os.listdir(self._store.folder)
            verified = any(not verify(path, step=step) for step, path in self._store.published())
            if not verified and sorted(before) == sorted(os.listdir(self._store.folder)):
                self.bare.append(f"look {self.num_looks}: {sorted(before)}")


def test_through_200_saves_one_always_verifies(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, 0)
    watcher = Watcher(store)
    watcher.start()
    for step in range(1, 201):
        publish(store, step, retention=KEEP_ONE)
        if step % 5 == 0:  # the same step again, as after a resume
            publish(store, step, retention=KEEP_ONE)
        if step % 9 == 0:  # the newest is damaged; going on from the one before, its step is published anew
            publish(store, step + 1)
            os.truncate(store.path_of(step + 1) / "state.json", 3)
    watcher.stop.set()
    watcher.join()
    assert watcher.num_looks > 20
    assert watcher.bare == []


def test_after_every_single_change_on_disk_one_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watcher may be too slow to see: every rename, replacement and removal is followed by a look."""
    store = Store(tmp_path)
    publish(store, 0)
    num_looks = 0

    def looked_after(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_looks
            found = function(*arguments, **options)
            num_looks += 1
            assert any(not verify(path, step=step) for step, path in store.published()), (function, arguments)
            return found

        return call

    for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, looked_after(getattr(module, name)))
    publish(store, 3, 3, 6, 6, retention=KEEP_ONE)
    publish(store, 9)
    os.truncate(store.path_of(9) / "state.json", 3)
    publish(store, 9, retention=KEEP_ONE)
    with pytest.raises(CheckpointError):
        store.publish(9, content(4), may=may)
    assert num_looks >= 15


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, 3, 6)
    damaged = store.path_of(6)
    DAMAGES[name](damaged)
    left = sorted(str(path) for path in damaged.rglob("*"))
    newest, notes = store.newest()
    assert newest == store.path_of(3)
    (note,) = notes
    assert note.startswith(f"{damaged}: ") and note.endswith("passed over")
    assert find_checkpoint(tmp_path) == store.path_of(3), "last names the damaged one"
    assert sorted(str(path) for path in damaged.rglob("*")) == left, "nothing was deleted"


def test_a_leftover_stage_a_dangling_pointer_and_strange_names_are_no_checkpoints(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, 3)
    (store.folder / ".stage_00000009").mkdir()
    (store.folder / "step_9").mkdir()
    (store.folder / "step_00000012").symlink_to(store.path_of(3))
    (store.folder / "last").unlink()
    (store.folder / "last").symlink_to("step_00000099")
    assert store.newest() == (store.path_of(3), [])
    assert store.pointed("last") is None
    assert find_checkpoint(tmp_path) == store.path_of(3)
    publish(store, 6)
    assert not (store.folder / ".stage_00000009").exists()
    assert store.pointed("last") == store.path_of(6)


def test_pointers_are_text_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    store = Store(tmp_path)
    publish(store, 3)
    assert not (store.folder / "last").is_symlink()
    assert store.pointed("last") == store.path_of(3)
    for text in ("../../etc", "x" * 10**6, "\0"):
        (store.folder / "last").write_text(text)
        assert store.pointed("last") is None
    (store.folder / "last").unlink()
    os.mkfifo(store.folder / "last")
    assert store.pointed("last") is None, "a pipe is not waited on"


def test_retention_keeps_last_best_and_every_nth_sorted_by_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, 99999998, 100000000, 100000010, 100000020, 100000025, 100000030)
    values = {99999998: 0.9, 100000010: 0.5}
    store.prune(Retention(keep_last=2, keep_best=1, keep_every=20), values)
    assert steps_of(store) == [99999998, 100000000, 100000020, 100000025, 100000030]
    store.point("best", store.path_of(100000020))
    store.prune(Retention(keep_last=1, keep_best=0), {})
    assert steps_of(store) == [100000020, 100000030], "what best names stays"


def test_what_another_run_wrote_is_never_deleted(tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    publish(other, 1)
    store = Store(tmp_path / "own")
    publish(store, 2, 3)
    shutil.copytree(other.path_of(1), store.path_of(1))
    (store.folder / "step_00000000").mkdir()
    (store.folder / "step_00000000" / "precious.txt").write_text("mine")
    publish(store, 4, 5, retention=KEEP_ONE)
    assert steps_of(store) == [0, 1, 5]


def test_a_failed_delete_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    publish(store, 1, 2, 3)
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if "gone" in str(target) and "00000001" in str(source):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    store.prune(KEEP_ONE, {})
    assert steps_of(store) == [1, 3]


def test_a_verified_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, 3)
    inode = store.path_of(3).stat().st_ino
    publish(store, 3)
    assert store.path_of(3).stat().st_ino == inode, "the same again leaves it where it is"
    with pytest.raises(CheckpointError, match="verifies and is another"):
        store.publish(3, content(4), may=may)
    assert not verify(store.path_of(3), step=3)
    (store.path_of(3) / "state.json").write_text("damaged")
    publish(store, 3)
    assert not verify(store.path_of(3), step=3)
    assert (store.folder / "aside_step_00000003.1" / "state.json").read_text() == "damaged"


def test_a_lost_lock_publishes_nothing(tmp_path: Path) -> None:
    def may_not() -> None:
        raise LostError("taken over")

    store = Store(tmp_path)
    publish(store, 1)
    with pytest.raises(LostError):
        store.publish(2, content(2), may=may_not)
    assert steps_of(store) == [1]
    assert store.pointed("last") == store.path_of(1)
    assert not list(store.folder.glob(".stage*"))


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, 3, 6, 9)
    (store.path_of(9) / "state.json").write_text("damaged")
    notes = store.rewind(3)
    assert len(notes) == 2 and all("set aside" in note for note in notes)
    assert steps_of(store) == [3]
    assert store.pointed("last") == store.path_of(3)
    assert (store.folder / "aside_step_00000009.1").is_dir()
    publish(store, 6, 9)
    assert store.rewind(3) and steps_of(store) == [3]
    assert (store.folder / "aside_step_00000009.2").is_dir()


@pytest.mark.parametrize("phase", ["before-manifest", "before-publish"])
def test_a_failure_while_staging_leaves_the_old_one_and_nothing_else(phase: str, tmp_path: Path) -> None:
    def mark(passed: str, step: int) -> None:
        if passed == phase and armed:
            raise OSError(28, "No space left on device")

    armed = False
    store = Store(tmp_path, mark=mark)
    publish(store, 1)
    armed = True
    with pytest.raises(OSError):
        publish(store, 2)
    assert store.newest() == (store.path_of(1), [])
    assert sorted(os.listdir(store.folder)) == [".run", "last", "step_00000001"]
