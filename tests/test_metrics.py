"""What the numbers mean."""

import math

import pytest
import torch
from conformance import model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec import metrics
from gradcodec.errors import UpdateError

X = torch.tensor([3.0, 4.0])
PAIRWISE = [metrics.rse, metrics.snr_db, metrics.snr_paper, metrics.cosine]


@pytest.mark.parametrize(
    ("y", "expected"),
    [([3, 4], 0), ([0, 0], 1), ([6, 8], 1), ([-3, -4], 4), ([3, 0], 16 / 25)],
)
def test_rse_is_the_squared_error_over_the_energy(y: list[float], expected: float) -> None:
    assert metrics.rse(X, torch.tensor(y)) == expected


@pytest.mark.parametrize(("y", "expected"), [([0.0, 0.0], 0.0), ([1.0, 0.0], math.inf)])
def test_rse_of_a_zero_signal(y: list[float], expected: float) -> None:
    assert metrics.rse(torch.zeros(2), torch.tensor(y)) == expected


def test_rse_is_computed_in_fp64() -> None:
    y = torch.full((1000,), 1 + 2.0**-23)
    # In fp32 the sum of these squares would not be exact.
    assert metrics.rse(torch.ones(1000), y) == 2.0**-46


@pytest.mark.parametrize(
    ("error", "decibels"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (10.0, -20.0)]
)
def test_snr_counts_decibels(error: float, decibels: float) -> None:
    # fp32 holds 1 + error up to 2^-24.
    snr = metrics.snr_db(torch.ones(4), torch.ones(4) + error)
    assert snr == pytest.approx(decibels, abs=1e-3)


def test_snr_at_its_ends() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert metrics.snr_db(one, one) == math.inf
    assert metrics.snr_db(zero, one) == -math.inf
    assert metrics.snr_db(zero, zero) == math.inf


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_papers_snr_of_sending_nothing_is_the_number_of_elements(count: int) -> None:
    assert metrics.snr_paper(torch.ones(count), torch.zeros(count)) == count


def test_the_papers_snr_is_n_times_the_true_one() -> None:
    x, y = torch.randn(50), torch.randn(50)
    assert metrics.snr_paper(x, y) == pytest.approx(50 / metrics.rse(x, y), rel=1e-12)


@pytest.mark.parametrize(
    ("y", "expected"), [([3, 4], 1), ([-6, -8], -1), ([4, -3], 0), ([0, 0], 0), ([3, 0], 0.6)]
)
def test_cosine(y: list[float], expected: float) -> None:
    assert metrics.cosine(X, torch.tensor(y)) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=2))
def test_cosine_is_within_its_range(y: list[float]) -> None:
    assert abs(metrics.cosine(X, torch.tensor(y))) <= 1 + 1e-12


@pytest.mark.parametrize("metric", PAIRWISE)
def test_updates_are_one_vector(metric) -> None:  # type: ignore[no-untyped-def]
    x, y = model(0), model(1)

    def flat(update: dict[str, Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in update.values()])

    assert metric(x, y) == metric(flat(x), flat(y))


@pytest.mark.parametrize("metric", PAIRWISE)
def test_updates_are_matched_by_name(metric) -> None:  # type: ignore[no-untyped-def]
    x, y = model(0), model(1)
    assert metric(x, dict(reversed(y.items()))) == metric(x, y)


@pytest.mark.parametrize("metric", PAIRWISE)
def test_other_names_are_refused(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UpdateError, match="'v', 'w'"):
        metric({"v": X}, {"w": X})


@pytest.mark.parametrize("metric", PAIRWISE)
def test_other_sizes_are_refused_not_broadcast(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UpdateError, match="2 and 1"):
        metric(X, X[:1])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (metrics.rse, 0.0),
        (metrics.snr_db, math.inf),
        (metrics.snr_paper, math.inf),
        (metrics.cosine, 0.0),
    ],
)
def test_an_empty_update_is_reconstructed_perfectly(metric, expected: float) -> None:  # type: ignore[no-untyped-def]
    assert metric({}, {}) == expected
    assert metric(torch.empty(0), torch.empty(0)) == expected


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_entropy_of_orthonormal_rows_is_log_rows(rows: int) -> None:
    q = torch.linalg.qr(torch.randn(8, rows, dtype=torch.float64))[0].T
    assert metrics.matrix_entropy(q) == pytest.approx(math.log(rows), abs=1e-12)


def test_the_entropy_of_rank_one_is_zero() -> None:
    matrix = torch.outer(torch.randn(5), torch.randn(7))
    # The product is rounded to fp32: measured up to 2e-14.
    assert metrics.matrix_entropy(matrix) == pytest.approx(0, abs=1e-12)


def test_entropy_ignores_scale() -> None:
    matrix = torch.randn(5, 7, dtype=torch.float64)
    entropy = metrics.matrix_entropy(matrix)
    assert metrics.matrix_entropy(1e3 * matrix) == pytest.approx(entropy, rel=1e-12)


def test_the_entropy_of_nothing_is_zero() -> None:
    assert metrics.matrix_entropy(torch.zeros(3, 4)) == 0
