import pytest
import torch

from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.decode_mean import decode_mean as oracle
from gradcodec.reference.encode import encode
from gradcodec.reference.grid import padded_numel
from gradcodec_kernels.decode_mean import decode_mean


def payloads(world, numel, bits, block, rotate=False):
    """Any bytes are codes; scales of eight orders of magnitude."""
    total = padded_numel(numel, rotate)
    shape = (world, packed_nbytes(total, bits))
    packed = torch.randint(0, 256, shape, dtype=torch.int32).to(torch.uint8)
    scales = (10 ** (8 * torch.rand(world, -(-total // block)) - 4)).to(torch.bfloat16)
    return packed, scales


def decoded(guarded, packed, scales, numel, dtype=torch.float32, weights=None, **options):
    out = guarded((numel,), dtype)
    its = None if weights is None else guarded(like=weights)
    decode_mean(guarded(like=packed), guarded(like=scales), out, weights=its, **options)
    return out.cpu()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_unrotated_means_are_the_oracles(guarded, numel, bits):
    block = {1: 64, 2: 4096, 4: 256, 8: 128}[bits]
    packed, scales = payloads(3, numel, bits, block)
    mine = decoded(guarded, packed, scales, numel, bits=bits, block=block)
    assert torch.equal(mine, oracle(packed, scales, numel, bits=bits, block=block))


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17])
def test_means_of_gaussian_levels_are_the_oracles(guarded, numel):
    packed, scales = payloads(3, numel, 4, 64)
    options = {"bits": 4, "block": 64, "levels": "gaussian"}
    for weights in (None, torch.rand(3)):
        mine = decoded(guarded, packed, scales, numel, weights=weights, **options)
        assert torch.equal(mine, oracle(packed, scales, numel, weights=weights, **options))


def test_rotated_blocks_of_64_are_the_bf16_model(guarded, rotation):
    options = {"bits": 4, "block": 64, "levels": "gaussian"}
    pairs = [encode(row, rotate=True, **options) for row in torch.randn(3, 4097)]
    packed, scales = (torch.stack(column) for column in zip(*pairs, strict=True))
    mine = decoded(guarded, packed, scales, 4097, rotation=rotation, **options)
    theirs = oracle(packed, scales, 4097, rotate=True, rotation_dtype=torch.bfloat16, **options)
    # As above; levels have 104 steps where those of 4 bits have 8.
    assert (mine - theirs).abs().max() <= 13 * 2e-3 * scales.float().max()


@pytest.mark.parametrize("world", [1, 2, 8, 16, 17, 27, 64])
def test_any_number_of_ranks_in_their_order(guarded, world):
    packed, scales = payloads(world, 4096, 4, 1024)
    mine = decoded(guarded, packed, scales, 4096, bits=4, block=1024)
    assert torch.equal(mine, oracle(packed, scales, 4096, bits=4, block=1024))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weighted_sums_are_the_oracles(guarded, bits):
    packed, scales = payloads(5, 4096 + 65, bits, 64)
    weights = torch.rand(5)
    options = {"bits": bits, "block": 64, "weights": weights}
    mine = decoded(guarded, packed, scales, 4161, **options)
    assert torch.equal(mine, oracle(packed, scales, 4161, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_of_16_bits_are_rounded_once(guarded, dtype):
    packed, scales = payloads(2, 4999, 4, 512)
    mine = decoded(guarded, packed, scales, 4999, dtype, bits=4, block=512)
    assert torch.equal(mine, oracle(packed, scales, 4999, bits=4, block=512, dtype=dtype))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("numel", [1, 4097])
def test_rotated_is_the_bf16_model(guarded, rotation, bits, numel):
    """The mean is the same; sums of 64 bf16 products are not in one order."""
    values = torch.randn(3, numel)
    pairs = [encode(row, bits=bits, rotate=True, scale="rms") for row in values]
    packed, scales = (torch.stack(column) for column in zip(*pairs, strict=True))
    mine = decoded(guarded, packed, scales, numel, bits=bits, block=4096, rotation=rotation)
    options = {"bits": bits, "rotate": True, "rotation_dtype": torch.bfloat16}
    theirs = oracle(packed, scales, numel, **options)
    # A number on the edge of two bf16 ones, one of 64 terms: 2**-9 of it, an eighth weighted.
    assert (mine - theirs).abs().max() <= 2e-3 * scales.float().max()


@pytest.mark.parametrize("stride", [2051, 2052, 2064])
def test_rows_may_be_apart_and_unaligned(guarded, stride):
    packed, scales = payloads(3, 4096, 4, 256)
    apart = guarded((3, stride))
    apart[:, : packed.shape[1]] = packed
    out = guarded((4096,), torch.float32)
    decode_mean(apart[:, : packed.shape[1]], guarded(like=scales), out, bits=4, block=256)
    assert torch.equal(out.cpu(), oracle(packed, scales, 4096, bits=4, block=256))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zero_scales_are_zeros(guarded, bits):
    packed, scales = payloads(2, 4097, bits, 64)
    mine = decoded(guarded, packed, torch.zeros_like(scales), 4097, bits=bits, block=64)
    assert torch.equal(mine, torch.zeros(4097))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_garbage_stays_in_its_block(guarded, bad):
    packed, scales = payloads(2, 4096 + 64, 4, 64)
    clean = decoded(guarded, packed, scales, 4160, bits=4, block=64)
    scales[1, 5] = bad
    mine = decoded(guarded, packed, scales, 4160, bits=4, block=64)
    assert not mine[320:384].isfinite().any()
    assert torch.equal(mine[:320], clean[:320])
    assert torch.equal(mine[384:], clean[384:])


@pytest.mark.gpu
def test_payloads_beyond_2_to_the_31_bytes(only_gpu: None, device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of device memory")
    packed, scales = payloads(3, 4096, 4, 256)
    far = torch.empty(3 * (3 * 2**29 + 1), dtype=torch.uint8, device=device)
    rows = far.view(3, -1)
    rows[:, :2048] = packed.to(device)
    out = torch.empty(4096, device=device)
    decode_mean(rows[:, :2048], scales.to(device), out, bits=4, block=256)
    assert torch.equal(out.cpu(), oracle(packed, scales, 4096, bits=4, block=256))
