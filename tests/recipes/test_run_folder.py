"""Laws of a run on disk: nothing finished is lost, nothing half-written is believed."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradcodec.errors import ConfigError
from gradcodec.recipes.run_folder import RunFolder

CONFIG = {"rounds": 3, "targets": ("a", "b"), "local": {"lr": 0.1}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]


def started(path: Path) -> RunFolder:
    folder = RunFolder(path, CONFIG)
    folder.log("round", scheme="fp32", round=0, loss=1.5)
    return folder


def test_a_folder_starts_with_its_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "x", CONFIG)
    assert folder.read_json("config.json") == json.loads(json.dumps(CONFIG))
    assert rows(folder.path) == []


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    started(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder(tmp_path, CONFIG)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_refused_at_once_may_be_corrected(resume: bool, tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG)
    folder = RunFolder(tmp_path, {**CONFIG, "rounds": 4}, resume=resume)
    assert folder.read_json("config.json")["rounds"] == 4


def test_finished_work_without_events_is_a_run_too(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG).write_json("tgap.json", {})
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder(tmp_path, CONFIG)


def test_resuming_with_the_same_settings_goes_on(tmp_path: Path) -> None:
    started(tmp_path).write_json("schemes/fp32.json", [1])
    folder = RunFolder(tmp_path, CONFIG, resume=True)
    assert folder.read_json("schemes/fp32.json") == [1]
    assert len(rows(tmp_path)) == 1


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ConfigError, match=r"\(was, is\): {'rounds': \(3, 4\)}"):
        RunFolder(tmp_path, {**CONFIG, "rounds": 4}, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["rounds"] == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_foreign_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="settings of a run"):
        RunFolder(tmp_path, CONFIG, resume=True)
    assert (tmp_path / "config.json").read_text() == text


def test_an_event_is_written_once_however_often_a_run_is_resumed(tmp_path: Path) -> None:
    for _ in range(3):
        folder = RunFolder(tmp_path, CONFIG, resume=True)
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
    folder = started(tmp_path)
    folder.log("round", scheme="fp32", round=1, loss=1.0)
    whole = (tmp_path / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(whole[:-cut])
    again = RunFolder(tmp_path, CONFIG, resume=True)
    for number, loss in enumerate((1.5, 1.0)):
        again.log("round", scheme="fp32", round=number, loss=loss)
    assert (tmp_path / "events.jsonl").read_text() == whole


def test_json_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG)
    (tmp_path / "x.json.partial").write_text('{"torn": ')
    path = folder.write_json("x.json", {"a": [1, 2]})
    assert json.loads(path.read_text()) == folder.read_json("x.json") == {"a": [1, 2]}
    assert not list(tmp_path.glob("*.partial"))
    assert folder.read_json("other.json") is None


def test_a_fresh_sub_folder_has_no_leftovers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "000.safetensors").write_bytes(b"torn")
    assert not folder.fresh("snapshots").exists()
