"""DeepSpeed's settings, all of them from the recipe, and the package itself, imported when a recipe asks for it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from vitdist.errors import UsageError

if TYPE_CHECKING:
    from vitdist.runtime.engine import Engine

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_BUCKET = 50_000_000  # elements that travel at once
_SUB_GROUP = 100_000_000  # elements that ZeRO-3 updates at once


def settings(
    strategy: str, *, offload: bool, clip: float | None, micro_batch_size: int, accumulation: int, world: int, size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it from the recipe; `size` is the number of trained parameters."""
    bucket = 2 * (min(_BUCKET, size) // 2 + 1)
    zero: dict[str, Any] = {
        "stage": STAGES[strategy],
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket // 10,
        "stage3_param_persistence_threshold": 0,  # small parameters are divided like all others
        # by default up to 10^9 collected weights stay until the update, which is all of most models
        "stage3_max_reuse_distance": 0,
        "sub_group_size": _SUB_GROUP,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": world * micro_batch_size * accumulation,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip or 0.0,  # 0 is off; the argument of clip_grad_norm_ would be ignored
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # torch's fused ones
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def deepspeed_for(engine: Engine) -> Any:
    """The package, made ready: on this device, in the ranks' own process group, and quiet."""
    os.environ.setdefault("DS_ACCELERATOR", engine.device.type)
    # DeepSpeed takes it for the number of its device, which it is not where a job step shows each rank one GPU only
    os.environ["LOCAL_RANK"] = str(engine.ranks.local_rank if engine.device.index is None else engine.device.index)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        with quiet():
            import deepspeed
    except ImportError:
        raise UsageError(
            "parallel.strategy zero1 to zero3 needs DeepSpeed: pip install 'vitdist[deepspeed]', or use ddp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # importing it sets it anew
    warnings.filterwarnings("ignore", message=r".*torch\.distributed.* is deprecated", category=FutureWarning)
    # a C++ operator for inference, which every rank would compile at its first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        backend = "nccl" if engine.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
