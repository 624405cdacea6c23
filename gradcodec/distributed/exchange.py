"""The two-shot mean: parts to their owners, the owners' means to everyone.

    1. every rank codes each part of each piece and sends it to the part's owner
    2. the owner decodes the W parts, adds them in rank order in fp32 and divides
    3. the owner codes the mean and sends it to everyone
    4. every rank decodes the same bytes, the owner its own as well

so that all replicas hold equal bits. Steps 1 and 3 are one uneven all-to-all each, whatever the
number of pieces. Every piece is coded by itself, hence nothing depends on which pieces share a
message.

A message is ``tag (4) | flags | bodies``, each rounded up to 8 bytes. The tag is a checksum of what
the sender believes is exchanged; flags mark parts that the codec refused because of NaN or Inf. If
any rank flagged any part (all see all flags) one more swap of the same kind sends those parts as
they are, fp32; their residuals stay as they were.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcodec.distributed.coders import Coder, RawCoder
from gradcodec.distributed.link import Link
from gradcodec.distributed.parts import cut, derive_seed
from gradcodec.errors import MalformedBodyError, NonFiniteError

_RAW = RawCoder(torch.float32)


@dataclass
class Piece:
    """One flat tensor to be averaged.

    Attributes:
        values: ``[n]``, contiguous; of any floating dtype.
        coder: turns its parts into bytes.
        out: ``[n]`` where the mean goes; may be ``values`` itself.
        seed: of stochastic rounding; equal on all ranks.
        turn: rank that owns the first part.
        first: residual of the values, ``[coder.residual_numel(n)]`` fp32, or ``None``.
        second: residual of the mean of the own part, or ``None``.
        echo: also note what the coding lost, in ``lost_first`` ``[n]`` (of the values) and
            ``lost_second`` ``[n]`` (of the own part of the mean, zero elsewhere).
    """

    values: Tensor
    coder: Coder
    out: Tensor
    seed: int = 0
    turn: int = 0
    first: Tensor | None = None
    second: Tensor | None = None
    echo: bool = False
    lost_first: Tensor | None = field(default=None, init=False)
    lost_second: Tensor | None = field(default=None, init=False)


def mean_of(pieces: list[Piece], link: Link, *, context: int = 0) -> None:
    """Average every piece over the ranks of the link, into its ``out``.

    All ranks call this with pieces of equal lengths and coders in equal order. A world of one
    exchanges nothing and loses nothing.

    Args:
        pieces: what to average.
        link: with whom.
        context: a number that must be equal on all ranks, for example the step; it is compared.

    Raises:
        TrainingError: a rank is gone.
        MalformedBodyError: another rank exchanges something else.
    """
    if link.size == 1:
        for piece in pieces:
            if piece.out is not piece.values:
                piece.out.copy_(piece.values)
        return
    shots = TwoShot(pieces, link, context)
    shots.spread(shots.reduce())


class TwoShot:
    """The two halves of ``mean_of``; each alone is a reduce-scatter or an all-gather.

    Args:
        pieces: what to average.
        link: with whom, more than one rank.
        context: compared between ranks.
        cuts: the ranges of each piece, by default those of ``parts.cut``.
    """

    def __init__(
        self,
        pieces: list[Piece],
        link: Link,
        context: int = 0,
        cuts: list[list[tuple[int, int]]] | None = None,
    ) -> None:
        self.pieces, self.link = pieces, link
        self.cuts = cuts or [cut(p.values.numel(), link.size, p.coder.align) for p in pieces]
        plan = [(p.values.numel(), p.coder.identity, p.turn) for p in pieces]
        self.tag = zlib.crc32(repr((context, plan)).encode())

    def part(self, k: int, owner: int) -> tuple[int, int]:
        """Range of piece ``k`` that belongs to a rank."""
        return self.cuts[k][(owner - self.pieces[k].turn) % self.link.size]

    # -- steps 1 and 2 --------------------------------------------------------------------

    def reduce(self) -> list[Tensor]:
        """The mean of the own part of every piece, fp32."""
        link, meter = self.link, self.link.meter
        flags = torch.zeros(len(self.pieces), link.size, dtype=torch.bool)
        with meter.phase("encode"):
            residuals = [self._first_residuals(k) for k in range(len(self.pieces))]
            bodies: list[list[Tensor]] = []
            for to in range(link.size):
                bodies.append([])
                for k, piece in enumerate(self.pieces):
                    start, stop = self.part(k, to)
                    if start == stop:
                        bodies[-1].append(self._blank(k, 0))
                        continue
                    seed = derive_seed(piece.seed, 1, link.rank, to)
                    body = _packed(piece.values[start:stop], piece, seed, residuals[k][to])
                    flags[k, to] = body is None
                    bodies[-1].append(self._blank(k, stop - start) if body is None else body)
                    if piece.echo:
                        self._note_lost(k, start, stop, body)
            messages = [message(self.tag, flags, some) for some in bodies]
        mine = [self.part(k, link.rank) for k in range(len(self.pieces))]
        sizes = [p.coder.nbytes(b - a) for p, (a, b) in zip(self.pieces, mine, strict=True)]
        came = link.swap(messages, [message_nbytes(flags.numel(), sizes)] * link.size)
        parcels = [opened(m, self.tag, flags.numel(), sizes) for m in came]
        their_flags = torch.stack([f.view(flags.shape) for f, _ in parcels])
        raw = self._swap_raw_parts(their_flags) if bool(their_flags.any()) else {}
        with meter.phase("decode"):
            return [
                self._mean_part(k, [parcel[k] for _, parcel in parcels], raw, their_flags)
                for k in range(len(self.pieces))
            ]

    def _first_residuals(self, k: int) -> list[Tensor | None]:
        """The slice of a piece's residual that belongs to each owner's part."""
        piece, world = self.pieces[k], self.link.size
        # No gradient (a parameter unused in this step, a rank that has joined): the residual waits,
        # or a rank that is done would go on training.
        if piece.first is None or not has_any(piece.values):
            return [None] * world
        sizes = [piece.coder.residual_numel(b - a) for a, b in self.cuts[k]]
        slices = torch.split(piece.first, sizes)
        return [slices[(to - piece.turn) % world] for to in range(world)]

    def _blank(self, k: int, numel: int) -> Tensor:
        """What stands in the place of a body that there is none of."""
        piece = self.pieces[k]
        return torch.zeros(piece.coder.nbytes(numel), dtype=torch.uint8, device=piece.values.device)

    def _note_lost(self, k: int, start: int, stop: int, body: Tensor | None) -> None:
        piece = self.pieces[k]
        if piece.lost_first is None:
            piece.lost_first = torch.zeros_like(piece.values, dtype=torch.float32)
        if body is not None:
            sent = piece.coder.mean([body], stop - start)
            torch.sub(piece.values[start:stop], sent, out=piece.lost_first[start:stop])

    def _note_lost_of_mean(self, k: int, mean: Tensor, body: Tensor | None) -> None:
        piece, (start, stop) = self.pieces[k], self.part(k, self.link.rank)
        piece.lost_second = torch.zeros_like(piece.values, dtype=torch.float32)
        if body is not None:
            sent = piece.coder.mean([body], mean.numel())
            torch.sub(mean, sent, out=piece.lost_second[start:stop])

    def _swap_raw_parts(self, flags: Tensor) -> dict[tuple[int, int], Tensor]:
        """The own parts of flagged pieces by (piece, source): flags ``[source, piece, owner]``."""
        link = self.link
        outgoing = []
        for to in range(link.size):
            flagged = [k for k, f in enumerate(flags[link.rank, :, to].tolist()) if f]
            outgoing.append(self._raw([self._values_part(k, to) for k in flagged]))
        incoming = [
            {k: self.part(k, link.rank) for k, f in enumerate(row[:, link.rank].tolist()) if f}
            for row in flags
        ]
        sizes = [sum(4 * (b - a) for a, b in those.values()) for those in incoming]
        found = {}
        for source, (body, those) in enumerate(
            zip(link.swap(outgoing, sizes), incoming, strict=True)
        ):
            lengths = [4 * (b - a) for a, b in those.values()]
            for k, piece in zip(those, torch.split(body, lengths), strict=True):
                found[k, source] = piece
        return found

    def _values_part(self, k: int, owner: int) -> Tensor:
        start, stop = self.part(k, owner)
        return self.pieces[k].values[start:stop]

    def _raw(self, parts: list[Tensor]) -> list[Tensor]:
        device = self.pieces[0].values.device
        none = torch.empty(0, dtype=torch.uint8, device=device)
        return [none, *(_RAW.pack(p, 0, None) for p in parts)]

    def _mean_part(
        self, k: int, bodies: list[Tensor], raw: dict[tuple[int, int], Tensor], flags: Tensor
    ) -> Tensor:
        coder = self.pieces[k].coder
        start, stop = self.part(k, self.link.rank)
        numel = stop - start
        if not numel:
            return torch.zeros(0, device=self.pieces[k].values.device)
        if not bool(flags[:, k, self.link.rank].any()):
            return coder.mean(bodies, numel)
        total = torch.zeros(numel, device=self.pieces[k].values.device)
        for source, body in enumerate(bodies):
            whole = raw.get((k, source))
            one = coder.mean([body], numel) if whole is None else _RAW.mean([whole], numel)
            total += one
        return total.div_(len(bodies))

    # -- steps 3 and 4 --------------------------------------------------------------------

    def spread(self, means: list[Tensor]) -> None:
        """Send the own means to everyone and write everyone's into ``out``."""
        link, meter = self.link, self.link.meter
        flags = torch.zeros(len(self.pieces), dtype=torch.bool)
        with meter.phase("encode"):
            bodies = []
            for k, (piece, mean) in enumerate(zip(self.pieces, means, strict=True)):
                if not mean.numel():
                    bodies.append(self._blank(k, 0))
                    continue
                residual = piece.second if has_any(mean) else None
                body = _packed(mean, piece, derive_seed(piece.seed, 2, link.rank), residual)
                flags[k] = body is None
                bodies.append(self._blank(k, mean.numel()) if body is None else body)
                if piece.echo:
                    self._note_lost_of_mean(k, mean, body)
            mine = message(self.tag, flags, bodies)
        sizes = [
            [
                p.coder.nbytes(b - a)
                for p, (a, b) in ((p, self.part(k, source)) for k, p in enumerate(self.pieces))
            ]
            for source in range(link.size)
        ]
        came = link.swap([mine] * link.size, [message_nbytes(flags.numel(), s) for s in sizes])
        parcels = [opened(m, self.tag, flags.numel(), s) for m, s in zip(came, sizes, strict=True)]
        their_flags = torch.stack([f for f, _ in parcels])
        raw = self._swap_raw_means(means, their_flags) if bool(their_flags.any()) else {}
        with meter.phase("decode"):
            for source, (_, parcel) in enumerate(parcels):
                for k, piece in enumerate(self.pieces):
                    start, stop = self.part(k, source)
                    if stop == start:
                        continue
                    whole = raw.get((k, source))
                    coder: Coder = piece.coder if whole is None else _RAW
                    body = parcel[k] if whole is None else whole
                    value = coder.mean([body], stop - start)
                    piece.out[start:stop] = coder.narrow(value, piece.out.dtype)

    def _swap_raw_means(self, means: list[Tensor], flags: Tensor) -> dict[tuple[int, int], Tensor]:
        """Flagged means by (piece, owner): flags ``[owner, piece]``."""
        link = self.link
        outgoing = self._raw([means[k] for k, f in enumerate(flags[link.rank].tolist()) if f])
        incoming = [
            {k: self.part(k, source) for k, f in enumerate(row.tolist()) if f}
            for source, row in enumerate(flags)
        ]
        lengths = [[4 * (b - a) for a, b in those.values()] for those in incoming]
        found = {}
        came = link.swap([outgoing] * link.size, [sum(n) for n in lengths])
        for source, body in enumerate(came):
            for k, part in zip(incoming[source], torch.split(body, lengths[source]), strict=True):
                found[k, source] = part
        return found


def _packed(x: Tensor, piece: Piece, seed: int, residual: Tensor | None) -> Tensor | None:
    """The body, or ``None`` where the coder refuses NaN and Inf."""
    try:
        return piece.coder.pack(x, seed, residual)
    except NonFiniteError:
        return None


def has_any(x: Tensor) -> bool:
    """Whether any element is not zero; looks at the first few before it looks at all."""
    return bool(x[:64].any()) or bool(x.any())


# -- messages ---------------------------------------------------------------------------------


def padded(nbytes: int) -> int:
    """Rounded up to 8, so that every body can be viewed as any dtype."""
    return -(-nbytes // 8) * 8


def message_nbytes(flags: int, sizes: list[int]) -> int:
    """Size of a message with so many flags and bodies of these sizes."""
    return padded(4 + -(-flags // 8)) + sum(padded(n) for n in sizes)


def message(tag: int, flags: Tensor, bodies: list[Tensor]) -> list[Tensor]:
    """``tag | flags | bodies`` as uint8 tensors, padding in between."""
    bits = sum(1 << i for i, f in enumerate(flags.reshape(-1).tolist()) if f)
    head = tag.to_bytes(4, "little") + bits.to_bytes(-(-flags.numel() // 8), "little")
    head = head.ljust(padded(len(head)), b"\0")
    device = bodies[0].device if bodies else torch.device("cpu")
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8).to(device)]
    for body in bodies:
        parts.append(body)
        rest = padded(body.numel()) - body.numel()
        if rest:
            parts.append(torch.zeros(rest, dtype=torch.uint8, device=device))
    return parts


def opened(received: Tensor, tag: int, flags: int, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Flags ``[flags]`` and bodies of a message.

    Raises:
        MalformedBodyError: another tag: the sender exchanges something else.
    """
    at = padded(4 + -(-flags // 8))
    head = received[:at].cpu().numpy().tobytes()
    theirs = int.from_bytes(head[:4], "little")
    if theirs != tag:
        raise MalformedBodyError(
            f"expected a message of exchange {tag:08x}, got {theirs:08x}: ranks differ in codec, "
            "rules, seed, step or parameters"
        )
    bits = int.from_bytes(head[4:], "little")
    found = torch.tensor([bool(bits >> i & 1) for i in range(flags)], dtype=torch.bool)
    bodies = []
    for size in sizes:
        bodies.append(received[at : at + size])
        at += padded(size)
    return found, bodies
