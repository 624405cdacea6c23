"""Data-parallel training with compressed gradients: DDP, FSDP, HSDP, and plain collectives."""

from gradcodec.distributed.anchors import OuterSGD
from gradcodec.distributed.compress import compress
from gradcodec.distributed.compression import Compression
from gradcodec.distributed.exchange.collectives import (
    compressed_all_gather,
    compressed_all_reduce,
    compressed_reduce_scatter,
    scatter_residual_numel,
)
from gradcodec.distributed.hook import compress_hook
from gradcodec.distributed.local_steps import LocalSteps
from gradcodec.distributed.lowrank import LowRank
from gradcodec.distributed.meter import Traffic
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.wrappers.ddp import CompressState
from gradcodec.distributed.wrappers.group import register_compressed_backend

__all__ = [
    "CompressState",
    "Compression",
    "LocalSteps",
    "LowRank",
    "OuterSGD",
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
