"""Laws of halves: a side loads its own weights, and is the same codec as the other one."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_helpers import chain, update

from gradcodec import hub
from gradcodec.codec import Codec, Decoder, Encoder, kinds, register
from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError, HubError
from gradcodec.packers.raw import IdentityConfig


class HalvesConfig(IdentityConfig):
    """A codec with weights of all three kinds."""

    kind = "test-halves"
    learned = True


class Halves(Identity):
    """Behaves as identity; only its weights matter."""

    Config = HalvesConfig


@pytest.fixture
def halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved codec with encoder, decoder and shared weights."""
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    register(Halves)
    weights = {n: torch.randn(3) for n in ("encoder.a", "encoder.b", "decoder.a", "shared.c")}
    Halves(weights=weights).save_pretrained(tmp_path / "halves")
    return tmp_path / "halves"


@pytest.mark.parametrize(
    ("half", "names"),
    [
        ("encoder", {"encoder.a", "encoder.b", "shared.c"}),
        ("decoder", {"decoder.a", "shared.c"}),
        (None, {"encoder.a", "encoder.b", "decoder.a", "shared.c"}),
    ],
)
def test_a_half_loads_its_own_weights(halves: Path, half: str | None, names: set[str]) -> None:
    assert set(hub.read(halves, half=half).weights) == names


def test_a_half_has_the_digest_of_the_whole(halves: Path) -> None:
    whole = Codec.from_pretrained(halves).digest
    assert Encoder.from_pretrained(halves).codec.digest == whole
    assert Decoder.from_pretrained(halves).codec.digest == whole


def test_a_half_does_not_read_the_other_ones_weights(halves: Path) -> None:
    path = halves / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["decoder.a"][0] += 1
    safetensors.torch.save_file(weights, path)
    assert Encoder.from_pretrained(halves).codec.weights.keys() == {
        "encoder.a",
        "encoder.b",
        "shared.c",
    }
    with pytest.raises(HubError, match=r"decoder\.a"):
        Decoder.from_pretrained(halves)


def test_a_half_still_wants_the_whole_file(halves: Path) -> None:
    path = halves / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n: t for n, t in weights.items() if n != "decoder.a"}, path)
    with pytest.raises(HubError, match=r"decoder\.a"):
        Encoder.from_pretrained(halves)


def test_a_half_cannot_be_saved(halves: Path, tmp_path: Path) -> None:
    codec = Codec.from_pretrained(halves, half="encoder")
    with pytest.raises(ConfigError, match="one half"):
        codec.save_pretrained(tmp_path / "other")


def test_halves_of_a_tied_codec_work_together(saved: Path) -> None:
    payload = Encoder.from_pretrained(saved).encode(update())
    theirs = Decoder.from_pretrained(saved).decode(payload)
    ours = chain().decoder.decode(payload)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_unknown_half(saved: Path) -> None:
    with pytest.raises(ConfigError, match="half"):
        Codec.from_pretrained(saved, half="middle")
