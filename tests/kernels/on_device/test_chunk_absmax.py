import pytest
import torch

from gradcodec.reference.chunk_absmax import chunk_absmax as oracle
from gradcodec.reference.encode import padded_numel
from gradcodec_kernels.chunk_absmax import chunk_absmax


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17])
@pytest.mark.parametrize("block", [64, 1024, 4096])
def test_unrotated_maxima_are_the_oracles(guarded, numel, block):
    values = torch.randn(numel).to(torch.bfloat16 if numel % 2 else torch.float32)
    residual = torch.randn(numel) if block == 64 else None
    out = guarded((-(-numel // block),), torch.float32)
    its = None if residual is None else guarded(like=residual)
    chunk_absmax(guarded(like=values), out, block=block, residual=its)
    assert torch.equal(out.cpu(), oracle(values, block=block, residual=residual))
    if residual is not None:
        assert torch.equal(its.cpu(), residual)


@pytest.mark.parametrize("numel", [1, 4097])
def test_rotated_is_the_bf16_model(guarded, rotation, numel):
    values, residual = torch.randn(numel), torch.randn(padded_numel(numel, True)) * 0.1
    out = guarded((-(-numel // 4096),), torch.float32)
    its = guarded(like=residual)
    chunk_absmax(guarded(like=values), out, block=4096, rotation=rotation, residual=its)
    options = {"rotate": True, "rotation_dtype": torch.bfloat16}
    theirs = oracle(values, residual=residual, **options)
    # One of 64 terms rounded to the next bf16 number, in either product.
    assert (out.cpu() / theirs - 1).abs().max() <= 2.0**-9
