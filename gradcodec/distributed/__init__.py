"""Data-parallel training with compressed gradients: collectives, DDP hook, adaptive low rank."""

from gradcodec.distributed.adaptive import LowRank
from gradcodec.distributed.backend import register_compressed_backend
from gradcodec.distributed.collectives import (
    compressed_all_gather,
    compressed_all_reduce,
    compressed_reduce_scatter,
    scatter_residual_numel,
)
from gradcodec.distributed.compress import compress
from gradcodec.distributed.feedback import Residuals
from gradcodec.distributed.hook import compress_hook
from gradcodec.distributed.state import CompressState
from gradcodec.distributed.traffic import Traffic

__all__ = [
    "CompressState",
    "LowRank",
    "Residuals",
    "Traffic",
    "compress",
    "compress_hook",
    "compressed_all_gather",
    "compressed_all_reduce",
    "compressed_reduce_scatter",
    "register_compressed_backend",
    "scatter_residual_numel",
]
