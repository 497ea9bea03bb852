"""What a recipe asks of this machine: its data, its weights, its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vitdist.doctor.findings import Finding
from vitdist.errors import VitdistError, lines
from vitdist.models.backbone import build_backbone
from vitdist.recipe.schema import Recipe
from vitdist.training.assemble import check_monitors, image_size, num_workers_of, vit_shape
from vitdist.training.build import batch_split
from vitdist.training.datasets import open_datasets


def wishes(recipe: Recipe, world: int, local_world: int) -> Iterator[Finding]:
    """A finding each; what cannot be had is named with the mend that training itself would name."""
    yield _asked("data", lambda: _data(recipe))
    yield _asked("weights", lambda: _weights(recipe))
    yield _asked("batch", lambda: _batch(recipe, world, local_world))


def _asked(topic: str, question: Callable[[], str]) -> Finding:
    try:
        return Finding(topic, question())
    except VitdistError as error:
        text, _, mend = lines(error)[0].partition("; ")
        return Finding(topic, text, mend or "training would stop here")


def _data(recipe: Recipe) -> str:
    found = open_datasets(recipe)
    check_monitors(recipe, found.tree)
    return f"{recipe.data.path}: {found.train.num_samples:,} training samples of {len(found.tree.names[-1])} classes"


def _weights(recipe: Recipe) -> str:
    """Read as training reads them; where they are not in the cache, this fetches them, as training would."""
    wish = recipe.model
    backbone = build_backbone(
        wish.backbone,
        weights=wish.weights,
        image_size=image_size(recipe),
        vit=vit_shape(recipe) if wish.backbone == "vit" else None,
    )
    size = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    return f"{wish.backbone}, {size:.1f} million parameters, " + (
        str(backbone.record) if backbone.record else "from scratch"
    )


def _batch(recipe: Recipe, world: int, local_world: int) -> str:
    split = batch_split(recipe, world)
    workers = num_workers_of(recipe, local_world)
    total = recipe.train.global_batch_size
    parts = (
        f"{world} rank{'s' * (world != 1)} x micro-batch {split.micro_batch_size} x accumulation {split.accumulation}"
    )
    return f"{total} = {parts}, {workers} loader worker{'s' * (workers != 1)} a rank"
