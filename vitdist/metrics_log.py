"""metrics.jsonl, the truth of a run: one JSON object a line, floats in full precision, never a line twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitdist.durable import write_whole
from vitdist.errors import ResourceError


class MetricsLog:
    """An append-only file of one JSON object a line; every line is handed to the system at once.

    A last line that a crash cut off, and lines beyond the step a run resumes from, are moved to
    <name>.discarded.jsonl. The file holds no NaN: a value that is not finite is null, and the line says "nonfinite".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(None)
        self._file = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; ResourceError when it cannot be written whole."""
        self.write_many([values])

    def write_many(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append some lines with one system call."""
        data = "".join(encode(values) + "\n" for values in lines).encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            raise ResourceError(f"cannot write {self.path}: {error.strerror}; make room and start again") from None
        if written != len(data):
            raise ResourceError(f"cannot write {self.path}: the disk is full; make room and start again")

    def truncate_to(self, step: int) -> int:
        """Set lines of later steps aside and return how many there were; lines without a step stay."""
        self._file.close()
        moved = self._rewrite(step)
        self._file = self.path.open("ab", buffering=0)
        return moved

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, step: int | None) -> int:
        """Keep whole lines up to `step`, move the others; nothing is lost whenever this is killed."""
        data = self.path.read_bytes() if self.path.exists() else b""
        kept: list[bytes] = []
        moved: list[bytes] = []
        for line in data.splitlines():
            values = _decode(line)
            beyond = values is None or (step is not None and values.get("step", 0) > step)
            (moved if beyond else kept).append(line + b"\n")
        whole = b"".join(kept)
        if whole != data:
            if moved:
                _append(self.path.with_suffix(".discarded.jsonl"), b"".join(moved))
            write_whole(self.path, whole)
        return len(moved)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, a cut last one left out; an empty list when there is no file."""
    if not path.exists():
        return []
    lines = (_decode(line) for line in path.read_bytes().splitlines())
    return [values for values in lines if values is not None]


def encode(values: Mapping[str, Any]) -> str:
    """One line of JSON with floats in full precision, and null beside "nonfinite" where a value is not finite."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    broken = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        plain = {**plain, **dict.fromkeys(broken), "nonfinite": True}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
