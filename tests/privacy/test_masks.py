"""Masked integers: the sum is right, and nothing else can be read."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.errors import ConfigError, MalformedBodyError, UpdateError
from gradcodec.privacy import ClientPrivacy, FixedPoint, pairwise_mask
from tests.federated.toy import spec, subspace


def secrets_of(clients: int) -> dict[int, dict[int, bytes]]:
    """What each pair of clients shares, as a key agreement would give it."""
    out: dict[int, dict[int, bytes]] = {c: {} for c in range(clients)}
    for a, b in itertools.combinations(range(clients), 2):
        out[a][b] = out[b][a] = bytes([a, b]) * 16
    return out


def codes(clients: int, numel: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=g).clamp(-4, 4) for _ in range(clients)]


@given(
    clients=st.integers(2, 7),
    numel=st.integers(1, 50),
    bits=st.sampled_from([16, 32]),
    round=st.integers(0, 2**40),
)
def test_masks_vanish_in_the_sum(clients: int, numel: int, bits: int, round: int) -> None:
    point = FixedPoint(4.0, clients, bits)
    shared, z = secrets_of(clients), codes(clients, numel)
    plain = [point.to_bytes(x) for x in z]
    masked = [
        point.to_bytes(x, pairwise_mask(shared[c], c, round, numel, bits)) for c, x in enumerate(z)
    ]
    assert torch.equal(point.sum(masked, numel), point.sum(plain, numel))
    error = (point.sum(masked, numel) - torch.stack(z).double().sum(0)).abs().max()
    assert float(error) <= clients * point.step / 2 * (1 + 1e-6)


def test_the_server_decodes_the_sum_of_linear_codes_and_needs_no_reply() -> None:
    """Clip, noise, integers, masks: what comes out is the plain mean of the private codes."""
    clients, codec = 5, subspace(0.5)
    numel = codec.code_numel(spec())
    privacy = ClientPrivacy(2.0, noise=0.3, shares=clients, seed=1)
    released = [privacy.release(z, draw=c) for c, z in enumerate(codes(clients, numel))]
    point, shared = FixedPoint.of(privacy, clients), secrets_of(clients)
    masked = [
        point.to_bytes(z, pairwise_mask(shared[c], c, 0, numel)) for c, z in enumerate(released)
    ]
    mean = codec.from_code((point.sum(masked, numel) / clients).float())
    wanted = codec.from_code(torch.stack(released).mean(0))
    for name, t in wanted.items():
        torch.testing.assert_close(mean[name], t, rtol=0, atol=1e-5)


def test_a_masked_code_looks_uniform_whatever_is_in_it() -> None:
    point, shared = FixedPoint(4.0, 3, 32), secrets_of(3)
    for z in (torch.zeros(50_000), torch.full((50_000,), 4.0)):
        body = point.to_bytes(z, pairwise_mask(shared[0], 0, 0, 50_000))
        counts = torch.bincount(torch.frombuffer(bytearray(body), dtype=torch.uint8), minlength=256)
        expected = len(body) / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert 140 < chi < 400  # 255 degrees of freedom: 255 +- 22.6, five deviations and more
    plain = point.to_bytes(torch.zeros(50_000))
    assert set(plain) == {0}


def test_rounds_have_masks_of_their_own() -> None:
    shared = secrets_of(2)
    first, second = (pairwise_mask(shared[0], 0, r, 1000) for r in (0, 1))
    assert float((first == second).double().mean()) < 0.01


@given(st.floats(1.0001, 1e6))
def test_a_value_that_would_wrap_around_is_refused(factor: float) -> None:
    with pytest.raises(UpdateError, match="within"):
        FixedPoint(2.0, 3).to_bytes(torch.tensor([0.0, -2.0 * factor]))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_largest_sum_does_not_wrap_around(bits: int) -> None:
    point = FixedPoint(1.0, 50, bits)
    for value in (1.0, -1.0):
        bodies = [point.to_bytes(torch.tensor([value]))] * 50
        assert float(point.sum(bodies, 1)) == pytest.approx(50 * value, rel=1e-6)


def test_private_values_stay_within_the_limit() -> None:
    privacy = ClientPrivacy(1.0, noise=4.0)
    point = FixedPoint.of(privacy, 2)
    for _ in range(20):
        point.to_bytes(privacy.release(torch.full((1000,), 3.0)))


@pytest.mark.parametrize(
    ("secrets", "what"),
    [({}, "secrets"), ({0: bytes(32)}, "secrets"), ({1: bytes(8)}, "16 bytes"), ({1: 5}, "16")],
)
def test_bad_secrets_are_refused(secrets: Mapping[int, bytes], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        pairwise_mask(secrets, 0, 0, 4)


def test_bodies_of_other_lengths_and_numbers_are_refused() -> None:
    point = FixedPoint(1.0, 2)
    with pytest.raises(MalformedBodyError, match="8 bytes"):
        point.sum([bytes(7)], 2)
    for bodies in ([], [bytes(8)] * 3):
        with pytest.raises(ConfigError, match=r"1\.\.2"):
            point.sum(bodies, 2)


@pytest.mark.parametrize(
    "options", [(0.0, 2, 32), (1.0, 0, 32), (1.0, 2, 12), (1.0, 200, 8), (float("inf"), 2, 32)]
)
def test_bad_settings_are_refused(options: tuple[float, int, int]) -> None:
    with pytest.raises(ConfigError):
        FixedPoint(*options)
