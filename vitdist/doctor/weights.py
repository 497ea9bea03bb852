"""`vitdist fetch RECIPE`: on a node with internet, for nodes without."""

from __future__ import annotations

from pathlib import Path

from vitdist.errors import CheckpointError
from vitdist.models.backbone import build_backbone
from vitdist.recipe.schema import Recipe
from vitdist.training.assemble import image_size, vit_shape


def fetch_weights(recipe: Recipe) -> str:
    """Where they are, after the model has taken them: that is what shows that they are whole and fit.

    CheckpointError when they cannot be had; a damaged download is deleted from the cache, so that the next try is one.
    """
    wish = recipe.model
    try:
        backbone = build_backbone(
            wish.backbone,
            weights=wish.weights,
            image_size=image_size(recipe),
            vit=vit_shape(recipe) if wish.backbone == "vit" else None,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_forget(error)}") from None
    if backbone.record is None:
        return f"{recipe.name}: model.weights is none, and nothing else of {wish.backbone} is to be fetched"
    return f"{backbone.record}\n{backbone.record.file}{_how_offline(Path(backbone.record.file))}"


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _how_offline(file: Path) -> str:
    """What compute nodes need to find it there."""
    if not file.is_relative_to(_cache()):
        return ""
    return f"\nfor nodes without internet: export HF_HUB_CACHE={_cache()} HF_HUB_OFFLINE=1"


def _forget(error: CheckpointError) -> str:
    """Delete the unsound file that an error names, where it lies in the cache."""
    named = next((Path(word) for word in str(error).split() if word.endswith(".safetensors")), None)
    if named is None or "no sound safetensors" not in str(error) or not named.is_relative_to(_cache()):
        return ""
    named.resolve().unlink(missing_ok=True)
    named.unlink(missing_ok=True)
    return "; it was deleted from the cache: fetch again"
