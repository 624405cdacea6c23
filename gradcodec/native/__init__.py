"""The ops in C for CPUs: what `gradcodec.reference` computes, bit for bit, at the speed of memory.

Optional: built by `pip install` where there is a C compiler, and otherwise absent; `available()`
and `status()` tell. Only `gradcodec.ops` imports it. Each call uses one thread and releases the
GIL; callers with more cores than ranks may split a vector at chunks.
"""

from gradcodec.native.coding import (
    decode_mean,
    encode,
    lloyd_encode,
    lloyd_mean,
    random_bytes,
    rotsign_encode,
    rotsign_mean,
)
from gradcodec.native.library import available, status
from gradcodec.native.sparse import sparse_mean, top_rows, topk_encode

__all__ = [
    "available",
    "decode_mean",
    "encode",
    "lloyd_encode",
    "lloyd_mean",
    "random_bytes",
    "rotsign_encode",
    "rotsign_mean",
    "sparse_mean",
    "status",
    "top_rows",
    "topk_encode",
]
