"""Error feedback and weights of two fitted levels; their maths: tests/codecs/test_reference.py."""

import pytest
import torch

from gradcodec.reference import two_means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_decoded_and_the_residual_are_what_was_given(dtype: torch.dtype) -> None:
    x, before = torch.randn(1000), (torch.randn(1000) / 4).to(dtype)
    residual = before.clone()
    packed, scales = two_means.encode(x, 64, residual)
    came = two_means.decode_mean(packed[None], scales.view(1, -1), 1000, 64)
    assert torch.equal(residual, ((x + before.float()) - came).to(dtype))
    assert 0.1 < float(residual.float().norm() / x.norm()) < 0.5


def test_a_weighted_mean_adds_in_order() -> None:
    made = [two_means.encode(torch.randn(1000), 64) for _ in range(3)]
    packed, scales = (torch.stack([m[i].view(-1) for m in made]) for i in (0, 1))
    weights = torch.rand(3)
    total = torch.zeros(1000)
    for p, s, w in zip(packed, scales, weights, strict=True):
        total += two_means.decode_mean(p[None], s[None], 1000, 64) * w
    assert torch.equal(two_means.decode_mean(packed, scales, 1000, 64, weights), total)


def test_of_equal_magnitudes_no_lower_level_is_left() -> None:
    # 0.1 is no short fp32 number: the sum of all less the sum of all must still be nothing.
    x = torch.full((300,), 0.1)
    scales = two_means.encode(x, 256)[1]
    assert torch.equal(scales[:, 1], torch.full((2,), 0.1).bfloat16())
    assert torch.equal(two_means.encode(torch.zeros(64), 64)[1], torch.zeros(1, 2).bfloat16())
