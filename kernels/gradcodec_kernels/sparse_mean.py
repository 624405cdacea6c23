"""Mean of W sparse vectors: a program owns a chunk and adds lists in rank order, no atomics."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import options


@triton.jit(do_not_specialize=["rest"])
def sparse_mean_kernel(
    KEPT,
    INDEX,
    OUT,
    kept_stride,
    index_stride,
    rest,
    W: tl.constexpr,
    K: tl.constexpr,
    LIST: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """``rest`` values in the last chunk. ``LIST``, ``TILE``: ``K``, ``CHUNK`` as powers of two."""
    chunk = tl.program_id(0).to(tl.int64)
    last = tl.program_id(0) == tl.num_programs(0) - 1
    count = tl.where(last, rest, CHUNK)
    OUT += chunk * CHUNK
    i = tl.arange(0, TILE)
    tl.store(OUT + i, tl.zeros([TILE], tl.float32), mask=i < count)
    k = tl.arange(0, LIST)
    for w in range(W):
        # Positions repeat between lists, though not within one: each list waits for the one before.
        tl.debug_barrier()
        its = chunk * K + k
        value = tl.load(KEPT + w * tl.cast(kept_stride, tl.int64) + its, mask=k < K, other=0.0).to(
            tl.float32
        )
        where = (
            tl.load(INDEX + w * tl.cast(index_stride, tl.int64) + its, mask=k < K, other=0).to(
                tl.int32
            )
            & 0xFFFF
        )
        # Entries of the padding lie beyond the end, and damaged ones may: neither is written.
        mask = (k < K) & (where < count)
        old = tl.load(OUT + where, mask=mask, other=0.0)
        tl.store(OUT + where, old + value * (1.0 / W), mask=mask)


def sparse_mean(kept: Tensor, index: Tensor, out: Tensor, *, chunk: int) -> None:
    """``sum_w kept_w / W`` at the lists' positions, in rank order; zero elsewhere.

    Args:
        kept: ``[W, chunks, k]``; lists are contiguous, ranks have any stride.
        index: int16 ``[W, chunks, k]``, each list without repetitions.
        out: fp32 ``[n]``, written.
        chunk: values of a chunk.
    """
    world, chunks, k = kept.shape
    if not chunks:
        return
    sparse_mean_kernel[(chunks,)](
        kept,
        index,
        out,
        kept.stride(0),
        index.stride(0),
        out.numel() - (chunks - 1) * chunk,
        W=world,
        K=k,
        LIST=triton.next_power_of_2(k),
        CHUNK=chunk,
        TILE=triton.next_power_of_2(chunk),
        **options("sparse_mean", kept, k),
    )
