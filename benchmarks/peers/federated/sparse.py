"""Sparse vectors as bytes: the kept values, then their positions by Rice's code."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.federated.body import Reader, value_bytes
from benchmarks.peers.rice import decode_positions, encode_positions


def top_k(vector: Tensor, k: int) -> Tensor:
    """Increasing positions ``[k]`` of exactly the ``k`` largest magnitudes."""
    return vector.abs().topk(k, sorted=False).indices.sort().values


def pack_sparse(vector: Tensor, positions: Tensor, dtype: torch.dtype) -> bytes:
    """The values at increasing ``positions`` as ``dtype``, and the positions."""
    where = encode_positions(positions.numpy(), vector.numel())
    return value_bytes(vector[positions], dtype) + where


def unpack_sparse(body: bytes, size: int, count: int, dtype: torch.dtype, what: str) -> Tensor:
    """Inverse of ``pack_sparse``: ``[size]`` with ``count`` values, zero elsewhere."""
    reader = Reader(body, what)
    values = reader.values(count, dtype)
    positions = torch.from_numpy(decode_positions(reader.rest(), size, count))
    return torch.zeros(size).index_copy_(0, positions, values.float())
