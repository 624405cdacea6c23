"""Block quantisation: the default where nothing can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gradcodec import layout, ops
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.packers.packer import Packer
from gradcodec.reference import grid
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.hadamard import rotate_chunks, rotate_chunks_back
from gradcodec.settings import CodecConfig, check_one_of, check_whole

#: What ``scale="auto"`` means at each bit width, without rotation or stochastic rounding.
_DEFAULT_SCALE = {8: "absmax", 4: "absmax", 2: "lloyd", 1: "l1"}
_SCALES = ("auto", "lloyd", *grid.SCALES)
#: The largest block whose Gaussian levels err less when placed by the largest magnitude.
_PEAKED = 128
#: No sum of a rotation exceeds 64 times the largest value, no level four times the largest of
#: these, and no sum of the rotation back 4,096 levels.
_ROOM = 64.0 * 4 * ops.CHUNK


@dataclass(frozen=True)
class BlockQuantConfig(CodecConfig):
    """Bits, block and how the levels of a block are placed.

    Attributes:
        bits: per value: 1, 2, 4 or 8.
        block: values that share a scale; must divide 4096 with ``rotate``.
        scale: ``"absmax"``, ``"rms"``, ``"l1"`` (1 and 2 bits), ``"lloyd"`` (2 bits: two fitted
            magnitudes) or ``"auto"``: absmax at 8 and 4 bits, lloyd at 2, l1 at 1; with Gaussian
            levels rms in blocks of more than 128 values.
        rotate: rotate chunks of 4096 values first, so that every block looks Gaussian.
        stochastic: round up or down at random. Unbiased with ``scale="absmax"``.
        levels: ``"uniform"``: evenly spaced; ``"gaussian"`` (4 bits, to nearest): those of least
            error for a Gaussian.
    """

    kind: ClassVar[str] = "blockquant"
    LATER: ClassVar[tuple[str, ...]] = ("scale", "rotate", "stochastic", "levels")

    bits: int = 4
    block: int = 256
    scale: str = "auto"
    rotate: bool = False
    stochastic: bool = False
    levels: str = "uniform"

    def __post_init__(self) -> None:
        check_one_of(self.kind, "bits", self.bits, tuple(grid.BITS))
        check_whole(self.kind, "block", self.block, 8, 1 << 20)
        check_one_of(self.kind, "scale", self.scale, _SCALES)
        for name in ("rotate", "stochastic"):
            check_one_of(self.kind, name, getattr(self, name), (True, False))
        check_one_of(self.kind, "levels", self.levels, grid.LEVELS)
        if self.rotate and ops.CHUNK % self.block:
            raise ConfigError(
                f"blockquant: rotate needs a block that divides {ops.CHUNK} values, got "
                f"{self.block}"
            )
        if self._gaussian and (self.bits != 4 or self.stochastic):
            raise ConfigError(
                f"blockquant: 'gaussian' levels are for 4 bits and stochastic=False, got "
                f"{self.bits} bits and stochastic={self.stochastic}"
            )
        scale = self.placed
        if scale == "lloyd" and (self.bits != 2 or self.rotate or self.stochastic):
            raise ConfigError("blockquant: 'lloyd' is for 2 bits, to nearest, without rotation")
        if scale == "l1" and self.bits > 2:
            raise ConfigError(f"blockquant: 'l1' is for 1 and 2 bits, got {self.bits} bits")

    @property
    def _gaussian(self) -> bool:
        return self.levels == "gaussian"

    @property
    def placed(self) -> str:
        """The scale that is used: ``scale``, or what ``"auto"`` means."""
        if self.scale != "auto":
            return self.scale
        if self._gaussian:
            return "rms" if self.block > _PEAKED else "absmax"
        if self.bits == 2 and (self.rotate or self.stochastic):
            return "absmax" if self.stochastic else "rms"
        return _DEFAULT_SCALE[self.bits]

    @property
    def unbiased(self) -> bool:
        """Whether decoded values are equal to the encoded ones in expectation."""
        return self.stochastic and self.placed == "absmax"

    @property
    def contractive(self) -> bool:
        """Whether the error is smaller than the input; otherwise error feedback diverges.

        With ``"absmax"`` the error is many times the input at 1 bit, and about as large as the
        input at 2 bits with stochastic rounding. Gaussian levels lose most where a single value is
        not zero, 0.0172 (in squares of a standard deviation) for each of the zeros: more than the
        value itself, in blocks larger than these.
        """
        if self._gaussian:
            return self.block <= (256 if self.placed == "absmax" else 1 << 16)
        return self.placed != "absmax" or self.bits > 2 or (self.bits == 2 and not self.stochastic)


class BlockQuantPacker(Packer):
    """``2**bits`` levels with bf16 scales for every block of consecutive values.

        values (--rotate--> y) --blocks--> scales (bf16), codes --pack--> body = scales | codes

    The levels are those of ``gradcodec.reference.grid``; at 2 bits they are by default the two
    fitted magnitudes of ``gradcodec.reference.two_means``, at 4 bits on request those of
    ``gradcodec.reference.gaussian``. NaN and Inf raise ``NonFiniteError``; with rotation values
    beyond 3.2e32 do so too, since sums of them may leave fp32.

    Stochastic rounding is that of QSGD (Alistarh et al. 2017, arXiv 1610.02132) with a byte of
    dither per value, the rotation that of Suresh et al. 2017 (arXiv 1611.00429) with fixed signs.
    Equal seeds give equal bytes; federated clients and ranks must use different seeds, or their
    errors do not average out.
    """

    kind = "blockquant"
    finite: ClassVar[bool] = True

    def __init__(self, config: BlockQuantConfig) -> None:
        self.config = config

    @property
    def _grid(self) -> dict[str, Any]:
        c = self.config
        return {"bits": c.bits, "block": c.block, "rotate": c.rotate, "levels": c.levels}

    @property
    def _top(self) -> float:
        return grid.top_of(self.config.bits, self.config.levels)

    @property
    def _fitted(self) -> bool:
        return self.config.placed == "lloyd"

    def residual_numel(self, numel: int) -> int:
        """With rotation whole chunks, because the residual is kept in rotated coordinates."""
        return ops.padded_numel(numel, self.config.rotate)

    def from_residual(self, residual: Tensor, numel: int) -> Tensor:
        """Rotated back."""
        if not self.config.rotate:
            return residual
        return rotate_chunks_back(residual.view(-1, ops.CHUNK)).reshape(-1)[:numel]

    def to_residual(self, x: Tensor) -> Tensor:
        """Rotated, in whole chunks."""
        if not self.config.rotate:
            return x
        whole = functional.pad(x, (0, self.residual_numel(x.numel()) - x.numel()))
        return rotate_chunks(whole.view(-1, ops.CHUNK)).reshape(-1)

    @property
    def grain(self) -> int | None:
        """The block's length, or that of a rotation; ``None`` where dither depends on positions."""
        if self.config.stochastic:
            return None
        return ops.CHUNK if self.config.rotate else self.config.block

    def nbytes(self, numel: int) -> int:
        """Two bytes per scale and ``bits`` bits per value, rounded up to a byte.

        With rotation, the number of values is first rounded up to a multiple of 4096.
        """
        return self._scale_nbytes(numel) + packed_nbytes(
            self.residual_numel(numel), self.config.bits
        )

    def _scale_nbytes(self, numel: int) -> int:
        blocks = -(-self.residual_numel(numel) // self.config.block)
        return blocks * (4 if self._fitted else 2)

    @torch.no_grad()
    def pack(self, x: Tensor, *, seed: int = 0, residual: Tensor | None = None) -> Tensor:
        """As ``Packer.pack``, in one pass over the values, in their own dtype."""
        return self._coded(x.detach(), seed, residual)

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        return self._coded(x, seed, None)

    def _coded(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        values = x if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.float()
        layout.check_finite(values, "blockquant", _ROOM if self.config.rotate else 1.0)
        if self._fitted:
            packed, scales = ops.lloyd_encode(values, block=self.config.block, residual=residual)
        else:
            packed, scales = ops.encode(
                values,
                **self._grid,
                scale=self.config.placed,
                stochastic=self.config.stochastic,
                seed=seed,
                residual=residual,
            )
        # Sums of values near fp32's maximum may overflow.
        layout.check_finite(scales, "blockquant scales")
        return torch.cat([scales.reshape(-1).view(torch.uint8), packed])

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        return self.mean(body[None], numel)

    def surely_finite(self, body: Tensor, numel: int) -> bool:
        """By the largest scale: values are at most ``2 top`` of it, and rotations add up 4,096."""
        scales = body[: self._scale_nbytes(numel)].clone().view(torch.bfloat16)
        terms = ops.CHUNK if self.config.rotate else 1
        return layout.within_fp32(scales, 2 * terms * self._top)

    @torch.no_grad()
    def mean(self, bodies: Tensor, numel: int, weights: Sequence[float] | None = None) -> Tensor:
        """As ``Packer.mean``, without a dense vector for each body."""
        self._check_length(bodies.shape[1], numel)
        cut = self._scale_nbytes(numel)
        # Copied flat first: a single row of odd length counts as contiguous without a copy, but its
        # stride is not a whole number of scales.
        scales = bodies[:, :cut].reshape(-1).clone().view(torch.bfloat16).view(len(bodies), -1)
        # The largest level must be finite too: no encoder makes one beyond fp32.
        largest = scales.float() * (1.0 if self._fitted else self._top)
        if not bool((torch.isfinite(largest) & (scales >= 0)).all()):
            raise MalformedBodyError(
                "blockquant: expected scales that are not negative and levels that are finite"
            )
        packed = bodies[:, cut:]
        factors = None if weights is None else torch.tensor(weights, device=bodies.device)
        if self._fitted:
            return ops.lloyd_mean(packed, scales, numel, block=self.config.block, weights=factors)
        return ops.decode_mean(packed, scales, numel, **self._grid, weights=factors)
