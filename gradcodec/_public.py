"""What `gradcodec.NAME` finds; the package loads it when the first of these names is used."""

from gradcodec import errors, metrics
from gradcodec._version import __version__
from gradcodec.chain import Chain
from gradcodec.codec import Codec, Decoder, Encoder
from gradcodec.codecs import Autoencoder, BlockQuant, Cast, Identity, Subspace, TopK
from gradcodec.distributed import (
    Compression,
    CompressState,
    LocalSteps,
    LowRank,
    OuterSGD,
    Residuals,
    compress,
    compress_hook,
    compressed_all_gather,
    compressed_all_reduce,
    compressed_reduce_scatter,
    register_compressed_backend,
)
from gradcodec.faf import LatentOptimizer
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.cast import CastConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.registry import make_codec
from gradcodec.settings import CodecConfig
from gradcodec.tgap import (
    GradientRecorder,
    SecondMoments,
    SnapshotStore,
    fit_autoencoder,
    fit_subspace,
)
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import SubspaceConfig
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
    "LocalSteps",
    "LowRank",
    "OuterSGD",
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
