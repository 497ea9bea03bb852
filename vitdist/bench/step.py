"""The training step beside a bare loop over the same model, and beside the step of timm's training script.

Each contestant trains on the same resident batches in interleaved rounds, so that a noisy machine is as noisy for all.
Mixing, the average of the weights and the L1 and L2 terms are off, since a bare loop has none.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from vitdist.data.loading.batch import Batch
from vitdist.data.pixels.mixing import ToModelInput
from vitdist.errors import UsageError
from vitdist.recipe.load import load_recipe
from vitdist.recipe.schema import Recipe
from vitdist.recipe.shipped import find_recipe
from vitdist.runtime import rng
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.faults import Faults
from vitdist.runtime.ranks import discover
from vitdist.runtime.stop import StopFlag
from vitdist.runtime.watch import Watch
from vitdist.training import assemble
from vitdist.training.build import build_job
from vitdist.training.datasets import open_datasets
from vitdist.training.folder import Start
from vitdist.training.job import Job
from vitdist.training.loop import settle
from vitdist.training.step import Pending, Stepper

NUM_BATCHES = 4  # resident ones, taken in turn
WARM_UP = 3
PLAIN = (
    "augment.mixup=0", "augment.cutmix=0", "ema.decay=null", "loss.l1=0", "loss.l2=0", "tracking.wandb=disabled",
    "model.weights=none", "model.head_init=random", "train.max_duration=1000000steps", "evaluation.every=1000000steps",
)  # fmt: skip
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Speed:
    """Images a second of one contestant, the median over rounds, and its share of the bare loop's in the same round."""

    name: str
    rate: float
    share: float


@dataclass(frozen=True)
class Outcome:
    """One variant's contest. `flops` are those of a forward and backward of one image through the bare model."""

    what: str
    speeds: list[Speed]
    flops: float
    ceiling: float  # FLOP/s of a large matrix product here, in this precision

    def table(self) -> str:
        ceiling = f"a matrix product reaches {self.ceiling / 1e12:.2f} TFLOP/s"
        head = f"{self.what}; {self.flops / 1e9:.1f} GFLOP an image; {ceiling}"
        rows = [
            f"  {speed.name:28s} {speed.rate:9.2f} img/s {100 * speed.share:7.1f} % of bare "
            f"{100 * speed.rate * self.flops / self.ceiling:6.1f} % of the ceiling"
            for speed in self.speeds
        ]
        return "\n".join([head, *rows])


def measure_step(
    name: str, overrides: Sequence[str], variant: str, folder: Path, *, num_steps: int, num_rounds: int
) -> Outcome:
    """Run one variant, `fp32`, `bf16` or either with `+compile`, on one device; `folder` takes a throwaway run."""
    precision, _, compiled = variant.partition("+")
    wishes = [f"train.precision={precision}", f"train.compile={str(bool(compiled)).lower()}", f"out={folder / variant}"]
    recipe = load_recipe(find_recipe(name), [*overrides, *PLAIN, *wishes])
    job = _job(recipe)
    batches = [batch.to(job.engine.device) for batch in _resident(job)]
    contestants = {"bare loop": bare_step(job, batches), "vitdist": vitdist_step(job, batches)}
    if recipe.model.backbone != "vit":
        contestants["the step of timm's script"] = timm_step(job, batches)
    size = job.batch.micro_batch_size * job.batch.accumulation
    rates = _contest(contestants, size, num_steps, num_rounds, job.engine.device)
    bare = rates["bare loop"]
    speeds = [
        Speed(who, statistics.median(own), statistics.median(a / b for a, b in zip(own, bare, strict=True)))
        for who, own in rates.items()
    ]
    what = (
        f"{variant}: {recipe.model.backbone}, {recipe.model.head} head, {job.preprocessing.image_size} px, micro-batch "
        f"{job.batch.micro_batch_size} x {job.batch.accumulation}, {_device_name(job.engine.device)}"
    )
    job.journal.close(0)
    return Outcome(what, speeds, _flops(job, batches[0]), _ceiling(job.engine.device, precision))


def vitdist_step(job: Job, batches: list[Batch]) -> Step:
    """The training loop's own step: stepper, report read one step late, and the line in metrics.jsonl."""
    stepper, stream = Stepper(job), itertools.cycle(batches)
    pending: Pending | None = None

    def step() -> Tensor:
        nonlocal pending
        current = stepper(stream, save=False)
        job.state.step += 1
        report = settle(job, pending, 1.0)
        pending = current
        return torch.tensor(report.loss if report is not None else float("nan"))

    return step


def bare_step(job: Job, batches: list[Batch]) -> Step:
    """The same model, losses, clipping and optimizer with nothing around them."""
    recipe, device = job.recipe, job.engine.device
    rng.seed_everything(recipe.seed, 0)
    model = assemble.build_model(recipe, job.datasets.tree).to(device).train()
    optimizer = assemble.build_optimizer_of(recipe, model)
    return _loop(job, batches, model, optimizer, job.datasets.targets)


def timm_step(job: Job, batches: list[Batch]) -> Step:
    """timm's own model, optimizer and clipping as its train.py puts them together, TF32 and channels-last on a GPU."""
    recipe, device = job.recipe, job.engine.device
    classes = len(job.datasets.tree.names[-1])
    model = timm.create_model(
        recipe.model.backbone, num_classes=classes, img_size=job.preprocessing.image_size,
        drop_path_rate=recipe.model.drop_path,
    ).to(device).train()  # fmt: skip
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(recipe.train.grad_checkpointing)  # type: ignore[operator]
    optimizer = create_optimizer_v2(
        model, opt=recipe.optimizer.name, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay,
        layer_decay=recipe.optimizer.layer_decay if recipe.optimizer.layer_decay != 1 else None, fused=True,
    )  # fmt: skip
    step = _loop(job, batches, model, optimizer, job.datasets.targets[:, -1:])

    def with_tf32() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return step()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return with_tf32


def _loop(job: Job, batches: list[Batch], model: nn.Module, optimizer: Optimizer, nodes: np.ndarray) -> Step:
    """A training step as a script would have it; `nodes` [num_nodes, L] are a label's classes by level."""
    recipe, device, stream = job.recipe, job.engine.device, itertools.cycle(batches)
    to_input = ToModelInput(job.preprocessing.mean, job.preprocessing.std).to(device)
    targets = torch.from_numpy(nodes.astype(np.int64)).to(device)
    bf16, smoothing = recipe.train.precision == "bf16", recipe.loss.label_smoothing
    if recipe.train.compile:
        model.compile()

    def step() -> Tensor:
        total = torch.zeros((), device=device)
        for _ in range(job.batch.accumulation):
            batch = next(stream)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(to_input(batch.images))
            logits = logits if isinstance(logits, tuple) else (logits,)
            wanted = targets[batch.labels].unbind(1)
            levels = [
                functional.cross_entropy(x.float(), y, label_smoothing=smoothing)
                for x, y in zip(logits, wanted, strict=True)
            ]
            loss = torch.stack(levels).sum() / job.batch.accumulation
            loss.backward()
            total += loss.detach()
        if recipe.optimizer.clip_grad_norm is not None:
            dispatch_clip_grad(model.parameters(), recipe.optimizer.clip_grad_norm, mode="norm")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _job(recipe: Recipe) -> Job:
    ranks = discover()
    if ranks.world > 1:
        raise UsageError(
            f"the step is measured on one device, but {ranks.world} ranks were started; leave the launcher out"
        )
    Path(recipe.out).mkdir(parents=True, exist_ok=True)
    set_threads(ranks)
    engine = Engine(ranks, precision=recipe.train.precision, timeout_seconds=600, deterministic=False)
    return build_job(
        recipe, engine, open_datasets(recipe), Start(None, 1, []),
        stop=StopFlag(Path(recipe.out), max_seconds=None, is_main=True), faults=Faults(0), lock=None,
        watch=Watch(ranks, timeout=600), debug=False, allow_inexact=False,
    )  # fmt: skip


def _resident(job: Job) -> list[Batch]:
    loader = assemble.train_batches(
        job.recipe, job.datasets.train.split, job.plan, job.preprocessing, job.batch,
        rank=0, world=1, start=0, pin_memory=False, num_workers=0,
    )  # fmt: skip
    return list(itertools.islice(loader, NUM_BATCHES))


def _contest(
    contestants: dict[str, Step], size: int, num_steps: int, num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Images a second by contestant and round; each round gives everybody a turn, in another order."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        for _ in range(WARM_UP):
            step()
    names = list(contestants)
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _wait(device)
            started = time.perf_counter()
            for _ in range(num_steps):
                contestants[name]()
            _wait(device)
            rates[name].append(size * num_steps / (time.perf_counter() - started))
    return rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(job: Job, batch: Batch) -> float:
    """Floating-point operations of one image forward and backward, two a multiply-add, as torch counts them."""
    model = assemble.build_model(job.recipe, job.datasets.tree).to(job.engine.device)
    images = torch.zeros(len(batch), 3, *batch.images.shape[1:3], device=job.engine.device)
    with FlopCounterMode(display=False) as counter:
        sum(logits.sum() for logits in model(images)).backward()
    return counter.get_total_flops() / len(batch)


def _ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    size, repeats = (8192, 20) if device.type == "cuda" else (2048, 2)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _wait(device)
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - started))
    return best


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"
