"""Storage that takes 5 ms for each open and each read: a server that waits so long, and files opened as slowly."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from vitdist.bench.cores import Taken, streamed
from vitdist.bench.data import Candidate, Wish
from vitdist.data import rivals
from vitdist.data.storage.cache import ShardCache
from vitdist.data.storage.remote_set import open_set

DELAY = 0.005
ONE_READ = 1 << 20
FAR, NEAR, FOLDER = (
    "the whole input, first epoch over http",
    "the whole input, files on this machine",
    "ImageFolder, as slow a file system",
)


class _Slow(SimpleHTTPRequestHandler):
    """A folder's files, each request and each MiB after a wait."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        time.sleep(DELAY)
        return super().send_head()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while True:
            time.sleep(DELAY)
            if not (piece := source.read(ONE_READ)):
                return
            outputfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _serve(folder: Path, said: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Slow, directory=str(folder)))
    said.send(server.server_port)
    server.serve_forever()


@contextmanager
def slow_server(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files, in a process of its own."""
    heard, said = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(folder, said), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{heard.recv()}"
    finally:
        process.terminate()
        process.join()


def far_and_near(wish: Wish, address: str, split: str, folder: Path, scratch: Path) -> dict[str, Candidate]:
    """Candidates that are timed by the clock; `folder` holds the photographs as files."""
    usual = rivals.usual_transform(wish.preprocessing, wish.augment)
    return {
        FAR: lambda: _first_epoch(wish, address, split, scratch / "cache"),
        NEAR: lambda: streamed(wish.loader, wish.most, warm_up=0),
        FOLDER: lambda: streamed(lambda: rivals.image_folder(folder, usual, wish.batch, slowly), wish.most, warm_up=0),
    }


def _first_epoch(wish: Wish, address: str, split: str, cache: Path) -> Taken:
    shutil.rmtree(cache, ignore_errors=True)
    far = wish.of(open_set(address, ShardCache(cache, None)).split(split))
    return streamed(far.loader, wish.most, warm_up=0)


def slowly(path: str) -> Image.Image:
    """ImageFolder's own way of opening a file, with the waits of such a file system."""
    time.sleep(DELAY)
    with open(path, "rb") as file:
        time.sleep(DELAY)
        return Image.open(BytesIO(file.read())).convert("RGB")
