"""The bytes between data-parallel ranks, altered on their way from one of them.

Ranks trust each other, but memory and networks fail, and programs get out of step. Whatever comes,
a rank ends with an error of ours or goes on, with residuals that are finite: never with a bare
error of torch or Python, and never waiting for ever. Two ranks are two threads here, whose link
hands over bytes as gloo does; ``GRADCODEC_HOSTILE=long`` makes it hours instead of seconds.
"""

from __future__ import annotations

import os
import queue
import random
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gradcodec.codecs import Subspace
from gradcodec.distributed.exchange.agreement import MAX_TEXT, LinkChannel, must_agree
from gradcodec.distributed.exchange.link import Link
from gradcodec.distributed.exchange.two_shot import message, message_nbytes, opened
from gradcodec.distributed.lowrank import LowRank
from gradcodec.distributed.meter import Meter
from gradcodec.distributed.plan import Plan
from gradcodec.distributed.wrappers.bucket import BucketReducer, Slot
from gradcodec.errors import AgreementError, GradcodecError, MalformedBodyError, TrainingError
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

LONG = os.environ.get("GRADCODEC_HOSTILE") == "long"
ROUNDS = 20_000 if LONG else 25
WAIT = 20.0

Mutator = Callable[[random.Random, bytearray], bytearray]


# -- two ranks in one process ---------------------------------------------------------------------


class Pipe:
    """What two links share."""

    def __init__(self) -> None:
        #: What comes to each rank; ``None`` when the other has ended.
        self.inbox: list[queue.SimpleQueue[Tensor | None]]
        self.inbox = [queue.SimpleQueue(), queue.SimpleQueue()]


class PipeLink:
    """A link of two threads; what rank 1 sends goes through ``alter``.

    A message of another length never arrives on gloo, since lengths are part of tags: the group's
    timeout then ends both ranks, which is an error at once here.
    """

    def __init__(self, pipe: Pipe, rank: int, alter: Callable[[bytearray], bytearray]) -> None:
        self.pipe, self.rank, self.size, self.meter = pipe, rank, 2, Meter()
        self.alter = alter

    def swap(self, messages: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
        mine, theirs = self.rank, 1 - self.rank
        sent = torch.cat(messages[theirs]).clone()
        if mine == 1:
            altered = self.alter(bytearray(sent.numpy().tobytes()))
            sent = torch.frombuffer(altered or bytearray(1), dtype=torch.uint8)[: len(altered)]
        self.pipe.inbox[theirs].put(sent)
        came = self.pipe.inbox[mine].get(timeout=WAIT)
        if came is None:
            raise TrainingError("the other rank has ended")
        if len(came) != sizes[theirs]:
            raise TrainingError(f"timeout: {len(came)} bytes came, not {sizes[theirs]}")
        out = [came, came]
        out[mine] = torch.cat(messages[mine])
        return out


def both(act: Callable[[PipeLink], None], alter: Callable[[bytearray], bytearray]) -> list[Any]:
    """Run two ranks; what each raised, or ``None``. Fails if one does not end."""
    pipe, ended = Pipe(), cast("list[Any]", ["still running"] * 2)

    def rank(number: int) -> None:
        try:
            act(PipeLink(pipe, number, alter))
            ended[number] = None
        except BaseException as err:
            ended[number] = err
        finally:
            pipe.inbox[1 - number].put(None)

    threads = [threading.Thread(target=rank, args=(n,), daemon=True) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    assert "still running" not in ended
    return ended


# -- a bucket of every scheme ---------------------------------------------------------------------

SHAPES = {"w": (40, 230), "v": (64, 80), "b": (37,)}


def subspace() -> Subspace:
    spec = UpdateSpec((TensorSpec("w", SHAPES["w"]), TensorSpec("v", SHAPES["v"])))
    config = SubspaceConfig(ratio=8, basis_dtype="float32")
    bases = {}
    for t in spec:
        axis = Axis.choose(t, config)
        bases[t.name] = (axis, torch.linalg.qr(torch.randn(axis.size, 5)).Q)
    return Subspace.from_bases(config, spec, bases)


SCHEMES: dict[str, Callable[[], Any]] = {
    **{
        name: (lambda n=name: n)  # type: ignore[misc]
        for name in (
            "int8", "int4", "int2", "sign", "int4-rotated", "int4-unbiased", "gauss4-64",
            "topk", "rotsign", "bf16", "fp16", "fp32",
        )
    },
    "lowrank": lambda: LowRank(rank=2, code="int4"),
    "lowrank raw": lambda: LowRank(rank=2, refresh=2, code="fp32"),
    "subspace": subspace,
}  # fmt: skip


def reducer(scheme: str) -> BucketReducer:
    torch.manual_seed(0)
    rules = [("b", "fp32")]
    return BucketReducer(Plan(SHAPES, SCHEMES[scheme](), 0, rules), 0)


def slots(rank: int, step: int) -> list[Slot]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    found = []
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator)
        found.append(Slot(name, values.view(-1), values))
    return found


def finite(kept: BucketReducer) -> bool:
    """All that is kept from step to step."""
    tensors = [*kept.residuals.first.values(), *kept.residuals.second.values()]
    for adaptive in kept.adaptive.values():
        tensors += [t for t in (adaptive.error, adaptive.basis, adaptive.start) if t is not None]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


# -- what is done to the bytes --------------------------------------------------------------------


def flip(draw: random.Random, raw: bytearray) -> bytearray:
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(raw))
        raw[at] ^= 1 << draw.randrange(8)
    return raw


def head(draw: random.Random, raw: bytearray) -> bytearray:
    """Tag, flags and the scales that come first."""
    for at in draw.sample(range(min(16, len(raw))), min(2, len(raw))):
        raw[at] = draw.randrange(256)
    return raw


def flags(draw: random.Random, raw: bytearray) -> bytearray:
    """Only what the tag does not cover."""
    if len(raw) > 4:
        raw[4] ^= draw.randrange(1, 256)
    return raw


def numbers(draw: random.Random, raw: bytearray) -> bytearray:
    """NaN, infinities and the largest scales and values, in bf16 and fp32."""
    bf16 = [0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x7CF1, 0x0001, 0x8000]
    for _ in range(draw.choice([1, 4, 40])):
        if draw.random() < 0.5 and len(raw) >= 12:
            at = 8 + 2 * draw.randrange((len(raw) - 8) // 2)
            raw[at : at + 2] = struct.pack("<H", draw.choice(bf16))
        elif len(raw) >= 12:
            at = 8 + 4 * draw.randrange((len(raw) - 8) // 4)
            value = draw.choice([float("nan"), float("inf"), 3e38, -3e38, 1e37, 1e-45])
            raw[at : at + 4] = struct.pack("<f", value)
    return raw


def noise(draw: random.Random, raw: bytearray) -> bytearray:
    """Everything behind the tag."""
    return raw[:8] + bytearray(draw.randbytes(len(raw) - 8)) if len(raw) > 8 else raw


def length(draw: random.Random, raw: bytearray) -> bytearray:
    return raw[: draw.randrange(len(raw) + 1)] if draw.random() < 0.5 else raw + b"\0" * 8


MUTATORS: tuple[Mutator, ...] = (flip, head, flags, numbers, noise, length)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_altered_messages_end_in_an_error_of_ours_or_in_finite_residuals(scheme: str) -> None:
    ended_well, refused = 0, 0
    for seed in range(ROUNDS):
        draw = random.Random(f"{scheme} {seed}")
        mutator, target = draw.choice(MUTATORS), draw.randrange(1, 4)
        kept = [reducer(scheme), reducer(scheme)]
        sent = 0

        def alter(
            raw: bytearray, draw: random.Random = draw, f: Mutator = mutator, at: int = target
        ) -> bytearray:
            nonlocal sent
            sent += 1
            return f(draw, raw) if raw and sent == at else raw

        def train(link: PipeLink, kept: list[BucketReducer] = kept) -> None:
            for step in range(3):
                kept[link.rank].reduce(slots(link.rank, step), cast("Link", link), step)

        for err in both(train, alter):
            assert err is None or isinstance(err, GradcodecError), (seed, mutator.__name__, err)
            ended_well += err is None
            refused += err is not None
        assert finite(kept[0]), (seed, mutator.__name__)
        assert finite(kept[1]), (seed, mutator.__name__)
    assert ended_well
    assert refused


def test_a_replayed_message_is_refused() -> None:
    """Of the step before, or of the other shot: its tag is another one."""
    for replayed in (0, 1):
        kept, seen = [reducer("int4"), reducer("int4")], []

        def alter(raw: bytearray, seen: list[bytearray] = seen, at: int = replayed) -> bytearray:
            seen.append(bytearray(raw))
            return seen[at] if len(seen) == at + 3 else raw

        def train(link: PipeLink, kept: list[BucketReducer] = kept) -> None:
            for step in range(3):
                kept[link.rank].reduce(slots(link.rank, step), cast("Link", link), step)

        errors = both(train, alter)
        assert isinstance(errors[0], MalformedBodyError), errors
        assert "expected a message of exchange" in str(errors[0])
        assert isinstance(errors[1], TrainingError)


def test_without_an_attack_nothing_is_refused() -> None:
    """The law above can fail: the same harness, left alone, trains."""
    for scheme in SCHEMES:
        kept, out = [reducer(scheme), reducer(scheme)], [slots(0, 0), slots(1, 0)]

        def train(
            link: PipeLink, kept: list[BucketReducer] = kept, out: list[list[Slot]] = out
        ) -> None:
            kept[link.rank].reduce(out[link.rank], cast("Link", link), 0)

        assert both(train, lambda raw: raw) == [None, None]
        assert all(torch.equal(a.view, b.view) for a, b in zip(*out, strict=True))


# -- the handshake --------------------------------------------------------------------------------


def records() -> Iterator[tuple[str, Mutator]]:
    yield from ((m.__name__, m) for m in MUTATORS)

    def huge(draw: random.Random, raw: bytearray) -> bytearray:
        raw[8:16] = struct.pack("<Q", draw.choice([MAX_TEXT + 1, 1 << 40, (1 << 64) - 1]))
        return raw

    def lies(draw: random.Random, raw: bytearray) -> bytearray:
        """A digest and a length that are not those of the terms."""
        raw[8:] = struct.pack("<Q", draw.randrange(200)) + draw.randbytes(32)
        return raw

    yield "huge", huge
    yield "lies", lies


@pytest.mark.parametrize(("name", "mutator"), list(records()))
def test_an_altered_handshake_ends_in_an_error_of_ours(name: str, mutator: Mutator) -> None:
    for seed in range(ROUNDS):
        draw, sent = random.Random(f"{name} {seed}"), 0
        target = draw.randrange(1, 3)

        def alter(raw: bytearray, draw: random.Random = draw, at: int = target) -> bytearray:
            nonlocal sent
            sent += 1
            return mutator(draw, raw) if raw and sent == at else raw

        def agree(link: PipeLink, alike_terms: bool = target == 1) -> None:
            with must_agree(LinkChannel(cast("Link", link)), "a call") as terms:
                terms["codec"] = "int4" if alike_terms or link.rank else "int8"

        for err in both(agree, alter):
            assert err is None or isinstance(err, AgreementError | TrainingError), (seed, err)


# -- what a message is opened with ----------------------------------------------------------------


def test_a_message_of_another_length_is_refused_before_it_is_cut() -> None:
    sizes = [13, 0, 7]
    bodies = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
    whole = torch.cat(message(7, [False] * 3, bodies))
    assert len(whole) == message_nbytes(3, sizes)
    opened(whole, 7, 3, sizes)
    for n in range(len(whole)):
        with pytest.raises(MalformedBodyError, match="expected a message of"):
            opened(whole[:n], 7, 3, sizes)
    with pytest.raises(MalformedBodyError, match="expected a message of"):
        opened(torch.cat([whole, whole[:8]]), 7, 3, sizes)
