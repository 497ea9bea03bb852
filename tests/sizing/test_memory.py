"""The plan's bytes against those of real tensors: counted on the same model, trained for a few steps on the CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launching
from tests.conftest import Recipes
from vitdist.checkpoint.store import Store
from vitdist.data.pixels.mixing import ToModelInput
from vitdist.recipe import Recipe, load_recipe
from vitdist.recipe.batch import BatchSplit
from vitdist.sizing.live import LiveBytes
from vitdist.sizing.memory import checkpoint_bytes, states_of
from vitdist.sizing.rehearsal import HALF, Rehearsal, rehearse
from vitdist.sizing.report import Sizer
from vitdist.sizing.source import source_of
from vitdist.training import assemble

B = 6


@dataclass
class Real:
    """A recipe's model with real weights, and one micro-batch for it."""

    recipe: Recipe

    def __post_init__(self) -> None:
        self.source = source_of(self.recipe, 1000, None)
        self.model = assemble.build_model(self.recipe, self.source.tree, weights="none").train()
        self.to_input = ToModelInput(HALF, HALF)
        size = assemble.image_size(self.recipe)
        self.images = torch.zeros(B, size, size, 3, dtype=torch.uint8)
        self.targets = torch.zeros(B, self.source.tree.num_levels, dtype=torch.int64)
        self.bf16 = self.recipe.train.precision == "bf16"


CASES = {
    "vit": {},
    "bf16": {"train.precision": "bf16"},
    "checkpointed": {"train.grad_checkpointing": "true", "model.drop_path": "0.1"},
    "linear head": {"model.head": "linear", "model.freeze": "1", "model.weights": "FILE"},
    "batch norm": {"model.backbone": "test_resnet.r160_in1k", "data.image_size": "64"},
    "swin": {"model.backbone": "test_convnext.r160_in1k", "data.image_size": "64"},
}


def recipe_of(tiny_recipe: Recipes, changes: dict[str, str]) -> Recipe:
    changes = {key: value for key, value in changes.items() if value != "FILE"}
    if "model.backbone" in changes:
        path = tiny_recipe(model={"backbone": changes["model.backbone"], "weights": "none", "head": "linear"})
    else:
        path = tiny_recipe(model__freeze="none") if "model.freeze" in changes else tiny_recipe()
    changes.pop("model.freeze", None)
    return load_recipe(path, [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_counts_what_a_real_step_holds(case: str, tiny_recipe: Recipes) -> None:
    """Byte for byte: the same operations on fake tensors and on real ones."""
    real = Real(recipe_of(tiny_recipe, CASES[case]))
    found = rehearse(real.model, real.to_input, real.images, real.targets, bf16=real.bf16)
    said = Rehearsal(real.recipe, real.source.tree).step(B)
    assert (said.inputs, said.activations, said.peak) == (found.inputs, found.activations, found.peak)
    assert said.peak > said.activations > 10 * said.inputs


@pytest.mark.parametrize("case", ["vit", "bf16", "batch norm", "swin"])
def test_activations_are_what_autograd_saves(case: str, tiny_recipe: Recipes) -> None:
    """Counted a second way, by the hooks that autograd itself calls; within 1 % (the loss and the logits are alive)."""
    real = Real(recipe_of(tiny_recipe, CASES[case]))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*real.model.parameters(), *real.model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=real.bf16):
            logits = real.model(real.to_input(real.images))
        loss = assemble_loss(logits, real.targets)
    said = Rehearsal(real.recipe, real.source.tree).step(B)
    assert said.activations == pytest.approx(sum(saved.values()), rel=0.01)
    assert loss.requires_grad


def assemble_loss(logits: tuple[torch.Tensor, ...], targets: torch.Tensor) -> torch.Tensor:
    from vitdist.losses import hierarchical_loss

    return hierarchical_loss(logits, targets, denominators=[float(B)] * targets.shape[1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema.decay": "0.9"}, {"optimizer.name": "sgd"}, {"optimizer.name": "adam", "optimizer.layer_decay": "0.7"}],
    ids=["adamw", "ema", "sgd", "adam"],
)
def test_a_whole_step_stays_within_the_plan(changes: dict[str, str], tiny_recipe: Recipes) -> None:
    """Two micro-batches and an update on real tensors: never above what is said, and at most 5 % below."""
    real = Real(recipe_of(tiny_recipe, changes))
    model, optimizer = real.model, assemble.build_optimizer_of(real.recipe, real.model)
    known = [*real.to_input.buffers(), real.images, real.targets]
    before = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    from vitdist import optim
    from vitdist.training.ema import ModelEMA

    with LiveBytes([*known, *model.parameters(), *model.buffers()]) as live:
        ema = None if real.recipe.ema.decay is None else ModelEMA(model, real.recipe.ema.decay)
        for _ in range(2):
            for _ in range(2):
                assemble_loss(model(real.to_input(real.images)), real.targets).backward()
            optim.step(optimizer, torch.zeros(()))
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.zero_grad(set_to_none=True)
    sizer = Sizer(real.recipe, real.source, 1)
    said = sizer.parts("ddp", "none", BatchSplit(B, 2))
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t is not None)
    average = 0 if ema is None else sum(tensor.nbytes for tensor in ema.state_dict().values())
    assert (said.weights, said.gradients, said.optimizer, said.ema) == (before, gradients, moments, average)
    step = said.states + said.working.peak
    assert 0.95 * step <= before + real.images.nbytes + real.targets.nbytes + live.peak <= step


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_has_the_bytes_that_were_planned(ema: bool, tiny_recipe: Recipes, tmp_path: Path) -> None:
    path = tiny_recipe(train__max_duration="3steps", **({"ema": {"decay": 0.9}} if ema else {}))
    codes, output = launching.run(1, ["train", str(path), "out=run"], tmp_path)
    assert codes == [0], output
    last = Store(tmp_path / "run").pointed("last")
    assert last is not None
    found = sum(tensor.nbytes for file in last.glob("*.safetensors") for tensor in load_file(file).values())
    recipe = load_recipe(path)
    source = source_of(recipe, None, None)
    states = states_of(recipe, assemble.build_model(recipe, source.tree, weights="none"))
    assert checkpoint_bytes(states) == found
    assert states == Sizer(recipe, source, 1).states, "counted on the meta device"


def test_sharing_divides_what_it_says(tiny_recipe: Recipes) -> None:
    """Per strategy: which part falls by the number of ranks, and which does not."""
    recipe = load_recipe(tiny_recipe(), ["train.precision=bf16", "train.global_batch_size=48", "ema.decay=0.9"])
    sizer = Sizer(recipe, source_of(recipe, 1000, None), 8)
    found = {name: sizer.parts(*name, BatchSplit(B, 1)) for name in
             (("ddp", "none"), ("zero1", "none"), ("zero2", "none"), ("zero3", "none"), ("zero2", "cpu"))}  # fmt: skip
    ddp, one, two, three, offloaded = found.values()
    n, moments = sizer.states.weights, sizer.states.optimizer
    assert (ddp.gradients, ddp.optimizer) == (n, moments)
    assert one.optimizer == two.optimizer == three.optimizer == (n + moments) // 8
    assert one.gradients == 2 * n and two.gradients == three.gradients == n // 8 + n, "and what travels"
    assert one.weights == two.weights == ddp.weights, "float32 in every precision"
    assert n // 8 < three.weights < two.weights and three.ema == one.ema // 8
    assert offloaded.optimizer == 0 and offloaded.host == two.optimizer


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_holds_what_was_planned(strategy: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    """What each of two ranks measures of its own tensors under DeepSpeed, to the hundredth of a MiB of its line."""
    model = {"backbone": "vit", "weights": "none", "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 4}
    path = tiny_recipe(model=model, parallel={"strategy": strategy}, train__max_duration="2steps")
    codes, output = launching.run(2, ["train", str(path), "out=run"], tmp_path)
    assert codes == [0, 0], output
    line = next(line for line in output.splitlines() if "this rank holds" in line)
    held, gradients, moments, masters = (float(part) for part in re.findall(r"([\d.]+) MiB", line)[:4])
    recipe = load_recipe(path)
    sizer = Sizer(recipe, source_of(recipe, None, None), 2)
    said = sizer.parts(strategy, "none", BatchSplit(12, 1))
    whole = sizer.states.largest if strategy == "zero3" else 0  # is there only while it is at work
    mib = 2**20
    assert held == pytest.approx((said.weights - sizer.states.buffers - whole) / mib, rel=0.01, abs=0.01)
    assert moments + masters == pytest.approx(said.optimizer / mib, rel=0.01, abs=0.02)
    if strategy != "zero1":
        assert gradients == pytest.approx(sizer.states.trained / 2 / mib, rel=0.01, abs=0.01)
