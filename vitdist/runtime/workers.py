"""The loader's worker processes: how they are, whether one was lost, and their end."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from pathlib import Path

import torch


def lost_worker(error: Exception) -> Exception:
    """The error that a dead worker stands behind, if it does; else the error itself. Main thread only.

    torch says that a worker died from a SIGCHLD handler, which may strike anywhere; the broken pipe that it leaves may
    come first. From here on the handler is off, so that it does not strike while the failure is being dealt with.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if isinstance(error, OSError | EOFError):
            time.sleep(0.2)  # the pipe breaks a moment before the system knows of the death
            torch._C._error_if_any_worker_fails()
    except RuntimeError as worker:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return worker
    return error


def end_workers() -> None:
    """Kill them: they ignore every other signal."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a dead worker for a failure
    for child in multiprocessing.active_children():
        child.kill()


def describe_workers() -> str:
    """How they are, for the line that says why no data came."""
    states = []
    for child in multiprocessing.active_children():
        try:
            state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in "TtZX":
            states.append(f"loader worker {child.pid} is {'stopped' if state in 'Tt' else 'dead'}")
    return ", ".join(states) or "its loader workers run; does the file system hang?"
