"""Training from a web server: the same losses as from a folder, one download a node, and one line when it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Recipes
from tests.data.tiny import tiny_packed
from tests.data.web import NGINX, WHY_NOT, Nginx
from tests.disks import small_disk
from tests.launching import start
from vitdist.data.index import DatasetIndex

pytestmark = pytest.mark.skipif(NGINX is None, reason=WHY_NOT)


@pytest.fixture
def server(tiny: DatasetIndex, tmp_path: Path) -> Iterator[Nginx]:
    shutil.copytree(tiny.root, tmp_path / "www")
    nginx = Nginx(tmp_path / "www", tmp_path / "nginx")
    yield nginx
    nginx.stop()


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_two_ranks_learn_the_same_from_afar(server: Nginx, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = str(tiny_recipe())
    words = [f"data.path={server.address}", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_size=1GB"]
    for name, more in (("here", []), ("there", words)):
        job = start(2, ["train", recipe, f"out={tmp_path / name}", *more], tmp_path)
        assert job.wait() == [0, 0], job.output
    assert losses(tmp_path / "here") == losses(tmp_path / "there") and len(losses(tmp_path / "here")) == 12
    assert "data:image/jpeg;base64," in (tmp_path / "there/report/index.html").read_text()
    paths = [sent.path for sent in server.log() if sent.path.endswith(".tar")]
    assert paths and len(paths) == len(set(paths))  # two ranks, two workers and two evaluations: each shard once


def test_ranks_that_see_different_sets_stop_in_one_line(tiny_recipe: Recipes, tmp_path: Path) -> None:
    for rank in range(2):
        tiny_packed(tmp_path / f"set{rank}", num_classes=20, train_per_class=6, test_per_class=1, seed=rank)
    job = start(2, ["train", str(tiny_recipe()), "out=run", "data.path=set${RANK}"], tmp_path)
    assert job.wait() == [4, 4], job.output
    (line,) = [line for line in job.output.splitlines() if "vitdist:" in line]
    assert "rank 1: " in line and "is another set" in line


def test_a_shard_gone_from_the_server_ends_in_one_line(server: Nginx, tiny_recipe: Recipes, tmp_path: Path) -> None:
    (server.root / "train" / "000003.tar").unlink()
    recipe = str(tiny_recipe(data__path=server.address, data__cache_dir=str(tmp_path / "cache")))
    job = start(1, ["train", recipe, f"out={tmp_path / 'run'}"], tmp_path)
    assert job.wait() == [4], job.output
    assert "train/000003.tar" in job.output and "missing (status 404)" in job.output
    assert "Traceback" not in job.output


def test_a_full_cache_disk_ends_in_one_line(server: Nginx, tiny_recipe: Recipes, tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=150k") as disk:
        recipe = str(tiny_recipe(data__path=server.address, data__cache_dir=str(disk)))
        job = start(1, ["train", recipe, f"out={tmp_path / 'run'}"], tmp_path)
        assert job.wait() == [7], job.output
        (line,) = [line for line in job.output.splitlines() if "no room" in line]
        assert (
            f"data.cache_dir {disk}" in line and ".tar, " in line and "free some space, or name another folder" in line
        )
        assert "Traceback" not in job.output
