"""The manifest of a checkpoint: what every file beside it must be; written last, checked before anything is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from vitdist.durable import sync_folder
from vitdist.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"step_(\d{8,12})")
_MAX_BYTES = 1 << 20


def seal(stage: Path, step: int, about: dict[str, Any]) -> None:
    """Flush every file, then write the manifest that vouches for them."""
    files = {}
    for file in sorted(stage.iterdir()):
        sync_file(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": file_hash(file)}
    manifest = stage / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, **about, "files": files}, indent=1) + "\n")
    sync_file(manifest)
    sync_folder(stage)


def verify(path: Path, *, step: int | None = None) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty when every byte is what its manifest says.

    The step is checked against `step`, else against the folder's name where that is a published one's.
    """
    try:
        manifest = read_manifest(path)
        present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    named = NAME.fullmatch(path.name)
    if step is None and named is not None:
        step = int(named[1])
    if step is not None and manifest["step"] != step:
        return [f"its manifest says step {manifest['step']}"]
    listed: dict[str, Any] = manifest["files"]
    problems = [f"{name} is missing" for name in sorted(set(listed) - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - set(listed))]
    for name in sorted(set(listed) & present):
        problems += _check_file(path / name, listed[name])
    return problems


def _check_file(path: Path, said: Any) -> list[str]:
    try:
        if not is_plain_file(path):
            return [f"{path.name} is not a plain file"]
        if not isinstance(said, dict) or path.stat().st_size != said.get("bytes"):
            return [f"{path.name} is {path.stat().st_size} bytes long, not as written"]
        return [] if file_hash(path) == said.get("sha256") else [f"{path.name} has changed since it was written"]
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; CheckpointError when it is none."""
    file = path / MANIFEST
    try:
        if not is_plain_file(file):
            raise CheckpointError(f"{file} is not a plain file")
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file} is too large to be a manifest")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("files"), dict):
        raise CheckpointError(f"{file} is not a manifest of format {FORMAT}")
    if type(data.get("step")) is not int or data["step"] < 0:
        raise CheckpointError(f"{file} says no step")
    if any("/" in name or name.startswith(".") or name == MANIFEST for name in data["files"]):
        raise CheckpointError(f"{file} names a file outside its folder")
    return data


def is_plain_file(path: Path) -> bool:
    """Neither link, nor pipe, nor device: reading it ends, and reads what lies here. OSError when it is not there."""
    return stat.S_ISREG(path.lstat().st_mode)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
