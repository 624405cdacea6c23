import pytest
import torch
import triton
import triton.language as tl

from gradcodec.reference import grid
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.encode import encode as oracle
from gradcodec.reference.grid import padded_numel
from gradcodec.reference.philox import random_bytes as oracle_bytes
from gradcodec_kernels.encode import encode
from gradcodec_kernels.quantise import random_bytes

SIZES = (1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17)
SEED = 2**63 + 12345


def outputs(guarded, numel, bits, block, rotate=False):
    total = padded_numel(numel, rotate)
    packed = guarded((packed_nbytes(total, bits),), torch.uint8)
    return packed, guarded((-(-total // block),), torch.bfloat16)


def both(guarded, values, residual=None, rotation=None, **options):
    """What the kernel makes, and its oracle: packed, scales and residual of each."""
    device_values = guarded(like=values)
    rotate = rotation is not None
    packed, scales = outputs(guarded, values.numel(), options["bits"], options["block"], rotate)
    left_over = None if residual is None else guarded(like=residual)
    encode(device_values, packed, scales, rotation=rotation, residual=left_over, **options)
    assert torch.equal(device_values.cpu(), values)
    its = None if residual is None else residual.clone()
    expected = oracle(
        values,
        residual=its,
        rotate=rotate,
        rotation_dtype=torch.bfloat16,
        **options,
    )
    mine = (packed.cpu(), scales.cpu(), None if left_over is None else left_over.cpu())
    return mine, (*expected, its)


def assert_equal(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_unrotated_bytes_are_the_oracles(guarded, numel, bits, stochastic):
    block = {1: 64, 2: 4096, 4: 256, 8: 1024}[bits]
    values = torch.randn(numel) * torch.randn(numel).exp()
    residual = torch.randn(numel) * 0.1 if numel % 2 else None
    options = {"bits": bits, "block": block, "scale": "absmax", "seed": SEED}
    assert_equal(*both(guarded, values, residual, stochastic=stochastic, **options))


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_length(guarded, block):
    values = torch.randn(4096 + 700)
    assert_equal(*both(guarded, values, bits=4, block=block, scale="absmax", stochastic=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_every_dtype(guarded, dtype, kept):
    values, residual = torch.randn(4999).to(dtype), (torch.randn(4999) * 0.3).to(kept)
    options = {"bits": 4, "block": 64, "scale": "absmax", "seed": 7}
    assert_equal(*both(guarded, values, residual, stochastic=True, **options))


@pytest.mark.parametrize(
    ("bits", "scale"), [(1, "l1"), (2, "l1"), *((b, "rms") for b in (1, 2, 4, 8))]
)
def test_mean_scales_are_within_a_bf16_number_and_codes_follow_them(guarded, bits, scale):
    values, residual = torch.randn(4096 + 65), torch.randn(4096 + 65) * 0.1
    options = {"bits": bits, "block": 256, "seed": 3}
    mine, theirs = both(guarded, values, residual, scale=scale, **options)
    away = (mine[1].view(torch.int16).int() - theirs[1].view(torch.int16).int()).abs()
    assert away.max() <= 1
    assert (away > 0).float().mean() <= 0.1
    # With the steps that it found, everything else is the oracle's.
    rows = torch.zeros(-(-len(values) // 256), 256)
    rows.view(-1)[: len(values)] = values + residual
    codes = grid.codes_of(rows, mine[1], bits, None)
    rest = rows - grid.values_of(codes, mine[1], bits)
    assert torch.equal(mine[0], pack_bits(codes.view(-1)[: len(values)], bits))
    assert torch.equal(mine[2], rest.view(-1)[: len(values)])


@pytest.mark.parametrize("numel", [0, *SIZES])
def test_bytes_of_gaussian_levels_are_the_oracles(guarded, numel):
    values = torch.randn(numel) * torch.randn(numel).exp()
    values[::7] = 0
    for block in (64, 4096):
        options = {"bits": 4, "block": block, "scale": "absmax", "levels": "gaussian"}
        assert_equal(*both(guarded, values, torch.randn(numel) * 0.1, **options))


@pytest.mark.parametrize("scale", ["absmax", "rms"])
@pytest.mark.parametrize("block", [64, 4096])
def test_rotated_gaussian_levels_follow_the_bf16_model(guarded, rotation, block, scale):
    values, residual = torch.randn(4097), torch.randn(padded_numel(4097, True)) * 0.1
    options = {"bits": 4, "block": block, "scale": scale, "levels": "gaussian"}
    mine, theirs = both(guarded, values, residual, rotation, **options)
    away = (mine[1].float() / theirs[1].float() - 1).abs()
    assert away.max() <= 2.0**-7
    same = mine[1].repeat_interleave(block) == theirs[1].repeat_interleave(block)
    codes = [unpack_bits(packed, 4, len(same))[same] for packed in (mine[0], theirs[0])]
    differ = (codes[0] - codes[1]).abs()
    assert differ.max() <= 1
    assert (differ > 0).float().mean() <= 1e-3


def test_rotation_with_a_block_that_is_no_row_of_a_tile_is_refused(guarded, rotation):
    with pytest.raises(ValueError, match="64 or 4096"):
        both(guarded, torch.randn(100), rotation=rotation, bits=4, block=128, scale="rms")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("numel", [1, 4097, 3 * 4096 - 17])
def test_rotated_is_the_bf16_model(guarded, rotation, bits, numel):
    """Sums of 64 products have no order, so one code in a thousand may be its neighbour."""
    values = torch.randn(numel) * torch.randn(numel).exp()
    residual = torch.randn(padded_numel(numel, True)) * 0.1
    options = {"bits": bits, "block": 4096, "scale": "absmax", "seed": SEED}
    mine, theirs = both(guarded, values, residual, rotation, stochastic=True, **options)
    away = (mine[1].float() / theirs[1].float() - 1).abs()
    assert away.max() <= 2.0**-7
    same = mine[1].repeat_interleave(4096) == theirs[1].repeat_interleave(4096)
    codes = [unpack_bits(packed, bits, len(same))[same] for packed in (mine[0], theirs[0])]
    differ = (codes[0] - codes[1]).abs()
    assert differ.max() <= 1
    assert (differ > 0).float().mean() <= 1e-3
    steps = theirs[1].float().repeat_interleave(4096)[same]
    close = (mine[2][same] - theirs[2][same]).abs() <= steps * 1e-3
    assert close.float().mean() >= 1 - 2e-3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zeros_have_no_scale(guarded, bits):
    options = {"bits": bits, "block": 64, "scale": "absmax"}
    mine, theirs = both(guarded, torch.zeros(4097), torch.zeros(4097), **options)
    assert_equal(mine, theirs)
    assert not mine[1].any()
    assert not mine[2].any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_garbage_stays_in_its_block(guarded, bits, bad):
    values = torch.randn(4096 + 130)
    options = {"bits": bits, "block": 64, "scale": "absmax", "stochastic": True, "seed": 9}
    clean, _ = both(guarded, values, torch.zeros(len(values)), **options)
    values[64 * 3 + 5] = bad
    values[4096 + 129] = bad
    packed, scales = outputs(guarded, len(values), bits, 64)
    left_over = guarded(like=torch.zeros(len(values)))
    encode(guarded(like=values), packed, scales, residual=left_over, **options)
    for mine, theirs, per in (
        (packed, clean[0], 8 * bits),
        (scales, clean[1], 1),
        (left_over, clean[2], 64),
    ):
        good = torch.ones(len(theirs), dtype=torch.bool)
        good[3 * per : 4 * per] = False
        good[66 * per :] = False
        assert torch.equal(mine.cpu()[good], theirs[good])


def test_garbage_stays_in_its_chunk_when_rotated(guarded, rotation):
    values = torch.randn(3 * 4096)
    options = {"bits": 4, "block": 4096, "scale": "absmax"}
    clean, _ = both(guarded, values, rotation=rotation, **options)
    values[4096 + 5] = float("nan")
    packed, scales = outputs(guarded, len(values), 4, 4096)
    encode(guarded(like=values), packed, scales, rotation=rotation, **options)
    for chunk in (0, 2):
        assert scales[chunk] == clean[1][chunk]
        part = slice(chunk * 2048, (chunk + 1) * 2048)
        assert torch.equal(packed[part].cpu(), clean[0][part])


def test_the_largest_values_do_not_overflow(guarded):
    values = torch.full((4096,), torch.finfo(torch.float32).max)
    for bits in (1, 2, 4, 8):
        options = {"bits": bits, "block": 256, "scale": "absmax", "stochastic": True}
        mine, theirs = both(guarded, values, **options)
        assert_equal(mine, theirs)
        assert mine[1].isfinite().all()


def test_unaligned_views_are_right(guarded):
    values = torch.randn(5001)
    whole = guarded(like=values)
    packed, scales = outputs(guarded, 5000, 4, 64)
    encode(whole[1:], packed, scales, bits=4, block=64, scale="absmax")
    assert torch.equal(packed.cpu(), oracle(values[1:], bits=4, block=64)[0])


@triton.jit
def dither_kernel(OUT, low, high, chunk, C: tl.constexpr):
    tile = random_bytes(low, high, tl.cast(chunk, tl.int64), 1, C)
    tl.store(OUT + tl.arange(0, C)[None, :], tile.to(tl.uint8))


@pytest.mark.parametrize("chunk", [2, 2**20 - 1, 2**24, 2**30 + 3])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**64 - 1, -1])
def test_dither_is_philox_at_positions_beyond_32_bits(guarded, chunk, seed):
    from gradcodec_kernels.launch import halves

    out = guarded((4096,), torch.uint8)
    dither_kernel[(1,)](out, *halves(seed), chunk, C=4096)
    assert torch.equal(out.cpu(), oracle_bytes(chunk * 4096, 4096, seed & (2**64 - 1)))


@pytest.mark.gpu
def test_addresses_have_64_bits(only_gpu: None, device: torch.device) -> None:
    """Values beyond the first 2**31: a chunk there is coded like an equal one at the start."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of device memory")
    numel = 2**31 + 4096
    values = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    values[:4096] = torch.randn(4096)
    values[-4096:] = values[:4096]
    packed = torch.empty(numel, dtype=torch.uint8, device=device)
    scales = torch.empty(numel // 4096, dtype=torch.bfloat16, device=device)
    encode(values, packed, scales, bits=8, block=4096, scale="absmax")
    assert torch.equal(packed[:4096], packed[-4096:])
    assert scales[0] == scales[-1] != 0
