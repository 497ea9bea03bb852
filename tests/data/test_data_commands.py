"""`vitdist data ...` as a user types it: what is printed, where, and the exit code."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.tiny import tiny_cub
from vitdist.data.commands import register
from vitdist.data.index import load_index
from vitdist.data.packing.verify import verify
from vitdist.errors import VitdistError


def run(*words: object) -> int:
    """The command in this process; errors of the family as its exit code and one line."""
    parser = argparse.ArgumentParser(prog="vitdist")
    register(parser.add_subparsers(required=True))
    options = parser.parse_args(["data", *map(str, words)])
    try:
        return int(options.function(options))
    except VitdistError as error:
        print(error, file=sys.stderr)
        return error.exit_code


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_cub(tmp_path / "CUB_200_2011", num_classes=6, train_per_class=3, test_per_class=2)


def test_cub_prints_what_was_written(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("cub", source, tmp_path / "packed", "--taxonomy", source / "taxonomy.csv")
    assert run(*words) == 0
    out, err = capfd.readouterr()
    assert err == ""  # no progress where there is no terminal
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'packed'} now holds 30 photographs of 6 classes"
    assert lines[1].split() == ["classes", "1", "order,", "2", "family,", "6", "species"]
    assert lines[2].startswith("  train    18 samples in 2 shards") and lines[3].startswith(
        "  test     12 samples in 1 sh"
    )
    assert lines[-1].startswith("next: vitdist data verify")
    assert run(*words) == 0
    assert "already held 30 photographs" in capfd.readouterr().out
    assert run(*words, "--seed", 5) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert run(*words, "--seed", 5, "--overwrite") == 0


def test_verify_prints_a_line_a_problem_and_exits_4(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    run("cub", source, packed, "--taxonomy", source / "taxonomy.csv")
    capfd.readouterr()
    assert run("verify", packed) == 0
    assert capfd.readouterr().out == "30 samples in 3 shards verified\n"
    for name in ("train/000000.tar", "test/000000.tar"):
        (packed / name).chmod(0o644)
        (packed / name).write_bytes(b"")
    assert run("verify", packed) == 4
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    assert run("verify", tmp_path / "none") == 4


def test_the_archive_packs_to_the_same_bytes_as_the_folder(source: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "a"), "gztar", tmp_path, "CUB_200_2011")
    for where, out in ((source, "one"), (archive, "two")):
        assert run("cub", where, tmp_path / out, "--taxonomy", source / "taxonomy.csv") == 0
    one, two = (load_index(tmp_path / name) for name in ("one", "two"))
    assert one.hash == two.hash and verify(two.root) == []
    assert sorted(path.name for path in two.root.iterdir()) == ["index.json", "test", "train"]


def test_folder_says_what_it_decided(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("folder", source / "images", tmp_path / "out", "--short-side", 16, "--test-fraction", 0.4) == 0
    out = capfd.readouterr().out
    assert "note     no train/ and test/ folders; test: 12 of 30 drawn by class with seed 0" in out
    assert load_index(tmp_path / "out").preparation["short_side"] == 16
    assert load_index(tmp_path / "out").name == "images"


def test_demo_is_drawn_and_packed_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("demo", tmp_path / "demo", "--train-per-class", 2, "--test-per-class", 1)
    assert run(*words) == 0 and run(*words) == 0
    assert "already held" in capfd.readouterr().out
    assert verify(tmp_path / "demo") == [] and (tmp_path / "demo" / "source" / "images.txt").is_file()
    assert run(*words, "--seed", 1) == 2
    assert run(*words, "--seed", 1, "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_index_reads_our_own_shards_as_foreign_ones(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("cub", source, tmp_path / "packed", "--taxonomy", source / "taxonomy.csv")
    assert run("index", tmp_path / "packed", "--out", tmp_path / "index") == 0
    assert "note     6 labels in 'labels': names by level" in capfd.readouterr().out
    ours, theirs = load_index(tmp_path / "packed"), load_index(tmp_path / "index")
    assert ours.taxonomy == theirs.taxonomy
    assert {n: s.samples.tobytes() for n, s in ours.splits.items()} == {
        n: s.samples.tobytes() for n, s in theirs.splits.items()
    }


def test_bad_photographs_are_skipped_only_when_asked(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = source / "images" / "001.Tiny_001" / "Tiny_001_0000.jpg"
    bad.write_bytes(b"")
    words = ("cub", source, tmp_path / "packed", "--taxonomy", source / "taxonomy.csv")
    assert run(*words) == 4
    assert "Tiny_001_0000.jpg is empty" in capfd.readouterr().err and not (tmp_path / "packed").exists()
    assert run(*words, "--on-bad", "skip") == 0
    assert "skipped  1, listed in" in capfd.readouterr().out
    assert load_index(tmp_path / "packed").split("train").num_samples == 17


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["cub", "none", "out"], 4),
        (["folder", "none", "out"], 4),
        (["folder", ".", "out", "--levels", "a,,b"], 2),
        (["index", "none.tar", "--out", "out"], 4),
        (["index", "x", "--out", "out", "--classes", "none"], 2),
        (["cub", ".", "out", "--shard-bytes", "0"], 4),
    ],
)
def test_errors_are_one_line(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == code
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("cub", source, tmp_path / "file" / "out", "--taxonomy", source / "taxonomy.csv") == 7
    assert "file" in (err := capfd.readouterr().err) and len(err.splitlines()) == 1


def test_packing_works_where_names_are_not_ascii_and_the_mask_is_narrow(tmp_path: Path) -> None:
    """K5: spaces and non-ASCII in paths, another locale, umask 077."""
    source = tiny_cub(tmp_path / "Vögel im Garten" / "CUB", num_classes=3, train_per_class=2, test_per_class=1)
    out = tmp_path / "über all" / "packed"
    code = (
        "import argparse, os, sys; os.umask(0o077); from vitdist.data.commands import register;"
        "p = argparse.ArgumentParser(); register(p.add_subparsers()); o = p.parse_args(); sys.exit(o.function(o))"
    )
    words = ["data", "cub", str(source), str(out), "--taxonomy", str(source / "taxonomy.csv")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONPATH": os.getcwd()}
    environment.pop("HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert verify(out) == [] and (out / "index.json").stat().st_mode & 0o077 == 0
