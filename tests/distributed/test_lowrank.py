"""The adaptive low-rank scheme, one matrix at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.distributed.lowrank import AdaptiveBasis, LowRank
from gradcodec.errors import ConfigError


def step(followers: list[AdaptiveBasis], gradients: list[Tensor], number: int) -> Tensor:
    """One step of several ranks by hand: the protocol of the docstring with exact exchanges."""
    ms = [f.with_error(g.reshape(-1), True) for f, g in zip(followers, gradients, strict=True)]
    if followers[0].due(number):
        powered = torch.stack([f.powered(m) for f, m in zip(followers, ms, strict=True)]).mean(0)
        for f in followers:
            f.renew(powered)
    codes = [f.code(m) for f, m in zip(followers, ms, strict=True)]
    mean = torch.stack(codes).mean(0)
    for f, m, z in zip(followers, ms, codes, strict=True):
        f.error = m - f.values(z)
        f.follow(mean)
    return followers[0].flat(followers[0].values(mean)).view(gradients[0].shape)


def make(shape: tuple[int, ...], ranks: int = 1, **settings: int) -> list[AdaptiveBasis]:
    return [AdaptiveBasis("w", shape, LowRank(**settings), seed=1) for _ in range(ranks)]


@given(st.sampled_from([(30, 50), (50, 30), (20, 3, 3)]), st.integers(1, 3))
@settings(max_examples=20)
def test_matrices_of_low_rank_are_exact(shape: tuple[int, ...], rank: int) -> None:
    torch.manual_seed(rank)
    rows = shape[0]
    cols = torch.Size(shape).numel() // rows
    gradient = (torch.randn(rows, rank) @ torch.randn(rank, cols)).view(shape)
    followers = make(shape, rank=rank)
    torch.testing.assert_close(step(followers, [gradient], 0), gradient, rtol=1e-3, atol=1e-3)


def test_refresh_one_is_powersgd() -> None:
    """Against the algorithm of arXiv 1905.13727 written down plainly, with two ranks."""
    torch.manual_seed(0)
    followers = make((40, 24), ranks=2, rank=3, refresh=1)
    q = followers[0].start.double()
    errors = [torch.zeros(40, 24).double() for _ in range(2)]
    for number in range(4):
        gradients = [torch.randn(40, 24) for _ in range(2)]
        ours = step(followers, gradients, number)
        deltas = [g.double() + e for g, e in zip(gradients, errors, strict=True)]
        p = torch.linalg.qr(torch.stack([d @ q for d in deltas]).mean(0)).Q
        qs = [d.T @ p for d in deltas]
        q = torch.stack(qs).mean(0)
        errors = [d - p @ own.T for d, own in zip(deltas, qs, strict=True)]
        torch.testing.assert_close(ours.double(), p @ q.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refresh", [1, 4])
def test_what_is_not_sent_is_kept(refresh: int) -> None:
    torch.manual_seed(0)
    followers = make((32, 48), ranks=3, rank=2, refresh=refresh)
    difference = torch.zeros(32, 48)
    for number in range(6):
        gradients = [torch.randn(32, 48) for _ in range(3)]
        applied = step(followers, gradients, number)
        difference += torch.stack(gradients).mean(0) - applied
    left = torch.stack([f.flat(f.error).view(32, 48) for f in followers if f.error is not None])
    torch.testing.assert_close(left.mean(0), difference, rtol=1e-4, atol=1e-4)


def test_a_refreshed_basis_sends_what_a_fixed_one_never_does() -> None:
    """A constant gradient: its mean over steps is reached, but by a fixed basis it is not."""
    torch.manual_seed(0)
    gradient = torch.randn(40, 40)
    found = {}
    for refresh in (2, 10_000):
        followers = make((40, 40), rank=4, refresh=refresh)
        total = sum(step(followers, [gradient], n) for n in range(60)) / 60
        found[refresh] = float((total - gradient).square().sum() / gradient.square().sum())
    assert found[2] < 0.1
    assert found[10_000] > 0.5


def test_a_gradient_that_is_not_finite_leaves_the_basis() -> None:
    follower = make((20, 20), rank=2)[0]
    follower.renew(torch.randn(40))
    assert follower.basis is not None
    before = follower.basis.clone()
    follower.renew(torch.full((40,), float("nan")))
    assert torch.equal(follower.basis, before)


def test_an_all_zero_mean_leaves_the_start_vectors() -> None:
    follower = make((20, 20), rank=2)[0]
    before = follower.start.clone()
    follower.follow(torch.zeros(40))
    assert torch.equal(follower.start, before)


def test_bases_are_orthonormal_even_of_columns_of_very_different_size() -> None:
    follower = make((50, 20), rank=4)[0]
    p = torch.randn(50, 4) * torch.tensor([1e-20, 1.0, 1e10, 0.0])
    follower.renew(p.reshape(-1))
    assert follower.basis is not None
    torch.testing.assert_close(follower.basis.T @ follower.basis, torch.eye(4), rtol=0, atol=1e-5)


def test_state_round_trip_and_shapes_are_checked() -> None:
    torch.manual_seed(0)
    followers = make((20, 30), rank=2)
    step(followers, [torch.randn(20, 30)], 0)
    state = followers[0].state_dict("w")
    assert set(state) == {"start.w", "basis.w", "error.w"}
    other = make((20, 30), rank=2)
    other[0].load_state_dict("w", state)
    gradient = torch.randn(20, 30)
    assert torch.equal(step(followers, [gradient], 1), step(other, [gradient], 1))
    with pytest.raises(ConfigError, match=r"start.w: expected \[20, 3\]"):
        make((20, 30), rank=3)[0].load_state_dict("w", state)
