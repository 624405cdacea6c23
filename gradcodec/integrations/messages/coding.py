"""Named tensors <-> named bytes, by a codec that is known on both sides."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.errors import (
    CodecMismatchError,
    ConfigError,
    MalformedBodyError,
    UpdateError,
)
from gradcodec.federated.tensors import BUFFERS, Rules, rule_for, with_rules
from gradcodec.integrations.messages import tables
from gradcodec.integrations.messages.feedback import Feedback, contracts
from gradcodec.types import TensorSpec, Update, UpdateSpec
from gradcodec.wire import Payload

CODED, KEPT = "coded", "kept"

_PLANS = 8
"""Tables whose plans are remembered; the sites of a job usually share one."""

Parts = Mapping[str, bytes]
"""The bytes of one encoded set of tensors, by what they are: a table, coded and kept tensors."""


@dataclass(frozen=True)
class Plan:
    """How the tensors of one table travel.

    Attributes:
        spec: the table.
        still: positions in it of tensors of zeros, which do not travel.
        codec: of the tensors that are coded, bound to them; ``None`` if there are none.
        kept: of those that travel bit for bit, likewise.
        known: whether the table need not travel, because the codec is bound to it.
    """

    spec: UpdateSpec
    still: frozenset[int]
    codec: Codec | None
    kept: Codec | None
    known: bool

    @cached_property
    def described(self) -> dict[str, bytes]:
        """The parts that say which tensors they are: the deflated table, a bit for each tensor."""
        return {
            **({} if self.known else tables.table_parts(self.spec)),
            **(tables.still_parts(self.still, len(self.spec)) if self.still else {}),
        }


class Coding:
    """A codec and rules, which both ends have, and the bytes that they make of named tensors.

        floating tensors                      --codec, or a rule's-->  "coded"
        integers, BatchNorm's statistics      --bit for bit-->         "kept"
        names, shapes, dtypes of all          --deflate-->             "table"
        which of them are zeros and left out  --a bit each-->          "still"

    The table does not travel if the codec is bound to it, as trained ones are.

    Args:
        codec: unbound, or bound to the tensors that are coded.
        rules: ``(pattern, codec name)`` by tensor name, the first match wins.
        kept: names of further tensors that travel bit for bit, whatever their dtype.
    """

    def __init__(self, codec: Codec, rules: Rules = (), kept: Collection[str] = ()) -> None:
        self.codec, self.rules, self._kept = codec, rules, frozenset(kept)
        self._plans: OrderedDict[tuple[bytes, frozenset[int]], Plan] = OrderedDict()

    @property
    def contracts(self) -> bool:
        """Whether what the codec and the rules' codecs lose is always less than their input."""
        named = (rule_for(pattern, self.rules) for pattern, _ in self.rules)
        return all(contracts(c) for c in (self.codec, *named) if c is not None)

    def plan(self, spec: UpdateSpec, still: frozenset[int] = frozenset()) -> Plan:
        """How tensors of this table travel, if those in ``still`` are zeros.

        Raises:
            ConfigError, UpdateError: the codec or a rule does not fit them.
        """
        key = spec.digest, still
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._made(spec, still)
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan

    def _made(self, spec: UpdateSpec, still: frozenset[int]) -> Plan:
        travel = [t for i, t in enumerate(spec) if i not in still]
        coded = UpdateSpec(tuple(t for t in travel if not self.keeps(t)))
        kept = UpdateSpec(tuple(t for t in travel if self.keeps(t)))
        codec: Codec | None = None
        if len(coded):
            codec = with_rules(self.codec, coded, self.rules)
            if codec.spec is None:
                codec = codec.bind(coded)
            else:
                _check_same(codec.spec, coded)
        known = self.codec.spec is not None and spec == self.codec.spec
        return Plan(spec, still, codec, Identity().bind(kept) if len(kept) else None, known)

    def exact(self, name: str) -> bool:
        """Whether a tensor of this name loses nothing."""
        return type(rule_for(name, self.rules) or self.codec) is Identity

    def keeps(self, t: TensorSpec) -> bool:
        """Whether a tensor travels bit for bit; a lossy codec would ruin counters and variances."""
        rule = rule_for(t.name, self.rules)
        exact = rule is None or type(rule) is Identity
        if t.dtype.is_floating_point:
            buffer = any(fnmatch.fnmatchcase(t.name, p) for p in BUFFERS)
            return exact and (buffer or t.name in self._kept)
        if not exact:
            raise ConfigError(
                f"{t} travels bit for bit; the rule that gives it {rule} would lose some of it: "
                "leave it out of the rule, or use 'fp32'"
            )
        return True

    def encode(
        self,
        tensors: Update,
        *,
        seed: int = 0,
        feedback: Feedback | None = None,
        still: Collection[str] = (),
    ) -> dict[str, bytes]:
        """The parts of named tensors.

        Args:
            tensors: by name.
            seed: for codecs that round stochastically.
            feedback: adds what earlier calls lost.
            still: names of tensors of zeros; those that the codec is not bound to are left out.

        Raises:
            NonFiniteError: NaN or Inf in a tensor that is coded with loss.
            ConfigError, UpdateError: these tensors do not fit the codec.
        """
        needed = {t.name for t in self.codec.spec or ()}
        left = {i for i, name in enumerate(tensors) if name in still and name not in needed}
        plan = self.plan(UpdateSpec.of(tensors), frozenset(left))
        out = dict(plan.described)
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
        plan = self._plan_of(parts)
        coded, kept = _halves(plan, parts)
        found = {**coded, **kept}
        if plan.still:
            tables.check_zeros(plan.spec, sum(map(len, parts.values())))
        return {
            t.name: torch.zeros(t.shape, dtype=t.dtype) if i in plan.still else found[t.name]
            for i, t in enumerate(plan.spec)
        }

    def decode_halves(self, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors that were coded, and those that came bit for bit; raises as ``decode``.

        Those that were left out are in neither.
        """
        return _halves(self._plan_of(parts), parts)

    def _plan_of(self, parts: Parts) -> Plan:
        came = tables.spec_of(parts)
        spec = self.codec.spec if came is None else came
        if spec is None:
            raise CodecMismatchError(
                f"expected a tensor table, got parts {sorted(parts)}: the sender's codec is bound "
                f"to its tensors, this one is not: {self.codec}"
            )
        try:
            return self.plan(spec, tables.still_of(parts, len(spec)))
        except (ConfigError, UpdateError) as err:
            raise CodecMismatchError(f"tensors that this codec does not code: {err}") from err


def _halves(plan: Plan, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    codecs = {CODED: plan.codec, KEPT: plan.kept}
    expected = [key for key, codec in codecs.items() if codec is not None]
    if sorted(set(parts) - {tables.TABLE, tables.STILL}) != sorted(expected):
        raise MalformedBodyError(f"expected parts {expected}, got {sorted(parts)}")
    coded, kept = (
        {} if codec is None else codec.decoder.decode(Payload.from_bytes(parts[key]))
        for key, codec in codecs.items()
    )
    return coded, kept


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
