"""Claims: locks between the processes of one node that the kernel lets go when their holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the file `path` alone in the whole node, or say that somebody does; it is gone afterwards."""
    descriptor = _claim(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with suppress(FileNotFoundError):
                path.unlink()
            _let_go(descriptor)


def _claim(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # the holder before us took it away: begin anew
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)


def is_claimed(path: Path) -> bool:
    """Whether somebody alive holds a claim."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file that stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _let_go(descriptor)


def _let_go(descriptor: int) -> None:
    """Unlock for good: a process forked meanwhile has the descriptor too, and would go on holding the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
