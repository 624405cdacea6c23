"""Laws of signal moments: they see what clients agree on, and nothing of what they do not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.errors import ConfigError, NonFiniteError, UpdateError
from gradcodec.tgap import SecondMoments, SignalMoments, fit_subspace
from gradcodec.tgap.moments import EXACT_LIMIT, ExactMoment
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

SPEC = UpdateSpec((TensorSpec("w", (32, 4)),))
CONFIG = SubspaceConfig(ratio=16, side="long", basis_dtype="float32")


def found(moments: SecondMoments, name: str = "w") -> torch.Tensor:
    moment = moments._moments[name]
    assert isinstance(moment, ExactMoment)
    return moment.sum


@given(st.integers(2, 6), st.integers(1, 3), st.sampled_from(["long", "short"]))
def test_it_is_the_mean_over_pairs_of_different_clients(
    clients: int, rounds: int, side: str
) -> None:
    moments = SignalMoments(SPEC, SubspaceConfig(ratio=2, side=side))
    left = moments.axes["w"].left
    total = torch.zeros(found(moments).shape, dtype=torch.float64)
    for _ in range(rounds):
        updates = [torch.randn(32, 4) for _ in range(clients)]
        moments.add_round([{"w": g} for g in updates])
        g = [u.double() if left else u.double().T for u in updates]
        pairs = [g[a] @ g[b].T for a in range(clients) for b in range(clients) if a != b]
        total += torch.stack(pairs).mean(0)
    assert torch.allclose(found(moments).double(), total, atol=1e-4 * float(total.abs().max()))


def planted(clients: int = 5, rounds: int = 40) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """A quiet direction that all clients share, and loud ones that each has for itself."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    shared, loud = basis[:, :1], basis[:, 1:9]
    out = []
    for _ in range(rounds):
        common = shared @ torch.randn(1, 4, generator=generator)
        noise = [3 * loud @ torch.randn(8, 4, generator=generator) for _ in range(clients)]
        out.append([common + n for n in noise])
    return shared, out


def kept(moments: SecondMoments, shared: torch.Tensor) -> float:
    """Share of the common direction that a two-dimensional codec keeps."""
    (_, basis) = fit_subspace(moments, CONFIG).bases()["w"]
    return float((basis.T @ shared).square().sum())


def test_it_finds_what_is_shared_under_louder_noise() -> None:
    shared, rounds = planted()
    signal = SignalMoments(SPEC, CONFIG)
    for updates in rounds:
        signal.add_round([{"w": g} for g in updates])
    assert 0.9 < kept(signal, shared) <= 1 + 1e-5


def test_plain_second_moments_prefer_the_noise_there() -> None:
    shared, rounds = planted()
    plain = SecondMoments(SPEC, CONFIG)
    for updates in rounds:
        for g in updates:
            plain.add({"w": g})
    assert kept(plain, shared) < 0.1


def test_one_client_alone_shows_no_agreement() -> None:
    moments = SignalMoments(SPEC, CONFIG)
    moments.add_round([{"w": torch.randn(32, 4)}])
    assert moments.count == 0
    assert float(found(moments).abs().max()) == 0
    with pytest.raises(ConfigError, match="add_round"):
        moments.add({"w": torch.randn(32, 4)})


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"w": torch.full((32, 4), float("nan"))}, NonFiniteError),
        ({"w": torch.zeros(4, 32)}, UpdateError),
        ({"v": torch.zeros(32, 4)}, UpdateError),
    ],
)
def test_a_bad_update_adds_nothing_of_its_round(
    bad: dict[str, torch.Tensor], error: type[Exception]
) -> None:
    moments = SignalMoments(SPEC, CONFIG)
    with pytest.raises(error):
        moments.add_round([{"w": torch.randn(32, 4)}, bad])
    assert moments.count == 0
    assert float(found(moments).abs().max()) == 0


def test_a_side_too_long_for_a_matrix_is_fitted_on_round_means() -> None:
    size = EXACT_LIMIT + 4
    spec = UpdateSpec((TensorSpec("wide", (4, size)),))
    config = SubspaceConfig(ratio=size / 2, side="long", basis_dtype="float32")
    signal, shared = SignalMoments(spec, config), torch.randn(size)
    shared /= shared.norm()
    for _ in range(4):
        common = torch.randn(4, 1) * shared
        signal.add_round([{"wide": common + 0.01 * torch.randn(4, size)} for _ in range(5)])
    (_, basis) = fit_subspace(signal, config).bases()["wide"]
    assert 0.9 < float((basis.T @ shared).square().sum()) <= 1 + 1e-4
