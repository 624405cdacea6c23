"""The settings of a subspace, and which side of a parameter's matrix a basis belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradcodec import layout
from gradcodec.encodable import MAX_NUMEL
from gradcodec.settings import CodecConfig, check_number, check_one_of, check_whole
from gradcodec.transforms.subspace.basis import BASIS_DTYPES
from gradcodec.transforms.subspace.groups import SHARES
from gradcodec.types import TensorSpec

ALLOCATIONS = ("uniform", "energy", "tempered")
SIDES = ("auto", "long", "short")


@dataclass(frozen=True)
class SubspaceConfig(CodecConfig):
    """How the bases were (or are to be) fitted; the bases are the codec's weights.

    Attributes:
        ratio: update elements per code value, at least 1.
        allocation: how code dimensions are shared out over parameters (see ``allocate``).
        temper: exponent of the parameter's energy under ``"tempered"``, 0 (relative) .. 1 (energy).
        side: which side of a matrix gets the basis: ``"long"``, ``"short"``, or ``"auto"``: the
            short one where it still leaves ``min_rank`` dimensions, since that basis is smaller.
        min_rank: fewest dimensions a parameter may get.
        basis_dtype: storage of the bases: ``"float32"``, ``"bfloat16"``, ``"float16"``, or
            ``"int8"`` or ``"int4"`` with scales (see ``basis``).
        share: which parameters share a basis: ``"none"``, ``"kind"`` (the same factor in
            all layers) or ``"inputs"`` (``lora_A`` of q, k and v; see ``groups``).
    """

    kind: ClassVar[str] = "subspace"
    ratio: float = 32.0
    allocation: str = "uniform"
    temper: float = 0.5
    side: str = "auto"
    min_rank: int = 1
    basis_dtype: str = "bfloat16"
    share: str = "none"

    def __post_init__(self) -> None:
        check_number(self.kind, "ratio", self.ratio, 1, MAX_NUMEL)
        check_one_of(self.kind, "allocation", self.allocation, ALLOCATIONS)
        check_one_of(self.kind, "side", self.side, SIDES)
        check_number(self.kind, "temper", self.temper, 0, 1)
        check_whole(self.kind, "min_rank", self.min_rank, 1, MAX_NUMEL)
        check_one_of(self.kind, "basis_dtype", self.basis_dtype, BASIS_DTYPES)
        check_one_of(self.kind, "share", self.share, SHARES)

    @property
    def learned(self) -> bool:
        """The bases are learned."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``share`` came later and is left out of codecs that do not use it."""
        data = super().to_dict()
        if self.share == "none":
            del data["share"]
        return data


@dataclass(frozen=True)
class Axis:
    """The side of a parameter's matrix view ``[rows, cols]`` that is projected."""

    left: bool
    size: int
    other: int

    @classmethod
    def choose(cls, spec: TensorSpec, config: SubspaceConfig) -> Axis:
        """Apply the config's ``side`` rule to one parameter."""
        rows, cols = layout.matrix_shape(spec)
        short = min(rows, cols)
        fits = short / config.ratio >= max(config.min_rank, 2)
        use_short = config.side == "short" or (config.side == "auto" and fits)
        left = (rows <= cols) if use_short else (rows >= cols)
        return cls(left, rows if left else cols, cols if left else rows)

    @property
    def prefix(self) -> str:
        """Weight name prefix; it contains the side, so a square matrix is unambiguous."""
        return "shared.left." if self.left else "shared.right."

    @property
    def scales_prefix(self) -> str:
        """Weight name prefix of a quantised basis's scales."""
        return "shared.left_scales." if self.left else "shared.right_scales."
