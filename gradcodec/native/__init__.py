"""The ops in C for CPUs: what `gradcodec.reference` computes, bit for bit, at the speed of memory.

Optional: built by `pip install` where there is a C compiler, and otherwise absent, which
`available()` and `status()` tell. Only `gradcodec.ops` imports it. One thread; calls let go of the
GIL, and callers with more cores than ranks may split a vector at chunks.
"""

from gradcodec.native.coding import (
    chunk_absmax,
    decode_mean,
    decode_sum_shared,
    encode,
    random_bytes,
    reduce_requant,
)
from gradcodec.native.library import available, status
from gradcodec.native.sparse import sparse_mean, top_rows, topk_encode

__all__ = [
    "available",
    "chunk_absmax",
    "decode_mean",
    "decode_sum_shared",
    "encode",
    "random_bytes",
    "reduce_requant",
    "sparse_mean",
    "status",
    "top_rows",
    "topk_encode",
]
