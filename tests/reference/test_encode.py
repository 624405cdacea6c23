"""Encode is rotate, add, quantise, pack, keep: against the parts, one by one, in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gradcodec.reference import grid
from gradcodec.reference.bitpack import packed_nbytes, unpack_bits
from gradcodec.reference.decode_mean import decode_mean
from gradcodec.reference.encode import SEGMENT, encode, segment_of
from gradcodec.reference.grid import padded_numel
from gradcodec.reference.hadamard import CHUNK, rotate_chunks, rotate_chunks_back
from gradcodec.reference.philox import random_bytes

SIZES = (0, 1, 7, 63, 64, 65, 4095, 4096, 4097)
GRIDS: list[dict[str, Any]] = [
    {"bits": bits, "block": block, "scale": scale, "rotate": rotate, "stochastic": stochastic}
    for bits, block, stochastic in itertools.product((1, 2, 4, 8), (8, 100, 4096), (False, True))
    for scale in ("absmax", "rms", *(["l1"] if bits <= 2 else []))
    for rotate in ([False, True] if block == CHUNK else [False])
] + [
    {"bits": 4, "block": block, "scale": scale, "rotate": rotate, "stochastic": False}
    | {"levels": "gaussian"}
    for block, rotate in ((100, False), (64, False), (64, True), (8, True), (CHUNK, True))
    for scale in ("absmax", "rms")
]
BY_GRID = pytest.mark.parametrize("given_grid", GRIDS, ids=lambda g: "-".join(map(str, g.values())))


def rows_of(values: Tensor, block: int, rotate: bool) -> Tensor:
    """What is quantised, with zeros at the end: fp32 ``[blocks, block]``."""
    total = padded_numel(-(-values.numel() // block) * block, rotate)
    rows = torch.zeros(total)
    rows[: values.numel()] = values.float()
    return (rotate_chunks(rows.view(-1, CHUNK)) if rotate else rows).view(-1, block)


def decoded(packed: Tensor, scales: Tensor, numel: int, g: dict[str, Any]) -> Tensor:
    """One payload in the domain in which it was coded, ``[padded numel]``."""
    total = padded_numel(numel, g["rotate"])
    same = {"bits": g["bits"], "block": g["block"], "levels": g.get("levels", "uniform")}
    return decode_mean(packed[None], scales[None], total, **same)


@BY_GRID
def test_it_is_the_parts_one_after_the_other(given_grid: dict[str, Any]) -> None:
    g = given_grid
    x = torch.randn(5000)
    total = padded_numel(len(x), g["rotate"])
    packed, scales = encode(x, **g, seed=99)
    rows = rows_of(x, g["block"], g["rotate"])
    counts = torch.full((len(rows),), g["block"], dtype=torch.float64)
    counts[-1] = total - (len(rows) - 1) * g["block"]
    levels = g.get("levels", "uniform")
    delta = grid.deltas(rows, counts, g["bits"], g["scale"], g["stochastic"], levels)
    assert torch.equal(scales, delta)
    dither = None
    if g["stochastic"]:
        dither = ((random_bytes(0, rows.numel(), 99).float() + 0.5) / 256).view(rows.shape)
    codes = grid.codes_of(rows, delta, g["bits"], dither, levels).view(-1)[:total]
    assert torch.equal(unpack_bits(packed, g["bits"], total), codes.int())


@BY_GRID
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_decoded_and_the_residual_are_what_was_given(
    given_grid: dict[str, Any], dtype: torch.dtype
) -> None:
    g, x = given_grid, torch.randn(4500)
    total = padded_numel(len(x), g["rotate"])
    before = (0.1 * torch.randn(total)).to(dtype)
    residual = before.clone()
    packed, scales = encode(x, **g, seed=5, residual=residual)
    y = rows_of(x, g["block"], g["rotate"]).view(-1)[:total] + before.float()
    came = decoded(packed, scales, len(x), g)
    # The value is exact and the difference is rounded once, to fp32 or to bf16's 8 bits.
    half = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    gap = (came.double() + residual.double() - y.double()).abs()
    assert bool((gap <= half * (came.double() - y.double()).abs() + 2.0**-149).all())
    assert float(residual.float().abs().max()) > 0


@pytest.mark.parametrize("rotate", [False, True])
def test_decoding_gives_the_input_to_half_a_step(rotate: bool) -> None:
    x = torch.randn(10_000)
    packed, scales = encode(x, bits=8, rotate=rotate)
    y = decode_mean(packed[None], scales[None], len(x), bits=8, rotate=rotate)
    # s^2 / 12 with s = max / 127 and max of 4,096 normals about 3.7: 7.1e-5.
    error = float((y - x).square().sum() / x.square().sum())
    assert 5e-5 < error < 1e-4


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_sizes_are_exact_and_left_over_bits_zero(numel: int, bits: int) -> None:
    for block, rotate in ((8, False), (100, False), (4096, True)):
        packed, scales = encode(torch.randn(numel), bits=bits, block=block, rotate=rotate)
        total = padded_numel(numel, rotate)
        assert (packed.dtype, len(packed)) == (torch.uint8, packed_nbytes(total, bits))
        assert (scales.dtype, len(scales)) == (torch.bfloat16, -(-total // block))
        if total * bits % 8:
            assert int(packed[-1]) >> (total * bits % 8) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_are_coded_as_their_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(5000).to(dtype)
    for rotate in (False, True):
        narrow, wide = (encode(v, bits=4, rotate=rotate) for v in (x, x.float()))
        assert torch.equal(narrow[0], wide[0])
        assert torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("block", [100, 256, 4096])
def test_segments_cannot_be_seen(block: int) -> None:
    numel = segment_of(block) + 3 * block + 17
    assert segment_of(block) >= SEGMENT / 2
    x = torch.randn(numel)
    g = {"bits": 2, "block": block, "stochastic": True, "seed": 3}
    packed = encode(x, **g)[0]
    first = encode(x[: segment_of(block) + block], **g)[0]
    assert torch.equal(first, packed[: len(first)])
    # Behind the border as well: the same values there, whatever stood before.
    other = torch.cat([torch.randn(segment_of(block)), x[segment_of(block) :]])
    tail = segment_of(block) * 2 // 8
    assert torch.equal(encode(other, **g)[0][tail:], packed[tail:])


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    x = torch.randn(4096)
    one, same, other, high = (
        encode(x, bits=4, stochastic=True, seed=s)[0] for s in (1, 1, 2, 1 + (1 << 32))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, high)


def test_seeds_do_nothing_to_nearest_rounding() -> None:
    x = torch.randn(100)
    assert torch.equal(encode(x, bits=4, seed=1)[0], encode(x, bits=4, seed=2)[0])


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_mean_over_seeds_is_the_value(bits: int, rotate: bool) -> None:
    x, seeds = torch.randn(CHUNK), 300
    g = {"bits": bits, "block": CHUNK, "rotate": rotate}
    wanted = rows_of(x, CHUNK, rotate).view(-1).double()
    total = torch.zeros(CHUNK, dtype=torch.float64)
    for seed in range(seeds):
        packed, scales = encode(x, **g, stochastic=True, seed=seed)
        total += decoded(packed, scales, CHUNK, g).double()
    gap = total / seeds - wanted
    # Each value is one of two neighbours: step^2 f (1 - f) is the variance of a single rounding.
    step = float(scales.float()[0]) * (2 if bits == 1 else 1)
    f = wanted / step - (0.5 if bits <= 2 else 0)
    variance = step**2 * (f - f.floor()) * (1 - (f - f.floor()))
    # Bernstein's inequality, for all 4,096 values together once in 10^5 runs (the seeds are fixed);
    # 1/512 of a step is what 256 dithers cannot say.
    log = math.log(2 * CHUNK * 1e5)
    bound = (2 * variance * log / seeds).sqrt() + 2 * step * log / (3 * seeds) + step / 512
    assert bool((gap.abs() <= bound).all())
    # Their sum: a normal variable, within 5 of its deviations.
    assert abs(float(gap.sum())) <= 5 * float((variance.sum() / seeds).sqrt())
    # Rounding to nearest does not pass.
    packed, scales = encode(x, **g)
    assert not bool(((decoded(packed, scales, CHUNK, g) - wanted).abs() <= bound).all())


def test_feedback_in_rotated_coordinates_is_feedback() -> None:
    # R is orthonormal and linear, so keeping R e instead of e changes nothing but rounding.
    x = torch.randn(2, CHUNK)
    residual, plain = torch.zeros(CHUNK), torch.zeros(CHUNK)
    for step in range(2):
        packed, scales = encode(x[step], bits=4, rotate=True, residual=residual)
        y = decode_mean(packed[None], scales[None], CHUNK, bits=4, rotate=True)
        packed, scales = encode(x[step] + plain, bits=4, rotate=True)
        z = decode_mean(packed[None], scales[None], CHUNK, bits=4, rotate=True)
        plain = x[step] + plain - z
        # A value between two levels may go to the other one: one step in 4,096 values.
        assert float((y - z).norm()) < 3 * float(scales.float()[0])
    back = rotate_chunks_back(residual.view(1, -1)).view(-1)
    assert float((back - plain).norm()) < 3 * float(scales.float()[0])
