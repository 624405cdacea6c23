"""Settings of the autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradcodec.settings import CodecConfig, check_one_of, check_whole

RATIOS = {"resnet3": 64, "cnn1d": 32, "uformer": 64}
"""Update elements per code value, by architecture."""
VARIANTS = ("literal", "working")
BASES = ("kind", "tensor")
NORMALISATIONS = ("none", "global_rms", "factor_rms", "tensor_rms")


@dataclass(frozen=True)
class AutoencoderConfig(CodecConfig):
    """Which autoencoder; its learned parameters are the codec's weights.

    Attributes:
        arch: ``"resnet3"`` (1/64), ``"cnn1d"`` (1/32) or ``"uformer"`` (1/64).
        variant: ``"literal"``, the paper's networks on the paper's image, or ``"working"``, the
            same trunks behind a learned row basis; see ``AutoencoderTransform``.
        normalise: what tensors are divided by before they enter the network: ``"none"`` (the
            paper mentions none); ``"global_rms"``, one number; ``"factor_rms"``, one for wide
            matrices (LoRA's A) and one for the rest (B); ``"tensor_rms"``, one per tensor.
        oversample: working variant: how many times more coefficients a column has in the
            networks than on the wire.
        bases: working variant: ``"kind"``, one row basis for all layers' tensors of a kind, or
            ``"tensor"``, one per tensor: more exact, but as many times larger as there are layers.
    """

    kind: ClassVar[str] = "autoencoder"
    arch: str = "resnet3"
    variant: str = "working"
    normalise: str = "tensor_rms"
    oversample: int = 4
    bases: str = "kind"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("arch", self.arch, tuple(RATIOS)),
            ("variant", self.variant, VARIANTS),
            ("normalise", self.normalise, NORMALISATIONS),
            ("bases", self.bases, BASES),
        ):
            check_one_of(self.kind, name, value, known)
        check_whole(self.kind, "oversample", self.oversample, 1, 64)

    @property
    def learned(self) -> bool:
        """The networks are learned."""
        return True

    @property
    def ratio(self) -> int:
        """Update elements per code value, up to padding."""
        return RATIOS[self.arch]
