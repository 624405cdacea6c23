"""The codecs that users name: which transform goes with which packer.

    Identity, Cast                  each tensor separately
    BlockQuant, TopK, RotatedSign   all values as one vector, and a packer
    Subspace, Autoencoder           a learned transform, and its code in fp32

``gradcodec.packers`` and ``gradcodec.transforms`` describe what they do.
``Chain`` puts any of the packers behind any of the transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradcodec.codec import Codec, register
from gradcodec.packers.blockquant import BlockQuantConfig, BlockQuantPacker
from gradcodec.packers.cast import CastConfig, CastPacker
from gradcodec.packers.raw import IdentityConfig, RawPacker
from gradcodec.packers.rotpeaks import RotatedPeaksPacker
from gradcodec.packers.rotsign import RotatedSignConfig, RotatedSignPacker
from gradcodec.packers.topk import TopKConfig, TopKPacker
from gradcodec.pipeline import Pipeline, TensorPipeline
from gradcodec.settings import CodecConfig
from gradcodec.transforms.autoencoder import transform as networks
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.autoencoder.halves import build_nets
from gradcodec.transforms.identity import IdentityTransform
from gradcodec.transforms.subspace import transform as subspaces
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import UpdateSpec


class _Untrained(Codec):
    """A codec without weights; its config has defaults for everything."""

    def __init__(self, config: CodecConfig | None = None, **parts: Any) -> None:
        super().__init__(self.Config() if config is None else config, **parts)


@register
class Identity(_Untrained):
    """Raw little-endian values, tensor after tensor. Lossless and bitwise, NaN included.

    update --values--> body
    """

    Config = IdentityConfig
    any_dtype: ClassVar[bool] = True

    def _pipeline(self) -> Pipeline:
        return TensorPipeline(self.config.kind, self.spec, RawPacker())


@register
class Cast(Identity):
    """Floating tensors wider than 16 bits in fp16 or bf16; other dtypes travel unchanged.

    update --round--> 16-bit values --> body
    """

    Config = CastConfig
    config: CastConfig

    def _pipeline(self) -> Pipeline:
        return TensorPipeline(self.config.kind, self.spec, CastPacker(self.config))


@register
class BlockQuant(_Untrained):
    """Block quantisation of all values as one vector; see ``BlockQuantPacker``."""

    Config = BlockQuantConfig
    config: BlockQuantConfig

    def _pipeline(self) -> Pipeline:
        packer = BlockQuantPacker(self.config)
        return Pipeline(self.config.kind, IdentityTransform(self.spec), packer)


@register
class TopK(_Untrained):
    """Top-k of every chunk, with all values as one vector; see ``TopKPacker``.

    ``linear`` here means that decoded vectors may be averaged; their mean is less sparse than each
    of them.
    """

    Config = TopKConfig
    config: TopKConfig

    def _pipeline(self) -> Pipeline:
        return Pipeline(self.config.kind, IdentityTransform(self.spec), TopKPacker(self.config))


@register
class RotatedSign(_Untrained):
    """Signs of the values, taken as one vector and rotated.

    See ``RotatedSignPacker`` and, where the largest are sent, ``RotatedPeaksPacker``.
    """

    Config = RotatedSignConfig
    config: RotatedSignConfig

    def _pipeline(self) -> Pipeline:
        largest = self.config.which == "largest"
        packer = RotatedPeaksPacker if largest else RotatedSignPacker
        return Pipeline(self.config.kind, IdentityTransform(self.spec), packer(self.config))


@register
class Subspace(Codec):
    """Fitted orthonormal bases, one per parameter; see ``SubspaceTransform``.

    The code is sent in fp32; a quantiser behind it (``Chain``) sends fewer bytes. Weights:
    ``shared.left.NAME`` or ``shared.right.NAME``.
    """

    Config = SubspaceConfig
    config: SubspaceConfig
    transform: subspaces.SubspaceTransform

    def _pipeline(self) -> Pipeline:
        transform = subspaces.SubspaceTransform(self.config, self.spec, self.weights)
        return Pipeline(self.config.kind, transform, RawPacker())

    @classmethod
    def from_bases(
        cls, config: SubspaceConfig, spec: UpdateSpec, bases: Mapping[str, tuple[Axis, Tensor]]
    ) -> Subspace:
        """Codec of fitted bases by parameter name: ``(axis, U [axis.size, k])``.

        Raises:
            ConfigError: parameters that share a basis were given different ones.
        """
        return cls(config, spec=spec, weights=subspaces.weights_of(config, spec, bases))

    def bases(self) -> dict[str, tuple[Axis, Tensor]]:
        """Bases by parameter name: ``(axis, U [axis.size, k])``."""
        return {name: (part.axis, part.basis) for name, part in self.transform.parts.items()}


@register
class Autoencoder(Codec):
    """A trained encoder and decoder network, as in CG-FedLLM; see ``AutoencoderTransform``.

    The code is sent in fp32; a quantiser behind it (``Chain``) sends fewer bytes. Weights:
    ``encoder.*``, ``decoder.*``, ``shared.scales`` ``[tensors]``; either half works alone.
    """

    Config = AutoencoderConfig
    config: AutoencoderConfig

    def _pipeline(self) -> Pipeline:
        transform = networks.AutoencoderTransform(self.config, self.spec, self.weights)
        return Pipeline(self.config.kind, transform, RawPacker())

    @classmethod
    def initialised(cls, config: AutoencoderConfig, spec: UpdateSpec, seed: int) -> Autoencoder:
        """Codec with random weights and scales of one; the global RNG is left as it was."""
        encoder, decoder = build_nets(config, spec, seed)
        return cls.from_nets(config, spec, encoder, decoder, torch.ones(len(spec)))

    @classmethod
    def from_nets(
        cls,
        config: AutoencoderConfig,
        spec: UpdateSpec,
        encoder: nn.Module,
        decoder: nn.Module,
        scales: Tensor,
    ) -> Autoencoder:
        """Codec of trained networks, whose tensors are copied; ``scales`` ``[tensors]``."""
        return cls(config, spec=spec, weights=networks.weights_of(encoder, decoder, scales))
