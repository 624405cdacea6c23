"""Largest magnitude of every block, for scales that ranks are to share."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference.encode import _rows, padded_numel, segment_of
from gradcodec.reference.hadamard import CHUNK


def chunk_absmax(
    values: Tensor,
    *,
    block: int = CHUNK,
    rotate: bool = False,
    residual: Tensor | None = None,
    rotation_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """fp32 ``[blocks]``: ``max |y|`` of what ``encode`` would quantise, ``y = R x + e``.

    Arguments as in ``encode``; the residual is read only. The maximum over ranks of these, divided
    by ``grid.TOP[bits]`` and rounded to bf16, are scales for ``encode(scales=)``.
    """
    total = padded_numel(values.numel(), rotate)
    segment = segment_of(block)
    parts = []
    for start in range(0, total, segment):
        count = min(segment, total - start)
        rows, _ = _rows(values[start : start + count], count, block, rotate, rotation_dtype)
        if residual is not None:
            rows.view(-1)[:count] += residual[start : start + count].float()
        parts.append(rows.abs().amax(1))
    return torch.cat(parts) if parts else torch.empty(0, device=values.device)
