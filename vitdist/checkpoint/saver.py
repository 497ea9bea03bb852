"""Saving beside the training: a thread writes and publishes what was copied to the host, while the steps go on."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors

from vitdist.checkpoint.state import Snapshot
from vitdist.checkpoint.store import Retention, Store
from vitdist.errors import ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("no space left", "quota exceeded", "file too large")
KILL_AFTER = 30.0  # torchrun and many schedulers send SIGKILL this long after SIGTERM
_WARN_SECONDS = 20.0

log = logging.getLogger(__name__)


class Saver:
    """On rank 0. One save at a time; a failure is kept until `wait` or the next `save` raises it."""

    def __init__(self, store: Store, *, may: Callable[[], None]) -> None:
        """`may` raises when this process must not publish any more; asked right before each rename."""
        self._store = store
        self._may = may
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._began: float | None = None
        self.seconds = 0.0  # of the last save, from snapshot to pruned
        self._warned = False

    def save(
        self,
        snapshot: Snapshot,
        *,
        is_best: bool,
        retention: Retention,
        values: Mapping[int, float],
        stall: float = 0.0,
    ) -> None:
        """Start publishing; returns at once. Waits for the save before and raises its failure.

        `stall`: seconds for which the steps waited for the snapshot, for the log.
        """
        self.wait()
        arguments = (snapshot, is_best, retention, dict(values), stall)
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, args=arguments, name="saver", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What the thread failed with, if it has."""
        return self._failure

    @property
    def busy_seconds(self) -> float:
        """How long the save under way has taken so far; 0 when there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def wait(self, timeout: float | None = None) -> None:
        """Until nothing is under way (or `timeout` seconds); raises what the thread failed with."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(
        self, snapshot: Snapshot, is_best: bool, retention: Retention, values: dict[int, float], stall: float
    ) -> None:
        began = time.monotonic()
        try:
            with full_disk_named(self._store.folder, snapshot.num_bytes):
                path = self._store.publish(
                    snapshot.step, lambda stage: snapshot.write(stage, self._store.mark), may=self._may
                )
                if is_best:
                    self._store.point("best", path)
            self._store.prune(retention, values)
            self.seconds = time.monotonic() - began
            log.info(
                "checkpoint of step %d published: %.1f MB, the steps waited %.0f ms for it, written in %.1f s",
                snapshot.step, snapshot.num_bytes / 1e6, stall * 1e3, self.seconds,
            )  # fmt: skip
            self._warn_when_slow(snapshot)
        except BaseException as error:  # it must reach the training, which raises it on all ranks alike
            self._failure = error
        finally:
            self._began = None

    def _warn_when_slow(self, snapshot: Snapshot) -> None:
        if self.seconds <= _WARN_SECONDS or self._warned:
            return
        self._warned = True
        log.warning(
            "a checkpoint (%.1f GB) takes %.0f s here, and launchers kill %.0f s after their SIGTERM: "
            "give torchrun a longer --shutdown-timeout, or the job a signal well before its limit",
            snapshot.num_bytes / 1e9, self.seconds, KILL_AFTER,
        )  # fmt: skip


@contextlib.contextmanager
def full_disk_named(folder: Path, needed: int) -> Iterator[None]:
    """A full disk inside the block becomes a ResourceError with path, needed and free bytes."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if getattr(error, "errno", None) not in _FULL and not any(word in str(error).lower() for word in _FULL_WORDS):
            raise
        raise ResourceError(no_room(folder, needed)) from error


def no_room(folder: Path, needed: int) -> str:
    free = free_bytes(folder)
    return (
        f"no room for a checkpoint in {folder}: it needs {needed} bytes and {free} are free (or a quota or file size "
        "limit is reached); free some, lower checkpoint.keep_last, or use another out=..., then start again to resume"
    )


def free_bytes(folder: Path) -> int:
    """Free bytes on the volume of a folder that may not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
