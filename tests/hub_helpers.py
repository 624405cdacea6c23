"""Codecs, updates and processes for the tests of codec folders and the Hub."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub

from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, Subspace
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

ROOT = Path(__file__).parents[1]
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


@contextmanager
def reachable_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process' client talks to, with an empty cache in ``folder`` and no token."""
    from huggingface_hub import constants

    with LoopbackHub() as server:
        patch.setattr(constants, "ENDPOINT", server.endpoint)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        yield server
