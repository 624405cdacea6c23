"""Laws of a run on disk: nothing finished is lost, nothing half-written is believed."""

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from gradcodec.errors import ConfigError
from gradcodec.recipes import lock
from gradcodec.recipes.lock import NAME as LOCK
from gradcodec.recipes.run_folder import RunFolder

CONFIG = {"rounds": 3, "targets": ("a", "b"), "local": {"lr": 0.1}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]


def started(path: Path) -> None:
    with RunFolder(path, CONFIG) as folder:
        folder.log("round", scheme="fp32", round=0, loss=1.5)


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the lock, which names its last holder."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != LOCK}


def test_a_folder_starts_with_its_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "x", CONFIG)
    assert folder.load("config.json") == json.loads(json.dumps(CONFIG))
    assert rows(folder.path) == []


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    started(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder(tmp_path, CONFIG)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_refused_at_once_may_be_corrected(resume: bool, tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG).close()
    folder = RunFolder(tmp_path, {**CONFIG, "rounds": 4}, resume=resume)
    saved = folder.load("config.json")
    assert saved is not None
    assert saved["rounds"] == 4


@pytest.mark.parametrize("name", ["tgap.json", "snapshots/0.safetensors", "codecs/x/config.json"])
@pytest.mark.parametrize("settings", [False, True])
def test_parts_of_a_run_are_never_taken_for_an_empty_folder(
    settings: bool, name: str, tmp_path: Path
) -> None:
    """Without its settings even snapshots, which a new run would delete, are somebody's."""
    started(tmp_path)
    if not settings:
        (tmp_path / "config.json").unlink()
        (tmp_path / "events.jsonl").unlink()
    part = tmp_path / name
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"x")
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder(tmp_path, CONFIG)
    if not settings:
        with pytest.raises(ConfigError, match="without its settings"):
            RunFolder(tmp_path, CONFIG, resume=True)
    assert part.read_bytes() == b"x"


def test_resuming_with_the_same_settings_goes_on(tmp_path: Path) -> None:
    started(tmp_path)
    with RunFolder(tmp_path, CONFIG, resume=True) as folder:
        folder.save("schemes/fp32.json", {"a": [1]})
    folder = RunFolder(tmp_path, CONFIG, resume=True)
    assert folder.load("schemes/fp32.json") == {"a": [1]}
    assert len(rows(tmp_path)) == 1


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ConfigError, match=r"\(was, is\): {'rounds': \(3, 4\)}"):
        RunFolder(tmp_path, {**CONFIG, "rounds": 4}, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["rounds"] == 3


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"kind": "subspace"}'])
def test_a_foreign_config_is_named(text: bytes, resume: bool, alone: bool, tmp_path: Path) -> None:
    """A codec's folder, for example, has a file of that name."""
    (tmp_path / "config.json").write_bytes(text)
    if not alone:
        (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="not the settings of a run"):
        RunFolder(tmp_path, CONFIG, resume=resume)
    assert (tmp_path / "config.json").read_bytes() == text


def test_an_event_is_written_once_however_often_a_run_is_resumed(tmp_path: Path) -> None:
    for _ in range(3):
        with RunFolder(tmp_path, CONFIG, resume=True) as folder:
            for number in range(2):
                folder.log("round", scheme="fp32", round=number, loss=0.5, seconds=0.1)
            folder.log("round", scheme="topk", round=0)
            folder.log("start", loss=2.0)
    found = [(r["event"], r.get("scheme"), r.get("round")) for r in rows(tmp_path)]
    assert found == [
        ("round", "fp32", 0),
        ("round", "fp32", 1),
        ("round", "topk", 0),
        ("start", None, None),
    ]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_cut_off_is_written_again(cut: int, tmp_path: Path) -> None:
    started(tmp_path)
    with RunFolder(tmp_path, CONFIG, resume=True) as folder:
        folder.log("round", scheme="fp32", round=1, loss=1.0)
    whole = (tmp_path / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(whole[:-cut])
    again = RunFolder(tmp_path, CONFIG, resume=True)
    for number, loss in enumerate((1.5, 1.0)):
        again.log("round", scheme="fp32", round=number, loss=loss)
    assert (tmp_path / "events.jsonl").read_text() == whole


@pytest.mark.parametrize("bad", [b"\xff\xfe\x00", b"{", b"[]", b"3", b"{}", b'{"event": "x"}'])
def test_a_damaged_line_costs_no_other_line(
    bad: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        for number in range(4):
            folder.log("round", scheme="fp32", round=number, loss=0.5)
    path = tmp_path / "events.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], bad, *lines[2:], b""]))
    with RunFolder(tmp_path, CONFIG, resume=True) as folder:
        assert [r["round"] for r in rows(tmp_path)] == [0, 2, 3]
        folder.log("round", scheme="fp32", round=1, loss=0.5)
    assert sorted(path.read_bytes().splitlines()) == sorted(lines)
    assert "lines [2] are damaged" in caplog.text


def test_json_for_people_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG)
    path = folder.write_json("x.json", {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert {p.name for p in tmp_path.iterdir()} == {LOCK, "config.json", "events.jsonl", "x.json"}
    assert folder.load("other.json") is None


def test_what_a_killed_process_was_writing_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "schemes").mkdir()
    left = tmp_path / "schemes" / ".fp32.json.123.0123abcd.tmp"
    others = [tmp_path / ".mine.tmp", tmp_path / "schemes" / "fp32.json.123.0123abcd.tmp"]
    for path in (left, *others):
        path.write_bytes(b"x")
    RunFolder(tmp_path, CONFIG, resume=True)
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_a_fresh_sub_folder_has_no_leftovers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "000.safetensors").write_bytes(b"torn")
    assert not folder.fresh("snapshots").exists()


def test_a_second_user_is_told_who_the_first_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG)
    for resume in (False, True):
        with pytest.raises(ConfigError) as raised:
            RunFolder(tmp_path, CONFIG, resume=resume)
        assert f"process {os.getpid()} on {socket.gethostname()} since 2" in str(raised.value)
        assert "--out" in str(raised.value)
    folder.log("round", scheme="fp32", round=0)  # the first goes on as if nothing had been
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("how", ["close", "with", "forgotten", "refused"])
def test_a_folder_is_free_when_its_user_has_gone(how: str, tmp_path: Path) -> None:
    if how == "close":
        RunFolder(tmp_path, CONFIG).close()
    elif how == "with":
        with RunFolder(tmp_path, CONFIG):
            pass
    elif how == "forgotten":
        RunFolder(tmp_path, CONFIG)
    else:
        started(tmp_path)
        with pytest.raises(ConfigError):
            RunFolder(tmp_path, {**CONFIG, "rounds": 4}, resume=True)
    RunFolder(tmp_path, CONFIG, resume=True)


def test_a_filesystem_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", unsupported)
    RunFolder(tmp_path, CONFIG)
    assert "cannot be locked" in caplog.text
    assert "no other process" in caplog.text


@pytest.mark.parametrize("way", ["folder", "link"])
def test_a_run_goes_on_under_another_name(way: str, tmp_path: Path) -> None:
    started(tmp_path / "before")
    after = tmp_path / "after"
    if way == "folder":
        (tmp_path / "before").rename(after)
    else:
        after.symlink_to(tmp_path / "before")
    folder = RunFolder(after, CONFIG, resume=True)
    assert len(rows(after)) == 1
    if way == "link":  # the lock is the folder's, whatever it is called
        with pytest.raises(ConfigError, match="in use"):
            RunFolder(tmp_path / "before", CONFIG, resume=True)
    folder.close()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("file", "it is a file"),
        ("below a file", "Not a directory"),
        ("link", "it is a link to nothing"),
    ],
)
def test_what_cannot_be_a_folder_is_named(what: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if what == "link":
        path.symlink_to(tmp_path / "gone")
    else:
        path.write_text("mine")
    with pytest.raises(ConfigError, match=f"got {tmp_path}.*: {said}; choose another"):
        RunFolder(path / "x" if what == "below a file" else path, CONFIG)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has a place closed to root")
def test_a_place_where_nobody_may_write_is_named() -> None:
    with pytest.raises(ConfigError, match="can be written to, got /proc/run"):
        RunFolder("/proc/run", CONFIG)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path)

    def refuse(path: Path, *args: object, **kwargs: object) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(ConfigError, match=os.strerror(code)):
        RunFolder(tmp_path, CONFIG, resume=True)
