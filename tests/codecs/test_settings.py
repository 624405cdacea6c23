"""Settings and weights out of a folder or the wire: what they say, or a ``ConfigError``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec import make_codec
from gradcodec.chain import MAX_STAGES, Chain, ChainConfig
from gradcodec.claims import MAX_EXPANSION, MAX_UNPAID, check_claim
from gradcodec.codec import Codec, codec_class
from gradcodec.codecs import Autoencoder, BlockQuant, Identity, Subspace, TopK
from gradcodec.errors import ConfigError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.raw import IdentityConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.per_tensor import PerTensorConfig
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import CODEC_IDS

CONFIGS: dict[str, dict[str, Any]] = {
    "identity": Identity().config.to_dict(),
    "cast": make_codec("bf16").config.to_dict(),
    "blockquant": BlockQuantConfig(4, 4096, "rms", rotate=True, stochastic=False).to_dict()
    | {"rotate": True, "stochastic": False},
    "topk": TopKConfig(structure="rows", chunk=64, k=2, index="elias-fano").to_dict(),
    "rotsign": make_codec("rotsign").config.to_dict(),
    "subspace": SubspaceConfig(share="kind").to_dict(),
    "autoencoder": AutoencoderConfig().to_dict(),
    "chain": Chain(Identity(), BlockQuant()).config.to_dict(),
    "per_tensor": PerTensorConfig((IdentityConfig(), BlockQuantConfig()), (0, 1, 0)).to_dict(),
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([256, 4096, 1 << 16, 1 << 20, 1 << 48, 1 << 63, 10**30, 10**400])
    | st.floats()
    | st.sampled_from(
        ["auto", "rms", "float16", "int4", "kind", "none", "rows", "", "\0", "w" * 999]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def test_every_kind_is_tried() -> None:
    assert set(CONFIGS) == set(CODEC_IDS)


@pytest.mark.parametrize("kind", CONFIGS)
@given(st.data())
def test_any_value_of_a_setting_is_kept_as_it_is_or_refused(kind: str, data: st.DataObject) -> None:
    given_settings = dict(CONFIGS[kind])
    key = data.draw(st.sampled_from(sorted(given_settings)))
    given_settings[key] = data.draw(JSON)
    try:
        config = codec_class(kind).Config.from_dict(given_settings)
    except ConfigError:
        return
    kept = json.loads(json.dumps(config.to_dict()))
    # Types too: true, 1 and 1.0 are equal to Python and three texts to a digest.
    assert {k: repr(v) for k, v in kept.items()} == {
        k: repr(v) for k, v in given_settings.items() if k in kept
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_settings_of_another_kind_or_of_none_are_refused(kind: str) -> None:
    config = codec_class(kind).Config
    for settings in ({**CONFIGS[kind], "kind": "zip"}, [], None, "identity", 3):
        with pytest.raises(ConfigError, match=kind):
            config.from_dict(settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_comes_back_from_its_settings(kind: str) -> None:
    config = codec_class(kind).Config.from_dict(CONFIGS[kind])
    assert type(config).from_dict(config.to_dict()) == config


# -- chains ----------------------------------------------------------------------------------------


def deep(stages: int, outside: bool) -> dict[str, Any]:
    codec: dict[str, Any] = {"kind": "identity"}
    for _ in range(stages - 1):
        other: dict[str, Any] = {"kind": "identity"}
        pair = (codec, other) if outside else (other, codec)
        codec = {"kind": "chain", "outer": pair[0], "inner": pair[1]}
    return codec


@pytest.mark.parametrize("outside", [False, True])
def test_chains_nest_as_deep_as_the_limit(outside: bool) -> None:
    codec = codec_class("chain").from_config(deep(MAX_STAGES, outside))
    update = {"w": torch.randn(5)}
    assert torch.equal(codec.decoder.decode(codec.encoder.encode(update))["w"], update["w"])
    with pytest.raises(ConfigError, match="at most 4 stages"):
        codec_class("chain").from_config(deep(MAX_STAGES + 1, outside))
    with pytest.raises(ConfigError, match="at most 4 stages"):
        Chain(codec, Identity()) if outside else Chain(Identity(), codec)


@pytest.mark.parametrize("outside", [False, True])
def test_settings_without_end_are_refused_at_the_limit(outside: bool) -> None:
    endless: dict[str, Any] = {"kind": "chain"}
    one: dict[str, Any] = {"kind": "identity"}
    endless["outer"], endless["inner"] = (endless, one) if outside else (one, endless)
    with pytest.raises(ConfigError, match="at most 4 stages"):
        codec_class("chain").from_config(endless)
    with pytest.raises(ConfigError, match="at most 4 stages"):
        ChainConfig.from_dict(deep(2_000, outside))


def test_a_chain_is_of_configs() -> None:
    with pytest.raises(ConfigError, match="configs of two codecs"):
        ChainConfig({"kind": "identity"}, Identity().config)  # type: ignore[arg-type]


# -- weights ---------------------------------------------------------------------------------------

MATRIX = UpdateSpec((TensorSpec("w", (64, 24)),))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_basis_that_is_not_finite_is_refused(dtype: str, value: float) -> None:
    u = torch.eye(64)[:, :4].clone()
    u[3, 1] = value
    with pytest.raises(ConfigError, match=r"'shared\.left\.w': expected finite values, 1 of 256"):
        Subspace.from_bases(
            SubspaceConfig(basis_dtype=dtype), MATRIX, {"w": (Axis(True, 64, 24), u)}
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.float64])
def test_a_basis_is_stored_in_the_dtype_that_its_config_names(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"basis of w.*expected torch\.bfloat16, got {dtype}"):
        Subspace(
            SubspaceConfig(basis_dtype="bfloat16"),
            spec=MATRIX,
            weights={"shared.left.w": torch.ones(64, 2, dtype=dtype)},
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.half(), "expected float32, got torch.float16"),
        (lambda t: t.to(torch.int32), "expected float32, got torch.int32"),
        (lambda t: torch.full_like(t, torch.nan), "expected finite values"),
        (lambda t: t.to_sparse(), "tensor.to_dense()"),
        (lambda t: t.to("meta"), "meta tensor"),
        (lambda t: t.numpy(), "torch.from_numpy"),
    ],
    ids=["half", "integers", "NaN", "sparse", "meta", "numpy"],
)
@pytest.mark.parametrize("name", ["encoder.rows.0", "decoder.rows.0", "shared.scales"])
def test_weights_of_networks_are_plain_finite_floats(name: str, change: Any, message: str) -> None:
    made = Autoencoder.initialised(AutoencoderConfig(), MATRIX, seed=0)
    weights = {**made.weights, name: change(made.weights[name])}
    with pytest.raises(ConfigError) as caught:
        Autoencoder(made.config, spec=MATRIX, weights=weights)
    assert message in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_networks_do_not_divide_by_zero(scale: float) -> None:
    made = Autoencoder.initialised(AutoencoderConfig(), MATRIX, seed=0)
    weights = {**made.weights, "shared.scales": torch.tensor([scale])}
    with pytest.raises(ConfigError, match=r"shared\.scales that are positive"):
        Autoencoder(made.config, spec=MATRIX, weights=weights)


@pytest.mark.parametrize("kind", ["identity", "cast", "blockquant", "topk", "rotsign", "chain"])
def test_codecs_without_weights_take_none(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"has no weights, got 'shared\.x'"):
        codec_class(kind).from_config(CONFIGS[kind], weights={"shared.x": torch.ones(1)})


# -- what a table claims ---------------------------------------------------------------------------


def covering(spec: UpdateSpec, *names: str) -> Subspace:
    """A subspace in which only these parameters have a basis, of one column."""
    bases = {}
    for t in spec:
        if t.name in names:
            axis = Axis(True, t.shape[0], t.numel // t.shape[0])
            bases[t.name] = (axis, torch.nn.functional.normalize(torch.ones(t.shape[0], 1), dim=0))
    return Subspace.from_bases(SubspaceConfig(), spec, bases)


def test_adapters_of_which_a_few_have_no_basis_can_be_saved_and_loaded(tmp_path: Path) -> None:
    # LLaMA-7B's q and v with r = 8: 32 layers of four factors, some of which saw no gradient.
    names = [
        f"layers.{i}.{m}.lora_{x}" for i in range(32) for m in ("q_proj", "v_proj") for x in "AB"
    ]
    spec = UpdateSpec(
        tuple(TensorSpec(n, (8, 4096) if n.endswith("A") else (4096, 8)) for n in names)
    )
    codec = Chain(covering(spec, *names[:-5]), BlockQuant(BlockQuantConfig(1)))
    codec.save_pretrained(tmp_path)
    assert Codec.from_pretrained(tmp_path).digest == codec.digest


@pytest.mark.parametrize("extra", [0, 1])
def test_a_folder_may_claim_as_much_as_the_limit(extra: int, tmp_path: Path) -> None:
    body = 4 * 3
    paid = MAX_EXPANSION * body
    assert paid < MAX_UNPAID
    others = MAX_UNPAID // 4 - 6
    spec = UpdateSpec((TensorSpec("w", (2, 3)), TensorSpec("zeros", (others + extra,))))
    codec = covering(spec, "w")
    assert codec.nbytes() == body
    if extra:
        with pytest.raises(ConfigError, match="leave tensors that have no code out of the table"):
            codec.save_pretrained(tmp_path)
    else:
        codec.save_pretrained(tmp_path)
        assert Codec.from_pretrained(tmp_path).spec == spec


def test_a_codec_that_is_bound_by_hand_decodes_what_it_was_bound_to() -> None:
    spec = UpdateSpec((TensorSpec("zeros", (MAX_UNPAID // 4 + 1,)),))
    codec = Subspace(SubspaceConfig(), spec=spec)
    decoded = codec.decoder.decode(codec.encoder.encode({"zeros": torch.ones(spec.numel)}))
    assert not decoded["zeros"].any()


def test_the_sparsest_untrained_codecs_are_within_the_limit() -> None:
    spec = UpdateSpec((TensorSpec("w", (1 << 30,), torch.float64),))
    for codec in (
        TopK(TopKConfig(k=1, chunk=1 << 16, bits=1)),
        TopK(TopKConfig(k=1, chunk=1 << 16, bits=1, index="elias-fano")),
        make_codec("rotsign"),
    ):
        check_claim(codec.config.kind, spec, codec.nbytes(spec))
