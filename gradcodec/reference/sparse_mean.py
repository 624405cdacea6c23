"""The mean of vectors of which only a few values of each chunk were kept."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference.hadamard import CHUNK


def sparse_mean(kept: Tensor, index: Tensor, numel: int, *, chunk: int = CHUNK) -> Tensor:
    """fp32 ``[numel]``: mean over ``W`` of values ``kept [W, chunks, k]`` at ``index``, else zero.

    ``index`` holds positions in a chunk (any integer dtype), unique within one list. Lists are
    added in their order, ``sum += value * (1/W)``, without atomics, so the bits are always equal.
    Positions beyond ``numel`` are dropped; they come from the padding of the last chunk.
    """
    world, chunks, _ = kept.shape
    out = torch.zeros(chunks * chunk, device=kept.device)
    starts = torch.arange(chunks, device=kept.device)[:, None] * chunk
    for values, where in zip(kept, index, strict=True):
        at = ((where.long() & 0xFFFF) + starts).reshape(-1)
        out[at] += values.float().reshape(-1) * (1.0 / world)
    return out[:numel]
