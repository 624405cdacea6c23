"""Laws of codec folders, bundled codecs and the Hub. The Hub is a real server on the loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from loopback_hub import TOKEN, LoopbackHub

from gradcodec import hub
from gradcodec.codecs.base import Codec, Decoder, Encoder, register
from gradcodec.codecs.blockquant import BlockQuant, BlockQuantConfig
from gradcodec.codecs.compose import Chain
from gradcodec.codecs.identity import Identity, IdentityConfig
from gradcodec.codecs.subspace import Axis, Subspace, SubspaceConfig
from gradcodec.errors import CodecMismatchError, ConfigError, HubError
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import tensor_digest

ROOT = Path(hub.__file__).parents[1]
SPEC = UpdateSpec((TensorSpec("layer.weight", (32, 16)), TensorSpec("bias", (64,))))
REPO = "user/codec"


def subspace(seed: int = 0, ratio: float = 8.0) -> Subspace:
    """A codec with random orthonormal bases."""
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for t in SPEC:
        size = t.shape[0]
        q, _ = torch.linalg.qr(torch.randn(size, int(size / ratio), generator=generator))
        bases[t.name] = (Axis(True, size, t.numel // size), q)
    return Subspace.from_bases(SubspaceConfig(ratio=ratio), SPEC, bases)


def chain(seed: int = 0) -> Chain:
    """The codec most tests save: weights, nested config, bound spec."""
    return Chain(subspace(seed), BlockQuant(BlockQuantConfig(4)))


def update(seed: int = 1) -> dict[str, torch.Tensor]:
    """Values for ``SPEC``."""
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator) for t in SPEC}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``change`` to a folder's config.json."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A whole codec folder."""
    folder = tmp_path / "codec"
    chain().save_pretrained(folder)
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process' client talks to, with an empty cache and no token."""
    from huggingface_hub import constants

    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def run(script: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process, where the client reads its environment as a user's would."""
    base = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_")}
    base |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=base | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


def closed_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# -- folders ---------------------------------------------------------------------------------------


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


def test_failed_write_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(HubError, match="No space left"):
        chain(seed=5).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


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


def test_altered_config_gives_another_digest(saved: Path) -> None:
    edit(saved, lambda d: d["codec"]["inner"].update(bits=8))
    with pytest.raises(HubError, match="digest"):
        Codec.from_pretrained(saved)


def test_altered_spec_gives_another_digest(saved: Path) -> None:
    edit(saved, lambda d: d["spec"].append(["more", [1], "float32"]))
    with pytest.raises(HubError, match="digest"):
        Codec.from_pretrained(saved)


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown top-level key": (lambda d: d.update(surprise=1), "surprise"),
    "unknown codec key": (lambda d: d["codec"]["outer"].update(surprise=1), "surprise"),
    "missing key": (lambda d: d.pop("weights"), "weights"),
    "newer schema": (lambda d: d.update(schema=hub.SCHEMA + 1), "upgrade"),
    "older schema": (lambda d: d.update(schema=0), "no migration from schema 0"),
    "schema is true": (lambda d: d.update(schema=True), "schema"),
    "another library's config": (lambda d: d.clear(), "gradcodec config"),
    "no kind": (lambda d: d["codec"].pop("kind"), "kind"),
    "unknown kind": (lambda d: d["codec"].update(kind="zip"), "zip"),
    "spec row of two": (lambda d: d["spec"].append(["a", [1]]), "spec rows"),
    "spec not rows": (lambda d: d.update(spec={"a": 1}), "spec"),
    "spec dtype": (lambda d: d["spec"][0].__setitem__(2, "float31"), "float31"),
    "negative size": (lambda d: d["spec"][0].__setitem__(1, [-1]), "spec rows"),
    "tensor twice": (lambda d: d["spec"].append(d["spec"][0]), "twice"),
    "huge tensor": (lambda d: d["spec"].append(["a", [1 << 60], "float32"]), "elements"),
    "digest too short": (lambda d: d.update(digest="00"), "digest"),
    "weight digest not hex": (lambda d: d["weights"].update({"shared.left.bias": "x"}), "SHA-256"),
    "weight in no half": (lambda d: d.update(weights={"mine": "0" * 64}), "'mine'"),
    "notes not text": (lambda d: d.update(notes=[1]), "notes"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused_by_name(saved: Path, case: str) -> None:
    change, words = BAD_CONFIGS[case]
    edit(saved, change)
    with pytest.raises(ConfigError, match=words):
        Codec.from_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b'{"schema": 1, "schema": 1}'],
    ids=["empty", "cut", "binary", "deep", "nan", "duplicate"],
)
def test_config_that_is_not_json(saved: Path, text: bytes) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(HubError, match="expected JSON"):
        Codec.from_pretrained(saved)


@pytest.mark.parametrize("text", [b"[]", b"3", b"null"])
def test_config_that_is_not_an_object(saved: Path, text: bytes) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match="gradcodec config"):
        Codec.from_pretrained(saved)


def test_older_schemas_go_through_every_migration(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Codec.from_pretrained(saved).digest

    def rename(document: dict[str, Any]) -> dict[str, Any]:
        document["comment"] = document.pop("remark")
        return document

    def drop(document: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in document.items() if k != "comment"}

    edit(saved, lambda d: d.update(remark="old"))
    monkeypatch.setattr(hub, "SCHEMA", 3)
    monkeypatch.setattr(hub, "MIGRATIONS", {1: rename, 2: drop})
    assert Codec.from_pretrained(saved).digest == expected
    monkeypatch.setattr(hub, "MIGRATIONS", {1: rename})
    with pytest.raises(ConfigError, match="no migration from schema 2 to 3"):
        Codec.from_pretrained(saved)


# -- halves ----------------------------------------------------------------------------------------


class HalvesConfig(IdentityConfig):
    """A codec with weights of all three kinds."""

    kind = "test-halves"


class Halves(Identity):
    """Behaves as identity; only its weights matter."""

    Config = HalvesConfig


@pytest.fixture
def halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved codec with encoder, decoder and shared weights."""
    from gradcodec.codecs import base

    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
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


# -- names -----------------------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package data folder with one bundled codec, ``tiny-8x``."""
    root = tmp_path / "assets"
    chain().save_pretrained(root / "tiny-8x")
    monkeypatch.setattr(hub, "_assets", lambda: root)
    return root


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
def test_wrong_name_lists_the_bundled_ones(assets: Path, name: str) -> None:
    with pytest.raises(HubError, match="tiny-8x"):
        Codec.from_pretrained(name)


def test_typo_gets_a_suggestion(assets: Path) -> None:
    with pytest.raises(HubError, match="did you mean 'tiny-8x'"):
        Codec.from_pretrained("tiny8x")


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(HubError, match="no such folder"):
        Codec.from_pretrained(saved / "config.json")


@pytest.mark.parametrize("bundle", [True, False])
def test_a_revision_of_something_local_is_refused(assets: Path, saved: Path, bundle: bool) -> None:
    with pytest.raises(HubError, match="only a Hub repository"):
        Codec.from_pretrained("tiny-8x" if bundle else saved, revision="main")


def test_every_bundled_codec_loads_and_decodes() -> None:
    root = hub._assets()
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


# -- the Hub ---------------------------------------------------------------------------------------


def test_pinned_revision_stays_while_main_moves_on(server: LoopbackHub) -> None:
    first, second = chain(seed=1), chain(seed=2)
    url = first.push_to_hub(REPO, token=TOKEN)
    assert second.push_to_hub(REPO, token=TOKEN) != url
    pinned = Codec.from_pretrained(REPO, revision=url.rpartition("/")[2])
    assert pinned.digest == first.digest
    assert Codec.from_pretrained(REPO).digest == second.digest
    payload = first.encoder.encode(update())
    assert set(pinned.decoder.decode(payload)) == set(update())
    with pytest.raises(CodecMismatchError):
        Codec.from_pretrained(REPO).decoder.decode(payload)


def test_push_is_one_commit_of_three_files(server: LoopbackHub) -> None:
    url = chain().push_to_hub(REPO, token=TOKEN, message="a codec")
    repo = server.repos["model", REPO]
    files = repo.commits[url.rpartition("/")[2]]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert len(repo.commits) == 2  # the empty first one and this


def test_push_to_a_new_branch_leaves_main(server: LoopbackHub) -> None:
    chain(seed=1).push_to_hub(REPO, token=TOKEN)
    chain(seed=2).push_to_hub(REPO, token=TOKEN, revision="next")
    assert Codec.from_pretrained(REPO).digest == chain(seed=1).digest
    assert Codec.from_pretrained(REPO, revision="next").digest == chain(seed=2).digest


def test_private_repository_needs_the_token(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain().push_to_hub(REPO, token=TOKEN, private=True)
    assert server.repos["model", REPO].private
    with pytest.raises(HubError, match="private"):
        Codec.from_pretrained(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Codec.from_pretrained(REPO).digest == chain().digest


def test_cached_copy_is_used_when_the_hub_is_down(server: LoopbackHub) -> None:
    chain().push_to_hub(REPO, token=TOKEN)
    Codec.from_pretrained(REPO)
    server.stop()
    assert Codec.from_pretrained(REPO).digest == chain().digest


def test_interrupted_download_is_resumed(server: LoopbackHub) -> None:
    chain().push_to_hub(REPO, token=TOKEN)
    server.interrupted.add("model.safetensors")
    assert Codec.from_pretrained(REPO).digest == chain().digest
    gets = [r for r in server.requests if r[0] == "GET" and r[1].endswith("model.safetensors")]
    assert len(gets) == 2


def fail_gated(server: LoopbackHub) -> None:
    server.repos["model", REPO].gated = True


def fail_file(server: LoopbackHub) -> None:
    server.commit(REPO, {"model.safetensors": None})


def fail_flipped(server: LoopbackHub) -> None:
    repo = server.repos["model", REPO]
    data = repo.commits[repo.branches["main"]]["model.safetensors"].data
    assert isinstance(data, bytes)
    server.commit(REPO, {"model.safetensors": data[:-1] + bytes([data[-1] ^ 1])})


FAILURES: dict[str, tuple[Callable[[LoopbackHub], object], str | None, str]] = {
    "missing repository": (lambda s: s.repos.clear(), None, "a repository of this name"),
    "missing branch": (lambda s: None, "v9", "there is no 'v9'"),
    "missing commit": (lambda s: None, "0" * 40, "there is no '0000"),
    "missing file": (fail_file, None, "model.safetensors is missing"),
    "gated": (fail_gated, None, "gated"),
    "unauthorised": (lambda s: setattr(s, "status", 401), None, "refused with 401"),
    "truncated download": (lambda s: s.truncated.add("model.safetensors"), None, "Consistency"),
    "altered weights": (fail_flipped, None, "SHA-256"),
    "server error": (lambda s: setattr(s, "status", 500), None, "a reachable Hub"),
    "down and not cached": (lambda s: s.stop(), None, "a reachable Hub"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_hub_gives_a_hub_error_that_says_why(server: LoopbackHub, case: str) -> None:
    chain().push_to_hub(REPO, token=TOKEN)
    spoil, revision, words = FAILURES[case]
    spoil(server)
    with pytest.raises(HubError, match=words) as caught:
        Codec.from_pretrained(REPO, revision=revision)
    assert REPO in str(caught.value)
    if case != "missing file":
        assert caught.value.__cause__ is not None


def test_refused_token_is_told_apart(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    chain().push_to_hub(REPO, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="refused with 401"):
        Codec.from_pretrained(REPO)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_push_without_access_is_a_hub_error(server: LoopbackHub, token: str | None) -> None:
    with pytest.raises(HubError, match=REPO):
        chain().push_to_hub(REPO, token=token)
    assert server.repos == {}


def test_push_wants_a_repository_id(server: LoopbackHub) -> None:
    with pytest.raises(ConfigError, match="user/name"):
        chain().push_to_hub("just-a-name", token=TOKEN)
    assert server.requests == []


def test_lfs_upload_and_download_in_a_fresh_process(tmp_path: Path, saved: Path) -> None:
    script = f"""
from gradcodec.codecs import blockquant, compose, subspace
from gradcodec.codecs.base import Codec
codec = Codec.from_pretrained({str(saved)!r})
commit = codec.push_to_hub({REPO!r}).rpartition("/")[2]
assert Codec.from_pretrained({REPO!r}, revision=commit).digest == codec.digest
"""
    with LoopbackHub(lfs=True) as server:
        env = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        done = run(script, tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert server.uploads
    assert any("/cdn/" in path for _, path in server.requests)
    assert list((tmp_path / "home").glob("hub/models--*/snapshots/*/model.safetensors"))


def test_no_network_spares_bundled_codecs_and_names_the_hub(tmp_path: Path) -> None:
    chain().save_pretrained(tmp_path / "assets" / "tiny-8x")
    script = f"""
from pathlib import Path
from gradcodec import hub
from gradcodec.codecs import blockquant, compose, subspace
from gradcodec.codecs.base import Codec
from gradcodec.errors import HubError
hub._assets = lambda: Path({str(tmp_path / "assets")!r})
Codec.from_pretrained("tiny-8x")
import sys
assert "huggingface_hub" not in sys.modules
try:
    Codec.from_pretrained({REPO!r})
except HubError as err:
    assert "tiny-8x" in str(err) or "reachable" in str(err), err
    assert err.__cause__ is not None
else:
    raise SystemExit("no error")
"""
    proxy = f"http://127.0.0.1:{closed_port()}"
    dead = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy, "NO_PROXY": ""}
    dead |= {k.lower(): v for k, v in dead.items()}
    offline = run(script, tmp_path, HF_HUB_OFFLINE="1", **dead)
    assert offline.returncode == 0, offline.stderr


def test_dead_proxy_gives_a_hub_error(tmp_path: Path) -> None:
    script = f"""
from gradcodec import hub
from gradcodec.errors import HubError
try:
    hub.read({REPO!r})
except HubError as err:
    assert err.__cause__ is not None and "ProxyError" in str(err) or "reachable" in str(err), err
else:
    raise SystemExit("no error")
"""
    proxy = f"http://127.0.0.1:{closed_port()}"
    done = run(script, tmp_path, HTTP_PROXY=proxy, HTTPS_PROXY=proxy, NO_PROXY="", no_proxy="")
    assert done.returncode == 0, done.stderr


# -- the card --------------------------------------------------------------------------------------


def test_card_states_what_a_reader_needs(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: gradcodec\ntags: [")
    for words in (
        "subspace > blockquant",
        "8 update elements per code value",
        "576 elements in 2 tensors",
        "about 72 values, 36 bytes at 4 bits",
        f"{chain().weight_nbytes} bytes in 2 tensors",
        chain().digest.hex(),
        "Codec.from_pretrained(",
        "fitted on: not stated",
    ):
        assert words in text


def test_pushed_card_names_its_repository(server: LoopbackHub) -> None:
    chain().push_to_hub(REPO, token=TOKEN)
    repo = server.repos["model", REPO]
    card = repo.commits[repo.branches["main"]]["README.md"].data
    assert isinstance(card, bytes)
    assert f'Codec.from_pretrained("{REPO}")' in card.decode()


def test_given_card_and_notes_are_kept(tmp_path: Path) -> None:
    folder = chain()._folder()
    noted = hub.Folder(
        folder.config, folder.spec, folder.weights, folder.digests, folder.digest, "tiny stories"
    )
    hub.write(tmp_path, noted)
    assert "fitted on: tiny stories" in (tmp_path / "README.md").read_text()
    assert hub.read(tmp_path).notes == "tiny stories"
    hub.write(tmp_path, noted, card="mine")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_card_of_an_unbound_codec_claims_no_size(tmp_path: Path) -> None:
    Identity().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "not bound" in text
    assert "| code |" not in text
    assert "| ratio |" not in text
