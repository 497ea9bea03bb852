"""Memory that snapshots are copied into: right to the bit, apart from what it copies, and the same for each save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitdist.checkpoint.host import HostMemory


def some() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    wide = torch.randn(33, 7, generator=draw)
    return {
        "weights": wide,
        "seen from the side": wide.T,  # not contiguous, and of the same memory
        "steps": torch.tensor(5.0),
        "half": wide.to(torch.bfloat16),
        "counts": torch.arange(11),
        "mask": wide > 0,
        "nothing": torch.empty(0, 3),
    }


@pytest.mark.parametrize("reserved", [0, 100, 1 << 20])
def test_copies_are_equal_and_go_into_a_file(reserved: int, tmp_path: Path) -> None:
    memory, tensors = HostMemory(), some()
    if reserved:
        memory.reserve(reserved)
    copies = memory.copies(tensors)
    save_file(copies, tmp_path / "all.safetensors")
    read = load_file(tmp_path / "all.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor) and torch.equal(read[name], tensor), name
        assert copies[name].dtype == tensor.dtype and copies[name].is_contiguous()


def test_the_steps_that_follow_change_nothing_in_a_copy() -> None:
    tensors = some()
    copies = HostMemory().copies(tensors)
    before = tensors["weights"].clone()
    tensors["weights"].mul_(2)
    assert torch.equal(copies["weights"], before)
    assert torch.equal(copies["seen from the side"], before.T)


def test_each_save_uses_the_same_memory() -> None:
    memory, tensors = HostMemory(), some()
    first = memory.copies(tensors)
    second = memory.copies(
        {name: tensor + 1 if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    )
    assert {name: copy.data_ptr() for name, copy in first.items()} == {n: c.data_ptr() for n, c in second.items()}
    larger = memory.copies({**tensors, "more": torch.ones(1_000_000)})
    assert torch.equal(larger["weights"], tensors["weights"]) and bool((larger["more"] == 1).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_where_nothing_can_be_pinned_it_goes_without() -> None:
    memory = HostMemory(pinned=True)
    memory.reserve(100)
    assert torch.equal(memory.copies(some())["counts"], torch.arange(11))
