"""The base class of codecs: what one consists of, its sizes and its codes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gradcodec import hub, layout
from gradcodec.claims import check_weights
from gradcodec.codec.folder import folder_of, load
from gradcodec.codec.halves import Decoder, Encoder
from gradcodec.codec.pins import digest_of, payload_of, table_of
from gradcodec.encodable import check_tensor, shown
from gradcodec.errors import ConfigError, NonFiniteError
from gradcodec.packers.packer import Packer
from gradcodec.pipeline import Pipeline
from gradcodec.settings import CodecConfig
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec, checked_table
from gradcodec.wire import DIGEST_BYTES, Payload, tensor_digest


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
        pipeline: the transform and the packer, one after the other.
        transform: update to code and back.
        packer: code to bytes and back; hooks and collectives use it on bare vectors.

    Raises:
        ConfigError: ``base`` is not 8 bytes long; weights were given to a codec that has none, or
            they hold NaN or Inf or are not plain tensors.
        UpdateError: the table has tensors that this codec does not encode.
    """

    Config: ClassVar[type[CodecConfig]]
    any_dtype: ClassVar[bool] = False
    """Whether tensors of every dtype can be encoded, or floating ones only."""
    transform: Transform
    packer: Packer

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
        if base is not None and (type(base) is not bytes or len(base) != DIGEST_BYTES):
            raise ConfigError(
                f"{config.kind}: expected a base of {DIGEST_BYTES} bytes, got {shown(base)}"
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
        self.transform, self.packer = self.pipeline.transform, self.pipeline.packer

    @abstractmethod
    def _pipeline(self) -> Pipeline:
        """Build the transform and the packer from config, spec and weights."""

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
        return self.pipeline.nbytes(spec)

    # -- codes: what federated averaging and training in code space work on -------------------

    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """Number of code values ``m`` for an update of this spec."""
        return self.transform.code_numel(spec)

    def to_code(self, update: Update) -> Tensor:
        """Update -> code ``z`` ``[m]``, fp32."""
        return self.transform.to_code(update, checked_table(update, self.spec))

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """Code ``z`` ``[m]`` -> update; differentiable in ``z``."""
        return self.transform.from_code(z, spec)

    def write_code(self, z: Tensor, *, seed: int = 0) -> Payload:
        """Pack a given code instead of an update; the codec must be bound.

        Raises:
            ConfigError: the codec is not bound, or the code has the wrong length.
            NonFiniteError: NaN or Inf given to a lossy codec.
        """
        table = self.transform.table()
        check_tensor("code", z)
        m = self.code_numel()
        if z.numel() != m:
            raise ConfigError(f"{self.config.kind}: expected a code of {m} values, got {z.numel()}")
        z = z.detach().float()
        try:
            return payload_of(self, self.pipeline.pack_code(z, seed), table)
        except NonFiniteError:
            layout.check_finite(z, "code")
            raise

    def read_code(self, payload: Payload) -> Tensor:
        """The dequantised code ``z`` ``[m]`` of a payload, fp32."""
        spec = table_of(self, payload)
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
        return digest_of(self.config, self.spec, self.weight_digests)

    @property
    def code_space(self) -> bytes:
        """Digest of what code values mean: codecs that share it can add each other's codes."""
        table = self.transform.table()
        return self.digest if self.config.learned else table.digest

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
        moved.pipeline.place(torch.device(device))
        return moved

    @classmethod
    def from_config(cls, config: CodecConfig | Mapping[str, Any], **parts: Any) -> Codec:
        """Codec of a config, or of ``config.to_dict()``; ``parts`` go to the constructor."""
        return cls(cls.Config.of(config), **parts)

    def _remade(self, **changes: Any) -> Self:
        parts: dict[str, Any] = {"spec": self.spec, "base": self.base, "weights": self.weights}
        digests = {"weight_digests": self._given_digests}
        made = type(self)(self.config, **{**parts, **digests, **changes})
        made.pipeline.place(self.pipeline.device)
        return made

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self.config).items())
        bound = (
            "" if self.spec is None else f", {len(self.spec)} tensors, {self.spec.numel} elements"
        )
        return f"{type(self).__name__}({fields}{bound})"

    # -- files ---------------------------------------------------------------------------------

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
        return load(name, revision, half)

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and a card ``README.md`` into ``folder``.

        Set ``codec.notes`` first to say what the codec was fitted on; it goes into the config and
        the card. A codec that is in the folder already is replaced.

        Raises:
            ConfigError: only one half is loaded, weights have changed, or files of these names are
                there that are no codec's, such as those of a model.
            HubError: the folder cannot be written.
        """
        hub.write(folder, folder_of(self), card=card)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish on the Hugging Face Hub with a generated card; options: see ``hub.push``."""
        return hub.push(repo_id, folder_of(self), **options)
