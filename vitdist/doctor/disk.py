"""The volume of a run's folder: how fast it writes, and what is free on it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vitdist.doctor.findings import Finding

BLOCK = 4 << 20
MAX_BYTES, MAX_SECONDS = 512 << 20, 4.0
SLOW = 50e6  # bytes a second
FEW_BYTES, FEW_INODES = 5 << 30, 10_000


def disk(out: Path) -> Iterator[Finding]:
    """Of the folder itself, or of the one it will be made in. What is written is removed."""
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    text = f"{out}: {free / 1e9:.1f} of {state.f_blocks * state.f_frsize / 1e9:.1f} GB free (a quota may be lower)"
    yield Finding("disk", text, "" if free >= FEW_BYTES else "make room, or use another out=...")
    if state.f_files:
        few = "" if state.f_favail >= FEW_INODES else "delete files, or use another out=..."
        yield Finding("disk", f"{out}: {state.f_favail:,} of {state.f_files:,} inodes free", few)
    yield _speed(out, folder)


def _speed(out: Path, folder: Path) -> Finding:
    try:
        num_bytes, seconds = _write(folder)
    except OSError as error:
        return Finding("disk", f"{out} cannot be written: {error.strerror}", "give another out=...")
    speed = num_bytes / seconds
    text = f"{out}: {speed / 1e6:.0f} MB/s written and flushed ({num_bytes >> 20} MB); a GB takes {1e9 / speed:.1f} s"
    return Finding(
        "disk", text, "" if speed >= SLOW else "use a faster volume for out=..., or a longer checkpoint.every"
    )


def _write(folder: Path) -> tuple[int, float]:
    """(bytes, seconds) of a file that no compression makes smaller."""
    block = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=folder) as file:
        began, written = time.perf_counter(), 0
        while written < MAX_BYTES and time.perf_counter() - began < MAX_SECONDS:
            file.write(block)
            written += BLOCK
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        with contextlib.suppress(OSError):
            file.truncate(0)
    return written, seconds
