"""The two-shot mean: shards to their owners, the owners' means to everyone.

    1. every rank codes each shard and sends it to the shard's owner
    2. the owner decodes the W codes, adds them in rank order in fp32 and divides by W
    3. the owner codes the mean and sends it to everyone
    4. every rank, the owner included, decodes the same bytes

All replicas then hold equal bits. A reduce-scatter is steps 1 and 2, an all-gather is steps 3 and
4. Each shot is one swap of messages, whatever the number of tensors. Where it changes no code,
tensors with one coder share a lane and are coded by one call (``lanes``).

A message is ``tag (4) | flags | bodies``, one body for each lane, each rounded up to 8 bytes. The
tag is a checksum of what the sender believes is exchanged, and in which shot. A flag marks a body
that the coder refused to make, because of NaN or Inf. All ranks see all flags. If any is set, one
more swap sends the flagged values as they are, in fp32; their residuals stay unchanged.

``gathered_mean`` is the one-shot form: whole codes to everyone, each rank averages by itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradcodec.distributed.coding import Coder, RawCoder
from gradcodec.distributed.exchange.lanes import Lane, Operand, lanes_of
from gradcodec.distributed.exchange.link import Link
from gradcodec.distributed.shards import Ranges, derive_seed, shard_ranges
from gradcodec.errors import MalformedBodyError, NonFiniteError

_RAW = RawCoder(torch.float32)

_Place = tuple[int, int]
"""A lane's number, and the rank that owns the shards in question."""

_Bodies = dict[_Place, Tensor | None]
"""What this rank has coded; ``None`` where the coder refused the values."""

_Came = list[list[tuple[Coder, Tensor]]]
"""For each rank, for each lane: the coder that decodes the bytes, and the bytes that came."""


def two_shot_mean(operands: list[Operand], link: Link, *, context: int = 0) -> None:
    """Average every operand over the ranks of the link, into its ``out``.

    All ranks call this with operands of equal lengths and coders in equal order. With one rank,
    nothing is exchanged and nothing is lost.

    Args:
        operands: what to average.
        link: to all ranks.
        context: a number that must be equal on all ranks, for example the step; it is compared.

    Raises:
        TrainingError: a rank is gone.
        MalformedBodyError: another rank exchanges something else.
    """
    if link.size == 1:
        for operand in operands:
            if operand.out is not operand.values:
                operand.out.copy_(operand.values)
        return
    lanes = lanes_of(
        operands, [shard_ranges(o.values.numel(), link.size, o.coder.align) for o in operands]
    )
    # 1. Code every shard, and send it to its owner.
    coded = _code_shards(lanes, link)
    came = _swap(coded, lanes, link, _tag(operands, context, 1), _to_owners, _values_of(lanes))
    # 2. As an owner, average what came, in rank order.
    means = _means_of(came, lanes, link)
    # 3. Code the means of own shards, and send them to everyone.
    coded = _code_means(means, lanes, link)
    came = _swap(coded, lanes, link, _tag(operands, context, 2), _from_owners, _means_by(means))
    # 4. Decode everyone's means.
    _write(came, lanes, link)


def gathered_mean(operands: list[Operand], link: Link, *, context: int = 0) -> None:
    """As ``two_shot_mean``, in one shot: everyone gets every rank's code and averages them alike.

    The mean is not coded, so nothing is lost after step 1; a rank sends its whole code ``W - 1``
    times instead of ``2 (W - 1) / W`` times. An operand has one first residual and no second.
    """
    if link.size == 1:
        return two_shot_mean(operands, link, context=context)
    lanes, me = lanes_of(operands, [[(0, o.values.numel())] for o in operands]), link.rank
    coded: _Bodies = {}
    with link.meter.phase("encode"):
        for k, lane in enumerate(lanes):
            if not lane.numel(me):
                coded[k, me] = _placeholder(lane, me)
                continue
            with lane.first_residual(me) as residual:
                coded[k, me] = _packed(
                    lane.values(me), lane, derive_seed(lane.seed, 1, me), residual
                )
    came = _swap(coded, lanes, link, _tag(operands, context, 3), _from_owners, _values_of(lanes))
    for lane, mean in zip(lanes, _means_of(came, lanes, link), strict=True):
        if mean.numel():
            lane.write(me, mean, lane.coder)


def mean_of_own_shard(operand: Operand, ranges: Ranges, link: Link, *, context: int) -> Tensor:
    """Steps 1 and 2: the mean of this rank's shard, fp32; shard ``r`` belongs to rank ``r``."""
    lanes = lanes_of([operand], [ranges])
    coded = _code_shards(lanes, link)
    came = _swap(coded, lanes, link, _tag([operand], context, 1), _to_owners, _values_of(lanes))
    return _means_of(came, lanes, link)[0]


def gather_shards(
    operand: Operand, ranges: Ranges, own: Tensor, link: Link, *, context: int
) -> None:
    """Steps 3 and 4: write every rank's ``own`` values to its shard of the operand's ``out``."""
    lanes, means = lanes_of([operand], [ranges]), [own]
    coded = _code_means(means, lanes, link)
    came = _swap(coded, lanes, link, _tag([operand], context, 2), _from_owners, _means_by(means))
    _write(came, lanes, link)


# -- the steps ------------------------------------------------------------------------------------


def _code_shards(lanes: list[Lane], link: Link) -> _Bodies:
    """Step 1: this rank's shards of every lane, for every owner."""
    coded: _Bodies = {}
    with link.meter.phase("encode"):
        for owner in range(link.size):
            for k, lane in enumerate(lanes):
                if not lane.numel(owner):
                    coded[k, owner] = _placeholder(lane, owner)
                    continue
                with lane.first_residual(owner) as residual:
                    seed = derive_seed(lane.seed, 1, link.rank, owner)
                    body = _packed(lane.values(owner), lane, seed, residual)
                coded[k, owner] = body
                if lane.note_loss:
                    lane.keep_first_loss(owner, body)
    return coded


def _means_of(came: _Came, lanes: list[Lane], link: Link) -> list[Tensor]:
    """Step 2: the mean of this rank's shards, for every lane, fp32."""
    with link.meter.phase("decode"):
        return [_mean(lane, [row[k] for row in came], link) for k, lane in enumerate(lanes)]


def _mean(lane: Lane, came: list[tuple[Coder, Tensor]], link: Link) -> Tensor:
    numel = lane.numel(link.rank)
    if not numel:
        return torch.zeros(0, device=lane.device)
    if all(coder is lane.coder for coder, _ in came):
        return lane.coder.mean([body for _, body in came], numel)
    total = torch.zeros(numel, device=lane.device)
    for coder, body in came:
        total += coder.mean([body], numel)
    return total.div_(len(came))


def _code_means(means: list[Tensor], lanes: list[Lane], link: Link) -> _Bodies:
    """Step 3: code this rank's means, one for each lane."""
    coded: _Bodies = {}
    with link.meter.phase("encode"):
        for k, (lane, mean) in enumerate(zip(lanes, means, strict=True)):
            if not mean.numel():
                coded[k, link.rank] = _placeholder(lane, link.rank)
                continue
            with lane.second_residual(link.rank, mean) as residual:
                body = _packed(mean, lane, derive_seed(lane.seed, 2, link.rank), residual)
            coded[k, link.rank] = body
            if lane.note_loss:
                lane.keep_second_loss(link.rank, mean, body)
    return coded


def _write(came: _Came, lanes: list[Lane], link: Link) -> None:
    """Step 4: decode everyone's means into ``out``."""
    with link.meter.phase("decode"):
        for owner, row in enumerate(came):
            for lane, (coder, body) in zip(lanes, row, strict=True):
                if numel := lane.numel(owner):
                    lane.write(owner, coder.mean([body], numel), coder)


def _packed(x: Tensor, lane: Lane, seed: int, residual: Tensor | None) -> Tensor | None:
    """The body, or ``None`` if the coder refuses NaN or Inf in it."""
    try:
        return lane.coder.pack(x, seed, residual)
    except NonFiniteError:
        return None


def _placeholder(lane: Lane, owner: int) -> Tensor:
    """Zeros in place of a body that was refused, or that would hold no values."""
    return torch.zeros(lane.nbytes(owner), dtype=torch.uint8, device=lane.device)


# -- the swap of a shot ---------------------------------------------------------------------------


def _to_owners(source: int, to: int) -> int:
    """Whose shards are in a message of the first shot: the receiver's."""
    return to


def _from_owners(source: int, to: int) -> int:
    """Whose shards are in a message of the second shot: the sender's."""
    return source


def _values_of(lanes: list[Lane]) -> Callable[[int, int], Tensor]:
    return lambda k, owner: lanes[k].values(owner)


def _means_by(means: list[Tensor]) -> Callable[[int, int], Tensor]:
    return lambda k, _: means[k]


def _tag(operands: list[Operand], context: int, shot: int) -> int:
    plan = [(o.values.numel(), o.coder.identity, o.first_owner) for o in operands]
    return zlib.crc32(repr((context, plan, shot)).encode())


def _swap(
    coded: _Bodies,
    lanes: list[Lane],
    link: Link,
    tag: int,
    owner_in: Callable[[int, int], int],
    values: Callable[[int, int], Tensor],
) -> _Came:
    """Send what was coded and return what came.

    Args:
        coded: bodies by lane and owner, lane by lane.
        lanes: of all operands.
        link: to all ranks.
        tag: of this exchange.
        owner_in: maps a message's ``(source, to)`` to the owner of the shards in it.
        values: maps lane and owner to their values, for bodies that were refused.
    """
    me, ranks = link.rank, range(link.size)

    def places(source: int) -> list[_Place]:
        """The lanes and owners of a rank's flags, in order."""
        owners = sorted({owner_in(source, to) for to in ranks})
        return [(k, owner) for k in range(len(lanes)) for owner in owners]

    mine = places(me)
    with link.meter.phase("encode"):
        flags = [coded[place] is None for place in mine]
        messages = {}
        for owner in {owner for _, owner in mine}:
            found = [coded[k, owner] for k in range(len(lanes))]
            bodies = [
                _placeholder(lane, owner) if body is None else body
                for lane, body in zip(lanes, found, strict=True)
            ]
            messages[owner] = message(tag, flags, bodies)
    sizes = [[lane.nbytes(owner_in(source, me)) for lane in lanes] for source in ranks]
    came = link.swap(
        [messages[owner_in(me, to)] for to in ranks],
        [message_nbytes(len(flags), some) for some in sizes],
    )
    parcels = [opened(m, tag, len(flags), some) for m, some in zip(came, sizes, strict=True)]
    flagged = [
        {place for place, flag in zip(places(source), parcels[source][0], strict=True) if flag}
        for source in ranks
    ]
    rows = [
        [(lane.coder, body) for lane, body in zip(lanes, bodies, strict=True)]
        for _, bodies in parcels
    ]
    if any(flagged):
        _swap_refused(rows, flagged, lanes, link, owner_in, values)
    return rows


def _swap_refused(
    rows: _Came,
    flagged: Sequence[set[_Place]],
    lanes: list[Lane],
    link: Link,
    owner_in: Callable[[int, int], int],
    values: Callable[[int, int], Tensor],
) -> None:
    """Swap the values of refused bodies, and put them in place of the placeholders in ``rows``."""
    me, ranks = link.rank, range(link.size)

    def refused(source: int, to: int) -> list[_Place]:
        owner = owner_in(source, to)
        return [(k, owner) for k in range(len(lanes)) if (k, owner) in flagged[source]]

    none = torch.empty(0, dtype=torch.uint8, device=lanes[0].device)
    outgoing = [
        [none, *(_RAW.pack(values(*at), 0, None) for at in refused(me, to))] for to in ranks
    ]
    sizes = [[4 * lanes[k].numel(owner) for k, owner in refused(source, me)] for source in ranks]
    came = link.swap(outgoing, [sum(some) for some in sizes])
    for source in ranks:
        parts = torch.split(came[source], sizes[source])
        for (k, _), part in zip(refused(source, me), parts, strict=True):
            rows[source][k] = (_RAW, part)


# -- messages ---------------------------------------------------------------------------------


def padded(nbytes: int) -> int:
    """Round up to a multiple of 8, so that every body can be viewed as any dtype."""
    return -(-nbytes // 8) * 8


def message_nbytes(flags: int, sizes: Sequence[int]) -> int:
    """Size of a message with ``flags`` flags and bodies of these sizes."""
    return padded(4 + -(-flags // 8)) + sum(padded(n) for n in sizes)


def message(tag: int, flags: Sequence[bool], bodies: Sequence[Tensor]) -> list[Tensor]:
    """``tag | flags | bodies`` as uint8 tensors, with padding after each."""
    bits = sum(1 << i for i, flag in enumerate(flags) if flag)
    head = tag.to_bytes(4, "little") + bits.to_bytes(-(-len(flags) // 8), "little")
    head = head.ljust(padded(len(head)), b"\0")
    device = bodies[0].device if bodies else torch.device("cpu")
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8).to(device)]
    for body in bodies:
        parts.append(body)
        rest = padded(body.numel()) - body.numel()
        if rest:
            parts.append(torch.zeros(rest, dtype=torch.uint8, device=device))
    return parts


def opened(
    received: Tensor, tag: int, flags: int, sizes: Sequence[int]
) -> tuple[list[bool], list[Tensor]]:
    """Flags and bodies of a message.

    Raises:
        MalformedBodyError: wrong length or tag: the sender exchanges something else.
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
    bodies = []
    for size in sizes:
        bodies.append(received[at : at + size])
        at += padded(size)
    return [bool(bits >> i & 1) for i in range(flags)], bodies
