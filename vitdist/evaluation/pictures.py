"""Small pictures of evaluated samples, read from the packed set where it can be reached."""

from __future__ import annotations

import base64
import io
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vitdist.data.images import DamagedImage, decode
from vitdist.data.index import Split, is_url, load_index, read_key
from vitdist.data.tar import DamagedShard
from vitdist.errors import DataError

THUMBNAIL = 160  # pixels of the longer side


class Pictures:
    """Thumbnails and keys of one packed split; a picture that cannot be read is None and counted."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.num_unreadable = 0

    def thumbnail(self, row: int, side: int = THUMBNAIL) -> str | None:
        """A data: URI of a JPEG, its longer side `side` pixels."""
        try:
            pixels = decode(self._bytes(row), min_side=side)
        except (OSError, DamagedImage):
            self.num_unreadable += 1
            return None
        return data_uri(pixels, side)

    def keys(self, rows: np.ndarray) -> dict[int, str]:
        """Row -> key; rows whose shard does not tell are left out. Each shard is opened once."""
        found: dict[int, str] = {}
        for shard in np.unique(self.split.samples["shard"][rows]):
            mine = rows[self.split.samples["shard"][rows] == shard]
            try:
                descriptor = self._open(int(mine[0]))
            except OSError:
                continue
            try:
                found |= {int(row): key for row in mine if (key := _key(descriptor, self.split.samples[row]))}
            finally:
                os.close(descriptor)
        return found

    def _open(self, row: int) -> int:
        return os.open(self.split.shard_file(int(self.split.samples[row]["shard"])), os.O_RDONLY)

    def _bytes(self, row: int) -> bytes:
        entry = self.split.samples[row]
        descriptor = self._open(row)
        try:
            data = os.pread(descriptor, int(entry["length"]), int(entry["offset"]))
        finally:
            os.close(descriptor)
        if zlib.crc32(data) != int(entry["checksum"]):
            raise DamagedImage("cannot decode", "the bytes are not the indexed ones")
        return data


def _key(descriptor: int, entry: np.void) -> str:
    try:
        return read_key(descriptor, entry)
    except (OSError, DamagedShard):
        return ""


def open_pictures(data_path: str, split: str, last_row: int) -> tuple[Pictures | None, str]:
    """The pictures of a split, or None and a sentence that says why there are none."""
    if not data_path:
        return None, "The recipe names no data set, so there are no pictures."
    try:
        found = load_index(Path(data_path)).split(split)
    except DataError as error:
        return None, f"No pictures: {error}."
    if last_row >= found.num_samples:
        return None, f"No pictures: the set at {data_path} is not the one that was evaluated."
    if any(is_url(shard.path) for shard in found.shards):
        return None, "No pictures: the shards lie elsewhere and were not fetched again."
    return Pictures(found), ""


def data_uri(pixels: np.ndarray, side: int) -> str:
    """A picture [H, W, 3] as the JPEG of a data: URI, its longer side at most `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
