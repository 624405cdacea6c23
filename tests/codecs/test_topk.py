"""What top-k keeps, and what its decoder refuses."""

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gradcodec.codecs import TopK
from gradcodec.errors import ConfigError, MalformedBodyError, NonFiniteError
from gradcodec.packers.positions import FORMS, Positions
from gradcodec.packers.topk import TopKConfig
from gradcodec.reference.bitpack import pack_bits, packed_nbytes
from gradcodec.wire import raw_bytes


def through(codec: TopK, x: torch.Tensor) -> torch.Tensor:
    return codec.decoder.decode(codec.encoder.encode({"x": x}))["x"]


def distinct(count: int, seed: int = 0) -> torch.Tensor:
    """Values of ``count`` different magnitudes in random order, about half of them negative."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randperm(count, generator=generator).float() + 1
    return size * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)


@given(st.integers(1, 200), st.integers(2, 40), st.integers(1, 40), st.sampled_from(FORMS))
def test_the_largest_of_every_chunk_are_kept(count: int, chunk: int, k: int, form: str) -> None:
    k = min(k, chunk)
    x = distinct(count)
    y = through(TopK(TopKConfig(k, chunk, index=form)), x)
    for part, kept in zip(x.split(chunk), y.split(chunk), strict=True):
        largest = part.abs().topk(min(k, len(part))).indices
        assert set(kept.nonzero()[:, 0].tolist()) <= set(largest.tolist())


def test_kept_values_are_within_half_a_step() -> None:
    x = distinct(4 * 64)
    y = through(TopK(TopKConfig(k=8, chunk=64, bits=8)), x)
    kept = y != 0
    assert int(kept.sum()) == 4 * 8
    # One block per chunk: half of max/127; bf16 rounds that scale by up to 2^-9 of it.
    bound = x.view(4, 64).abs().amax(1, keepdim=True) / 127 * 0.5 + 2.0**-9 * x.view(4, 64).abs()
    error = (y - x).abs().view(4, 64)
    assert bool((error <= bound)[kept.view(4, 64)].all())


def test_signs_are_kept() -> None:
    x = distinct(128)
    y = through(TopK(TopKConfig(k=16, chunk=64)), x)
    assert bool((y * x >= 0).all())


@pytest.mark.parametrize(
    ("count", "kept"), [(0, 0), (1, 1), (3, 3), (5, 4), (24, 4), (25, 5), (28, 8), (40, 8)]
)
def test_a_short_chunk_keeps_at_most_its_length(count: int, kept: int) -> None:
    codec = TopK(TopKConfig(k=4, chunk=24, bits=8))
    # Values in blocks of 8, each with one bf16 scale, then 5 bits for each position.
    assert codec.packer.nbytes(count) == kept + 2 * -(-kept // 8) + packed_nbytes(kept, 5)


@pytest.mark.parametrize("chunk", [2, 3, 64, 65, 1 << 16])
def test_positions_reach_the_end_of_the_chunk(chunk: int) -> None:
    x = torch.zeros(2 * chunk)
    x[chunk - 1], x[-1] = 1.0, -1.0
    y = through(TopK(TopKConfig(k=1, chunk=chunk)), x)
    assert y.nonzero()[:, 0].tolist() == [chunk - 1, 2 * chunk - 1]


def test_k_of_the_whole_chunk_keeps_everything() -> None:
    x = distinct(100)
    assert int((through(TopK(TopKConfig(k=50, chunk=50)), x) != 0).sum()) == 100


def test_equal_magnitudes_are_kept_k_times() -> None:
    y = through(TopK(TopKConfig(k=8, chunk=32)), torch.ones(96))
    assert (y.view(3, 32) != 0).sum(1).tolist() == [8, 8, 8]


def with_positions(positions: list[int], numel: int = 60) -> torch.Tensor:
    """Decode a payload with these positions instead of its own."""
    codec = TopK(TopKConfig(k=2, chunk=24, bits=8))
    payload = codec.encoder.encode({"x": distinct(numel)})
    packed = raw_bytes(pack_bits(torch.tensor(positions), 5))
    body = payload.body[: len(payload.body) - len(packed)] + packed
    return codec.decoder.decode(dataclasses.replace(payload, body=body))["x"]


def test_increasing_positions_are_read() -> None:
    y = with_positions([0, 1, 0, 23, 10, 11])
    assert y.nonzero()[:, 0].tolist() == [0, 1, 24, 47, 58, 59]


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([1, 0, 0, 1, 0, 1], id="falling"),
        pytest.param([1, 1, 0, 1, 0, 1], id="equal"),
        pytest.param([0, 25, 1, 2, 0, 1], id="equal to one of the next chunk"),
        pytest.param([0, 25, 2, 3, 0, 1], id="in the next chunk, but increasing"),
        pytest.param([0, 1, 0, 1, 0, 12], id="outside the update"),
        pytest.param([31, 31, 31, 31, 31, 31], id="all ones"),
    ],
)
def test_other_positions_are_malformed(positions: list[int]) -> None:
    with pytest.raises(MalformedBodyError, match="increasing"):
        with_positions(positions)


# -- settings that came later --------------------------------------------------------------------

VARIANTS = {
    "packed": TopKConfig(k=8, chunk=64),
    "elias-fano": TopKConfig(k=8, chunk=64, index="elias-fano"),
    "elias-fano, odd": TopKConfig(k=5, chunk=100, bits=4, index="elias-fano"),
    "elias-fano of the default": TopKConfig(index="elias-fano"),
    "2 bits": TopKConfig(k=16, chunk=256, bits=2),
    "rows of 1": TopKConfig(k=1, chunk=64, structure="rows"),
    "rows of 2": TopKConfig(k=2, chunk=64, bits=4, structure="rows"),
    "rows of 2, elias-fano": TopKConfig(k=2, chunk=64, structure="rows", index="elias-fano"),
}
BY_VARIANT = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
SIZES = (0, 1, 2, 63, 64, 65, 100, 129, 4097)


def test_codecs_of_before_keep_their_digest() -> None:
    told = {"kind": "topk", "k": 64, "chunk": 4096, "bits": 8}
    assert TopKConfig().to_dict() == told
    assert TopKConfig.from_dict(told) == TopKConfig()
    later = TopKConfig(k=1, chunk=64, structure="rows", index="elias-fano")
    assert TopKConfig.from_dict(later.to_dict()) == later


@BY_VARIANT
@pytest.mark.parametrize("count", SIZES)
def test_sizes_are_exact(count: int, config: TopKConfig) -> None:
    codec = TopK(config)
    assert codec.packer.pack(distinct(count)).numel() == codec.packer.nbytes(count)


@BY_VARIANT
@pytest.mark.parametrize("count", SIZES)
def test_every_variant_keeps_the_same_values_in_their_places(
    count: int, config: TopKConfig
) -> None:
    x = distinct(count)
    y = TopK(config).packer.unpack(TopK(config).packer.pack(x), count)
    for part, came in zip(x.split(config.chunk), y.split(config.chunk), strict=True):
        largest = part.abs().topk(min(config.k, len(part))).indices
        assert set(came.nonzero()[:, 0].tolist()) <= set(largest.tolist())
        assert bool((came * part >= 0).all())


@given(st.integers(1, 3000), st.integers(1, 60), st.data())
def test_elias_fano_gives_any_positions_back(numel: int, k: int, data: st.DataObject) -> None:
    chunk = data.draw(st.integers(max(2, k), 1 << 16))
    drawn = data.draw(st.integers(0, 2**31))
    positions = Positions("elias-fano", numel, k, chunk)
    generator = torch.Generator().manual_seed(drawn)
    parts = [
        torch.randperm(size, generator=generator)[:k].sort().values + start
        for start in range(0, numel, chunk)
        for size in [min(chunk, numel - start)]
    ]
    at = torch.cat(parts)
    packed = positions.write(at)
    assert packed.numel() == positions.nbytes
    assert torch.equal(positions.read(packed), at)


def test_elias_fano_is_within_a_bit_of_the_bound() -> None:
    # log2 binomial(4096, 64) / 64 = 7.364; the code is 6 low bits and a bitmap of two bits each.
    positions = Positions("elias-fano", 1 << 20, 64, 4096)
    assert 7.364 < 8 * positions.nbytes / positions.count <= 8


def test_elias_fano_with_one_more_or_one_less_is_malformed() -> None:
    positions = Positions("elias-fano", 4096, 8, 512)
    packed = positions.write(torch.arange(0, 4096, 64))
    for change in (1, 2, 128):
        other = packed.clone()
        other[-3] ^= change  # in the bitmap: one position more, or one less
        with pytest.raises(MalformedBodyError, match="positions"):
            positions.read(other)


@BY_VARIANT
@given(st.dictionaries(st.integers(0, 10_000), st.integers(0, 255), max_size=8))
@example({1: 124})  # a scale of 5e36, of which 8 bits have levels beyond fp32
def test_any_bytes_of_the_right_length_decode_or_are_malformed(
    config: TopKConfig, changes: dict[int, int]
) -> None:
    codec, numel = TopK(config), 700
    body = codec.packer.pack(distinct(numel))
    for at, value in changes.items():
        body[at % len(body)] = value
    try:
        y = codec.packer.unpack(body, numel)
    except MalformedBodyError:
        with pytest.raises(MalformedBodyError):
            codec.packer.mean(body[None], numel)
        return
    assert bool(torch.isfinite(y).all())
    assert torch.equal(codec.packer.mean(body[None], numel), y)


def test_rows_have_a_scale_for_every_4096_values() -> None:
    numel = 1 << 16
    for k in (1, 2):
        codec = TopK(TopKConfig(k=k, chunk=64, bits=4, structure="rows"))
        kept = numel // 64 * k
        assert codec.packer.nbytes(numel) == kept // 2 + 2 * numel // 4096 + kept * 6 // 8


# -- means and error feedback --------------------------------------------------------------------


@BY_VARIANT
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 65, 4097])
def test_a_mean_of_a_power_of_two_is_the_mean_to_the_bit(
    count: int, world: int, config: TopKConfig
) -> None:
    codec = TopK(config)
    bodies = torch.stack([codec.packer.pack(distinct(count, seed)) for seed in range(world)])
    total = torch.zeros(count)
    for body in bodies:
        total += codec.packer.unpack(body, count)
    assert torch.equal(codec.packer.mean(bodies, count), total / world)


def test_any_other_mean_is_the_mean_to_rounding() -> None:
    codec, count = TopK(VARIANTS["elias-fano"]), 1000
    bodies = torch.stack([codec.packer.pack(distinct(count, seed)) for seed in range(7)])
    expected = sum(codec.packer.unpack(body, count).double() for body in bodies) / 7
    # Seven products and seven sums, each rounded to fp32 once: 14 half-units of what is added.
    size = sum(codec.packer.unpack(body, count).double().abs() for body in bodies) / 7
    error = (codec.packer.mean(bodies, count).double() - expected).abs()
    assert bool((error <= 14 * 2.0**-24 * size).all())


def test_a_mean_refuses_what_a_decoder_refuses() -> None:
    codec = TopK(TopKConfig(k=2, chunk=24))
    body = codec.packer.pack(distinct(60))
    bad = body.clone()
    bad[-1] |= 0xFF
    for bodies in (torch.stack([body, bad]), body[None, :-1]):
        with pytest.raises(MalformedBodyError):
            codec.packer.mean(bodies, 60)


@BY_VARIANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_decoded_and_the_residual_are_what_was_given(
    config: TopKConfig, dtype: torch.dtype
) -> None:
    codec, count = TopK(config), 1000
    x = torch.randn(count)
    before = (torch.randn(count) * 0.1).to(dtype)
    residual = before.clone()
    y = codec.packer.unpack(codec.packer.pack(x, residual=residual), count)
    wanted = x + before.float()
    # fp32: the difference of a value and its level is rounded once. bf16 keeps 8 bits of it.
    bound = (2.0**-23 if dtype == torch.float32 else 2.0**-8) * (wanted.abs() + y.abs())
    assert bool(((y + residual.float() - wanted).abs() <= bound).all())
    assert float(residual.float().abs().max()) > 0


def test_error_feedback_sends_everything_in_the_end() -> None:
    codec, count, steps = TopK(TopKConfig(k=4, chunk=64)), 640, 200
    x, residual, total = torch.randn(count), torch.zeros(count), torch.zeros(count)
    for _ in range(steps):
        total += codec.packer.unpack(codec.packer.pack(x, residual=residual), count)
    # What is missing is the residual, which stays bounded: 15 values wait for each that is sent.
    assert float((total / steps - x).abs().max()) < 0.25
    assert float((total + residual - steps * x).abs().max()) < steps * 1e-4
    # Without it the small ones never arrive.
    once = codec.packer.unpack(codec.packer.pack(x), count)
    assert float((once - x).abs().max()) > 1


def test_a_refused_vector_leaves_the_residual() -> None:
    x, residual = distinct(100), torch.ones(100)
    x[3] = float("nan")
    with pytest.raises(NonFiniteError):
        TopK(TopKConfig(k=2, chunk=24)).packer.pack(x, residual=residual)
    assert torch.equal(residual, torch.ones(100))


@pytest.mark.parametrize(("k", "chunk"), [(3, 64), (1, 32), (2, 4096)])
def test_rows_are_of_64(k: int, chunk: int) -> None:
    with pytest.raises(ConfigError, match="rows"):
        TopKConfig(k=k, chunk=chunk, structure="rows")


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("k", [0, -1, 4097, 1.5, None, "1"]),
        ("chunk", [1, 0, (1 << 16) + 1, 64.0, None, "64"]),
        ("bits", [0, 3, 16, 8.0, None, "8"]),
        ("structure", ["row", "", None, 1]),
        ("index", ["rice", "", None, 12]),
    ],
)
def test_bad_settings_are_named(setting: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=setting):
            TopKConfig(**{setting: value})
