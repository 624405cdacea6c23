"""Seconds and memory of a call, and calls in a process of their own."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call in a fresh process, so that no measurement inherits the memory of another."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def median(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds), 4)


def peak(call: Callable[[], Any]) -> int | None:
    """Bytes of resident memory that a call needs beyond what there was; ``None`` where unknown.

    It is the process's largest resident size during the call less the size before it (``VmHWM``,
    reset through ``/proc/self/clear_refs``; Linux only): the result, and what is left over from
    it, count as well.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not at hand for this one
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    result = call()
    found = _resident("VmHWM") - before
    del result
    return found


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
