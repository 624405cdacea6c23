"""What all filters share: a codec by name, loaded once, and log lines about bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext

from gradcodec.codec import Codec, codec_class
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.integrations.nvflare.coding import Coding
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.settings import CodecConfig
from gradcodec.types import Update, UpdateSpec


class CodecFilter(DXOFilter):
    """A filter with a codec.

    NVFLARE's job API writes a filter's arguments into the job's JSON by reading attributes of the
    same names; so those hold plain JSON values.

    Args:
        data_kinds: kinds of DXO that it is given.
        codec: a codec's name, config, folder or Hub id.
        rules: ``(pattern, codec name)`` by tensor name.

    Raises:
        ConfigError: an argument is of another kind.
    """

    def __init__(
        self,
        data_kinds: list[str],
        codec: str | CodecConfig | Mapping[str, Any],
        rules: Sequence[Sequence[str]],
    ) -> None:
        super().__init__(supported_data_kinds=data_kinds, data_kinds_to_filter=data_kinds)
        self.codec = _plain(codec)
        self.rules = _plain_rules(rules)

    @cached_property
    def coding(self) -> Coding:
        """The codec; it is loaded when the first message comes."""
        return Coding(_codec(self.codec), tuple((pattern, name) for pattern, name in self.rules))

    def log_sizes(
        self, fl_ctx: FLContext, what: str, tensors: Update, parts: Mapping[str, bytes]
    ) -> None:
        """Log the bytes of tensors and of their parts."""
        dense, sent = UpdateSpec.of(tensors).nbytes, sum(map(len, parts.values()))
        ratio = f" ({dense / sent:.1f}x)" if sent else ""
        self.log_info(fl_ctx, f"{what}: {dense} bytes as {sent}{ratio}")


def _codec(choice: str | dict[str, Any]) -> Codec:
    if isinstance(choice, dict):
        return codec_class(choice["kind"]).from_config(choice)
    return make_codec(choice) if choice in UNTRAINED else Codec.from_pretrained(choice)


def _plain(codec: object) -> str | dict[str, Any]:
    if isinstance(codec, CodecConfig):
        codec = codec.to_dict()
    if isinstance(codec, Mapping):
        if codec.get("kind"):
            return dict(codec)
    elif isinstance(codec, str) and codec:
        return codec
    raise ConfigError(
        f"expected a codec's name, config, folder or Hub id, got {shown(codec)}; of a codec "
        "without weights pass codec.config; save others by codec.save_pretrained(folder)"
    )


def _plain_rules(rules: Sequence[Sequence[str]]) -> list[list[str]]:
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not (pair and all(type(part) is str for part in rule)):
            raise ConfigError(f"expected rules as (pattern, codec name) pairs, got {shown(rule)}")
    return [list(rule) for rule in rules]
