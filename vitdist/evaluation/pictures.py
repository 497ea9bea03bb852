"""Small pictures of evaluated samples, read from the packed set where it can be reached."""

from __future__ import annotations

import base64
import io
from contextlib import suppress

import numpy as np
from PIL import Image

from vitdist.data.index import Split
from vitdist.data.pixels.images import DamagedImage, decode
from vitdist.data.storage.cache import ShardCache
from vitdist.data.storage.remote_set import open_set
from vitdist.data.storage.shards import DamagedSample, ShardReader
from vitdist.errors import ResourceError, VitdistError

THUMBNAIL = 160  # pixels of the longer side


class Pictures:
    """Thumbnails and keys of one packed split; a picture that cannot be read is None and counted."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.num_unreadable = 0
        self._reader = ShardReader(split)

    def thumbnail(self, row: int, side: int = THUMBNAIL) -> str | None:
        """A data: URI of a JPEG, its longer side `side` pixels."""
        try:
            pixels = decode(self._reader.read(row), min_side=side)
        except (ResourceError, DamagedSample, DamagedImage):
            self.num_unreadable += 1
            return None
        return data_uri(pixels, side)

    def keys(self, rows: np.ndarray) -> dict[int, str]:
        """Row -> key; rows whose shard does not tell are left out. Shard by shard, so that each is opened once."""
        found: dict[int, str] = {}
        for row in sorted(map(int, rows)):
            with suppress(ResourceError, DamagedSample):
                found[row] = self._reader.key(row)
        return found

    def close(self) -> None:
        self._reader.close()


def open_pictures(data_path: str, cache: ShardCache | None, split: str, last_row: int) -> tuple[Pictures | None, str]:
    """The pictures of a split, or None and a sentence that says why there are none."""
    if not data_path:
        return None, "The recipe names no data set, so there are no pictures."
    try:
        found = open_set(data_path, cache).split(split)
    except VitdistError as error:
        return None, f"No pictures: {error}."
    if last_row >= found.num_samples:
        return None, f"No pictures: the set at {data_path} is not the one that was evaluated."
    return Pictures(found), ""


def data_uri(pixels: np.ndarray, side: int) -> str:
    """A picture [H, W, 3] as the JPEG of a data: URI, its longer side at most `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
