import pytest
import torch

from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.two_means import decode_mean as oracle
from gradcodec_kernels.lloyd_mean import lloyd_mean


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 2 * 4096 + 17])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_means_are_the_oracles(guarded, numel, world, weighted):
    block = 256 if numel % 2 else 64
    packed = torch.randint(0, 256, (world, packed_nbytes(numel, 2)), dtype=torch.uint8)
    scales = torch.rand(world, 2 * -(-numel // block)).to(torch.bfloat16)
    weights = torch.rand(world) if weighted else None
    out = guarded((numel,), torch.float32)
    its = None if weights is None else guarded(like=weights)
    lloyd_mean(guarded(like=packed), guarded(like=scales), out, block=block, weights=its)
    assert torch.equal(out.cpu(), oracle(packed, scales, numel, block, weights))
