"""What a launcher's environment states, held against the recipe, which is the only source of a run (P10)."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vitdist.errors import UsageError

# `accelerate launch` always exports these, asked or not: then they are its defaults and no statement
DEFAULTS = {
    "ACCELERATE_MIXED_PRECISION": ("no", ""),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "NO", ""),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", ""),
    "ACCELERATE_USE_DEEPSPEED": ("false", "False", "0", ""),
    "ACCELERATE_USE_FSDP": ("false", "False", "0", ""),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "False", "0", ""),
}


def check_launcher(precision: str, *, compile_model: bool, environment: Mapping[str, str] = os.environ) -> None:
    """UsageError naming the variable and the recipe's key when a launcher contradicts the recipe."""
    compiled = {"inductor", "INDUCTOR"} if compile_model else set()
    says = {
        "ACCELERATE_MIXED_PRECISION": ("train.precision", precision, {precision}),
        "ACCELERATE_DYNAMO_BACKEND": ("train.compile", str(compile_model).lower(), compiled),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("train.micro_batch_size", "what follows from it", set()),
        "ACCELERATE_USE_DEEPSPEED": ("parallel.strategy", "ddp", set()),
        "ACCELERATE_USE_FSDP": ("parallel.strategy", "ddp", set()),
        "ACCELERATE_USE_MEGATRON_LM": ("parallel.strategy", "ddp", set()),
    }  # fmt: skip
    for name, (key, ours, agreeing) in says.items():
        value = environment.get(name, "")
        if value not in DEFAULTS[name] and value not in agreeing:
            raise UsageError(
                f"the launcher says {name}={value} (a flag or Accelerate's config file), "
                f"the recipe says {key}: {ours}; the recipe decides: drop the flag, or set {key}"
            )
