"""The two-shot mean: parts to their owners, the owners' means to everyone.

    1. every rank codes each part of each piece and sends it to the part's owner
    2. the owner decodes the W parts, adds them in rank order in fp32 and divides
    3. the owner codes the mean and sends it to everyone
    4. every rank decodes the same bytes, the owner its own as well

so that all replicas hold equal bits. Steps 1 and 3 are one swap of messages each, whatever the
number of pieces. Pieces of one coder are coded in one go, as a lane, where that changes no code:
what becomes of a piece does not depend on which others share its message, as long as all are
finite.

A message is ``tag (4) | flags | bodies``, one body for each lane, each rounded up to 8 bytes. The
tag is a checksum of what the sender believes is exchanged, and in which shot; flags mark parts of
lanes that the codec refused because of NaN or Inf. If any rank flagged any part (all see all flags)
one more swap of the same kind sends those parts as they are, fp32; their residuals stay as they
were.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from gradcodec.distributed.coding import Coder, RawCoder
from gradcodec.distributed.exchange.lanes import Cut, Lane, Piece, lanes
from gradcodec.distributed.exchange.link import Link
from gradcodec.distributed.shards import cut, derive_seed
from gradcodec.errors import MalformedBodyError, NonFiniteError

_RAW = RawCoder(torch.float32)


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
        cuts: list[Cut] | None = None,
    ) -> None:
        self.link = link
        self.lanes = lanes(
            pieces, cuts or [cut(p.values.numel(), link.size, p.coder.align) for p in pieces]
        )
        plan = [(p.values.numel(), p.coder.identity, p.turn) for p in pieces]
        self.tags = [zlib.crc32(repr((context, plan, shot)).encode()) for shot in (1, 2)]

    # -- steps 1 and 2 --------------------------------------------------------------------

    def reduce(self) -> list[Tensor]:
        """The mean of the own part of every lane, fp32."""
        link, meter, lanes = self.link, self.link.meter, self.lanes
        flags = torch.zeros(len(lanes), link.size, dtype=torch.bool)
        with meter.phase("encode"):
            messages = []
            for to in range(link.size):
                bodies = []
                for k, lane in enumerate(lanes):
                    if not lane.numel(to):
                        bodies.append(_blank(lane, to))
                        continue
                    with lane.first(to) as residual:
                        seed = derive_seed(lane.seed, 1, link.rank, to)
                        body = _packed(lane.values(to), lane, seed, residual)
                    flags[k, to] = body is None
                    bodies.append(_blank(lane, to) if body is None else body)
                    if lane.echo:
                        lane.note_lost(to, body)
                messages.append(bodies)
            sent = [message(self.tags[0], flags, bodies) for bodies in messages]
        sizes = [lane.nbytes(link.rank) for lane in lanes]
        came = link.swap(sent, [message_nbytes(flags.numel(), sizes)] * link.size)
        parcels = [opened(m, self.tags[0], flags.numel(), sizes) for m in came]
        their_flags = torch.stack([f.view(flags.shape) for f, _ in parcels])
        raw = self._swap_raw_parts(their_flags) if bool(their_flags.any()) else {}
        with meter.phase("decode"):
            return [
                self._mean_part(k, [parcel[k] for _, parcel in parcels], raw, their_flags)
                for k in range(len(lanes))
            ]

    def _swap_raw_parts(self, flags: Tensor) -> dict[tuple[int, int], Tensor]:
        """The own parts of flagged lanes by (lane, source): flags ``[source, lane, owner]``."""
        link, lanes = self.link, self.lanes
        outgoing = []
        for to in range(link.size):
            flagged = [k for k, f in enumerate(flags[link.rank, :, to].tolist()) if f]
            outgoing.append(self._raw([lanes[k].values(to) for k in flagged]))
        mine = [4 * lane.numel(link.rank) for lane in lanes]
        incoming = [
            {k: mine[k] for k, f in enumerate(row[:, link.rank].tolist()) if f} for row in flags
        ]
        return _parted(link.swap(outgoing, [sum(some.values()) for some in incoming]), incoming)

    def _raw(self, parts: list[Tensor]) -> list[Tensor]:
        none = torch.empty(0, dtype=torch.uint8, device=self.lanes[0].device)
        return [none, *(_RAW.pack(p, 0, None) for p in parts)]

    def _mean_part(
        self, k: int, bodies: list[Tensor], raw: dict[tuple[int, int], Tensor], flags: Tensor
    ) -> Tensor:
        lane = self.lanes[k]
        coder, numel = lane.coder, lane.numel(self.link.rank)
        if not numel:
            return torch.zeros(0, device=lane.device)
        if not bool(flags[:, k, self.link.rank].any()):
            return coder.mean(bodies, numel)
        total = torch.zeros(numel, device=lane.device)
        for source, body in enumerate(bodies):
            whole = raw.get((k, source))
            one = coder.mean([body], numel) if whole is None else _RAW.mean([whole], numel)
            total += one
        return total.div_(len(bodies))

    # -- steps 3 and 4 --------------------------------------------------------------------

    def spread(self, means: list[Tensor]) -> None:
        """Send the own means, one for each lane, to everyone and write everyone's into ``out``."""
        link, meter, lanes = self.link, self.link.meter, self.lanes
        flags = torch.zeros(len(lanes), dtype=torch.bool)
        with meter.phase("encode"):
            bodies = []
            for k, (lane, mean) in enumerate(zip(lanes, means, strict=True)):
                if not mean.numel():
                    bodies.append(_blank(lane, link.rank))
                    continue
                with lane.second(link.rank, mean) as residual:
                    body = _packed(mean, lane, derive_seed(lane.seed, 2, link.rank), residual)
                flags[k] = body is None
                bodies.append(_blank(lane, link.rank) if body is None else body)
                if lane.echo:
                    lane.note_lost_of_mean(link.rank, mean, body)
            mine = message(self.tags[1], flags, bodies)
        sizes = [[lane.nbytes(source) for lane in lanes] for source in range(link.size)]
        came = link.swap([mine] * link.size, [message_nbytes(flags.numel(), s) for s in sizes])
        parcels = [
            opened(m, self.tags[1], flags.numel(), s) for m, s in zip(came, sizes, strict=True)
        ]
        their_flags = torch.stack([f for f, _ in parcels])
        raw = self._swap_raw_means(means, their_flags) if bool(their_flags.any()) else {}
        with meter.phase("decode"):
            for source, (_, parcel) in enumerate(parcels):
                for k, lane in enumerate(lanes):
                    numel = lane.numel(source)
                    if not numel:
                        continue
                    whole = raw.get((k, source))
                    coder: Coder = lane.coder if whole is None else _RAW
                    body = parcel[k] if whole is None else whole
                    lane.write(source, coder.mean([body], numel), coder)

    def _swap_raw_means(self, means: list[Tensor], flags: Tensor) -> dict[tuple[int, int], Tensor]:
        """Flagged means by (lane, owner): flags ``[owner, lane]``."""
        link, lanes = self.link, self.lanes
        outgoing = self._raw([means[k] for k, f in enumerate(flags[link.rank].tolist()) if f])
        incoming = [
            {k: 4 * lanes[k].numel(source) for k, f in enumerate(row.tolist()) if f}
            for source, row in enumerate(flags)
        ]
        came = link.swap([outgoing] * link.size, [sum(some.values()) for some in incoming])
        return _parted(came, incoming)


def _blank(lane: Lane, owner: int) -> Tensor:
    """What stands in the place of a body that there is none of."""
    return torch.zeros(lane.nbytes(owner), dtype=torch.uint8, device=lane.device)


def _parted(came: list[Tensor], sizes: list[dict[int, int]]) -> dict[tuple[int, int], Tensor]:
    """What came from each rank, cut to lanes: by (lane, source)."""
    found = {}
    for source, (body, some) in enumerate(zip(came, sizes, strict=True)):
        for k, part in zip(some, torch.split(body, list(some.values())), strict=True):
            found[k, source] = part
    return found


def _packed(x: Tensor, lane: Lane, seed: int, residual: Tensor | None) -> Tensor | None:
    """The body, or ``None`` where the coder refuses NaN and Inf."""
    try:
        return lane.coder.pack(x, seed, residual)
    except NonFiniteError:
        return None


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
        MalformedBodyError: another length or tag: the sender exchanges something else.
    """
    expected = message_nbytes(flags, sizes)
    if received.numel() != expected:
        raise MalformedBodyError(f"expected a message of {expected} bytes, got {received.numel()}")
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
