"""Checkpoints from others are data: nothing in them runs, and refusing them is quick and cheap (X1)."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import launching
from tests.conftest import Recipes
from vitdist.checkpoint import state as files
from vitdist.checkpoint.manifest import MANIFEST, read_manifest, seal
from vitdist.checkpoint.store import Store
from vitdist.errors import CheckpointError
from vitdist.predict import load

PICKLE = b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR."
MAX_SECONDS, MAX_BYTES = 2.0, 500 << 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A published checkpoint of a short training, and beside it the recipe that made it."""
    folder = tmp_path_factory.mktemp("honest")
    tiny = request.getfixturevalue("tiny")
    (folder / "recipe.yaml").write_text(
        f"name: honest\ndata: {{path: {tiny.root}, image_size: 32, num_workers: 0}}\n"
        "model: {backbone: vit, weights: none, patch_size: 8, embed_dim: 64, depth: 1, num_heads: 2}\n"
        "train: {max_duration: 2steps, global_batch_size: 24}\n"
    )
    codes, output = launching.run(1, ["train", str(folder / "recipe.yaml"), "out=run"], folder)
    assert codes == [0], output
    return Store(folder / "run").path_of(2)


def reseal(folder: Path, **about: object) -> None:
    """What an attacker does too: a manifest that vouches for whatever lies here."""
    step = read_manifest(folder)["step"]
    (folder / MANIFEST).unlink()
    seal(folder, step, {"weights": "raw"})
    if about:
        data = json.loads((folder / MANIFEST).read_text())
        text = json.dumps({**data, **about})
        (folder / MANIFEST).write_text(text)


def put(name: str, data: bytes) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).write_bytes(data)
        if name != MANIFEST:
            reseal(folder)

    return attack


def link(name: str, target: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        if name != MANIFEST:
            data = json.loads((folder / MANIFEST).read_text())
            data["files"][name] = {
                "bytes": 0,
                "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            }
            (folder / MANIFEST).write_text(json.dumps(data))

    return attack


def _header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _outside(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["files"]["../../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(data))


def _wide(folder: Path) -> None:
    """Tensors that no model of this recipe has."""
    save_file({"backbone.surprise": torch.zeros(1000, 1000)}, folder / files.MODEL)
    reseal(folder)


def _crowd(folder: Path) -> None:
    """A header that is sound, and that would have to be parsed whole: 1.5 million tensors of nothing."""
    entries = (b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(1_500_000))
    put(files.MODEL, _header(b"{" + b",".join(entries) + b"}", b""))(folder)


OVERLAP = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
)
BEYOND = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
DEEP = b"[" * 100_000 + b"]" * 100_000
ATTACKS: dict[str, Callable[[Path], None]] = {
    **{
        f"pickle as {name}": put(name, PICKLE)
        for name in (files.MODEL, files.RECIPE, files.TAXONOMY, files.PREPROCESSING, MANIFEST)
    },
    "a header of 100 MB": put(files.MODEL, (99_000_000).to_bytes(8, "little") + b" " * 99_000_000),
    "a header of 87 MB that is sound": _crowd,
    "a header of 2^60 bytes": put(files.MODEL, (1 << 60).to_bytes(8, "little")),
    "overlapping offsets": put(files.MODEL, _header(OVERLAP, bytes(12))),
    "offsets beyond the file": put(files.MODEL, _header(BEYOND, bytes(12))),
    "strange tensors": _wide,
    "deep JSON": put(files.TAXONOMY, DEEP),
    "a deep manifest": put(MANIFEST, DEEP),
    "a tree of nonsense": put(files.TAXONOMY, b'{"levels": 7, "names": {"a": []}, "parents": null}'),
    "preprocessing of a million pixels": put(
        files.PREPROCESSING,
        b'{"image_size": 1000000, "mean": [0,0,0], "std": [1,1,1], "interpolation": "bicubic", "crop_pct": 1}',
    ),
    "a python tag in the recipe": put(files.RECIPE, b"name: !!python/object/apply:os.system ['touch owned']\n"),
    "a NaN step": lambda folder: reseal(folder, step=float("nan")),
    "a negative step": lambda folder: reseal(folder, step=-2),
    "a file outside": _outside,
    "a link to a device": link(files.MODEL, "/dev/zero"),
    "a manifest that never ends": link(MANIFEST, "/dev/zero"),
}


def peak() -> int:
    """The highest resident memory since the last call of `forget_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained, folder)
    load(folder)  # honest, it loads
    ATTACKS[name](folder)
    before, base, began = set(tmp_path.rglob("*")), forget_peak(), time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert time.monotonic() - began < MAX_SECONDS
    assert peak() - base < MAX_BYTES
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert set(tmp_path.rglob("*")) == before, "nothing was written"


def test_an_archive_is_no_checkpoint(trained: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "checkpoint.zip", "w") as archive:
        archive.writestr("../../owned", "!")
        archive.write(trained / MANIFEST, MANIFEST)
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        load(tmp_path / "checkpoint.zip")
    assert not (tmp_path.parent.parent / "owned").exists()


def _state(**changes: object) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        data = json.loads((folder / files.STATE).read_text())
        data["train"].update(changes)
        (folder / files.STATE).write_text(json.dumps(data))
        reseal(folder)

    return attack


def _moments(folder: Path) -> None:
    found = load_file(folder / files.TRAINING)
    save_file(
        {name: torch.zeros(7) if name.endswith("exp_avg") else t for name, t in found.items()}, folder / files.TRAINING
    )
    reseal(folder)


RESUMED: dict[str, Callable[[Path], None]] = {
    "pickle as state": put(files.STATE, PICKLE),
    "pickle as optimizer": put(files.TRAINING, PICKLE),
    "a state of 10^5 levels": put(files.STATE, DEEP),
    "a billion threads": _state(num_threads=10**9),
    "values that are no steps": _state(values={"../x": 1.0}),
    "another step": _state(step=10**6),
    "moments of another shape": _moments,
}


@pytest.mark.parametrize("name", RESUMED)
def test_an_attack_on_a_resume_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained, folder)
    RESUMED[name](folder)
    recipe = trained.parents[2] / "recipe.yaml"
    codes, output = launching.run(
        1, ["train", str(recipe), "out=run", "train.max_duration=4steps", "--resume", str(folder)], tmp_path
    )
    assert codes == [3], output
    assert len([line for line in output.splitlines() if line.startswith("vitdist: ")]) == 1, output
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("owned"))


def test_the_honest_one_is_gone_on_from(trained: Path, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = trained.parents[2] / "recipe.yaml"
    codes, output = launching.run(
        1, ["train", str(recipe), "out=run", "train.max_duration=4steps", "--resume", str(trained)], tmp_path
    )
    assert codes == [0] and "resumed from step 2" in output, output
