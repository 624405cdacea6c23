"""Aggregates that a few bad clients cannot move far: trimmed mean and median, by coordinate.

    x_1 .. x_k, one coordinate --sort--> [ cut | mean of the rest | cut ]

Yin et al. 2018 (arXiv 1803.01498). If fewer clients are bad than are cut off at each end, every
coordinate of the result lies between values of honest clients. Each reply counts once: the number
of examples is the client's own claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gradcodec.federated.envelope import Reply
from gradcodec.federated.participants import ClientId
from gradcodec.federated.rounds import Aggregate, HeldRound, Values

BUDGET = 128 << 20
"""Most bytes of decoded coordinates that are sorted at a time."""


class RobustRound(HeldRound):
    """Aggregates replies block by block.

    Memory: the bytes of all replies (at most ``hold_bytes``), one decoded reply, and up to
    ``BUDGET`` bytes of the replies' values in a block of coordinates, three times that while they
    are sorted. Every block decodes every reply anew: ``4 k n / BUDGET`` times for ``k`` replies of
    ``n`` values, so once in most federations. Kept tensors, which are small, are stacked whole.

    Args:
        numel, kept, read, hold_bytes: as of ``HeldRound``.
        trim: share that is cut off at each end; ``None`` for the median.
    """

    def __init__(
        self,
        numel: int,
        kept: Mapping[str, Tensor],
        read: Callable[[Reply], Values],
        hold_bytes: int,
        trim: float | None,
    ) -> None:
        super().__init__(numel, kept, read, hold_bytes, equal=True)
        self._numel, self._before, self._trim = numel, kept, trim

    @torch.no_grad()
    def aggregate(self, without: frozenset[ClientId] = frozenset()) -> Aggregate:
        """The robust mean of all replies except those in ``without``."""
        replies = [one.reply for client, one in self._held.items() if client not in without]
        reads = [partial(self._update, reply) for reply in replies]
        update, kept = robust_update(reads, self._numel, self._trim), None
        if any(reply.values is not None for reply in replies):
            kept = self._robust_kept([self._read(reply)[1] for reply in replies])
        return Aggregate(update, kept)

    def _update(self, reply: Reply) -> Tensor:
        return self._read(reply)[0]

    def _robust_kept(self, came: list[Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
        """Kept tensors: floating ones likewise, integers and bools by their lower median."""
        out = {}
        for name, before in self._before.items():
            rows = [before if values is None else values[name] for values in came]
            stack = torch.stack([t.reshape(-1) for t in rows])
            if before.is_floating_point():
                # Only what was NaN or Inf before may be so (``check_kept``), and stays.
                finite = torch.nan_to_num(stack, 0.0, 0.0, 0.0)
                mean = robust_mean(finite, self._trim).to(before.dtype).view(before.shape)
                out[name] = torch.where(torch.isfinite(before), mean, before)
            else:
                middle = stack.to(torch.int64).sort(dim=0).values[(len(rows) - 1) // 2]
                out[name] = middle.to(before.dtype).view(before.shape)
        return out


def robust_update(reads: Sequence[Callable[[], Tensor]], numel: int, trim: float | None) -> Tensor:
    """``robust_mean`` of vectors, fp32 ``[n]``; each block of it reads all of them again."""
    width = max(1, BUDGET // (4 * max(1, len(reads))))
    update = torch.empty(numel)
    for start in range(0, max(1, numel), width):
        block = torch.empty(len(reads), min(width, numel - start))
        for row, read in zip(block, reads, strict=True):
            row.copy_(read()[start : start + width])
        update[start : start + width] = robust_mean(block, trim)
    return update


def robust_mean(values: Tensor, trim: float | None) -> Tensor:
    """Trimmed mean or median of ``[k, n]`` over ``k``, fp32 or wider ``[n]``.

    ``ceil(trim k)`` values are cut off at each end, but one or two always stay. Values are added
    in ascending order, so the order of clients does not matter, to the bit.

    Args:
        values: finite, ``[k, n]``, ``k >= 1``.
        trim: share cut off at each end; ``None`` for the median.
    """
    k = len(values)
    most = (k - 1) // 2
    # Rounded first: 0.1 * 30 is a little more than 3.
    cut = most if trim is None else min(most, math.ceil(round(trim * k, 9)))
    inner = values.sort(dim=0).values[cut : k - cut]
    return (
        inner.double().mean(dim=0).to(values.dtype if values.dtype.itemsize > 2 else torch.float32)
    )
