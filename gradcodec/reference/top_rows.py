"""The largest one or two of every 64 neighbours: top-k without a search."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference.encode import SEGMENT

ROW = 64


def top_rows(
    values: Tensor, *, k: int = 1, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` (1 or 2) largest of ``|y|``, ``y = x + e``, of every 64 values, largest first.

    The position replaces a magnitude's low 6 bits, so that one integer maximum finds both:
    magnitudes within ``2**-17`` of each other count as equal, and the lower position wins.

    Returns:
        kept ``[rows, k]`` in the dtype of ``values``, all bits, and positions uint8 ``[rows, k]``.
        The last row is padded with zeros. The residual ``[n]`` becomes ``y`` without what was kept.
    """
    n = values.numel()
    count = -(-n // ROW)
    kept = torch.empty(count, k, dtype=values.dtype, device=values.device)
    index = torch.empty(count, k, dtype=torch.uint8, device=values.device)
    step = SEGMENT // ROW
    for first in range(0, count, step):
        rows = torch.zeros(min(step, count - first), ROW, device=values.device)
        part = values[first * ROW :][: rows.numel()]
        flat = rows.view(-1)[: part.numel()]
        flat.copy_(part)
        if residual is not None:
            its = residual[first * ROW :][: part.numel()]
            flat += its.float()
        bits = rows.view(torch.int32) & 0x7FFFFFC0
        keys = bits | torch.arange(ROW - 1, -1, -1, dtype=torch.int32, device=rows.device)
        where = keys.topk(k, dim=1).indices
        index[first : first + len(rows)] = where.to(torch.uint8)
        kept[first : first + len(rows)] = rows.gather(1, where).to(values.dtype)
        if residual is not None:
            its.copy_(rows.scatter_(1, where, 0.0).view(-1)[: part.numel()])
    return kept, index
