"""The one module that talks to Accelerate: devices, precision, DDP, and the collectives the rest is written in.

DeepSpeed is in runtime/zero.py; `Engine.join` chooses.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from vitdist.errors import ResourceError, UsageError
from vitdist.runtime import rng
from vitdist.runtime.joined import Joined
from vitdist.runtime.launcher import forget_launcher
from vitdist.runtime.ranks import Ranks, export
from vitdist.runtime.scaling import LossScale
from vitdist.runtime.zero import Sharded
from vitdist.runtime.zero_setup import settings

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")

log = logging.getLogger(__name__)


class Engine:
    """One process's view of all ranks. Every method marked collective must be called by every rank."""

    def __init__(
        self, ranks: Ranks, *, precision: str, timeout_seconds: float, deterministic: bool, tf32: bool = False
    ) -> None:
        """Collective: every rank calls this. UsageError when the launcher did not connect all ranks."""
        use_cpu = _wants_cpu()
        export(ranks)
        forget_launcher()
        if deterministic:
            _make_deterministic()
        self.ranks = ranks
        # Accelerate would choose a number of its own, and warn about it
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        self._accelerator = Accelerator(
            # given here, so that nothing is taken from the launcher; the recipe's precision is `autocast` below
            mixed_precision="no",
            cpu=use_cpu,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        if self._accelerator.num_processes != ranks.world:
            raise UsageError(
                f"{ranks.world} ranks were started but Accelerate joined {self._accelerator.num_processes}; "
                "on machines without a GPU set ACCELERATE_USE_CPU=true, and use --multi_gpu with accelerate launch"
            )
        self._dtype = DTYPES[precision]
        self._more_groups: list[dist.ProcessGroup] = []
        _check_precision(self.device, precision)
        _set_tf32(self.device, tf32, tell=ranks.is_main)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world(self) -> int:
        return self.ranks.world

    @property
    def is_main(self) -> bool:
        return self.ranks.is_main

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    # ---- the model

    def join(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        strategy: str,
        offload: bool,
        clip: float | None,
        micro_batch_size: int,
        accumulation: int,
    ) -> Joined:
        """The model on its device, joined to the other ranks' by rank 0's weights, with its optimizer. Collective."""
        scale = LossScale(self.device) if self._dtype is torch.float16 else None
        if strategy == "ddp":
            return Joined(self, model, optimizer, clip=clip, scale=scale)
        config = settings(
            strategy,
            offload=offload,
            clip=clip,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            world=self.world,
            size=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        )
        return Sharded(self, model, optimizer, clip=clip, scale=scale, config=config)

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model under DDP where there are several ranks. Collective."""
        prepared: nn.Module = self._accelerator.prepare_model(model.to(self.device))
        return prepared

    def forget(self) -> None:
        """Let go of what was replicated."""
        self._accelerator.free_memory()

    def warm_up(self, model: nn.Module, image_size: int) -> None:
        """A forward and backward under DDP whose gradients are thrown away. Collective.

        DDP rebuilds its buckets after a process's first iteration, so the first resumed step would sum gradients in
        another order than the uninterrupted run's (1.2e-7 at 3 and more ranks). After this call every step is alike.
        """
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        images = torch.zeros(2, 3, image_size, image_size, device=self.device)
        with rng.kept():
            with self.autocast():
                loss = sum(logits.sum() * 0.0 for logits in model(images))
            loss.backward()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])

    def local_gradients(self, model: nn.Module, *, local: bool) -> AbstractContextManager[None]:
        """Around a forward and backward under DDP: where `local`, gradients stay on their rank."""
        return self._accelerator.no_sync(model) if local else contextlib.nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the recipe, around forwards."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    # ---- collectives

    def sum_later(self, tensor: torch.Tensor) -> PendingSum:
        """Start summing a small tensor over all ranks, to be read later without stopping the device. Collective."""
        work = dist.all_reduce(tensor, async_op=True) if self.world > 1 else None
        return PendingSum(tensor, work)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks. Collective."""
        if self.world == 1:
            return array
        tensor = torch.from_numpy(array.copy()).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Arrays [n_rank, ...] of all ranks joined in the order of ranks; every rank gets the whole. Collective."""
        if self.world == 1:
            return array
        counts = np.zeros(self.world, dtype=np.int64)
        counts[self.rank] = len(array)
        counts = self.sum(counts)
        padded = np.zeros((int(counts.max()), *array.shape[1:]), dtype=array.dtype)
        padded[: len(array)] = array
        mine = torch.from_numpy(padded).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return np.concatenate([part.cpu().numpy()[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_json(self, value: Any) -> list[Any]:
        """One JSON value from each rank, in the order of ranks, on every rank. Collective."""
        text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        sizes = self.gather(np.array([len(text)], dtype=np.int64))
        ends = np.cumsum(sizes)
        joined = self.gather(text).tobytes()
        return [json.loads(joined[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    def tensors_from_main(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rank 0's tensors on every rank, in host memory; what the others give is not looked at. Collective."""
        names = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        found = {}
        for name, shape, dtype in self.from_main(names):
            tensor = tensors[name] if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
            found[name] = self._from_main(tensor)
        return found

    def _from_main(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world == 1:
            return tensor
        there = tensor.to(self.device).contiguous()
        dist.broadcast(there, 0)
        return there.cpu()

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank: one decides, all agree. Collective."""
        return self.gather_json(value if self.is_main else None)[0]

    def in_step(self, batches: Iterable[T]) -> Iterator[T | None]:
        """This rank's batches, then None for as long as any rank has more: for forwards that are collective."""
        mine = iter(batches)
        while True:
            batch = next(mine, None)
            if not self.sum(np.array([batch is not None], dtype=np.int64))[0]:
                return
            yield batch

    def barrier(self) -> None:
        """Collective."""
        if self.world > 1:
            self.sum(np.zeros(1))

    # ---- the end

    def set_timeout(self, seconds: float) -> None:
        """How long a collective waits for the other ranks from now on. Not collective."""
        for group in (None, *self._more_groups) if self.world > 1 else ():
            _set_timeout(timedelta(seconds=seconds), group)

    def also_times_out(self, group: dist.ProcessGroup) -> None:
        """A process group that somebody else made waits as long as the engine's own."""
        self._more_groups.append(group)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


class PendingSum:
    """A sum over ranks that is under way; `read` waits for it (normally one step later, when it is long done)."""

    def __init__(self, tensor: torch.Tensor, work: Any) -> None:
        self._work = work
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            if work is not None:
                work.wait()  # orders the copy after the reduction on the stream; the host does not wait
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        values: list[float] = self._tensor.tolist()
        return values


def set_threads(ranks: Ranks, number: int | None = None) -> int:
    """Set the number of CPU threads, which changes bits: `number`, else this rank's share of the cores it may use."""
    cores = len(os.sched_getaffinity(0))
    number = number or max(1, min(16, cores // ranks.local_world))
    torch.set_num_threads(number)
    return number


@contextlib.contextmanager
def evaluating(model: nn.Module, *, collective: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; training mode is put back.

    `collective`: the forward collects weights (ZeRO-3), which must not become inference tensors.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad() if collective else torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _wants_cpu() -> bool:
    """CPU when asked by ACCELERATE_USE_CPU or when there is no GPU; ResourceError when a job's GPUs are unseen."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return True
    if torch.cuda.is_available():
        return False
    if os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0") or os.environ.get("SLURM_STEP_GPUS"):
        raise ResourceError(
            "this allocation has GPUs but torch sees none (torch 2.14 wants driver 580 or newer; see nvidia-smi); "
            "set ACCELERATE_USE_CPU=true to train on the CPU on purpose"
        )
    return True


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Before torch 2.14 the same function had a private name."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


def _check_precision(device: torch.device, precision: str) -> None:
    """UsageError for a number format that the device has not."""
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UsageError(f"train.precision: {name} computes no bf16; use fp16 (its loss is scaled) or fp32")


def _set_tf32(device: torch.device, wanted: bool, *, tell: bool) -> None:
    """TF32 for fp32 products as the recipe says, convolutions included, which torch would let do it anyway."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted and not able and tell:
        log.warning("train.tf32: this device (%s) has none; products stay in full fp32", device.type)
    torch.backends.cuda.matmul.allow_tf32 = wanted and able
    torch.backends.cudnn.allow_tf32 = wanted and able
