import pytest
import torch

from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.encode import encode
from gradcodec.reference.project_quantise import project_quantise as oracle
from gradcodec_kernels.project_quantise import project_quantise


@pytest.mark.parametrize(
    ("m", "n", "r", "s"),
    [
        (1, 1, 1, None),
        (300, 130, 5, None),
        (64, 200, 80, None),
        (1030, 64, 16, 9),
        (70, 257, 33, 40),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_close_and_codes_are_those_of_the_product(guarded, m, n, r, s, dtype):
    grad, left = torch.randn(m, n).to(dtype), torch.randn(m, r).to(dtype)
    right = None if s is None else torch.randn(n, s).to(dtype)
    options = {"bits": 4, "block": 64, "scale": "absmax"}
    numel = r * (s or n)
    packed, scales = (
        guarded((packed_nbytes(numel, 4),)),
        guarded((-(-numel // 64),), torch.bfloat16),
    )
    code = guarded((r, s or n), torch.float32)
    its = None if right is None else guarded(like=right)
    project_quantise(
        guarded(like=grad), guarded(like=left), packed, scales, code, right=its, **options
    )
    _, _, theirs = oracle(grad, left, right, **options)
    wide = [t.double() for t in (left, grad)]
    exact = wide[0].T @ wide[1] if right is None else wide[0].T @ wide[1] @ right.double()
    # Both are fp32: as far from the exact product as the oracle, up to the order of sums.
    scale = exact.abs().max()
    assert (theirs - exact).abs().max() <= 1e-5 * scale
    assert (code.cpu() - exact).abs().max() <= 1e-5 * scale
    again = encode(code.cpu().view(-1), **options)
    assert torch.equal(packed.cpu(), again[0])
    assert torch.equal(scales.cpu(), again[1])


def test_gradients_may_be_views_of_rows(guarded):
    grad, left = torch.randn(96, 100), torch.randn(100, 8)
    packed, scales = guarded((packed_nbytes(8 * 100, 8),)), guarded((1,), torch.bfloat16)
    code = guarded((8, 100), torch.float32)
    device_grad, device_left = guarded(like=grad), guarded(like=left)
    options = {"bits": 8, "block": 4096, "scale": "absmax"}
    project_quantise(device_grad[::2], device_left[:48], packed, scales, code, **options)
    theirs = oracle(grad[::2], left[:48], **options)[2]
    assert (code.cpu() - theirs).abs().max() <= 1e-5 * theirs.abs().max()
