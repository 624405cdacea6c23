"""What is averaged: operands, and lanes of operands that are coded as one vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.distributed.coding import Coder
from gradcodec.distributed.shards import ALIGN, Ranges


@dataclass
class Operand:
    """One flat tensor that is averaged over the ranks.

    Attributes:
        values: ``[n]``, contiguous; of any floating dtype.
        coder: turns its shards into bytes.
        out: ``[n]`` where the mean goes; may be ``values`` itself.
        seed: of stochastic rounding; equal on all ranks.
        first_owner: rank that owns the first shard.
        first: residuals of the values, fp32 ``[coder.residual_numel(shard)]`` for each shard in
            order, or ``None``. ``side_by_side`` replaces elements of the list.
        second: a list of one element, the residual of the mean of this rank's shard, or ``None``.
        note_loss: also keep what the coding lost: of the values in ``lost_first`` ``[n]``, of the
            mean of this rank's shard in ``lost_second`` ``[n]`` (zero elsewhere).
    """

    values: Tensor
    coder: Coder
    out: Tensor
    seed: int = 0
    first_owner: int = 0
    first: list[Tensor] | None = None
    second: list[Tensor] | None = None
    note_loss: bool = False
    lost_first: Tensor | None = field(default=None, init=False)
    lost_second: Tensor | None = field(default=None, init=False)

    @property
    def shares_lane(self) -> bool:
        """Whether coding it in one call with other operands gives the same code."""
        grain = self.coder.grain
        return grain is not None and ALIGN % grain == 0 and self.values.numel() % grain == 0


class Lane:
    """Operands with one coder, coded by one call for each owner instead of one for each operand.

    That changes no code: operands that share a lane consist of whole blocks (``Coder.grain``).
    Every other operand has its own lane.

    Args:
        operands: one, or several that may share a lane.
        ranges: the shards of each operand, starting with the shard of its first owner.
    """

    def __init__(self, operands: Sequence[Operand], ranges: Sequence[Ranges]) -> None:
        self.operands, self.ranges = operands, ranges
        first = operands[0]
        self.coder, self.seed, self.note_loss = first.coder, first.seed, first.note_loss
        self.device = first.values.device

    def shards(self, owner: int) -> list[tuple[Operand, int, int]]:
        """The operands' ranges that belong to a rank, as operand, start, stop; no empty ones."""
        found = []
        for operand, ranges in zip(self.operands, self.ranges, strict=True):
            start, stop = ranges[(owner - operand.first_owner) % len(ranges)]
            if start < stop:
                found.append((operand, start, stop))
        return found

    def numel(self, owner: int) -> int:
        """Number of values that belong to the rank."""
        return sum(stop - start for _, start, stop in self.shards(owner))

    def nbytes(self, owner: int) -> int:
        """Bytes of their code."""
        return self.coder.nbytes(self.numel(owner))

    def values(self, owner: int) -> Tensor:
        """The values that belong to the rank; a view if only one operand has some."""
        found = [operand.values[start:stop] for operand, start, stop in self.shards(owner)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def write(self, owner: int, mean: Tensor, coder: Coder) -> None:
        """Write the mean of the rank's shards, decoded by ``coder``, to the operands' ``out``."""
        shards = self.shards(owner)
        split = torch.split(mean, [stop - start for _, start, stop in shards])
        for (operand, start, stop), some in zip(shards, split, strict=True):
            operand.out[start:stop] = coder.narrow(some, operand.out.dtype)

    @cached_property
    def _unused(self) -> list[bool]:
        """Which operands have no gradient."""
        return all_zero([operand.values for operand in self.operands])

    @contextmanager
    def first_residual(self, owner: int) -> Iterator[Tensor | None]:
        """Residual of this rank's values in the owner's shards, for use in the block.

        An operand without a gradient (a parameter unused in this step, a rank that has joined)
        sends zeros, and its residual is kept for later: else a rank that has no more data would
        still change the model.
        """
        if self.operands[0].first is None:
            yield None
            return
        lists, at = [], []
        for operand, ranges in zip(self.operands, self.ranges, strict=True):
            assert operand.first is not None
            lists.append(operand.first)
            at.append((owner - operand.first_owner) % len(ranges))
        whole = side_by_side(lists, at)
        with held_back([r[i] for r, i in zip(lists, at, strict=True)], self._unused):
            yield whole

    @contextmanager
    def second_residual(self, owner: int, mean: Tensor) -> Iterator[Tensor | None]:
        """Residual of this rank's mean, for use in the block; kept for later where that is zero."""
        shards = self.shards(owner)
        if self.operands[0].second is None:
            yield None
            return
        lists = [operand.second for operand, _, _ in shards if operand.second is not None]
        split = torch.split(mean, [stop - start for _, start, stop in shards])
        whole = side_by_side(lists, [0] * len(lists))
        with held_back([r[0] for r in lists], all_zero(split)):
            yield whole

    def keep_first_loss(self, owner: int, body: Tensor | None) -> None:
        """Note what coding lost of an owner's values; zeros if the coder refused them."""
        for operand in self.operands:
            if operand.lost_first is None:
                operand.lost_first = torch.zeros_like(operand.values, dtype=torch.float32)
        if body is None:
            return
        shards = self.shards(owner)
        sent = self.coder.mean([body], self.numel(owner))
        split = torch.split(sent, [stop - start for _, start, stop in shards])
        for (operand, start, stop), some in zip(shards, split, strict=True):
            assert operand.lost_first is not None
            torch.sub(operand.values[start:stop], some, out=operand.lost_first[start:stop])

    def keep_second_loss(self, owner: int, mean: Tensor, body: Tensor | None) -> None:
        """Note what coding lost of this rank's mean; zeros if the coder refused it."""
        for operand in self.operands:
            operand.lost_second = torch.zeros_like(operand.values, dtype=torch.float32)
        if body is None:
            return
        shards = self.shards(owner)
        lost = mean - self.coder.mean([body], mean.numel())
        split = torch.split(lost, [stop - start for _, start, stop in shards])
        for (operand, start, stop), some in zip(shards, split, strict=True):
            assert operand.lost_second is not None
            operand.lost_second[start:stop] = some


def lanes_of(operands: Sequence[Operand], ranges: Sequence[Ranges]) -> list[Lane]:
    """Group the operands into lanes, by the operands alone and hence equally on all ranks."""
    found: dict[object, list[int]] = {}
    for k, one in enumerate(operands):
        kind = (one.coder.identity, one.values.dtype, one.note_loss, one.first is None)
        found.setdefault(kind if one.shares_lane else k, []).append(k)
    return [Lane([operands[k] for k in some], [ranges[k] for k in some]) for some in found.values()]


def side_by_side(lists: Sequence[list[Tensor]], at: Sequence[int]) -> Tensor:
    """Join the tensors ``lists[k][at[k]]`` to one vector, and replace each by its view of it.

    Nothing is copied if the same tensors were joined in the same order before: residuals of
    parameters that share a lane lie side by side from the lane's second step on.
    """
    parts = [those[i] for those, i in zip(lists, at, strict=True)]
    if len(parts) == 1:
        return parts[0]
    first, end = parts[0], parts[0].storage_offset()
    beside = True
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        beside = beside and same and part.storage_offset() == end
        end += part.numel()
    total = sum(part.numel() for part in parts)
    if beside:
        return first.as_strided((total,), (1,))
    moved = torch.cat(parts)
    views = torch.split(moved, [part.numel() for part in parts])
    for those, i, view in zip(lists, at, views, strict=True):
        those[i] = view
    return moved


@contextmanager
def held_back(residuals: Sequence[Tensor], unused: Sequence[bool]) -> Iterator[None]:
    """Zero the residuals of unused operands in the block, and restore them after it."""
    kept = [(one, one.clone()) for one, waits in zip(residuals, unused, strict=True) if waits]
    for one, _ in kept:
        one.zero_()
    try:
        yield
    finally:
        for one, before in kept:
            one.copy_(before)


def all_zero(vectors: Sequence[Tensor]) -> list[bool]:
    """Which vectors hold nothing but zeros.

    The first 64 values of all vectors are tested together, since on a GPU every test waits for the
    stream. Only vectors that begin with zeros are then tested as a whole.
    """
    heads = torch.stack([x[:64].any() for x in vectors]).tolist()
    return [not (head or bool(x.any())) for head, x in zip(heads, vectors, strict=True)]


def has_any(x: Tensor) -> bool:
    """Whether any element is not zero."""
    return not all_zero([x])[0]
