"""Block quantisation as a codec: every setting keeps what the settings promise."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec import native, ops
from gradcodec.codecs import BlockQuant
from gradcodec.errors import ConfigError, MalformedBodyError, NonFiniteError
from gradcodec.ops import CHUNK
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.hadamard import rotate_chunks_back
from gradcodec.registry import make_codec


def possible() -> list[BlockQuantConfig]:
    """Every combination of settings that is one, with three blocks."""
    found = []
    for bits, block, scale, rotate, stochastic in itertools.product(
        (8, 4, 2, 1),
        (8, 256, CHUNK),
        ("auto", "absmax", "l1", "rms", "lloyd"),
        (False, True),
        (False, True),
    ):
        if rotate and block < CHUNK:  # possible, and for levels of a Gaussian only of use
            continue
        try:
            found.append(BlockQuantConfig(bits, block, scale, rotate, stochastic))
        except ConfigError:
            continue
    return found + [
        BlockQuantConfig(4, block, scale, rotate, levels="gaussian")
        for block, rotate in ((64, False), (64, True), (CHUNK, True))
        for scale in ("auto", "absmax", "rms")
    ]


CONFIGS = possible()


def name(config: BlockQuantConfig) -> str:
    flags = ("rotated" * config.rotate, "stochastic" * config.stochastic)
    flags += ("gaussian" * (config.levels == "gaussian"),)
    return "-".join(filter(None, (str(config.bits), str(config.block), config.scale, *flags)))


BY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=name)
UNBIASED = [c for c in CONFIGS if c.unbiased and c.block != 256 and c.scale == "absmax"]


def through(codec: BlockQuant, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return codec.packer.unpack(codec.packer.pack(x, seed=seed), len(x))


def nmse(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).double().square().sum() / x.double().square().sum())


# -- settings ------------------------------------------------------------------------------------


def test_there_are_as_many_settings_as_are_documented() -> None:
    # 8 and 4 bits: auto, absmax, rms; 2: and lloyd, l1; 1: and l1. Three blocks, to nearest or at
    # random, rotated with one block of the three.
    three, one_bit = 2 * 3 * (3 * 2 + 2), 4 * (3 * 2 + 2)
    # 2 bits: auto, absmax, rms, l1 in all ways, lloyd alone in one.
    two_bits = 4 * (3 * 2 + 2) + 3
    # Gaussian levels: auto, absmax, rms for three blocks, two of them rotated.
    gaussian = 3 * 3
    assert len(CONFIGS) == three + one_bit + two_bits + gaussian


@pytest.mark.parametrize(
    ("bits", "settings", "placed"),
    [
        (8, {}, "absmax"),
        (4, {}, "absmax"),
        (2, {}, "lloyd"),
        (1, {}, "l1"),
        (2, {"rotate": True, "block": CHUNK}, "rms"),
        (2, {"stochastic": True}, "absmax"),
        (2, {"rotate": True, "block": CHUNK, "stochastic": True}, "absmax"),
        (4, {"scale": "rms"}, "rms"),
        (4, {"levels": "gaussian"}, "rms"),
        (4, {"levels": "gaussian", "block": 64}, "absmax"),
    ],
)
def test_auto_stands_for(bits: int, settings: dict[str, object], placed: str) -> None:
    assert BlockQuantConfig(bits, **settings).placed == placed


def test_codecs_of_before_keep_their_digest() -> None:
    told = {"kind": "blockquant", "bits": 4, "block": 256}
    assert BlockQuantConfig().to_dict() == told
    assert BlockQuantConfig.from_dict(told) == BlockQuantConfig()


@BY_CONFIG
def test_settings_come_back_from_json(config: BlockQuantConfig) -> None:
    assert BlockQuantConfig.from_dict(config.to_dict()) == config


def test_settings_of_their_own_have_digests_of_their_own() -> None:
    digests = {BlockQuant(c).digest for c in CONFIGS}
    assert len(digests) == len(CONFIGS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scale": "max"}, "max"),
        ({"scale": None}, "scale"),
        ({"rotate": 1, "block": CHUNK}, "rotate"),
        ({"stochastic": "yes"}, "stochastic"),
        ({"rotate": True, "block": 100}, "4096"),
        ({"rotate": True, "block": 2 * CHUNK}, "4096"),
        ({"bits": 4, "scale": "lloyd"}, "lloyd"),
        ({"bits": 2, "scale": "lloyd", "stochastic": True}, "lloyd"),
        ({"bits": 2, "scale": "lloyd", "rotate": True, "block": CHUNK}, "lloyd"),
        ({"bits": 4, "scale": "l1"}, "l1"),
        ({"bits": 8, "scale": "l1"}, "l1"),
        ({"levels": "normal"}, "levels"),
        ({"bits": 2, "levels": "gaussian"}, "4 bits"),
        ({"levels": "gaussian", "stochastic": True}, "stochastic"),
        ({"levels": "gaussian", "scale": "l1"}, "l1"),
        ({"levels": "gaussian", "scale": "lloyd"}, "lloyd"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        BlockQuantConfig(**settings)


# -- bytes ---------------------------------------------------------------------------------------


@BY_CONFIG
def test_sizes_are_exact(config: BlockQuantConfig) -> None:
    codec = BlockQuant(config)
    for count in (0, 1, 63, 65, 4095, 4097):
        body = codec.packer.pack(torch.randn(count))
        assert len(body) == codec.packer.nbytes(count), count
        total = -(-count // CHUNK) * CHUNK if config.rotate else count
        scales = -(-total // config.block) * (2 if config.placed == "lloyd" else 1)
        assert len(body) == 2 * scales + packed_nbytes(total, config.bits), count
        assert codec.packer.unpack(body, count).shape == (count,)


@BY_CONFIG
def test_equal_seeds_give_equal_bytes_and_others_only_where_dice_are_thrown(
    config: BlockQuantConfig,
) -> None:
    codec, x = BlockQuant(config), torch.randn(5000)
    one, same, other = (codec.packer.pack(x, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one, other) != config.stochastic


@BY_CONFIG
def test_every_implementation_gives_the_references_bytes(
    config: BlockQuantConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, x = BlockQuant(config), torch.randn(5001)
    bodies = torch.stack([codec.packer.pack(x * (1 + w), seed=w) for w in range(3)])
    mean = codec.packer.mean(bodies, 5001)
    encode, decode = ops.encode, ops.decode_mean
    for impl in ("reference", *(["native"] if native.available() else [])):
        monkeypatch.setattr(ops, "encode", lambda *a, i=impl, **k: encode(*a, impl=i, **k))
        monkeypatch.setattr(ops, "decode_mean", lambda *a, i=impl, **k: decode(*a, impl=i, **k))
        again = torch.stack([codec.packer.pack(x * (1 + w), seed=w) for w in range(3)])
        assert torch.equal(again, bodies)
        assert torch.equal(codec.packer.mean(again, 5001), mean)


@BY_CONFIG
def test_scales_that_no_encoder_makes_are_malformed(config: BlockQuantConfig) -> None:
    codec = BlockQuant(config)
    body = codec.packer.pack(torch.randn(100))
    for bits in (0x7F80, 0x7FC0, 0xBF80):  # infinite, NaN, -1
        bad = body.clone()
        bad[0], bad[1] = bits & 0xFF, bits >> 8
        for decode in (
            lambda b: codec.packer.unpack(b, 100),
            lambda b: codec.packer.mean(torch.stack([body, b]), 100),
        ):
            with pytest.raises(MalformedBodyError):
                decode(bad)


@given(st.binary(min_size=1, max_size=60), st.sampled_from(CONFIGS))
def test_any_bytes_decode_or_are_malformed(blob: bytes, config: BlockQuantConfig) -> None:
    codec = BlockQuant(config)
    counts = [n for n in range(1, 65) if codec.packer.nbytes(n) <= len(blob)]
    body = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    if not counts:
        with pytest.raises(MalformedBodyError):
            codec.packer.unpack(body, 1)
        return
    numel = counts[-1]
    try:
        y = codec.packer.unpack(body[: codec.packer.nbytes(numel)], numel)
    except MalformedBodyError:
        return
    assert y.shape == (numel,)


# -- errors --------------------------------------------------------------------------------------


@BY_CONFIG
def test_the_error_over_gaussians_is_the_one_of_the_levels(config: BlockQuantConfig) -> None:
    """Two-sided: uniform levels err by ``step^2 / 12`` (stochastic: ``/ 6``) where none is cut."""
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(1))
    error = nmse(x, through(BlockQuant(config), x))
    if config.levels == "gaussian":
        # 0.00951 of the whole; by the scale of 64 values 0.0091, by their largest 0.0079. The
        # largest of 4096 is near 3.7 and scatters, which leaves the outer levels to few values.
        rms = {64: 0.0091, CHUNK: 0.00951}[config.block]
        best = rms if config.placed == "rms" else {64: 0.0079, CHUNK: 0.0122}[config.block]
        far = config.placed == "absmax" and config.block == CHUNK
        assert error == pytest.approx(best, rel=0.15 if far else 0.03)
    elif config.placed == "absmax" and config.bits > 1:
        # E[max^2] of a block's magnitudes; blocks of 8 hold few values per level.
        peak = float(x.view(-1, config.block).abs().amax(1).square().mean())
        step = peak / {8: 127, 4: 7, 2: 1.5}[config.bits] ** 2
        expected = step / (6 if config.stochastic else 12)
        slack = {8: 0.07, 4: 0.15, 2: 0.6}[config.bits]
        assert expected * (1 - slack) < error < expected * (1 + slack)
    elif config.placed == "absmax":
        # One bit: +-max. Nearest errs by (max - |x|)^2, at random by max^2 - x^2.
        peak = x.view(-1, config.block).abs().amax(1, keepdim=True)
        size = x.view(-1, config.block).abs()
        lost = peak**2 - size**2 if config.stochastic else (peak - size) ** 2
        assert error == pytest.approx(float(lost.mean()), rel=0.05)
    elif not config.stochastic:
        # Gaussian levels: Lloyd-Max 0.3634 and 0.1175, evenly spaced 0.1188 at 2 bits, 0.0129 at
        # 15 levels, and 0.0308^2 / 12 at 255 before what is cut. Small blocks fit their own scale.
        best = {8: 8.3e-5, 4: 0.0129, 2: 0.118, 1: 0.363}[config.bits]
        assert best * (0.5 if config.block == 8 else 0.9) < error < best * 1.35
    else:
        # Dithered and cut: more than to nearest, by the variance of the dither.
        nearest = BlockQuantConfig(config.bits, config.block, config.placed, config.rotate)
        assert error > 1.2 * nmse(x, through(BlockQuant(nearest), x))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_rotation_makes_any_vector_look_gaussian(bits: int) -> None:
    spiky = torch.zeros(CHUNK)
    spiky[::1000] = torch.tensor([50.0, -20.0, 1.0, 3.0, 700.0])
    spiky += 0.1 * torch.randn(CHUNK)
    scale = {8: "absmax", 4: "rms", 2: "rms", 1: "l1"}[bits]
    plain = BlockQuant(BlockQuantConfig(bits, CHUNK, scale))
    rotated = BlockQuant(BlockQuantConfig(bits, CHUNK, scale, rotate=True))
    x = torch.randn(CHUNK)
    # A few spikes are only roughly a Gaussian after rotation.
    assert nmse(spiky, through(rotated, spiky)) < 2.5 * nmse(x, through(rotated, x))
    if bits < 8:
        assert nmse(spiky, through(rotated, spiky)) < nmse(spiky, through(plain, spiky))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("gauss4", 0.0090, 0.0100), ("gauss4-64", 0.0074, 0.0084)]
)
@pytest.mark.parametrize("heavy", [False, True])
def test_gaussian_levels_err_as_measured_whatever_the_values(
    name: str, low: float, high: float, heavy: bool
) -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(2))
    if heavy:  # products of normals: a kurtosis of 9 where a normal has 3
        x = x * torch.randn(1 << 18, generator=torch.Generator().manual_seed(3))
    error, evenly = (nmse(x, through(make_codec(n), x)) for n in (name, "int4-rotated"))
    assert low < error < high
    assert error < 0.8 * evenly


@pytest.mark.parametrize(
    ("block", "scale"),
    [(64, "absmax"), (256, "absmax"), (256, "rms"), (CHUNK, "rms"), (1 << 16, "rms")],
)
def test_a_contractive_codec_loses_less_than_it_is_given_at_worst(block: int, scale: str) -> None:
    config = BlockQuantConfig(4, block, scale, levels="gaussian")
    assert config.contractive
    for count in (1, 2, block // 8, block):
        x = torch.zeros(block)
        x[:count] = 1
        assert nmse(x, through(BlockQuant(config), x)) < 1, count


@pytest.mark.parametrize(("block", "scale"), [(512, "absmax"), (CHUNK, "absmax"), (1 << 17, "rms")])
def test_it_is_called_contractive_only_where_it_is(block: int, scale: str) -> None:
    config = BlockQuantConfig(4, block, scale, levels="gaussian")
    assert not config.contractive
    x = torch.zeros(block)
    x[0] = 1
    assert nmse(x, through(BlockQuant(config), x)) > 1


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_have_the_bytes_of_their_fp32(rotate: bool, dtype: torch.dtype) -> None:
    codec = BlockQuant(BlockQuantConfig(4, 64, rotate=rotate, levels="gaussian"))
    x = torch.randn(5001).to(dtype)
    assert torch.equal(codec.packer.pack(x), codec.packer.pack(x.float()))


@pytest.mark.parametrize("rotate", [False, True])
def test_constant_blocks_and_zeros_beside_them_come_back(rotate: bool) -> None:
    codec = BlockQuant(BlockQuantConfig(4, 64, rotate=rotate, levels="gaussian"))
    x = torch.zeros(3 * CHUNK)
    x[CHUNK : 2 * CHUNK] = -2.5
    y = through(codec, x)
    assert torch.equal(y[:CHUNK], x[:CHUNK])
    assert torch.equal(y[2 * CHUNK :], x[2 * CHUNK :])
    # The largest magnitude is a level, to the 8 bits of its scale. Rotated, it is a single value;
    # the smallest level of each of its 63 neighbours makes the rest.
    assert float((y - x)[CHUNK : 2 * CHUNK].norm() / x.norm()) < (0.4 if rotate else 2.0**-8)


@pytest.mark.parametrize("config", UNBIASED, ids=name)
def test_unbiased_means_that_the_mean_over_seeds_is_the_value(config: BlockQuantConfig) -> None:
    codec, count, seeds = BlockQuant(config), 4000, 200
    x = torch.randn(count)
    total, square = torch.zeros(count).double(), 0.0
    for seed in range(seeds):
        y = through(codec, x, seed).double()
        total += y
        square += float((y - x).square().sum())
    gap = total / seeds - x
    # Independent errors without bias average out: E|mean error|^2 = E|error|^2 / seeds, a sum of
    # 4,000 terms, known to sqrt(2 / 4000) = 2.2 % (and to 1/512 of a step, 1e-3 of the error).
    ratio = float(gap.square().sum()) * seeds / (square / seeds)
    assert ratio == pytest.approx(1, abs=5 * 0.03)
    # ... and one along the vector itself, which no sum of squares would show.
    along = float(gap @ x.double() / x.double().square().sum())
    assert abs(along) < 5 * math.sqrt(square / seeds / seeds / count) * 2


@pytest.mark.parametrize("bits", [2, 1])
def test_the_same_law_fails_where_nothing_is_promised(bits: int) -> None:
    codec, x = BlockQuant(BlockQuantConfig(bits)), torch.randn(4000)
    total = torch.zeros(4000)
    for seed in range(20):
        total += through(codec, x, seed)
    error = float((through(codec, x) - x).square().sum())
    assert float((total / 20 - x).square().sum()) * 20 / error > 10


# -- means ---------------------------------------------------------------------------------------


@BY_CONFIG
def test_a_mean_is_the_mean_of_decodes(config: BlockQuantConfig) -> None:
    codec, count = BlockQuant(config), 5001
    for world in (1, 3, 4):
        bodies = torch.stack([codec.packer.pack(torch.randn(count), seed=w) for w in range(world)])
        rows = [codec.packer.unpack(body, count) for body in bodies]
        total = torch.zeros(count)
        for row in rows:
            total += row
        mean = codec.packer.mean(bodies, count)
        if not config.rotate:
            assert torch.equal(mean, total * (1.0 / world)), world
            continue
        # Rotated back once instead of once for each: the same to fp32 rounding.
        expected = torch.stack(rows).double().mean(0)
        assert float((mean - expected).norm() / expected.norm()) < (2 * world + 26) * 2.0**-24


def test_a_mean_of_odd_rows_is_read() -> None:
    # A single row of odd length: its scales lie at odd addresses.
    for config in CONFIGS:
        codec = BlockQuant(config)
        for count in (1, 3, 329, 331):
            assert codec.packer.mean(codec.packer.pack(torch.ones(count))[None], count).shape == (
                count,
            )


def test_bodies_of_another_length_are_refused() -> None:
    codec = BlockQuant()
    body = codec.packer.pack(torch.randn(100))
    for bodies in (body[None, :-1], torch.cat([body, body])[None]):
        with pytest.raises(MalformedBodyError, match="expected"):
            codec.packer.mean(bodies, 100)


# -- error feedback ------------------------------------------------------------------------------


def missing_after(
    config: BlockQuantConfig, steps: tuple[int, ...], count: int = 3000
) -> tuple[list[float], float]:
    """Relative error of the mean of what was decoded, after so many steps of noisy gradients.

    And how far what is missing is from the residual, relatively.
    """
    codec = BlockQuant(config)
    generator = torch.Generator().manual_seed(3)
    residual = torch.zeros(codec.packer.residual_numel(count))
    direction = torch.randn(count, generator=generator)
    missing, found = torch.zeros(count, dtype=torch.float64), []
    for step in range(1, max(steps) + 1):
        x = direction + 0.5 * torch.randn(count, generator=generator)
        body = codec.packer.pack(x, seed=step, residual=residual)
        missing += x.double() - codec.packer.unpack(body, count).double()
        if step in steps:
            found.append(float(missing.norm()) / step / float(direction.norm()))
    held = lost(config, residual, count).double()
    return found, float((missing - held).norm() / missing.norm())


def lost(config: BlockQuantConfig, residual: torch.Tensor, count: int) -> torch.Tensor:
    """A residual in the coordinates of the values."""
    if not config.rotate:
        return residual
    return rotate_chunks_back(residual.view(-1, CHUNK)).view(-1)[:count]


#: One bit of the largest magnitude loses more than it is given, several times the whole vector.
FED_BACK = [
    c
    for c in CONFIGS
    if c.block > 8 and c.scale != "auto" and not (c.bits == 1 and c.placed == "absmax")
]


@pytest.mark.parametrize("config", FED_BACK, ids=name)
def test_error_feedback_sends_everything_in_the_end(config: BlockQuantConfig) -> None:
    (early, late), apart = missing_after(config, (50, 200))
    # What did not come is the residual, to the rounding of 200 fp32 sums ...
    assert apart < 2e-3
    # ... which stays bounded, so that the mean's error falls like 1 / steps: measured at most 0.058
    # for one bit in chunks, and there at most 0.57 of what it was.
    assert late < {8: 1e-4, 4: 6e-3, 2: 0.05, 1: 0.07}[config.bits]
    assert late < 0.6 * early
    # Without feedback a bias stays whatever the number of steps.
    if not config.stochastic and config.bits <= 2:
        x = torch.randn(3000)
        assert nmse(x, through(BlockQuant(config), x)) > 0.02


def test_feedback_is_not_for_codecs_that_lose_more_than_they_are_given() -> None:
    config = BlockQuantConfig(1, 256, "absmax", stochastic=True)
    x = torch.randn(3000)
    assert nmse(x, through(BlockQuant(config), x)) > 1
    (early, late), _ = missing_after(config, (10, 50))
    assert late > 100 * early


@BY_CONFIG
def test_what_is_decoded_and_the_residual_are_what_was_given(config: BlockQuantConfig) -> None:
    codec, x = BlockQuant(config), torch.randn(1000)
    residual = torch.zeros(codec.packer.residual_numel(1000))
    y = codec.packer.unpack(codec.packer.pack(x, residual=residual), 1000)
    # Twelve stages of sums both ways where rotated, else one rounding.
    assert float((y + lost(config, residual, 1000) - x).norm() / x.norm()) < (
        30 * 2.0**-24 if config.rotate else 2.0**-23
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_refused_vector_leaves_the_residual(bad: float) -> None:
    for config in CONFIGS:
        codec = BlockQuant(config)
        x = torch.randn(100)
        x[7] = bad
        residual = torch.full((codec.packer.residual_numel(100),), 0.5)
        with pytest.raises(NonFiniteError):
            codec.packer.pack(x, residual=residual)
        assert bool((residual == 0.5).all())


@BY_CONFIG
def test_a_few_huge_values_break_no_residual(config: BlockQuantConfig) -> None:
    codec = BlockQuant(config)
    places = ([5], [0, 1], [0, 2048], list(range(0, 4096, 64)))
    for at, size in itertools.product(places, (3.3e38, 2e38, 1e36, 3e32)):
        x = torch.zeros(5000)
        x[at] = size
        residual = torch.zeros(codec.packer.residual_numel(5000))
        try:
            body = codec.packer.pack(x, residual=residual)
        except NonFiniteError:
            assert not bool(residual.any())
            continue
        assert bool(torch.isfinite(residual).all()), size
        assert bool(torch.isfinite(codec.packer.unpack(body, 5000)).all()), size


@BY_CONFIG
def test_the_largest_values_come_back_finite_or_are_refused(config: BlockQuantConfig) -> None:
    codec = BlockQuant(config)
    for share in (1.0, 0.5, 0.01):
        x = torch.full((5000,), torch.finfo(torch.float32).max * share)
        try:
            body = codec.packer.pack(x)
        except NonFiniteError:
            continue
        assert bool(torch.isfinite(codec.packer.unpack(body, 5000)).all())
