"""Dividing tensors over ranks: nothing is lost, nothing is there twice, and padding counts for nothing."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from vitdist.runtime.shards import Cut, Dealt, Layout, part_of, whole_of, without_padding


def layouts(shapes: dict[str, torch.Size], world: int) -> dict[str, tuple[Layout, int]]:
    """Both, with the length of a rank's flat tensor."""
    places, pieces, end, length = [], [], 0, 0
    for name, shape in shapes.items():
        places.append((name, shape.numel(), end))
        pieces.append((name, shape.numel(), -(-shape.numel() // world)))
        end += shape.numel()
        length += pieces[-1][2]
    size = -(-end // (2 * world)) * 2
    return {"cut": (Cut(places, size), size), "dealt": (Dealt(pieces), length)}


@pytest.mark.parametrize("kind", ["cut", "dealt"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_parts_make_the_whole_again_at_any_number_of_ranks(kind: str, world: int) -> None:
    rng = random.Random(world)
    for _ in range(50):
        sizes = [torch.Size(rng.choices(range(1, 6), k=rng.randrange(0, 3))) for _ in range(rng.randrange(1, 6))]
        shapes = {f"p{number}": size for number, size in enumerate(sizes)}
        whole = {name: torch.randn(shape) for name, shape in shapes.items()}
        layout, length = layouts(shapes, world)[kind]
        parts = [torch.full((length,), float("nan")) for _ in range(world)]
        for rank, part in enumerate(parts):
            part_of(layout, rank, whole, part)
        assert not any(torch.isnan(part).any() for part in parts), "padding is 0"
        elements = sum(fragment.length for rank in range(world) for fragment in layout.fragments(rank))
        assert elements == sum(shape.numel() for shape in shapes.values())
        found = whole_of(layout, parts, shapes)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_padding_is_left_out() -> None:
    """5 elements on 3 ranks: pieces of 2, 2 and 1; on 8: three ranks hold nothing but padding."""
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_numel, parameter.ds_tensor = 5, torch.tensor([1.0, float("nan")])  # type: ignore[attr-defined]
    assert [without_padding(parameter, rank).numel() for rank in range(3)] == [2, 2, 1]
    parameter.ds_tensor = torch.full((1,), float("nan"))  # type: ignore[attr-defined]
    assert [without_padding(parameter, rank).numel() for rank in range(8)] == [1, 1, 1, 1, 1, 0, 0, 0]


PAST = """
import torch
from torch import nn
from vitdist.runtime.engine import Engine
from vitdist.runtime.ranks import SINGLE
from vitdist.training.guard import NonFiniteGuard

engine = Engine(SINGLE, precision="fp32", timeout_seconds=60, deterministic=False)
model = nn.Linear(3, 1)
optimizer = torch.optim.AdamW([{"params": list(model.named_parameters())}], lr=0.1, fused=True)
joined = engine.join(
    model, optimizer, strategy="STAGE", offload=False, clip=1.0, micro_batch_size=2, accumulation=1
)
guard = NonFiniteGuard(1, engine.device)
for loss_is, moves in ((1.0, True), (float("nan"), False), (float("nan"), False), (1.0, False), (1.0, False)):
    before = {name: tensor.clone() for name, tensor in joined.weights().items()}
    with joined.accumulate(last=True):
        joined.backward(joined(torch.ones(2, 3)).sum() * loss_is)
    _, found_inf = joined.update(guard)
    moved = any(not torch.equal(before[name], tensor) for name, tensor in joined.weights().items())
    assert moved == moves == (found_inf.item() == 0), (loss_is, moves, moved, found_inf)
"""


@pytest.mark.parametrize("stage", ["ddp", "zero2", "zero3"])
def test_past_the_limit_good_steps_are_suppressed_too(stage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PAST.replace("STAGE", stage)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
