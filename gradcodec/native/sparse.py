"""The sparse ops in C; arguments and results as in ``gradcodec.reference``, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.native.library import current
from gradcodec.native.memory import at, typed
from gradcodec.reference.hadamard import CHUNK
from gradcodec.reference.top_rows import ROW


def topk_encode(
    values: Tensor, *, k: int, chunk: int = CHUNK, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``gradcodec.reference.topk_encode.topk_encode``."""
    if not 1 <= k <= chunk <= 1 << 16:
        raise ConfigError(f"expected 1 <= k <= chunk <= {1 << 16}, got k={k}, chunk={chunk}")
    n = values.numel()
    chunks = -(-n // chunk)
    kept = torch.empty(chunks, k, dtype=values.dtype)
    index = torch.empty(chunks, k, dtype=torch.int16)
    failed = current().call(
        "topk",
        *typed("values", values, n),
        *(n, k, chunk),
        *typed("residual", residual, n),
        kept.data_ptr(),
        index.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no memory for a chunk of {chunk} values")
    return kept, index


def top_rows(
    values: Tensor, *, k: int = 1, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``gradcodec.reference.top_rows.top_rows``."""
    if k not in (1, 2):
        raise ConfigError(f"expected k of 1 or 2 in every row of {ROW}, got {k!r}")
    n = values.numel()
    rows = -(-n // ROW)
    kept = torch.empty(rows, k, dtype=values.dtype)
    index = torch.empty(rows, k, dtype=torch.uint8)
    current().call(
        "rows",
        *typed("values", values, n),
        *(n, k),
        *typed("residual", residual, n),
        kept.data_ptr(),
        index.data_ptr(),
    )
    return kept, index


def sparse_mean(kept: Tensor, index: Tensor, numel: int, *, chunk: int = CHUNK) -> Tensor:
    """``gradcodec.reference.sparse_mean.sparse_mean``.

    Raises:
        MalformedBodyError: a position is beyond its chunk.
    """
    if kept.ndim != 3 or not len(kept) or not 1 <= chunk <= 1 << 16 or numel < 0:
        raise ConfigError(
            f"expected values [W, chunks, k] with W >= 1, a chunk of 1..{1 << 16} and a number of "
            f"values, got {list(kept.shape)}, {chunk} and {numel}"
        )
    world, chunks, k = kept.shape
    if chunks != -(-numel // chunk):
        raise ConfigError(f"expected {-(-numel // chunk)} chunks for {numel} values, got {chunks}")
    # Positions are 16 bits on the wire and uint16 in C, whatever integers carry them here.
    index = index.to(torch.int16)
    out = torch.empty(numel)
    beyond = current().call(
        "sparse_mean",
        *typed("kept", kept, kept.numel()),
        at("index", index, kept.numel(), torch.int16),
        *(world, chunks, k, chunk, numel),
        out.data_ptr(),
    )
    if beyond:
        raise MalformedBodyError(f"sparse_mean: expected positions below {chunk}, got one beyond")
    return out
