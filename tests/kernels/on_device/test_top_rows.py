import pytest
import torch

from gradcodec.reference.top_rows import top_rows as oracle
from gradcodec_kernels.top_rows import top_rows


def same(guarded, values, k, residual=None):
    """Run both and compare all that they make."""
    rows = -(-values.numel() // 64)
    kept, index = guarded((rows, k), values.dtype), guarded((rows, k), torch.uint8)
    left_over = None if residual is None else guarded(like=residual)
    top_rows(guarded(like=values), kept, index, k=k, residual=left_over)
    its = None if residual is None else residual.clone()
    theirs = oracle(values, k=k, residual=its)
    assert torch.equal(index.cpu(), theirs[1])
    assert torch.equal(kept.cpu().nan_to_num(7.0), theirs[0].nan_to_num(7.0))
    if residual is not None:
        assert torch.equal(left_over.cpu(), its)
    return kept.cpu(), index.cpu()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17])
@pytest.mark.parametrize("k", [1, 2])
def test_the_largest_are_the_oracles(guarded, numel, k):
    same(guarded, torch.randn(numel), k, torch.randn(numel) if numel % 2 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_position_in_every_dtype(guarded, dtype, kept):
    values = (torch.randn(4096) * 4).round().to(dtype) / 4
    residual = None if kept is None else (torch.randn(4096) * 2).round().to(kept)
    same(guarded, values, 2, residual)


def test_magnitudes_closer_than_the_key_tells_are_ties(guarded):
    values = torch.ones(64)
    values[40] = 1 + 2.0**-18
    assert same(guarded, values, 1)[1] == 0
    values[40] = 1 + 2.0**-16
    assert same(guarded, values, 1)[1] == 40


def test_zeros_are_taken_in_order(guarded):
    assert torch.equal(same(guarded, torch.zeros(64), 2)[1], torch.tensor([[0, 1]]).byte())


def test_garbage_stays_in_its_row(guarded):
    values = torch.randn(200)
    clean = same(guarded, values, 2)
    values[70], values[80] = float("nan"), float("inf")
    mine = same(guarded, values, 2)
    for a, b in zip(mine, clean, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
