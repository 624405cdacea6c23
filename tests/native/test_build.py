"""The C sources themselves: under sanitizers, without a warning, and with wider vectors."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradcodec import ops
from gradcodec.native import library, sources
from gradcodec.reference.decode_mean import decode_mean
from gradcodec.reference.encode import encode
from gradcodec.reference.grid import padded_numel

Build = Callable[..., Path]
Same = Callable[[Tensor, Tensor], bool]

INCLUDE = (f"-I{sources.FOLDER}",)
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
def test_sanitizers_find_nothing(build: Build, tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    try:
        build("empty", tmp_path / "empty.c", flags=SANITIZERS)
    except AssertionError:
        pytest.skip("this machine's compiler comes without sanitizers")
    main = Path(__file__).with_name("sanitized.c")
    program = build("sanitized", main, *sources.units(), flags=(*SANITIZERS, *INCLUDE))
    rounds = "2000" if os.environ.get("GRADCODEC_HOSTILE") == "long" else "100"
    done = subprocess.run([program, rounds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "portable" in done.stdout


@pytest.mark.slow
def test_sources_compile_without_a_warning(build: Build) -> None:
    # -O1: warnings of the optimiser's own are of its version, not of the sources.
    build("_library.so", *sources.units(), flags=("-shared", "-O1", "-Wall", "-Wextra", "-Werror"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64])
def test_wider_vectors_have_the_references_bits(
    build: Build, width: int, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The portable level with the vectors of AVX2 and AVX-512: what their level does, but for
    # intrinsics, on machines without them.
    flags = ("-shared", f"-DGRADCODEC_SOURCES={sources.digest()}", f"-DWIDTH={width}", "-O1")
    wide = build("_library.so", *sources.units(), flags=flags)
    monkeypatch.setattr(library, "_current", None)
    library.select(wide, "portable")
    for numel in (65, 4097, 3 * 4096 + 17):
        values = torch.randn(numel)
        for bits in (1, 2, 4, 8):
            for rotate in (False, True):
                grid: dict[str, Any] = {"bits": bits, "rotate": rotate}
                mine = torch.randn(padded_numel(numel, rotate))
                its = mine.clone()
                packed, scales = ops.encode(
                    values, impl="native", stochastic=True, residual=mine, **grid
                )
                expected, _ = encode(values, stochastic=True, residual=its, **grid)
                assert same(packed, expected)
                assert same(mine, its)
                pair, of_pair = packed.repeat(2, 1), scales.repeat(2, 1)
                mean = ops.decode_mean(pair, of_pair, numel, impl="native", **grid)
                assert same(mean, decode_mean(pair, of_pair, numel, **grid))
