"""What goes into a pack: a photograph's bytes, wherever they are, and what is known about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vitdist.errors import DataError


class ImageSource(Protocol):
    """Bytes that can be read when their turn comes."""

    @property
    def num_bytes(self) -> int: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FileSlice:
    """`length` bytes at `offset` of a file; the whole file by `whole_file`."""

    path: Path
    offset: int
    length: int

    @property
    def num_bytes(self) -> int:
        return self.length

    def read(self) -> bytes:
        """The bytes; DataError when the file cannot be read or has become shorter."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(data) < self.length:
            raise DataError(f"{self.path} became shorter while it was read; start again")
        return data


def whole_file(path: Path) -> FileSlice:
    """A file as it is now; DataError when it is not there."""
    try:
        return FileSlice(path, 0, os.stat(path).st_size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{str(path)!r} cannot be a file's name") from None


@dataclass(frozen=True)
class SourceSample:
    """One photograph to be packed.

    `labels` gives class names by level, as far down the tree as known; `group` (any text) marks samples that belong
    together; `details` go into the json beside the image as they are (id, path, box...).
    """

    key: str
    split: str
    labels: Mapping[str, str]
    image: ImageSource
    where: str
    group: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
