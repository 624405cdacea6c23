"""What is encoded, described without its values: frozen specs of named tensors."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.errors import UpdateError

Update = Mapping[str, Tensor]
"""Named tensors: gradients, parameter differences, states. Order is meaning: keep it."""

#: dtype <-> wire code. Literal numbers, never reused.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float64: 4,
    torch.int8: 5,
    torch.uint8: 6,
    torch.int16: 7,
    torch.int32: 8,
    torch.int64: 9,
    torch.bool: 10,
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the raw values in bytes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class UpdateSpec:
    """The ordered table of an update's tensors; the contract between two ends.

    Raises:
        UpdateError: two tensors share a name, or a dtype has no wire code.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [t.name for t in self.tensors]
        if len(set(names)) != len(names):
            twice = sorted(n for n, count in Counter(names).items() if count > 1)
            raise UpdateError(f"tensor names must be unique, these come twice: {_some(twice)}")
        for t in self.tensors:
            if t.dtype not in DTYPE_CODES:
                known = sorted(str(d) for d in DTYPE_CODES)
                raise UpdateError(f"{t.name!r} has dtype {t.dtype}; supported: {known}")

    @classmethod
    def of(cls, update: Update) -> UpdateSpec:
        """Spec of the given tensors, in their order."""
        return cls(tuple(TensorSpec(n, tuple(t.shape), t.dtype) for n, t in update.items()))

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def numel(self) -> int:
        """Number of elements of all tensors together."""
        return sum(t.numel for t in self.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Raw bytes of all tensors together: the uncompressed payload."""
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def digest(self) -> bytes:
        """First 8 bytes of SHA-256 over the table; equal specs have equal digests."""
        rows = "\n".join(f"{t.name}\0{t.shape}\0{DTYPE_CODES[t.dtype]}" for t in self.tensors)
        return hashlib.sha256(rows.encode()).digest()[:8]

    def check(self, update: Update) -> None:
        """Raise ``UpdateError`` unless ``update`` has exactly these names, shapes and dtypes."""
        missing = [t.name for t in self.tensors if t.name not in update]
        extra = sorted(set(update) - {t.name for t in self.tensors})
        if missing or extra:
            raise UpdateError(
                f"names differ: expected {len(self)} tensors, missing {_some(missing)}, "
                f"not expected {_some(extra)}"
            )
        for t in self.tensors:
            came = update[t.name]
            if tuple(came.shape) != t.shape or came.dtype != t.dtype:
                raise UpdateError(
                    f"expected {t}, got {TensorSpec(t.name, tuple(came.shape), came.dtype)}"
                )


def _some(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    return str(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
