"""What a launcher's environment states, held against the recipe, which is the only source of a run (P10)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping

from vitdist.errors import UsageError
from vitdist.recipe.schema import Recipe

# `accelerate launch` always exports some of these, asked or not: then they are its defaults and no statement
DEFAULTS = {
    "ACCELERATE_MIXED_PRECISION": ("no", ""),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "NO", ""),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto", ""),
    "ACCELERATE_USE_DEEPSPEED": ("false", "False", "0", ""),
    "ACCELERATE_USE_FSDP": ("false", "False", "0", ""),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "False", "0", ""),
}
# with ACCELERATE_USE_DEEPSPEED only; a configuration file says too much to be compared
DEEPSPEED_DEFAULTS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("",),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "auto", ""),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", ""),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", ""),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", ""),
}


def check_launcher(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """UsageError naming the variable and the recipe's key when a launcher contradicts the recipe."""
    with_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "") not in DEFAULTS["ACCELERATE_USE_DEEPSPEED"]
    defaults = {**DEFAULTS, **(DEEPSPEED_DEFAULTS if with_deepspeed else {})}
    for name, key, agreeing in _statements(recipe):
        value = environment.get(name, "")
        if name in defaults and value not in defaults[name] and value not in agreeing:
            raise UsageError(
                f"the launcher says {name}={value} (a flag or Accelerate's config file), "
                f"the recipe says {key}: {_said(recipe, key)}; the recipe decides: drop the flag, or set {key}"
            )


def _statements(recipe: Recipe) -> Iterator[tuple[str, str, set[str]]]:
    """(variable, the recipe's key, values that say the same)."""
    strategy, clip = recipe.parallel.strategy, recipe.optimizer.clip_grad_norm
    zero = strategy.startswith("zero")
    yield "ACCELERATE_MIXED_PRECISION", "train.precision", {recipe.train.precision}
    yield "ACCELERATE_DYNAMO_BACKEND", "train.compile", {"inductor", "INDUCTOR"} if recipe.train.compile else set()
    yield "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "train.micro_batch_size", set()
    yield "ACCELERATE_USE_DEEPSPEED", "parallel.strategy", {"true", "True", "1"} if zero else set()
    yield "ACCELERATE_USE_FSDP", "parallel.strategy", set()
    yield "ACCELERATE_USE_MEGATRON_LM", "parallel.strategy", set()
    yield "ACCELERATE_DEEPSPEED_ZERO_STAGE", "parallel.strategy", {strategy.removeprefix("zero")}
    yield "ACCELERATE_GRADIENT_CLIPPING", "optimizer.clip_grad_norm", {str(clip)} if clip else {"0", "0.0"}
    yield "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "parallel.offload", {recipe.parallel.offload}
    yield "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "parallel.offload", set()
    yield "ACCELERATE_DEEPSPEED_CONFIG_FILE", "parallel.strategy", set()


def _said(recipe: Recipe, key: str) -> str:
    value = recipe.flat()[key]
    if key == "train.micro_batch_size":
        return f"{value}, and the accumulation follows from it"
    return str(value).lower() if isinstance(value, bool) else str(value)


def forget_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """What was found to agree must not be acted on a second time, by Accelerate."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        environment.pop(name, None)
