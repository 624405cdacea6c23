"""What all filters share: a codec by name, loaded once, and log lines about bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext

from gradcodec.integrations.messages.choice import codec_of, plain_choice, plain_rules
from gradcodec.integrations.messages.coding import Coding
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
        ConfigError: an argument is of another kind, or settings that make no codec.
        HubError: there is no codec of this name.
    """

    def __init__(
        self,
        data_kinds: list[str],
        codec: str | CodecConfig | Mapping[str, Any],
        rules: Sequence[Sequence[str]],
    ) -> None:
        super().__init__(supported_data_kinds=data_kinds, data_kinds_to_filter=data_kinds)
        self.codec = plain_choice(codec)
        self.rules = plain_rules(rules)
        self._keeping: tuple[frozenset[str], Coding] | None = None

    @cached_property
    def coding(self) -> Coding:
        """The codec; it is loaded when the first message comes."""
        return Coding(codec_of(self.codec), tuple((pattern, name) for pattern, name in self.rules))

    def coding_that_keeps(self, names: Collection[str]) -> Coding:
        """The same codec; tensors of these names travel bit for bit."""
        if self._keeping is None or self._keeping[0] != frozenset(names):
            plain = self.coding
            self._keeping = frozenset(names), Coding(plain.codec, plain.rules, names)
        return self._keeping[1]

    def log_sizes(
        self, fl_ctx: FLContext, what: str, tensors: Update, parts: Mapping[str, bytes]
    ) -> None:
        """Log the bytes of tensors and of their parts."""
        dense, sent = UpdateSpec.of(tensors).nbytes, sum(map(len, parts.values()))
        ratio = f" ({dense / sent:.1f}x)" if sent else ""
        self.log_info(fl_ctx, f"{what}: {dense} bytes as {sent}{ratio}")
