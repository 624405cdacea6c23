"""The names that users type, and the check that every wire id has exactly one codec class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codec.kinds import KINDS
from gradcodec.codecs import (
    Autoencoder,
    BlockQuant,
    Cast,
    Identity,
    RotatedSign,
    Subspace,
    TopK,
)
from gradcodec.errors import ConfigError, HubError
from gradcodec.hub import bundled
from gradcodec.names import wrong_name
from gradcodec.ops import CHUNK
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.cast import CastConfig
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.per_tensor import PerTensor
from gradcodec.wire import CODEC_IDS

_CLASSES = {
    c.Config.kind: c
    for c in (
        *(Identity, Cast, BlockQuant, TopK, Subspace, Autoencoder, Chain, RotatedSign),
        PerTensor,
    )
}

if not set(_CLASSES) == set(KINDS) == set(CODEC_IDS):
    raise ImportError(f"codec classes {sorted(KINDS)} and wire ids {sorted(CODEC_IDS)} differ")

WHERE = "`gradcodec info` lists all"
"""What errors say of the names of all codecs."""

#: Codecs that need no fitting, by the name a user types.
UNTRAINED: dict[str, Callable[[], Codec]] = {
    "fp32": Identity,
    "fp16": lambda: Cast(CastConfig("float16")),
    "bf16": lambda: Cast(CastConfig("bfloat16")),
    "int8": lambda: BlockQuant(BlockQuantConfig(8)),
    "int4": lambda: BlockQuant(BlockQuantConfig(4)),
    "int2": lambda: BlockQuant(BlockQuantConfig(2)),
    "sign": lambda: BlockQuant(BlockQuantConfig(1)),
    "topk": lambda: TopK(TopKConfig()),
    "rotsign": RotatedSign,
    # The largest of every 4,096 rotated values, in the bytes of 1/4 and 1/8 of a bit a value.
    "rotsign-quarter": lambda: _peaks(128),
    "rotsign-eighth": lambda: _peaks(56),
    # "-rotated" has levels that fit a Gaussian and is meant for error feedback; "-unbiased" is
    # right on average and is meant for use without it.
    "int8-rotated": lambda: _rotated(8),
    "int4-rotated": lambda: _rotated(4),
    "int2-rotated": lambda: _rotated(2),
    "sign-rotated": lambda: _rotated(1),
    # Levels of a Gaussian that are not evenly spaced, after a rotation; "-64": a scale for every 64
    # values.
    "gauss4": lambda: _gaussian(CHUNK),
    "gauss4-64": lambda: _gaussian(64),
    "int8-unbiased": lambda: _unbiased(8),
    "int4-unbiased": lambda: _unbiased(4),
    "int2-unbiased": lambda: _unbiased(2),
}


def _rotated(bits: int) -> Codec:
    scale = {8: "absmax", 1: "l1"}.get(bits, "rms")
    return BlockQuant(BlockQuantConfig(bits, CHUNK, scale=scale, rotate=True))


def _unbiased(bits: int) -> Codec:
    config = BlockQuantConfig(bits, CHUNK, scale="absmax", rotate=True, stochastic=True)
    return BlockQuant(config)


def _peaks(kept: int) -> Codec:
    return RotatedSign(RotatedSignConfig(CHUNK, kept, which="largest"))


def _gaussian(block: int) -> Codec:
    return BlockQuant(BlockQuantConfig(4, block, rotate=True, levels="gaussian"))


def make_codec(name: str) -> Codec:
    """An untrained codec by name; ``ConfigError`` has the nearest names.

    Trained ones come from ``Codec.from_pretrained`` or ``gradcodec.tgap``.
    """
    if not isinstance(name, str) or name not in UNTRAINED:
        raise ConfigError(wrong_codec(name))
    return UNTRAINED[name]()


def wrong_codec(name: object, more: Iterable[str] = ()) -> str:
    """The text of an error about a codec's name; ``more``: what else could have been meant."""
    where = f"{WHERE}; fitted codecs are loaded by Codec.from_pretrained"
    return wrong_name("a codec name", name, (*UNTRAINED, *more), where)


def find_codec(name: str, revision: str | None = None) -> Codec:
    """An untrained codec by name, such as ``int4``, or what ``Codec.from_pretrained`` finds.

    Raises:
        HubError: there is no such codec, or a ``revision`` of one that is in no repository.
        ConfigError: its files do not fit together.
    """
    if name in UNTRAINED:
        if revision is not None:
            raise HubError(f"{name} needs no files; only a Hub repository has a {revision=}")
        return make_codec(name)
    try:
        return Codec.from_pretrained(name, revision=revision)
    except HubError as err:
        if Path(name).name != name or Path(name).exists():
            raise
        what = "a codec's name, its folder, or a Hub id 'user/name'"
        raise HubError(wrong_name(what, name, (*UNTRAINED, *bundled()), WHERE)) from err
