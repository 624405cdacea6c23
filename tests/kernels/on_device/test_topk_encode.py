import pytest
import torch

from gradcodec.reference.topk_encode import topk_encode as oracle
from gradcodec_kernels.topk_encode import MAX_CHUNK, topk_encode


def same(guarded, values, k, chunk, residual=None):
    """Run both and compare all that they make."""
    chunks = -(-values.numel() // chunk)
    kept, index = guarded((chunks, k), values.dtype), guarded((chunks, k), torch.int16)
    left_over = None if residual is None else guarded(like=residual)
    topk_encode(guarded(like=values), kept, index, k=k, chunk=chunk, residual=left_over)
    its = None if residual is None else residual.clone()
    theirs = oracle(values, k=k, chunk=chunk, residual=its)
    assert torch.equal(index.cpu(), theirs[1])
    assert torch.equal(kept.cpu().nan_to_num(7.0), theirs[0].nan_to_num(7.0))
    if residual is not None:
        assert torch.equal(left_over.cpu(), its)
    return kept.cpu(), index.cpu()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4095, 4097, 2 * 4096 + 17])
@pytest.mark.parametrize("ef", [False, True])
def test_the_largest_are_the_oracles(guarded, numel, ef):
    values = torch.randn(numel)
    same(guarded, values, 33, 4096, torch.randn(numel) if ef else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_position_in_every_dtype(guarded, dtype, kept):
    values = (torch.randn(4096) * 4).round().to(dtype) / 4
    residual = None if kept is None else (torch.randn(4096) * 2).round().to(kept)
    same(guarded, values, 64, 4096, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighbours_on_the_number_line_are_told_apart(guarded, dtype):
    eps = torch.finfo(dtype).eps
    # Four of each, so that ties are cut wherever the threshold's last bit matters.
    steps = (torch.randperm(1024) // 4) % round(1 / eps)
    for k in range(97, 105):
        same(guarded, (1 + steps * eps).to(dtype), k, 1024)


@pytest.mark.parametrize(("k", "chunk"), [(1, 64), (64, 64), (7, 1000), (16, 2048), (3, MAX_CHUNK)])
def test_any_chunk(guarded, k, chunk):
    same(guarded, torch.randn(chunk + 50), k, chunk, torch.randn(chunk + 50))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0])
def test_equal_values_are_taken_in_order(guarded, value):
    _, index = same(guarded, torch.full((4096,), value), 5, 4096)
    assert torch.equal(index, torch.arange(5, dtype=torch.int16)[None])


def test_numbers_too_small_to_be_normal_are_ordered(guarded):
    values = torch.arange(64, dtype=torch.int32).view(torch.float32)
    same(guarded, values[torch.randperm(64)], 9, 64)
    same(guarded, (torch.arange(64) * 2.0**-24).half(), 9, 64)


def test_garbage_stays_in_its_chunk(guarded):
    values = torch.randn(3 * 1024)
    clean = same(guarded, values, 4, 1024)
    values[1030], values[1040] = float("nan"), float("-inf")
    mine = same(guarded, values, 4, 1024)
    for a, b in zip(mine, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert 6 in mine[1][1]
    assert 16 in mine[1][1]
