import pytest
import torch

from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.decode_sum_shared import decode_sum_shared as oracle
from gradcodec.reference.encode import padded_numel
from gradcodec_kernels.decode_sum_shared import decode_sum_shared


def payloads(world, numel, bits, block, rotate=False):
    total = padded_numel(numel, rotate)
    shape = (world, packed_nbytes(total, bits))
    packed = torch.randint(0, 256, shape, dtype=torch.int32).to(torch.uint8)
    return packed, (torch.rand(-(-total // block)) + 1e-3).to(torch.bfloat16)


def decoded(guarded, packed, scales, numel, dtype=torch.float32, **options):
    out = guarded((numel,), dtype)
    decode_sum_shared(guarded(like=packed), guarded(like=scales), out, **options)
    return out.cpu()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_unrotated_means_are_the_oracles(guarded, numel, bits):
    block = {1: 64, 2: 4096, 4: 256, 8: 128}[bits]
    packed, scales = payloads(3, numel, bits, block)
    mine = decoded(guarded, packed, scales, numel, bits=bits, block=block)
    assert torch.equal(mine, oracle(packed, scales, numel, bits=bits, block=block))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("world", [1, 16, 17, 40])
def test_no_sum_of_the_largest_codes_overflows(guarded, bits, world):
    packed, scales = payloads(world, 4096, bits, 512)
    packed[:, ::2] = 255
    mine = decoded(guarded, packed, scales, 4096, bits=bits, block=512)
    assert torch.equal(mine, oracle(packed, scales, 4096, bits=bits, block=512))


def test_results_of_16_bits_are_rounded_once(guarded):
    packed, scales = payloads(2, 4999, 4, 64)
    options = {"bits": 4, "block": 64}
    mine = decoded(guarded, packed, scales, 4999, torch.bfloat16, **options)
    assert torch.equal(mine, oracle(packed, scales, 4999, dtype=torch.bfloat16, **options))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rotated_is_the_bf16_model(guarded, rotation, bits):
    packed, scales = payloads(4, 4097, bits, 4096, rotate=True)
    mine = decoded(guarded, packed, scales, 4097, bits=bits, block=4096, rotation=rotation)
    options = {"bits": bits, "rotate": True, "rotation_dtype": torch.bfloat16}
    theirs = oracle(packed, scales, 4097, **options)
    # Values of the tile are below 2**bits steps; see test_decode_mean.py.
    assert (mine - theirs).abs().max() <= 2e-3 * 2**bits * scales.float().max()
