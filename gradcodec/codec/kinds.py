"""Which codec class a config's ``kind`` means."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, TypeVar

from gradcodec.errors import ConfigError
from gradcodec.names import wrong_name
from gradcodec.wire import CODEC_IDS

if TYPE_CHECKING:
    from gradcodec.codec.codec import Codec

C = TypeVar("C", bound="Codec")

KINDS: dict[str, type[Codec]] = {}


def register(cls: type[C]) -> type[C]:
    """Class decorator: enter a codec under its config's ``kind``."""
    KINDS[cls.Config.kind] = cls
    return cls


def codec_class(kind: str) -> type[Codec]:
    """The codec class registered under ``kind``; ``ConfigError`` if there is none.

    A class is registered when its module loads; whoever has imported this package alone has none.
    """
    if not KINDS.keys() >= CODEC_IDS.keys():
        for module in ("codecs", "chain", "per_tensor"):
            importlib.import_module(f"gradcodec.{module}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(wrong_name("a codec kind", kind, sorted(KINDS)))
    return KINDS[kind]
