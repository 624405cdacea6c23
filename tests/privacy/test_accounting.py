"""What noise guarantees: against closed forms, and in the right direction."""

import math
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcodec.errors import ConfigError
from gradcodec.privacy import EPSILONS, calibrate, presets, spend
from gradcodec.privacy.accounting import gdp_mu

pytest.importorskip("dp_accounting")


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta of the Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@given(noise=st.floats(0.8, 20), rounds=st.integers(1, 50))
@settings(max_examples=15)
def test_gdp_is_exact_and_pld_close_above_it_where_all_take_part(noise: float, rounds: int) -> None:
    spent = spend(noise, rounds, delta=1e-5)
    assert gaussian_delta(spent.gdp, spent.mu) == pytest.approx(1e-5, rel=1e-3)
    assert spent.pld is not None
    assert spent.gdp * (1 - 1e-3) <= spent.pld <= spent.gdp * 1.02 + 0.01
    assert spent.rdp >= spent.pld * 0.999
    assert spent.epsilon == min(spent.rdp, spent.pld)


def test_a_replaced_client_counts_twice_for_every_accountant() -> None:
    """dp-accounting's PLD doubles the sensitivity for this relation, its RDP does not."""
    replaced = spend(2.0, 20, delta=1e-5, adjacency="replace")
    added = spend(1.0, 20, delta=1e-5, adjacency="add-remove")
    for name in ("rdp", "pld", "gdp", "mu"):
        assert getattr(replaced, name) == pytest.approx(getattr(added, name), rel=1e-6), name
    assert replaced.gdp == pytest.approx(28.37, abs=0.05)


def test_hardly_any_noise_is_accounted_for_without_a_gigabyte() -> None:
    """At a step of 1e-3 this grid has hundreds of millions of points."""
    spent = spend(0.01, 20, delta=1e-5)
    assert spent.pld == pytest.approx(spent.gdp, rel=0.01)


def test_sampling_helps_and_more_rounds_cost() -> None:
    whole = spend(1.0, 20, delta=1e-5)
    sampled = spend(1.0, 20, delta=1e-5, rate=0.2, sampling="poisson")
    longer = spend(1.0, 40, delta=1e-5, rate=0.2, sampling="poisson")
    assert sampled.epsilon < longer.epsilon < whole.epsilon


@pytest.mark.parametrize(
    ("noise", "limit_noise", "epochs", "epsilon", "mu"),
    [(1.3, 1.06, 20, 1.34, 0.35), (0.7, 0.638, 70, 8.68, 1.78)],
)
def test_sampled_rounds_come_to_published_values(
    noise: float, limit_noise: float, epochs: int, epsilon: float, mu: float
) -> None:
    """Bu et al. (arXiv 1911.11607), figure 4: batches of 256 of 60,000, delta 1e-5.

    Their moments accountant gives ``epsilon`` for ``noise``, the central limit for ``limit_noise``.
    """
    rounds = epochs * 60_000 // 256
    options: dict[str, Any] = {"delta": 1e-5, "rate": 256 / 60_000, "sampling": "poisson"}
    limit = spend(limit_noise, rounds, **options)
    assert limit.mu == pytest.approx(mu, abs=0.005)
    assert limit.gdp == pytest.approx(epsilon, rel=0.005)
    spent = spend(noise, rounds, **options)
    # The conversion from RDP has become tighter since (Canonne et al., arXiv 2004.00010).
    assert 0.8 * epsilon < spent.rdp < epsilon
    assert spent.pld is not None
    assert spent.gdp < spent.pld < spent.rdp


def test_a_fixed_number_of_clients_has_rdp_alone() -> None:
    spent = spend(4.0, 20, delta=1e-5, rate=0.2, sampling="fixed", adjacency="replace")
    assert spent.pld is None
    assert spent.epsilon == spent.rdp
    # A fixed share of all is at most as good as no sampling.
    assert spent.rdp < spend(4.0, 20, delta=1e-5, adjacency="replace").rdp


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"adjacency": "replace"},
        {"rate": 0.1, "sampling": "poisson"},
        {"rate": 0.1, "sampling": "fixed", "adjacency": "replace"},
    ],
)
def test_calibrated_noise_spends_just_the_epsilon(epsilon: float, how: dict[str, object]) -> None:
    spent = calibrate(epsilon, 10, delta=1e-5, **how)  # type: ignore[arg-type]
    assert 0.97 * epsilon <= spent.epsilon <= epsilon * (1 + 1e-6)


def test_the_presets_are_the_papers() -> None:
    found = presets(20, delta=1e-3)
    assert tuple(found) == (0.25, 2.0, 8.0)
    noises = [spent.noise for spent in found.values()]
    assert noises == sorted(noises, reverse=True)


def test_a_guarantee_says_what_it_rests_on() -> None:
    text = str(spend(1.0, 3, delta=1e-4, rate=0.5, sampling="poisson"))
    for part in ("delta 0.0001", "one client added or removed", "3 rounds", "poisson 0.5", "RDP"):
        assert part in text
    assert "no guarantee" in text  # of the central limit


def test_mu_of_the_central_limit_goes_over_into_infinity() -> None:
    assert gdp_mu(0.01, 10, 0.5) == math.inf
    assert gdp_mu(1e3, 1, 0.5) == pytest.approx(0.5e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"noise": 0}, "noise"),
        ({"rounds": 0}, "rounds"),
        ({"delta": 1}, "delta"),
        ({"delta": 0.0}, "delta"),
        ({"adjacency": "swap"}, "adjacency"),
        ({"sampling": "some"}, "sampling"),
        ({"sampling": "poisson", "rate": 0.5, "adjacency": "replace"}, "adjacency"),
        ({"rate": 0.5}, "rate"),
        ({"sampling": "poisson", "rate": 1.0}, "rate"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        spend(**{"noise": 1.0, "rounds": 1, "delta": 1e-5, **changes})  # type: ignore[arg-type]


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"gradcodec\[privacy\]"):
        spend(1.0, 1, delta=1e-5)
