from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitdist.errors import UsageError
from vitdist.models.backbone import ViTShape, build_backbone, freeze
from vitdist.models.classifier import Classifier
from vitdist.models.heads import build_head
from vitdist.optim import OPTIMIZERS, build_optimizer, clip_grad_norm, param_groups, set_lr, step
from vitdist.taxonomy import Taxonomy

TREE = Taxonomy(("family", "species"), (("p", "q"), ("1", "2", "3")), ((-1, -1), (0, 0, 1)))


def classifier(kind: str = "hierarchical") -> Classifier:
    torch.manual_seed(0)
    backbone = build_backbone("vit", image_size=16, vit=ViTShape(8, 12, 2, 3, 2.0))
    return Classifier(backbone, build_head(kind, backbone.width, TREE, num_heads=3))


def by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name, _ in group["params"]}


def test_every_trained_parameter_is_in_one_group() -> None:
    model = classifier()
    freeze(model.backbone, 1)
    groups = param_groups(model, lr=0.1, head_lr_scale=10.0, weight_decay=0.05, layer_decay=0.5)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_biases_vectors_positions_and_queries_take_no_decay() -> None:
    found = by_name(param_groups(classifier(), lr=0.1, weight_decay=0.05))
    for name in ("backbone.model.pos_embed", "head.pools.1.pool.latent", "backbone.model.norm.weight",
                 "backbone.model.blocks.0.attn.qkv.bias", "head.classifiers.0.bias"):  # fmt: skip
        assert found[name] == (1.0, 0.0)
    for name in ("backbone.model.patch_embed.proj.weight", "head.classifiers.1.weight", "head.pools.0.pool.kv.weight"):
        assert found[name] == (1.0, 0.05)


def test_layers_learn_slower_towards_the_stem_and_the_head_at_its_own_rate() -> None:
    groups = param_groups(classifier(), lr=0.1, head_lr_scale=10.0, weight_decay=0.05, layer_decay=0.5)
    found = by_name(groups)
    assert found["head.classifiers.0.weight"][0] == 10.0
    assert found["backbone.model.blocks.1.mlp.fc1.weight"][0] == found["backbone.model.norm.weight"][0] == 0.5
    assert found["backbone.model.blocks.0.mlp.fc1.weight"][0] == 0.25
    assert found["backbone.model.pos_embed"][0] == 0.125
    assert all(group["lr"] == pytest.approx(0.1 * group["lr_scale"]) for group in groups)
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups) == 8


def test_groups_come_in_the_same_order_every_time() -> None:
    first, second = (param_groups(classifier(), lr=0.1, weight_decay=0.1, layer_decay=0.7) for _ in range(2))
    assert [[name for name, _ in group["params"]] for group in first] == [
        [name for name, _ in group["params"]] for group in second
    ]


def test_nothing_to_train_is_said() -> None:
    model = classifier()
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing is left"):
        param_groups(model, lr=0.1)


def test_a_rate_reaches_each_group_by_its_scale() -> None:
    optimizer = build_optimizer("adamw", param_groups(classifier(), lr=0.1, layer_decay=0.5, head_lr_scale=3.0), lr=0.1)
    set_lr(optimizer, 0.02)
    assert all(group["lr"] == pytest.approx(0.02 * group["lr_scale"]) for group in optimizer.param_groups)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {3.0, 0.5, 0.25, 0.125}


def test_every_optimizer_is_fused_and_knows_names() -> None:
    for name in OPTIMIZERS:
        optimizer = build_optimizer(name, param_groups(classifier(), lr=0.1), lr=0.1)
        assert all(group["fused"] and group["param_names"] for group in optimizer.param_groups)
    with pytest.raises(UsageError, match="adamw"):
        build_optimizer("adamW2", [], lr=0.1)


def trainee(name: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.1}]
    return model, build_optimizer(name, groups, lr=0.1)


def fill(model: nn.Module, value: float | None, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = drawn if value is None else torch.full_like(parameter, value)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_marked_step_changes_nothing(name: str, bad: float) -> None:
    """Parameters, moments and step counters, bit for bit, and the next step is what it would have been."""
    model, optimizer = trainee(name)
    fill(model, None)
    step(optimizer, torch.tensor(0.0))
    before = snapshot(model, optimizer)
    fill(model, bad)
    step(optimizer, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model, optimizer), before, strict=True))
    assert not hasattr(optimizer, "found_inf")
    fill(model, None, seed=1)
    step(optimizer, torch.tensor(0.0))
    assert not torch.equal(snapshot(model, optimizer)[0], before[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1, 3)])
def test_skipped_steps_leave_no_trace_in_later_ones(name: str, skipped: tuple[int, ...]) -> None:
    """A run with bad steps in it equals torch's own run without them; SGD's first step is the hard one."""
    model, optimizer = trainee(name)
    plain, reference = trainee(name)
    good = 0
    for index in range(6):
        if index in skipped:
            fill(model, math.nan)
            step(optimizer, torch.tensor(1.0))
            continue
        fill(model, None, seed=good)
        fill(plain, None, seed=good)
        step(optimizer, torch.tensor(0.0))
        reference.step()
        good += 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_marks_are_any_count_that_is_not_zero() -> None:
    """A sum of flags over ranks may be 3, and the kernels look for exactly 1."""
    model, optimizer = trainee("adamw")
    before = snapshot(model, optimizer)
    fill(model, None)
    step(optimizer, torch.tensor(3))
    assert torch.equal(snapshot(model, optimizer)[0], before[0])


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model, optimizer = trainee("sgd")
    fill(model, None)
    model.bias.grad = None
    before = model.bias.detach().clone()
    step(optimizer, torch.tensor(0.0))
    assert torch.equal(model.bias, before) and "momentum_buffer" not in optimizer.state[model.bias]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_round_trip(name: str) -> None:
    model, optimizer = trainee(name)
    copy, other = trainee(name)
    for index in range(3):
        fill(model, None, seed=index)
        step(optimizer, torch.tensor(0.0))
    copy.load_state_dict(model.state_dict())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (copy, other)):
        fill(one, None, seed=9)
        step(its, torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_clipping_scales_to_the_norm_and_returns_what_it_was() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert clip_grad_norm(model.parameters(), None).item() == 5.0
    assert model.weight.grad.tolist() == [[3.0, 0.0], [0.0, 4.0]]
    assert clip_grad_norm(model.parameters(), 10.0).item() == 5.0
    assert model.weight.grad.tolist() == [[3.0, 0.0], [0.0, 4.0]]
    assert clip_grad_norm(model.parameters(), 1.0).item() == 5.0
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_the_norm_of_bad_gradients_is_bad() -> None:
    model = nn.Linear(2, 2)
    fill(model, math.nan)
    assert not clip_grad_norm(model.parameters(), 1.0).isfinite()
