"""Base class of codecs: a transform, a packer behind it, and a digest that every payload carries.

update --transform.to_code--> z --packer.pack--> body --> Payload       (Encoder)
update <-transform.from_code- z <-packer.unpack- body <-- Payload       (Decoder)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from gradcodec import hub, layout, wire
from gradcodec.claims import check_claim, check_weights
from gradcodec.encodable import check_tensor, check_update, shown
from gradcodec.errors import CodecMismatchError, ConfigError, NonFiniteError, UpdateError
from gradcodec.packers.packer import Packer
from gradcodec.pipeline import Pipeline
from gradcodec.settings import CodecConfig
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload, tensor_digest

C = TypeVar("C", bound="Codec")

_KINDS: dict[str, type[Codec]] = {}


def register(cls: type[C]) -> type[C]:
    """Class decorator: enter a codec under its config's ``kind``."""
    _KINDS[cls.Config.kind] = cls
    return cls


def codec_class(kind: str) -> type[Codec]:
    """The codec class registered under ``kind``; ``ConfigError`` if there is none."""
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"expected a codec kind of {sorted(_KINDS)}, got {shown(kind)}")
    return _KINDS[kind]


class Codec(ABC):
    """A codec: ``encoder`` turns an update into a ``Payload``, ``decoder`` turns it back.

    Args:
        config: the frozen settings.
        spec: the update's tensor table. With it the codec is *bound*: its payloads carry no table,
            only the digest. An unbound codec takes any update and sends the table along.
        base: 8-byte digest of the state that updates are relative to (a base model, an initial
            state). If set, every payload carries it and the decoder checks it.
        weights: learned tensors by name; names start with ``encoder.``, ``decoder.`` or
            ``shared.`` so that one half can be loaded alone.
        weight_digests: hex SHA-256 by weight name, given when only one half's weights are loaded:
            the codec's digest covers both halves.

    Attributes:
        pipeline: the transform and the packer.

    Raises:
        ConfigError: ``base`` is not 8 bytes long; weights were given to a codec that has none, or
            they hold NaN or Inf or are not plain tensors.
        UpdateError: the table has tensors that this codec does not encode.
    """

    Config: ClassVar[type[CodecConfig]]
    any_dtype: ClassVar[bool] = False
    """Whether tensors of every dtype can be encoded, or floating ones only."""

    def __init__(
        self,
        config: CodecConfig,
        *,
        spec: UpdateSpec | None = None,
        base: bytes | None = None,
        weights: Mapping[str, Tensor] | None = None,
        weight_digests: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(config, CodecConfig) or config.kind != self.Config.kind:
            raise ConfigError(f"{self.Config.kind}: expected its config, got {shown(config)}")
        if spec is not None and not isinstance(spec, UpdateSpec):
            raise ConfigError(
                f"{config.kind}: expected an UpdateSpec to bind to, got {type(spec).__name__}; "
                "pass UpdateSpec.of(update)"
            )
        if base is not None and (type(base) is not bytes or len(base) != wire.DIGEST_BYTES):
            raise ConfigError(
                f"{config.kind}: expected a base of {wire.DIGEST_BYTES} bytes, got {shown(base)}"
            )
        if spec is not None and not self.any_dtype:
            layout.check_floating(spec)
        self.config = config
        self.spec = spec
        self.base = base
        self.weights: dict[str, Tensor] = dict(weights or {})
        check_weights(config.kind, self.weights, config.learned)
        self._given_digests = dict(weight_digests) if weight_digests is not None else None
        self.notes: str | None = None
        self.pipeline = self._pipeline()

    @abstractmethod
    def _pipeline(self) -> Pipeline:
        """Build the transform and the packer from config, spec and weights."""

    @property
    def transform(self) -> Transform:
        """Update to code and back."""
        return self.pipeline.transform

    @property
    def packer(self) -> Packer:
        """Code to bytes and back; hooks and collectives use it on bare vectors."""
        return self.pipeline.packer

    @property
    def encoder(self) -> Encoder:
        """The client's half."""
        return Encoder(self)

    @property
    def decoder(self) -> Decoder:
        """The server's half."""
        return Decoder(self)

    @property
    def linear(self) -> bool:
        """Whether codes add: ``from_code(a) + from_code(b) == from_code(a + b)``."""
        return self.transform.linear

    def nbytes(self, spec: UpdateSpec | None = None) -> int:
        """Exact body size for an update of this spec, known before encoding."""
        return self.pipeline.nbytes(self._known_spec(spec))

    # -- codes: what federated averaging and training in code space work on -------------------

    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """Number of code values ``m`` for an update of this spec."""
        return self.transform.code_numel(spec)

    def to_code(self, update: Update) -> Tensor:
        """Update -> code ``z`` ``[m]``, fp32."""
        return self.transform.to_code(update, self._spec_of(update))

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """Code ``z`` ``[m]`` -> update; differentiable in ``z``."""
        return self.transform.from_code(z, spec)

    def write_code(self, z: Tensor, *, seed: int = 0) -> Payload:
        """Pack a given code instead of an update; the codec must be bound.

        Raises:
            ConfigError: the codec is not bound, or the code has the wrong length.
            NonFiniteError: NaN or Inf given to a lossy codec.
        """
        spec = self._known_spec(None)
        check_tensor("code", z)
        m = self.code_numel(spec)
        if z.numel() != m:
            raise ConfigError(f"{self.config.kind}: expected a code of {m} values, got {z.numel()}")
        z = z.detach().float()
        try:
            return self._payload(self.pipeline.pack_code(z, seed))
        except NonFiniteError:
            layout.check_finite(z, "code")
            raise

    def read_code(self, payload: Payload) -> Tensor:
        """The dequantised code ``z`` ``[m]`` of a payload, fp32."""
        spec = self._open(payload)
        return self.pipeline.unpack_code(payload.body, spec)

    # -- identity: what a payload pins --------------------------------------------------------

    @cached_property
    def weight_digests(self) -> dict[str, str]:
        """Hex SHA-256 of every weight's dtype, shape and bytes, both halves' weights included."""
        mine = {name: tensor_digest(t) for name, t in self.weights.items()}
        return mine if self._given_digests is None else {**self._given_digests, **mine}

    @cached_property
    def digest(self) -> bytes:
        """8 bytes of SHA-256 over config, bound tensor table and weights; pinned by payloads."""
        identity = {
            "config": self.config.to_dict(),
            "spec": None if self.spec is None else self.spec.digest.hex(),
            "weights": self.weight_digests,
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()[: wire.DIGEST_BYTES]

    @property
    def code_space(self) -> bytes:
        """Digest of what code values mean: codecs that share it can add each other's codes."""
        spec = self._known_spec(None)
        return self.digest if self.config.learned else spec.digest

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weights: what a participant downloads once."""
        return sum(t.numel() * t.element_size() for t in self.weights.values())

    # -- the same codec with other parts ------------------------------------------------------

    def bind(self, spec: UpdateSpec, base: bytes | None = None) -> Self:
        """The same codec for one tensor table (and base): smaller payloads, stricter checks."""
        return self._remade(spec=spec, base=base)

    def to(self, device: torch.device | str) -> Self:
        """The same codec with its weights on ``device``, where it also decodes.

        Updates are encoded on the device that they are on. Kernels compute on CUDA devices.
        """
        moved = self._remade(weights={n: t.to(device) for n, t in self.weights.items()})
        moved._place(torch.device(device))
        return moved

    @classmethod
    def from_config(cls, config: CodecConfig | Mapping[str, Any], **parts: Any) -> Codec:
        """Codec of a config, or of ``config.to_dict()``; ``parts`` go to the constructor."""
        return cls(cls._settings(config), **parts)

    @classmethod
    def _settings(cls, config: CodecConfig | Mapping[str, Any]) -> Any:
        return config if isinstance(config, CodecConfig) else cls.Config.from_dict(config)

    def _remade(self, **changes: Any) -> Self:
        parts: dict[str, Any] = {"spec": self.spec, "base": self.base, "weights": self.weights}
        digests = {"weight_digests": self._given_digests}
        made = type(self)(self.config, **{**parts, **digests, **changes})
        made._place(self.pipeline.device)
        return made

    def _place(self, device: torch.device) -> None:
        self.pipeline.device = device

    def _known_spec(self, spec: UpdateSpec | None) -> UpdateSpec:
        if spec is None:
            spec = self.spec
        if spec is None:
            raise ConfigError(f"{self.config.kind}: not bound to a tensor table; call .bind(spec)")
        return spec

    def _spec_of(self, update: Update) -> UpdateSpec:
        if self.spec is None:
            check_update(update)
            return UpdateSpec.of(update)
        self.spec.check(update)
        return self.spec

    def _payload(self, body: bytes, spec: UpdateSpec | None = None) -> Payload:
        return Payload(self.config.kind, self.digest, body, spec, self.base)

    def _open(self, payload: Payload) -> UpdateSpec:
        """Check that a payload is this codec's, and only then read its tensor table."""
        if not isinstance(payload, Payload):
            raise ConfigError(
                f"expected a Payload, got {type(payload).__name__}; of bytes that came, pass "
                "Payload.from_bytes(blob)"
            )
        if payload.codec != self.config.kind:
            raise CodecMismatchError(f"expected codec {self.config.kind!r}, got {payload.codec!r}")
        if payload.digest != self.digest:
            raise CodecMismatchError(
                f"expected codec digest {self.digest.hex()} ({self}), got {payload.digest.hex()}: "
                "its config, weights or tensor table differ"
            )
        if self.base is not None and payload.base != self.base:
            came = None if payload.base is None else payload.base.hex()
            raise CodecMismatchError(f"expected an update of base {self.base.hex()}, got {came}")
        if payload.has_table == (self.spec is not None):
            have = "one" if payload.has_table else "none"
            raise CodecMismatchError(f"{self}: tensor table in the payload: {have}")
        return self._known_spec(payload.spec)

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self.config).items())
        bound = (
            "" if self.spec is None else f", {len(self.spec)} tensors, {self.spec.numel} elements"
        )
        return f"{type(self).__name__}({fields}{bound})"

    # -- files: hub reads and writes them and knows nothing of codecs --------------------------

    @staticmethod
    def from_pretrained(
        name: str | Path, *, revision: str | None = None, half: str | None = None
    ) -> Codec:
        """Load a codec by bundled name, local folder or Hub repository id.

        Args:
            name: tried in this order: a bundled codec, an existing folder, a Hub repository id.
            revision: branch, tag or commit of the Hub repository.
            half: ``"encoder"`` or ``"decoder"`` to load only that half's weights.

        Raises:
            HubError: the folder or repository cannot be read, or its files do not fit together.
            ConfigError: the config has an unknown kind, version or key, its weights do not fit, or
                its table claims more than ``MAX_EXPANSION`` allows.
        """
        folder = hub.read(name, revision=revision, half=half)
        parts = {"spec": folder.spec, "weights": folder.weights, "weight_digests": folder.digests}
        try:
            codec = codec_class(folder.kind).from_config(folder.config, **parts)
            if codec.spec is not None:
                check_claim(codec.config.kind, codec.spec, codec.nbytes())
        except (ConfigError, UpdateError) as err:
            raise ConfigError(f"{name}: {err}") from err
        folder.check_digest(codec.digest)
        codec.notes = folder.notes
        return codec

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and a card ``README.md`` into ``folder``.

        Set ``codec.notes`` first to say what the codec was fitted on; it goes into the config and
        the card.
        """
        hub.write(folder, self._folder(), card=card)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish on the Hugging Face Hub with a generated card; options: see ``hub.push``."""
        return hub.push(repo_id, self._folder(), **options)

    def _folder(self) -> hub.Folder:
        if self.spec is not None:
            check_claim(self.config.kind, self.spec, self.nbytes())
        return hub.Folder(
            self.config.to_dict(),
            self.spec,
            self.weights,
            self.weight_digests,
            self.digest,
            self.notes,
        )


class Encoder:
    """The client's half of a codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    @torch.no_grad()
    def encode(self, update: Update, *, seed: int = 0) -> Payload:
        """Encode named tensors; ``update`` is not modified.

        Args:
            update: tensors by name; for a bound codec exactly those of its table.
            seed: for codecs that round stochastically; equal seeds give equal bytes.

        Raises:
            UpdateError: names, shapes or dtypes do not fit.
            NonFiniteError: NaN or Inf given to a lossy codec.
        """
        spec = self.codec._spec_of(update)
        body = self.codec.pipeline.encode(update, spec, seed)
        return self.codec._payload(body, None if self.codec.spec is not None else spec)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Encoder:
        """Load the encoder half alone."""
        return cls(Codec.from_pretrained(name, revision=revision, half="encoder"))


class Decoder:
    """The server's half of a codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    @torch.no_grad()
    def decode(self, payload: Payload) -> dict[str, Tensor]:
        """Restore an update: same names, shapes and dtypes, in the same order.

        Raises:
            CodecMismatchError: the payload is of another codec, other weights or another base.
            MalformedBodyError: the body cannot come from this codec's encoder.
        """
        spec = self.codec._open(payload)
        return self.codec.pipeline.decode(payload.body, spec)

    @torch.no_grad()
    def decode_mean(
        self, payloads: Sequence[Payload], weights: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Weighted mean of updates, ``sum_i w_i x_i / sum_i w_i``, added in payload order in fp32.

        Linear codecs average codes and decode once; others decode each payload.

        Raises:
            ConfigError: there is no payload, or not one positive finite weight for each.
        """
        payloads = list(payloads)
        shares = mean_shares(len(payloads), weights)
        codec = self.codec
        spec = codec._open(payloads[0])
        if any(codec._open(payload) != spec for payload in payloads[1:]):
            raise CodecMismatchError("the payloads of one mean must share their tensor table")
        return codec.pipeline.mean([payload.body for payload in payloads], shares, spec)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Decoder:
        """Load the decoder half alone."""
        return cls(Codec.from_pretrained(name, revision=revision, half="decoder"))


def mean_shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Weights normalised to sum to one; ``ConfigError`` unless they are ``count`` positive ones."""
    if count == 0:
        raise ConfigError("a mean needs at least one payload")
    given = [1.0] * count if weights is None else list(weights)
    try:
        given = [float(w) for w in given]
    except (TypeError, ValueError, OverflowError) as err:
        raise ConfigError(f"expected {count} positive finite weights, got {shown(given)}") from err
    if len(given) != count or not all(w > 0 and math.isfinite(w) for w in given):
        raise ConfigError(f"expected {count} positive finite weights, got {shown(given)}")
    total = sum(given)
    return [w / total for w in given]
