"""The sparse ops in C; results as in ``gradcodec.reference``, bit for bit; ``out`` as in coding."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import MalformedBodyError
from gradcodec.native.library import at, current, typed
from gradcodec.reference.top_rows import ROW


def topk_encode(
    values: Tensor, *, k: int, chunk: int, residual: Tensor | None, out: tuple[Tensor, Tensor]
) -> None:
    """``gradcodec.reference.topk_encode.topk_encode``."""
    n = values.numel()
    count = -(-n // chunk) * k
    failed = current().call(
        "topk",
        *typed("values", values, n),
        *(n, k, chunk),
        *typed("residual", residual, n),
        at("kept", out[0], count, values.dtype),
        at("index", out[1], count, torch.int16),
    )
    if failed:
        raise MemoryError(f"no memory for a chunk of {chunk} values")


def top_rows(
    values: Tensor, *, k: int, residual: Tensor | None, out: tuple[Tensor, Tensor]
) -> None:
    """``gradcodec.reference.top_rows.top_rows``."""
    n = values.numel()
    count = -(-n // ROW) * k
    current().call(
        "rows",
        *typed("values", values, n),
        *(n, k),
        *typed("residual", residual, n),
        at("kept", out[0], count, values.dtype),
        at("index", out[1], count, torch.uint8),
    )


def sparse_mean(kept: Tensor, index: Tensor, numel: int, *, chunk: int, out: Tensor) -> None:
    """``gradcodec.reference.sparse_mean.sparse_mean``.

    Raises:
        MalformedBodyError: a position is beyond its chunk.
    """
    world, _, k = kept.shape
    chunks = -(-numel // chunk)
    memory, dtype = typed("kept", kept, world * chunks * k)
    # Positions are 16 bits on the wire and uint16 in C, whatever their integer dtype is here.
    index = index.to(torch.int16)
    beyond = current().call(
        "sparse_mean",
        *(memory, dtype),
        at("index", index, world * chunks * k, torch.int16),
        *(world, chunks, k, chunk, numel),
        at("out", out, numel, torch.float32),
    )
    if beyond:
        raise MalformedBodyError(f"sparse_mean: expected positions below {chunk}, got one beyond")
