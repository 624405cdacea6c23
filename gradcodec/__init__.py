"""Gradient compression for PyTorch: learned and fixed codecs for federated training.

See ``README.md`` for a tour, ``WIRE.md`` for the bytes, ``docs/architecture.md`` for the map.
"""

from gradcodec import errors, metrics
from gradcodec._version import __version__
from gradcodec.codecs.autoencoder import Autoencoder, AutoencoderConfig
from gradcodec.codecs.base import Codec, Decoder, Encoder
from gradcodec.codecs.blockquant import BlockQuant, BlockQuantConfig
from gradcodec.codecs.cast import Cast, CastConfig
from gradcodec.codecs.compose import Chain
from gradcodec.codecs.identity import Identity
from gradcodec.codecs.registry import make_codec
from gradcodec.codecs.settings import CodecConfig
from gradcodec.codecs.subspace import Subspace, SubspaceConfig
from gradcodec.codecs.topk import TopK, TopKConfig
from gradcodec.distributed import (
    Compression,
    CompressState,
    LowRank,
    Residuals,
    compress,
    compress_hook,
    compressed_all_gather,
    compressed_all_reduce,
    compressed_reduce_scatter,
    register_compressed_backend,
)
from gradcodec.faf import LatentOptimizer
from gradcodec.tgap import (
    GradientRecorder,
    SecondMoments,
    SnapshotStore,
    fit_autoencoder,
    fit_subspace,
)
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import Payload

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BlockQuant",
    "BlockQuantConfig",
    "Cast",
    "CastConfig",
    "Chain",
    "Codec",
    "CodecConfig",
    "CompressState",
    "Compression",
    "Decoder",
    "Encoder",
    "GradientRecorder",
    "Identity",
    "LatentOptimizer",
    "LowRank",
    "Payload",
    "Residuals",
    "SecondMoments",
    "SnapshotStore",
    "Subspace",
    "SubspaceConfig",
    "TensorSpec",
    "TopK",
    "TopKConfig",
    "UpdateSpec",
    "__version__",
    "compress",
    "compress_hook",
    "compressed_all_gather",
    "compressed_all_reduce",
    "compressed_reduce_scatter",
    "errors",
    "fit_autoencoder",
    "fit_subspace",
    "make_codec",
    "metrics",
    "register_compressed_backend",
]
