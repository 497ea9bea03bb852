"""One writer a run: a lock file with job, host, process and heartbeat, taken over when its owner is dead."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitdist.errors import OwnLoss, UsageError

LOCK = ".lock"
BEAT_SECONDS = 10.0
DEAD_AFTER = 60.0  # a heartbeat this old, on another host, belongs to a dead writer


class RunLock:
    """Held from `acquire` to `release`. A thread refreshes the heartbeat."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """UsageError naming the owner when somebody alive holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            owner = self._read()
            if owner and not _is_dead(owner):
                raise UsageError(_taken(self.path.parent, owner))
            if not self._create():
                self._break(owner)
                if not self._create():
                    raise UsageError(_taken(self.path.parent, self._read() or {}))
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """OwnLoss when another writer has taken over; called before anything is published."""
        if not self.is_held():
            raise OwnLoss(f"another process took over {self.path.parent}; this one publishes nothing more")

    def is_held(self) -> bool:
        owner = self._read()
        return owner is not None and owner.get("token") == self._token

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        owner = self._read()
        if owner and owner.get("token") == self._token:
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Judging a lock and taking it is one act among a host's processes (and others, where flock reaches)."""
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # file systems without flock: `_break` still looks at what it moved
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _create(self) -> bool:
        """Link a complete file into place: readers never see an empty lock."""
        draft = self.path.with_name(f"{LOCK}.{self._token}")
        draft.write_text(json.dumps(self._record()))
        try:
            os.link(draft, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)

    def _break(self, owner: dict[str, Any] | None) -> None:
        """Move a dead lock away by rename; a living one that came in its place meanwhile is put back."""
        grave = self.path.with_name(f"{LOCK}.dead.{self._token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, grave)
            moved = self._read(grave)
            if moved is not None and moved.get("token") != (owner or {}).get("token"):
                with contextlib.suppress(FileExistsError):
                    os.link(grave, self.path)
            grave.unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        return {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "job": _job(),
            "beat": time.time(),
        }

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        try:
            data = json.loads((path or self.path).read_text())
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            owner = self._read()
            if not owner or owner.get("token") != self._token:
                return  # taken over: `check` will say so before anything is published
            draft = self.path.with_name(f"{LOCK}.{self._token}")
            with contextlib.suppress(OSError):  # a full disk costs a heartbeat, not the run
                draft.write_text(json.dumps(self._record()))
                os.replace(draft, self.path)


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _start_time(pid: int) -> str:
    """Start time of a live process in clock ticks, so that a reused process id is not mistaken; '' when it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _is_dead(owner: dict[str, Any]) -> bool:
    try:
        pid, beat = int(owner.get("pid", 0)), float(owner.get("beat", 0))
    except (TypeError, ValueError):
        return True
    if owner.get("host") == socket.gethostname():
        return _start_time(pid) != owner.get("started") or not owner.get("started")
    job = owner.get("job")
    if job and job == _job():
        return True  # the same job, requeued to other nodes: its earlier processes are gone
    return time.time() - beat > DEAD_AFTER


def _taken(run_dir: Path, owner: dict[str, Any]) -> str:
    return (
        f"{run_dir} is being written by process {owner.get('pid')} on {owner.get('host')} "
        f"(job {owner.get('job') or 'none'}, heard of {time.time() - float(owner.get('beat', 0)):.0f} s ago); "
        "wait for it, or give this run another folder with out=..."
    )
