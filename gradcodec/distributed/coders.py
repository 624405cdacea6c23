"""How the parts of one parameter become bytes: raw, or through a packer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.distributed.parts import ALIGN


class Coder(Protocol):
    """Bytes for flat vectors, of a size that depends on their length alone."""

    @property
    def align(self) -> int:
        """Parts start at multiples of this many elements."""
        ...

    @property
    def grain(self) -> int | None:
        """The code of vectors in a row is that of each, if their lengths are multiples of this.

        ``None`` if it never is.
        """
        ...

    @property
    def identity(self) -> int:
        """A number that ranks compare: equal coders have equal ones."""
        ...

    def nbytes(self, numel: int) -> int:
        """Size of ``numel`` packed elements."""
        ...

    def residual_numel(self, numel: int) -> int:
        """Elements of the residual for a vector of ``numel``."""
        ...

    def pack(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        """``[n]`` -> uint8 ``[nbytes(n)]``; raises ``NonFiniteError`` and leaves the residual."""
        ...

    def mean(self, bodies: Sequence[Tensor], numel: int) -> Tensor:
        """``W`` bodies, uint8 ``[nbytes(numel)]``, -> mean in their order, fp32 ``[numel]``.

        fp64 for fp64. May share memory with a body that is alone.
        """
        ...

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A decoded mean in the dtype of the tensor it goes into."""
        ...


class RawCoder:
    """The values' own bytes: lossless on the way in, one rounding to ``dtype`` of the mean."""

    align = 1
    grain = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.identity = dtype.itemsize * 2 + (dtype is torch.bfloat16)

    def nbytes(self, numel: int) -> int:
        """``itemsize`` bytes each."""
        return numel * self.dtype.itemsize

    def residual_numel(self, numel: int) -> int:
        """Nothing is lost."""
        return 0

    def pack(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        """A view where ``x`` has the dtype already."""
        return x.to(self.dtype).contiguous().view(torch.uint8)

    def mean(self, bodies: Sequence[Tensor], numel: int) -> Tensor:
        """Sum in order in at least fp32, then one division."""
        wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        first = bodies[0].view(self.dtype).to(wide)
        if len(bodies) == 1:
            return first
        total = first + bodies[1].view(self.dtype).to(wide)
        for body in bodies[2:]:
            total += body.view(self.dtype)
        return total.div_(len(bodies))

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Infinities stay what they are."""
        return x.to(dtype)


class CodecCoder:
    """A codec that needs no tensor table, on bare vectors."""

    align = ALIGN

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.packer = codec.packer
        self.grain = self.packer.grain
        self.identity = int.from_bytes(codec.digest, "little")
        self._passes_infinities = not self.packer.finite

    def nbytes(self, numel: int) -> int:
        """The packer's exact size."""
        return self.packer.nbytes(numel)

    def residual_numel(self, numel: int) -> int:
        """The packer's; it may be kept in another domain."""
        return self.packer.residual_numel(numel)

    def pack(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        """``Packer.pack``."""
        body = self.packer.pack(x, seed=seed, residual=residual)
        if residual is not None and self._passes_infinities:
            # A cast does not refuse what overflows it, and infinity minus infinity would stay.
            residual.nan_to_num_(0.0, 0.0, 0.0)
        return body

    def mean(self, bodies: Sequence[Tensor], numel: int) -> Tensor:
        """``Packer.mean``."""
        return self.packer.mean(torch.stack(list(bodies)), numel)

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Finite values that were rounded beyond a narrow dtype's range become its largest."""
        return x.to(dtype) if self._passes_infinities else layout.narrow(x, dtype)
