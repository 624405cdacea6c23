"""The fuzzer of ``benchmarks/fuzz_wire.py``, in small."""

import json
from pathlib import Path

import pytest

from benchmarks import fuzz_wire
from gradcodec.wire import CODEC_IDS


@pytest.fixture(scope="module")
def tally() -> fuzz_wire.Tally:
    return fuzz_wire.fuzz(count=2_000, seed=1)


def test_damaged_payloads_decode_or_raise_a_wire_error(tally: fuzz_wire.Tally) -> None:
    assert tally.surprises == []


def test_nothing_is_uncounted(tally: fuzz_wire.Tally) -> None:
    assert tally.outcomes.total() == 2_000


def test_the_damage_reaches_the_bodies(tally: fuzz_wire.Tally) -> None:
    reached = tally.repaired["MalformedBodyError"] + tally.repaired[fuzz_wire.DECODED]
    assert reached > 300  # measured 530


def test_memory_stays_like_the_payloads_size(tally: fuzz_wire.Tally) -> None:
    # Measured 8.5 kB, for payloads of up to 2.1 kB; values themselves are torch's memory.
    assert tally.peak_bytes < 50_000


def test_every_codec_is_a_source() -> None:
    assert {s.codec.config.kind for s in fuzz_wire.sources()} == set(CODEC_IDS)


def test_equal_seeds_damage_equally() -> None:
    assert fuzz_wire.fuzz(60, seed=5).outcomes == fuzz_wire.fuzz(60, seed=5).outcomes


def test_a_surprise_is_found_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fuzz_wire.outcome

    def careless(blob: bytes, codec, by_digest) -> str:  # type: ignore[no-untyped-def]
        name = real(blob, codec, by_digest)
        if name == "TruncatedError":
            raise IndexError("out of range")
        return name

    monkeypatch.setattr(fuzz_wire, "outcome", careless)
    out = tmp_path / "rows.jsonl"
    assert fuzz_wire.main(["--count", "50", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["anything_else"] > 0
    assert "IndexError: out of range" in capsys.readouterr().out
