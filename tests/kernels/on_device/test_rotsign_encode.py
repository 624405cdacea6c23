import pytest
import torch

from gradcodec.reference.hadamard import random_sign_words
from gradcodec.reference.rotsign import encode as oracle
from gradcodec_kernels.rotsign_encode import rotsign_encode


def same(guarded, values, block, kept, residual=None):
    """Run both and compare all that they make."""
    blocks = -(-values.numel() // block)
    signs = random_sign_words(blocks * block, 3)
    packed, scales = guarded((blocks * kept // 8,)), guarded((blocks,), torch.bfloat16)
    left_over = None if residual is None else guarded(like=residual)
    options = {"block": block, "kept": kept}
    rotsign_encode(
        guarded(like=values), guarded(like=signs), packed, scales, residual=left_over, **options
    )
    its = None if residual is None else residual.clone()
    theirs = oracle(values, signs, residual=its, **options)
    assert torch.equal(packed.cpu(), theirs[0])
    # Sums of squares in fp64, whose order is open, and for blocks of 2 * 4^n a factor in fp32.
    assert torch.equal(scales.cpu(), theirs[1])
    if residual is not None:
        assert torch.equal(left_over.cpu(), its)


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 2 * 4096 + 17])
@pytest.mark.parametrize(("block", "kept"), [(64, 64), (256, 64), (512, 72), (4096, 4096)])
def test_signs_scales_and_residual_are_the_oracles(guarded, numel, block, kept):
    same(guarded, torch.randn(numel), block, kept, torch.randn(numel) if numel % 2 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16])
def test_values_of_every_dtype(guarded, dtype, kept):
    residual = None if kept is None else torch.randn(4200).to(kept)
    same(guarded, torch.randn(4200).to(dtype), 256, 256, residual)


@pytest.mark.parametrize("power", [-149, -100, 127])
def test_any_magnitude_is_rotated_within_fp32(guarded, power):
    same(guarded, torch.ldexp(torch.randn(300).sign(), torch.tensor(power)), 256, 256)
    same(guarded, torch.zeros(300), 64, 8)


def test_what_fills_no_bytes_is_refused(guarded):
    with pytest.raises(ValueError, match="multiple of 8"):
        same(guarded, torch.randn(64), 64, 13)
