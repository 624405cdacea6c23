"""Schemes for codecs that exist before the run: bundled, in a folder, on the Hub, or unfitted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError
from gradcodec.federated.config import ServerConfig
from gradcodec.recipes.schemes import SCHEMES, TRAINED, Scheme
from gradcodec.registry import find_codec, make_codec
from gradcodec.types import UpdateSpec


def load(names: Sequence[str], spec: UpdateSpec) -> dict[str, Codec]:
    """Codecs by the last part of their names, which names their schemes too.

    Args:
        names: what ``gradcodec inspect`` takes: ``rotsign``, a bundled name, a folder, a Hub id.
        spec: the adapter's tensors.

    Raises:
        HubError: there is no such codec.
        ConfigError: a codec is for other tensors, or two have the same last part.
    """
    found: dict[str, Codec] = {}
    for name in names:
        codec, key = find_codec(name), Path(name).name
        if key in found or key in SCHEMES or key in TRAINED:
            raise ConfigError(
                f"expected a codec whose last part names no other scheme, got {name!r}; "
                "rename its folder"
            )
        if codec.spec is not None and codec.spec != spec:
            raise ConfigError(
                f"the codec {name} is for {len(codec.spec)} tensors of {codec.spec.numel:,} "
                f"elements, this adapter has {len(spec)} of {spec.numel:,}"
                + ("" if codec.spec.numel != spec.numel else ", with other names or shapes")
                + "; its card says which model, rank and targets it was fitted for"
            )
        found[key] = codec
    return found


def scheme_of(key: str, codec: Codec) -> Scheme:
    """How a codec takes part: a fitted linear one is trained in, others encode updates.

    Broadcasts carry two bits for each code value of a fitted codec, rotated first, and four bits
    for each element otherwise.
    """
    if not codec.config.learned:
        return Scheme(key, key, lambda trained: (codec, make_codec("int4")))
    outer = codec.outer if isinstance(codec, Chain) else codec
    mode = "latent" if codec.linear else "post"
    return Scheme(
        key,
        f"{key}, {mode}",
        lambda trained: (codec, Chain(outer, make_codec("int2-rotated"))),
        ServerConfig(mode=mode),
        needs=(key,),
    )
