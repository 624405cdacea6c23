import pytest
import torch

from gradcodec.reference.two_means import encode as oracle
from gradcodec_kernels.lloyd_encode import lloyd_encode


def same(guarded, values, block, residual=None):
    """Run both and compare all that they make."""
    packed = guarded((-(-values.numel() // 4),))
    scales = guarded((-(-values.numel() // block), 2), torch.bfloat16)
    left_over = None if residual is None else guarded(like=residual)
    lloyd_encode(guarded(like=values), packed, scales, block=block, residual=left_over)
    its = None if residual is None else residual.clone()
    theirs = oracle(values, block, its)
    assert torch.equal(scales.cpu(), theirs[1])
    assert torch.equal(packed.cpu(), theirs[0])
    if residual is not None:
        assert torch.equal(left_over.cpu(), its)


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 2 * 4096 + 17])
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_levels_codes_and_residual_are_the_oracles(guarded, numel, block):
    same(guarded, torch.randn(numel), block, torch.randn(numel) if numel % 2 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16])
def test_values_of_every_dtype(guarded, dtype, kept):
    residual = None if kept is None else torch.randn(4200).to(kept)
    same(guarded, torch.randn(4200).to(dtype), 256, residual)


def test_one_magnitude_and_none(guarded):
    same(guarded, torch.full((300,), -0.1), 64)
    same(guarded, torch.zeros(300), 64)
