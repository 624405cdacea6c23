"""Laws of codecs on the Hub, which is a real server on the loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_helpers import REPO, chain, closed_port, run, update
from loopback_hub import TOKEN, LoopbackHub

from gradcodec.codec import Codec
from gradcodec.errors import CodecMismatchError, ConfigError, HubError


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


#: What somebody has in a repository, and whether it is in the way of a codec.
CONTENTS: dict[str, tuple[dict[str, bytes], bool]] = {
    "a new one": ({".gitattributes": b"*.bin filter=lfs"}, False),
    "a model": ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}, True),
    "weights alone": ({"pytorch_model.bin": b"x"}, True),
    "a card": ({"README.md": b"mine"}, True),
    "no JSON": ({"config.json": b"{"}, True),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("branch", [None, "next"])
def test_what_is_no_codec_is_replaced_only_if_that_is_said(
    server: LoopbackHub, content: str, branch: str | None
) -> None:
    files, refused = CONTENTS[content]
    before = server.commit(REPO, dict(files))
    repo = server.repos["model", REPO]
    if refused:
        with pytest.raises(ConfigError, match=f"got {REPO} with .*{sorted(files)[0]}.*replace"):
            chain().push_to_hub(REPO, token=TOKEN, revision=branch)
        assert repo.branches == {"main": before}
    chain().push_to_hub(REPO, token=TOKEN, revision=branch, replace=refused)
    assert Codec.from_pretrained(REPO, revision=branch).digest == chain().digest


def test_a_public_repository_is_not_taken_for_a_private_one(server: LoopbackHub) -> None:
    url = chain(seed=1).push_to_hub(REPO, token=TOKEN)
    with pytest.raises(ConfigError, match="is public"):
        chain(seed=2).push_to_hub(REPO, token=TOKEN, private=True)
    repo = server.repos["model", REPO]
    assert repo.branches["main"] == url.rpartition("/")[2]
    repo.private = True
    chain(seed=2).push_to_hub(REPO, token=TOKEN, private=True)
    assert repo.branches["main"] != url.rpartition("/")[2]


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
from gradcodec import chain, codecs
from gradcodec.codec import Codec
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
from gradcodec import chain, codecs
from gradcodec.codec import Codec
from gradcodec.errors import HubError
from gradcodec.hub import local
local._assets = lambda: Path({str(tmp_path / "assets")!r})
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
