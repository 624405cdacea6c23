"""Codecs made of codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from torch import Tensor

from gradcodec.codecs.base import Codec, code_spec, codec_class, register
from gradcodec.codecs.settings import CodecConfig
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.types import Update, UpdateSpec

#: Chains in each other, the codec inside counted: for chains made in Python, folders and the wire.
MAX_STAGES: Final = 4


@dataclass(frozen=True)
class ChainConfig(CodecConfig):
    """Configs of the two stages: ``outer`` transforms, ``inner`` codes what comes out of it."""

    kind: ClassVar[str] = "chain"
    outer: CodecConfig
    inner: CodecConfig

    def __post_init__(self) -> None:
        for stage in (self.outer, self.inner):
            if not isinstance(stage, CodecConfig):
                raise ConfigError(f"chain: expected configs of two codecs, got {shown(stage)}")
        if self.stages > MAX_STAGES:
            raise ConfigError(f"chain: expected at most {MAX_STAGES} stages in each other")

    @property
    def stages(self) -> int:
        """The deeper of both, and this one."""
        return 1 + max(self.outer.stages, self.inner.stages)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain JSON values."""
        return {"kind": self.kind, "outer": self.outer.to_dict(), "inner": self.inner.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``: both stages from nested settings."""
        return cls._nested(data, 1)

    @classmethod
    def _nested(cls, data: Any, depth: int) -> Self:
        # Before anything deeper is looked at: a stranger's settings may nest without end.
        if depth >= MAX_STAGES:
            raise ConfigError(f"chain: expected at most {MAX_STAGES} stages in each other")
        keys = {"kind", "outer", "inner"}
        if (
            not isinstance(data, Mapping)
            or {"kind", *data} != keys
            or data.get("kind", cls.kind) != cls.kind
        ):
            came = list(data) if isinstance(data, Mapping) else data
            raise ConfigError(f"chain: expected keys {sorted(keys)}, got {shown(came)}")
        stages: list[CodecConfig] = []
        for stage in (data["outer"], data["inner"]):
            if not isinstance(stage, Mapping):
                raise ConfigError(f"chain: expected settings of a codec, got {shown(stage)}")
            config = codec_class(stage.get("kind", "")).Config
            if issubclass(config, ChainConfig):
                stages.append(config._nested(stage, depth + 1))
            else:
                stages.append(config.from_dict(stage))
        return cls(*stages)


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
        self.outer = outer
        self.inner = inner
        super().__init__(
            ChainConfig(outer.config, inner.config),
            spec=outer.spec,
            base=outer.base,
            weights=outer.weights,
            weight_digests=outer._given_digests,
        )

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether the outer codec's codes add."""
        return self.outer.linear

    @property
    def learned(self) -> bool:  # type: ignore[override]
        """Whether the outer codec has weights."""
        return self.outer.learned

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
    def _of(cls, config: CodecConfig, **parts: Any) -> Codec:
        assert isinstance(config, ChainConfig)
        outer, inner = (codec_class(stage.kind) for stage in (config.outer, config.inner))
        return cls(outer._of(config.outer, **parts), inner._of(config.inner))

    def _remade(self, **changes: Any) -> Chain:
        return Chain(self.outer._remade(**changes), self.inner)
