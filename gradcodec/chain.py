"""A chain: the transform of one codec with the packer of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from gradcodec.codec import Codec, codec_class, register
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.pipeline import Pipeline
from gradcodec.settings import CodecConfig

#: How deep chains may be nested, counting the innermost codec. The limit is the same for chains
#: made in Python, read from a folder or received over the wire.
MAX_STAGES: Final = 4


@dataclass(frozen=True)
class ChainConfig(CodecConfig):
    """Configs of the two stages: ``outer`` transforms, ``inner`` packs the resulting code."""

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
    def learned(self) -> bool:
        """Whether the outer codec has weights."""
        return self.outer.learned

    @property
    def stages(self) -> int:
        """One more than the deeper of the two configs."""
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
        # Checked before anything deeper is read: a stranger's settings may nest without end.
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
    """The transform of ``outer``, then the packer of ``inner``.

        update --outer.transform--> z --inner.packer--> body

    A chain is linear if the outer transform is: the mean of payloads is then taken over dequantised
    codes and transformed back once. Chains nest.

    Raises:
        ConfigError: ``inner`` has weights or a tensor table, so it cannot pack a bare vector.
    """

    Config = ChainConfig
    config: ChainConfig

    def __init__(self, outer: Codec, inner: Codec) -> None:
        for codec in (outer, inner):
            if not isinstance(codec, Codec):
                raise ConfigError(f"chain: expected two codecs, got {shown(codec)}")
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

    def _pipeline(self) -> Pipeline:
        return Pipeline(self.config.kind, self.outer.transform, self.inner.packer)

    @property
    def code_space(self) -> bytes:
        """The outer codec's code space."""
        return self.outer.code_space

    @classmethod
    def from_config(cls, config: CodecConfig | Mapping[str, Any], **parts: Any) -> Codec:
        """As ``Codec.from_config``; ``parts`` go to the outer codec."""
        settings = cls.Config.of(config)
        outer = codec_class(settings.outer.kind).from_config(settings.outer, **parts)
        return cls(outer, codec_class(settings.inner.kind).from_config(settings.inner))

    def _remade(self, **changes: Any) -> Chain:
        made = Chain(self.outer._remade(**changes), self.inner)
        made.pipeline.place(self.pipeline.device)
        return made
