"""Checkpoints as files: published whole or not at all, verified before use, pruned only after the next one is safe.

Publish = stage in the same folder, fsync, manifest with sha256 last, read back, rename, pointer, then prune. At every
instant after the first publication at least one checkpoint that verifies is on disk. No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdist.checkpoint.manifest import MANIFEST, NAME, is_plain_file, read_manifest, seal, verify
from vitdist.durable import sync_folder, write_whole
from vitdist.errors import CheckpointError

FOLDER = "checkpoints"
RUN_ID = ".run"
_STAGE = ".stage_"
_ASIDE = "aside_"
_MAX_POINTER = 256
Mark = Callable[[str, int], None]

log = logging.getLogger(__name__)


def _nowhere(phase: str, step: int) -> None:
    """The default of `mark`: nothing happens where a fault could."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, the `keep_best` best by monitor, every `keep_every` steps.

    What `last` and `best` name stays too.
    """

    keep_last: int
    keep_best: int
    keep_every: int | None = None


class Store:
    """The checkpoints folder of one run. Only the process that holds the run's lock may publish."""

    def __init__(self, run_dir: Path, *, mark: Mark = _nowhere) -> None:
        self.folder = run_dir / FOLDER
        self._mark = mark
        self._step = 0  # of the newest publication

    def mark(self, phase: str) -> None:
        """Pass a place at which tests let things fail."""
        self._mark(phase, self._step)

    def path_of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def publish(self, step: int, write: Callable[[Path], dict[str, Any]], *, may: Callable[[], None]) -> Path:
        """Write a checkpoint through `write(stage)`, which returns what the manifest says of it, and make it `last`.

        `may` is called right before the rename and raises when this process must not publish any more (a lost lock).
        """
        self._step = step
        final = self.path_of(step)
        stage = self.folder / f"{_STAGE}{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        stage.mkdir()
        try:
            about = write(stage)
            self.mark("before-manifest")
            seal(stage, step, {"run": self._run_id(), **about})
            problems = verify(stage, step=step)
            if problems:
                raise CheckpointError(f"{final} did not read back as written: {problems[0]}; is the disk sound?")
            self.mark("before-publish")
            may()
            self._take_place(stage, final)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        self.mark("before-pointer")
        self.point("last", final)
        return final

    def _take_place(self, stage: Path, final: Path) -> None:
        """Rename into place. What verifies is never replaced: there would be an instant without it."""
        if final.exists():
            if verify(final):
                self._set_aside(final)
            elif read_manifest(final)["files"] == read_manifest(stage)["files"]:
                shutil.rmtree(stage)
                return
            else:
                raise CheckpointError(f"{final} verifies and is another than the one to publish; move it away")
        os.rename(stage, final)
        sync_folder(self.folder)

    def sweep(self) -> None:
        """Remove what an interrupted publication or removal left behind."""
        for leftover in self.folder.glob(f"{_STAGE}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def point(self, name: str, target: Path) -> None:
        """Make a pointer (`last`, `best`) name a checkpoint: a relative link replaced by rename, or a text file."""
        draft = self.folder / f".{name}.draft"
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        try:
            draft.symlink_to(target.name, target_is_directory=True)
        except OSError:  # file systems without links
            draft.write_text(target.name + "\n")
        os.replace(draft, self.folder / name)
        sync_folder(self.folder)

    def pointed(self, name: str) -> Path | None:
        """The checkpoint a pointer names, if it is there."""
        pointer = self.folder / name
        try:
            if pointer.is_symlink():
                text = os.readlink(pointer)
            elif is_plain_file(pointer) and pointer.stat().st_size <= _MAX_POINTER:
                text = pointer.read_text(encoding="utf-8").strip()
            else:
                return None
        except (OSError, ValueError):
            return None
        target = self.folder / text
        return target if NAME.fullmatch(text) and target.is_dir() else None

    def published(self) -> list[tuple[int, Path]]:
        """(step, folder) of every published checkpoint, oldest first by number."""
        if not self.folder.is_dir():
            return []
        found = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if not path.is_symlink())
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())

    def newest(self, *, before: int | None = None) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and a line for each newer one passed over. Deletes nothing.

        `before`: only those of earlier steps are looked at.
        """
        notes: list[str] = []
        for step, path in reversed(self.published()):
            if before is not None and step >= before:
                continue
            problems = verify(path, step=step)
            if not problems:
                return path, notes
            notes.append(f"{path}: {problems[0]}; passed over")
        return None, notes

    def rewind(self, step: int) -> list[str]:
        """Going on from `step`: later checkpoints (damaged, or of a future given up) are set aside, not deleted.

        Otherwise they would be taken for this run's newest after the next stop. Returns a line for each.
        """
        later = [path for number, path in self.published() if number > step]
        notes = [f"{path} lies beyond step {step} and was set aside as {self._set_aside(path).name}" for path in later]
        if self.path_of(step).is_dir() and self.pointed("last") != self.path_of(step):
            self.point("last", self.path_of(step))
        return notes

    def _set_aside(self, path: Path) -> Path:
        number = 1
        while (target := path.with_name(f"{_ASIDE}{path.name}.{number}")).exists():
            number += 1
        os.rename(path, target)
        return target

    def prune(self, retention: Retention, value_of: dict[int, float]) -> None:
        """Delete what retention does not keep. `value_of`: step -> how good (higher is better). Failing is logged."""
        published = self.published()
        keep = {step for step, _ in published[-max(1, retention.keep_last) :]}
        ranked = sorted((s for s, _ in published if s in value_of), key=lambda s: (value_of[s], s), reverse=True)
        keep.update(ranked[: retention.keep_best])
        if retention.keep_every is not None:
            keep.update(step for step, _ in published if step % retention.keep_every == 0)
        pointed = {self.pointed("last"), self.pointed("best")}
        for step, path in published:
            if step not in keep and path not in pointed and self._is_ours(path):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Under a stage's name first: a half-deleted folder is no checkpoint, and the next sweep ends the work."""
        gone = path.with_name(f"{_STAGE}gone_{path.name}")
        try:
            os.rename(path, gone)
        except OSError as error:
            log.warning("%s could not be deleted: %s", path, error.strerror)
            return
        self.mark("while-pruning")
        shutil.rmtree(gone, ignore_errors=True)

    def _is_ours(self, path: Path) -> bool:
        """Whether this run wrote it: nothing of another run is ever deleted."""
        try:
            return bool(read_manifest(path).get("run") == self._run_id())
        except CheckpointError:
            return False

    def _run_id(self) -> str:
        """The name that this folder's checkpoints carry; made at the first one."""
        file = self.folder / RUN_ID
        try:
            return file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            name = uuid.uuid4().hex
            write_whole(file, name + "\n")
            return name


def find_checkpoint(path: Path, *, prefer: tuple[str, ...] = ("best", "last")) -> Path:
    """The checkpoint that a folder stands for: itself, or a run's best, else the run's newest that verifies."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        problems = verify(path)
        if problems:
            raise CheckpointError(f"{path}: {problems[0]}; choose another checkpoint (vitdist checkpoint list)")
        return path
    if not (path / FOLDER).is_dir():
        raise neither(path)
    store = Store(path)
    for name in prefer:
        target = store.pointed(name)
        if target is not None and not verify(target):
            return target
    newest, notes = store.newest()
    if newest is None:
        raise CheckpointError(f"{path} has no checkpoint that verifies" + "".join(f"; {note}" for note in notes[:3]))
    return newest


def neither(path: Path) -> CheckpointError:
    """What to say of a path that leads to no checkpoint."""
    return CheckpointError(f"{path} is neither a run nor a checkpoint: it has no {FOLDER}/ and no {MANIFEST}")


__all__ = ["FOLDER", "MANIFEST", "Retention", "Store", "find_checkpoint", "neither", "read_manifest", "verify"]
