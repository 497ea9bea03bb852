"""From an exception to the exit code of the contract, the one line the user reads, and exit.json."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vitdist.durable import write_whole
from vitdist.errors import LostError, OwnLoss, ResourceError, Stopped, VitdistError, lines

EXIT_FILE = "exit.json"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# a path that the user gave: no permission, or something else in its place
_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
# how gloo and NCCL say that a peer is gone; both raise plain RuntimeErrors, or torch's Dist*Error with these words
_LOST_WORDS = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "timed out",
    "pair closure",
    "gloo",
    "nccl",
    "socket",
)


@dataclass(frozen=True)
class Exit:
    """What exit.json holds. `requeue` is what a batch script decides by."""

    code: int
    reason: str
    step: int
    rank: int
    attempt: int
    requeue: bool
    message: str = ""

    def write(self, run_dir: Path) -> None:
        with contextlib.suppress(OSError):  # on a full disk the exit status itself still tells
            write_whole(run_dir / EXIT_FILE, json.dumps(asdict(self)) + "\n")


def classify(error: BaseException) -> VitdistError:
    """The project's own error for any exception; an unknown one becomes exit code 1."""
    if isinstance(error, VitdistError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped("interrupted")
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return ResourceError(f"out of memory: {_first_line(error)}; use a smaller train.micro_batch_size")
    if isinstance(error, OSError) and error.errno in _DISK:
        return ResourceError(f"no space left: {error.filename or error}; free some, then start again to resume")
    if isinstance(error, OSError) and error.errno in _PLACE and error.filename is not None:
        return ResourceError(
            f"{error.filename} cannot be read or written: {error.strerror}; change its permissions or give another path"
        )
    if isinstance(error, RuntimeError) and "dataloader worker" in str(error).lower():
        return OwnLoss(
            f"a loader worker is gone: {_first_line(error)} (out of memory? data.num_workers); start again to resume"
        )
    if _is_loss(error):
        return LostError(f"a peer or the network was lost: {_first_line(error)}; start again to resume")
    return VitdistError(f"internal error: {type(error).__name__}: {_first_line(error)}")


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed because somebody else did."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST_WORDS)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def one_line(error: VitdistError) -> str:
    return "; ".join(lines(error))
