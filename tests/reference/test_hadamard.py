"""The rotation of a chunk is the orthonormal transform that it says it is."""

import math

import pytest
import torch

from gradcodec.reference.hadamard import (
    CHUNK,
    chunk_signs,
    hadamard,
    rotate_chunks,
    rotate_chunks_back,
    rotation_factors,
)

NOISE = 12 * 2.0**-24
"""Relative error of twelve stages of fp32 sums in the L2 norm, half a unit each; measured 1.2e-7.

One step more, the product with a power of two, is exact.
"""


def dense() -> torch.Tensor:
    """``H diag(s) / 64`` in float64: entries by the parity of common bits."""
    rows, columns = chunk_signs()
    i = torch.arange(CHUNK)
    parity = i[:, None] & i
    for shift in (8, 4, 2, 1):
        parity ^= parity >> shift
    h = 1.0 - 2.0 * (parity & 1).double()
    return h * torch.outer(rows, columns).reshape(-1).double() / 64


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_it_is_the_product_with_the_dense_matrix() -> None:
    x = torch.randn(3, CHUNK)
    assert 0 < error(rotate_chunks(x), x.double() @ dense().T) < NOISE


def test_it_is_the_two_sided_product_of_tiles() -> None:
    x = torch.randn(3, CHUNK, dtype=torch.float64)
    left, right = (f.double() for f in rotation_factors())
    tiles = left @ x.view(-1, 64, 64) @ right
    assert error(rotate_chunks(x.float()), tiles.reshape(-1, CHUNK)) < 2 * NOISE


def test_whole_numbers_are_rotated_exactly() -> None:
    x = torch.randint(-100, 100, (2, CHUNK)).float()
    assert torch.equal(rotate_chunks(x).double(), x.double() @ dense().T)
    assert torch.equal(rotate_chunks_back(rotate_chunks(x)), x)


def test_the_dense_matrix_is_orthonormal() -> None:
    r, some = dense(), torch.randperm(CHUNK)[:64]
    assert torch.equal(r[some] @ r.T, torch.eye(CHUNK, dtype=torch.float64)[some])


def test_norms_and_inner_products_stay() -> None:
    x = torch.randn(2, CHUNK)
    y = rotate_chunks(x)
    assert torch.allclose(
        x.double() @ x.double().T, y.double() @ y.double().T, rtol=1e-5, atol=1e-2
    )


def test_back_is_the_inverse_from_both_sides() -> None:
    x = torch.randn(3, CHUNK)
    assert 0 < error(rotate_chunks_back(rotate_chunks(x)), x) < 2 * NOISE
    assert 0 < error(rotate_chunks(rotate_chunks_back(x)), x) < 2 * NOISE


def test_a_spike_is_spread_over_the_whole_chunk() -> None:
    x = torch.zeros(1, CHUNK)
    x[0, 1234] = 64.0
    assert torch.equal(rotate_chunks(x).abs(), torch.ones(1, CHUNK))


def test_the_input_is_not_written() -> None:
    x = torch.randn(2, CHUNK)
    before = x.clone()
    rotate_chunks(x)
    rotate_chunks_back(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("back", [False, True])
def test_in_bf16_it_is_the_same_to_bf16(back: bool) -> None:
    x = torch.randn(4, CHUNK)
    turn = rotate_chunks_back if back else rotate_chunks
    # Rounding to p bits: E[err^2] / E[x^2] is about 2^(-2p) / 6. Twice, with p = 8: 2.26e-3 in the
    # norm; measured 2.35e-3.
    assert 2e-3 < error(turn(x, torch.bfloat16), turn(x)) < 2.6e-3


def test_factors_are_exact_in_bf16() -> None:
    for factor in rotation_factors():
        assert torch.equal(factor.to(torch.bfloat16).float(), factor)
        assert torch.equal(factor.abs(), torch.full((64, 64), 1 / 8))


def test_small_matrices_are_sylvesters() -> None:
    for size in (1, 2, 64):
        h = hadamard(size)
        assert torch.allclose(h @ h.T, torch.eye(size), atol=1e-6)
        for i, j in ((0, 0), (size - 1, size - 1), (size // 2, size - 1)):
            sign = -1 if (i & j).bit_count() % 2 else 1
            assert float(h[i, j]) == pytest.approx(sign / math.sqrt(size))
