"""Checkpoints as files: published whole or not at all, verified before use, pruned only after the next one is safe.

Publish = stage in the same folder, fsync, manifest with sha256 last, read back, rename, pointer, then prune. At every
instant after the first publication at least one checkpoint that verifies is on disk. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdist.errors import CheckpointError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_MAX_MANIFEST = 1 << 20
Mark = Callable[[str], None]


def _nowhere(phase: str) -> None:
    """The default of `mark`: nothing happens where a fault could."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, the `keep_best` best by monitor, and what `last` and `best` name."""

    keep_last: int
    keep_best: int


class Store:
    """The checkpoints folder of one run. Only the process that holds the run's lock may publish."""

    def __init__(self, run_dir: Path, *, mark: Mark = _nowhere) -> None:
        self.folder = run_dir / FOLDER
        self._mark = mark

    def publish(self, step: int, write: Callable[[Path], dict[str, Any]], *, may: Callable[[], None]) -> Path:
        """Write a checkpoint through `write(stage)`, which returns what the manifest says of it, and make it `last`.

        `may` is called right before the rename and raises when this process must not publish any more (a lost lock).
        """
        final = self.folder / f"step_{step:08d}"
        stage = self.folder / f".stage_{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        stage.mkdir()
        try:
            about = write(stage)
            self._mark("before-manifest")
            _seal(stage, step, about)
            problems = verify(stage, step=step)
            if problems:
                raise CheckpointError(f"{final} did not read back as written: {problems[0]}")
            self._mark("before-publish")
            may()
            _replace_folder(stage, final)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        self._mark("before-pointer")
        self.point("last", final)
        return final

    def sweep(self) -> None:
        """Remove what an interrupted publication left behind."""
        for leftover in self.folder.glob(".stage_*"):
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
        _sync_folder(self.folder)

    def pointed(self, name: str) -> Path | None:
        """The checkpoint a pointer names, if it is there."""
        pointer = self.folder / name
        try:
            text = os.readlink(pointer) if pointer.is_symlink() else pointer.read_text().strip()
        except OSError:
            return None
        target = self.folder / text
        return target if _NAME.fullmatch(text) and target.is_dir() else None

    def published(self) -> list[tuple[int, Path]]:
        """(step, folder) of every published checkpoint, oldest first by number."""
        if not self.folder.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if not path.is_symlink())
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and a line for each newer one passed over. Deletes nothing."""
        notes: list[str] = []
        for step, path in reversed(self.published()):
            problems = verify(path, step=step)
            if not problems:
                return path, notes
            notes.append(f"{path}: {problems[0]}; passed over")
        return None, notes

    def prune(self, retention: Retention, value_of: dict[int, float]) -> None:
        """Delete what retention does not keep. `value_of`: step -> how good (higher is better). A failed delete is left."""
        published = self.published()
        keep = {step for step, _ in published[-max(1, retention.keep_last) :]}
        ranked = sorted((s for s, _ in published if s in value_of), key=lambda s: (value_of[s], s), reverse=True)
        keep.update(ranked[: retention.keep_best])
        pointed = {self.pointed("last"), self.pointed("best")}
        for step, path in published:
            if step not in keep and path not in pointed and (path / MANIFEST).is_file():
                self._mark("while-pruning")
                shutil.rmtree(path, ignore_errors=True)


def verify(path: Path, *, step: int | None = None) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty when every byte is what its manifest says."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    if step is not None and manifest["step"] != step:
        return [f"its manifest says step {manifest['step']}"]
    listed: dict[str, Any] = manifest["files"]
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(set(listed) - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - set(listed))]
    for name in sorted(set(listed) & present):
        problems += _check_file(path / name, listed[name])
    return problems


def _check_file(path: Path, said: Any) -> list[str]:
    if path.is_symlink() or not path.is_file():
        return [f"{path.name} is not a plain file"]
    if not isinstance(said, dict) or path.stat().st_size != said.get("bytes"):
        return [f"{path.name} is {path.stat().st_size} bytes long, not as written"]
    try:
        return [] if file_hash(path) == said.get("sha256") else [f"{path.name} has changed since it was written"]
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; CheckpointError when it is none."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MAX_MANIFEST:
            raise CheckpointError(f"{file} is too large to be a manifest")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("files"), dict):
        raise CheckpointError(f"{file} is not a manifest of format {FORMAT}")
    if type(data.get("step")) is not int:
        raise CheckpointError(f"{file} says no step")
    if any("/" in name or name.startswith(".") for name in data["files"]):
        raise CheckpointError(f"{file} names a file outside its folder")
    return data


def find_checkpoint(path: Path, *, prefer: tuple[str, ...] = ("best", "last")) -> Path:
    """The checkpoint that a run folder or checkpoint folder stands for: a run means its best, else its newest that verifies."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        problems = verify(path)
        if problems:
            raise CheckpointError(f"{path}: {problems[0]}; choose another checkpoint (vitdist checkpoint list)")
        return path
    if not (path / FOLDER).is_dir():
        raise CheckpointError(f"{path} is neither a run nor a checkpoint: it has no {FOLDER}/ and no {MANIFEST}")
    store = Store(path)
    for name in prefer:
        target = store.pointed(name)
        if target is not None and not verify(target):
            return target
    newest, notes = store.newest()
    if newest is None:
        raise CheckpointError(f"{path} has no checkpoint that verifies" + "".join(f"; {note}" for note in notes[:3]))
    return newest


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _seal(stage: Path, step: int, about: dict[str, Any]) -> None:
    """Flush every file, then write the manifest that vouches for them."""
    files = {}
    for file in sorted(stage.iterdir()):
        _sync_file(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": file_hash(file)}
    manifest = stage / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, **about, "files": files}, indent=1) + "\n")
    _sync_file(manifest)
    _sync_folder(stage)


def _replace_folder(stage: Path, final: Path) -> None:
    """Rename into place. A folder of that name is an older try at the same step: it goes aside first, then away."""
    aside = None
    if final.exists():
        aside = final.with_name(f".stage_old_{final.name}")
        os.rename(final, aside)
    os.rename(stage, final)
    _sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
