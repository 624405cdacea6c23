"""A library of this tree's sources, guarded outputs, and what equal bits are."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.native import library, sources

Build = Callable[..., Path]
GUARD = 68
"""Bytes on each side of an output; not a multiple of a vector, so that outputs are not aligned."""


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile and link files with the project's flags and more."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)

    def built(name: str, *files: Path | str, flags: tuple[str, ...] = ("-shared",)) -> Path:
        if compiler is None:
            pytest.skip("there is no C compiler on this machine")
        out = tmp_path_factory.mktemp("built") / name
        command = [compiler, *sources.FLAGS, "-fPIC", *flags, *map(str, files), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    return built


@pytest.fixture(scope="session")
def built_library(build: Build) -> Path:
    """The one that is installed in this tree if it is of these sources, else one made now."""
    installed = library.find()
    if installed is not None:
        try:
            return library.load(installed).path
        except ConfigError:
            pass  # stale
    named = f"-DGRADCODEC_SOURCES={sources.digest()}"
    return build("_library.so", *sources.units(), flags=("-shared", named))


@pytest.fixture
def native_library(built_library: Path, monkeypatch: pytest.MonkeyPatch) -> library.Library:
    """The library that computes during a test, at the machine's highest level."""
    monkeypatch.setattr(library, "_current", None)
    return library.select(built_library)


@pytest.fixture(params=["portable", "sse2", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, native_library: library.Library, guarded: None) -> str:
    """Each level of instructions, with guards around outputs."""
    wanted: str = request.param
    if wanted not in native_library.levels:
        pytest.skip(f"this machine has no {wanted}; one with it runs this test")
    library.select(native_library.path, wanted)
    return wanted


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs of ops lie between bytes that must stay as they are."""
    made: list[tuple[Tensor, int]] = []
    make = torch.empty

    def between_guards(*shape: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith(("gradcodec.native.", "gradcodec.ops.")):
            return make(*shape, dtype=dtype, **more)
        if shape and isinstance(shape[0], tuple):
            (shape,) = shape
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.full((nbytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        made.append((memory, nbytes))
        return memory[GUARD : GUARD + nbytes].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", between_guards)
    yield
    for memory, nbytes in made:
        assert (memory[:GUARD] == 0xA5).all(), "written before an output"
        assert (memory[GUARD + nbytes :] == 0xA5).all(), "written behind an output"


@pytest.fixture
def same() -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors have equal dtypes, shapes and bits; any NaN equals any NaN."""

    def equal(a: Tensor, b: Tensor) -> bool:
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.is_floating_point:
            nan = a.isnan()
            if not torch.equal(nan, b.isnan()):
                return False
            whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
            a, b = (t.masked_fill(nan, 0).contiguous().view(whole) for t in (a, b))
        return torch.equal(a, b)

    return equal
