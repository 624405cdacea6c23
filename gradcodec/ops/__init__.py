"""Quantise, pack, decode and average flat vectors: one public function for each op.

    import gradcodec.ops as ops
    packed, scales = ops.encode(gradient.view(-1), bits=4, rotate=True, residual=residual)

``impl`` chooses the implementation: ``"reference"`` (torch, any device), ``"native"`` (C, CPU) or
``"triton"`` (CUDA). ``None`` takes the default of the tensors' device, which
``implementation(device)`` names and ``gradcodec info`` prints. Asking for one that is not available
raises ``ConfigError`` with the reason; there is no silent fallback.
"""

from __future__ import annotations

from gradcodec.ops.backends import implementation, status
from gradcodec.ops.declared import (
    Impl,
    decode_mean,
    encode,
    lloyd_encode,
    lloyd_mean,
    rotsign_encode,
    rotsign_mean,
    sparse_mean,
    top_rows,
    topk_encode,
)
from gradcodec.ops.words import random_sign_words
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.grid import padded_numel
from gradcodec.reference.hadamard import CHUNK, sign_words

__all__ = [
    "CHUNK",
    "Impl",
    "decode_mean",
    "encode",
    "implementation",
    "lloyd_encode",
    "lloyd_mean",
    "packed_nbytes",
    "padded_numel",
    "random_sign_words",
    "rotsign_encode",
    "rotsign_mean",
    "sign_words",
    "sparse_mean",
    "status",
    "top_rows",
    "topk_encode",
]
