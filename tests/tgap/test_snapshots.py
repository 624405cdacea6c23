"""Laws of the snapshot store: bounded, evenly thinned, in order, plain safetensors."""

import errno
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.tgap.snapshots import SnapshotStore


def numbers(store: SnapshotStore) -> list[int]:
    return [int(s["x"]) for s in store]


def fill(store: SnapshotStore, start: int, stop: int) -> None:
    for i in range(start, stop):
        store.add({"x": torch.tensor(float(i))})


@given(st.integers(2, 9), st.integers(0, 40))
@settings(max_examples=20)
def test_the_store_is_bounded_evenly_spaced_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, limit: int, count: int
) -> None:
    store = SnapshotStore(tmp_path_factory.mktemp("store"), limit=limit)
    fill(store, 0, count)
    kept = numbers(store)
    stride = kept[1] - kept[0] if len(kept) > 1 else 1
    assert len(kept) <= limit
    assert len(kept) >= min(count, limit // 2)
    assert kept == list(range(0, count, stride))


def test_every_file_is_plain_safetensors(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    wide = torch.randn(4, 6)
    update = {
        "view": wide[:, ::2],
        "transposed": wide.T,
        "half": torch.randn(3).bfloat16(),
        "leaf": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.zeros(0, 3),
    }
    store.add(update)
    (path,) = tmp_path.glob("*.safetensors")
    found = load_file(path)
    assert set(found) == set(update)
    for name, t in update.items():
        assert found[name].dtype == t.dtype
        assert torch.equal(found[name], t.detach())


def test_what_is_stored_does_not_follow_the_parameters(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    x = torch.zeros(3)
    store.add({"x": x})
    x.add_(1)
    assert not store[0]["x"].any()


@given(st.integers(0, 30), st.integers(1, 30))
@settings(max_examples=20)
def test_a_store_that_is_opened_again_stays_evenly_spaced(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    fill(SnapshotStore(folder, limit=4), 0, first)
    store = SnapshotStore(folder, limit=4)
    fill(store, first, first + second)
    kept = [int(f.stem) for f in sorted(folder.glob("*"))]
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert len(store) <= 4
    assert len(gaps) <= 1
    assert numbers(store) == sorted(numbers(store))


def test_it_is_a_sequence(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    fill(store, 0, 5)
    assert int(store[-1]["x"]) == 4
    assert [int(s["x"]) for s in store[1:3]] == [1, 2]
    assert [int(s["x"]) for s in reversed(store)] == [4, 3, 2, 1, 0]
    with pytest.raises(IndexError):
        store[5]


def test_a_limit_that_could_not_span_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 1"):
        SnapshotStore(tmp_path, limit=1)


# -- kills, damage, going back ---------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(0, 20), st.integers(0, 8))
@settings(max_examples=15)
def test_going_back_and_on_gives_the_store_of_going_straight_on(
    tmp_path_factory: pytest.TempPathFactory, limit: int, before: int, lost: int
) -> None:
    straight = SnapshotStore(tmp_path_factory.mktemp("straight"), limit=limit)
    fill(straight, 0, before + lost)
    folder = tmp_path_factory.mktemp("store")
    store = SnapshotStore(folder, limit=limit)
    fill(store, 0, before)
    state = store.state_dict()
    fill(store, before, before + lost)
    store = SnapshotStore(folder, limit=limit)  # after a kill
    store.load_state_dict(state)
    fill(store, before, before + lost)
    assert numbers(store) == numbers(straight)
    assert store.state_dict() == straight.state_dict()


@pytest.mark.parametrize("deleted", [1, 2])
def test_a_kill_in_the_middle_of_thinning_is_finished(deleted: int, tmp_path: Path) -> None:
    whole = SnapshotStore(tmp_path / "whole", limit=4)
    fill(whole, 0, 5)
    fill(SnapshotStore(tmp_path / "cut", limit=5), 0, 5)
    for number in (1, 3)[:deleted]:
        (tmp_path / "cut" / f"{number:09d}.safetensors").unlink()
    store = SnapshotStore(tmp_path / "cut", limit=4)
    for s in (whole, store):
        fill(s, 5, 9)
    assert numbers(store) == numbers(whole)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_snapshot_is_named(number: int, tmp_path: Path) -> None:
    fill(SnapshotStore(tmp_path), 0, 4)
    (tmp_path / f"{number:09d}.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"the first of them {number:09d}"):
        SnapshotStore(tmp_path)


def test_a_missing_last_snapshot_is_named_when_going_back(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    fill(store, 0, 4)
    (tmp_path / "000000003.safetensors").unlink()
    with pytest.raises(ConfigError, match="1 of 4 snapshots are missing"):
        SnapshotStore(tmp_path).load_state_dict(store.state_dict())


def test_a_damaged_snapshot_is_named_when_it_is_read(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    fill(store, 0, 3)
    path = tmp_path / "000000001.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    assert int(store[2]["x"]) == 2
    with pytest.raises(ConfigError, match=r"000000001\.safetensors is damaged"):
        store[1]


def test_a_folder_of_other_files_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="model"):
        SnapshotStore(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_a_snapshot_that_was_not_written_to_its_end_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(tmp_path)
    fill(store, 0, 2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="000000002"):
            fill(store, 2, 3)
    assert len(list(tmp_path.iterdir())) == len(SnapshotStore(tmp_path)) == len(store) == 2
    fill(store, 2, 3)
    assert numbers(store) == [0, 1, 2]
