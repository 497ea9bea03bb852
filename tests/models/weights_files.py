"""Where the real weights are, and files that only pretend to be weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

DINOV2S = Path(__file__).parents[3] / "shared/data/weights/vit_small_patch14_dinov2_saliency_fp16.safetensors"
needs_dinov2s = pytest.mark.skipif(not DINOV2S.is_file(), reason=f"the real DINOv2-S weights are not at {DINOV2S}")


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with a header of our making, and its length as we claim it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
