"""Between the two shots of an all-reduce: decode W payloads, mean, encode the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference.decode_mean import mean_rows
from gradcodec.reference.encode import encode, segment_of
from gradcodec.reference.hadamard import CHUNK


def reduce_requant(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    scale: str = "absmax",
    stochastic: bool = False,
    seed: int = 0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``encode(mean of W)`` in the domain of the codes, with nothing rotated back in between.

    ``packed`` is uint8 ``[W, bytes]``, ``scales`` bf16 ``[W, blocks]``, as ``encode`` made them;
    ``numel`` counts codes: whole chunks where values were rotated. The rest is as in ``encode``.
    """
    segment = segment_of(block)
    mean = torch.empty(numel, device=packed.device)
    for start in range(0, numel, segment):
        count = min(segment, numel - start)
        rows = mean_rows(packed, scales, start, count, bits, block)
        mean[start : start + count] = rows.view(-1)[:count]
    return encode(
        mean,
        bits=bits,
        block=block,
        scale=scale,
        stochastic=stochastic,
        seed=seed,
        residual=residual,
    )
