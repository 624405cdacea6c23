"""Laws of exact sums: no order, no rounding, no memory per term."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.errors import NonFiniteError
from gradcodec.federated.exact import ExactSum

fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
terms = st.lists(
    st.tuples(st.lists(fp32, min_size=3, max_size=3), st.integers(1, 2**63 - 1)),
    min_size=1,
    max_size=12,
)


def summed(some: list[tuple[list[float], int]]) -> ExactSum:
    total = ExactSum(3)
    for values, weight in some:
        total.add(torch.tensor(values), weight)
    return total


def truth(some: list[tuple[list[float], int]]) -> list[Fraction]:
    """Each product rounded once to fp64; their sum as it is."""
    return [sum((Fraction(v[i] * float(w)) for v, w in some), Fraction()) for i in range(3)]


@given(terms, st.randoms())
def test_the_order_does_not_matter(some: list[tuple[list[float], int]], random: object) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.equal(summed(some).total(), summed(shuffled).total())


@given(terms)
def test_nothing_is_lost_however_the_terms_cancel(some: list[tuple[list[float], int]]) -> None:
    for value, exact in zip(summed(some).total().tolist(), truth(some), strict=True):
        assert abs(Fraction(value) - exact) <= abs(exact) / 2**51


@given(terms)
def test_a_sum_and_its_opposite_are_nothing(some: list[tuple[list[float], int]]) -> None:
    opposite = [([-x for x in values], weight) for values, weight in some]
    assert not summed(some + opposite).total().any()


def test_a_mean_of_equal_values_is_the_value() -> None:
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    total = ExactSum(len(x))
    for weight in (3, 7, 2**40 + 1):
        total.add(x, weight)
    assert torch.equal(total.mean(), x)


def test_a_mean_is_that_of_fsum() -> None:
    g = torch.Generator().manual_seed(0)
    xs: list[Tensor] = [torch.randn(50, generator=g) * 10.0**k for k in range(-6, 6)]
    total = ExactSum(50)
    for k, x in enumerate(xs, 1):
        total.add(x, k)
    weight = sum(range(1, len(xs) + 1))
    exact = [math.fsum(k * float(x[i]) for k, x in enumerate(xs, 1)) / weight for i in range(50)]
    assert torch.equal(total.mean(), torch.tensor(exact, dtype=torch.float64).float())


def test_a_copy_goes_on_by_itself() -> None:
    total = ExactSum(2)
    total.add(torch.ones(2))
    other = total.copy()
    other.add(torch.ones(2))
    assert (total.total().tolist(), other.total().tolist()) == ([1.0, 1.0], [2.0, 2.0])
    assert ExactSum(0).total().shape == (0,)


def test_sums_add_up_to_the_bits_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    some = [torch.randn(70_000, generator=generator) * 10.0**k for k in (-30, -3, 0, 3, 20)]
    whole, parts = ExactSum(70_000), [ExactSum(70_000), ExactSum(70_000)]
    for i, values in enumerate(some):
        whole.add(values, i + 1)
        parts[i % 2].add(values, i + 1)
    assert torch.equal(parts[0].total(parts[1]), whole.total())
    assert torch.equal(parts[0].mean(parts[1]), whole.mean())


@pytest.mark.parametrize("value", [1e308, torch.inf, torch.nan])
def test_what_leaves_fp64_is_refused_and_not_added(value: float) -> None:
    total = ExactSum(2)
    total.add(torch.ones(2))
    with pytest.raises(NonFiniteError):
        total.add(torch.tensor([1.0, value], dtype=torch.float64), 2**60)
    assert total.mean().tolist() == [1.0, 1.0]


def test_weights_beyond_64_bits_together_are_weights() -> None:
    total = ExactSum(1)
    for value in (1.0, 2.0, 3.0):
        total.add(torch.tensor([value]), 2**63 - 1)
    assert total.mean().tolist() == [2.0]
