"""WebDataset's naming: what belongs to one sample, and how a sample's key becomes a file name."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote

_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
MAX_FILE_NAME = 120


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None where it belongs to no sample.

    As `webdataset` splits: the key ends at the first dot of the base name and keeps its folders; the suffix is in
    lower case.
    """
    if _META.match(name):
        return None
    match = _MEMBER.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


def plain(text: str, limit: int = 60) -> str:
    """`text` with everything but ASCII letters, digits, '-' and '_' replaced, so that it is safe in a key."""
    return _UNSAFE.sub("_", text).strip("_")[:limit]


def as_file_name(key: str) -> str:
    """A file name for any key of anybody's shard: no '/', no '..', no control characters, bounded, never two alike."""
    encoded = quote(key, safe="", errors="surrogateescape").replace(".", "%2E")
    if encoded and len(encoded) <= MAX_FILE_NAME:
        return encoded
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return f"{encoded[: MAX_FILE_NAME - 25]}-{digest}"
