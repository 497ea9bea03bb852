"""A folder that appears with all its files or not at all, and an old one that is never mixed with a new one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitdist.data.index import INDEX_NAME, load_index
from vitdist.data.packing.verify import verify
from vitdist.durable import sync_folder
from vitdist.errors import DataError, ResourceError, UsageError

SKIPPED_NAME = "skipped.json"  # beside the index: which bad photographs were left out
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(out: Path, *, overwrite: bool = False, owned: Sequence[str] = ()) -> Iterator[Path]:
    """A folder beside `out` to write a packed set into; at the end it is renamed to `out`.

    An `out` that already holds exactly this set is left as it is; where it is damaged it is replaced. UsageError,
    before anything is written, when `out` is something else than a packed set, and afterwards when it is a different
    one and `overwrite` is not given. A disk that fills up is a ResourceError. Whatever happens, a kill included, `out`
    is the old set, the new one or absent. `owned` names folders that belong to the set besides what its index lists.
    """
    _check_target(out)
    _sweep(out)
    stage = out.with_name(f"{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
        yield stage
        _publish(stage, out, overwrite, owned)
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(stage) from None
        where = error.filename or stage
        raise ResourceError(f"{where} cannot be written ({error.strerror}); give another OUT") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """ResourceError when the volume that `folder` is on, or will be on, has fewer free bytes than `needed`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"{folder}: {needed} bytes are needed there and {free} are free; free some space or give another OUT"
        )


def disk_full(stage: Path) -> ResourceError:
    """What to say when a write found no room although it was checked before."""
    written = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    free = shutil.disk_usage(stage.parent).free
    return ResourceError(
        f"{stage}: no room for more than the {written} bytes written ({free} free on the volume; a quota or file size "
        "limit may be lower); free some space or give another OUT"
    )


def _check_target(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is no folder; give another OUT")
    if out.is_dir() and any(out.iterdir()) and not (out / INDEX_NAME).is_file():
        raise UsageError(f"{out} holds other files and no packed set; give a folder that is empty or does not exist")


def _publish(stage: Path, out: Path, overwrite: bool, owned: Sequence[str]) -> None:
    for folder in (stage, *(path for path in stage.rglob("*") if path.is_dir())):
        sync_folder(folder)
    if (out / INDEX_NAME).is_file():
        is_same = (stage / INDEX_NAME).read_bytes() == (out / INDEX_NAME).read_bytes()
        if is_same and not verify(out):
            return
        if not (is_same or overwrite):
            raise UsageError(f"{out} holds another packed set; give another OUT, or --overwrite to replace it")
        _replace(stage, out, owned)
    else:
        os.replace(stage, out)
    sync_folder(out.absolute().parent)


def _replace(stage: Path, out: Path, owned: Sequence[str]) -> None:
    """Move the old set aside and the new one in, then delete of the old what its index names and what is `owned`."""
    number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.old-{n}").exists())
    old = out.with_name(f"{out.name}.old-{number}")
    os.replace(out, old)
    os.replace(stage, out)
    for name in owned:
        shutil.rmtree(old / name, ignore_errors=True)
    discard(old)


def discard(folder: Path) -> None:
    """Delete a packed set's own files, index first; files of others, and so the folder, stay."""
    try:
        index = load_index(folder)
    except DataError:
        return
    (folder / INDEX_NAME).unlink()
    for split in index.splits.values():
        for path in (SKIPPED_NAME, split.table.path, *(shard.path for shard in split.shards)):
            if not os.path.isabs(path) and ".." not in Path(path).parts:
                (folder / path).unlink(missing_ok=True)
    for subfolder in sorted((folder, *(path for path in folder.rglob("*") if path.is_dir())), reverse=True):
        if not any(subfolder.iterdir()):
            subfolder.rmdir()


def _sweep(out: Path) -> None:
    """Delete what packings of `out` that were killed on this host have left."""
    ours = re.compile(re.escape(f"{out.name}.partial-{socket.gethostname()}-") + r"(\d+)")
    for path in out.parent.glob("*.partial-*") if out.parent.is_dir() else ():
        match = ours.fullmatch(path.name)
        if match and not _is_alive(int(match.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
