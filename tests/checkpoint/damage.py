"""Twenty ways in which a checkpoint folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vitdist.checkpoint.manifest import MANIFEST

Damage = Callable[[Path], None]
FILES = (
    "model.safetensors",
    "training.safetensors",
    "state.json",
    "recipe.yaml",
    "taxonomy.json",
    "preprocessing.json",
)


def _flip(name: str) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def _cut(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _manifest(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**data, **changes}))

    return damage


def _link(folder: Path) -> None:
    target = folder.parent / "elsewhere"
    shutil.move(folder / "state.json", target)
    (folder / "state.json").symlink_to(target)


def _pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


DAMAGES: dict[str, Damage] = {
    **{f"flipped {name}": _flip(name) for name in FILES},
    "cut model": _cut("model.safetensors"),
    "cut state": _cut("state.json"),
    "cut manifest": _cut(MANIFEST),
    "no model": _remove("model.safetensors"),
    "no recipe": _remove("recipe.yaml"),
    "no manifest": _remove(MANIFEST),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest of another step": _manifest(step=4),
    "manifest of another format": _manifest(format=99),
    "manifest without files": _manifest(files=[]),
    "extra file": lambda folder: (folder / "extra.bin").write_bytes(b"?"),
    "a link for a file": _link,
    "a pipe for a manifest": _pipe,
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()] and None,
}
