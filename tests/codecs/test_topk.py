"""What top-k keeps, and what its decoder refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.codecs.topk import TopK, TopKConfig
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference.bitpack import pack_bits, packed_nbytes
from gradcodec.wire import raw_bytes


def through(codec: TopK, x: torch.Tensor) -> torch.Tensor:
    return codec.decoder.decode(codec.encoder.encode({"x": x}))["x"]


def distinct(count: int, seed: int = 0) -> torch.Tensor:
    """Values of ``count`` different magnitudes in random order, about half of them negative."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randperm(count, generator=generator).float() + 1
    return size * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)


@given(st.integers(1, 200), st.integers(2, 40), st.integers(1, 40))
def test_the_largest_of_every_chunk_are_kept(count: int, chunk: int, k: int) -> None:
    k = min(k, chunk)
    x = distinct(count)
    y = through(TopK(TopKConfig(k, chunk)), x)
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
    assert codec.packed_nbytes(count) == kept + 2 * -(-kept // 8) + packed_nbytes(kept, 5)


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
        pytest.param([0, 1, 0, 1, 0, 12], id="outside the update"),
        pytest.param([31, 31, 31, 31, 31, 31], id="all ones"),
    ],
)
def test_other_positions_are_malformed(positions: list[int]) -> None:
    with pytest.raises(MalformedBodyError, match="increasing"):
        with_positions(positions)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("k", [0, -1, 4097, 1.5, None, "1"]),
        ("chunk", [1, 0, (1 << 16) + 1, 64.0, None, "64"]),
        ("bits", [0, 3, 16, 8.0, None, "8"]),
    ],
)
def test_bad_settings_are_named(setting: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=setting):
            TopKConfig(**{setting: value})
