"""`vitdist fetch`: from a hub on this machine that speaks the hub's protocol, into the cache, offline from there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests import launching
from tests.conftest import ROOT, Recipes
from tests.models.weights_files import DINOV2S, needs_dinov2s

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
REPOSITORY = f"timm/{MODEL}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files of one repository, and what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        assert isinstance(self.server, Hub)
        self.server.asked.append(f"{self.command} {self.path}")
        name = self.path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2]
        body = self.server.files.get(name)
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as timm publishes it, classifier included, of untrained numbers."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model(MODEL, pretrained=False).state_dict(), file)
    return file.read_bytes()


def vitdist(words: list[str], recipe: Path, endpoint: str, **more: str) -> tuple[int, str]:
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(recipe.parent),
        "HF_HOME": str(recipe.parent / "hf"), "HF_ENDPOINT": endpoint, "ACCELERATE_USE_CPU": "true", **more,
    }  # fmt: skip
    command = [sys.executable, "-m", "vitdist", words[0], str(recipe), *words[1:]]
    done = subprocess.run(command, cwd=recipe.parent, env=environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def recipe(tiny_recipe: Recipes) -> Path:
    model = {"backbone": MODEL, "weights": "pretrained", "head": "linear"}
    return tiny_recipe(model=model, train={"max_duration": "2steps", "global_batch_size": 8}, data__image_size=64)


@pytest.mark.slow
def test_fetched_once_and_used_without_any_network(hub: Hub, weights: bytes, recipe: Path) -> None:
    hub.files["model.safetensors"] = weights
    code, said = vitdist(["fetch"], recipe, hub.address)
    assert code == 0, said
    digest = hashlib.sha256(weights).hexdigest()
    assert f"weights pretrained ({digest[:12]}): loaded backbone" in said
    (place,) = [Path(line) for line in said.splitlines() if line.startswith("/")]
    assert place.read_bytes() == weights
    assert f"HF_HUB_CACHE={recipe.parent}/hf/hub HF_HUB_OFFLINE=1" in said
    num_asked = len(hub.asked)
    assert any(line.startswith("GET") for line in hub.asked)
    offline = {"HF_HUB_CACHE": f"{recipe.parent}/hf/hub", "HF_HUB_OFFLINE": "1"}
    code, said = vitdist(["train", "out=run", "lr_scheduler.warmup=1steps"], recipe, "http://127.0.0.1:9", **offline)
    assert code == 0 and digest[:12] in said, said
    assert len(hub.asked) == num_asked


@pytest.mark.slow
def test_a_damaged_download_is_named_and_not_kept(hub: Hub, weights: bytes, recipe: Path) -> None:
    hub.files["model.safetensors"] = weights[: len(weights) // 2]
    code, said = vitdist(["fetch"], recipe, hub.address)
    assert code == 3 and said.count("\n") == 1 and "deleted from the cache: fetch again" in said, said
    hub.files["model.safetensors"] = weights
    code, said = vitdist(["fetch"], recipe, hub.address)
    assert code == 0, said


@pytest.mark.slow
def test_without_internet_it_is_one_line(recipe: Path) -> None:
    code, said = vitdist(["fetch"], recipe, "http://127.0.0.1:9")
    assert code == 3 and said.count("\n") == 1 and f"model.safetensors of {REPOSITORY}" in said, said


def test_where_nothing_is_to_be_fetched_it_says_so(tiny_recipe: Recipes, tmp_path: Path) -> None:
    codes, said = launching.run(1, ["fetch", str(tiny_recipe())], tmp_path)
    assert codes == [0] and "tiny: model.weights is none" in said, said


@needs_dinov2s
def test_a_file_is_read_and_named(tiny_recipe: Recipes, tmp_path: Path) -> None:
    words = ["model.backbone=vit_small_patch14_dinov2.lvd142m", f"model.weights={DINOV2S}", "data.image_size=56"]
    without_shape = [f"model.{key}=null" for key in ("patch_size", "embed_dim", "depth", "num_heads")]
    codes, said = launching.run(1, ["fetch", str(tiny_recipe()), *words, *without_shape], tmp_path)
    assert codes == [0] and f"loaded backbone\n{DINOV2S}" in said and "HF_HUB_CACHE" not in said, said
