import pytest
import torch

from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.reduce_requant import reduce_requant as oracle
from gradcodec_kernels.reduce_requant import reduce_requant


@pytest.mark.parametrize("numel", [1, 63, 65, 4095, 2 * 4096 + 17, 8192])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_bytes_scales_and_residual_are_the_oracles(guarded, numel, bits, stochastic):
    block = {1: 64, 2: 4096, 4: 256, 8: 128}[bits]
    world = 2 + numel % 3
    nbytes, blocks = packed_nbytes(numel, bits), -(-numel // block)
    packed = torch.randint(0, 256, (world, nbytes), dtype=torch.int32).to(torch.uint8)
    scales = (torch.rand(world, blocks) + 1e-3).to(torch.bfloat16)
    residual = torch.randn(numel).to(torch.bfloat16) if stochastic else None
    options = {"bits": bits, "block": block, "scale": "absmax", "stochastic": stochastic, "seed": 3}
    out, steps = guarded((nbytes,)), guarded((blocks,), torch.bfloat16)
    left_over = None if residual is None else guarded(like=residual)
    reduce_requant(
        guarded(like=packed),
        guarded(like=scales),
        out,
        steps,
        numel,
        residual=left_over,
        **options,
    )
    bytes_, theirs = oracle(packed, scales, numel, residual=residual, **options)
    assert torch.equal(steps.cpu(), theirs)
    assert torch.equal(out.cpu(), bytes_)
    if left_over is not None:
        assert torch.equal(left_over.cpu(), residual)
