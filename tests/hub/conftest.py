"""Codec folders on disk, in the package and on a Hub, which is a real server on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_helpers import chain, reachable_hub
from loopback_hub import LoopbackHub

from gradcodec.hub import local


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A whole codec folder."""
    folder = tmp_path / "codec"
    chain().save_pretrained(folder)
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process' client talks to, with an empty cache and no token."""
    with reachable_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package data folder with one bundled codec, ``tiny-8x``."""
    root = tmp_path / "assets"
    chain().save_pretrained(root / "tiny-8x")
    monkeypatch.setattr(local, "_assets", lambda: root)
    return root
