"""Laws of the autoencoder codecs: their networks, image layouts, halves and gradients."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradcodec.codecs import Autoencoder
from gradcodec.errors import (
    CodecMismatchError,
    ConfigError,
    NonFiniteError,
    UpdateError,
)
from gradcodec.transforms.autoencoder import nets
from gradcodec.transforms.autoencoder.config import (
    NORMALISATIONS,
    RATIOS,
    VARIANTS,
    AutoencoderConfig,
)
from gradcodec.transforms.autoencoder.image import Columns, Image
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import Payload

# The image of LLaMA-7B's q, k, v, o at r = 8: 32 layers * 4 modules * 2 factors * 8 columns.
PAPER_IMAGE = (1, 1, 4096, 2048)
PAPER_LATENT = (1, 64, 64, 32)

PAIRS = [(arch, variant) for arch in RATIOS for variant in VARIANTS]
MIXED = UpdateSpec(
    (
        TensorSpec("layers.0.k.A", (2, 40)),
        TensorSpec("layers.0.k.B", (10, 2)),
        TensorSpec("layers.1.k.A", (2, 40)),
        TensorSpec("layers.1.k.B", (10, 2)),
        TensorSpec("bias", (70,)),
        TensorSpec("scalar", ()),
        TensorSpec("empty", (0, 3)),
        TensorSpec("conv", (3, 5, 3, 3), torch.float16),
    )
)


def lora_spec(side: int, layers: int, rank: int = 8) -> UpdateSpec:
    return UpdateSpec(
        tuple(
            TensorSpec(f"layers.{i}.{m}.lora_{f}", (rank, side) if f == "A" else (side, rank))
            for i in range(layers)
            for m in "qkvo"
            for f in "AB"
        )
    )


SMALL = lora_spec(128, 2)


def random_update(spec: UpdateSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator).to(t.dtype) for t in spec}


def make(arch: str, variant: str, spec: UpdateSpec = SMALL, seed: int = 0) -> Autoencoder:
    return Autoencoder.initialised(AutoencoderConfig(arch, variant), spec, seed)


def half_of(codec: Autoencoder, half: str) -> Autoencoder:
    kept = {n: t for n, t in codec.weights.items() if n.startswith((half, "shared."))}
    return Autoencoder(
        codec.config, spec=codec.spec, weights=kept, weight_digests=codec.weight_digests
    )


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- the published networks ----------------------------------------------------------------------


def test_resnet3_has_the_published_number_of_parameters() -> None:
    assert (parameters(nets.ResNetEncoder()), parameters(nets.ResNetDecoder())) == (246785, 246698)


def test_resnet3_encoder_costs_0_75_gmac_on_the_papers_image() -> None:
    assert nets.count_macs(nets.ResNetEncoder(), PAPER_IMAGE) == 754_974_720


@pytest.mark.parametrize(
    ("convention", "macs"), [("input", 1_090_519_040), ("output", 1_769_996_288)]
)
def test_resnet3_decoder_costs_by_either_convention(convention: str, macs: int) -> None:
    assert nets.count_macs(nets.ResNetDecoder(), PAPER_LATENT, convention) == macs


def test_a_linear_layer_costs_inputs_times_outputs_for_each_row() -> None:
    assert nets.count_macs(nn.Linear(3, 5), (7, 3)) == 7 * 3 * 5


def test_counting_refuses_an_unknown_convention() -> None:
    with pytest.raises(ConfigError, match="convention"):
        nets.count_macs(nn.Linear(3, 5), (7, 3), "both")


def test_the_papers_image_has_the_papers_latent() -> None:
    latent = nets.ResNetEncoder().to("meta")(torch.empty(PAPER_IMAGE, device="meta"))
    assert latent.shape == PAPER_LATENT


def test_llama_7b_adapters_make_the_papers_image() -> None:
    image = Image.of(lora_spec(4096, 32))
    assert (image.columns, image.height, image.width) == (True, 4096, 2048)


@pytest.mark.parametrize(("arch", "variant"), PAIRS)
def test_the_code_is_the_stated_fraction_of_the_update(arch: str, variant: str) -> None:
    spec = lora_spec(128, 2)  # fills its image without padding
    assert make(arch, variant, spec).code_numel(spec) * RATIOS[arch] == spec.numel


@pytest.mark.parametrize("arch", RATIOS)
def test_an_untrained_working_trunk_passes_the_first_rows_through(arch: str) -> None:
    grid = torch.randn(2, 12, 128)
    sent = nets.Trunk(arch, 4, 3, encoder=True)(grid)
    assert torch.equal(sent, grid[:, :4])


@pytest.mark.parametrize("arch", RATIOS)
def test_an_untrained_working_trunk_predicts_nothing_that_was_not_sent(arch: str) -> None:
    sent = torch.randn(2, 4, 128)
    grid = nets.Trunk(arch, 4, 3, encoder=False)(sent)
    assert torch.equal(grid[:, :4], sent)
    assert grid.shape == (2, 12, 128)
    assert not grid[:, 4:].any()


# -- layouts ---------------------------------------------------------------------------------------


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.tuples(
        st.integers(1, 300), st.integers(1, 8)
    )


specs = st.lists(shapes(), max_size=5).map(
    lambda found: UpdateSpec(
        tuple(TensorSpec(f"layers.{i}.w", shape) for i, shape in enumerate(found))
    )
)


@settings(max_examples=60, deadline=None)
@given(specs)
def test_the_image_gives_every_value_back(spec: UpdateSpec) -> None:
    image = Image.of(spec)
    x = torch.arange(2 * spec.numel, dtype=torch.float32).reshape(2, -1)
    assert torch.equal(image.unpack(image.pack(x)), x)


@settings(max_examples=30, deadline=None)
@given(specs)
def test_the_image_is_a_multiple_of_64_and_at_least_128_each_side(spec: UpdateSpec) -> None:
    image = Image.of(spec)
    packed = image.pack(torch.zeros(1, spec.numel))
    assert packed.shape == (1, 1, image.height, image.width)
    assert all(s % 64 == 0 and s >= 128 for s in (image.height, image.width))


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(1, 70))
def test_columns_give_every_value_back(spec: UpdateSpec, ratio: int) -> None:
    columns = Columns(spec, ratio, 2)
    x = torch.arange(2 * spec.numel, dtype=torch.float32).reshape(2, -1)
    assert torch.equal(columns.unpack(columns.pack(x), x), x)


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 70))
def test_the_grid_gives_every_coefficient_back(spec: UpdateSpec, ratio: int) -> None:
    columns = Columns(spec, ratio, 2)
    like = torch.zeros(2, 0)
    given = [torch.randn(2, columns.basis_size(g), g.width) for g in columns.groups]
    back = columns.take(columns.place(given, like))
    assert all(torch.equal(a, b) for a, b in zip(given, back, strict=True))


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 70))
def test_what_is_sent_is_received_in_its_cells(spec: UpdateSpec, ratio: int) -> None:
    columns = Columns(spec, ratio, 2)
    latent = torch.randn(2, columns.latent_numel)
    assert torch.equal(columns.send(columns.receive(latent)), latent)


def test_long_sides_stand_and_columns_follow_the_spec() -> None:
    update = random_update(SMALL)
    vector = torch.cat([t.flatten() for t in update.values()])[None]
    image = Image.of(SMALL).pack(vector)[0, 0]
    columns = [t.T if n.endswith("A") else t for n, t in update.items()]
    assert torch.equal(image, torch.cat(columns, dim=1))


def test_one_layer_after_another_shares_a_kind() -> None:
    kinds = [g.members for g in Columns(MIXED, 64, 2).groups]
    assert kinds == [(0, 2), (1, 3), (4,), (5,), (7,)]


def test_tensors_are_their_own_kinds_on_request() -> None:
    kinds = [g.members for g in Columns(MIXED, 64, 2, per_tensor=True).groups]
    assert kinds == [(0,), (1,), (2,), (3,), (4,), (5,), (7,)]


# -- the codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "variant"), PAIRS)
def test_names_shapes_and_dtypes_come_back(arch: str, variant: str) -> None:
    codec = make(arch, variant, MIXED)
    update = random_update(MIXED)
    payload = Payload.from_bytes(codec.encoder.encode(update).to_bytes())
    MIXED.check(codec.decoder.decode(payload))
    assert len(payload.body) == codec.nbytes() == 4 * codec.code_numel(MIXED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_empty_update_comes_back(variant: str) -> None:
    codec = make("resnet3", variant, UpdateSpec(()))
    assert codec.decoder.decode(codec.encoder.encode({})) == {}


@pytest.mark.parametrize(("arch", "variant"), PAIRS)
def test_all_zeros_stay_finite(arch: str, variant: str) -> None:
    codec = make(arch, variant)
    zeros = {t.name: torch.zeros(t.shape) for t in SMALL}
    out = codec.decoder.decode(codec.encoder.encode(zeros))
    assert all(torch.isfinite(t).all() for t in out.values())


@pytest.mark.parametrize("arch", ["resnet3", "cnn1d"])
def test_the_working_form_sends_nothing_of_nothing(arch: str) -> None:
    codec = make(arch, "working")
    assert not codec.to_code({t.name: torch.zeros(t.shape) for t in SMALL}).any()


def test_an_untrained_working_codec_is_an_orthogonal_projection() -> None:
    codec = make("resnet3", "working")
    update = random_update(SMALL)
    once = codec.decoder.decode(codec.encoder.encode(update))
    twice = codec.decoder.decode(codec.encoder.encode(once))
    kept = sum(float(t.square().sum()) for t in once.values())
    inner = sum(float((once[n] * update[n]).sum()) for n in once)
    assert all(torch.allclose(once[n], twice[n], atol=1e-5) for n in once)
    assert math.isclose(kept, inner, rel_tol=1e-4)


def test_the_literal_head_keeps_outputs_within_the_scales() -> None:
    made = make("resnet3", "literal")
    weights = {**made.weights, "shared.scales": torch.full((len(SMALL),), 0.5)}
    codec = Autoencoder(made.config, spec=SMALL, weights=weights)
    out = codec.from_code(100 * torch.randn(codec.code_numel(SMALL)))
    assert max(float(t.abs().max()) for t in out.values()) <= 0.5


def test_scales_divide_before_and_multiply_after() -> None:
    made = make("resnet3", "working")
    scales = torch.linspace(1, 3, len(SMALL))
    codec = Autoencoder(made.config, spec=SMALL, weights={**made.weights, "shared.scales": scales})
    update = random_update(SMALL)
    scaled = {n: t * s for (n, t), s in zip(update.items(), scales, strict=True)}
    assert torch.allclose(codec.to_code(scaled), made.to_code(update), atol=1e-5)


@pytest.mark.parametrize(("arch", "variant"), PAIRS)
def test_pullback_is_the_transposed_derivative_of_the_decoder(arch: str, variant: str) -> None:
    codec = make(arch, variant)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(codec.code_numel(SMALL), generator=generator)
    direction = torch.randn(z.shape, generator=generator)
    gradients = random_update(SMALL, seed=2)

    def inner(at: Tensor) -> float:
        out = codec.from_code(at)
        return sum(float((out[n].double() * gradients[n].double()).sum()) for n in out)

    step = 1e-3
    slope = (inner(z + step * direction) - inner(z - step * direction)) / (2 * step)
    predicted = float(codec.transform.pullback(z, gradients).double() @ direction.double())
    assert math.isclose(slope, predicted, rel_tol=0.05, abs_tol=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_half_alone_gives_the_same_payload(variant: str) -> None:
    codec, update = make("resnet3", variant), random_update(SMALL)
    half = half_of(codec, "encoder.")
    assert half.encoder.encode(update).to_bytes() == codec.encoder.encode(update).to_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoder_half_alone_decodes_it(variant: str) -> None:
    codec = make("resnet3", variant)
    payload = codec.encoder.encode(random_update(SMALL))
    whole, half = codec.decoder.decode(payload), half_of(codec, "decoder.").decoder.decode(payload)
    assert all(torch.equal(whole[n], half[n]) for n in whole)


def test_a_decoder_half_cannot_encode_and_says_so() -> None:
    half = half_of(make("resnet3", "working"), "decoder.")
    with pytest.raises(ConfigError, match="encoder's weights are needed"):
        half.encoder.encode(random_update(SMALL))


def test_an_encoder_half_cannot_decode_and_says_so() -> None:
    codec = make("resnet3", "working")
    half = half_of(codec, "encoder.")
    with pytest.raises(ConfigError, match="decoder's weights are needed"):
        half.decoder.decode(codec.encoder.encode(random_update(SMALL)))


def test_a_payload_of_other_weights_is_refused() -> None:
    payload = make("resnet3", "working", seed=1).encoder.encode(random_update(SMALL))
    with pytest.raises(CodecMismatchError):
        make("resnet3", "working", seed=2).decoder.decode(payload)


@pytest.mark.parametrize(("arch", "variant"), PAIRS)
def test_equal_seeds_give_equal_weights(arch: str, variant: str) -> None:
    assert make(arch, variant, seed=3).digest == make(arch, variant, seed=3).digest
    assert make(arch, variant, seed=3).digest != make(arch, variant, seed=4).digest


def test_initialising_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make("uformer", "literal")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    update = random_update(SMALL)
    next(iter(update.values()))[0, 0] = bad
    with pytest.raises(NonFiniteError):
        make("resnet3", "working").encoder.encode(update)


def test_integers_are_refused() -> None:
    spec = UpdateSpec((TensorSpec("n", (4,), torch.int64),))
    with pytest.raises(UpdateError, match="floating"):
        make("resnet3", "literal", spec).encoder.encode({"n": torch.arange(4)})


def test_a_codec_without_a_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match="spec"):
        Autoencoder(AutoencoderConfig())


def test_weights_of_another_architecture_are_refused() -> None:
    weights = make("uformer", "literal").weights
    with pytest.raises(ConfigError, match="do not fit"):
        Autoencoder(AutoencoderConfig("resnet3", "literal"), spec=SMALL, weights=weights)


def test_weights_outside_the_two_halves_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown weights"):
        Autoencoder(AutoencoderConfig(), spec=SMALL, weights={"middle.w": torch.zeros(1)})


def test_a_code_of_another_length_is_refused() -> None:
    with pytest.raises(UpdateError, match="values"):
        make("resnet3", "working").from_code(torch.zeros(3))


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "resnet4"},
        {"variant": "best"},
        {"normalise": "max"},
        {"oversample": 0},
        {"bases": "row"},
    ],
    ids=str,
)
def test_an_unknown_setting_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        AutoencoderConfig.from_dict({"kind": "autoencoder", **change})


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_the_config_survives_json_values(normalise: str) -> None:
    config = AutoencoderConfig("cnn1d", "literal", normalise, oversample=2, bases="tensor")
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    assert dataclasses.asdict(config).items() <= config.to_dict().items()
