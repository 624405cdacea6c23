"""Positions of the values that are kept, as bytes: of fixed width, Elias-Fano coded, or a bitmap.

Elias-Fano (Fano 1971, On the number of bits required to implement an associative memory; Elias
1974) splits each position into its ``low`` lowest bits, sent as they are, and the upper bits. These
never decrease from one position to the next and are sent in unary: bit ``(position >> low) + i`` of
a bitmap is set for the ``i``-th position. For 64 of 4096 this takes 8 bits a position, where fixed
width takes 12 and the lower bound, ``log2 binomial(4096, 64) / 64``, is 7.36.

The size depends on the counts alone. A range coder over gaps takes 7.43 bits and Rice's code 7.53
(``benchmarks/results/codecs.md``), but every receiver would have to be told every size: the gain
is too small for that.

Where more than a quarter is kept, a plain bitmap is smaller: one bit for each value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.errors import MalformedBodyError
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits

FORMS = ("packed", "elias-fano", "bitmap")


@dataclass(frozen=True)
class Positions:
    """Which of ``numel`` values are kept: ``k`` of every ``chunk``, or all of a short last one.

    Attributes:
        form: one of ``FORMS``.
        numel: number of values in the vector.
        k: how many values of a chunk are kept.
        chunk: number of values in a chunk, at most 65,536.
    """

    form: str
    numel: int
    k: int
    chunk: int

    @property
    def count(self) -> int:
        """How many are kept."""
        full, rest = divmod(self.numel, self.chunk)
        return full * self.k + min(self.k, rest)

    @property
    def nbytes(self) -> int:
        """Exact number of bytes that ``write`` returns."""
        if self.form == "packed":
            return packed_nbytes(self.count, self._index_bits)
        if self.form == "bitmap":
            return packed_nbytes(self.numel, 1)
        return packed_nbytes(self.count, self._low) + packed_nbytes(self._bitmap, 1)

    @property
    def _index_bits(self) -> int:
        return (self.chunk - 1).bit_length()

    @property
    def _low(self) -> int:
        """``floor(log2(numel / count))``, which minimises the sum of both parts."""
        return (self.numel // max(1, self.count)).bit_length() - 1 if self.count else 0

    @property
    def _bitmap(self) -> int:
        return self.count + (self.numel - 1 >> self._low) if self.count else 0

    def starts(self, device: torch.device | None = None) -> Tensor:
        """int64 ``[count]``: first position of the chunk that each kept value belongs to."""
        return torch.arange(self.count, device=device) // self.k * self.chunk

    def write(self, at: Tensor) -> Tensor:
        """Increasing positions in the vector, int64 ``[count]`` -> uint8 ``[nbytes]``."""
        if self.form == "packed":
            return pack_bits(at - self.starts(at.device), self._index_bits)
        if self.form == "bitmap":
            kept = torch.zeros(self.numel, dtype=torch.uint8, device=at.device)
            kept[at] = 1
            return pack_bits(kept, 1)
        bitmap = torch.zeros(self._bitmap, dtype=torch.uint8, device=at.device)
        bitmap[(at >> self._low) + torch.arange(self.count, device=at.device)] = 1
        low = at & ((1 << self._low) - 1)
        parts = [pack_bits(low, self._low)] if self._low else []
        return torch.cat([*parts, pack_bits(bitmap, 1)])

    def read(self, packed: Tensor) -> Tensor:
        """Inverse of ``write``.

        Raises:
            MalformedBodyError: the positions do not increase, are outside their chunks, or their
                number is wrong.
        """
        readers = {"packed": self._packed, "elias-fano": self._elias_fano, "bitmap": self._plain}
        at = readers[self.form](packed)
        inside = at - self.starts(at.device)
        fits = (inside >= 0) & (inside < self.chunk) & (at < self.numel)
        if not bool(fits.all()) or bool((at.diff() <= 0).any()):
            raise MalformedBodyError(
                f"expected increasing positions below {self.numel}, each in its own chunk"
            )
        return at

    def _packed(self, packed: Tensor) -> Tensor:
        index = unpack_bits(packed, self._index_bits, self.count)
        return index.long() + self.starts(packed.device)

    def _plain(self, packed: Tensor) -> Tensor:
        return self._ones(packed, self.numel)

    def _ones(self, packed: Tensor, numel: int) -> Tensor:
        ones = unpack_bits(packed, 1, numel).nonzero()[:, 0]
        if len(ones) != self.count:
            raise MalformedBodyError(f"expected {self.count} positions, got {len(ones)}")
        return ones

    def _elias_fano(self, packed: Tensor) -> Tensor:
        cut = packed_nbytes(self.count, self._low)
        ones = self._ones(packed[cut:], self._bitmap)
        at = ones - torch.arange(self.count, device=packed.device) << self._low
        return at | unpack_bits(packed[:cut], self._low, self.count) if self._low else at
