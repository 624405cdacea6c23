"""Laws of codec folders: written whole, read strictly, found by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_helpers import REPO, chain, subspace, update
from loopback_hub import LoopbackHub

from gradcodec import hub
from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError, HubError
from gradcodec.hub import local
from gradcodec.wire import tensor_digest


@pytest.mark.parametrize("make", [subspace, chain, Identity], ids=["subspace", "chain", "identity"])
def test_round_trip_keeps_digest_bytes_and_values(
    make: Callable[[], Codec], tmp_path: Path
) -> None:
    codec = make()
    codec.save_pretrained(tmp_path / "a" / "b")
    loaded = Codec.from_pretrained(str(tmp_path / "a" / "b"))
    assert type(loaded) is type(codec)
    assert (loaded.config, loaded.spec, loaded.digest) == (codec.config, codec.spec, codec.digest)
    payload = codec.encoder.encode(update())
    assert loaded.encoder.encode(update()).to_bytes() == payload.to_bytes()
    ours, theirs = codec.decoder.decode(payload), loaded.decoder.decode(payload)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_saving_twice_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    Codec.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_folder_holds_exactly_three_files(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["README.md", "config.json", "model.safetensors"]


def test_views_and_shared_memory_are_saved_by_value(tmp_path: Path) -> None:
    wide = torch.randn(4, 6)
    weights = {"shared.a": wide[:, :3], "shared.b": wide.T}
    digests = {n: tensor_digest(t) for n, t in weights.items()}
    hub.write(tmp_path, hub.Folder({"kind": "x"}, None, weights, digests, bytes(8)))
    read = hub.read(tmp_path).weights
    assert all(torch.equal(read[n], weights[n]) and read[n].is_contiguous() for n in weights)


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_failed_write_leaves_the_old_folder(
    method: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are written as bytes, the config and the card as text."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    write = getattr(Path, method)

    def full(path: Path, data: Any, **options: Any) -> int:
        write(path, data[: len(data) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(HubError, match="No space left"):
        chain(seed=5).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"},
        {"config.json": b"{"},
        {"model.safetensors": b"weights"},
        {"README.md": b"# A project"},
    ],
    ids=["model", "damaged", "weights", "project"],
)
def test_files_that_are_no_codecs_are_not_overwritten(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    names = " and ".join(sorted(files, reverse=True))
    with pytest.raises(ConfigError, match=f"{names} would be lost"):
        chain().save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_a_codec_takes_the_place_of_another_and_leaves_other_files_alone(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    made = subspace()
    made.save_pretrained(saved)
    assert Codec.from_pretrained(saved).digest == made.digest
    assert (saved / "notes.txt").read_text() == "mine"


def test_written_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    subspace().save_pretrained(tmp_path / "codec")
    modes = {p.stat().st_mode for p in (tmp_path / "codec").iterdir()}
    assert modes == {plain.stat().st_mode}


def test_weights_changed_after_the_digest_are_not_saved(tmp_path: Path) -> None:
    codec = subspace()
    assert codec.digest
    codec.weights["shared.left.bias"].add_(1)
    with pytest.raises(ConfigError, match=r"shared\.left\.bias.*changed"):
        codec.save_pretrained(tmp_path / "codec")
    assert not (tmp_path / "codec").exists()


def test_loaded_weights_do_not_follow_the_file(saved: Path) -> None:
    codec = Codec.from_pretrained(saved)
    before = {n: t.clone() for n, t in codec.weights.items()}
    with (saved / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 256)
        file.write(bytes(256))
    assert all(torch.equal(codec.weights[n], before[n]) for n in before)


# -- what is wrong with a folder -------------------------------------------------------------------


def test_truncated_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HubError, match="whole safetensors file") as caught:
        Codec.from_pretrained(saved)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("from_end", [1, 700])
def test_flipped_bit_in_weights(saved: Path, from_end: int) -> None:
    blob = bytearray((saved / "model.safetensors").read_bytes())
    blob[-from_end] ^= 1
    (saved / "model.safetensors").write_bytes(blob)
    with pytest.raises(HubError, match="SHA-256"):
        Codec.from_pretrained(saved)


@pytest.mark.parametrize("change", ["extra", "missing", "renamed", "dtype", "shape"])
def test_weights_must_be_the_named_ones(saved: Path, change: str) -> None:
    path = saved / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    first = weights.pop("shared.left.bias")
    new = {
        "extra": {"shared.left.bias": first, "shared.more": torch.zeros(1)},
        "missing": {},
        "renamed": {"shared.left.bia": first},
        "dtype": {"shared.left.bias": first.float()},
        "shape": {"shared.left.bias": first.reshape(-1)},
    }[change]
    safetensors.torch.save_file({**weights, **new}, path)
    with pytest.raises(HubError, match=r"shared\."):
        Codec.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(HubError, match=f"{name} is missing"):
        Codec.from_pretrained(saved)


def test_pickle_weights_are_never_read(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(HubError, match=r"model\.safetensors is missing"):
        Codec.from_pretrained(saved)


# -- names -----------------------------------------------------------------------------------------


def test_bundled_name_comes_before_a_folder(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(seed=9).save_pretrained(tmp_path / "cwd" / "tiny-8x")
    monkeypatch.chdir(tmp_path / "cwd")
    assert hub.bundled() == ["tiny-8x"]
    assert Codec.from_pretrained("tiny-8x").digest == chain().digest
    assert Codec.from_pretrained("./tiny-8x").digest == chain(seed=9).digest
    assert Codec.from_pretrained(Path("tiny-8x")).digest == chain(seed=9).digest


def test_folder_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: LoopbackHub
) -> None:
    chain().save_pretrained(tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert Codec.from_pretrained(REPO).digest == chain().digest
    assert server.requests == []


@pytest.mark.parametrize("name", ["tiny-8", "tiny8x", "a/b/c", "", "../x", "tiny-8x/"])
def test_wrong_name_lists_the_bundled_ones(
    assets: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)  # `../x` beside the checkout may be somebody's folder
    with pytest.raises(HubError, match="tiny-8x"):
        Codec.from_pretrained(name)


def test_typo_gets_a_suggestion(assets: Path) -> None:
    with pytest.raises(HubError, match="did you mean 'tiny-8x'"):
        Codec.from_pretrained("tiny8x")


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(HubError, match="expected a bundled codec, a codec's folder"):
        Codec.from_pretrained(saved / "config.json")


@pytest.mark.parametrize("bundle", [True, False])
def test_a_revision_of_something_local_is_refused(assets: Path, saved: Path, bundle: bool) -> None:
    with pytest.raises(HubError, match="only a Hub repository"):
        Codec.from_pretrained("tiny-8x" if bundle else saved, revision="main")


def test_every_bundled_codec_loads_and_decodes() -> None:
    root = local._assets()
    if not root.exists():
        pytest.skip("the package has no bundled codecs yet: no folder assets/codecs")
    names = hub.bundled()
    assert names, f"{root} exists and holds no codec folder"
    assert names == sorted(p.name for p in root.iterdir() if p.is_dir())
    for name in names:
        codec = Codec.from_pretrained(name)
        assert codec.spec is not None, f"{name} is not bound to a tensor table"
        payload = codec.encoder.encode({t.name: torch.ones(t.shape) for t in codec.spec})
        codec.spec.check(codec.decoder.decode(payload))
