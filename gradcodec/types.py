"""What is encoded, described without its values: frozen specs of named tensors."""

from __future__ import annotations

import hashlib
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.encodable import (
    DTYPE_CODES,
    MAX_DIMS,
    MAX_NUMEL,
    MAX_TENSORS,
    check_dtype,
    check_name,
    check_update,
    shown,
)
from gradcodec.errors import UpdateError

Update = Mapping[str, Tensor]
"""Named tensors: gradients, parameter differences, states. Their order matters: keep it."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor.

    Raises:
        UpdateError: the shape is not of whole numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        # Digests hash the shape's text, and the text of `torch.Size` and of numpy's integers
        # differs from that of an equal plain tuple.
        if type(self.shape) is not tuple or not all(type(size) is int for size in self.shape):
            try:
                plain = tuple(int(operator.index(size)) for size in self.shape)
            except TypeError as err:
                raise UpdateError(
                    f"{shown(self.name)}: expected a shape of whole numbers, got "
                    f"{shown(self.shape)}"
                ) from err
            object.__setattr__(self, "shape", plain)

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
    """The ordered table of an update's tensors, on which encoder and decoder must agree.

    Raises:
        UpdateError: two tensors share a name, a name is not text, a dtype has no wire code, or
            something is over its limit (``gradcodec.encodable``).
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, tuple):
            object.__setattr__(self, "tensors", tuple(self.tensors))
        if not all(isinstance(t, TensorSpec) for t in self.tensors):
            raise UpdateError(f"expected specs of tensors, got {shown(self.tensors)}")
        if len(self.tensors) > MAX_TENSORS:
            raise UpdateError(f"expected at most {MAX_TENSORS} tensors, got {len(self.tensors)}")
        for t in self.tensors:
            check_name(t.name)
            check_dtype(t.name, t.dtype)
            if len(t.shape) > MAX_DIMS or any(size < 0 for size in t.shape):
                raise UpdateError(
                    f"{shown(t.name)}: expected at most {MAX_DIMS} sizes, none negative, got "
                    f"{shown(t.shape)}"
                )
            # Zero sizes count as one: torch makes no shape whose other sizes overflow either.
            if math.prod(max(size, 1) for size in t.shape) > MAX_NUMEL:
                raise UpdateError(
                    f"{shown(t.name)}: expected at most {MAX_NUMEL} elements, got {shown(t.shape)}"
                )
        if self.numel > MAX_NUMEL:
            raise UpdateError(f"expected at most {MAX_NUMEL} elements, got {shown(self.numel)}")
        names = [t.name for t in self.tensors]
        if len(set(names)) != len(names):
            twice = sorted(n for n, count in Counter(names).items() if count > 1)
            raise UpdateError(f"tensor names must be unique, these come twice: {_some(twice)}")

    @classmethod
    def of(cls, update: Update) -> UpdateSpec:
        """Spec of the given tensors, in their order; meta tensors are accepted.

        Raises:
            UpdateError: ``update`` does not map names to tensors, or one is not plain and dense.
        """
        check_update(update, values=False)
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
        """First 8 bytes of SHA-256 over the table; only equal specs have equal digests."""
        rows = [(t.name, str(t.shape), str(DTYPE_CODES[t.dtype])) for t in self.tensors]
        return named_digest(rows, "\0")

    def check(self, update: Update) -> None:
        """Raise ``UpdateError`` unless ``update`` has exactly these names, shapes and dtypes."""
        check_update(update)
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


def checked_table(update: Update, table: UpdateSpec | None) -> UpdateSpec:
    """``table`` if the update has exactly its tensors; the update's own if there is no table.

    Raises:
        UpdateError: the update does not fit the table, or cannot be encoded at all.
    """
    if table is None:
        check_update(update)
        return UpdateSpec.of(update)
    table.check(update)
    return table


def named_digest(rows: Sequence[tuple[str, ...]], between: str) -> bytes:
    """First 8 bytes of SHA-256 over rows, each a name and other fields.

    Equal digests mean equal rows. If no name contains NUL or a line feed, rows are joined by line
    feeds and their fields by ``between``: the original format, so published digests stay valid.
    Other names could be confused with these separators, so each field is then preceded by its
    length, and the text begins with a line feed, which no joined text does.

    Args:
        rows: each a name and the same number of other fields. These contain no line feed, no NUL
            and no ``between``, so that a joined row can be split from its end.
        between: what joins the fields; not a line feed.
    """
    if any("\0" in row[0] or "\n" in row[0] for row in rows):
        fields = (field.encode() for row in rows for field in row)
        text = b"\n" + b"".join(len(f).to_bytes(8, "little") + f for f in fields)
    else:
        text = "\n".join(between.join(row) for row in rows).encode()
    return hashlib.sha256(text).digest()[:8]


def _some(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    few = ", ".join(map(shown, names[:limit]))
    return f"[{few}]" + (f" and {len(names) - limit} more" if len(names) > limit else "")
