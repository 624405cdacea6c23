"""One participant's copy of the global state. Server and clients hold the same kind.

With a linear codec the position is kept *in code space*: ``theta = theta_init + Dec(Z)`` with ``Z``
the sum of all broadcast codes. Every participant adds the same decoded numbers in the same order,
so all replicas of one round are equal to the bit, and a late client needs one code vector, not a
model.

A state is identified by its *lineage*, that is, by how it came about. The first lineage is the
digest of the initial state; each later one is the digest of the last increment's bytes, which
contain the previous lineage. Every broadcast carries the lineage that it leads to, every reply the
one of the state that was trained. So an increment that comes twice or out of order, or a server
that was restarted from an older checkpoint, is noticed at once. The lineage is not a digest of the
values, since machines may round a decoded value differently in its last bit, which does no harm.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.encodable import check_update
from gradcodec.errors import CodecMismatchError
from gradcodec.federated.aggregation import Averager, decoded
from gradcodec.federated.envelope import FIXED, INCREMENT, VALUES, Broadcast, Part
from gradcodec.federated.relayed import Relayed, is_relayed
from gradcodec.federated.tensors import Split
from gradcodec.types import Update, UpdateSpec, named_digest
from gradcodec.wire import Payload


def state_digest(state: Update) -> bytes:
    """8 bytes of SHA-256 over names, dtypes, shapes, values: what updates are relative to.

    Raises:
        UpdateError: these are not plain tensors by name.
    """
    check_update(state)
    return named_digest([(name, wire.tensor_digest(t)) for name, t in state.items()], " ")


def for_state(codec: Codec, initial: Update) -> Codec:
    """The codec bound to a federation's tensors and initial values; both ends call this.

    Raises:
        UpdateError: the codec belongs to other tensors.
    """
    if codec.spec is not None:
        codec.spec.check(initial)
    bound = codec.bind(UpdateSpec.of(initial), state_digest(initial))
    bound.pipeline.place(
        torch.device("cpu")
    )  # replicas are on the host, wherever the codec was moved to
    return bound


@dataclass(frozen=True)
class Space:
    """How increments move a replica.

    Attributes:
        codec: decodes broadcasts; bound.
        latent: increments are codes ``z`` that mean ``Dec(z) - Dec(0)``.
        absolute: broadcasts carry the state itself instead of a difference.
        averager: increments are replies that this averages; ``None``: they are payloads.
    """

    codec: Codec
    latent: bool = False
    absolute: bool = False
    averager: Averager | None = None

    @property
    def in_code(self) -> bool:
        """Whether positions are code vectors: differences of a linear codec."""
        return self.codec.linear and not self.absolute

    @property
    def numel(self) -> int:
        """Length of a position vector."""
        spec = self.codec.transform.table()
        return self.codec.code_numel(spec) if self.in_code else spec.numel

    def opened(self, increment: bytes) -> tuple[bytes | None, Callable[[], Tensor]]:
        """What an increment starts from, and a function that decodes its code or update.

        Raises:
            WireError: it is damaged, or replies came where a payload is expected or vice versa.
        """
        if is_relayed(increment) != (self.averager is not None):
            came = "relayed replies" if self.averager is None else "a payload"
            raise CodecMismatchError(f"{came} came: both ends need the same ServerConfig.relay")
        if self.averager is not None:
            replies = Relayed.from_bytes(increment)
            return replies.base, partial(self.averager.step, replies)
        payload = Payload.from_bytes(increment)
        based, in_code = replace(payload, base=self.codec.base), self.in_code or self.latent
        return payload.base, partial(decoded, self.codec, based, in_code)

    @property
    def snapshot_codec(self) -> Codec:
        """Lossless codec of positions: fp32 codes, or fp32 values."""
        codec = self.codec
        spec = codec.transform.table()
        if self.in_code and codec.code_numel(spec) < spec.numel:
            outer = codec.outer if isinstance(codec, Chain) else codec
            return Chain(outer, Identity())
        fp32 = UpdateSpec(tuple(type(t)(t.name, t.shape) for t in spec))
        return Identity().bind(fp32, codec.base)


class Replica:
    """Initial state plus position.

    Args:
        initial: the initial state, which every participant builds locally (from a seed, a base
            model). Tensors that the space's codec does not code are kept: they travel bit for bit.
        space: how broadcasts move this replica.
        version: the round of the initial state.

    Attributes:
        version: the round whose state this is.
        position: how far the coded tensors are from the initial ones.
        kept: the other tensors.
        lineage: 8 bytes that identify how this state came about.
    """

    def __init__(self, initial: Update, space: Space, version: int = 0) -> None:
        self.initial = {n: t.detach().clone() for n, t in initial.items()}
        self.space = space
        self.spec = space.codec.transform.table()
        self.coded = {t.name: self.initial[t.name] for t in self.spec}
        self.kept = {n: t for n, t in self.initial.items() if n not in self.coded}
        self.version = version
        self.position = torch.zeros(space.numel)
        self.lineage = space.codec.base or state_digest(self.coded)
        self._zero: Tensor | None = None
        self._newer = False  # whether a broadcast of version 2 has come

    @property
    def first(self) -> Split:
        """The initial state, coded and kept tensors apart."""
        kept = {n: t for n, t in self.initial.items() if n not in self.coded}
        return Split(tuple(self.initial), self.coded, kept)

    @property
    def digest(self) -> bytes:
        """8 bytes that identify the state by its lineage and the values of kept tensors."""
        if not self.kept:
            return self.lineage
        return _digest(self.lineage, state_digest(self.kept))

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """All tensors, in the initial order: the coded ones as moved, the kept ones as they are."""
        moved = self.moved()
        return {n: moved[n] if n in moved else self.kept[n].clone() for n in self.initial}

    @torch.no_grad()
    def moved(self) -> dict[str, Tensor]:
        """The coded tensors: ``theta_init`` moved by the position, in the initial dtypes."""
        if self.space.in_code:
            moved = self.space.codec.from_code(self.position)
        else:
            fp32 = UpdateSpec(tuple(type(t)(t.name, t.shape) for t in self.spec))
            moved = layout.unflatten(self.position, fp32)
        if self.space.absolute and self.version:
            return {n: moved[n].to(t.dtype) for n, t in self.coded.items()}
        out = {}
        for name, t in self.coded.items():
            wide = torch.promote_types(t.dtype, torch.float32)
            out[name] = (t.to(wide) + moved[name].to(wide)).to(t.dtype)
        return out

    @torch.no_grad()
    def advance(self, blob: bytes, value: Tensor | None = None) -> None:
        """Apply one broadcast increment (or, for absolute spaces, the new state).

        Args:
            blob: the increment.
            value: the code or update that it decodes to, if that is known.

        Raises:
            CodecMismatchError: the increment does not start from this state.
            WireError: it is damaged or of another codec.
        """
        base, read = self.space.opened(blob)
        if base != self.lineage and not self.space.absolute:
            raise CodecMismatchError(
                f"an increment of another history: it goes on from state {_hex(base)}, "
                f"this replica is at {self.lineage.hex()} (round {self.version}); {WAY_BACK}"
            )
        self._move(read() if value is None else value)
        self.lineage = _digest(blob)  # ``blob`` contains the lineage before
        self.version += 1

    def of_version_1(self, blob: bytes) -> bytes:
        """Convert an increment of version 1, which has no lineage but the initial state's digest.

        Returns:
            The same increment, bound to this replica's state.

        Raises:
            CodecMismatchError: it is bound to another initial state.
        """
        payload = Payload.from_bytes(blob)
        if payload.base != self.space.codec.base:
            raise CodecMismatchError(
                f"an increment of initial state {_hex(payload.base)}, expected "
                f"{_hex(self.space.codec.base)}"
            )
        return replace(payload, base=self.lineage).to_bytes()

    def _move(self, value: Tensor) -> None:
        if self.space.latent and not self.space.in_code:
            moved = layout.flatten(self.space.codec.from_code(value), self.spec)
            value = moved - self._decoded_zero()
        self.position = value if self.space.absolute else self.position + value

    def copy(self) -> Replica:
        """An independent replica at the same state; tensors are shared and never written to."""
        return copy.copy(self)

    def share(self, other: Replica) -> None:
        """Use another replica's initial tensors, which must be equal, instead of own copies."""
        self.initial, self.coded = other.initial, other.coded

    @property
    def snapshot_nbytes(self) -> int:
        """The fewest bytes that a snapshot takes: four for each number of the position."""
        return 4 * self.position.numel()

    def snapshot(self) -> Payload:
        """The whole position, lossless."""
        return self.space.snapshot_codec.write_code(self.position)

    def pack_kept(self, kept: Mapping[str, Tensor]) -> Payload:
        """Payload of the values of the tensors that travel bit for bit."""
        return self._kept_codec.encoder.encode(kept)

    def read_kept(self, payload: Payload) -> dict[str, Tensor]:
        """Inverse of ``pack_kept``.

        Raises:
            WireError: it is damaged or of other tensors.
        """
        return self._kept_codec.decoder.decode(payload)

    @property
    def _kept_codec(self) -> Codec:
        return Identity().bind(UpdateSpec.of(self.kept))

    @torch.no_grad()
    def receive(self, blob: bytes) -> None:
        """Read a broadcast and move to its round; on any error nothing changes.

        Raises:
            CodecMismatchError: it belongs to another history than this replica's.
            WireError: one named subclass per way the bytes can be wrong.
        """
        message = Broadcast.from_bytes(blob, FIXED)
        self.check_order(message)
        self.apply(message.parts, message.round, message.lineage, message.lineage is None)

    def check_order(self, message: Broadcast) -> None:
        """Raise ``CodecMismatchError`` for a message that does not lead on from this replica.

        That is a message that leads to an earlier round or to another state of this round, or one
        of version 1 after newer ones. A delayed message is such a one: what came later counts.
        """
        if message.round < self.version:
            raise CodecMismatchError(
                f"a broadcast of round {message.round} came to a replica at round {self.version}: "
                f"it was delayed, or the server was restarted from an older checkpoint; {WAY_BACK}"
            )
        if message.round == self.version and message.lineage not in (None, self.lineage):
            raise CodecMismatchError(
                f"a broadcast of round {self.version} of another history than this replica's; "
                f"{WAY_BACK}"
            )
        if message.lineage is None and self._newer:
            raise CodecMismatchError(
                "a broadcast of version 1 after newer ones: it was delayed, or the server was "
                f"downgraded; {WAY_BACK}"
            )

    @torch.no_grad()
    def apply(
        self, parts: Sequence[Part], until: int, lineage: bytes | None, version_1: bool = False
    ) -> None:
        """Move to round ``until`` by the parts of a broadcast; on any error nothing changes.

        Args:
            parts: increments or a snapshot, then values.
            until: the round that they lead to.
            lineage: lineage of the state that they lead to; ``None`` if it is not known.
            version_1: whether increments are bound to the initial state instead of their lineage.

        Raises:
            WireError: a part is damaged or of another codec, or the parts lead elsewhere.
        """
        at = self.copy()
        for kind, part in parts:
            if kind == VALUES:
                at.kept = at.read_kept(Payload.from_bytes(part))
            elif kind == INCREMENT:
                at.advance(at.of_version_1(part) if version_1 else part)
            else:
                at.position = at.space.snapshot_codec.read_code(Payload.from_bytes(part))
                at._arrive(until, lineage)
        if at.space.absolute and parts:
            at._arrive(until, lineage)  # a state needs no history
        if at.version != until:
            raise CodecMismatchError(
                f"a broadcast of round {until} left this replica at {at.version}"
            )
        if lineage is not None and at.lineage != lineage:
            raise CodecMismatchError(
                f"a broadcast of round {until} leads to state {lineage.hex()}, this replica came "
                f"to {at.lineage.hex()}: the server has another history; {WAY_BACK}"
            )
        at._newer |= not version_1
        self.__dict__.update(at.__dict__)

    def _arrive(self, until: int, lineage: bytes | None) -> None:
        self.version = until
        self.lineage = self.lineage if lineage is None else lineage

    def _decoded_zero(self) -> Tensor:
        if self._zero is None:
            zero = torch.zeros(self.space.codec.code_numel(self.spec))
            self._zero = layout.flatten(self.space.codec.from_code(zero), self.spec)
        return self._zero


WAY_BACK = "the way back: client.reset(), then server.broadcast(client.version)"


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()[: wire.DIGEST_BYTES]


def _hex(digest: bytes | None) -> str:
    return "none" if digest is None else digest.hex()
