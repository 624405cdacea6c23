"""Laws of the snapshot store: bounded, evenly thinned, in order, plain safetensors."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gradcodec.errors import ConfigError
from gradcodec.tgap.snapshots import SnapshotStore


def numbers(store: SnapshotStore) -> list[int]:
    return [int(s["x"]) for s in store]


def fill(store: SnapshotStore, start: int, stop: int) -> None:
    for i in range(start, stop):
        store.add({"x": torch.tensor(float(i))})


@given(st.integers(2, 9), st.integers(0, 60))
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


@given(st.integers(0, 40), st.integers(1, 40))
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
