"""The public names are a promise: adding or removing one is a decision, made here and in the
changelog."""

import gradcodec

PUBLIC = {
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
}


def test_public_names_are_frozen() -> None:
    assert set(gradcodec.__all__) == PUBLIC
    assert len(gradcodec.__all__) == len(PUBLIC), "a name is listed twice"


def test_every_public_name_resolves() -> None:
    for name in gradcodec.__all__:
        assert getattr(gradcodec, name) is not None


def test_public_names_are_listed_by_dir() -> None:
    assert set(gradcodec.__all__) <= set(dir(gradcodec))


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(gradcodec, "no_such_name")
