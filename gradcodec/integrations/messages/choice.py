"""Codecs as plain JSON values, which stacks can write into their own configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradcodec.codec import Codec, codec_class
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.registry import find_codec, make_codec
from gradcodec.settings import CodecConfig

AUTO = "subspace:auto"
"""No codec but a way to find one, of a server that fits it on replies and sends it."""


def codec_of(choice: str | dict[str, Any]) -> Codec:
    """The codec of a choice.

    Raises:
        HubError: there is none of this name.
        ConfigError: the settings or the folder make none.
    """
    if isinstance(choice, dict):
        return codec_class(choice["kind"]).from_config(choice)
    return find_codec(choice)


def plain_choice(codec: object) -> str | dict[str, Any]:
    """A choice of a codec as a plain JSON value: a name, a folder, a Hub id, or settings.

    Names and settings are tried at once, so that a slip of the pen costs no run. What has a
    ``/`` may be a folder that only the other machines have.

    Raises:
        ConfigError: it is something else, or settings that make no codec.
        HubError: there is no codec of this name.
    """
    if codec == AUTO:
        raise ConfigError(
            f"{AUTO!r} fits its codec on replies, which takes a server of its own: Flower's "
            f"CodecFedAvg({AUTO!r}) or gradcodec.federated.AutoServer"
        )
    if isinstance(codec, CodecConfig):
        codec = codec.to_dict()
    if isinstance(codec, Mapping):
        if codec.get("kind"):
            codec_of(dict(codec))
            return dict(codec)
    elif isinstance(codec, str) and codec:
        if Path(codec).name == codec:
            codec_of(codec)
        return codec
    raise ConfigError(
        f"expected a codec's name, config, folder or Hub id, got {shown(codec)}; of a codec "
        "without weights pass codec.config; save others by codec.save_pretrained(folder)"
    )


def plain_rules(rules: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rules as plain JSON values.

    Raises:
        ConfigError: they are not pairs of a pattern and the name of a codec without weights.
    """
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not (pair and all(type(part) is str for part in rule)):
            raise ConfigError(f"expected rules as (pattern, codec name) pairs, got {shown(rule)}")
        make_codec(rule[1])
    return [list(rule) for rule in rules]
