"""Top-k against sorting, and its mean against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.reference.encode import SEGMENT
from gradcodec.reference.sparse_mean import sparse_mean
from gradcodec.reference.top_rows import top_rows
from gradcodec.reference.topk_encode import topk_encode


def largest(values: list[float], k: int) -> list[int]:
    """Positions of the ``k`` largest magnitudes, of equal ones the first, in increasing order."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return sorted(order[:k])


def chunks_of(values: Tensor, chunk: int) -> list[list[float]]:
    """Padded with zeros."""
    total = -(-len(values) // chunk) * chunk
    return torch.cat([values, torch.zeros(total - len(values))]).view(-1, chunk).tolist()


#: Few different magnitudes of both signs: ties are what goes wrong.
TIES = st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]), max_size=90)


@given(TIES, st.integers(2, 40), st.data())
def test_the_k_largest_are_found_with_ties_to_the_first(
    values: list[float], chunk: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, chunk))
    kept, index = topk_encode(torch.tensor(values), k=k, chunk=chunk)
    for row, where, what in zip(
        chunks_of(torch.tensor(values), chunk), index.tolist(), kept.tolist(), strict=True
    ):
        assert where == largest(row, k)
        assert what == [row[i] for i in where]


@pytest.mark.parametrize("chunk", [64, 4096, 1 << 16])
def test_positions_of_long_chunks_are_unsigned(chunk: int) -> None:
    x = torch.zeros(chunk)
    x[-1] = 1.0
    index = topk_encode(x, k=1, chunk=chunk)[1]
    assert index.dtype == torch.int16
    assert (index.int() & 0xFFFF).tolist() == [[chunk - 1]]


def test_more_than_a_segment_is_the_parts() -> None:
    x = torch.randn(SEGMENT + 3000)
    kept, index = topk_encode(x, k=5, chunk=1024)
    cut = SEGMENT // 1024
    for part, rows in ((x[:SEGMENT], slice(0, cut)), (x[SEGMENT:], slice(cut, None))):
        its = topk_encode(part, k=5, chunk=1024)
        assert torch.equal(its[0], kept[rows])
        assert torch.equal(its[1], index[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 63, 65, 1000])
def test_what_is_kept_and_the_residual_are_what_was_given(numel: int, dtype: torch.dtype) -> None:
    x = torch.randn(numel).to(dtype)
    before = torch.randn(numel)
    for encode in (
        lambda r: topk_encode(x, k=3, chunk=64, residual=r),
        lambda r: top_rows(x, k=2, residual=r),
    ):
        residual = before.clone()
        kept, index = encode(residual)
        y = x.float() + before
        assert kept.dtype == dtype
        starts = torch.arange(len(kept))[:, None] * 64
        at = (index.long() + starts).view(-1)
        there = at < numel
        assert torch.equal(kept.view(-1)[there], y[at[there]].to(dtype))
        rest = y.clone()
        rest[at[there]] = 0
        assert torch.equal(residual, rest)


@given(TIES, st.sampled_from([1, 2]))
def test_rows_give_their_largest_first(values: list[float], k: int) -> None:
    kept, index = top_rows(torch.tensor(values), k=k)
    for row, where, what in zip(
        chunks_of(torch.tensor(values), 64), index.tolist(), kept.tolist(), strict=True
    ):
        order = sorted(range(64), key=lambda i: (-abs(row[i]), i))[:k]
        assert where == order
        assert what == [row[i] for i in order]


@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(0, 63), st.integers(0, 63))
def test_rows_count_magnitudes_of_equal_high_bits_as_equal(size: float, one: int, two: int) -> None:
    # The low 6 of 23 mantissa bits are the position's: up to 2^-17 of the magnitude.
    low = torch.tensor(size).view(torch.int32) & ~63
    x = torch.zeros(64)
    x[max(one, two)] = (low | 63).view(torch.float32)
    x[min(one, two)] = low.view(torch.float32)
    assert top_rows(x)[1].item() == min(one, two)


def test_rows_lose_at_most_what_the_positions_hide() -> None:
    x = torch.randn(64 * 500)
    kept = top_rows(x)[0].view(-1).abs()
    best = x.view(-1, 64).abs().amax(1)
    assert bool((kept >= best * (1 - 2.0**-17)).all())
    assert float((kept == best).float().mean()) > 0.99


# -- means of lists ------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 200), st.integers(2, 40), st.data())
def test_a_sparse_mean_is_the_mean_of_dense_vectors(
    world: int, numel: int, chunk: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, chunk))
    made = [topk_encode(torch.randn(numel), k=k, chunk=chunk) for _ in range(world)]
    dense = []
    for kept, index in made:
        row = [0.0] * (len(kept) * chunk)
        for c, (values, places) in enumerate(zip(kept.tolist(), index.tolist(), strict=True)):
            for value, place in zip(values, places, strict=True):
                row[c * chunk + place] = value
        dense.append(row[:numel])
    expected = torch.zeros(numel)
    for row in dense:  # in this order, each product and each sum rounded to fp32
        expected += torch.tensor(row) * (1.0 / world)
    kept, index = (torch.stack([m[i] for m in made]) for i in (0, 1))
    assert torch.equal(sparse_mean(kept, index, numel, chunk=chunk), expected)


def test_one_list_gives_its_values_back() -> None:
    x = torch.randn(1000)
    kept, index = topk_encode(x, k=64, chunk=64)
    assert torch.equal(sparse_mean(kept[None], index[None], 1000, chunk=64), x)
