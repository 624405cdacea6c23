"""Bit packing and the levels of a block codec against the obvious loops."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.codecs import BlockQuant
from gradcodec.errors import ConfigError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.reference import grid, two_means
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.decode_mean import decode_mean
from gradcodec.reference.encode import encode, segment_of

SIZES = [0, 1, 7, 8, 63, 64, 65, 4097]
WIDTHS = range(1, 17)
BITS = (8, 4, 2, 1)


def values_of(bits: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, (count,), generator=generator)


# -- bit packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", SIZES)
def test_values_come_back(bits: int, count: int) -> None:
    values = values_of(bits, count)
    assert torch.equal(unpack_bits(pack_bits(values, bits), bits, count), values.int())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", SIZES)
def test_packed_sizes_are_exact(bits: int, count: int) -> None:
    packed = pack_bits(values_of(bits, count), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_nbytes(count, bits) == math.ceil(count * bits / 8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bit_j_of_the_stream_is_bit_j_mod_8_of_byte_j_div_8(bits: int) -> None:
    values = values_of(bits, 21)
    stream = sum(int(v) << (i * bits) for i, v in enumerate(values))
    expected = stream.to_bytes(packed_nbytes(21, bits), "little")
    assert bytes(pack_bits(values, bits).tolist()) == expected


@given(st.integers(1, 16), st.data())
def test_packing_any_values(bits: int, data: st.DataObject) -> None:
    values = torch.tensor(
        data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40)), dtype=torch.int64
    )
    assert torch.equal(unpack_bits(pack_bits(values, bits), bits, len(values)), values.int())


@pytest.mark.parametrize("bits", WIDTHS)
def test_non_contiguous_values_pack_alike(bits: int) -> None:
    values = values_of(bits, 60)
    strided = values.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert torch.equal(pack_bits(strided, bits), pack_bits(values, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_left_over_bits_are_not_read(bits: int) -> None:
    values = values_of(bits, 3)
    packed = pack_bits(values, bits)
    used = 3 * bits - 8 * (packed.numel() - 1)
    packed[-1] |= 0xFF << used & 0xFF
    assert torch.equal(unpack_bits(packed, bits, 3), values.int())


# -- levels of a block against a loop in fp64 ----------------------------------------------------
#
# The scales that ``BlockQuant`` has where none is asked for: absmax at 8 and 4 bits, two fitted
# magnitudes at 2, the mean magnitude at 1. Other scales: tests/reference/test_grid.py.

SCALE = {8: "absmax", 4: "absmax", 1: "l1"}


def coded(x: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales ``[blocks, 1 or 2]``."""
    if bits == 2:
        return two_means.encode(x, block)
    packed, scales = encode(x, bits=bits, block=block, scale=SCALE[bits])
    return packed, scales[:, None]


def values(
    packed: torch.Tensor, scales: torch.Tensor, count: int, bits: int, block: int
) -> torch.Tensor:
    """What they decode to, fp32 ``[count]``."""
    flat = scales.reshape(1, -1)
    if bits == 2:
        return two_means.decode_mean(packed[None], flat, count, block)
    return decode_mean(packed[None], flat, count, bits=bits, block=block)


def quantised(x: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    return values(*coded(x, bits, block), len(x), bits, block)


def bf16(value: float) -> float:
    """Nearest bf16, ties to even, by the bits of the fp32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def naive_scales(block: list[float], bits: int) -> list[float]:
    """Scales of one block, in fp64 until they are rounded to bf16."""
    size = [abs(v) for v in block]
    mean = sum(size) / len(size)
    if bits >= 4:
        return [bf16(max(size) / (2 ** (bits - 1) - 1))]
    if bits == 1:
        return [bf16(mean)]
    low = high = threshold = mean
    for _ in range(two_means.LLOYD_STEPS):
        large = [v for v in size if v > threshold]
        small = [v for v in size if v <= threshold]
        high = sum(large) / len(large) if large else threshold
        low = sum(small) / len(small) if small else 0.0
        threshold = (low + high) / 2
    return [bf16(low), bf16(high)]


def naive_levels(scales: list[float], bits: int) -> list[float]:
    """All values that a block of these scales can decode to."""
    if bits >= 4:
        top = 2 ** (bits - 1) - 1
        return [scales[0] * q for q in range(-top, top + 1)]
    return [sign * s for s in scales for sign in (1, -1)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 321])
def test_scales_are_those_of_the_loop(bits: int, count: int) -> None:
    x = torch.randn(count)
    scales = coded(x, bits, block=32)[1]
    blocks = [p.tolist() for p in x.split(32)]
    expected = torch.tensor([naive_scales(b, bits) for b in blocks])
    # fp32 sums may fall on the other side of a bf16 rounding: one unit, 2^-8, at most.
    assert torch.allclose(scales.float(), expected, rtol=2**-7, atol=0)
    # ... which is rare: all but a few are equal.
    assert float((scales.float() == expected).float().mean()) >= 0.9


@pytest.mark.parametrize("bits", BITS)
def test_every_value_goes_to_its_nearest_level(bits: int) -> None:
    x = torch.randn(200)
    packed, scales = coded(x, bits, block=32)
    y = values(packed, scales, 200, bits, block=32).tolist()
    for i, (value, came) in enumerate(zip(x.tolist(), y, strict=True)):
        levels = naive_levels(scales[i // 32].float().tolist(), bits)
        nearest = min(abs(value - level) for level in levels)
        # At a tie between two levels fp32 may choose the other one.
        assert abs(value - came) <= nearest * (1 + 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(4096)
    packed, scales = coded(x, bits, block=64)
    step = scales.float().repeat_interleave(64)
    # A scale rounded down clips the largest values by what is missing: top * step < |x|.
    clipped = (x.abs() - grid.TOP[bits] * step).clamp_min(0)
    error = (values(packed, scales, 4096, bits, 64) - x).abs()
    assert bool((error <= torch.maximum(0.5 * step, clipped) * (1 + 1e-6)).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 4097])
def test_shapes_and_dtypes(bits: int, count: int) -> None:
    packed, scales = coded(torch.randn(count), bits, block=64)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (packed_nbytes(count, bits),))
    assert scales.dtype == torch.bfloat16
    assert tuple(scales.shape) == (math.ceil(count / 64), 2 if bits == 2 else 1)


@pytest.mark.parametrize("bits", BITS)
def test_decoded_values_are_exact_products(bits: int) -> None:
    packed, scales = coded(torch.randn(320), bits, 64)
    y = values(packed, scales, 320, bits, 64).double()
    for i in range(320):
        assert float(y[i]) in naive_levels(scales[i // 64].double().tolist(), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rest", [1, 7, 63])
def test_padding_does_not_pull_the_last_block(bits: int, rest: int) -> None:
    x = torch.randn(128 + rest) + 3
    scales = coded(x, bits, block=64)[1]
    alone = coded(x[128:], bits, block=max(rest, 8))[1]
    assert torch.equal(scales[-1], alone[0])


@pytest.mark.parametrize("bits", BITS)
def test_blocks_do_not_touch_each_other(bits: int) -> None:
    x = torch.randn(3 * 64)
    other = x.clone()
    other[64:128] *= 100
    one, two = quantised(x, bits, 64), quantised(other, bits, 64)
    assert torch.equal(one[:64], two[:64])
    assert torch.equal(one[128:], two[128:])


@pytest.mark.parametrize("bits", BITS)
def test_a_sign_flip_flips_the_output(bits: int) -> None:
    # Halves are rounded up: a value between two levels is where signs differ, and there is none.
    x = torch.randn(256)
    assert torch.equal(quantised(-x, bits, 64), -quantised(x, bits, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("power", [-60, -1, 1, 60])
def test_a_power_of_two_scales_the_output(bits: int, power: int) -> None:
    x = torch.randn(256)
    assert torch.equal(quantised(x * 2.0**power, bits, 64), quantised(x, bits, 64) * 2.0**power)


@pytest.mark.parametrize("bits", BITS)
def test_equal_magnitudes_survive(bits: int) -> None:
    x = torch.where(torch.arange(64) % 3 == 0, -1.75, 1.75)
    # Exact but for the rounding of 1.75 / 7 or 1.75 / 127 to bf16: half of 2^-8.
    assert torch.allclose(quantised(x, bits, 32), x, rtol=2**-9 if bits >= 4 else 0, atol=0)


def test_two_means_over_segments_are_those_of_the_parts() -> None:
    cut = segment_of(64)
    x = torch.randn(cut + 200)
    whole = quantised(x, 2, 64)
    parts = [quantised(part, 2, 64) for part in (x[:cut], x[cut:])]
    assert torch.equal(whole, torch.cat(parts))


def test_a_mean_of_two_means_is_the_mean_of_decodes_to_the_bit() -> None:
    made = [coded(torch.randn(1001), 2, 64) for _ in range(3)]
    packed, scales = torch.stack([m[0] for m in made]), torch.stack([m[1].view(-1) for m in made])
    total = torch.zeros(1001)
    for p, s in made:
        total += values(p, s, 1001, 2, 64)
    assert torch.equal(two_means.decode_mean(packed, scales, 1001, 64), total * (1.0 / 3))


@pytest.mark.parametrize("bits", BITS)
def test_the_codec_has_these_levels_by_default(bits: int) -> None:
    x, codec = torch.randn(1001), BlockQuant(BlockQuantConfig(bits, block=64))
    packed, scales = coded(x, bits, 64)
    body = torch.cat([scales.reshape(-1).view(torch.uint8), packed])
    assert torch.equal(codec.packer.pack(x), body)
    assert torch.equal(codec.packer.unpack(body, 1001), quantised(x, bits, 64))


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("bits", [0, 3, 5, 16, -1, 4.0, True, None, "4"]),
        ("block", [0, 7, (1 << 20) + 1, 256.0, None, "256"]),
    ],
)
def test_bad_settings_are_named(setting: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=setting):
            BlockQuantConfig(**{setting: value})
