"""What noise guarantees over many rounds: RDP, PLD and the paper's GDP, side by side.

One round releases ``sum_i clip(x_i) + N(0, (noise * clip)^2 I)`` of the clients that take part.
Numbers are computed by dp-accounting (extra ``privacy``).

    sampling     who takes part in a round            adjacency             bounds
    "all"        every client                         add-remove, replace   RDP, PLD, GDP (exact)
    "poisson"    each with probability ``rate``       add-remove            RDP, PLD; GDP is a limit
    "fixed"      a random ``rate`` of all clients     replace               RDP; GDP is a limit

*add-remove*: neighbours differ by one client's presence, which moves the sum by ``clip``.
*replace*: one client's data is exchanged for others, which moves it by ``2 clip``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gradcodec.errors import ConfigError

EPSILONS = (0.25, 2.0, 8.0)
"""The presets, those of CG-FedLLM's table (arXiv 2405.13746)."""

ADJACENCIES = {
    "add-remove": "one client added or removed",
    "replace": "one client's data replaced",
}
SAMPLINGS = {
    "all": ("add-remove", "replace"),
    "poisson": ("add-remove",),
    "fixed": ("replace",),
}


@dataclass(frozen=True)
class Spent:
    """A guarantee and everything that it rests on; ``str`` says all of it.

    Attributes:
        noise: standard deviation of a round's noise on the sum, in units of ``clip``.
        rounds: how many releases.
        delta: probability with which the bound may fail.
        sampling, rate, adjacency: see the module.
        rdp: epsilon by Renyi DP (Mironov, arXiv 1702.07476), an upper bound.
        pld: epsilon by privacy loss distributions (Koskela et al., arXiv 1906.03049), an upper
            bound and the tightest one; ``None`` for ``"fixed"``, for which dp-accounting has none.
        gdp: epsilon by Gaussian DP, as in the paper. Exact for ``"all"``. With sampling it is the
            central limit for many rounds (Bu et al., arXiv 1911.11607): **no guarantee**, it can
            lie below the true value.
        mu: the parameter of Gaussian DP.
    """

    noise: float
    rounds: int
    delta: float
    sampling: str
    rate: float
    adjacency: str
    rdp: float
    pld: float | None
    gdp: float
    mu: float

    @property
    def epsilon(self) -> float:
        """The guarantee: the smaller of the upper bounds RDP and PLD."""
        return self.rdp if self.pld is None else min(self.rdp, self.pld)

    def __str__(self) -> str:
        pld = "none" if self.pld is None else f"{self.pld:.3g}"
        kind = "exact" if self.sampling == "all" else "a limit, no guarantee"
        who = "all clients" if self.sampling == "all" else f"{self.sampling} {self.rate:g}"
        return (
            f"epsilon {self.epsilon:.3g} at delta {self.delta:g}, "
            f"{ADJACENCIES[self.adjacency]}; noise {self.noise:.3g} x clip on the sum, "
            f"{self.rounds} rounds of {who}; RDP {self.rdp:.3g}, PLD {pld}, "
            f"GDP {self.gdp:.3g} (mu {self.mu:.3g}, {kind})"
        )


def spend(
    noise: float,
    rounds: int,
    *,
    delta: float,
    rate: float = 1.0,
    sampling: str = "all",
    adjacency: str = "add-remove",
) -> Spent:
    """What ``rounds`` rounds with this noise guarantee.

    Amplification by sampling (``rate < 1``) counts only against those who do not learn who took
    part. The server that invites clients does: against it use ``"all"``, with the number of rounds
    in which one client takes part.

    Args:
        noise: the noise multiplier, above 0.
        rounds: at least 1.
        delta: within (0, 1); below one over the number of clients, or it promises nothing.
        rate: share of the clients in a round, 1 for ``"all"``.
        sampling: who takes part in a round, see the module.
        adjacency: which data sets are neighbours, see the module.

    Raises:
        ConfigError: a value is out of range, adjacency and sampling do not go together, or
            dp-accounting is not installed.
    """
    if not (isinstance(noise, int | float) and 0 < noise < math.inf):
        raise ConfigError(f"expected a finite noise > 0, got {noise!r}")
    return _Releases(rounds, delta, rate, sampling, adjacency).spend(float(noise))


def calibrate(
    epsilon: float,
    rounds: int,
    *,
    delta: float,
    rate: float = 1.0,
    sampling: str = "all",
    adjacency: str = "add-remove",
) -> Spent:
    """The least noise whose guarantee is ``epsilon`` (by PLD, for ``"fixed"`` by RDP).

    Raises:
        ConfigError: as ``spend``, or ``epsilon`` is not above 0.
    """
    if not (isinstance(epsilon, int | float) and 0 < epsilon < math.inf):
        raise ConfigError(f"expected a finite epsilon > 0, got {epsilon!r}")
    return _Releases(rounds, delta, rate, sampling, adjacency).calibrate(float(epsilon))


def presets(
    rounds: int,
    *,
    delta: float,
    rate: float = 1.0,
    sampling: str = "all",
    adjacency: str = "add-remove",
) -> dict[float, Spent]:
    """``calibrate`` for each of ``EPSILONS``."""
    releases = _Releases(rounds, delta, rate, sampling, adjacency)
    return {epsilon: releases.calibrate(epsilon) for epsilon in EPSILONS}


def gdp_mu(sigma: float, rounds: int, rate: float = 1.0) -> float:
    """Parameter mu of Gaussian DP, ``sigma`` in units of the sensitivity.

    ``sqrt(rounds) / sigma`` if all take part (exact), else the central limit
    ``rate sqrt(rounds (exp(1 / sigma^2) - 1))``, infinite where that leaves floats.
    """
    if rate == 1.0:
        return math.sqrt(rounds) / sigma
    inverse = 1 / sigma**2
    return rate * math.sqrt(rounds * math.expm1(inverse)) if inverse < 700 else math.inf


@dataclass(frozen=True)
class _Releases:
    """All that a guarantee depends on but the noise; ``sigma`` is in units of the sensitivity.

    Raises:
        ConfigError: a value is out of range, or two do not go together.
    """

    rounds: int
    delta: float
    rate: float
    sampling: str
    adjacency: str

    def __post_init__(self) -> None:
        rounds, delta, rate, sampling = self.rounds, self.delta, self.rate, self.sampling
        if type(rounds) is not int or rounds < 1:
            raise ConfigError(f"expected rounds of at least 1, got {rounds!r}")
        if not (isinstance(delta, float) and 0 < delta < 1):
            raise ConfigError(f"expected a delta within (0, 1), got {delta!r}")
        if self.adjacency not in ADJACENCIES:
            raise ConfigError(
                f"expected an adjacency of {tuple(ADJACENCIES)}, got {self.adjacency!r}"
            )
        if sampling not in SAMPLINGS:
            raise ConfigError(f"expected a sampling of {tuple(SAMPLINGS)}, got {sampling!r}")
        if self.adjacency not in SAMPLINGS[sampling]:
            raise ConfigError(
                f"sampling {sampling!r} is accounted for with adjacency {SAMPLINGS[sampling]}, "
                f"got {self.adjacency!r}"
            )
        if not 0 < rate <= 1 or (sampling == "all") != (rate == 1):
            raise ConfigError(
                f"expected a rate of 1 for 'all', or within (0, 1) for the others, got {rate!r} "
                f"for {sampling!r}"
            )

    def spend(self, noise: float) -> Spent:
        """By all three accountants."""
        dp = _library()
        sigma = noise / self._sensitivity
        rdp = self._epsilon(dp, self._rdp(dp), sigma)
        pld = None if self.sampling == "fixed" else self._epsilon(dp, _pld(dp, sigma), sigma)
        mu = gdp_mu(sigma, self.rounds, self.rate)
        gdp = float(dp.get_epsilon_gaussian(1 / mu, self.delta))
        of = (self.rounds, self.delta, self.sampling, self.rate, self.adjacency)
        return Spent(noise, *of, rdp, pld, gdp, mu)

    def calibrate(self, epsilon: float) -> Spent:
        """The least noise for ``epsilon``."""
        dp = _library()
        # The most noise needed: without sampling, rounds are one release with their number's root.
        gaussian = float(dp.get_sigma_gaussian(epsilon, self.delta))
        most = math.sqrt(self.rounds) * gaussian * 1.05
        sigma = dp.calibrate_dp_mechanism(
            lambda: self._rdp(dp) if self.sampling == "fixed" else _pld(dp, most),
            lambda s: self._event(dp, s),
            epsilon,
            self.delta,
            self._bracket(dp, epsilon, most),
            tol=1e-4 * most,
        )
        return self.spend(float(sigma) * self._sensitivity)

    @property
    def _sensitivity(self) -> float:
        """How far one client moves the sum, in units of ``clip``."""
        return 2.0 if self.adjacency == "replace" else 1.0

    def _event(self, dp: Any, sigma: float) -> Any:
        """All rounds."""
        one = dp.GaussianDpEvent(sigma)
        if self.sampling == "poisson":
            one = dp.PoissonSampledDpEvent(self.rate, one)
        if self.sampling == "fixed":
            # Only the ratio counts; a million clients resolve it.
            invited = max(1, round(self.rate * 10**6))
            one = dp.SampledWithoutReplacementDpEvent(10**6, invited, one)
        return dp.SelfComposedDpEvent(one, self.rounds)

    def _epsilon(self, dp: Any, accountant: Any, sigma: float) -> float:
        return float(accountant.compose(self._event(dp, sigma)).get_epsilon(self.delta))

    def _rdp(self, dp: Any) -> Any:
        """The sensitivity is in ``sigma`` already; the relation only admits the sampling."""
        relation = dp.NeighboringRelation
        fixed = self.sampling == "fixed"
        chosen = relation.REPLACE_ONE if fixed else relation.ADD_OR_REMOVE_ONE
        return dp.rdp.RdpAccountant(neighboring_relation=chosen)

    def _bracket(self, dp: Any, epsilon: float, most: float) -> Any:
        """An interval with the noise in it; RDP, which is cheap, finds its lower end."""
        least = most
        while least > 1e-3 * most:
            least /= 1.5
            # PLD's epsilon is at most RDP's, and hardly below two thirds of it.
            if self._epsilon(dp, self._rdp(dp), least) > 1.5 * epsilon:
                break
        return dp.ExplicitBracketInterval(least, 2 * most if self.sampling == "fixed" else most)


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld.pld_privacy_accountant
        import dp_accounting.rdp
    except ImportError as err:
        raise ConfigError(
            "privacy accounting needs dp-accounting: pip install 'gradcodec[privacy]'"
        ) from err
    return dp_accounting


def _pld(dp: Any, sigma: float) -> Any:
    """Losses are as large as ``1 / sigma^2``: so is the grid's step, or memory would run out."""
    step = 1e-3 * max(1.0, sigma**-2)
    return dp.pld.pld_privacy_accountant.PLDAccountant(value_discretization_interval=step)
