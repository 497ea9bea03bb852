"""A backbone and a head together: images to logits for each level of the class tree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitdist.models.backbone import Backbone
from vitdist.models.heads import Head


class Classifier(nn.Module):
    """Images [B, 3, S, S] to float32 logits [B, C_l] for each level, coarse to fine."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._channels_last = False

    def with_channels_last(self) -> Classifier:
        """Pictures, and kernels of convolutions, with the channels innermost in memory."""
        self._channels_last = True
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return tuple(logits.float() for logits in self.head(self.backbone(images)))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay for a reason other than being biases or vectors."""
        backbone = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return backbone | {f"head.{name}" for name in self.head.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """Layer number of each parameter: the backbone's own from the stem up, the head's one above its last."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.layer_ids().items()}
        top = max(layers.values()) + 1
        return layers | {f"head.{name}": top for name, _ in self.head.named_parameters()}
