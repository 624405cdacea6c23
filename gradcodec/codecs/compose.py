"""Codecs made of codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gradcodec.codecs.base import Codec, CodecConfig, code_spec, codec_class, register
from gradcodec.errors import ConfigError
from gradcodec.types import Update, UpdateSpec


@dataclass(frozen=True)
class ChainConfig(CodecConfig):
    """Configs of the two stages: ``outer`` transforms, ``inner`` codes what comes out of it."""

    kind: ClassVar[str] = "chain"
    outer: CodecConfig
    inner: CodecConfig

    def to_dict(self) -> dict[str, Any]:
        """Nested plain JSON values."""
        return {"kind": self.kind, "outer": self.outer.to_dict(), "inner": self.inner.to_dict()}


@register
class Chain(Codec):
    """A transform followed by a codec for its code.

        update --outer.to_code--> z --inner--> body

    Linear when the outer codec is: a mean of payloads averages dequantised codes and transforms
    back once. Chains nest.
    """

    Config = ChainConfig
    config: ChainConfig

    def __init__(self, outer: Codec, inner: Codec) -> None:
        if inner.weights or inner.spec is not None:
            raise ConfigError(f"chain: the inner codec codes a bare vector; got {inner}")
        super().__init__(
            ChainConfig(outer.config, inner.config),
            spec=outer.spec,
            base=outer.base,
            weights=outer.weights,
            weight_digests=outer._given_digests,
        )
        self.outer = outer
        self.inner = inner

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether the outer codec's codes add."""
        return self.outer.linear

    @property
    def code_space(self) -> bytes:
        """The outer codec's."""
        return self.outer.code_space

    def code_numel(self, spec: UpdateSpec) -> int:
        """The outer codec's code size."""
        return self.outer.code_numel(spec)

    def to_code(self, update: Update) -> Tensor:
        """The outer codec's analysis."""
        return self.outer.to_code(update)

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """The outer codec's synthesis."""
        return self.outer.from_code(z, spec)

    def pullback(self, z: Tensor, gradients: Update) -> Tensor:
        """The outer codec's vector-Jacobian product."""
        return self.outer.pullback(z, gradients)

    def step_scales(self) -> Tensor:
        """The outer codec's step scales."""
        return self.outer.step_scales()

    def packed_nbytes(self, numel: int) -> int:
        """The inner codec's size for a code of ``numel`` values."""
        return self.inner.nbytes(code_spec(numel))

    def _pack(self, z: Tensor, seed: int) -> bytes:
        return self.inner._encode_body({"code": z}, code_spec(z.numel()), seed)

    def _unpack(self, body: bytes, numel: int) -> Tensor:
        return self.inner._checked_unpack(body, code_spec(numel))

    @classmethod
    def from_config(cls, data: Mapping[str, Any], **parts: Any) -> Codec:
        """Both stages from nested configs; the weights are the outer codec's."""
        unknown = sorted(set(data) - {"kind", "outer", "inner"})
        if unknown or not all(isinstance(data.get(k), Mapping) for k in ("outer", "inner")):
            raise ConfigError(f"chain: expected keys ['inner', 'outer'], got {sorted(data)}")
        outer, inner = (codec_class(str(data[k].get("kind"))) for k in ("outer", "inner"))
        return cls(outer.from_config(data["outer"], **parts), inner.from_config(data["inner"]))

    def _remade(self, **changes: Any) -> Chain:
        return Chain(self.outer._remade(**changes), self.inner)
