"""Sixteen levels that fit a Gaussian: as good as the best, and codes of the nearest."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from gradcodec.reference import gaussian, grid

BEST = 0.009501
"""The least error of 16 levels for a standard normal (Max 1960, table I)."""

ONE = torch.ones(1, dtype=torch.bfloat16)


def levels() -> list[float]:
    """Values of all codes in units of delta, code by code."""
    return [-float(s) for s in reversed(gaussian.SIZES)] + [float(s) for s in gaussian.SIZES]


def below(x: float) -> float:
    """The standard normal's distribution."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def error(sizes: tuple[int, ...], factor: float) -> float:
    """Mean squared error of ``factor * sizes`` for a standard normal, by integrals."""
    marks = [s * factor for s in sizes]
    ends = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(marks)), 40.0]
    total = 0.0
    for mark, a, b in zip(marks, ends, ends[1:], strict=False):
        share, first = below(b) - below(a), density(a) - density(b)
        second = share + a * density(a) - b * density(b)
        total += second - 2 * mark * first + mark * mark * share
    return 2 * total


def coded(rows: Tensor, scale: str = "rms") -> Tensor:
    """Rows through codes and back."""
    counts = torch.full((len(rows),), rows.shape[1], dtype=torch.float64)
    delta = grid.deltas(rows, counts, 4, scale, stochastic=False, levels="gaussian")
    return gaussian.values_of(gaussian.codes_of(rows, delta), delta)


def test_levels_err_within_a_thousandth_of_the_best() -> None:
    assert BEST < error(gaussian.SIZES, gaussian.FACTOR) < BEST * 1.001


def test_neither_factor_nor_sizes_can_be_moved() -> None:
    least = error(gaussian.SIZES, gaussian.FACTOR)
    for factor in (0.999, 1.001):
        assert error(gaussian.SIZES, factor * gaussian.FACTOR) > least
    for k, by in ((k, by) for k in range(8) for by in (-1, 1)):
        moved = tuple(s + by * (i == k) for i, s in enumerate(gaussian.SIZES))
        assert error(moved, gaussian.FACTOR) > least, moved


def test_the_error_over_gaussians_is_that_of_the_integrals() -> None:
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    came = float((x - coded(x)).square().mean() / x.square().mean())
    # A million values know their mean error to 0.3 %; rounding delta to bf16 adds less.
    assert came == pytest.approx(error(gaussian.SIZES, gaussian.FACTOR), rel=0.01)


def test_values_are_exact_products() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None].repeat(40, 1)
    delta = (torch.rand(40) * 10.0 ** torch.arange(-20, 20)).to(torch.bfloat16)
    expected = delta.double()[:, None] * torch.tensor(levels(), dtype=torch.float64)
    assert torch.equal(gaussian.values_of(codes, delta).double(), expected)


def test_every_value_goes_to_its_nearest_level() -> None:
    rows = torch.linspace(-120, 120, 4801)[None]
    came = gaussian.values_of(gaussian.codes_of(rows, ONE), ONE)
    nearest = (torch.tensor(levels())[:, None] - rows).abs().amin(0)
    assert torch.equal((came - rows).abs()[0], nearest)


def test_a_value_in_a_middle_goes_down_on_either_side() -> None:
    sizes = torch.tensor(gaussian.SIZES).float()
    middles = ((sizes[1:] + sizes[:-1]) / 2)[None]
    for sign in (1, -1):
        came = gaussian.values_of(gaussian.codes_of(sign * middles, ONE), ONE)
        assert torch.equal(came[0], sign * sizes[:-1])


def test_a_sign_is_kept_and_zero_is_plus() -> None:
    rows = torch.tensor([[-1e-30, 1e-30, 0.0, -0.0]])
    assert gaussian.codes_of(rows, ONE).tolist() == [[7, 8, 8, 8]]


def test_a_block_of_zeros_comes_back_zero() -> None:
    for scale in ("rms", "absmax"):
        assert torch.equal(coded(torch.zeros(3, 16), scale), torch.zeros(3, 16))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_a_code(bad: float) -> None:
    codes = gaussian.codes_of(torch.tensor([[1.0, bad]]), ONE)
    assert int(codes.max()) < 16


@pytest.mark.parametrize("scale", ["rms", "absmax"])
def test_scales_of_the_largest_numbers_are_finite(scale: str) -> None:
    rows = torch.full((2, 8), torch.finfo(torch.float32).max)
    assert bool(torch.isfinite(coded(rows, scale)).all())


def test_with_absmax_nothing_is_cut() -> None:
    rows = torch.randn(4096, 64)
    peak = rows.abs().amax(1)
    came = coded(rows, "absmax").abs().amax(1)
    assert bool(((came - peak).abs() <= 2.0**-8 * peak).all())
