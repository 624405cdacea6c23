"""The sparse ops in C give the bits of the torch reference, at every level of instructions."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcodec import ops
from gradcodec.errors import MalformedBodyError
from gradcodec.native import library
from gradcodec.reference.sparse_mean import sparse_mean
from gradcodec.reference.top_rows import top_rows
from gradcodec.reference.topk_encode import topk_encode

topk_in_c = functools.partial(ops.topk_encode, impl="native")
rows_in_c = functools.partial(ops.top_rows, impl="native")
mean_in_c = functools.partial(ops.sparse_mean, impl="native")

Same = Callable[[Tensor, Tensor], bool]
SIZES = (0, 1, 63, 64, 65, 4095, 4097, 3 * 4096 + 17)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def assert_topk_is_the_references(
    values: Tensor, residual: Tensor | None, same: Same, **size: int
) -> None:
    mine, its = (None, None) if residual is None else (residual.clone(), residual.clone())
    kept, index = topk_in_c(values, residual=mine, **size)
    wanted, its_index = topk_encode(values, residual=its, **size)
    assert torch.equal(index, its_index), size
    assert same(kept, wanted), size
    if mine is not None and its is not None:
        assert same(mine, its), size


@pytest.mark.parametrize("numel", SIZES)
def test_topk_has_the_references_bits(level: str, numel: int, same: Same) -> None:
    for dtype, k in itertools.product(FLOATS, (1, 64, 4096)):
        values = torch.randn(numel).to(dtype)
        for residual in (None, torch.randn(numel), torch.randn(numel).bfloat16()):
            assert_topk_is_the_references(values, residual, same, k=k)


@pytest.mark.parametrize("chunk", [2, 63, 64, 100, 1000, 40_000, 65_536])
def test_topk_of_chunks_of_any_length(level: str, chunk: int, same: Same) -> None:
    values = torch.randn(70_000 if chunk > 64 else 500)
    for k in {1, chunk // 7 + 1, chunk - 1, chunk}:
        assert_topk_is_the_references(values, None, same, k=k, chunk=chunk)


def test_topk_of_equal_magnitudes_takes_the_first(level: str, same: Same) -> None:
    for values in (
        torch.zeros(5000),
        torch.ones(5000) * torch.tensor([1.0, -1.0]).repeat(2500),
        torch.randint(-3, 4, (5000,)).float(),
        # The same upper 16 bits, so that the lower ones decide.
        1 + torch.randint(0, 50, (5000,)) * 2.0**-23,
    ):
        for k in (1, 64, 1000, 4095):
            assert_topk_is_the_references(values, None, same, k=k)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_topk_of_any_bit_patterns(
    native_library: library.Library, same: Same, data: st.DataObject
) -> None:
    # NaN, infinities and subnormals among them, and many ties.
    words = data.draw(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=12))
    order = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
    length = data.draw(st.integers(1, 700))
    pattern = torch.tensor(words, dtype=torch.int32)
    values = pattern[torch.randint(0, len(words), (length,), generator=order)].view(torch.float32)
    chunk = data.draw(st.integers(2, 300))
    k = data.draw(st.integers(1, chunk))
    assert_topk_is_the_references(values, None, same, k=k, chunk=chunk)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("numel", SIZES)
def test_top_rows_has_the_references_bits(level: str, numel: int, k: int, same: Same) -> None:
    for dtype, e_dtype in itertools.product(FLOATS, (None, *FLOATS)):
        # Few values, so that rows have ties.
        for values in (torch.randn(numel), torch.randint(-2, 3, (numel,)).float()):
            mine = its = None
            if e_dtype is not None:
                mine = torch.randn(numel).to(e_dtype)
                its = mine.clone()
            kept, index = rows_in_c(values.to(dtype), k=k, residual=mine)
            wanted, its_index = top_rows(values.to(dtype), k=k, residual=its)
            assert torch.equal(index, its_index)
            assert same(kept, wanted)
            if mine is not None and its is not None:
                assert same(mine, its)


@pytest.mark.parametrize("numel", SIZES)
def test_sparse_mean_has_the_references_bits(level: str, numel: int, same: Same) -> None:
    for dtype, k, world in itertools.product(FLOATS, (1, 64, 100), (1, 3)):
        made = [topk_encode(torch.randn(numel).to(dtype), k=k) for _ in range(world)]
        kept, index = torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])
        mine = mean_in_c(kept, index, numel)
        assert same(mine, sparse_mean(kept, index, numel))
        assert same(mine, mean_in_c(kept, index.long() & 0xFFFF, numel))


def test_positions_above_32767_are_unsigned(level: str, same: Same) -> None:
    kept, index = topk_encode(torch.randn(65_536), k=500, chunk=65_536)
    mine = mean_in_c(kept[None], index[None], 65_536, chunk=65_536)
    assert same(mine, sparse_mean(kept[None], index[None], 65_536, chunk=65_536))


def test_a_position_beyond_its_chunk_is_refused(level: str) -> None:
    kept = torch.ones(2, 1, 3)
    index = torch.tensor([[[0, 1, 2]], [[0, 1, 100]]], dtype=torch.int16)
    with pytest.raises(MalformedBodyError, match="positions below 100"):
        mean_in_c(kept, index, 100, chunk=100)
