from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models.weights_files import DINOV2S, needs_dinov2s
from vitdist.errors import CheckpointError, UsageError, lines
from vitdist.models.backbone import Backbone, ViTShape, build_backbone, freeze

TINY = ViTShape(patch_size=8, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2.0)


def tiny(**options: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone("vit", image_size=32, vit=TINY, **options)  # type: ignore[arg-type]


def test_a_vit_from_scratch_has_the_shape_asked_for() -> None:
    backbone = tiny(drop_path=0.3)
    out = backbone(torch.randn(2, 3, 32, 32))
    assert out.pooled.shape == (2, 24) and out.tokens.shape == (2, 16, 24) and out.grid == (4, 4)
    assert backbone.width == backbone.token_width == 24
    assert torch.allclose(out.pooled, out.tokens.mean(dim=1), atol=1e-6)
    blocks = backbone.model.blocks
    assert len(blocks) == 3 and blocks[0].attn.num_heads == 3 and blocks[0].mlp.fc1.out_features == 48
    assert blocks[2].drop_path1.drop_prob == pytest.approx(0.3)
    assert backbone.data_config["mean"] == backbone.data_config["std"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", 64, (4, 4)),
        ("deit_tiny_distilled_patch16_224", 64, (4, 4)),
        ("resnet10t", 64, (2, 2)),
        ("convnext_atto", 64, (2, 2)),
        ("test_vit3", 64, (4, 4)),
        ("mobilenetv3_small_050", 64, (2, 2)),
        ("swin_tiny_patch4_window7_224", 64, (2, 2)),
    ],
)
def test_any_timm_model_gives_a_pooled_feature_and_a_grid_of_tokens(
    name: str, size: int, grid: tuple[int, int]
) -> None:
    backbone = build_backbone(name, image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        out = backbone(images)
        plain = backbone.model(images)
    assert out.grid == grid and out.tokens.shape == (2, grid[0] * grid[1], backbone.token_width)
    assert torch.equal(out.pooled, plain) and out.pooled.shape == (2, backbone.width)


def test_tokens_of_a_feature_map_stand_in_row_order() -> None:
    """The prefix tokens are gone, and token i is the feature at (i // columns, i % columns)."""
    swin = build_backbone("swin_tiny_patch4_window7_224", image_size=96).eval()
    conv = build_backbone("convnext_atto", image_size=96).eval()
    vit = build_backbone("deit_tiny_distilled_patch16_224", image_size=96).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(swin(images).tokens[:, 4], swin.model.forward_features(images)[:, 1, 1])
        assert torch.equal(conv(images).tokens[:, 5], conv.model.forward_features(images)[:, :, 1, 2])
        assert torch.equal(vit(images).tokens[:, 0], vit.model.forward_features(images)[:, 2])


def test_preprocessing_is_the_model_s_own() -> None:
    """augreg ViTs want mean = std = 0.5, DINOv2 ImageNet's (TRAPS, Images)."""
    augreg = build_backbone("vit_tiny_patch16_224.augreg_in21k", image_size=32)
    assert augreg.data_config == {
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_pct": 0.9,
    }  # fmt: skip
    conv = build_backbone("resnet10t.c3_in1k", image_size=64)
    assert conv.data_config["mean"] == (0.485, 0.456, 0.406) and conv.data_config["crop_pct"] == 0.875


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_bse_patch16_224", "did you mean vit_base_patch16_224"),
        ("vit_tiny_patch16_224.augreg_in21", "vit_tiny_patch16_224.augreg_in21k"),
        ("timm/vit_tiny_patch16_224", "hf-hub:NAME"),
        ("zzzzzzzzzzzz", "timm.list_models()"),
    ],
)
def test_an_unknown_name_is_one_line_with_close_ones(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=".") as error:
        build_backbone(name, image_size=224)
    assert says in str(error.value) and len(lines(error.value)) == 1


def test_an_image_that_is_no_whole_number_of_patches_is_refused() -> None:
    with pytest.raises(UsageError, match="98 and 112"):
        build_backbone("vit_small_patch14_dinov2.lvd142m", image_size=100)
    with pytest.raises(UsageError, match="32 and 40"):
        build_backbone("vit", image_size=36, vit=TINY)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match="num_heads 5"):
        build_backbone("vit", image_size=32, vit=ViTShape(8, 24, 1, 5, 2.0))


def test_a_model_that_cannot_take_an_option_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="drop_path_rate"):
        build_backbone("dla46_c", image_size=32, drop_path=0.1)


def test_gradient_checkpointing_changes_no_number() -> None:
    """Fails when the option is not passed on: then the backward pass recomputes no block."""
    calls: dict[bool, int] = {}
    gradients = []
    for grad_checkpointing in (False, True):
        backbone = tiny(grad_checkpointing=grad_checkpointing)
        counts: list[int] = []
        backbone.model.blocks[0].mlp.register_forward_pre_hook(lambda *_, counts=counts: counts.append(1))
        torch.manual_seed(1)
        backbone(torch.randn(2, 3, 32, 32)).pooled.square().sum().backward()
        calls[grad_checkpointing] = len(counts)
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert calls == {False: 1, True: 2}
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_without_gradient_checkpointing_says_so() -> None:
    with pytest.raises(UsageError, match="grad_checkpointing"):
        build_backbone("dla46_c", image_size=32, grad_checkpointing=True)


def trained(backbone: Backbone) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def test_freeze_by_blocks_stops_the_stem_and_the_first_of_them() -> None:
    backbone = tiny()
    freeze(backbone, 2)
    assert trained(backbone) == {n for n, _ in backbone.named_parameters() if "blocks.2" in n or "model.norm" in n}


def test_freeze_none_and_all() -> None:
    backbone = tiny()
    everything = trained(backbone)
    freeze(backbone, "none")
    assert trained(backbone) == everything
    freeze(backbone, "backbone")
    assert not trained(backbone) and not backbone(torch.randn(1, 3, 32, 32)).pooled.requires_grad


@pytest.mark.parametrize("what", ["head", "2", 5, -1])
def test_freeze_of_what_there_is_not_is_refused(what: str | int) -> None:
    with pytest.raises(UsageError, match="1 to 3"):
        freeze(tiny(), what)


def test_frozen_layers_stay_in_evaluation_while_the_rest_trains() -> None:
    """A frozen block drops no path; the blocks after it do, and again after every call of train()."""
    backbone = tiny(drop_path=0.5)
    freeze(backbone, 2)
    backbone.eval()
    backbone.train()
    blocks = backbone.model.blocks
    assert not blocks[1].drop_path1.training and not blocks[0].norm1.training
    assert blocks[2].drop_path1.training and backbone.training


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    backbone = build_backbone("resnet10t", image_size=32)
    freeze(backbone, "backbone")
    backbone.train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 32, 32))
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())


def test_names_without_weight_decay_are_parameters() -> None:
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32)
    names = {name for name, _ in backbone.named_parameters()}
    assert {"model.pos_embed", "model.cls_token"} <= backbone.no_weight_decay() & names


def test_layers_count_from_the_stem_through_the_blocks() -> None:
    layers = tiny().layer_ids()
    assert layers["model.pos_embed"] == layers["model.patch_embed.proj.weight"] == 0
    assert [layers[f"model.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [1, 2, 3]
    assert layers["model.norm.weight"] == 3 and set(layers) == {n for n, _ in tiny().named_parameters()}


def local_folder(path: Path, size: int = 32) -> nn.Module:
    """A timm model saved as a local-dir: config.json and model.safetensors."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=2, img_size=size)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": {"depth": 2},
        "pretrained_cfg": {
            "input_size": [3, size, size], "fixed_input_size": True, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0],
            "crop_pct": 0.8, "interpolation": "bilinear", "num_classes": 5, "classifier": "head",
        },
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), path / "model.safetensors")
    return model


def test_a_local_folder_gives_architecture_weights_and_preprocessing(tmp_path: Path) -> None:
    model = local_folder(tmp_path / "mine")
    backbone = build_backbone(f"local-dir:{tmp_path / 'mine'}", weights="pretrained", image_size=48)
    assert backbone.data_config["mean"] == (0.1, 0.2, 0.3) and backbone.data_config["crop_pct"] == 0.8
    assert len(backbone.model.blocks) == 2
    state = backbone.model.state_dict()
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], model.state_dict()["blocks.1.mlp.fc1.weight"])
    assert state["pos_embed"].shape == (1, 10, 192)
    assert backbone.record is not None and set(backbone.record.left_out) == {"head.weight", "head.bias"}


def test_a_local_folder_with_only_a_pickle_is_refused(tmp_path: Path) -> None:
    local_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors"):
        build_backbone(f"local-dir:{tmp_path}", weights="pretrained", image_size=32)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architecture": "os.system"}'])
def test_a_local_folder_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        build_backbone(f"local-dir:{tmp_path}", image_size=32)
    assert len(lines(error.value)) == 1


def test_without_a_network_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, weights in (("hf-hub:timm/nothing_here", "none"), ("resnet10t.c3_in1k", "pretrained")):
        with pytest.raises(CheckpointError, match="vitdist fetch"):
            build_backbone(name, weights=weights, image_size=64)


@needs_dinov2s
@pytest.mark.parametrize("size", [112, 224])
def test_the_real_dinov2_loads_strictly_at_any_multiple_of_its_patch(size: int) -> None:
    """Against timm's own model at the weights' native 518 px, resized by timm afterwards."""
    backbone = build_backbone("vit_small_patch14_dinov2.lvd142m", weights=str(DINOV2S), image_size=size).eval()
    assert backbone.record is not None and backbone.record.loaded == ("backbone",) and not backbone.record.left_out
    native = build_backbone("vit_small_patch14_dinov2.lvd142m", weights=str(DINOV2S), image_size=518).eval()
    native.model.set_input_size((size, size))
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours, theirs = backbone(images), native.model(images)
    assert torch.allclose(ours.pooled, theirs, atol=1e-4)
    assert ours.grid == (size // 14, size // 14)
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
