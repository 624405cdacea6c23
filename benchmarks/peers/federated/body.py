"""Reading and writing the bodies of peers' messages: raw little-endian values, checked lengths."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.errors import MalformedBodyError, TrailingBytesError, TruncatedError

_COUNT = struct.Struct("<I")


class Reader:
    """A cursor over a body that never reads past the end.

    Args:
        body: the bytes.
        what: whose they are, for messages.
    """

    def __init__(self, body: bytes, what: str) -> None:
        self.body, self.what, self.at = body, what, 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        left = len(self.body) - self.at
        if count > left:
            raise TruncatedError(f"{self.what}: expected {count} more bytes, {left} are left")
        self.at += count
        return self.body[self.at - count : self.at]

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(len(self.body) - self.at)

    def count(self) -> int:
        """A u32."""
        return int(_COUNT.unpack(self.take(_COUNT.size))[0])

    def values(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next ``count`` numbers ``[count]``, finite where they are floating."""
        out = wire.raw_tensor(self.take(count * dtype.itemsize), dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(out).all()):
            raise MalformedBodyError(f"{self.what}: expected finite values")
        return out

    def end(self) -> None:
        """Raise unless everything was read."""
        left = len(self.body) - self.at
        if left:
            raise TrailingBytesError(f"{self.what}: {left} bytes follow the end")


def count_bytes(count: int) -> bytes:
    """A u32."""
    return _COUNT.pack(count)


def value_bytes(values: Tensor, dtype: torch.dtype) -> bytes:
    """The values as ``dtype``; what is beyond its range becomes its largest."""
    return wire.raw_bytes(layout.narrow(values, dtype))
