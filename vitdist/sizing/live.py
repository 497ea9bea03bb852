"""Bytes of tensors that are alive at once, counted storage by storage while operations run; fake tensors count too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block, `now` is what the block's operations have made and not yet let go, `peak` the most so far.

    `known` tensors, and views of them, are not counted. A view shares its tensor's storage and costs nothing.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = [tensor.untyped_storage() for tensor in known]
        self._sizes.update((storage._cdata, 0) for storage in self._known)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity in self._sizes:
            return
        self._sizes[identity] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, identity)

    def _let_go(self, identity: int) -> None:
        self.now -= self._sizes.pop(identity, 0)
