import pytest
import torch

from gradcodec.reference.hadamard import random_sign_words
from gradcodec.reference.rotsign import decode_mean as oracle
from gradcodec_kernels.rotsign_mean import rotsign_mean


@pytest.mark.parametrize("numel", [1, 63, 65, 4095, 4097, 2 * 4096 + 17])
@pytest.mark.parametrize(("block", "kept"), [(64, 64), (256, 64), (512, 72), (4096, 4096)])
@pytest.mark.parametrize("world", [1, 3])
def test_means_are_the_oracles(guarded, numel, block, kept, world):
    blocks = -(-numel // block)
    packed = torch.randint(0, 256, (world, blocks * kept // 8), dtype=torch.uint8)
    scales = torch.rand(world, blocks).to(torch.bfloat16)
    signs = torch.stack([random_sign_words(blocks * block, seed) for seed in range(world)])
    for weights in (None, torch.rand(world)):
        out = guarded((numel,), torch.float32)
        its = None if weights is None else guarded(like=weights)
        options = {"block": block, "kept": kept}
        made = [guarded(like=t) for t in (packed, scales, signs)]
        rotsign_mean(*made, out, weights=its, **options)
        theirs = oracle(packed, scales, signs, numel, weights=weights, **options)
        assert torch.equal(out.cpu(), theirs)
