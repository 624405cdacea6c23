"""Copies of the model at both ends, and the messages that move them to a new round.

The sender encodes how the model differs from what receivers hold, which its own copy tells. So
each message also carries what coding the earlier ones lost, and errors do not add up.

    sender     d_t = Q(w_t - r_{t-1})     r_t = r_{t-1} + d_t
    receiver                              r_t = r_{t-1} + d_t       it trains from r_t
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codecs import Identity
from gradcodec.errors import CodecMismatchError, ConfigError, MalformedBodyError
from gradcodec.federated.replica import state_digest
from gradcodec.federated.tensors import check_rules
from gradcodec.integrations.messages.coding import Coding, Parts
from gradcodec.types import Update, UpdateSpec

VERSION_BYTES = 8

EXACT = Coding(Identity())

_ROUNDING = 8.0
"""Epsilons by which averaging equal values may move them: ``x / 3 + x / 3 + x / 3`` is not ``x``,
and frozen tensors would be sent in each round. Smaller changes are not lost: the next difference is
to what receivers hold."""
_WHOLE, _VERSION, _START = "whole", "version", "start"


@dataclass(frozen=True)
class Message:
    """What brings a receiver to a version.

    Attributes:
        whole: the whole model, or empty: then the steps apply to what the receiver holds.
        steps: increments, one after the other.
        version: 8 bytes that pin how the copy came about to which they lead.
        start: the version that the first step applies to, if the sender says so.
    """

    whole: Parts
    steps: tuple[Parts, ...]
    version: bytes
    start: bytes = b""

    def known_by(self, version: bytes) -> int:
        """How many of the steps a copy of this version has made already; 0 if none can be told.

        Its reply to an earlier message may have been lost: then the sender starts too early.
        """
        reached = self.start
        for i, step in enumerate(self.steps if reached else ()):
            if reached == version:
                return i
            reached = pinned(reached, step)
        return len(self.steps) if reached == version and reached else 0

    def to_parts(self) -> dict[str, bytes]:
        """Named bytes: ``whole/...`` or ``0/...``, ``1/...``, and ``version``."""
        named = {_WHOLE: self.whole, **{str(i): step for i, step in enumerate(self.steps)}}
        flat = {f"{head}/{key}": part for head, p in named.items() for key, part in p.items()}
        start = {_START: self.start} if self.start else {}
        return {**flat, **start, _VERSION: self.version}

    @classmethod
    def from_parts(cls, parts: Parts) -> Message:
        """Inverse of ``to_parts``.

        Raises:
            MalformedBodyError: the names are others.
        """
        rest = dict(parts)
        version, start = rest.pop(_VERSION, b""), rest.pop(_START, b"")
        named: dict[str, dict[str, bytes]] = {}
        for name, part in rest.items():
            head, _, key = name.partition("/")
            named.setdefault(head, {})[key] = part
        whole = named.pop(_WHOLE, {})
        numbers = [str(i) for i in range(len(named))]
        if len(version) != VERSION_BYTES or set(named) != set(numbers) or (whole and named):
            raise MalformedBodyError(
                "expected a whole model or numbered increments, and a version of "
                f"{VERSION_BYTES} bytes, got parts {sorted(parts)[:5]}"
            )
        return cls(whole, tuple(named[number] for number in numbers), version, start)


@dataclass
class Copy:
    """The model as receivers hold it.

    Attributes:
        tensors: by name, in the model's dtypes.
        version: 8 bytes that pin how it came about; empty before the first message.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    version: bytes = b""

    def receive(self, message: Message, coding: Coding) -> None:
        """Move to the version of a message; on any error nothing changes.

        Raises:
            WireError: it is damaged, of another codec, or applies to another version.
        """
        if message.whole:
            self.tensors, self.version = EXACT.decode(message.whole), message.version
            return
        moved = Copy(dict(self.tensors), self.version)
        for step in message.steps[message.known_by(self.version) :]:
            moved.advance(step, coding)
        if moved.version != message.version:
            raise CodecMismatchError(
                f"increments that lead to version {message.version.hex()}, this copy came to "
                f"{moved.version.hex() or 'none'}: they apply to another one"
            )
        self.tensors, self.version = moved.tensors, moved.version

    def advance(self, step: Parts, coding: Coding) -> None:
        """Apply an increment.

        Raises:
            WireError: it is damaged, or of tensors that this copy does not have.
        """
        changes, values = coding.decode_halves(step)
        for name, tensor in {**changes, **values}.items():
            before = self.tensors.get(name)
            if before is None or before.shape != tensor.shape:
                raise CodecMismatchError(f"an increment of {name!r}, which is not in this copy")
        for name, change in changes.items():
            before = self.tensors[name]
            self.tensors[name] = layout.narrow(_wide(before) + _wide(change), before.dtype)
        self.tensors.update(values)
        self.version = pinned(self.version, step)


class Sender:
    """The server's copy, and the messages that bring receivers to it.

    It remembers increments while together they are shorter than the model. A receiver that missed
    some rounds gets those, any other one the whole model.

    Args:
        coding: of increments; its packers must contract, or errors would grow.

    Raises:
        ConfigError: they do not.
    """

    def __init__(self, coding: Coding) -> None:
        if not coding.contracts:
            raise ConfigError(
                "expected a codec whose error is smaller than its input, because receivers add up "
                f"what it decodes; got {coding.codec}; 'int4' is one"
            )
        self.copy = Copy()
        self._coding = coding
        self._spec: UpdateSpec | None = None
        self._model = b""
        self._steps: list[tuple[bytes, dict[str, bytes]]] = []  # with the version they apply to
        self._whole: dict[str, bytes] = {}

    def move(self, model: Update) -> None:
        """Move to a model; nothing happens if it is the one of the last call.

        Raises:
            ConfigError: a rule matches none of the tensors of the first model.
            NonFiniteError: it holds NaN or Inf.
        """
        digest = state_digest(model)
        if digest == self._model:
            return
        spec = UpdateSpec.of(model)
        if self._spec is None:
            check_rules(self._coding.rules, (t.name for t in spec))
        if self._spec is not None and self._moves(self._spec, spec):
            step = self._coding.encode(
                changes(model, self.copy.tensors, self._coding, rounding=_ROUNDING)
            )
            self._steps.append((self.copy.version, step))
            self.copy.advance(step, self._coding)
            while len(self._steps) > 1 and sum(_nbytes(s) for _, s in self._steps) > spec.nbytes:
                del self._steps[0]
            self._whole = {}
        else:
            whole = EXACT.encode(model)
            self.copy.receive(Message(whole, (), pinned(b"", whole)), self._coding)
            self._whole, self._steps = whole, []
        self._model, self._spec = digest, spec

    def _moves(self, before: UpdateSpec, after: UpdateSpec) -> bool:
        """Whether increments lead on: only what travels bit for bit may have another dtype now."""
        return len(before) == len(after) and all(
            a == b or ((a.name, a.shape) == (b.name, b.shape) and self._coding.keeps(b))
            for a, b in zip(before, after, strict=True)
        )

    def forget_before(self, version: bytes) -> None:
        """Forget increments that the only receiver has, which is at this version."""
        while self._steps and self._steps[0][0] != version:
            del self._steps[0]

    def message(self, held: bytes) -> Message:
        """The message for a receiver of version ``held``."""
        version = self.copy.version
        for i, (base, _) in enumerate(self._steps):
            if base == held:
                return Message({}, tuple(step for _, step in self._steps[i:]), version)
        if held == version:
            return Message({}, (), version)
        if not self._whole:
            self._whole = EXACT.encode(self.copy.tensors)
        return Message(self._whole, (), version)


def changes(
    model: Update,
    held: Update,
    coding: Coding,
    also: Collection[str] = (),
    *,
    rounding: float = 0.0,
) -> dict[str, Tensor]:
    """Differences of the tensors that are coded, new values of the others.

    Unchanged tensors are left out, unless the codec is bound to its tensors and needs them, or
    ``also`` names them. Tensors of fp32 or more of which no value has changed by more than
    ``rounding`` times its dtype's epsilon count as unchanged where they would be coded with loss;
    of half precision an epsilon is as much as training changes.
    """
    plan = coding.plan(UpdateSpec.of(model))
    coded = {t.name for t in (plan.codec.spec or ())} if plan.codec is not None else set()
    needed = {t.name: t.dtype for t in coding.codec.spec or ()}
    out = {}
    for name, tensor in model.items():
        before = held[name]
        same = before.dtype == tensor.dtype and torch.equal(before, tensor)
        if rounding and name in coded and not coding.exact(name):
            same = same or _near(before, tensor, rounding)
        if same and name not in needed and name not in also:
            continue
        change = _wide(tensor) - _wide(before) if name in coded else tensor
        out[name] = change.to(needed.get(name, change.dtype))
    return out


def _near(before: Tensor, after: Tensor, rounding: float) -> bool:
    if after.dtype not in (torch.float32, torch.float64):
        return False
    least = rounding * torch.finfo(after.dtype).eps
    return torch.allclose(_wide(after), _wide(before), rtol=least, atol=0)


def pinned(base: bytes, parts: Mapping[str, bytes]) -> bytes:
    """The version to which these parts lead from another one."""
    text = hashlib.sha256(base)
    for name in sorted(parts):
        text.update(f"{name}{len(parts[name])}:".encode())
        text.update(parts[name])
    return text.digest()[:VERSION_BYTES]


def _nbytes(parts: Parts) -> int:
    return sum(map(len, parts.values()))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
