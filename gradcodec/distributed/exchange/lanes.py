"""What is averaged: pieces, and lanes of pieces that are coded as one vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.distributed.coding import Coder
from gradcodec.distributed.shards import ALIGN

Cut = list[tuple[int, int]]


@dataclass
class Piece:
    """One flat tensor to be averaged.

    Attributes:
        values: ``[n]``, contiguous; of any floating dtype.
        coder: turns its parts into bytes.
        out: ``[n]`` where the mean goes; may be ``values`` itself.
        seed: of stochastic rounding; equal on all ranks.
        turn: rank that owns the first part.
        first: residuals of the values, fp32 ``[coder.residual_numel(part)]`` for each part in the
            order of the cut, or ``None``. The list is written to, see ``together``.
        second: residual of the mean of the own part, the only element of its list, or ``None``.
        echo: also note what the coding lost, in ``lost_first`` ``[n]`` (of the values) and
            ``lost_second`` ``[n]`` (of the own part of the mean, zero elsewhere).
    """

    values: Tensor
    coder: Coder
    out: Tensor
    seed: int = 0
    turn: int = 0
    first: list[Tensor] | None = None
    second: list[Tensor] | None = None
    echo: bool = False
    lost_first: Tensor | None = field(default=None, init=False)
    lost_second: Tensor | None = field(default=None, init=False)

    @property
    def joins(self) -> bool:
        """Whether its codes are the same beside those of others."""
        grain = self.coder.grain
        return grain is not None and ALIGN % grain == 0 and self.values.numel() % grain == 0


class Lane:
    """Pieces with one coder, coded together: a call for all of them instead of one for each.

    That changes no code: pieces that join are of whole blocks (``Coder.grain``). Others have a lane
    of their own.

    Args:
        pieces: one, or several that join.
        cuts: the ranges of each, in the order of its owners' turn.
    """

    def __init__(self, pieces: Sequence[Piece], cuts: Sequence[Cut]) -> None:
        self.pieces, self.cuts = pieces, cuts
        self.coder, self.seed, self.echo = pieces[0].coder, pieces[0].seed, pieces[0].echo
        self.device = pieces[0].values.device

    def parts(self, owner: int) -> list[tuple[Piece, int, int]]:
        """Pieces and the ranges that belong to a rank, empty ones left out."""
        found = []
        for piece, cut in zip(self.pieces, self.cuts, strict=True):
            start, stop = cut[(owner - piece.turn) % len(cut)]
            if start < stop:
                found.append((piece, start, stop))
        return found

    def numel(self, owner: int) -> int:
        """Values of the rank's part."""
        return sum(stop - start for _, start, stop in self.parts(owner))

    def nbytes(self, owner: int) -> int:
        """Size of the rank's part as a body."""
        return self.coder.nbytes(self.numel(owner))

    def values(self, owner: int) -> Tensor:
        """The rank's part; a view if it is of one piece."""
        found = [piece.values[start:stop] for piece, start, stop in self.parts(owner)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def write(self, owner: int, mean: Tensor, coder: Coder) -> None:
        """Put the mean of the rank's part, as ``coder`` decoded it, where it goes."""
        parts = self.parts(owner)
        split = torch.split(mean, [stop - start for _, start, stop in parts])
        for (piece, start, stop), some in zip(parts, split, strict=True):
            piece.out[start:stop] = coder.narrow(some, piece.out.dtype)

    @cached_property
    def _idle(self) -> list[bool]:
        """Pieces without a gradient."""
        return all_zero([piece.values for piece in self.pieces])

    @contextmanager
    def first(self, owner: int) -> Iterator[Tensor | None]:
        """Residual of this rank's values in the owner's part, to be used in the block.

        A piece without a gradient (a parameter unused in this step, a rank that has joined) is
        zero there and gets its residual back: it waits, or a rank that is done would go on
        training.
        """
        if self.pieces[0].first is None:
            yield None
            return
        lists, at = [], []
        for piece, cut in zip(self.pieces, self.cuts, strict=True):
            assert piece.first is not None
            lists.append(piece.first)
            at.append((owner - piece.turn) % len(cut))
        whole = together(lists, at)
        with resting([r[i] for r, i in zip(lists, at, strict=True)], self._idle):
            yield whole

    @contextmanager
    def second(self, owner: int, mean: Tensor) -> Iterator[Tensor | None]:
        """Residual of the mean of the own part, to be used in the block; it waits likewise."""
        parts = self.parts(owner)
        if self.pieces[0].second is None:
            yield None
            return
        lists = [piece.second for piece, _, _ in parts if piece.second is not None]
        split = torch.split(mean, [stop - start for _, start, stop in parts])
        whole = together(lists, [0] * len(lists))
        with resting([r[0] for r in lists], all_zero(split)):
            yield whole

    def note_lost(self, owner: int, body: Tensor | None) -> None:
        """What coding lost of the values in a part; nothing if it was refused."""
        for piece in self.pieces:
            if piece.lost_first is None:
                piece.lost_first = torch.zeros_like(piece.values, dtype=torch.float32)
        if body is None:
            return
        parts = self.parts(owner)
        sent = self.coder.mean([body], self.numel(owner))
        split = torch.split(sent, [stop - start for _, start, stop in parts])
        for (piece, start, stop), some in zip(parts, split, strict=True):
            assert piece.lost_first is not None
            torch.sub(piece.values[start:stop], some, out=piece.lost_first[start:stop])

    def note_lost_of_mean(self, owner: int, mean: Tensor, body: Tensor | None) -> None:
        """What coding lost of the mean of the own part; nothing if it was refused."""
        for piece in self.pieces:
            piece.lost_second = torch.zeros_like(piece.values, dtype=torch.float32)
        if body is None:
            return
        parts = self.parts(owner)
        lost = mean - self.coder.mean([body], mean.numel())
        split = torch.split(lost, [stop - start for _, start, stop in parts])
        for (piece, start, stop), some in zip(parts, split, strict=True):
            assert piece.lost_second is not None
            piece.lost_second[start:stop] = some


def lanes(pieces: Sequence[Piece], cuts: Sequence[Cut]) -> list[Lane]:
    """Every piece in one lane; a function of the pieces alone, hence equal on all ranks."""
    together: dict[object, list[int]] = {}
    for k, piece in enumerate(pieces):
        kind = (piece.coder.identity, piece.values.dtype, piece.echo, piece.first is None)
        together.setdefault(kind if piece.joins else k, []).append(k)
    return [Lane([pieces[k] for k in some], [cuts[k] for k in some]) for some in together.values()]


def together(lists: Sequence[list[Tensor]], at: Sequence[int]) -> Tensor:
    """``lists[k][at[k]]`` as one vector, of which they are views afterwards.

    Nothing moves as long as the same ones are asked for in the same order: residuals of parameters
    that share a lane lie side by side from its second step on.
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
def resting(parts: Sequence[Tensor], idle: Sequence[bool]) -> Iterator[None]:
    """Idle parts are zero in the block, and afterwards what they were."""
    kept = [(part, part.clone()) for part, rests in zip(parts, idle, strict=True) if rests]
    for part, _ in kept:
        part.zero_()
    try:
        yield
    finally:
        for part, before in kept:
            part.copy_(before)


def all_zero(vectors: Sequence[Tensor]) -> list[bool]:
    """Which have no element but zeros: by their first few, and by all only where those are zero.

    One look for all heads together: on a GPU each one waits for the stream.
    """
    heads = torch.stack([x[:64].any() for x in vectors]).tolist()
    return [not (head or bool(x.any())) for head, x in zip(heads, vectors, strict=True)]


def has_any(x: Tensor) -> bool:
    """Whether any element is not zero."""
    return not all_zero([x])[0]
