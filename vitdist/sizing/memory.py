"""Bytes on one device, part by part, for every way of sharing a training among ranks.

Weights, gradients and moments are float32, whatever the precision of the forward. DeepSpeed's ZeRO (Rajbhandari et al.,
SC 2020) keeps beside the moments a second copy of the weights that a rank updates; ZeRO 1 shares optimizer states among
ranks, ZeRO 2 gradients too, ZeRO 3 weights too. Offload keeps the optimizer's part in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from vitdist.recipe.schema import Recipe
from vitdist.sizing.rehearsal import Working

STRATEGIES = (("ddp", "none"), ("zero1", "none"), ("zero2", "none"), ("zero3", "none"),
              ("zero1", "cpu"), ("zero2", "cpu"), ("zero3", "cpu"))  # fmt: skip
BUCKET = 4 * 50_000_000  # bytes of gradients on their way between ranks (runtime.zero_setup)
RESERVE, FRAGMENTS = 1_000_000_000, 0.05  # the device's context and libraries, and what the allocator cannot use


@dataclass(frozen=True)
class States:
    """What a model and its optimizer hold, in bytes of float32."""

    weights: int  # all parameters
    buffers: int
    trained: int  # the parameters that learn: also the size of their gradients
    optimizer: int
    ema: int
    stored: int  # the weights as a checkpoint has them
    largest: int  # the largest block, which ZeRO 3 holds whole while it is at work


def states_of(recipe: Recipe, model: nn.Module) -> States:
    """Counted on the model itself, which may be on the meta device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = {"sgd": int(recipe.optimizer.momentum > 0)}.get(recipe.optimizer.name, 2)
    counters = 0 if recipe.optimizer.name == "sgd" else 4 * len(trained)
    averaged = _bytes(t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return States(
        weights=_bytes(model.parameters()),
        buffers=_bytes(model.buffers()),
        trained=_bytes(trained),
        optimizer=moments * _bytes(trained) + counters,
        ema=0 if recipe.ema.decay is None else averaged + 8,
        stored=_bytes(model.state_dict().values()),
        largest=max(_bytes(block.parameters()) for block in _blocks(model)),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """Members of lists of layers, such as a ViT's blocks; the model itself where it has none."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    return [child for layers in lists for child in layers] or [model]


@dataclass(frozen=True)
class Parts:
    """One strategy's bytes on one device; `host` is what offload moves to each rank's share of the host."""

    strategy: str
    offload: str
    weights: int
    gradients: int
    optimizer: int
    ema: int
    working: Working
    host: int = 0

    @property
    def name(self) -> str:
        return self.strategy if self.offload == "none" else f"{self.strategy} + offload"

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        """The most at once: in a step, or in an evaluation, which keeps the weights beside their average."""
        evaluating = (self.weights if self.ema else 0) - self.gradients + self.working.evaluation
        return self.states + max(self.working.peak, evaluating)

    def fits(self, memory: int) -> bool:
        return self.total <= usable(memory)


def usable(memory: int) -> int:
    """What a device of so many bytes leaves for tensors."""
    return int(memory * (1 - FRAGMENTS)) - RESERVE


def parts(states: States, working: Working, strategy: str, offload: str, *, world: int, accumulation: int) -> Parts:
    """The bytes of one rank."""
    if strategy == "ddp":
        # gradients live in DDP's buckets, and those of earlier micro-batches beside them until they are added
        copies = 2 if world > 1 and accumulation > 1 else 1
        weights = states.weights + states.buffers
        return Parts(strategy, offload, weights, copies * states.trained, states.optimizer, states.ema, working)
    share = {"zero1": (1, 1), "zero2": (1, world), "zero3": (world, world)}[strategy]
    weights = states.weights // share[0] + states.buffers
    weights += states.largest if strategy == "zero3" else 0
    gradients = states.trained // share[1] + min(states.trained, BUCKET)
    optimizer = (states.trained + states.optimizer) // world
    ema = states.ema // share[0]
    if offload == "none":
        return Parts(strategy, offload, weights, gradients, optimizer, ema, working)
    return Parts(strategy, offload, weights, gradients, 0, ema, working, host=optimizer)


def checkpoint_bytes(states: States) -> int:
    """Tensors of one checkpoint: the weights to use, the moments, and with an average the weights under training."""
    return states.stored + states.optimizer + (states.stored + states.ema if states.ema else 0)
