from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.weights_files import DINOV2S, needs_dinov2s, write_raw
from vitdist.errors import CheckpointError, lines
from vitdist.models.backbone import Backbone, ViTShape, build_backbone
from vitdist.models.classifier import Classifier
from vitdist.models.heads import build_head
from vitdist.models.weights import load_backbone_weights, load_weights, sha256
from vitdist.taxonomy import Taxonomy

TREE = Taxonomy(("family", "species"), (("p", "q"), ("1", "2", "3")), ((-1, -1), (0, 0, 1)))
OTHER = Taxonomy(("family", "species"), (("p", "q"), ("1", "2", "4")), ((-1, -1), (0, 0, 1)))


def backbone(seed: int = 0, size: int = 32, depth: int = 2) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone("vit", image_size=size, vit=ViTShape(8, 24, depth, 3, 2.0))


def classifier(tree: Taxonomy = TREE, kind: str = "hierarchical", seed: int = 0, size: int = 32) -> Classifier:
    own = backbone(seed, size)
    return Classifier(own, build_head(kind, own.width, tree, num_heads=3))


def checkpoint(folder: Path, model: Classifier, tree: Taxonomy = TREE) -> Path:
    """A checkpoint folder as training leaves it, as far as weights go."""
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "taxonomy.json").write_text(json.dumps(tree.to_json()))
    return folder


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())


def test_a_checkpoint_of_the_same_tree_gives_backbone_and_head(tmp_path: Path) -> None:
    source, target = classifier(seed=1), classifier(seed=2)
    folder = checkpoint(tmp_path / "step_00000003", source)
    record = load_weights(target, str(folder), TREE)
    assert same(target, source) and record.loaded == ("backbone", "head") and not record.left_out
    assert record.sha256 == sha256(folder / "model.safetensors") and record.source == str(folder)
    assert json.loads(json.dumps(record.to_json()))["file"] == str(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tree", "kind", "reason"), [(OTHER, "hierarchical", "class tree"), (TREE, "linear", "kind of head")]
)
def test_a_head_of_another_tree_or_kind_is_left_out_and_said(
    tmp_path: Path, tree: Taxonomy, kind: str, reason: str
) -> None:
    source, target = classifier(seed=1), classifier(tree, kind, seed=2)
    before = {name: tensor.clone() for name, tensor in target.head.state_dict().items()}
    record = load_weights(target, str(checkpoint(tmp_path / "c", source)), tree)
    assert same(target.backbone, source.backbone) and record.loaded == ("backbone",)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.head.state_dict().items())
    assert reason in str(record) and "left out head" in str(record)


def test_a_file_without_its_tree_gives_no_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", classifier(seed=1))
    (folder / "taxonomy.json").unlink()
    assert "no taxonomy.json" in str(load_weights(classifier(), str(folder / "model.safetensors"), TREE))


@pytest.mark.parametrize("pointer", ["file", "link"])
def test_a_run_means_its_best_else_its_last_checkpoint(tmp_path: Path, pointer: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    models = {name: classifier(seed=seed) for seed, name in enumerate(("step_00000003", "step_00000006"), start=1)}
    for name, model in models.items():
        checkpoint(checkpoints / name, model)
    for which, name in (("last", "step_00000006"), ("best", "step_00000003")):
        if pointer == "file":
            (checkpoints / which).write_text(name + "\n")
        else:
            (checkpoints / which).symlink_to(name)
        target = classifier(seed=9)
        load_weights(target, str(tmp_path), TREE)
        assert same(target, models[name])


def test_a_warm_start_at_another_size_resamples_the_position_embedding(tmp_path: Path) -> None:
    target = classifier(seed=2, size=48)
    source = classifier(seed=1)
    load_weights(target, str(checkpoint(tmp_path / "c", source)), TREE)
    assert target.backbone.model.pos_embed.shape == (1, 36, 24)
    means = [model.backbone.model.pos_embed.mean().item() for model in (source, target)]
    assert means[0] == pytest.approx(means[1], abs=2e-3)
    target(torch.randn(1, 3, 48, 48))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(backbone(depth=3).model.state_dict(), file)
    with pytest.raises(CheckpointError, match="beside them blocks.2") as error:
        load_backbone_weights(backbone(depth=2), str(file))
    assert len(lines(error.value)) == 1
    with pytest.raises(CheckpointError, match="lacks blocks.3"):
        load_backbone_weights(backbone(depth=4), str(file))
    state = load_file(file)
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(2, 2)
    save_file(state, file)
    with pytest.raises(CheckpointError, match="another shape of blocks.1.mlp.fc1.weight"):
        load_backbone_weights(backbone(depth=3), str(file))


def test_nothing_changes_when_weights_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(backbone(seed=1, depth=3).model.state_dict(), file)
    target = backbone(seed=2)
    with pytest.raises(CheckpointError):
        load_backbone_weights(target, str(file))
    assert same(target, backbone(seed=2))


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    state = backbone().model.state_dict()
    state["norm.bias"][3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="norm.bias holds numbers that are not finite"):
        load_backbone_weights(backbone(), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.ckpt", "w.npz"])
def test_a_pickle_is_refused_unopened(tmp_path: Path, name: str) -> None:
    """Even where the file is not there at all: it is the name that is refused, with the way out."""
    with pytest.raises(CheckpointError, match="convert it where you trust it"):
        load_backbone_weights(backbone(), str(tmp_path / name))


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for spec in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError) as error:
            load_backbone_weights(backbone(), str(spec))
        assert str(tmp_path) in str(error.value) and len(lines(error.value)) == 1


def test_a_vit_from_scratch_has_no_pretrained_weights() -> None:
    with pytest.raises(CheckpointError, match="names no weights for vit"):
        load_backbone_weights(backbone(), "pretrained")


def hostile_files(folder: Path) -> dict[str, Path]:
    def entry(start: int, end: int, shape: list[int]) -> dict[str, object]:
        return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}

    data = bytes(16)
    whole = folder / "cut.safetensors"
    save_file(backbone().model.state_dict(), whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    return {
        "cut": whole,
        "empty": write_raw(folder / "empty.safetensors", b"", length=0),
        "no header": write_raw(folder / "no.safetensors", b"not json at all", data),
        "huge header": write_raw(folder / "huge.safetensors", b" " * (100_000_001), data),
        "header beyond the file": write_raw(folder / "lie.safetensors", b"{}", data, length=1 << 62),
        "overlap": write_raw(folder / "o.safetensors", {"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}, data),
        "gap": write_raw(folder / "g.safetensors", {"a": entry(4, 16, [3])}, data),
        "outside": write_raw(folder / "x.safetensors", {"a": entry(0, 4096, [1024])}, data),
        "shape overflow": write_raw(folder / "s.safetensors", {"a": entry(0, 16, [1 << 62, 1 << 62])}, data),
        "a pickle in disguise": write_raw(folder / "p.safetensors", b"\x80\x04\x95cos\nsystem\n.", length=2**40),
    }


def test_hostile_files_end_in_one_line(tmp_path: Path) -> None:
    for kind, file in hostile_files(tmp_path).items():
        with pytest.raises(CheckpointError, match="no sound safetensors file") as error:
            load_backbone_weights(backbone(), str(file))
        assert len(lines(error.value)) == 1 and len(str(error.value)) < 400, kind


@needs_dinov2s
def test_the_record_of_the_real_weights_holds_their_hash() -> None:
    record = load_backbone_weights(build_backbone("vit_small_patch14_dinov2.lvd142m", image_size=112), str(DINOV2S))
    assert record.sha256 == sha256(DINOV2S) and len(record.sha256) == 64 and record.loaded == ("backbone",)
