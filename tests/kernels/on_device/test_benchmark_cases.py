"""Every case that ``benchmarks.kernels.case`` would time runs, and moves the bytes that it says."""

import pytest
import torch

from benchmarks.kernels.calls import KERNELS, PEERS

NUMEL = 2 * 4096


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_run(device: torch.device, name: str) -> None:
    call, moved = KERNELS[name](NUMEL, device)
    call()
    # Less than a value of one bit, more than 64 payloads of four, would be a slip.
    assert NUMEL // 8 <= moved < 64 * NUMEL


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("torch:")])
def test_peers_of_torch_run(device: torch.device, name: str) -> None:
    call, moved = PEERS[name](NUMEL, device)
    call()
    assert moved > NUMEL
