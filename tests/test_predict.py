"""Predictions from a real small checkpoint: the same numbers as by hand, and nothing that stops at a broken picture."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.tiny import draw, tiny_names
from vitdist import taxonomy
from vitdist.checkpoint.state import Snapshot
from vitdist.checkpoint.store import Store
from vitdist.errors import CheckpointError, DataError, UsageError
from vitdist.photographs import natural_key
from vitdist.predict import Predictor, load, run_predict
from vitdist.recipe.load import parse_recipe
from vitdist.training.assemble import build_model, preprocessing_of

RECIPE = """
name: small
data: {path: nowhere, image_size: 32}
model: {backbone: vit, weights: none, head: hierarchical, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
"""
NUM_CLASSES = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one published checkpoint of a model drawn at random."""
    path = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    tree = taxonomy.build(("order", "family", "species"), tiny_names(NUM_CLASSES))
    recipe = parse_recipe(RECIPE, "small.yaml")
    model = build_model(recipe, tree)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    snapshot = Snapshot(
        step=7,
        model={name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        training={},
        state={},
        recipe=recipe.to_yaml(),
        taxonomy=tree.to_json(),
        preprocessing=preprocessing_of(recipe, model).to_json(),
        weights="raw",
    )
    Store(path).publish(7, snapshot.write, may=lambda: None)
    return path


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load(run, device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures in folders that share names, with numbers to be sorted, umlauts, and four that are none."""
    folder, rng = tmp_path / "Fotos", np.random.Generator(np.random.PCG64(0))
    for number, name in enumerate(
        ["img10.jpg", "img2.JPG", "a/same.jpg", "b/same.jpg", "Vögel/Küstenseeschwalbe 鳥.jpeg"]
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw(number, NUM_CLASSES, 64, rng))
    (folder / "z_cut.jpg").write_bytes((folder / "img10.jpg").read_bytes()[:400])
    (folder / "z_empty.jpg").write_bytes(b"")
    (folder / "z_page.jpg").write_bytes(b"<html>not found</html>")
    (folder / "z_eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "img10.jpg", folder / ".hidden" / "x.jpg")
    return folder


def _by_hand(predictor: Predictor, path: Path) -> list[np.ndarray]:
    """Probabilities of each level through PIL and plain arithmetic."""
    wish = predictor.preprocessing
    image = Image.open(path).convert("RGB")
    short = int(wish.image_size / wish.crop_pct)
    assert image.width == image.height
    image = image.resize((short, short), Image.Resampling.BICUBIC)
    edge = (short - wish.image_size) // 2
    image = image.crop((edge, edge, edge + wish.image_size, edge + wish.image_size))
    pixels = (np.asarray(image, dtype=np.float64) / 255 - np.array(wish.mean)) / np.array(wish.std)
    with torch.no_grad():
        logits = predictor.model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float())
    return [np.exp(level[0].double().numpy()) / np.exp(level[0].double().numpy()).sum() for level in logits]


def test_numbers_are_those_of_the_model(predictor: Predictor, photos: Path) -> None:
    path = photos / "img10.jpg"
    (found,) = predictor.predict(path, top=3)
    shares = _by_hand(predictor, path)
    best = np.argsort(-shares[-1])[:3]
    tree = predictor.tree
    assert [answer["class"] for answer in found.top] == [tree.names[-1][index] for index in best]
    assert [answer["probability"] for answer in found.top] == pytest.approx(shares[-1][best].tolist(), abs=0.01)
    assert found.top[0]["path"] == tree.path_names(tree.node("species", found.top[0]["class"]))
    for level, name in enumerate(tree.levels):
        assert found.levels[name]["class"] == tree.names[level][int(shares[level].argmax())]
        assert found.levels[name]["probability"] == pytest.approx(shares[level].max(), abs=0.01)


def test_path_image_and_array_are_answered_alike(predictor: Predictor, photos: Path) -> None:
    path = photos / "img10.jpg"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    answers = predictor.predict([str(path), path, Image.open(path), pixels])
    assert [answer.source for answer in answers] == [str(path), str(path), "image 2", "image 3"]
    assert all(answer.error is None for answer in answers)
    first = [item["probability"] for item in answers[0].top]
    for answer in answers[1:]:
        assert [item["probability"] for item in answer.top] == pytest.approx(first, abs=0.01)
        assert [item["class"] for item in answer.top] == [item["class"] for item in answers[0].top]


def test_rotated_and_grey_pictures_in_memory(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    image = Image.open(photos / "img10.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright, from_file, from_memory = predictor.predict(
        [image, tmp_path / "turned.png", Image.open(tmp_path / "turned.png")], top=1
    )
    assert from_file.top == from_memory.top == upright.top
    grey = np.asarray(image.convert("L"))
    (answer,) = predictor.predict(grey)
    assert answer.error is None and answer.top == predictor.predict([np.stack([grey] * 3, axis=2)])[0].top


def test_batch_size_does_not_change_answers(predictor: Predictor, photos: Path) -> None:
    from vitdist.photographs import find_photographs

    found = list(find_photographs([photos]))
    alone, together = list(predictor.stream(found, batch_size=1)), list(predictor.stream(found, batch_size=100))
    assert [a.source for a in alone] == [b.source for b in together]
    for one, other in zip(alone, together, strict=True):
        assert one.error == other.error
        assert [a["class"] for a in one.top] == [b["class"] for b in other.top]


def test_folder_is_read_in_the_order_people_count(predictor: Predictor, photos: Path) -> None:
    names = [str(Path(answer.source).relative_to(photos)) for answer in predictor.predict(photos)]
    good = ["a/same.jpg", "b/same.jpg", "img2.JPG", "img10.jpg", "Vögel/Küstenseeschwalbe 鳥.jpeg"]
    assert names == [*good, "z_cut.jpg", "z_empty.jpg", "z_eps.jpg", "z_page.jpg"]


def test_natural_order() -> None:
    names = ["b1", "B10", "b2", "7", "70", "a", "b01x", "²"]
    assert sorted(names, key=natural_key) == ["7", "70", "a", "b1", "b01x", "b2", "B10", "²"]


def test_run_writes_everything_and_skips_what_is_broken(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_predict(run, [photos], 3, out) == 0
    said = capsys.readouterr()
    assert "5 of 9 read" in said.out and said.err.count("skipped") == 4
    for name, kind in [("z_cut", "truncated"), ("z_empty", "empty"), ("z_page", "not an image"), ("z_eps", "EPS")]:
        assert [line for line in said.err.splitlines() if name in line and kind in line]
    data = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert (data["count"], data["read"], data["skipped"]) == (9, 5, 4)
    assert data["levels"] == ["order", "family", "species"] and len(data["predictions"][0]["top"]) == 3
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, answer in zip(rows, data["predictions"], strict=True):
        assert row["source"] == answer["source"] and row["error"] == (answer["error"] or "")
        if not answer["error"]:
            assert row["top_2"] == answer["top"][1]["class"]
            assert float(row["probability_2"]) == pytest.approx(answer["top"][1]["probability"], abs=1e-6)
            assert row["family"] == answer["levels"]["family"]["class"]


def test_pictures_of_equal_names_do_not_collide(run: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "img10.jpg", photos / "a" / "SAME.png")
    run_predict(run, [photos], 2, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out/pictures").iterdir())
    assert sorted(name.casefold() for name in names) == sorted(
        ["img2.jpg", "img10.jpg", "küstenseeschwalbe 鳥.jpg", "same.jpg", "same_2.jpg", "same_3.jpg"]
    )
    sheet = Image.open(tmp_path / "out/pictures/img10.jpg").convert("RGB")
    photo = Image.open(photos / "img10.jpg").convert("RGB")
    shown = np.asarray(sheet, dtype=int)[:64, (sheet.width - 64) // 2 :][:, :64]
    assert np.abs(shown - np.asarray(photo, dtype=int)).mean() < 8
    assert np.asarray(sheet)[64:].min() < 80  # text below


def test_names_that_are_no_utf8(run: Path, photos: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/broken\xff.jpg"
    shutil.copy(os.fsencode(photos / "img10.jpg"), name)
    assert run_predict(run, [os.fsdecode(name)], 1, tmp_path / "out") == 0
    data = json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))
    assert data["predictions"][0]["source"].endswith("broken\\udcff.jpg")


def test_nothing_readable_is_exit_4(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = [photos / "z_cut.jpg", photos / "gone.jpg", tmp_path / "empty", Path("/dev/null")]
    with pytest.raises(DataError, match="none of 4 could be read") as caught:
        run_predict(run, broken, 5, tmp_path / "out")
    assert caught.value.exit_code == 4
    errors = [p["error"] for p in json.loads((tmp_path / "out/predictions.json").read_text())["predictions"]]
    assert errors[1:] == ["no such file", "a folder without JPEG, PNG or WebP files", "no regular file"]


def test_wrong_requests_are_one_line(run: Path, predictor: Predictor, photos: Path) -> None:
    with pytest.raises(UsageError, match="top is 0"):
        predictor.predict(photos, top=0)
    with pytest.raises(UsageError, match="takes no recipe keys"):
        run_predict(run, [photos], 5, None, ["data.path=x"])
    with pytest.raises(UsageError, match="must be uint8"):
        predictor.predict(np.zeros((4, 4, 3)))
    with pytest.raises(UsageError, match="not dict"):
        predictor.predict([{}])  # type: ignore[list-item]
    assert len(predictor.predict(photos / "img10.jpg", top=99)[0].top) == NUM_CLASSES


def test_memory_holds_one_batch(predictor: Predictor, photos: Path) -> None:
    """Answers come as soon as a batch is full, not when the list has been read."""
    from vitdist.photographs import Photograph

    asked = []

    def endless() -> object:
        while True:
            asked.append(1)
            yield Photograph("x", photos / "img10.jpg")

    answers = predictor.stream(endless(), batch_size=4)  # type: ignore[arg-type]
    next(answers)
    assert len(asked) == 4


@pytest.mark.parametrize("damage", ["tree", "weights", "recipe", "preprocessing", "flipped", "missing", "nothing"])
def test_damaged_checkpoint_is_exit_3(run: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    folder = copy / "checkpoints" / "step_00000007"
    if damage == "nothing":
        shutil.rmtree(copy / "checkpoints")
    elif damage == "missing":
        (folder / "taxonomy.json").unlink()
    elif damage == "flipped":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    else:
        _rewrite(copy, folder, damage)
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert caught.value.exit_code == 3 and len(str(caught.value)) < 600


def _rewrite(run: Path, folder: Path, damage: str) -> None:
    """The same checkpoint sealed anew with one file of another content, as a malicious or mistaken hand would."""
    other = taxonomy.build(("order", "family", "species"), tiny_names(NUM_CLASSES + 1)).to_json()
    contents = {
        "tree": ("taxonomy.json", json.dumps(other)),
        "weights": ("model.safetensors", "no tensors"),
        "recipe": ("recipe.yaml", "model: {backbone: nothing_like_it}\n"),
        "preprocessing": ("preprocessing.json", '{"image_size": 1e400}'),
    }
    name, content = contents[damage]
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    shutil.rmtree(run / "checkpoints")

    def write(stage: Path) -> dict[str, str]:
        for other_name, data in kept.items():
            (stage / other_name).write_bytes(data)
        (stage / name).write_text(content)
        return {"weights": "raw"}

    Store(run).publish(7, write, may=lambda: None)
