"""One connection to an address, open at a byte: what http and the object stores have in common."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from vitdist.errors import ResourceError

if TYPE_CHECKING:
    import urllib3

HTTP = ("http", "https")
STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
STORE_BLOCK = 8 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CONTENT = (200, 206)
_POOLS: dict[tuple[int, str], Any] = {}
_POOLS_LOCK = threading.Lock()


class Broken(Exception):
    """A connection that gave nothing. `final` where trying again cannot help, `wait` where the server says how long."""

    def __init__(self, text: str, *, kind: str = "unreachable", final: bool = False, wait: float = 0.0) -> None:
        super().__init__(text)
        self.kind, self.final, self.wait = kind, final, wait


class Times(Protocol):
    """How long to wait for a server."""

    @property
    def connect(self) -> float: ...

    @property
    def silence(self) -> float: ...


class Connection(Protocol):
    """Bytes from the asked place on, less `behind` at the beginning that came unasked.

    `size` is the whole file's, `version` a word that another content does not share ("" where the server has none).
    """

    size: int | None
    version: str
    behind: int

    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...


def is_supported(address: str) -> bool:
    """Whether there is a reader for an address's scheme."""
    return urlsplit(address).scheme.lower() in (*HTTP, *STORES)


def connect(address: str, start: int, version: str, times: Times) -> Connection:
    """Open an address at a byte, if it still is of that version; Broken when it cannot be."""
    if urlsplit(address).scheme.lower() in HTTP:
        return HttpConnection(address, start, version, times)
    return StoreConnection(address, start)


class HttpConnection:
    """A response whose body is read as it comes."""

    def __init__(self, address: str, start: int, version: str, times: Times) -> None:
        import urllib3

        self.size: int | None = None
        self.version, self.behind = "", 0
        timeout = urllib3.Timeout(connect=times.connect, read=times.silence)
        follow = urllib3.Retry(total=None, connect=0, read=0, redirect=5, status=0, other=0)
        with _broken():
            self._response = _pool(address).request(
                "GET", address, headers=_headers(address, start, version), preload_content=False,
                decode_content=False, timeout=timeout, retries=follow,
            )  # fmt: skip
        self._understand(start)

    def read(self, size: int) -> bytes:
        with _broken():
            return self._response.read1(size, decode_content=False)

    def close(self) -> None:
        self._response.close()

    def _understand(self, start: int) -> None:
        response, headers = self._response, self._response.headers
        if response.status == 416 and headers.get("Content-Range", "") == f"bytes */{start}":
            self.size, self.read = start, lambda size: b""  # type: ignore[method-assign]  # it ends where we stand
            return
        if response.status not in _CONTENT:
            self.close()
            raise _status(response.status, headers.get("Retry-After", ""))
        tag = headers.get("ETag", "")
        # a weak tag promises no equal bytes, and servers take none back in If-Range
        self.version = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
        first, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if response.status == 200:
            length = headers.get("Content-Length", "")
            self.size, self.behind = (int(length) if length.isdigit() else None), start
        elif first.split("-")[0] == str(start):
            self.size = int(total) if total.isdigit() else None
        else:
            self.close()
            raise Broken("the server answered with another range than was asked for")


def _headers(address: str, start: int, version: str) -> dict[str, str]:
    import urllib3

    headers = {"Accept-Encoding": "identity", "User-Agent": "vitdist"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if version:
            headers["If-Range"] = version
    user, at, _ = urlsplit(address).netloc.rpartition("@")
    return {**headers, **urllib3.make_headers(basic_auth=user)} if at else headers


def _status(status: int, retry_after: str) -> Broken:
    """What a status that is no content means."""
    if status in _PASSING:
        return Broken(f"status {status}", wait=float(retry_after) if retry_after.isdigit() else 0.0)
    return Broken(f"status {status}", kind="missing" if status in (404, 410) else "refused", final=True)


def _pool(address: str) -> urllib3.PoolManager:
    """The connections of this process (a forked one must not share its parent's), through a proxy where one is set."""
    import urllib.request

    import urllib3

    parts = urlsplit(address)
    proxy = urllib.request.getproxies_environment().get(parts.scheme.lower(), "")
    if proxy and urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        proxy = ""
    with _POOLS_LOCK:
        pool = _POOLS.get((os.getpid(), proxy))
        if pool is None:
            pool = urllib3.ProxyManager(proxy, maxsize=32) if proxy else urllib3.PoolManager(maxsize=32)
            _POOLS[os.getpid(), proxy] = pool
    return pool


@contextmanager
def _broken() -> Iterator[None]:
    import urllib3

    try:
        yield
    except urllib3.exceptions.LocationParseError as error:
        raise Broken(str(error), kind="refused", final=True) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
        raise Broken(str(cause or error)) from None


class StoreConnection:
    """A file of an object store, by the fsspec package of its scheme."""

    def __init__(self, address: str, start: int) -> None:
        self.behind = 0
        with _store_errors(address):
            import fsspec  # type: ignore[import-untyped]

            files, path = fsspec.core.url_to_fs(address)
            files.invalidate_cache()
            about = files.info(path)
            self.size: int | None = int(about["size"])
            self.version = str(about.get("ETag") or about.get("etag") or about.get("LastModified") or "")
            self._file = files.open(path, "rb", block_size=STORE_BLOCK)
            self._file.seek(start)
        self._address = address

    def read(self, size: int) -> bytes:
        with _store_errors(self._address):
            return bytes(self._file.read(size))

    def close(self) -> None:
        self._file.close()


@contextmanager
def _store_errors(address: str) -> Iterator[None]:
    scheme = urlsplit(address).scheme.lower()
    try:
        yield
    except ImportError:
        package = STORES.get(scheme, "fsspec")
        raise ResourceError(
            f"{scheme}:// addresses need the package {package}; pip install 'vitdist[remote]', or pip install {package}"
        ) from None
    except FileNotFoundError:
        raise Broken("no such object", kind="missing", final=True) from None
    except PermissionError as error:
        raise Broken(str(error), kind="refused", final=True) from None
    except Exception as error:  # each store's library has a family of its own
        raise Broken(f"{type(error).__name__}: {error}") from None
