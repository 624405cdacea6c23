"""Choosing a codec is a codec: tensors of one update in codecs of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gradcodec.codecs.base import Codec, codec_class, register
from gradcodec.codecs.settings import CodecConfig
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import TensorSpec, Update, UpdateSpec
from gradcodec.wire import Payload

MAX_PARTS = 64


@dataclass(frozen=True)
class PerTensorConfig(CodecConfig):
    """Configs of the parts, and which part each tensor of the table belongs to."""

    kind: ClassVar[str] = "per_tensor"
    parts: tuple[CodecConfig, ...]
    part_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise ConfigError(f"per_tensor: expected 1..{MAX_PARTS} parts, got {len(self.parts)}")
        count = range(len(self.parts))
        if any(type(i) is not int or i not in count for i in self.part_of):
            raise ConfigError(f"per_tensor: expected part_of within 0..{len(count) - 1}")
        for part in self.parts:
            if not isinstance(part, CodecConfig) or isinstance(part, PerTensorConfig):
                raise ConfigError(f"per_tensor: expected parts of other kinds, got {shown(part)}")

    @property
    def stages(self) -> int:
        """Those of the deepest part, and this one."""
        return 1 + max(part.stages for part in self.parts)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``: parts from nested settings."""
        keys = {"kind", "parts", "part_of"}
        kind = data.get("kind", cls.kind) if isinstance(data, Mapping) else None
        if kind != cls.kind or {"kind", *data} != keys:
            came = list(data) if isinstance(data, Mapping) else data
            raise ConfigError(f"per_tensor: expected keys {sorted(keys)}, got {shown(came)}")
        parts, part_of = data["parts"], data["part_of"]
        if not isinstance(parts, list) or not isinstance(part_of, list):
            raise ConfigError(
                f"per_tensor: expected two lists, got {shown(parts)}, {shown(part_of)}"
            )
        if not 1 <= len(parts) <= MAX_PARTS:
            raise ConfigError(f"per_tensor: expected 1..{MAX_PARTS} parts, got {len(parts)}")
        made: list[CodecConfig] = []
        for part in parts:
            part_kind = part.get("kind", "") if isinstance(part, Mapping) else ""
            if part_kind == cls.kind:
                raise ConfigError("per_tensor: expected parts of other kinds")
            made.append(codec_class(part_kind).Config.from_dict(part))
        return cls(tuple(made), tuple(part_of))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain JSON values."""
        parts = [c.to_dict() for c in self.parts]
        return {"kind": self.kind, "parts": parts, "part_of": list(self.part_of)}


@register
class PerTensor(Codec):
    """Groups of tensors, each through a codec of its own.

        update --by name--> group i --codec i--> body i      body = body 0 | body 1 | ...

    A group keeps the tensors' order. The code is the codes of the parts one after the other, linear
    if all of them are. At most one part has learned weights, which are those of this codec.
    """

    Config = PerTensorConfig
    config: PerTensorConfig

    def __init__(
        self, parts: Sequence[Codec], part_of: Sequence[int], spec: UpdateSpec, base: bytes | None
    ) -> None:
        learned = [p for p in parts if p.learned]
        if len(learned) > 1:
            raise ConfigError("per_tensor: expected at most one part with learned weights")
        self.parts = tuple(parts)
        config = PerTensorConfig(tuple(p.config for p in parts), tuple(part_of))
        super().__init__(
            config,
            spec=spec,
            base=base,
            weights=learned[0].weights if learned else None,
            weight_digests=learned[0]._given_digests if learned else None,
        )
        if len(config.part_of) != len(spec):
            raise ConfigError(
                f"per_tensor: expected a part for each of {len(spec)} tensors, "
                f"got {len(config.part_of)}"
            )
        self.parts = tuple(
            _bound(part, table, base)
            for part, table in zip(parts, _tables(spec, config.part_of, len(parts)), strict=True)
        )

    @classmethod
    def of(cls, spec: UpdateSpec, groups: Iterable[tuple[Codec, Iterable[str]]]) -> PerTensor:
        """The codec of a table whose tensors are coded by group: ``(codec, names)``.

        Raises:
            ConfigError: a tensor is in no group, or a codec has weights for other tensors.
        """
        parts: list[Codec] = []
        number: dict[str, int] = {}
        for codec, names in groups:
            number.update(dict.fromkeys(names, len(parts)))
            parts.append(codec)
        missing = [t.name for t in spec if t.name not in number]
        if missing:
            raise ConfigError(f"per_tensor: {missing[0]!r} is in no group")
        return cls(parts, [number[t.name] for t in spec], spec, None)

    @property
    def learned(self) -> bool:  # type: ignore[override]
        """Whether one of the parts has weights."""
        return any(p.learned for p in self.parts)

    @property
    def any_dtype(self) -> bool:  # type: ignore[override]
        """Each part looks at its own tensors."""
        return True

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether the codes of all parts add."""
        return all(p.linear for p in self.parts)

    @property
    def code_space(self) -> bytes:
        """Those of the parts."""
        rows = tuple(TensorSpec(p.code_space.hex(), (i,)) for i, p in enumerate(self.parts))
        return UpdateSpec(rows).digest

    def code_numel(self, spec: UpdateSpec) -> int:
        """Sum over the parts."""
        self._own(spec)
        return sum(self._code_sizes)

    @property
    def _code_sizes(self) -> list[int]:
        return [p.code_numel(p._known_spec(None)) for p in self.parts]

    def to_code(self, update: Update) -> Tensor:
        """Each part's code of its tensors."""
        self._spec_of(update)
        return torch.cat([p.to_code(_some(update, p)) for p in self.parts])

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """Each part's tensors, in the table's order."""
        self._own(spec)
        out: dict[str, Tensor] = {}
        for part, code in zip(self.parts, torch.split(z, self._code_sizes), strict=True):
            out.update(part.from_code(code))
        return self._in_order(out)

    def pullback(self, z: Tensor, gradients: Update) -> Tensor:
        """Each part's own."""
        codes = torch.split(z, self._code_sizes)
        return torch.cat(
            [p.pullback(c, _some(gradients, p)) for p, c in zip(self.parts, codes, strict=True)]
        )

    def step_scales(self) -> Tensor:
        """Each part's own."""
        return torch.cat([p.step_scales() for p in self.parts])

    def nbytes(self, spec: UpdateSpec | None = None) -> int:
        """Sum over the parts."""
        self._own(spec)
        return sum(p.nbytes() for p in self.parts)

    def packed_nbytes(self, numel: int) -> int:
        """The size of a whole code; there is no other vector that it could pack."""
        if numel != sum(self._code_sizes):
            raise ConfigError(
                f"per_tensor: codes {sum(self._code_sizes)} values of named tensors, not {numel}"
            )
        return self.nbytes()

    def _encode_body(self, update: Update, spec: UpdateSpec, seed: int) -> bytes:
        return b"".join(
            p._encode_body(_some(update, p), p._known_spec(None), seed) for p in self.parts
        )

    def _decode_body(self, body: bytes, spec: UpdateSpec) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for part, some in self._bodies(body):
            out.update(part._decode_body(some, part._known_spec(None)))
        return self._in_order(out)

    def _checked_unpack(self, body: bytes, spec: UpdateSpec) -> Tensor:
        return torch.cat(
            [p._checked_unpack(some, p._known_spec(None)) for p, some in self._bodies(body)]
        )

    def write_code(self, z: Tensor, *, seed: int = 0) -> Payload:
        """Each part packs its own code."""
        sizes = self._code_sizes
        if z.numel() != sum(sizes):
            raise ConfigError(f"per_tensor: expected a code of {sum(sizes)}, got {z.numel()}")
        codes = torch.split(z.detach(), sizes)
        bodies = [p.write_code(c, seed=seed).body for p, c in zip(self.parts, codes, strict=True)]
        return self._payload(b"".join(bodies))

    def _bodies(self, body: bytes) -> list[tuple[Codec, bytes]]:
        self._check_length(body, self._known_spec(None))
        out, at = [], 0
        for part in self.parts:
            size = part.nbytes()
            out.append((part, body[at : at + size]))
            at += size
        return out

    def _in_order(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {t.name: tensors[t.name] for t in self._known_spec(None)}

    def _own(self, spec: UpdateSpec | None) -> UpdateSpec:
        if spec is not None and spec != self.spec:
            raise UpdateError("per_tensor: the parts belong to another tensor table")
        return self._known_spec(None)

    @classmethod
    def _of(cls, config: CodecConfig, **given: Any) -> Codec:
        assert isinstance(config, PerTensorConfig)
        spec = given.get("spec")
        if spec is None:
            raise ConfigError("per_tensor: a spec is needed; the parts belong to named tensors")
        learned = {n: given.get(n) for n in ("weights", "weight_digests")}
        made = []
        for part, table in zip(
            config.parts, _tables(spec, config.part_of, len(config.parts)), strict=True
        ):
            family = codec_class(part.kind)
            made.append(family._of(part, spec=table, **(learned if _learns(part) else {})))
        return cls(made, config.part_of, spec, given.get("base"))

    def _remade(self, **changes: Any) -> PerTensor:
        spec = changes.get("spec", self.spec)
        base = changes.get("base", self.base)
        parts: Sequence[Codec] = self.parts
        if "weights" in changes:
            parts = [p._remade(weights=changes["weights"]) if p.weights else p for p in parts]
        if spec is None or len(spec) != len(self.config.part_of):
            raise ConfigError("per_tensor: the parts belong to another tensor table")
        return PerTensor(parts, self.config.part_of, spec, base)


def _learns(config: CodecConfig) -> bool:
    """Whether codecs of this config have weights; of a chain its outer stage says so."""
    outer = getattr(config, "outer", None)
    if isinstance(outer, CodecConfig):
        return _learns(outer)
    return codec_class(config.kind).learned is True


def _tables(spec: UpdateSpec, part_of: Sequence[int], count: int) -> list[UpdateSpec]:
    """The tensor table of each part."""
    if len(part_of) != len(spec):
        raise ConfigError(
            f"per_tensor: expected a part for each of {len(spec)} tensors, got {len(part_of)}"
        )
    rows = list(zip(spec, part_of, strict=True))
    return [UpdateSpec(tuple(t for t, i in rows if i == part)) for part in range(count)]


def _bound(part: Codec, table: UpdateSpec, base: bytes | None) -> Codec:
    """A part bound to its own tensors."""
    if part.spec is not None and part.spec != table:
        raise ConfigError(
            f"per_tensor: {part} was made for {len(part.spec)} tensors, its group has {len(table)}"
        )
    return part.bind(table, base)


def _some(update: Update, part: Codec) -> dict[str, Tensor]:
    return {t.name: update[t.name] for t in part._known_spec(None) if t.name in update}
