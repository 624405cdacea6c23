"""Laws of rotated signs: unbiased over seeds, of the predicted error, whatever the input."""

import math

import pytest
import torch

from gradcodec.codecs import RotatedSign
from gradcodec.errors import ConfigError, NonFiniteError
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.reference.hadamard import hadamard, random_sign_words, signs_of
from gradcodec.wire import Payload


def decoded(codec: RotatedSign, x: torch.Tensor, seed: int) -> torch.Tensor:
    blob = codec.encoder.encode({"x": x}, seed=seed).to_bytes()
    return codec.decoder.decode(Payload.from_bytes(blob))["x"]


INPUTS = {
    "normal": torch.randn(512, generator=torch.Generator().manual_seed(0)),
    "one loud value": torch.eye(512)[7] * 100 + 0.01,
    "all alike": torch.ones(512),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kept", [256, 128, 64])
def test_the_mean_over_seeds_is_the_input(name: str, kept: int) -> None:
    x, codec, seeds = INPUTS[name], RotatedSign(RotatedSignConfig(kept=kept)), 400
    mean = torch.stack([decoded(codec, x, s) for s in range(seeds)]).double().mean(0)
    error = float((mean - x).square().sum() / x.square().sum())
    # Independent errors average out; a bias would stay. A plain sign's stays at 0.36 and more.
    expected = (math.pi / 2 * 256 / kept - 1) / seeds
    assert error < 2 * expected + 1e-4


@pytest.mark.parametrize("kept", [256, 64])
def test_the_error_is_the_predicted_one_and_not_smaller(kept: int) -> None:
    x, codec = INPUTS["normal"], RotatedSign(RotatedSignConfig(kept=kept))
    errors = [
        float((decoded(codec, x, s) - x).square().sum() / x.square().sum()) for s in range(50)
    ]
    predicted = math.pi / 2 * 256 / kept - 1
    assert 0.85 * predicted < sum(errors) / len(errors) < 1.15 * predicted


def test_clients_with_seeds_of_their_own_average_better_than_with_one() -> None:
    x, codec = INPUTS["normal"], RotatedSign()
    own = torch.stack([decoded(codec, x, s) for s in range(16)]).mean(0)
    one = torch.stack([decoded(codec, x, 3) for _ in range(16)]).mean(0)
    assert float((own - x).norm()) < 0.4 * float((one - x).norm())


@pytest.mark.parametrize("size", [8, 64, 256])
def test_hadamard_is_its_own_inverse(size: int) -> None:
    h = hadamard(size).double()
    assert torch.allclose(h @ h, torch.eye(size).double(), atol=1e-5)


def test_signs_are_balanced_and_of_the_seed_alone() -> None:
    a, b, again = (signs_of(random_sign_words(4096, seed), 4096) for seed in (1, 2, 1))
    assert torch.equal(a, again)
    assert set(a.tolist()) == {1.0, -1.0}
    assert abs(float(a.mean())) < 0.1
    assert abs(float((a * b).mean())) < 0.1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_values_near_the_ends_of_the_range_survive(scale: float) -> None:
    x = INPUTS["normal"] * scale
    error = (decoded(RotatedSign(), x, 0) / scale - x / scale).norm() / (x / scale).norm()
    assert 0.5 < float(error) < 1.0


def test_what_cannot_be_is_refused_by_name() -> None:
    for bad in ({"block": 100}, {"block": 4}, {"kept": 0}, {"kept": 257}, {"block": True}):
        with pytest.raises(ConfigError, match="rotsign"):
            RotatedSignConfig(**bad)
    with pytest.raises(NonFiniteError):
        RotatedSign().encoder.encode({"x": torch.tensor([1.0, float("inf")])})


@pytest.mark.parametrize("size", [1e36, 1e37, 1e38])
def test_large_values_are_coded_like_small_ones(size: float) -> None:
    """The scale of 256 equal values is near theirs, and so in range where their sum is not."""
    small, large = torch.ones(256), torch.full((256,), size)
    codec = RotatedSign()
    decoded = [
        codec.decoder.decode(codec.encoder.encode({"x": x}, seed=3))["x"] for x in (small, large)
    ]
    assert torch.allclose(decoded[1] / size, decoded[0], rtol=2**-7)
