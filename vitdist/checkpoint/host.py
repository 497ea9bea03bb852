"""Host memory for what is saved, used again for each save: new pages cost the steps four times what the copy costs."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 64
SLACK = 1 << 20  # what alignment and step counters may add


class HostMemory:
    """One block; pinned where tensors come from a GPU, so that they arrive at the full speed of the bus.

    What `copies` returns stays as it is until the next call: whatever reads it must be done by then.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._block = torch.empty(0, dtype=torch.uint8)
        self._reserving: threading.Thread | None = None

    def reserve(self, num_bytes: int) -> None:
        """Take so much from the system, in a thread: when the first save comes, the pages are there."""
        arguments = (num_bytes + SLACK,)
        self._reserving = threading.Thread(target=self._try_to_take, args=arguments, name="host-memory", daemon=True)
        self._reserving.start()

    def _try_to_take(self, num_bytes: int) -> None:
        with contextlib.suppress(OSError, MemoryError):  # the save itself asks again, and says so
            self._take(num_bytes)

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor in a place of its own. Returns when all have arrived."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        offsets, needed = _places(tensors)
        if needed > self._block.numel():
            self._take(needed)
        copies = {name: _place(self._block, offsets[name], tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _take(self, num_bytes: int) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)  # the old one goes first
        if self._pinned:
            try:
                self._block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
                return
            except RuntimeError:  # more than the system lets us pin; copies are slower then, no more
                self._pinned = False
        self._block = _pages(num_bytes)


def _pages(num_bytes: int) -> Tensor:
    """Memory of this process alone.

    Pages that loader workers inherit are copied when we write to them next: after each start of workers the first save
    took 3.9 s instead of 0.1 s for 1.5 GB.
    """
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for name in ("MADV_DONTFORK", "MADV_HUGEPAGE"):  # Linux
        if hasattr(mmap, name):
            with contextlib.suppress(OSError):
                block.madvise(getattr(mmap, name))
    return torch.frombuffer(block, dtype=torch.uint8).zero_()


def _places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """(where each tensor starts, bytes in all)."""
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _place(block: Tensor, offset: int, tensor: Tensor) -> Tensor:
    num_bytes = tensor.numel() * tensor.element_size()
    return block[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape)
