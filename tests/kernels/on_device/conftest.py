"""Where kernels run: the interpreter, on CPU tensors, or a CUDA device; and what their tests share.

Nothing here is collected unless one of the two is there; see ``tests/kernels/test_interpreted.py``.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GUARD = 256

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

Make = Callable[..., Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def only_gpu() -> None:
    if INTERPRETED:
        pytest.skip("more memory than the interpreter should touch")


@pytest.fixture
def guarded(device: torch.device) -> Iterator[Make]:
    """``make(shape, dtype)``: poisoned memory with guards on both sides, which must stay whole.

    With ``like=tensor`` a copy of it. The interpreter and the device write where they are told,
    without any check of bounds.
    """
    made: list[tuple[Tensor, int]] = []

    def make(
        shape: tuple[int, ...] = (), dtype: torch.dtype = torch.uint8, like: Tensor | None = None
    ) -> Tensor:
        if like is not None:
            shape, dtype = tuple(like.shape), like.dtype
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.full((nbytes + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=device)
        inner = raw[GUARD : GUARD + nbytes]
        if dtype.is_floating_point and like is None:
            inner.view(dtype).fill_(float("nan"))
        out = inner.view(dtype).view(shape)
        if like is not None:
            out.copy_(like)
        made.append((raw, nbytes))
        return out

    yield make
    for raw, nbytes in made:
        assert (raw[:GUARD] == 0xA5).all(), "written before the start of a buffer"
        assert (raw[GUARD + nbytes :] == 0xA5).all(), "written beyond the end of a buffer"


@pytest.fixture
def rotation(device: torch.device) -> tuple[Tensor, Tensor]:
    from gradcodec.reference.hadamard import rotation_factors

    left, right = (f.to(device, torch.bfloat16).contiguous() for f in rotation_factors())
    return left, right
