"""Schemes for codecs that exist before the run: bundled, in a folder, on the Hub, or unfitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError
from gradcodec.federated.config import ServerConfig
from gradcodec.recipes.schemes import SCHEMES, TRAINED, Scheme
from gradcodec.registry import find_codec, make_codec
from gradcodec.types import UpdateSpec

RELAY = ":relay"
"""Behind a codec's name: its replies go down as they came (``ServerConfig.relay``)."""


@dataclass(frozen=True)
class Chosen:
    """A codec, and whether its replies are relayed."""

    codec: Codec
    relay: bool = False


def load(names: Sequence[str], spec: UpdateSpec) -> dict[str, Chosen]:
    """Codecs by the last part of their names, which names their schemes too.

    Args:
        names: what ``gradcodec inspect`` takes: ``rotsign``, a bundled name, a folder, a Hub id.
            With ``:relay`` behind it, the last part ends with ``-relayed``.
        spec: the adapter's tensors.

    Raises:
        HubError: there is no such codec.
        ConfigError: a codec is for other tensors, or two have the same last part.
    """
    found: dict[str, Chosen] = {}
    for given in names:
        name, relay = given.removesuffix(RELAY), given.endswith(RELAY)
        codec, key = find_codec(name), Path(name).name + ("-relayed" if relay else "")
        if key in found or key in SCHEMES or key in TRAINED:
            raise ConfigError(
                f"expected a codec whose last part names no other scheme, got {given!r}: leave "
                "out what comes twice, or rename its folder"
            )
        if codec.spec is not None and codec.spec != spec:
            raise ConfigError(
                f"the codec {name} is for {len(codec.spec)} tensors of {codec.spec.numel:,} "
                f"elements, this adapter has {len(spec)} of {spec.numel:,}"
                + ("" if codec.spec.numel != spec.numel else ", with other names or shapes")
                + "; its card says which model, rank and targets it was fitted for"
            )
        found[key] = Chosen(codec, relay)
    return found


def scheme_of(key: str, chosen: Chosen) -> Scheme:
    """How a codec takes part: a fitted linear one is trained in, others encode updates.

    Broadcasts carry the replies in a relay, else two bits for each code value of a fitted codec,
    rotated first, and four bits for each element of others.
    """
    codec, learned = chosen.codec, chosen.codec.config.learned
    mode = "latent" if learned and codec.linear else "post"
    down = codec if chosen.relay else make_codec("int4")
    if learned and not chosen.relay:
        outer = codec.outer if isinstance(codec, Chain) else codec
        down = Chain(outer, make_codec("int2-rotated"))
    return Scheme(
        key,
        f"{key}, {mode}" if learned else key,
        lambda trained: (codec, down),
        ServerConfig(mode=mode, relay=chosen.relay),
        needs=(key,) if learned else (),
    )
