"""The largest magnitudes of every chunk, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference.encode import SEGMENT
from gradcodec.reference.hadamard import CHUNK


def topk_encode(
    values: Tensor, *, k: int, chunk: int = CHUNK, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of ``|y|``, ``y = x + e``, of every chunk of values ``[n]``, by position.

    Ties go to the lower position. The last chunk is padded with zeros, which count as values: if it
    has fewer than ``k`` real values, some of the kept positions lie beyond ``n``.

    Returns:
        kept ``[chunks, k]`` in the dtype of ``values`` and positions in their chunk int16
        ``[chunks, k]``, increasing (read as uint16 if a chunk is longer than 32,768). The residual
        ``[n]`` becomes ``y`` without what was kept.
    """
    n = values.numel()
    chunks = -(-n // chunk)
    kept = torch.empty(chunks, k, dtype=values.dtype, device=values.device)
    index = torch.empty(chunks, k, dtype=torch.int16, device=values.device)
    step = max(1, SEGMENT // chunk)
    for first in range(0, chunks, step):
        rows = torch.zeros(min(step, chunks - first), chunk, device=values.device)
        part = values[first * chunk :][: rows.numel()]
        flat = rows.view(-1)[: part.numel()]
        flat.copy_(part)
        if residual is not None:
            its = residual[first * chunk :][: part.numel()]
            flat += its.float()
        where = _largest(rows, k)
        index[first : first + len(rows)] = where.to(torch.int16)
        kept[first : first + len(rows)] = rows.gather(1, where).to(values.dtype)
        if residual is not None:
            its.copy_(rows.scatter_(1, where, 0.0).view(-1)[: part.numel()])
    return kept, index


def _largest(rows: Tensor, k: int) -> Tensor:
    """Positions int64 ``[chunks, k]``, increasing, of the largest magnitudes."""
    # Magnitudes have the order of their bits, NaN above all; the position breaks ties, which
    # torch.topk alone leaves open.
    bits = rows.view(torch.int32) & 0x7FFFFFFF
    place = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
    keys = (bits.long() << 16) | place
    return keys.topk(k, dim=1).indices.sort(1).values
