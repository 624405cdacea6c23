"""What a payload says about the codec that made it, and the check of it before decoding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradcodec.errors import CodecMismatchError, ConfigError
from gradcodec.settings import CodecConfig
from gradcodec.types import UpdateSpec
from gradcodec.wire import DIGEST_BYTES, Payload

if TYPE_CHECKING:
    from gradcodec.codec.codec import Codec


def digest_of(
    config: CodecConfig, spec: UpdateSpec | None, weight_digests: Mapping[str, str]
) -> bytes:
    """8 bytes of SHA-256 over config, bound tensor table and weights."""
    identity = {
        "config": config.to_dict(),
        "spec": None if spec is None else spec.digest.hex(),
        "weights": dict(weight_digests),
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def payload_of(codec: Codec, body: bytes, spec: UpdateSpec) -> Payload:
    """A body as a payload; the table ``spec`` travels along if the codec is not bound to it."""
    table = spec if codec.spec is None else None
    return Payload(codec.config.kind, codec.digest, body, table, codec.base)


def table_of(codec: Codec, payload: Payload) -> UpdateSpec:
    """Check that a payload is this codec's, and only then read its tensor table.

    Raises:
        ConfigError: it is not a ``Payload``.
        CodecMismatchError: it is of another codec, other weights or another base.
        WireError: its table cannot be read.
    """
    if not isinstance(payload, Payload):
        raise ConfigError(
            f"expected a Payload, got {type(payload).__name__}; of bytes that came, pass "
            "Payload.from_bytes(blob)"
        )
    kind = codec.config.kind
    if payload.codec != kind:
        raise CodecMismatchError(f"expected codec {kind!r}, got {payload.codec!r}")
    if payload.digest != codec.digest:
        raise CodecMismatchError(
            f"expected codec digest {codec.digest.hex()} ({codec}), got {payload.digest.hex()}: "
            "its config, weights or tensor table differ"
        )
    if codec.base is not None and payload.base != codec.base:
        came = None if payload.base is None else payload.base.hex()
        raise CodecMismatchError(f"expected an update of base {codec.base.hex()}, got {came}")
    if payload.has_table == (codec.spec is not None):
        have = "one" if payload.has_table else "none"
        raise CodecMismatchError(f"{codec}: tensor table in the payload: {have}")
    return codec.transform.table(payload.spec)
