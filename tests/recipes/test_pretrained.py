"""Codecs that exist before a run, as schemes of it."""

from pathlib import Path

import pytest
import torch
from recipes.test_experiment import run_experiment

from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, HubError
from gradcodec.recipes import pretrained
from gradcodec.recipes.settings import Settings
from gradcodec.registry import make_codec
from gradcodec.types import UpdateSpec

BUNDLED = "stdlib-llama-lora-r8-32x"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    path = tmp_path_factory.mktemp("run")
    summary = run_experiment(path, schemes=("fp32",), codecs=("rotsign", BUNDLED))
    return path, {row["name"]: row for row in summary["schemes"]}


def test_each_codec_is_a_scheme_beside_fp32(run: tuple[Path, dict[str, dict[str, float]]]) -> None:
    assert list(run[1]) == ["fp32", "rotsign", BUNDLED]


def test_a_reply_is_as_small_as_the_codec_says(
    run: tuple[Path, dict[str, dict[str, float]]],
) -> None:
    """Without its envelope, rotated signs take 1/32 of fp32 and one bf16 scale a block."""
    rows, codec = run[1], Codec.from_pretrained(BUNDLED)
    assert codec.spec is not None
    whole = codec.spec.nbytes / codec.nbytes()
    assert 28 < rows["rotsign"]["uplink_ratio"] < 32
    assert 0.9 * whole < rows[BUNDLED]["uplink_ratio"] < whole


def test_the_download_of_a_fitted_codec_is_counted(
    run: tuple[Path, dict[str, dict[str, float]]],
) -> None:
    path, rows = run
    files = [path / "codecs" / BUNDLED / f for f in ("config.json", "model.safetensors")]
    assert rows[BUNDLED]["codec_bytes"] == sum(f.stat().st_size for f in files) > 2e5
    assert rows["rotsign"]["codec_bytes"] == 0


def test_a_codec_for_another_adapter_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"48 tensors of 98,304 elements, this adapter has 24 of"):
        run_experiment(tmp_path, codecs=(BUNDLED,), targets=("q_proj", "v_proj"))
    assert not list(tmp_path.glob("schemes/*"))


@pytest.mark.parametrize("name", ["fp32", "a/rotsign"])
def test_a_name_that_another_scheme_has_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    Codec.from_pretrained(BUNDLED).save_pretrained(folder)
    spec = UpdateSpec.of({"w": torch.zeros(2)})
    with pytest.raises(ConfigError, match="names no other scheme"):
        pretrained.load(["rotsign", str(folder)], spec)


def test_a_codec_that_is_not_there_is_named() -> None:
    with pytest.raises(HubError, match="no-such"):
        pretrained.load(["no-such"], UpdateSpec.of({"w": torch.zeros(2)}))


def test_a_codec_that_was_bound_and_not_fitted_encodes_updates() -> None:
    spec = UpdateSpec.of({"w": torch.zeros(2)})
    scheme = pretrained.scheme_of("mine", pretrained.Chosen(make_codec("rotsign").bind(spec)))
    assert (scheme.server.mode, scheme.needs) == ("post", ())


def test_relayed_replies_cost_less_both_ways(tmp_path: Path) -> None:
    """Of an eighth of a bit, in place of broadcasts of four bits."""
    codecs = ("rotsign-eighth", "rotsign-eighth:relay", f"{BUNDLED}:relay")
    summary = run_experiment(tmp_path, schemes=("fp32",), codecs=codecs)
    rows = {row["name"]: row for row in summary["schemes"]}
    plain, relayed = rows["rotsign-eighth"], rows["rotsign-eighth-relayed"]
    assert relayed["uplink_ratio"] == plain["uplink_ratio"]
    assert relayed["total_ratio"] > 2 * plain["total_ratio"]
    assert rows[f"{BUNDLED}-relayed"]["codec_bytes"] > 2e5


def test_momentum_beside_a_relay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected momentum 0, got 0\.5"):
        run_experiment(tmp_path, codecs=("rotsign:relay",), server_momentum=0.5)


def test_what_autoencoders_encode_does_not_concern_a_relay() -> None:
    assert Settings(representation="state", codecs=("rotsign:relay",)).representation == "state"
