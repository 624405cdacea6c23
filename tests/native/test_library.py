"""Which library is opened, which is refused, and what users are told."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gradcodec import native
from gradcodec.errors import ConfigError
from gradcodec.native import library, sources

Build = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """A C file of one's own."""

    def written(text: str) -> Path:
        path = tmp_path / "other.c"
        path.write_text(text)
        return path

    return written


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_current", library._current)
    monkeypatch.setattr(library, "_reason", library._reason)


def started(monkeypatch: pytest.MonkeyPatch, found: Path | None, switch: str | None) -> None:
    """What importing the package does, with another library beside it and another environment."""
    monkeypatch.setattr(library, "_current", None)
    monkeypatch.setattr(library, "find", lambda: found)
    monkeypatch.delenv(library.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(library.SWITCH, switch)
    library._start()


def test_c_and_python_have_one_version() -> None:
    text = (sources.FOLDER / "levels.h").read_text()
    assert re.findall(r"#define GRADCODEC_ABI (\d+)", text) == [str(library.ABI)]


def test_a_library_of_another_version_is_refused(
    build: Build, source: Callable[[str], Path]
) -> None:
    other = source(
        '#define EXPORT __attribute__((visibility("default")))\n'
        "EXPORT int gradcodec_abi(void) { return 999; }\n"
        'EXPORT const char *gradcodec_sources(void) { return ""; }\n'
        "EXPORT const char *gradcodec_level(int at) { return 0; }\n"
    )
    with pytest.raises(ConfigError, match="stale: expected version 3, got 999"):
        library.load(build("other.so", other))


def test_a_library_of_other_sources_is_refused(
    built_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "digest", lambda: "0123456789abcdef")
    with pytest.raises(ConfigError, match="stale: its sources have changed since"):
        library.load(built_library)


def test_a_library_is_taken_where_the_sources_are_not_installed(
    built_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    assert sources.digest() == ""
    assert library.load(built_library).levels


def test_a_library_of_something_else_is_refused(
    build: Build, source: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is not a gradcodec library"):
        library.load(build("else.so", source("int unrelated;\n")))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ConfigError, match="is not a gradcodec library"):
        library.load(tmp_path / "text.so")


def test_a_level_that_is_not_there_is_refused(built_library: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of the levels .*'portable'.*got 'avx1024'"):
        library.load(built_library, "avx1024")


def test_status_names_the_highest_level(
    built_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, built_library, None)
    assert native.available()
    assert native.status() == f"built, {library.load(built_library).levels[-1]}"


def test_the_switch_turns_it_off(built_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, built_library, "0")
    assert not native.available()
    assert native.status() == "off: GRADCODEC_NATIVE=0"
    with pytest.raises(ConfigError, match=r"gradcodec\.native is off"):
        native.random_bytes(0, 16, 0)


def test_the_switch_sets_a_level(built_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, built_library, "portable")
    assert native.status() == "built, portable"
    with pytest.raises(ConfigError, match="got 'fast'"):
        started(monkeypatch, built_library, "fast")


def test_without_a_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, None, None)
    assert not native.available()
    assert native.status().startswith("not built: ")


def test_a_refused_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "_library.so"
    path.write_text("no library")
    started(monkeypatch, path, None)
    assert not native.available()
    assert native.status().startswith("not usable: _library.so is not a gradcodec library")


def test_the_flags_forbid_fused_and_reordered_arithmetic() -> None:
    assert "-ffp-contract=off" in sources.FLAGS
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & set(sources.FLAGS)
