"""Clip and noise: the bound holds exactly, the noise is as strong as it says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.codecs import BlockQuant, Identity
from gradcodec.errors import ConfigError, NonFiniteError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.privacy import ClientPrivacy
from gradcodec.privacy.mechanism import secure_normal
from gradcodec.types import UpdateSpec
from tests.federated.toy import Toy, quantised, spec, subspace


def vector(seed: int, numel: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor) -> float:
    return float(x.double().norm())


@given(
    seed=st.integers(0, 2**31),
    numel=st.integers(1, 300),
    scale=st.floats(1e-6, 1e6),
    clip=st.floats(1e-3, 1e3),
)
def test_no_released_norm_exceeds_the_clip(
    seed: int, numel: int, scale: float, clip: float
) -> None:
    x = vector(seed, numel, scale)
    released = ClientPrivacy(clip, noise=0).release(x)
    assert norm(released) <= clip
    # And no more is taken than has to be.
    assert norm(released) >= min(norm(x), clip) * (1 - 1e-6)


def test_a_value_within_the_bound_is_not_touched() -> None:
    x = vector(0, 100)
    assert torch.equal(ClientPrivacy(2 * norm(x), noise=0).release(x), x)


@pytest.mark.parametrize("shares", [1, 16])
def test_the_noise_has_the_stated_deviation(shares: int) -> None:
    privacy = ClientPrivacy(3.0, noise=0.5, shares=shares, seed=1)
    noise = privacy.release(torch.zeros(100_000)).double()
    assert privacy.std == 1.5 / math.sqrt(shares)
    # Five standard errors of mean and deviation.
    assert abs(float(noise.mean())) < 5 * privacy.std / math.sqrt(100_000)
    assert abs(float(noise.std()) / privacy.std - 1) < 5 / math.sqrt(200_000)


def test_secure_noise_is_normal_and_never_the_same() -> None:
    first, second = secure_normal(100_001), secure_normal(100_001)
    assert first.shape == (100_001,)
    assert not torch.equal(first, second)
    for x in (first, second):
        inside = float((x.abs() < 1).double().mean())
        assert abs(inside - math.erf(math.sqrt(0.5))) < 5 * math.sqrt(0.22 / 100_000)
        assert abs(float((x**4).mean()) - 3) < 0.3  # kurtosis, whose standard error is 0.03
        assert abs(float((first * second).mean())) < 5 / math.sqrt(100_000)


def test_a_seed_repeats_and_a_draw_does_not() -> None:
    privacy = ClientPrivacy(1.0, noise=1.0, seed=3)
    x = torch.zeros(64)
    assert torch.equal(privacy.release(x, draw=5), privacy.release(x, draw=5))
    assert not torch.equal(privacy.release(x, draw=5), privacy.release(x, draw=6))


def test_noise_on_a_code_is_weaker_by_the_root_of_its_ratio() -> None:
    """The guarantee does not depend on the number of values, but the noise's norm does."""
    codec = subspace(0.25)
    update = {n: torch.zeros_like(p) for n, p in Toy().parameters.items()}
    n, m = UpdateSpec.of(update).numel, codec.code_numel(spec())
    squares = {"code": 0.0, "update": 0.0}
    for draw in range(300):
        for place in squares:
            privacy = ClientPrivacy(1.0, noise=1.0, place=place, seed=0)
            bound = codec if place == "code" else Identity().bind(spec())
            payload = privacy.encode(bound, update, seed=draw)
            moved = bound.decoder.decode(payload)
            squares[place] += sum(norm(t) ** 2 for t in moved.values()) / 300
    assert squares["update"] == pytest.approx(n, rel=0.1)
    assert squares["code"] == pytest.approx(m, rel=0.15)


def test_without_noise_a_private_payload_decodes_to_the_clipped_update() -> None:
    codec = subspace(1.0)
    update = {n: 5 * p.detach() for n, p in Toy().parameters.items()}
    whole = norm(torch.cat([t.reshape(-1) for t in update.values()]))
    payload = ClientPrivacy(0.5 * whole, noise=0).encode(codec, update)
    decoded = codec.decoder.decode(payload)
    for name, t in update.items():
        torch.testing.assert_close(decoded[name], 0.5 * t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", [quantised(), BlockQuant(BlockQuantConfig(8, block=16))])
@pytest.mark.parametrize("place", ["code", "update"])
def test_a_private_payload_is_as_large_as_any_other(codec: object, place: str) -> None:
    bound = codec.bind(spec())  # type: ignore[attr-defined]
    update = {n: p.detach() for n, p in Toy().parameters.items()}
    private = ClientPrivacy(1.0, 1.0, place=place).encode(bound, update)
    assert len(private.to_bytes()) == len(bound.encoder.encode(update).to_bytes())


def test_what_no_factor_can_bound_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="private value"):
        ClientPrivacy(1.0, 1.0).release(torch.tensor([1.0, torch.nan]))


def test_a_trained_code_is_not_noised_as_an_update() -> None:
    with pytest.raises(ConfigError, match="place 'code'"):
        ClientPrivacy(1.0, 1.0, place="update").write_code(quantised(), torch.zeros(1))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"clip": 0}, "clip"),
        ({"clip": math.inf}, "clip"),
        ({"clip": 1, "noise": -1}, "noise"),
        ({"clip": 1, "noise": math.nan}, "noise"),
        ({"clip": 1, "noise": 1, "shares": 0}, "shares"),
        ({"clip": 1, "noise": 1, "shares": 2.0}, "shares"),
        ({"clip": 1, "noise": 1, "place": "there"}, "place"),
        ({"clip": 1, "noise": 1, "seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        ClientPrivacy(**{"noise": 1.0, **options})  # type: ignore[arg-type]
