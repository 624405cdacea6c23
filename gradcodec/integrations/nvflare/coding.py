"""Named tensors <-> named bytes, by a codec that is known on both sides."""

from __future__ import annotations

import fnmatch
import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from gradcodec.codec import Codec, codec_class
from gradcodec.codecs import Identity
from gradcodec.encodable import shown
from gradcodec.errors import (
    CodecMismatchError,
    ConfigError,
    LimitError,
    MalformedBodyError,
    MalformedSpecError,
    UpdateError,
)
from gradcodec.federated.tensors import BUFFERS, Rules, rule_for, with_rules
from gradcodec.integrations.nvflare.feedback import Feedback, contracts
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.types import TensorSpec, Update, UpdateSpec
from gradcodec.wire import Payload, spec_from_bytes, spec_to_bytes

TABLE, CODED, KEPT = "table", "coded", "kept"

MAX_TABLE_BYTES = 16 << 20
"""Most bytes of a tensor table after inflating: about 10^5 tensors."""

_PLANS = 8
"""Tables whose plans are remembered; the sites of a job usually share one."""

Parts = Mapping[str, bytes]
"""The bytes of one encoded set of tensors, by what they are: a table, coded and kept tensors."""


def codec_of(choice: str | Mapping[str, Any]) -> Codec:
    """The codec of a name, a config, or a folder or Hub id.

    Raises:
        ConfigError: it is neither text nor the ``to_dict()`` of a codec's config.
        HubError: the folder or repository cannot be read.
    """
    if isinstance(choice, Mapping):
        return codec_class(choice.get("kind", "")).from_config(choice)
    if not isinstance(choice, str):
        raise ConfigError(
            f"expected a codec's name, config, folder or Hub id, got {shown(choice)}; of a codec "
            "without weights pass codec.config, save others with codec.save_pretrained(folder)"
        )
    return make_codec(choice) if choice in UNTRAINED else Codec.from_pretrained(choice)


@dataclass(frozen=True)
class Plan:
    """How the tensors of one table travel.

    Attributes:
        spec: the table.
        codec: of the tensors that are coded, bound to them; ``None`` if there are none.
        kept: of those that travel bit for bit, likewise.
        known: whether the table need not travel, because the codec is bound to it.
    """

    spec: UpdateSpec
    codec: Codec | None
    kept: Codec | None
    known: bool

    @cached_property
    def table(self) -> bytes:
        """The deflated table."""
        return zlib.compress(spec_to_bytes(self.spec), 9)


class Coding:
    """A codec and rules, which both ends have, and the bytes that they make of named tensors.

        floating tensors                     --codec, or a rule's-->  "coded"
        integers, BatchNorm's statistics     --bit for bit-->         "kept"
        names, shapes, dtypes of all         --deflate-->             "table"

    The table does not travel if the codec is bound to it, as trained ones are.

    Args:
        codec: unbound, or bound to the tensors that are coded.
        rules: ``(pattern, codec name)`` by tensor name, the first match wins.
    """

    def __init__(self, codec: Codec, rules: Rules = ()) -> None:
        self.codec, self.rules = codec, rules
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()

    @property
    def contracts(self) -> bool:
        """Whether what the codec and the rules' codecs lose is always less than their input."""
        named = (rule_for(pattern, self.rules) for pattern, _ in self.rules)
        return all(contracts(c) for c in (self.codec, *named) if c is not None)

    def plan(self, spec: UpdateSpec) -> Plan:
        """How tensors of this table travel.

        Raises:
            ConfigError, UpdateError: the codec or a rule does not fit them.
        """
        plan = self._plans.get(spec.digest)
        if plan is None:
            plan = self._plans[spec.digest] = self._made(spec)
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan

    def _made(self, spec: UpdateSpec) -> Plan:
        coded = UpdateSpec(tuple(t for t in spec if not self._keeps(t)))
        kept = UpdateSpec(tuple(t for t in spec if self._keeps(t)))
        codec: Codec | None = None
        if len(coded):
            codec = with_rules(self.codec, coded, self.rules)
            if codec.spec is None:
                codec = codec.bind(coded)
            else:
                _check_same(codec.spec, coded)
        known = self.codec.spec is not None and spec == self.codec.spec
        return Plan(spec, codec, Identity().bind(kept) if len(kept) else None, known)

    def _keeps(self, t: TensorSpec) -> bool:
        """Whether a tensor travels bit for bit; a lossy codec would ruin counters and variances."""
        rule = rule_for(t.name, self.rules)
        exact = rule is None or type(rule) is Identity
        if t.dtype.is_floating_point:
            return exact and any(fnmatch.fnmatchcase(t.name, p) for p in BUFFERS)
        if not exact:
            raise ConfigError(
                f"{t} travels bit for bit; the rule that gives it {rule} would lose some of it: "
                "leave it out of the rule, or use 'fp32'"
            )
        return True

    def encode(
        self, tensors: Update, *, seed: int = 0, feedback: Feedback | None = None
    ) -> dict[str, bytes]:
        """The parts of named tensors.

        Raises:
            NonFiniteError: NaN or Inf in a tensor that is coded with loss.
            ConfigError, UpdateError: these tensors do not fit the codec.
        """
        plan = self.plan(UpdateSpec.of(tensors))
        out = {} if plan.known else {TABLE: plan.table}
        if plan.codec is not None:
            mine = _some(tensors, plan.codec)
            if feedback is not None and feedback.serves(plan.codec):
                out[CODED] = feedback.encode(plan.codec, mine, seed).to_bytes()
            else:
                out[CODED] = plan.codec.encoder.encode(mine, seed=seed).to_bytes()
        if plan.kept is not None:
            out[KEPT] = plan.kept.encoder.encode(_some(tensors, plan.kept)).to_bytes()
        return out

    def decode(self, parts: Parts) -> dict[str, Tensor]:
        """Inverse of ``encode``: the tensors, in the table's order.

        Raises:
            WireError: a part is missing, damaged, of another codec, or there are others.
        """
        coded, kept = self.decode_halves(parts)
        found = {**coded, **kept}
        return {t.name: found[t.name] for t in self._plan_of(parts).spec}

    def decode_halves(self, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors that were coded, and those that came bit for bit; raises as ``decode``."""
        plan = self._plan_of(parts)
        codecs = {CODED: plan.codec, KEPT: plan.kept}
        expected = [key for key, codec in codecs.items() if codec is not None]
        if sorted(set(parts) - {TABLE}) != sorted(expected):
            raise MalformedBodyError(f"expected parts {expected}, got {sorted(parts)}")
        coded, kept = (
            {} if codec is None else codec.decoder.decode(Payload.from_bytes(parts[key]))
            for key, codec in codecs.items()
        )
        return coded, kept

    def _plan_of(self, parts: Parts) -> Plan:
        table = parts.get(TABLE)
        if table is not None:
            spec = spec_from_bytes(inflate(table))
        elif self.codec.spec is not None:
            spec = self.codec.spec
        else:
            raise CodecMismatchError(
                f"expected a tensor table, got parts {sorted(parts)}: the sender's codec is bound "
                f"to its tensors, this one is not: {self.codec}"
            )
        try:
            return self.plan(spec)
        except (ConfigError, UpdateError) as err:
            raise CodecMismatchError(f"tensors that this codec does not code: {err}") from err


def inflate(table: bytes) -> bytes:
    """A deflated table's bytes; no more than ``MAX_TABLE_BYTES`` are made of any input.

    Raises:
        LimitError: there would be more.
        MalformedSpecError: it is not one whole deflated string.
    """
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(table, MAX_TABLE_BYTES)
    except zlib.error as err:
        raise MalformedSpecError(f"expected a deflated tensor table: {err}") from err
    if not stream.eof and len(plain) >= MAX_TABLE_BYTES:
        raise LimitError(f"expected a tensor table of at most {MAX_TABLE_BYTES} bytes")
    if not stream.eof or stream.unused_data:
        raise MalformedSpecError("expected one whole deflated tensor table")
    return plain


def _some(tensors: Update, codec: Codec) -> dict[str, Tensor]:
    assert codec.spec is not None
    return {t.name: tensors[t.name] for t in codec.spec}


def _check_same(expected: UpdateSpec, came: UpdateSpec) -> None:
    """Raise ``UpdateError`` unless the tables have the same tensors, in any order."""
    extra, missing = {*came} - {*expected}, {*expected} - {*came}
    if extra or missing:
        raise UpdateError(
            f"expected the codec's {len(expected)} tensors, got {len(came)}; not expected: "
            f"{_few(extra)}; missing: {_few(missing)}"
        )


def _few(tensors: Collection[TensorSpec]) -> str:
    names = sorted(map(str, tensors))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
