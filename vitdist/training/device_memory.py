"""Running out of a device's memory: seeing it, making room, and not leaving the other ranks waiting."""

from __future__ import annotations

import torch

from vitdist.training.job import Job

_WORDS = ("can't allocate memory", "not enough memory")  # torch's allocator on the CPU raises a plain RuntimeError


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def free(job: Job) -> None:
    """Give back what the allocator keeps, so that the next try finds one piece."""
    if job.engine.device.type == "cuda":
        torch.cuda.empty_cache()


def stand_in(job: Job) -> None:
    """Take part in the reduction with a gradient that is no number, in next to no memory. Collective."""
    free(job)
    side = job.preprocessing.image_size
    images = torch.zeros(2, 3, side, side, device=job.engine.device)
    buffers = {name: buffer.clone() for name, buffer in job.model.named_buffers()}
    with job.joined.accumulate(last=True):
        job.joined.backward(sum(logits.sum() for logits in job.joined(images)) * float("nan"))
    with torch.no_grad():
        for name, buffer in job.model.named_buffers():
            buffer.copy_(buffers[name])
