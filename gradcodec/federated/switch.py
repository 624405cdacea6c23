"""New codecs as a part of a broadcast: from a given round on, everyone uses them.

    first u32, base 8 bytes, uplink digest 8 bytes, downlink digest 8 bytes,
    settings length u32, weights length u64, state length u64,
    settings (JSON), weights (a payload), state (a payload)

The weights are one ``identity`` payload with its tensor table, so only the wire format's own reader
parses them; they are no larger than their bytes and cannot run code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gradcodec.chain import ChainConfig
from gradcodec.codec import Codec, codec_class
from gradcodec.codecs import Identity
from gradcodec.errors import (
    CodecMismatchError,
    ConfigError,
    LimitError,
    MalformedBodyError,
    TrailingBytesError,
    TruncatedError,
    UpdateError,
)
from gradcodec.federated.replica import for_state, state_digest
from gradcodec.settings import CodecConfig
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload

_HEAD: Final = struct.Struct("<I8s8s8sIQQ")
MAX_SETTINGS_BYTES: Final = 1 << 16

#: Codec families that a broadcast may bring: linear ones whose cost depends on the tensors that
#: the receiver has anyway, and not on what the settings say.
KINDS: Final = frozenset({"identity", "cast", "blockquant", "topk", "rotsign", "subspace", "chain"})

_SETTINGS: Final = frozenset({"mode", "uplink", "downlink"})


@dataclass(frozen=True)
class Switch:
    """The codecs of a federation from round ``first`` on, relative to the state of that round.

    Attributes:
        first: the first round that they are used in.
        base: ``state_digest`` of the global state of that round. Updates are relative to that
            state, and a replica that holds another one is refused.
        digests: digests of the uplink and the downlink codec, bound to that state.
        settings: ``mode`` (of ``ServerConfig``), and the configs of ``uplink`` and ``downlink``.
        weights: payload of the weights that both codecs share; empty if they have none.
        state: payload of that state, for a client that does not have it; else empty.
    """

    first: int
    base: bytes
    digests: tuple[bytes, bytes]
    settings: Mapping[str, Any]
    weights: bytes = b""
    state: bytes = b""

    @classmethod
    def to(cls, uplink: Codec, downlink: Codec, mode: str, first: int, state: Update) -> Switch:
        """The switch to these codecs, which share weights, at the state of round ``first``."""
        ends = [for_state(codec, state) for codec in (uplink, downlink)]
        short = _short_names(uplink.weights, UpdateSpec.of(state))
        named = {short[n]: t for n, t in uplink.weights.items()}
        weights = Identity().encoder.encode(named).to_bytes() if named else b""
        settings = {
            "mode": mode,
            "uplink": uplink.config.to_dict(),
            "downlink": downlink.config.to_dict(),
        }
        return cls(first, state_digest(state), (ends[0].digest, ends[1].digest), settings, weights)

    @property
    def mode(self) -> str:
        """``"post"`` or ``"latent"``, as in ``ServerConfig``."""
        return str(self.settings["mode"])

    def to_bytes(self, state: Update | None = None) -> bytes:
        """The bytes of the part; give ``state`` for a client that does not have it."""
        settings = json.dumps(self.settings, sort_keys=True, separators=(",", ":")).encode()
        whole = self.state
        if state is not None:
            whole = Identity().bind(UpdateSpec.of(state)).encoder.encode(state).to_bytes()
        head = _HEAD.pack(
            self.first, self.base, *self.digests, len(settings), len(self.weights), len(whole)
        )
        return b"".join((head, settings, self.weights, whole))

    @classmethod
    def from_bytes(cls, blob: bytes) -> Switch:
        """Inverse of ``to_bytes``; nothing is built yet.

        Raises:
            WireError: the lengths do not match the bytes, or the settings are invalid.
        """
        if len(blob) < _HEAD.size:
            raise TruncatedError(f"codec: expected at least {_HEAD.size} bytes, got {len(blob)}")
        first, base, up, down, *lengths = _HEAD.unpack_from(blob)
        if lengths[0] > MAX_SETTINGS_BYTES:
            raise LimitError(
                f"codec: expected settings of at most {MAX_SETTINGS_BYTES} bytes, got {lengths[0]}"
            )
        whole = _HEAD.size + sum(lengths)
        if len(blob) < whole:
            raise TruncatedError(f"codec: expected {whole} bytes, got {len(blob)}")
        if len(blob) > whole:
            raise TrailingBytesError(f"codec ends at byte {whole}, got {len(blob)} bytes")
        parts, at = [], _HEAD.size
        for length in lengths:
            parts.append(bytes(blob[at : at + length]))
            at += length
        return cls(first, base, (up, down), _settings(parts[0]), parts[1], parts[2])

    def codecs(self, state: Update) -> tuple[Codec, Codec]:
        """Uplink and downlink codec, bound to the state of round ``first``.

        Raises:
            WireError: ``state`` is not that of ``base``; or the settings, weights and digests do
                not make codecs for these tensors.
        """
        base = state_digest(state)
        if base != self.base:
            raise CodecMismatchError(
                f"codec of round {self.first}: expected a state of digest {self.base.hex()}, "
                f"this replica's is {base.hex()}"
            )
        spec = UpdateSpec.of(state)
        weights = _weights(self.weights, spec)
        up, down = (
            _build(self.settings[end], spec=spec, base=base, weights=weights)
            for end in ("uplink", "downlink")
        )
        for codec, digest in zip((up, down), self.digests, strict=True):
            if codec.digest != digest:
                raise CodecMismatchError(
                    f"expected a codec of digest {digest.hex()}, settings and weights give "
                    f"{codec.digest.hex()} ({codec})"
                )
        if self.mode == "latent" and up.code_space != down.code_space:
            raise MalformedBodyError(f"latent mode: {up} and {down} differ in code space")
        return up, down

    def whole_state(self, spec: UpdateSpec) -> dict[str, Tensor] | None:
        """The state of round ``first``; ``None`` if the part does not hold it.

        Raises:
            WireError: it is damaged, of other tensors, or not finite.
        """
        if not self.state:
            return None
        state = Identity().bind(spec).decoder.decode(Payload.from_bytes(self.state))
        _check_finite(state, "state")
        return state


def _settings(text: bytes) -> dict[str, Any]:
    """Settings from strict JSON, which must have exactly the known keys."""
    try:
        settings = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:  # not UTF-8 is a ValueError too
        raise MalformedBodyError(f"codec: expected settings in JSON, got {text[:40]!r}") from err
    if not isinstance(settings, dict) or set(settings) != _SETTINGS:
        raise MalformedBodyError(f"codec: expected settings {sorted(_SETTINGS)}, got {text[:80]!r}")
    if settings["mode"] not in ("post", "latent"):
        raise MalformedBodyError(
            f"codec: expected mode 'post' or 'latent', got {settings['mode']!r}"
        )
    return settings


def _weights(blob: bytes, spec: UpdateSpec) -> dict[str, Tensor]:
    if not blob:
        return {}
    weights = Identity().decoder.decode(Payload.from_bytes(blob))
    _check_finite(weights, "weight")
    return {_long_name(n, spec): t for n, t in weights.items()}


def _short_names(names: Iterable[str], spec: UpdateSpec) -> dict[str, str]:
    """Weight names with a parameter's name at their end replaced by its position, ``#12``."""
    positions = {t.name: i for i, t in enumerate(spec)}
    short = {}
    for name in names:
        ends = [at + 1 for at, letter in enumerate(name) if letter == "."]
        cut = next((at for at in ends if name[at:] in positions), None)
        short[name] = name if cut is None else f"{name[:cut]}#{positions[name[cut:]]}"
    return short


def _long_name(short: str, spec: UpdateSpec) -> str:
    head, mark, position = short.rpartition(".#")
    if not mark or not (position.isascii() and position.isdigit() and len(position) < 10):
        return short
    at = int(position)
    if at >= len(spec):
        raise MalformedBodyError(f"codec: weight {short!r} of {len(spec)} parameters")
    return f"{head}.{spec.tensors[at].name}"


def _check_finite(tensors: Update, what: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MalformedBodyError(f"codec: {what} {name!r} holds NaN or Inf")


def _build(config: Any, **parts: Any) -> Codec:
    """Build a codec; it and all its stages must be of ``KINDS``."""
    try:
        kind = config.get("kind", "") if isinstance(config, dict) else ""
        settings = codec_class(kind).Config.from_dict(config)
        _check_kinds(settings)
        return codec_class(kind).from_config(settings, **parts)
    except (ConfigError, UpdateError) as err:
        raise MalformedBodyError(f"codec: its settings and weights make none: {err}") from err


def _check_kinds(config: CodecConfig) -> None:
    """Raise ``ConfigError`` unless all stages are of ``KINDS``."""
    if config.kind not in KINDS:
        raise ConfigError(f"expected a kind of {sorted(KINDS)}, got {config.kind!r}")
    if isinstance(config, ChainConfig):
        _check_kinds(config.outer)
        _check_kinds(config.inner)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key comes twice")
    return out


def _no_constant(value: str) -> Any:
    raise ValueError(f"{value} is not JSON")
