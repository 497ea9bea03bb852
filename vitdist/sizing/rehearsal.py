"""A training step without memory: the recipe's own model on fake tensors, which have shapes and types and no bytes.

What autograd keeps, and what forward and backward need beside it, is counted operation by operation, so gradient
checkpointing, bf16 and every backbone are counted as they are. The kernels are those of the CPU; a GPU's fused
attention keeps the same tensors, but its libraries take work space of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vitdist.data.pixels.mixing import ToModelInput
from vitdist.losses import hierarchical_loss
from vitdist.models.classifier import Classifier
from vitdist.recipe.schema import Recipe
from vitdist.sizing.live import LiveBytes
from vitdist.taxonomy import Taxonomy
from vitdist.training.assemble import build_model, image_size

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Working:
    """Bytes of one micro-batch: `activations` wait for the backward, `peak` is the most at once, inputs included.

    Gradients are let go as they are finished, and so are in neither.
    """

    inputs: int
    activations: int
    peak: int
    evaluation: int = 0  # the most at once in a forward of one evaluation batch


def skeleton(recipe: Recipe, tree: Taxonomy) -> Classifier:
    """The recipe's model on torch's meta device: shapes and names, no weights."""
    with torch.device("meta"):
        return build_model(recipe, tree, weights="none")


class Rehearsal:
    """Steps of a recipe's model at any micro-batch."""

    def __init__(self, recipe: Recipe, tree: Taxonomy) -> None:
        self._evaluation_batch = recipe.evaluation.batch_size
        self._size, self._bf16 = image_size(recipe), recipe.train.precision != "fp32"
        self._num_levels = tree.num_levels
        self._mode = FakeTensorMode()
        self._model, self._to_input = skeleton(recipe, tree).train(), ToModelInput(HALF, HALF)
        with self._mode:
            for module in (self._model, self._to_input):
                module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        self._done: dict[int, Working] = {}

    def step(self, micro_batch_size: int) -> Working:
        """Forward and backward of one micro-batch."""
        if micro_batch_size not in self._done:
            with self._mode:
                images = torch.empty(micro_batch_size, self._size, self._size, 3, dtype=torch.uint8)
                targets = torch.empty(micro_batch_size, self._num_levels, dtype=torch.int64)
                found = rehearse(self._model, self._to_input, images, targets, bf16=self._bf16)
            self._done[micro_batch_size] = replace(found, evaluation=self._evaluation)
        return self._done[micro_batch_size]

    @cached_property
    def _evaluation(self) -> int:
        with self._mode:
            images = torch.empty(self._evaluation_batch, self._size, self._size, 3, dtype=torch.uint8)
            known = [*self._model.parameters(), *self._model.buffers(), *self._to_input.buffers(), images]
            self._model.eval()
            with torch.no_grad(), LiveBytes(known) as live, torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                self._model(self._to_input(images))
            self._model.train()
        return images.nbytes + live.peak


def rehearse(model: Classifier, to_input: ToModelInput, images: Tensor, targets: Tensor, *, bf16: bool) -> Working:
    """One forward, loss and backward, counted: images uint8 [B, S, S, 3], targets int64 [B, L], real or fake."""
    inputs = images.nbytes + targets.nbytes
    known = [*model.parameters(), *model.buffers(), *to_input.buffers(), images, targets]
    handles = [
        parameter.register_post_accumulate_grad_hook(_let_go) for parameter in model.parameters()
        if parameter.requires_grad
    ]  # fmt: skip
    try:
        with LiveBytes(known) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(to_input(images))
            loss = hierarchical_loss(logits, targets, denominators=[float(len(images))] * targets.shape[1])
            del logits
            activations = live.now
            loss.backward()
        return Working(inputs, activations, inputs + live.peak)
    finally:
        for handle in handles:
            handle.remove()


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
