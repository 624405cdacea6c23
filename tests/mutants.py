"""Do the tests notice a broken library? Ten faults, one at a time, in a copy of the tree.

    make mutants                                  # or: python -m tests.mutants [--only sign,axis]

For each *mutant* a line of the library is changed, and the tests that are about it are run until
the first one fails. A mutant is *killed* by that test, or it *survived*, and then a law is missing.
The same tests are run on the unchanged copy first: a test that fails there says nothing.

A mutant names text and not a file, so that moving code does not lose it. Text that is not there
exactly once is an error: write the mutant anew.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: short.
        words: what is wrong with the library then.
        old: text that stands in one place of the library.
        new: what stands there instead.
        tests: patterns of the test files that are about it, from the folder of the tests.
    """

    name: str
    words: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "sign",
        "a sign is flipped in the Hadamard butterflies",
        "torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])",
        "torch.sub(pairs[:, :, 1], pairs[:, :, 0], out=out[:, :, 1])",
        ("reference/test_hadamard.py",),
    ),
    Mutant(
        "scale",
        "the latent optimizer drops the scales of its code",
        "return self._scale * self._w",
        "return self._w",
        ("test_faf.py",),
    ),
    Mutant(
        "tail",
        "the last block counts one value too many",
        "counts[-1] = count - (blocks - 1) * block",
        "counts[-1] = count - (blocks - 1) * block + 1",
        ("reference/test_encode.py", "native/test_coding.py"),
    ),
    Mutant(
        "residual",
        "what quantising lost is forgotten",
        "rest.view(-1)[:count].to(residual.dtype)",
        "rest.view(-1)[:count].to(residual.dtype) * 0",
        ("reference/test_encode.py",),
    ),
    Mutant(
        "ranks",
        "ranks are sent each other's parts, in reverse order",
        "for r, m in enumerate(messages)",
        "for r, m in enumerate(messages[::-1])",
        ("distributed/test_collectives.py",),
    ),
    Mutant(
        "digest",
        "a payload of other weights is decoded",
        "payload.digest != codec.digest",
        "payload.digest != payload.digest",
        ("codecs/test_autoencoder.py",),
    ),
    Mutant(
        "rounding",
        "values are rounded down in place of to the nearest",
        "(0.5 if dither is None else dither)",
        "(0.0 if dither is None else dither)",
        ("reference/test_grid.py", "reference/test_encode.py"),
    ),
    Mutant(
        "seed",
        "every seed gives the same random bytes",
        "k0, k1 = seed & _LOW, (seed >> 32) & _LOW",
        "k0, k1 = 0, 0",
        ("reference/test_philox.py",),
    ),
    Mutant(
        "axis",
        "second moments are taken along the other axis",
        "rows = matrix.T if axis.left else matrix",
        "rows = matrix if axis.left else matrix.T",
        ("tgap/test_moments.py",),
    ),
    Mutant(
        "carry",
        "error feedback begins at zero in every step",
        "        kept[name] = found\n",
        "        kept.pop(name, None)\n",
        ("distributed/test_collectives.py",),
    ),
)


def place(mutant: Mutant, root: Path = ROOT) -> Path:
    """The file that a mutant changes.

    Raises:
        LookupError: its text is not in the library exactly once.
    """
    found = [
        path
        for path in sorted((root / "gradcodec").rglob("*.py"))
        for _ in range(path.read_text().count(mutant.old))
    ]
    if len(found) != 1:
        where = ", ".join(str(path.relative_to(root)) for path in found) or "nowhere"
        raise LookupError(
            f"mutant {mutant.name!r}: expected in one place of the library {mutant.old!r}, "
            f"found it {where}"
        )
    return found[0]


def changed(mutant: Mutant, text: str) -> str:
    """A file's text with the fault; still Python."""
    out = text.replace(mutant.old, mutant.new)
    ast.parse(out)
    return out


def files_for(mutant: Mutant, root: Path = ROOT) -> tuple[str, ...]:
    """Test files, from the root.

    Raises:
        LookupError: there is none for one of the patterns.
    """
    out: list[str] = []
    for pattern in mutant.tests:
        found = sorted((root / "tests").glob(pattern))
        if not found:
            raise LookupError(f"mutant {mutant.name!r}: there are no tests {pattern!r}")
        out += [str(path.relative_to(root)) for path in found]
    return tuple(out)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of what the tests need; the tree itself is never changed."""
    skip = shutil.ignore_patterns(".*", "__pycache__", "runs", "results", "build", "dist")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(ROOT, Path(folder, "tree"), ignore=skip))


def first_failure(tree: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails, ``None`` if none does.

    Raises:
        RuntimeError: the tests could not be run.
    """
    path = os.pathsep.join(str(tree / part) for part in ("", "kernels", "tests"))
    # Files are changed within a second and keep their length: bytecode would not notice.
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu and not slow"]
    command += ["-p", "no:cacheprovider", "--no-header", *tests]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (1, 2) or named is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return named[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run them and print a table; 1 if one survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="names, such as sign,axis")
    names = {name for name in parser.parse_args(argv).only.split(",") if name}
    if unknown := names - {mutant.name for mutant in MUTANTS}:
        parser.error(f"unknown mutants {sorted(unknown)}; there are {[m.name for m in MUTANTS]}")
    survived = 0
    with copied() as tree:
        chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
        places = [place(mutant, tree) for mutant in chosen]  # before anything runs
        for tests in dict.fromkeys(files_for(mutant, tree) for mutant in chosen):
            if (failed := first_failure(tree, tests)) is not None:
                raise SystemExit(f"{failed} fails without any mutant")
        print("| mutant | | killed by |\n|---|---|---|")
        for mutant, path in zip(chosen, places, strict=True):
            text = path.read_text()
            path.write_text(changed(mutant, text))
            killer = first_failure(tree, files_for(mutant, tree))
            path.write_text(text)
            survived += killer is None
            print(f"| {mutant.name} | {mutant.words} | {killer or '**survived**'} |", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
