"""`vitdist data table`: rows to shards, over a web server, killed and resumed to the same bytes."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.packing.test_pack import contents
from tests.data.packing.test_staging import forked
from tests.data.test_data_commands import run
from tests.data.tiny import draw, tiny_names
from tests.data.web import NGINX, WHY_NOT, Nginx
from vitdist.data.index import DatasetIndex, load_index
from vitdist.data.packing.verify import verify
from vitdist.data.sources.rows import Columns, complete, read_rows
from vitdist.data.sources.spool import Spool
from vitdist.data.sources.table import read_table
from vitdist.errors import DataError, UsageError

needs_nginx = pytest.mark.skipif(NGINX is None, reason=WHY_NOT)
LEVELS = ("order", "family", "species")
COLUMNS = ("--levels", ",".join(LEVELS), "--image", "image")


def write_table(path: Path, rows: Sequence[Sequence[object]], head: Sequence[str] = ("image", *LEVELS)) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def photographs(folder: Path, number: int, num_classes: int = 20) -> list[tuple[str, str, str, str]]:
    """Draw so many pictures; (file name, order, family, species) of each."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), tiny_names(num_classes)
    rows = []
    for picture in range(number):
        name = f"p{picture:05d}.jpg"
        (folder / name).write_bytes(draw(picture % num_classes, num_classes, 32, rng))
        rows.append((name, *names[picture % num_classes]))
    return rows


def paths_of(index: DatasetIndex, split: str = "train") -> set[tuple[str, ...]]:
    return {tuple(index.taxonomy.path_names(int(node)).values()) for node in index.split(split).samples["label"]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nginx]:
    (tmp_path / "www").mkdir()
    nginx = Nginx(tmp_path / "www", tmp_path / "nginx")
    yield nginx
    nginx.stop()


def test_files_and_a_drawn_test_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = photographs(tmp_path / "pictures", 60)
    table = write_table(tmp_path / "birds.csv", [(f"pictures/{name}", *labels) for name, *labels in rows])
    assert run("table", table, tmp_path / "out", *COLUMNS) == 0
    index = load_index(tmp_path / "out")
    assert index.name == "birds" and index.taxonomy.levels == LEVELS and verify(index.root) == []
    assert (index.split("train").num_samples, index.split("test").num_samples) == (40, 20)
    assert paths_of(index) == paths_of(index, "test") == {tuple(labels) for _, *labels in rows}
    assert "no split column; test: 20 of 60 drawn by class with seed 0" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["birds.csv", "out", "pictures"]
    moved = write_table(tmp_path / "pictures" / "again.csv", rows[::-1])  # another order, and other relative paths
    assert run("table", moved, tmp_path / "out2", *COLUMNS) == 0
    assert {s.checksum for s in _samples(index)} == {s.checksum for s in _samples(load_index(tmp_path / "out2"))}


def _samples(index: DatasetIndex) -> list[np.record]:
    return [row for split in index.splits.values() for row in split.samples.view(np.recarray)]


def test_columns_of_split_and_group(tmp_path: Path) -> None:
    rows = photographs(tmp_path / "p", 24, num_classes=4)
    table = [
        (f"p/{name}", *labels, ("Train", "valid", "test")[n % 3], f"nest {n // 6}")
        for n, (name, *labels) in enumerate(rows)
    ]
    path = write_table(tmp_path / "t.csv", table, ("image", *LEVELS, "fold", "nest"))
    assert run("table", path, tmp_path / "out", *COLUMNS, "--split", "fold", "--group", "nest") == 0
    index = load_index(tmp_path / "out")
    assert {name: split.num_samples for name, split in index.splits.items()} == {"train": 8, "val": 8, "test": 8}
    assert index.split("train").num_groups == 4
    path = write_table(tmp_path / "t.csv", [row[:4] + row[5:] for row in table], ("image", *LEVELS, "nest"))
    assert run("table", path, tmp_path / "drawn", *COLUMNS, "--group", "nest", "--test-fraction", 0.5) == 0
    groups = {
        name: set(split.samples["group"].tolist()) for name, split in load_index(tmp_path / "drawn").splits.items()
    }
    assert groups["train"] and groups["test"] and not groups["train"] & groups["test"]


def test_ragged_rows_keep_the_coarse_label(tmp_path: Path) -> None:
    rows = photographs(tmp_path / "p", 8)
    labels = [("O", "F", "a"), ("O", "F", ""), ("O", "", ""), ("", "", "a"), ("O", "", "a"), ("P", "G", "c")]
    labels += [("P", "", "c"), ("", "Q", "")]
    table = write_table(tmp_path / "t.csv", [(f"p/{row[0]}", *names) for row, names in zip(rows, labels, strict=True)])
    assert run("table", table, tmp_path / "out", *COLUMNS, "--test-fraction", 0) == 0
    index = load_index(tmp_path / "out")
    tree = index.taxonomy
    assert tree.names == (("O", "P"), ("F", "G", "Q"), ("a", "c"))
    found = sorted("/".join(tree.path_names(int(node)).values()) for node in index.split("train").samples["label"])
    assert found == ["O", "O/F", "O/F/a", "O/F/a", "O/F/a", "P/G/c", "P/G/c", "Q"]


def test_trees_that_are_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = photographs(tmp_path / "p", 2)
    gap = write_table(tmp_path / "gap.csv", [(f"p/{rows[0][0]}", "O", "", "b"), (f"p/{rows[1][0]}", "O", "F", "a")])
    assert run("table", gap, tmp_path / "gap", *COLUMNS) == 4
    assert "its family is blank, and no row says it: fill it in" in capfd.readouterr().err
    crossed = write_table(tmp_path / "x.csv", [(f"p/{rows[0][0]}", "O", "F", "a"), (f"p/{rows[1][0]}", "O", "G", "a")])
    assert run("table", crossed, tmp_path / "x", *COLUMNS) == 4
    assert "species 'a' stands under both" in capfd.readouterr().err


def test_a_tree_from_elsewhere(tmp_path: Path) -> None:
    rows = photographs(tmp_path / "p", 6, num_classes=6)
    tree = write_table(tmp_path / "tree.csv", tiny_names(6), LEVELS)
    table = write_table(tmp_path / "t.csv", [(f"p/{row[0]}", row[3]) for row in rows], ("image", "species"))
    words = ("--image", "image", "--taxonomy", tree, "--levels", "species", "--test-fraction", 0)
    assert run("table", table, tmp_path / "one", *words) == 0
    assert load_index(tmp_path / "one").taxonomy.levels == ("species",)


def test_parquet_is_read_as_the_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = photographs(tmp_path / "p", 12)
    table = [(f"p/{row[0]}", row[1], None if n == 3 else n % 5 + 1, row[3]) for n, row in enumerate(rows)]
    columns = dict(zip(("image", *LEVELS), map(list, zip(*table, strict=True)), strict=True))
    parquet.write_table(pyarrow.table({**columns, "other": [b"x"] * 12}), tmp_path / "birds.parquet")
    write_table(tmp_path / "birds.csv", table)
    wanted = Columns("image", LEVELS)
    ours, theirs = (read_rows(tmp_path / f"birds.{kind}", wanted) for kind in ("csv", "parquet"))
    assert [(r.image, r.labels) for r in ours.good] == [(r.image, r.labels) for r in theirs.good]
    assert "family" not in theirs.good[3].labels and theirs.good[0].labels["family"] == "1"
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rows(tmp_path / "no.parquet", wanted)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("table", tmp_path / "birds.parquet", tmp_path / "out", *COLUMNS) == 7
    assert "Parquet needs the package pyarrow; pip install 'vitdist[table]'" in capfd.readouterr().err


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_and_marks(tmp_path: Path, separator: str) -> None:
    text = f"image{separator}species\np/a.jpg{separator}Grünfink, männlich\n"
    (tmp_path / "t.tsv").write_text(text, encoding="utf-8-sig")
    (row,) = read_rows(tmp_path / "t.tsv", Columns("image", ["species"])).good
    assert (row.line, row.image, row.labels) == (2, "p/a.jpg", {"species": "Grünfink, männlich"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'image'"),
        ("image,species\n", "has no rows"),
        ("picture,species\na,b\n", "has no column 'image'; it has picture, species"),
        ('image,species\n"' + "x" * 2_000_000, "no CSV"),
        ("image,species,split\na,b,dev\n", "line 2: the split 'dev' is none of train"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    columns = Columns("image", ["species"], "split" if "split" in text else None)
    with pytest.raises((DataError, UsageError), match=message):
        read_rows(tmp_path / "t.csv", columns)


def test_rows_that_cannot_be_packed_are_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = photographs(tmp_path / "p", 12)
    good = [(f"p/{name}", *labels) for name, *labels in rows]
    bad = [("", "O", "F", "a"), (good[0][0], "O", "F", "a"), ("p/none.jpg", "O", "F", "a")]
    bad += [("p/p00001.jpg ", "", "", ""), ("ftp://host/a.jpg", "O", "F", "a"), ("", "", "", "")]
    table = write_table(tmp_path / "t.csv", [*good, *bad])
    assert run("table", table, tmp_path / "out", *COLUMNS) == 4
    error = capfd.readouterr().err
    assert "6 rows failed, listed in" in error and "--on-bad skip" in error and len(error.splitlines()) == 1
    listed = list(csv.DictReader((tmp_path / "out.failed.csv").open()))
    reasons = {int(row["line"]): row["reason"] for row in listed}
    assert sorted(reasons) == [14, 15, 16, 17, 18, 19]
    assert reasons[15] == "the same image as line 2" and "No such file" in reasons[16] and "ftp" not in reasons[16]
    assert reasons[17] == "the same image as line 3" and "only http" in reasons[18] and "no image" in reasons[19]
    assert not (tmp_path / "out").exists()
    assert run("table", table, tmp_path / "out", *COLUMNS, "--on-bad", "skip") == 0
    index = load_index(tmp_path / "out")
    assert index.preparation["skipped"] == 6 and sum(s.num_samples for s in index.splits.values()) == 12
    assert len(json.loads((tmp_path / "out" / "skipped.json").read_text())) == 6


@needs_nginx
def test_what_fails_is_tried_again_and_what_came_is_kept(
    server: Nginx, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = photographs(server.root / "p", 30)
    late, page, cmyk = (server.root / "p" / rows[n][0] for n in (3, 4, 5))
    missing = late.read_bytes()
    late.unlink()
    whole = page.read_bytes()
    page.write_bytes(b"<html>not found</html>")
    out = io.BytesIO()
    Image.new("CMYK", (20, 20)).save(out, "JPEG")
    cmyk.write_bytes(out.getvalue())
    table = write_table(tmp_path / "t.csv", [(f"{server.address}/p/{name}", *labels) for name, *labels in rows])
    assert run("table", table, tmp_path / "out", *COLUMNS) == 4
    reasons = {row["line"]: row["reason"] for row in csv.DictReader((tmp_path / "out.failed.csv").open())}
    assert reasons == {"5": "missing (status 404)", "6": "it is no JPEG, PNG or WebP image"}
    num_asked = len(server.log())
    late.write_bytes(missing)
    page.write_bytes(whole)
    capfd.readouterr()
    assert run("table", table, tmp_path / "out", *COLUMNS) == 0
    assert len(server.log()) == num_asked + 2 and "2 fetched now, 28 before" in capfd.readouterr().out
    assert verify(tmp_path / "out") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nginx", "out", "t.csv", "www"]


@needs_nginx
def test_parts_of_an_array_make_the_same_set(server: Nginx, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = photographs(server.root / "p", 40)
    table = write_table(tmp_path / "t.csv", [(f"{server.address}/p/{name}", *labels) for name, *labels in rows])
    assert run("table", table, tmp_path / "whole", *COLUMNS) == 0
    num_asked = len(server.log())
    for part in (3, 1, 2):
        assert run("table", table, tmp_path / "out", *COLUMNS, "--part", f"{part}/3") == 0
    assert "part 2 of 3: 13 fetched now, 27 before" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run("table", table, tmp_path / "out", *COLUMNS) == 0
    assert "0 fetched now, 40 before" in capfd.readouterr().out
    assert len(server.log()) == num_asked + 40
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not (tmp_path / "out.spool").exists()


def table_of(server: Nginx, tmp_path: Path, number: int) -> Path:
    rows = photographs(server.root / "p", number)
    return write_table(tmp_path / "t.csv", [(f"{server.address}/p/{name}", *labels) for name, *labels in rows])


def kill_when(condition: Callable[[], bool], action: Callable[[], object]) -> None:
    """Do something in a child process that is killed (-9) in the middle."""
    child = forked(lambda: os._exit(0 if action() == 0 else 1))
    while not condition():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_and_resumed(server: Nginx, tmp_path: Path, number: int, num_kills: int) -> None:
    """Pack a table of addresses, kill the packing several times while it fetches, and end with the same bytes."""
    table = table_of(server, tmp_path, number)
    started = time.monotonic()
    assert run("table", table, tmp_path / "whole", *COLUMNS) == 0
    seed = random.randrange(1 << 32)
    print(f"seed {seed}, {number} photographs take {time.monotonic() - started:.1f} s uninterrupted")
    rng, spool = random.Random(seed), tmp_path / "out.spool" / "all.list"
    for kill in range(num_kills):
        wanted = number * (kill + 1) // (num_kills + 1) + rng.randrange(number // (4 * num_kills))
        kill_when(
            lambda wanted=wanted: spool.exists() and spool.read_bytes().count(b"\n") >= wanted,  # type: ignore[misc]
            lambda: run("table", table, tmp_path / "out", *COLUMNS, "--workers", 4),
        )
        assert not (tmp_path / "out").exists()
    assert run("table", table, tmp_path / "out", *COLUMNS, "--workers", 3) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and verify(tmp_path / "out") == []
    assert not (tmp_path / "out.spool").exists()
    assert 2 * number <= len(server.log()) <= 2 * number + num_kills * 8  # again only what was under way at a kill


@needs_nginx
def test_killed_and_resumed_ends_with_the_same_bytes(server: Nginx, tmp_path: Path) -> None:
    killed_and_resumed(server, tmp_path, 300, 2)


@needs_nginx
@pytest.mark.slow
def test_5000_photographs_killed_and_resumed(server: Nginx, tmp_path: Path) -> None:
    killed_and_resumed(server, tmp_path, 5000, 5)
    index = load_index(tmp_path / "out")
    assert index.taxonomy.levels == LEVELS and sum(s.num_samples for s in index.splits.values()) == 5000


@needs_nginx
def test_killed_while_it_packs(server: Nginx, tmp_path: Path) -> None:
    table = table_of(server, tmp_path, 200)
    assert run("table", table, tmp_path / "whole", *COLUMNS) == 0
    kill_when(
        lambda: bool(list(tmp_path.glob("out.partial-*/train/000003.tar"))),
        lambda: run("table", table, tmp_path / "out", *COLUMNS),
    )
    num_asked = len(server.log())
    assert run("table", table, tmp_path / "out", *COLUMNS) == 0
    assert len(server.log()) == num_asked and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_spool_forgets_what_a_kill_left_unfinished(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", "all") as spool:
        spool.add("http://h/a", b"a" * 100)
        spool.add("http://h/b", b"b" * 100)
        with pytest.raises(UsageError, match="another process fetches all"), Spool(tmp_path / "s", "all"):
            pass
    with open(tmp_path / "s" / "all.list", "ab") as file:
        file.write(b'["http://h/c", 200, 10')
    with open(tmp_path / "s" / "all.bytes", "ab") as file:
        file.write(b"half of c")
    with Spool(tmp_path / "s", "all") as spool:
        assert set(spool.found) == {"http://h/a", "http://h/b"}
        spool.add("http://h/d", b"d")
        assert spool.found["http://h/d"].read() == b"d" and spool.found["http://h/b"].read() == b"b" * 100
    os.truncate(tmp_path / "s" / "all.bytes", 150)
    with Spool(tmp_path / "s", "part-1-of-2") as spool:
        assert set(spool.found) == {"http://h/a"}
    with open(tmp_path / "s" / "all.bytes", "r+b") as file:
        file.write(b"x")
    with Spool(tmp_path / "s", "all") as spool, pytest.raises(DataError, match="damaged; delete the folder"):
        spool.found["http://h/a"].read()


def test_blanks_are_filled_from_other_rows() -> None:
    rows = [_row(a="1", b="2", c="3"), _row(c="3"), _row(b="2"), _row(a="9")]
    assert complete(rows) == [{"a": "1", "b": "2", "c": "3"}] * 2 + [{"a": "1", "b": "2"}, {"a": "9"}]


def _row(**labels: str) -> object:
    from vitdist.data.sources.rows import Row

    return Row(1, "x", labels, None, None)


def test_tables_as_people_write_them(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("\ufeffimage; species\r\na.jpg; x\r\n./a.jpg; y\r\nb\0.jpg; x\r\n".encode())
    rows = read_rows(table, Columns("image", ["species"]))
    assert [(row.line, row.image, row.labels) for row in rows.good] == [
        (2, "a.jpg", {"species": "x"}),
        (4, "b\0.jpg", {"species": "x"}),
    ]
    assert [str(failure) for failure in rows.failures] == ["line 3: ./a.jpg: the same image as line 2"]
    with Spool(tmp_path / "empty", "all") as spool, pytest.raises(DataError, match="none of 3 rows can be packed"):
        read_table(rows, spool, tmp_path, levels=["species"])
    assert "cannot be a file's name" in str(rows.failures)
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    "words",
    [["--part", "0/3"], ["--part", "4/3"], ["--part", "x"], ["--workers", "0"], ["--tries", "0"], ["--timeout", "0"]],
)
def test_options_that_mean_nothing(tmp_path: Path, words: list[str]) -> None:
    table = write_table(tmp_path / "t.csv", [("http://127.0.0.1:1/a.jpg", "O", "F", "a")])
    try:
        assert run("table", table, tmp_path / "out", *COLUMNS, *words) == 2
    except SystemExit as error:
        assert error.code == 2
