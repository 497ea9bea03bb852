"""Remote shards against a real web server that fails: dropped connections, 503, slow, changed, gone, no room."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.tiny import tiny_packed
from tests.data.web import BY_NODE, NGINX, WHY_NOT, Nginx, Wire, wait_until
from tests.disks import small_disk
from vitdist.data.index import DatasetIndex, load_index
from vitdist.data.loading.prefetch import Prefetch, shards_of_plan
from vitdist.data.packing.verify import verify
from vitdist.data.plan import make_plan
from vitdist.data.storage.cache import LOCK, NoRoom, ShardCache, Wanted
from vitdist.data.storage.claims import locked
from vitdist.data.storage.remote import Patience, RemoteError, RemoteFile, shown
from vitdist.data.storage.remote_set import open_set
from vitdist.data.storage.shards import DamagedSample, ShardReader
from vitdist.data.views import everything
from vitdist.errors import DataError, ResourceError, UsageError

pytestmark = pytest.mark.skipif(NGINX is None, reason=WHY_NOT)
QUICK = Patience(tries=3, progress=20_000, first_wait=0.01, connect=2, silence=0.5, window=0.4, slowest=50_000)
SIZE = 300_000
BYTES = random.Random(0).randbytes(SIZE)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """300 shards of 8 samples."""
    folder = tmp_path_factory.mktemp("remote") / "set"
    return tiny_packed(folder, num_classes=30, train_per_class=80, test_per_class=1, shard_bytes=24_000)


@pytest.fixture
def server(packed: DatasetIndex, tmp_path: Path) -> Iterator[Nginx]:
    shutil.copytree(packed.root, tmp_path / "www")
    (tmp_path / "www" / "big.bin").write_bytes(BYTES)
    nginx = Nginx(tmp_path / "www", tmp_path / "nginx", BY_NODE)
    yield nginx
    nginx.stop()


@pytest.fixture
def wire(server: Nginx) -> Iterator[Callable[[Callable[[int], tuple[int | None, float]]], Wire]]:
    made: list[Wire] = []

    def cut(fault: Callable[[int], tuple[int | None, float]]) -> Wire:
        made.append(Wire(server.port, fault))
        return made[-1]

    yield cut
    for item in made:
        item.stop()


def big(address: str, size: int = SIZE, content: bytes = BYTES) -> Wanted:
    return Wanted(f"{address}/big.bin", size, hashlib.sha256(content).hexdigest())


def whole(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "shards").rglob("*.*") if path.suffix in (".partial", ".claim")]


def test_a_copy_is_fetched_once(server: Nginx, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    for _ in range(3):
        assert whole(cache.open(big(server.address))) == BYTES
    assert [(sent.status, sent.bytes) for sent in server.log()] == [(200, SIZE)]
    assert leftovers(tmp_path / "cache") == []


def test_connections_that_drop_go_on_where_they_were(server: Nginx, wire: Callable[..., Wire], tmp_path: Path) -> None:
    cut = wire(lambda number: (70_000, 0.0) if number < 4 else (None, 0.0))
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    assert whole(cache.open(big(cut.address))) == BYTES
    assert cut.num_connections == 5
    assert [sent.status for sent in server.log()][-1] == 206 and leftovers(tmp_path / "cache") == []


def test_a_server_that_sends_nothing_is_given_up_in_one_line(wire: Callable[..., Wire], tmp_path: Path) -> None:
    cut = wire(lambda number: (100, 0.0))
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    with pytest.raises(RemoteError, match=r"big.bin: unreachable \(.*3 times in a row\)") as caught:
        cache.open(big(cut.address))
    assert "\n" not in str(caught.value) and leftovers(tmp_path / "cache") == []


def test_a_server_that_crawls_or_stalls_gets_a_new_connection(wire: Callable[..., Wire], tmp_path: Path) -> None:
    crawling = wire(lambda number: (None, 0.15 if number < 2 else 0.0))  # 27 KB/s
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    started = time.monotonic()
    assert whole(cache.open(big(crawling.address))) == BYTES
    assert crawling.num_connections == 3 and time.monotonic() - started < 5
    stalling = wire(lambda number: (None, 60.0))
    with pytest.raises(RemoteError, match="unreachable"):
        cache.open(big(stalling.address))


def test_503_is_waited_out_and_404_is_not(server: Nginx, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    server.reload("location / { return 503; }")
    with pytest.raises(RemoteError, match=r"unreachable \(status 503, 3 times in a row\)"):
        cache.open(big(server.address))
    assert [sent.status for sent in server.log()] == [503] * 3
    patient = ShardCache(tmp_path / "cache", patience=Patience(tries=50, first_wait=0.05, longest_wait=0.1))
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(patient.open, big(server.address))
        time.sleep(0.3)
        server.reload()
        assert whole(opened.result()) == BYTES
    with pytest.raises(RemoteError, match=r"missing \(status 404\)"):
        cache.open(Wanted(f"{server.address}/none.tar", 1, "0" * 64))
    assert [sent.status for sent in server.log()].count(404) == 1


def test_a_server_without_ranges_starts_again(server: Nginx, wire: Callable[..., Wire], tmp_path: Path) -> None:
    server.reload("max_ranges 0;")
    cut = wire(lambda number: (100_000, 0.0) if number == 0 else (None, 0.0))
    assert whole(ShardCache(tmp_path / "cache", patience=QUICK).open(big(cut.address))) == BYTES


def test_a_file_that_changes_while_it_is_read(server: Nginx, wire: Callable[..., Wire], tmp_path: Path) -> None:
    def change(number: int) -> tuple[int | None, float]:
        if number == 1:
            (server.root / "big.bin").write_bytes(BYTES[::-1])
            os.utime(server.root / "big.bin", (1, 1))  # nginx makes its ETag of size and second
        return (100_000, 0.0) if number == 0 else (None, 0.0)

    cut = wire(change)
    with pytest.raises(RemoteError, match="changed"):
        RemoteFile(big(cut.address).address, patience=QUICK).read()
    (server.root / "big.bin").write_bytes(BYTES)

    cut.fault, cut.num_connections = change, 0
    wanted = big(cut.address, content=BYTES[::-1])  # what is there in the end is what was indexed
    assert whole(ShardCache(tmp_path / "cache", patience=QUICK).open(wanted)) == BYTES[::-1]


@pytest.mark.parametrize("content", [BYTES[::-1], BYTES[:-1], BYTES + b"x", b"<html>"])
def test_a_changed_shard_is_one_line_and_no_copy(server: Nginx, tmp_path: Path, content: bytes) -> None:
    (server.root / "big.bin").write_bytes(content)
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    with pytest.raises(RemoteError, match="changed.*not the file that was indexed; index the set again"):
        cache.open(big(server.address))
    assert [path for path in (tmp_path / "cache" / "shards").rglob("*") if path.is_file()] == []
    assert len(server.log()) == 2  # it was asked once more, from the beginning


def test_names_that_look_alike_are_different_copies(server: Nginx, tmp_path: Path) -> None:
    for split, content in (("train", b"a" * 1000), ("val", b"b" * 1000)):
        (server.root / split).mkdir(exist_ok=True)
        (server.root / split / "x.tar").write_bytes(content)
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    sha = {c: hashlib.sha256(c * 1000).hexdigest() for c in (b"a", b"b")}
    for split, content in (("train", b"a"), ("val", b"b")):
        wanted = Wanted(f"{server.address}/{split}/x.tar", 1000, sha[content])
        assert whole(cache.open(wanted)) == content * 1000


def test_processes_that_want_the_same_fetch_it_once(server: Nginx, wire: Callable[..., Wire], tmp_path: Path) -> None:
    slow = wire(lambda number: (None, 0.002))
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                found = whole(ShardCache(tmp_path / "cache", patience=QUICK).open(big(slow.address)))
                code = 0 if found == BYTES else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert [sent.bytes for sent in server.log()] == [SIZE] and leftovers(tmp_path / "cache") == []


def test_a_killed_download_leaves_no_lock_and_is_gone_on_with(
    server: Nginx, wire: Callable[..., Wire], tmp_path: Path
) -> None:
    slow = wire(lambda number: (None, 0.02 if number == 0 else 0.0))
    cache = ShardCache(tmp_path / "cache", patience=Patience())
    child = os.fork()
    if child == 0:
        cache.open(big(slow.address))
        os._exit(0)
    partial = cache.place(big(slow.address)).with_name(cache.place(big(slow.address)).name + ".partial")
    end = time.monotonic() + 20
    while not (partial.exists() and partial.stat().st_size > 50_000) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert partial.exists()
    assert whole(cache.open(big(slow.address))) == BYTES
    assert server.log()[-1].status == 206 and leftovers(tmp_path / "cache") == []


def test_the_bound_holds_and_the_longest_unread_go(server: Nginx, tmp_path: Path) -> None:
    contents = [bytes([number]) * 1000 for number in range(8)]
    wanted = []
    for number, content in enumerate(contents):
        (server.root / f"{number}.tar").write_bytes(content)
        wanted.append(Wanted(f"{server.address}/{number}.tar", 1000, hashlib.sha256(content).hexdigest()))
    cache = ShardCache(tmp_path / "cache", limit=4500, patience=QUICK)
    held = cache.open(wanted[0])
    for item in wanted[1:4]:
        os.close(cache.open(item))
    os.close(cache.open(wanted[0]))  # read again: now 1 is the one not read for longest
    for number in (4, 5):
        os.close(cache.open(wanted[number]))
        assert cache.num_bytes() <= 4500
    assert [item.address[-5] for item in wanted if cache.place(item).exists()] == ["0", "3", "4", "5"]
    assert whole(held) == contents[0]
    with pytest.raises(NoRoom, match="data.cache_size is 900 bytes and .*0.tar has 1000; make it larger"):
        ShardCache(tmp_path / "small", limit=900, patience=QUICK).open(wanted[0])


def test_the_bound_holds_while_many_fetch(server: Nginx, wire: Callable[..., Wire], tmp_path: Path) -> None:
    slow = wire(lambda number: (None, 0.005))
    wanted = []
    for number in range(12):
        content = random.Random(number).randbytes(20_000)
        (server.root / f"{number}.tar").write_bytes(content)
        wanted.append(Wanted(f"{slow.address}/{number}.tar", 20_000, hashlib.sha256(content).hexdigest()))
    cache = ShardCache(tmp_path / "cache", limit=50_000, patience=QUICK)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            (tmp_path / "cache").mkdir(exist_ok=True)
            with locked(tmp_path / "cache" / LOCK):  # or it would count what went while it counts what came
                most = max(most, cache.num_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda item: hashlib.sha256(whole(cache.open(item))).hexdigest(), wanted))
    done.set()
    watcher.join()
    assert found == [item.sha256 for item in wanted] and 20_000 <= most <= 50_000


def test_a_full_disk_takes_old_copies_first_and_then_is_one_line(server: Nginx, tmp_path: Path) -> None:
    """A real file system of 1 MB where mounting is allowed, else a limit on the size of files."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, SIZE - 1))
        try:
            ShardCache(tmp_path / "cache", patience=QUICK).open(big(server.address))
        except NoRoom as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    message = os.read(read_end, 10_000).decode()
    assert "cache_dir" in message and f"{SIZE} bytes are needed and" in message and "\n" not in message
    assert leftovers(tmp_path / "cache") == []


def test_a_small_disk_is_shared_by_what_is_read_now(server: Nginx, tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=400k") as disk:
        cache = ShardCache(disk, patience=QUICK)
        wanted = []
        for number in range(5):
            content = random.Random(number).randbytes(150_000)
            (server.root / f"{number}.tar").write_bytes(content)
            wanted.append(Wanted(f"{server.address}/{number}.tar", 150_000, hashlib.sha256(content).hexdigest()))
        for item in wanted:
            assert hashlib.sha256(whole(cache.open(item))).hexdigest() == item.sha256
        assert not cache.place(wanted[0]).exists() and cache.place(wanted[4]).exists()
        (disk / "others").write_bytes(b"x" * 80_000)
        for item in wanted[:2]:  # what others put there takes room, and is never deleted
            os.close(cache.open(item))
        for item in wanted:
            cache.drop(item)
        (disk / "others").write_bytes(b"x" * 350_000)
        with pytest.raises(NoRoom, match=r"no room for .*0.tar, 150000 bytes are needed and \d+ free"):
            cache.open(wanted[0])
        assert (disk / "others").stat().st_size == 350_000 and leftovers(disk) == []


def test_a_folder_that_cannot_be_written_is_one_line(server: Nginx, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoRoom, match="data.cache_dir .* cannot be written .*; name another"):
        ShardCache(tmp_path / "file" / "cache", patience=QUICK).open(big(server.address))


def test_a_remote_set_reads_as_the_local_one(server: Nginx, packed: DatasetIndex, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    for address in (server.address, f"{server.address}/", f"{server.address}/index.json"):
        remote = open_set(address, cache)
        assert remote.hash == packed.hash and remote.taxonomy == packed.taxonomy
    assert [sent.path for sent in server.log()].count("/train/samples.bin") == 1
    there, here = ShardReader(remote.split("test")), ShardReader(packed.split("test"))
    for row in range(packed.split("test").num_samples):
        assert there.read(row) == here.read(row) and there.key(row) == here.key(row)
    with pytest.raises(UsageError, match="is remote: set data.cache_dir"):
        open_set(server.address)


def test_a_silent_server_leaves_the_index_that_is_known(server: Nginx, packed: DatasetIndex, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    open_set(server.address, cache)
    server.reload("location / { return 503; }")
    assert open_set(server.address, cache).hash == packed.hash
    with pytest.raises(RemoteError, match="unreachable"):
        open_set(server.address, ShardCache(tmp_path / "other", patience=QUICK))


@pytest.mark.parametrize("name", ["../../escaped.bin", "/tmp/escaped.bin", "index.json"])
def test_a_table_outside_of_the_set_is_not_taken(server: Nginx, tmp_path: Path, name: str) -> None:
    text = (server.root / "index.json").read_text().replace("train/samples.bin", name)
    (server.root / "index.json").write_text(text)
    with pytest.raises(DataError, match="not taken"):
        open_set(server.address, ShardCache(tmp_path / "cache", patience=QUICK))
    assert not list(tmp_path.rglob("escaped.bin"))


def test_a_copy_that_went_bad_on_this_disk_is_fetched_again(
    server: Nginx, packed: DatasetIndex, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    split = open_set(server.address, cache).split("train")
    row = 5
    good = ShardReader(packed.split("train")).read(row)
    reader = ShardReader(split)
    reader.read(row)
    (copy,) = [path for path in (tmp_path / "cache" / "shards").rglob("*.*")]
    damage = bytearray(copy.read_bytes())
    damage[int(split.samples[row]["offset"]) + 10] ^= 1
    copy.write_bytes(damage)
    assert ShardReader(split).read(row) == good
    assert len([sent for sent in server.log() if sent.path.endswith(".tar")]) == 2
    copy.write_bytes(damage[:-600])  # cut: another size is seen when it is opened
    assert ShardReader(split).read(row) == good


def test_shards_that_cannot_be_fetched_are_damage_with_a_kind(
    server: Nginx, packed: DatasetIndex, tmp_path: Path
) -> None:
    split = open_set(server.address, ShardCache(tmp_path / "cache", patience=QUICK)).split("train")
    (server.root / "train" / "000000.tar").unlink()
    changed = server.root / "train" / "000001.tar"
    changed.chmod(0o644)
    changed.write_bytes(changed.read_bytes()[::-1])
    reader, kinds = ShardReader(split), []
    for row in range(int(split.shard_starts[3])):
        try:
            reader.read(row)
        except DamagedSample as error:
            kinds.append((error.damage.shard, error.damage.kind))
    counts = np.diff(split.shard_starts)
    assert kinds == [("train/000000.tar", "missing")] * counts[0] + [("train/000001.tar", "changed")] * counts[1]
    assert len([sent for sent in server.log() if sent.path.endswith("000000.tar")]) == 1  # not asked for every sample


def test_evicted_shards_are_let_go(server: Nginx, tmp_path: Path) -> None:
    limit = 60_000
    split = open_set(server.address, ShardCache(tmp_path / "cache", limit, QUICK)).split("train")
    reader = ShardReader(split)
    for row in split.shard_starts[:20]:
        reader.read(int(row))
    held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)]
    assert sum(str(tmp_path / "cache" / "shards") in path for path in held) <= 3


@pytest.mark.parametrize("is_random", [True, False])
def test_a_cache_too_small_for_what_is_read_at_once_says_so(
    server: Nginx, tmp_path: Path, is_random: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """80 shards in a cache for 12, all over; or front to back, which needs one at a time, twice."""
    split = open_set(server.address, ShardCache(tmp_path / "cache", 300_000, QUICK)).split("train")
    reader, last = ShardReader(split), int(split.shard_starts[80])
    rows = np.random.default_rng(0).permutation(last)[:400] if is_random else np.arange(2 * last) % last
    for row in rows:
        reader.read(int(row))
    warnings = [record.message for record in caplog.records if "data.cache_size is smaller" in record.message]
    assert len(warnings) == is_random


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def test_shards_are_fetched_before_they_are_read(
    server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdist.data.plan.BLOCK_SAMPLES", 8)
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    split = open_set(server.address, cache).split("train")
    plan = make_plan(everything(split.shard_starts), np.empty(0), sampling="uniform", global_batch_size=24, seed=1)
    needs = [sorted(set(split.samples[plan.slots(p, 0, 24).rows]["shard"].tolist())) for p in range(60)]
    size = [shard.bytes for shard in split.shards]
    budget = 40 * max(size)
    ahead = Prefetch(split, shards_of_plan(plan, 0, 24, 0), ahead_bytes=budget)
    wait_until(lambda: cache.num_bytes() > 0.7 * budget)
    due: set[int] = set()
    for position in range(59):
        ahead.at(position)
        due.update(needs[position])
        wait_until(lambda: all(cache.place(_wanted(split, s)).exists() for s in needs[position + 1]))  # noqa: B023
        assert cache.num_bytes() - sum(size[shard] for shard in due) <= budget  # and no more than that
    ahead.close()


def _wanted(split: object, shard: int) -> Wanted:
    from vitdist.data.storage.remote_set import wanted_shard

    found = wanted_shard(split, shard)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("num_nodes", "limit"),
    [
        *((number, None) for number in (1, 2, 4)),
        (4, 0.6),
        *(pytest.param(number, 0.6, marks=pytest.mark.slow) for number in (1, 2)),
    ],
)
def test_a_node_of_n_fetches_its_share(
    server: Nginx,
    packed: DatasetIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_nodes: int,
    limit: float | None,
) -> None:
    """Each node's ranks read an epoch by the plan; the web server's log says how many bytes that took."""
    monkeypatch.setattr("vitdist.data.plan.BLOCK_SAMPLES", 8)  # so that an epoch has many blocks, as large sets have
    batch, ranks_per_node = 48, 2
    whole_epoch = sum(shard.bytes for shard in packed.split("train").shards)
    bound = None if limit is None else int(whole_epoch / num_nodes * limit)
    world = num_nodes * ranks_per_node
    per_rank, seen = batch // world, []
    for node in range(num_nodes):
        address = f"{server.address}/node{node}"
        split = open_set(address, ShardCache(tmp_path / f"cache{node}", bound, QUICK)).split("train")
        plan = make_plan(
            everything(split.shard_starts), np.empty(0), sampling="uniform", global_batch_size=batch, seed=3
        )
        readers = [ShardReader(split) for _ in range(ranks_per_node)]
        before = len(server.log())
        for position in range(plan.steps_per_epoch):
            for local, reader in enumerate(readers):
                first = (node * ranks_per_node + local) * per_rank
                for row in plan.slots(position, first, first + per_rank).rows.tolist():
                    reader.read(row)
                    seen.append(row)
        sent = sum(line.bytes for line in server.log()[before:] if line.path.endswith(".tar"))
        print(f"{num_nodes} nodes, node {node}: {sent / whole_epoch:.3f} of an epoch's bytes, bound {bound}")
        assert sent <= 1.1 / num_nodes * whole_epoch
        assert bound is None or ShardCache(tmp_path / f"cache{node}").num_bytes() <= bound
    assert len(seen) == len(set(seen)) == plan.steps_per_epoch * batch


def test_verify_reads_what_is_remote(server: Nginx, packed: DatasetIndex, tmp_path: Path) -> None:
    assert verify(server.address) == []
    shard = server.root / "test" / "000000.tar"
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[::-1])
    (problem,) = verify(server.address)
    assert "test/000000.tar" in problem


def test_object_stores_are_read_by_fsspec(packed: DatasetIndex, tmp_path: Path) -> None:
    """fsspec's own store in memory under the name s3; against s3fs and an S3 server it was run by hand."""
    fsspec = pytest.importorskip("fsspec")
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem

    class Store(memory):  # type: ignore[misc, valid-type]
        protocol, store, pseudo_dirs = "s3", dict[str, object](), [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("s3://").strip("/")

    fsspec.register_implementation("s3", Store, clobber=True)
    try:
        Store().put(str(packed.root), "/birds", recursive=True)
        cache = ShardCache(tmp_path / "cache", patience=QUICK)
        split = open_set("s3://birds", cache).split("test")
        here = ShardReader(packed.split("test"))
        assert all(ShardReader(split).read(row) == here.read(row) for row in range(split.num_samples))
        with pytest.raises(RemoteError, match=r"s3://birds/none.tar: missing \(no such object\)"):
            cache.open(Wanted("s3://birds/none.tar", 1, "0" * 64))
        part = RemoteFile("s3://birds/test/000000.tar", start=512, patience=QUICK).read()
        assert part == (packed.root / "test" / "000000.tar").read_bytes()[512:]
    finally:
        fsspec.register_implementation("s3", "s3fs.S3FileSystem", clobber=True)


def test_a_store_without_its_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ResourceError, match=r"gs:// addresses need the package gcsfs; pip install 'vitdist\[remote\]'"):
        open_set("gs://bucket/set", ShardCache(tmp_path, patience=QUICK))


def test_addresses_are_shown_without_secrets() -> None:
    assert shown("https://me:pw@host/a.tar?sig=abc") == "https://host/a.tar?..."
    assert shown("s3://bucket/a.tar") == "s3://bucket/a.tar"
    with pytest.raises(UsageError, match="only http"):
        ShardCache(Path("x")).open(Wanted("ftp://host/a", 1, ""))


def test_local_sets_are_read_without_a_cache(packed: DatasetIndex) -> None:
    index = open_set(packed.root)
    assert not index.split("train").is_remote and load_index(packed.root).hash == index.hash
    assert ShardReader(index.split("train")).read(0)
