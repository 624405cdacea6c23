"""A codec made of codecs: each group of an update's tensors is encoded by its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gradcodec import wire
from gradcodec.codec import Codec, codec_class, register
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.packers.packer import Packer
from gradcodec.pipeline import Pipeline
from gradcodec.settings import CodecConfig
from gradcodec.transforms.transform import Transform
from gradcodec.types import TensorSpec, Update, UpdateSpec

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
    def learned(self) -> bool:
        """Whether one of the parts has weights."""
        return any(part.learned for part in self.parts)

    @property
    def stages(self) -> int:
        """One more than those of the deepest part."""
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


class PartsTransform(Transform):
    """The codes of the parts, concatenated; linear if all parts are."""

    kind = "per_tensor"

    def __init__(self, parts: Sequence[Codec], spec: UpdateSpec) -> None:
        super().__init__(spec)
        self.linear = all(p.linear for p in parts)  # type: ignore[misc]
        self.parts = tuple(parts)
        self.sizes = [p.code_numel() for p in parts]

    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """Sum over the parts."""
        self.table(spec)
        return sum(self.sizes)

    def to_code(self, update: Update, spec: UpdateSpec | None = None) -> Tensor:
        """The code of each part's tensors, concatenated."""
        self.table(spec)
        return torch.cat([p.transform.to_code(_some(update, p)) for p in self.parts])

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """Each part's tensors, in the table's order."""
        out: dict[str, Tensor] = {}
        for part, code in zip(self.parts, torch.split(z, self.sizes), strict=True):
            out.update(part.transform.from_code(code))
        return {t.name: out[t.name] for t in self.table(spec)}

    def pullback(self, z: Tensor, gradients: Update) -> Tensor:
        """Each part's pullback, concatenated."""
        codes = zip(self.parts, torch.split(z, self.sizes), strict=True)
        return torch.cat([p.transform.pullback(c, _some(gradients, p)) for p, c in codes])

    def step_scales(self) -> Tensor:
        """Each part's step scales, concatenated."""
        return torch.cat([p.transform.step_scales() for p in self.parts])


class PartsPacker(Packer):
    """Packs the concatenated code, each slice by its part; takes no other vector."""

    kind = "per_tensor"
    finite = True  # nothing to check here: parts that refuse NaN and Inf do so themselves

    def __init__(self, parts: Sequence[Codec], sizes: Sequence[int]) -> None:
        self._parts, self._sizes = parts, list(sizes)

    def nbytes(self, numel: int) -> int:
        """The size of the whole code.

        Raises:
            ConfigError: ``numel`` is not the length of the code.
        """
        if numel != sum(self._sizes):
            raise ConfigError(
                f"per_tensor: packs the {sum(self._sizes)} code values of named tensors, "
                f"not {numel}"
            )
        return sum(p.nbytes() for p in self._parts)

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        codes = zip(self._parts, torch.split(x, self._sizes), strict=True)
        body = b"".join(p.pipeline.pack_code(c, seed) for p, c in codes)
        return wire.raw_tensor(body, torch.uint8).to(x.device)

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        bodies = torch.split(body, [p.nbytes() for p in self._parts])
        codes = [
            p.pipeline.unpack_code(wire.raw_bytes(its), p.transform.table())
            for p, its in zip(self._parts, bodies, strict=True)
        ]
        return torch.cat(codes).to(body.device)


class PartsPipeline(Pipeline):
    """Each part encodes and decodes its own tensors; the bodies are concatenated."""

    def __init__(self, parts: Sequence[Codec], spec: UpdateSpec) -> None:
        transform = PartsTransform(parts, spec)
        super().__init__("per_tensor", transform, PartsPacker(parts, transform.sizes))
        self._parts = parts

    def place(self, device: torch.device) -> None:
        """Each part decodes there."""
        super().place(device)
        for part in self._parts:
            part.pipeline.place(device)

    def nbytes(self, spec: UpdateSpec | None = None) -> int:
        """Sum over the parts."""
        self.transform.table(spec)
        return sum(p.nbytes() for p in self._parts)

    def encode(self, update: Update, spec: UpdateSpec, seed: int) -> bytes:
        """The parts' bodies of their own tensors, concatenated."""
        return b"".join(
            p.pipeline.encode(_some(update, p), p.transform.table(), seed) for p in self._parts
        )

    def decode(self, body: bytes, spec: UpdateSpec) -> dict[str, Tensor]:
        """Each part's tensors, in the table's order."""
        out: dict[str, Tensor] = {}
        for part, its in zip(self._parts, self._bodies(body, spec), strict=True):
            out.update(part.pipeline.decode(its, part.transform.table()))
        return {t.name: out[t.name] for t in spec}

    def mean(
        self, bodies: Sequence[bytes], shares: Sequence[float], spec: UpdateSpec
    ) -> dict[str, Tensor]:
        """The mean of the updates; each part averages its own bodies."""
        out: dict[str, Tensor] = {}
        columns = zip(*(self._bodies(body, spec) for body in bodies), strict=True)
        for part, its in zip(self._parts, columns, strict=True):
            out.update(part.pipeline.mean(its, shares, part.transform.table()))
        return {t.name: out[t.name] for t in spec}

    def check_body(self, body: bytes, spec: UpdateSpec) -> None:
        """Check the length only; each part checks its own table."""
        self._check_length(body, spec)

    def _bodies(self, body: bytes, spec: UpdateSpec) -> list[bytes]:
        self._check_length(body, spec)
        out, at = [], 0
        for part in self._parts:
            size = part.nbytes()
            out.append(body[at : at + size])
            at += size
        return out


@register
class PerTensor(Codec):
    """Groups of tensors, each group with its own codec.

        update --by name--> group i --codec i--> body i      body = body 0 | body 1 | ...

    Tensors keep their order within a group. The code is the parts' codes, concatenated; it is
    linear if all parts are. At most one part has learned weights, which are then this codec's.
    """

    Config = PerTensorConfig
    config: PerTensorConfig
    any_dtype: ClassVar[bool] = True

    def __init__(
        self, parts: Sequence[Codec], part_of: Sequence[int], spec: UpdateSpec, base: bytes | None
    ) -> None:
        learned = [p for p in parts if p.config.learned]
        if len(learned) > 1:
            raise ConfigError("per_tensor: expected at most one part with learned weights")
        config = PerTensorConfig(tuple(p.config for p in parts), tuple(part_of))
        tables = _tables(spec, config.part_of, len(parts))
        self.parts = tuple(_bound(p, t, base) for p, t in zip(parts, tables, strict=True))
        super().__init__(
            config,
            spec=spec,
            base=base,
            weights=learned[0].weights if learned else None,
            weight_digests=learned[0]._given_digests if learned else None,
        )

    def _pipeline(self) -> Pipeline:
        assert self.spec is not None  # the constructor takes no codec without a table
        return PartsPipeline(self.parts, self.spec)

    @classmethod
    def of(cls, spec: UpdateSpec, groups: Iterable[tuple[Codec, Iterable[str]]]) -> PerTensor:
        """The codec of a tensor table, from groups of its tensors: ``(codec, names)``.

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
    def code_space(self) -> bytes:
        """Digest of the parts' code spaces."""
        rows = tuple(TensorSpec(p.code_space.hex(), (i,)) for i, p in enumerate(self.parts))
        return UpdateSpec(rows).digest

    @classmethod
    def from_config(cls, config: CodecConfig | Mapping[str, Any], **given: Any) -> Codec:
        """As ``Codec.from_config``; weights go to the learned part.

        Raises:
            ConfigError: there is no spec.
        """
        settings, spec = cls.Config.of(config), given.get("spec")
        if spec is None:
            raise ConfigError("per_tensor: a spec is needed; the parts belong to named tensors")
        learned = {n: given.get(n) for n in ("weights", "weight_digests")}
        tables = _tables(spec, settings.part_of, len(settings.parts))
        made = [
            codec_class(part.kind).from_config(part, spec=t, **(learned if part.learned else {}))
            for part, t in zip(settings.parts, tables, strict=True)
        ]
        return cls(made, settings.part_of, spec, given.get("base"))

    def _remade(self, **changes: Any) -> PerTensor:
        spec = changes.get("spec", self.spec)
        base = changes.get("base", self.base)
        parts: Sequence[Codec] = self.parts
        if "weights" in changes:
            parts = [p._remade(weights=changes["weights"]) if p.weights else p for p in parts]
        if spec is None or len(spec) != len(self.config.part_of):
            raise ConfigError("per_tensor: the parts belong to another tensor table")
        made = PerTensor(parts, self.config.part_of, spec, base)
        made.pipeline.place(self.pipeline.device)
        return made


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
    return {t.name: update[t.name] for t in part.transform.table() if t.name in update}
