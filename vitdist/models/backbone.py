"""Backbones: any timm model, or a ViT from scratch, behind one output (a pooled feature and a grid of tokens).

Shapes: B batch, S image side, N tokens, D width of the pooled feature, T width of a token (D for every ViT).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.data.config import resolve_model_data_config
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitdist.errors import CheckpointError, UsageError
from vitdist.models.weights import WeightsRecord, fetch, load_backbone_weights


class Tokens(NamedTuple):
    """A backbone's answer: pooled [B, D], tokens [B, N, T] in row order, and their grid (rows, columns)."""

    pooled: Tensor
    tokens: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class ViTShape:
    """A plain ViT's shape; `mlp_ratio` is the MLP's hidden width over `embed_dim`."""

    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0


class Backbone(nn.Module):
    """A timm model without its classifier: images [B, 3, S, S] to `Tokens`.

    Layers frozen by `freeze` stay in evaluation mode, so their dropout, drop path and running statistics stand still.
    """

    model: Any  # torch's types know nothing of the methods that a timm model has

    def __init__(self, model: Any, name: str, data_config: dict[str, Any], image_size: int) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.image_size = image_size
        self.data_config = data_config
        self.width = int(model.head_hidden_size)
        self.token_width = int(model.num_features)
        self.record: WeightsRecord | None = None
        self._frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> Tokens:
        features = self.model.forward_features(images)
        tokens, grid = self._grid(features)
        return Tokens(self.model.forward_head(features, pre_logits=True), tokens, grid)

    def _grid(self, features: Any) -> tuple[Tensor, tuple[int, int]]:
        """Tokens and their grid from a feature map (NCHW or NHWC), or from a sequence without its prefix tokens."""
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise UsageError(f"backbone {self.name} gives no single grid of tokens; choose a ViT, Swin or ConvNeXt")
        if features.ndim == 4:
            if getattr(self.model, "output_fmt", "NCHW") != "NHWC":
                features = features.permute(0, 2, 3, 1)
            return features.flatten(1, 2), (features.shape[1], features.shape[2])
        tokens = features[:, self._num_prefix_tokens :]
        if tokens.shape[1] == 0:
            raise UsageError(f"backbone {self.name} keeps no patch tokens to its end; choose a ViT, Swin or ConvNeXt")
        return tokens, self._sequence_grid(tokens.shape[1])

    @property
    def _num_prefix_tokens(self) -> int:
        model = self.model
        default = 1 if isinstance(getattr(model, "cls_token", None), Tensor) else 0
        return int(getattr(model, "num_prefix_tokens", default))

    def _sequence_grid(self, num_tokens: int) -> tuple[int, int]:
        side = round(num_tokens**0.5)
        return (side, side) if side * side == num_tokens else (1, num_tokens)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: position embeddings, class and register tokens, queries."""
        names = set(self.model.no_weight_decay()) if hasattr(self.model, "no_weight_decay") else set()
        names |= {name for name, _ in self.model.named_parameters() if name.endswith(".latent")}
        return {f"model.{name}" for name in names}

    def layer_ids(self) -> dict[str, int]:
        """Layer number of each parameter by timm's own grouping: 0 the stem, 1 the first block, and so on."""
        if not hasattr(self.model, "group_matcher"):
            raise UsageError(
                f"timm knows no layers of {self.name}: set optimizer.layer_decay to 1 and freeze none or all"
            )
        groups = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        return {f"model.{name}": layer for name, layer in groups.items()}


def build_backbone(
    name: str,
    *,
    weights: str = "none",
    image_size: int = 224,
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
    vit: ViTShape | None = None,
) -> Backbone:
    """A backbone by timm's `name.tag`, `hf-hub:owner/name`, `local-dir:PATH`, or `vit` (from scratch, shaped by `vit`).

    `weights` is what `load_backbone_weights` takes; what it loaded is kept as `.record`. UsageError for what cannot be
    built, CheckpointError for weights that are not there or do not fit.
    """
    if name == "vit":
        backbone = _scratch(vit or ViTShape(), image_size, drop_path)
    else:
        model = _create(name, image_size, drop_path)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        kept = {key: config[key] for key in ("interpolation", "crop_pct")}
        kept |= {key: tuple(config[key]) for key in ("mean", "std")}
        backbone = Backbone(model, name, kept, image_size)
    _check_patches(backbone)
    if grad_checkpointing:
        _checkpoint_gradients(backbone)
    if weights != "none":
        backbone.record = load_backbone_weights(backbone, weights)
    return backbone


def freeze(backbone: Backbone, what: str | int) -> None:
    """Stop training of nothing ('none'), of everything ('backbone'), or of the stem and the first `what` blocks."""
    if what in ("none", 0):
        return
    frozen = dict(backbone.named_parameters()) if what == "backbone" else _first_layers(backbone, what)
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    backbone._frozen = list(_frozen_modules(backbone.model))
    backbone.train(backbone.training)


def _first_layers(backbone: Backbone, what: str | int) -> set[str]:
    layers = backbone.layer_ids()
    last = max(layers.values())
    if isinstance(what, str) or not 0 < what <= last:
        raise UsageError(f"model.freeze: {what} is none of 'none', 'backbone' or a number of blocks from 1 to {last}")
    return {name for name, layer in layers.items() if layer <= what}


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The largest submodules whose parameters are all frozen."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from _frozen_modules(child)


def _scratch(shape: ViTShape, image_size: int, drop_path: float) -> Backbone:
    """A plain ViT with mean-pooled, normalised tokens and no class token ("Better plain ViT baselines", Beyer 2022)."""
    if shape.embed_dim % shape.num_heads:
        raise UsageError(
            f"model.embed_dim {shape.embed_dim} is no multiple of model.num_heads {shape.num_heads}; "
            f"the nearest is {max(1, round(shape.embed_dim / shape.num_heads)) * shape.num_heads}"
        )
    model = VisionTransformer(
        img_size=image_size, patch_size=shape.patch_size, embed_dim=shape.embed_dim, depth=shape.depth,
        num_heads=shape.num_heads, mlp_ratio=shape.mlp_ratio, drop_path_rate=drop_path,
        num_classes=0, class_token=False, global_pool="avg", fc_norm=False,
    )  # fmt: skip
    half = (0.5, 0.5, 0.5)
    config = {"mean": half, "std": half, "interpolation": "bicubic", "crop_pct": 1.0}
    return Backbone(model, "vit", config, image_size)


def _create(name: str, image_size: int, drop_path: float) -> Any:
    """The timm model, built without weights: timm's own loading may fall back to pickled files."""
    source = _local_source(name)
    options: dict[str, Any] = {"num_classes": 0}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if _takes_image_size(source):
        options["img_size"] = image_size
    try:
        return timm.create_model(source, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        asked = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UsageError(f"timm cannot build {name} with {asked}: {error}") from None


def _local_source(name: str) -> str:
    """The name timm is given: a Hugging Face repository becomes the folder its config.json was fetched into."""
    if not name.startswith("hf-hub:"):
        return name
    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    return f"local-dir:{fetch(repository, 'config.json', revision or None).parent}"


def _takes_image_size(name: str) -> bool:
    """Whether the model's grid is fixed when it is built (ViT, Swin), so that it must be told the image size."""
    if name.startswith("local-dir:"):
        return bool(_local_config(name).get("fixed_input_size"))
    if ":" in name or "/" in name:
        raise UsageError(
            f"{name} is no backbone: a folder is named local-dir:PATH, a Hugging Face repository hf-hub:NAME"
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"there is no backbone {name}; {_close_matches(name)}")
    if tag and not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no weights {tag!r} for {architecture}; {_close_matches(name)}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config and config.fixed_input_size)


def _close_matches(name: str) -> str:
    architecture = name.partition(".")[0]
    same = [known for known in timm.list_pretrained() if known.partition(".")[0] == architecture]
    known = same or [*timm.list_models(), *timm.list_pretrained(), "vit"]
    matches = difflib.get_close_matches(name, known, n=4, cutoff=0.3 if same else 0.6)
    return f"did you mean {', '.join(matches)}?" if matches else "timm.list_models() names them all"


def _local_config(name: str) -> dict[str, Any]:
    """The pretrained_cfg of a `local-dir:` model's config.json, checked enough that timm can build from it."""
    path = Path(name.removeprefix("local-dir:")) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} has no readable config.json ({error}); timm's save_for_hf writes one") from None
    if not isinstance(config, dict) or not timm.is_model(str(config.get("architecture"))):
        raise CheckpointError(f"{path} names no architecture that timm knows; timm's save_for_hf writes one that does")
    inner = config.get("pretrained_cfg", config)
    return inner if isinstance(inner, dict) else {}


def _check_patches(backbone: Backbone) -> None:
    """UsageError unless the image is a whole number of patches: timm would silently drop the rest of each side."""
    patch = getattr(getattr(backbone.model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    size = backbone.image_size
    if isinstance(side, int) and size % side:
        near = sorted({max(side, size // side * side), (size // side + 1) * side})
        raise UsageError(
            f"data.image_size {size} is no multiple of the {side} px patches of {backbone.name}; "
            f"the nearest are {' and '.join(map(str, near))}"
        )


def _checkpoint_gradients(backbone: Backbone) -> None:
    try:
        backbone.model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"{backbone.name} cannot checkpoint gradients; set train.grad_checkpointing to false"
        ) from error
