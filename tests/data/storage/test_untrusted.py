"""X2: shards that a stranger made to run something, to write somewhere or to eat memory, through all that reads."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vitdist.data.index import SAMPLE_DTYPE, DatasetIndex, load_index
from vitdist.data.loading.load import Load, Unseeded
from vitdist.data.loading.loader import batches
from vitdist.data.loading.places import EvaluationSource
from vitdist.data.packing.foreign import index_foreign
from vitdist.data.packing.indexing import index_bytes, make_split, write_index
from vitdist.data.packing.labels import LabelReader
from vitdist.data.packing.verify import verify
from vitdist.data.pixels.transforms import EvalTransform, Preprocessing
from vitdist.data.storage.shards import DamagedSample, ShardReader
from vitdist.data.views import everything
from vitdist.errors import DataError

EVAL = EvalTransform(Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
GROWTH = 400 << 20  # bytes of memory that reading any of these may take


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def jpeg(size: int = 8, color: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), color).save(out, "JPEG")
    return out.getvalue()


def png_bomb(width: int = 13_000, height: int = 13_000) -> bytes:
    """169 million pixels of 1 bit in 20 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG that says it has 65,500 x 65,500 pixels."""
    data = jpeg()
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 65_500, 65_500) + data[place + 4 :]


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def load_all(index: DatasetIndex, num_workers: int = 0) -> list[tuple[str, str]]:
    """(key, kinds of damage) of each sample as evaluation loads it, in a folder where a file would be seen."""
    split = index.split("train")
    view = everything(split.shard_starts)
    source = EvaluationSource(view, (0, view.num_samples), 4)
    load = Load(split, Unseeded(EVAL), with_keys=True)
    found = []
    for batch in batches(source, load, 32, 4, num_workers=num_workers):
        damages = {damage.row: damage.kind for damage in batch.damages}
        found += [(key, damages.get(int(row), "")) for key, row in zip(batch.keys, batch.rows, strict=True)]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def grown(action: Callable[[], object]) -> tuple[int, str]:
    """(bytes that a forked child's memory grew by at its highest, what it said)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            said = repr(action())
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(write_end, f"{(after - before) * 1024} {said}".encode())
        except BaseException as error:
            os.write(write_end, f"-1 {error!r}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        size, _, said = pipe.read().decode().partition(" ")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child ended with {status}"
    return int(size), said


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, Path]:
    """(a shard with pickles under every name that somebody decodes, the folder they would make)."""
    marker = tmp_path / "ran"
    evil = pickle.dumps(Payload(marker))
    members = [("a.jpg", jpeg()), ("a.cls", b"0")]
    members += [(f"a.{suffix}", evil) for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "mp", "cbor")]
    members += [(f"a.{suffix}.gz", gzip.compress(evil)) for suffix in ("pyd", "pkl", "cls", "json")]
    members += [("b.jpg", jpeg()), ("b.cls", b"1"), ("b.jpg.pkl", evil), ("__pickles__/x.pkl", evil), ("c.pkl", evil)]
    return tar(tmp_path / "train.tar", *members), marker


def test_pickles_are_never_opened(pickled: tuple[Path, Path], tmp_path: Path) -> None:
    shard, marker = pickled
    index = index_foreign([str(shard)], tmp_path / "out", LabelReader()).index
    assert verify(index.root) == []
    for num_workers in (0, 1):
        assert load_all(index, num_workers) == [("a", ""), ("b", "")]
    assert not marker.exists()


def test_the_pickles_are_live(pickled: tuple[Path, Path]) -> None:
    """What the test above would not see if the payload were dead: the usual pipeline runs it."""
    shard, marker = pickled
    pipeline = webdataset.WebDataset([str(shard)], shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    try:
        next(iter(pipeline))
    except Exception as error:  # of some other member; what counts is what has run by then
        print(repr(error))
    assert marker.exists()


@pytest.mark.parametrize("member", ["cls", "json"])
def test_pickles_where_the_label_belongs_are_no_label(tmp_path: Path, member: str) -> None:
    evil = pickle.dumps(Payload(tmp_path / "ran"))
    shard = tar(tmp_path / "train.tar", ("a.jpg", jpeg()), (f"a.{member}", evil))
    with pytest.raises(DataError):
        index_foreign([str(shard)], tmp_path / "out", LabelReader(where="label" if member == "json" else None))
    assert not (tmp_path / "ran").exists() and files(tmp_path).keys() == {str(shard)}


NAMES = [
    "../../escaped",
    "/tmp/vitdist-escaped",
    "a/../../../b",
    "..",
    "C:\\evil",
    "nul\x00byte",
    "ünï/cödé",
    "x" * 5000,
]


def test_names_that_point_elsewhere_write_nothing(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "er"
    home.mkdir(parents=True)
    members = [(f"{name}.{suffix}", data) for name in NAMES for suffix, data in (("jpg", jpeg()), ("cls", b"0"))]
    shard = tar(home / "train.tar", *members)
    before = files(tmp_path)
    index = index_foreign([str(shard)], home / "out", LabelReader()).index
    assert verify(index.root) == []
    found = load_all(index)
    assert len(found) >= len(NAMES) - 2 and {damage for _, damage in found} == {""}
    written = set(files(tmp_path)) - set(before)
    assert written == {str(home / "out" / "index.json"), str(home / "out" / "train" / "samples.bin")}
    assert not Path("/tmp/vitdist-escaped.jpg").exists()


def test_an_index_may_not_place_its_table_or_shards_elsewhere_unseen(tmp_path: Path) -> None:
    """A local index may name any file: what is there must still be the indexed bytes, or it is damage."""
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    rows = np.zeros(1, SAMPLE_DTYPE)
    rows[0] = (0, 1, 0, 512, 100, 0, -1, 12345)
    index = one_shard(tmp_path, rows, "../secret", 6000)
    with pytest.raises(DamagedSample, match="checksum"):
        ShardReader(index.split("train")).read(0)


def one_shard(tmp_path: Path, rows: np.ndarray, path: str, size: int) -> DatasetIndex:
    from vitdist.data.index import Shard
    from vitdist.taxonomy import Taxonomy

    root = tmp_path / "set"
    split = make_split(root, "train", [Shard(path, size, "0" * 64, len(rows))], ["jpg"], rows)
    tree = Taxonomy(("class",), (("a",),), ((-1,),))
    return write_index(root, index_bytes("x", tree, [(split, rows)], {}), [(split, rows)])


BOMBS = {"png of 169 Mpx": png_bomb, "jpeg of 4 Gpx": jpeg_bomb}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_damage_and_take_no_memory(tmp_path: Path, bomb: str) -> None:
    data = BOMBS[bomb]()
    assert len(data) < 50_000
    members = [("a.jpg", jpeg()), ("a.cls", b"0"), ("b.png", data), ("b.cls", b"1"), ("c.jpg", data), ("c.cls", b"1")]
    shard = tar(tmp_path / "train.tar", *members)

    def read() -> object:
        index = index_foreign([str(shard)], tmp_path / "out", LabelReader()).index
        return verify(index.root), load_all(index)

    started = time.monotonic()
    size, said = grown(read)
    assert said == "([], [('a', ''), ('', 'too many pixels'), ('', 'too many pixels')])"
    assert 0 <= size < GROWTH and time.monotonic() - started < 10


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:263] = name, size, kind, b"ustar\0"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


EIGHT_GB = b"\x80" + (8 << 30).to_bytes(11, "big")
HEADERS = {
    "an image of 8 GiB": header(b"a.jpg", EIGHT_GB),
    "a label of 8 GiB": header(b"a.cls", EIGHT_GB),
    "a size of 2**88": header(b"a.jpg", b"\x80" + b"\xff" * 11),
    "a long name of 8 GiB": header(b"x", EIGHT_GB, b"L"),
    "a pax header of 8 GiB": header(b"x", EIGHT_GB, b"x"),
    "an ignored member of 8 GiB": header(b"a.txt", EIGHT_GB),
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("is_there", [False, True])
def test_headers_of_8_gib_take_no_memory(tmp_path: Path, what: str, is_there: bool) -> None:
    shard = tmp_path / "train.tar"
    with open(shard, "wb") as file:
        file.write(HEADERS[what])
        if is_there and what != "an ignored member of 8 GiB":  # its zeros would have to be hashed, all 8 GiB
            file.truncate((8 << 30) + 2048)

    def index() -> object:
        try:
            index_foreign([str(shard)], tmp_path / "out", LabelReader())
        except DataError as error:
            return str(error)
        return "read"

    started = time.monotonic()
    size, said = grown(index)
    assert 0 <= size < 50 << 20 and time.monotonic() - started < 5
    assert "train.tar: " in said and "\\n" not in said


def test_rows_of_a_stranger_s_table_are_damage_or_the_indexed_bytes(tmp_path: Path) -> None:
    """Every field at its extremes and at random: nothing but DamagedSample, and no memory for lengths that are lies."""
    shard = tmp_path / "big"
    with open(shard, "wb") as file:
        file.truncate(6 << 30)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rows = np.frombuffer(rng.bytes(400 * SAMPLE_DTYPE.itemsize), SAMPLE_DTYPE).copy()
    rows["label"] = 0
    rows["shard"][:300] = 0
    rows["offset"][:200] = rng.integers(0, 6 << 30, 200)
    rows["offset"][200:220] = 2**64 - 1
    rows["length"][:100] = 2**32 - 1
    index = one_shard(tmp_path, rows, str(shard), 6 << 30)

    def read() -> object:
        reader, kinds = ShardReader(index.split("train")), set()
        for row in range(len(rows)):
            for what in (reader.read, reader.key):
                try:
                    what(row)
                except DamagedSample as error:
                    kinds.add(error.damage.kind)
        return sorted(kinds)

    size, said = grown(read)
    assert "index" in said and "too large" in said and "header" in said, said
    assert 0 <= size < GROWTH


@pytest.mark.parametrize("depth", [10, 100_000])
def test_json_of_any_depth_or_length_is_a_line(tmp_path: Path, depth: int) -> None:
    deep = b'{"label": ' + b"[" * depth + b"]" * depth + b"}"
    long = b'{"label": ' + b"9" * 900_000 + b"}"
    for number, text in enumerate((deep, long, b"\xff\xfe", b"[]", b'{"label": NaN}', b'{"label": 1e400}')):
        shard = tar(tmp_path / f"train{number}.tar", ("a.jpg", jpeg()), ("a.json", text))
        with pytest.raises(DataError) as caught:
            index_foreign([str(shard)], tmp_path / f"out{number}", LabelReader())
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_many_keys_are_no_memory(tmp_path: Path) -> None:
    """A million members of one sample each would be; a thousand suffixes of one sample are passed over."""
    members = [("a.jpg", jpeg()), ("a.cls", b"0"), *((f"a.x{number}", b"") for number in range(5000))]
    shard = tar(tmp_path / "train.tar", *members)
    index = index_foreign([str(shard)], tmp_path / "out", LabelReader()).index
    assert index.split("train").num_samples == 1 and json.loads((tmp_path / "out" / "index.json").read_text())
    assert load_index(tmp_path / "out").split("train").suffixes == ("jpg",)
