import pytest
import torch

from gradcodec.reference.sparse_mean import sparse_mean as oracle
from gradcodec_kernels.sparse_mean import sparse_mean


def lists(world, chunks, k, chunk):
    places = torch.rand(world, chunks, chunk).argsort(2)[:, :, :k].sort(2).values
    return torch.randn(world, chunks, k), places.to(torch.int16)


def mean(guarded, kept, index, numel, chunk):
    out = guarded((numel,), torch.float32)
    sparse_mean(guarded(like=kept), guarded(like=index), out, chunk=chunk)
    return out.cpu()


@pytest.mark.parametrize(
    ("world", "numel", "k", "chunk"),
    [
        (1, 1, 1, 64),
        (3, 4097, 64, 4096),
        (8, 8192, 64, 4096),
        (5, 3000, 7, 1000),
        (64, 256, 9, 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_are_the_oracles(guarded, world, numel, k, chunk, dtype):
    kept, index = lists(world, -(-numel // chunk), k, chunk)
    kept = kept.to(dtype)
    assert torch.equal(
        mean(guarded, kept, index, numel, chunk), oracle(kept, index, numel, chunk=chunk)
    )


def test_ranks_that_agree_are_added_in_their_order(guarded):
    kept = torch.tensor([1e8, 1.0, -1e8, 1.0]).view(4, 1, 1)
    index = torch.zeros(4, 1, 1, dtype=torch.int16)
    assert mean(guarded, kept, index, 64, 64)[0] == oracle(kept, index, 64, chunk=64)[0]


def test_positions_beyond_the_end_are_not_written(guarded):
    kept = torch.ones(1, 1, 3)
    index = torch.tensor([[[0, 40, -1]]], dtype=torch.int16)
    assert mean(guarded, kept, index, 40, 64).sum() == 1
