"""Means of payloads: in order, without dense copies, equal to the mean of what each decodes to."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.reference.decode_mean import decode_mean
from gradcodec.reference.encode import encode, segment_of

HALF = 2.0**-24
"""Half a unit of fp32: what one rounding may change, relatively."""

BITS = pytest.mark.parametrize("bits", [1, 2, 4, 8])
WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 8])


def payloads(world: int, numel: int, **g: Any) -> tuple[Tensor, Tensor]:
    made = [encode(torch.randn(numel) * (w + 1), seed=w, **g) for w in range(world)]
    return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])


def each(packed: Tensor, scales: Tensor, numel: int, **g: Any) -> Tensor:
    """Every payload decoded alone, fp32 ``[W, numel]``."""
    return torch.stack(
        [decode_mean(p[None], s[None], numel, **g) for p, s in zip(packed, scales, strict=True)]
    )


@BITS
@WORLDS
@pytest.mark.parametrize("block", [8, 100, 4096])
def test_a_mean_is_the_mean_of_decodes_to_the_bit(world: int, bits: int, block: int) -> None:
    numel = 5001
    packed, scales = payloads(world, numel, bits=bits, block=block)
    rows = each(packed, scales, numel, bits=bits, block=block)
    total = torch.zeros(numel)
    for row in rows:  # in this order, rounded to fp32 one by one
        total += row
    mean = decode_mean(packed, scales, numel, bits=bits, block=block)
    assert torch.equal(mean, total * (1.0 / world))


@WORLDS
def test_a_mean_of_gaussian_levels_is_the_mean_of_decodes_to_the_bit(world: int) -> None:
    numel, g = 5001, {"bits": 4, "block": 100, "levels": "gaussian"}
    packed, scales = payloads(world, numel, **g)
    total = torch.zeros(numel)
    for row in each(packed, scales, numel, **g):
        total += row
    assert torch.equal(decode_mean(packed, scales, numel, **g), total * (1.0 / world))


@pytest.mark.parametrize("block", [8, 64, 4096])
def test_rotated_blocks_of_any_divisor_come_back(block: int) -> None:
    numel, g = 5001, {"bits": 8, "block": block, "rotate": True}
    x = torch.randn(numel)
    packed, scales = encode(x, **g)
    error = each(packed[None], scales[None], numel, **g)[0] - x
    # s^2 / 12 with s = max / 127: the largest of 8 normals is about 1.7, of 4,096 about 3.7.
    assert 5e-6 < float(error.square().sum() / x.square().sum()) < 1e-4


@BITS
def test_a_mean_in_another_order_may_have_other_bits(bits: int) -> None:
    packed, scales = payloads(8, 4096, bits=bits)
    forward = decode_mean(packed, scales, 4096, bits=bits)
    backward = decode_mean(packed.flip(0), scales.flip(0), 4096, bits=bits)
    size = each(packed, scales, 4096, bits=bits).abs().sum(0) / 8
    assert bool(((forward - backward).abs() <= 16 * HALF * size).all())


@BITS
@WORLDS
def test_rotated_means_are_means_to_rounding(world: int, bits: int) -> None:
    numel, g = 5001, {"bits": bits, "rotate": True}
    packed, scales = payloads(world, numel, **g)
    expected = each(packed, scales, numel, **g).double().mean(0)
    mean = decode_mean(packed, scales, numel, **g).double()
    # W sums, one product and twelve stages of a rotation.
    assert float((mean - expected).norm() / expected.norm()) < (2 * world + 26) * HALF


@BITS
def test_a_weighted_mean_rounds_products_and_sums(bits: int) -> None:
    numel, weights = 1000, torch.rand(5)
    packed, scales = payloads(5, numel, bits=bits, block=64)
    rows = each(packed, scales, numel, bits=bits, block=64)
    total = torch.zeros(numel)
    for row, weight in zip(rows, weights, strict=True):
        total += row * weight
    came = decode_mean(packed, scales, numel, bits=bits, block=64, weights=weights)
    assert torch.equal(came, total)
    exact = (rows.double() * weights.double()[:, None]).sum(0)
    size = (rows.double() * weights.double()[:, None]).abs().sum(0)
    assert bool(((came.double() - exact).abs() <= 10 * HALF * size).all())


@given(st.integers(0, 300), st.integers(8, 70), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_any_size_and_block(numel: int, block: int, bits: int, world: int) -> None:
    packed, scales = payloads(world, numel, bits=bits, block=block)
    rows = each(packed, scales, numel, bits=bits, block=block).double()
    mean = decode_mean(packed, scales, numel, bits=bits, block=block).double()
    assert mean.shape == (numel,)
    assert bool(((mean - rows.mean(0)).abs() <= 2 * world * HALF * rows.abs().sum(0)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_fp32_mean_rounded_once(dtype: torch.dtype) -> None:
    for rotate in (False, True):
        packed, scales = payloads(3, 5000, bits=4, rotate=rotate)
        wide = decode_mean(packed, scales, 5000, bits=4, rotate=rotate)
        narrow = decode_mean(packed, scales, 5000, bits=4, rotate=rotate, dtype=dtype)
        assert torch.equal(narrow, wide.to(dtype))


def test_a_mean_over_segments_is_that_of_the_parts() -> None:
    numel = segment_of(256) + 300
    packed, scales = payloads(2, numel, bits=4, block=256)
    cut = segment_of(256)
    mean = decode_mean(packed, scales, numel, bits=4, block=256)
    head = decode_mean(packed[:, : cut // 2], scales[:, : cut // 256], cut, bits=4, block=256)
    tail = decode_mean(packed[:, cut // 2 :], scales[:, cut // 256 :], 300, bits=4, block=256)
    assert torch.equal(mean, torch.cat([head, tail]))
