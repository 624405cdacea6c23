"""One participant's copy of the global state. Server and clients hold the same kind.

Where codes add, the position is kept *in code space*: ``theta = theta_init + Dec(Z)`` with ``Z``
the sum of all broadcast codes. Every participant adds the same decoded numbers in the same order,
so all replicas of one round are equal to the bit, and a late client needs one code vector, not a
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.codecs.base import Codec
from gradcodec.codecs.compose import Chain
from gradcodec.codecs.identity import Identity
from gradcodec.encodable import check_update
from gradcodec.errors import CodecMismatchError
from gradcodec.federated.envelope import INCREMENT, Broadcast
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
    return codec.bind(UpdateSpec.of(initial), state_digest(initial))


@dataclass(frozen=True)
class Space:
    """How increments move a replica.

    Attributes:
        codec: decodes broadcasts; bound.
        latent: increments are codes ``z`` that mean ``Dec(z) - Dec(0)``.
        absolute: broadcasts carry the state itself instead of a difference.
    """

    codec: Codec
    latent: bool = False
    absolute: bool = False

    @property
    def in_code(self) -> bool:
        """Whether positions are code vectors: differences of a linear codec."""
        return self.codec.linear and not self.absolute

    @property
    def numel(self) -> int:
        """Length of a position vector."""
        spec = self.codec._known_spec(None)
        return self.codec.code_numel(spec) if self.in_code else spec.numel

    @property
    def snapshot_codec(self) -> Codec:
        """Lossless codec of positions: fp32 codes, or fp32 values."""
        codec = self.codec
        spec = codec._known_spec(None)
        if self.in_code and codec.code_numel(spec) < spec.numel:
            outer = codec.outer if isinstance(codec, Chain) else codec
            return Chain(outer, Identity())
        fp32 = UpdateSpec(tuple(type(t)(t.name, t.shape) for t in spec))
        return Identity().bind(fp32, codec.base)


class Replica:
    """Initial state plus position.

    Args:
        initial: the state that every participant derives by itself (a seed, a base model).
        space: how to read what is broadcast.
        version: the round that the initial state is of.
    """

    def __init__(self, initial: Update, space: Space, version: int = 0) -> None:
        self.initial = {n: t.detach().clone() for n, t in initial.items()}
        self.space = space
        self.spec = UpdateSpec.of(self.initial)
        self.version = version
        self.position = torch.zeros(space.numel)
        self._zero: Tensor | None = None

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The tensors: ``theta_init`` moved by the position, in the initial dtypes."""
        if self.space.in_code:
            moved = self.space.codec.from_code(self.position)
        else:
            fp32 = UpdateSpec(tuple(type(t)(t.name, t.shape) for t in self.spec))
            moved = layout.unflatten(self.position, fp32)
        if self.space.absolute and self.version:
            return {n: moved[n].to(t.dtype) for n, t in self.initial.items()}
        out = {}
        for name, t in self.initial.items():
            wide = torch.promote_types(t.dtype, torch.float32)
            out[name] = (t.to(wide) + moved[name].to(wide)).to(t.dtype)
        return out

    @torch.no_grad()
    def advance(self, payload: Payload) -> None:
        """Apply one broadcast increment (or, for absolute spaces, the new state)."""
        codec = self.space.codec
        if self.space.in_code:
            self.position = self.position + codec.read_code(payload)
        elif self.space.latent:
            moved = layout.flatten(codec.from_code(codec.read_code(payload)), self.spec)
            self.position = self.position + (moved - self._decoded_zero())
        else:
            value = layout.flatten(codec.decoder.decode(payload), self.spec)
            self.position = value if self.space.absolute else self.position + value
        self.version += 1

    def snapshot(self) -> Payload:
        """The whole position, lossless."""
        return self.space.snapshot_codec.write_code(self.position)

    @torch.no_grad()
    def receive(self, blob: bytes) -> None:
        """Read a broadcast and move to its round; on any error nothing changes.

        Raises:
            WireError: one named subclass per way the bytes can be wrong.
        """
        message = Broadcast.from_bytes(blob)
        self.apply(message.parts, message.round)

    @torch.no_grad()
    def apply(self, parts: Sequence[tuple[int, bytes]], until: int) -> None:
        """Move to round ``until`` by the parts of a broadcast; on any error nothing changes.

        Raises:
            WireError: a part is damaged, of another codec, or they do not lead there.
        """
        before = self.version, self.position
        try:
            for kind, part in parts:
                payload = Payload.from_bytes(part)
                if kind == INCREMENT:
                    self.advance(payload)
                else:
                    self.position = self.space.snapshot_codec.read_code(payload)
                    self.version = until
            if self.space.absolute and parts:
                self.version = until  # a state needs no history
            if self.version != until:
                raise CodecMismatchError(
                    f"a broadcast of round {until} left this replica at {self.version}"
                )
        except Exception:
            self.version, self.position = before
            raise

    def _decoded_zero(self) -> Tensor:
        if self._zero is None:
            zero = torch.zeros(self.space.codec.code_numel(self.spec))
            self._zero = layout.flatten(self.space.codec.from_code(zero), self.spec)
        return self._zero
