"""Shared by all tests: seeds, poisoned memory, hypothesis profiles."""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=1000, deadline=None)
LONG = os.environ.get("GRADCODEC_HOSTILE") == "long"
settings.load_profile("long" if LONG else "ci" if os.environ.get("CI") else "dev")

POISON_BYTE = 0xA5

# torch remembers its constructors when a device context is first used; they must be the real ones,
# or `with torch.device("meta")` stops working under the poison fixture.
with torch.device("cpu"):
    torch.empty(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where files are dealt to workers, the long ones go first, so that none is left for the end.

    A file's length is guessed: a test marked ``slow`` counts as much as a hundred others.
    """
    if config.getoption("dist", "no") == "no":
        return
    length: Counter[Path] = Counter()
    for item in items:
        length[item.path] += 100 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -length[item.path])  # stable: a file's tests keep their order


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same global generators, in whatever order tests run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code under test uses the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that gradcodec asks for without initialising it is never accidentally zero.

    ``torch.empty`` and ``torch.empty_like`` called from our modules give NaN, or 0xA5 bytes where
    there is no NaN: an element that nothing writes then fails the test that reads it.
    """
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] in ("gradcodec", "gradcodec_kernels") and out.numel():
            if out.dtype.is_floating_point:
                out.fill_(float("nan"))
            else:
                out.view(torch.uint8).fill_(POISON_BYTE)
        return out

    return made
