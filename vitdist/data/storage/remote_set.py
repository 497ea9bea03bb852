"""A packed set at an address: its index and tables are kept on this node, its shards come when they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path, PurePosixPath

from vitdist.data.index import INDEX_NAME, DatasetIndex, Split, is_url, load_index
from vitdist.data.storage.cache import LOCK, NoRoom, ShardCache, Wanted
from vitdist.data.storage.claims import locked
from vitdist.data.storage.remote import RemoteError, check_address, read_whole, shown
from vitdist.durable import write_whole
from vitdist.errors import DataError, UsageError

MAX_INDEX = 512 << 20
SETS = "sets"
LATEST = "latest"

log = logging.getLogger(__name__)


def open_set(path: str | Path, cache: ShardCache | None = None) -> DatasetIndex:
    """The index of a packed set in a folder or at an address; what is remote of it is read through `cache`."""
    address = str(path)
    if is_url(address):
        return fetch_set(address, needed(cache, address))
    index = load_index(path)
    for split in index.splits.values():
        if split.is_remote:
            needed(cache, next(shard.path for shard in split.shards if is_url(shard.path)))
    return index.placed("", cache)


def needed(cache: ShardCache | None, address: str) -> ShardCache:
    """The cache; UsageError where there is none for what is remote."""
    if cache is None:
        raise UsageError(f"{shown(address)} is remote: set data.cache_dir to a folder on this node's own disk")
    return cache


def fetch_set(address: str, cache: ShardCache) -> DatasetIndex:
    """Ask the server for its index, and take the tables that are not here yet; the last one known where it is silent.

    Index and tables are not counted in the cache's bound: they are 32 bytes a sample.
    """
    check_address(address)
    base = address.removesuffix(INDEX_NAME).rstrip("/") + "/"
    folder = cache.folder / SETS / hashlib.sha256(base.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            root = _latest(base, folder, cache)
    except OSError as error:
        raise NoRoom(f"data.cache_dir {folder} cannot be written ({error.strerror}); name another") from None
    return load_index(root).placed(base, cache)


def _latest(base: str, folder: Path, cache: ShardCache) -> Path:
    try:
        text = read_whole(base + INDEX_NAME, MAX_INDEX, cache.patience)
    except RemoteError as error:
        if error.kind != "unreachable" or not (folder / LATEST).is_file():
            raise
        log.warning("%s; the index fetched before is used", error)
        return folder / (folder / LATEST).read_text()
    name = hashlib.sha256(text).hexdigest()[:24]
    root = folder / name
    if not (root / INDEX_NAME).is_file():
        _take_tables(text, base, root, cache)
        write_whole(root / INDEX_NAME, text)
    write_whole(folder / LATEST, name)
    return root


def _take_tables(text: bytes, base: str, root: Path, cache: ShardCache) -> None:
    """Fetch what the index names and put it where `load_index` looks; nothing is written outside of `root`."""
    try:
        tables = [split["table"] for split in json.loads(text)["splits"].values()]
        wanted = [Wanted(base + str(t["path"]), int(t["bytes"]), str(t["sha256"])) for t in tables]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{shown(base)}{INDEX_NAME} is no index of a packed set: {error!r}") from None
    unbounded = ShardCache(root / ".fetched", None, cache.patience)
    for item in wanted:
        path = PurePosixPath(item.address.removeprefix(base))
        if path.is_absolute() or ".." in path.parts or path.name in ("", INDEX_NAME):
            raise DataError(f"{shown(base)}{INDEX_NAME} names a table at {str(path)!r}; it is not taken")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if item.bytes:
            unbounded.fetch(item)
            os.replace(unbounded.place(item), root / path)
        else:
            (root / path).touch()


def wanted_shard(split: Split, number: int) -> Wanted | None:
    """A shard as the cache fetches it; None where it is a file here."""
    address = split.shard_file(number)
    if not is_url(address):
        return None
    shard = split.shards[number]
    return Wanted(address, shard.bytes, shard.sha256)
