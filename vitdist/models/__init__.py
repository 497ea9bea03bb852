"""Models: backbones, heads, and the weights they start from. They know neither recipe, nor rank, nor device."""

from __future__ import annotations

from vitdist.models.backbone import Backbone, Tokens, ViTShape, build_backbone, freeze
from vitdist.models.classifier import Classifier
from vitdist.models.heads import Head, build_head
from vitdist.models.weights import WeightsRecord, load_backbone_weights, load_weights

__all__ = [
    "Backbone",
    "Classifier",
    "Head",
    "Tokens",
    "ViTShape",
    "WeightsRecord",
    "build_backbone",
    "build_head",
    "freeze",
    "load_backbone_weights",
    "load_weights",
]
