"""The codecs benchmark measures what it says: bytes, errors, turns, goals, the last rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.codecs import case as codecs
from benchmarks.codecs import errors as codecs_errors
from benchmarks.codecs import page as codecs_page
from benchmarks.codecs import speed as codecs_speed
from benchmarks.codecs.coders import BY_TORCH, OURS, PEERS, SCHEMES, computed_by
from benchmarks.codecs.data import SETS, flat, load
from benchmarks.run import Options
from gradcodec import ops
from gradcodec.errors import ConfigError

SNAPSHOT = {
    "a": torch.randn(64, 100, generator=torch.Generator().manual_seed(1)),
    "b": torch.ones(7),
}


def nmse(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).double().square().sum() / x.double().square().sum())


# -- coders --------------------------------------------------------------------------------------


def test_names_are_unique_and_those_by_torch_are_ours() -> None:
    assert len(SCHEMES) == len(OURS) + len(PEERS)
    assert {SCHEMES[name].kind for name in BY_TORCH} == {"ours"}
    timed = {*codecs_page.PLAIN, *codecs_page.TURNED, *sum(codecs_page.DITHERED, ())}
    assert timed <= {s.name for s in OURS}


@pytest.mark.parametrize("name", [s.name for s in OURS])
def test_ours_code_a_snapshot_in_the_bytes_that_they_say(name: str) -> None:
    coder = SCHEMES[name].make(SNAPSHOT)
    body = coder.encode(SNAPSHOT)
    x, y = flat(SNAPSHOT), coder.decode(body)
    assert y.shape == x.shape
    assert coder.nbytes(body) == body.numel() * body.element_size()
    # Unbiased codes of few bits lose more than there is, of these the most.
    assert 0 < nmse(x, y) < {"rotsign-quarter": 4.5, "rotsign-eighth": 9}.get(name, 2)


@pytest.mark.slow  # bitsandbytes compiles its CPU code when it is first called
@pytest.mark.parametrize("name", [s.name for s in PEERS])
def test_peers_code_a_snapshot_or_say_what_to_install(name: str) -> None:
    try:
        coder = SCHEMES[name].make(SNAPSHOT)
    except ImportError as reason:
        told = str(reason)
        if "pip install" not in told and "git clone" not in told:
            raise
        pytest.skip(f"a machine with the peer's package runs it: {told}")
    coded = coder.encode(SNAPSHOT)
    y = coder.decode(coded)
    # Two bits at random between the extremes of the whole vector lose three times what there is.
    assert 0 < nmse(flat(SNAPSHOT), y) < 5
    assert 0 < coder.nbytes(coded) < 4 * len(y)


def test_who_computes_is_asked_for_by_name_and_given_back() -> None:
    before = ops.encode
    with pytest.raises(ConfigError, match="expected impl"), computed_by("abacus"):
        SCHEMES["int4"].make(SNAPSHOT).encode(SNAPSHOT)
    assert ops.encode is before
    with computed_by("reference"):
        one = SCHEMES["int4"].make(SNAPSHOT).encode(SNAPSHOT)
    assert torch.equal(one, SCHEMES["int4"].make(SNAPSHOT).encode(SNAPSHOT))


# -- measurements --------------------------------------------------------------------------------


def test_errors_are_those_of_the_coder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs_errors, "load", lambda name, count: [SNAPSHOT] * count)
    found, missing = codecs_errors.measure(["int4", "sign"], 2)
    assert missing == []
    for row in found:
        coder = SCHEMES[row["scheme"]].make(SNAPSHOT)
        body = coder.encode(SNAPSHOT)
        for s in SETS:
            assert row[s]["nmse"] == pytest.approx(
                nmse(flat(SNAPSHOT), coder.decode(body)), rel=1e-4
            )
            assert row[s]["bits"] == pytest.approx(8 * len(body) / 6407, abs=1e-4)
            assert 0.5 < row[s]["cosine"] < 1


def test_a_missing_peer_is_a_line_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs_errors, "load", lambda name, count: [SNAPSHOT])
    monkeypatch.delenv("GRADCODEC_PEERS", raising=False)
    for measure, more in ((codecs_errors.measure, (1,)), (codecs_speed.measure, (4096, 1))):
        found, missing = measure(["PowerSGD rank 1", "int8"], *more)
        assert {row["scheme"] for row in found} - {"copy"} == {"int8"}
        assert len(missing) == 1
        assert "git clone" in missing[0]


def test_positions_come_back_and_are_above_the_bound() -> None:
    found, _ = codecs_errors.positions(1 << 16)
    bits = {row["scheme"]: row["bits"] for row in found}
    assert bits["packed"] == 12
    assert bits["bound"] == pytest.approx(7.364, abs=1e-3)
    assert all(b > bits["bound"] for name, b in bits.items() if name != "bound")
    assert bits["elias-fano"] < 8.1


def test_speeds_are_timed_for_both_implementations() -> None:
    found, missing = codecs_speed.measure(["int4", "rotsign"], 1 << 14, 2)
    assert missing == []
    impls = {ops.implementation("cpu"), "reference"}
    assert {(r["scheme"], r["impl"]) for r in found if r["scheme"] == "int4"} == {
        ("int4", impl) for impl in impls
    }
    for row in found:
        for what in ("encode", "decode"):
            low, middle, high = row[what]["ms"]
            assert 0 < low <= middle <= high
            assert row[what]["gb_s"] > 0
            assert row[what]["of_copy"] > 0
    assert found[0]["scheme"] == "copy"
    assert found[0]["encode"]["of_copy"] == 1


@pytest.mark.slow
def test_sets_are_gradients_and_updates_of_the_embedded_model() -> None:
    gradients, updates = load("gradient", 1)[0], load("update", 1)[0]
    assert sum(t.numel() for t in gradients.values()) > 1e6
    assert all("lora" in name for name in updates)
    for snapshot in (gradients, updates):
        assert bool(torch.isfinite(flat(snapshot)).all())
        assert float(flat(snapshot).norm()) > 0
    again = load("update", 1)[0]
    assert all(torch.equal(updates[n], again[n]) for n in updates)


# -- the page ------------------------------------------------------------------------------------


def figures(ms: float) -> dict[str, Any]:
    return {
        "gb_s": 4 / ms,
        "cpu_gb_s": 4 / ms,
        "of_copy": 1 / ms,
        "ms": [ms, ms, ms],
        "cpu_ms": ms,
        "peak_of_input": None,
    }


def results(errors: dict[str, tuple[float, float]], times: dict[str, float]) -> codecs_page.Results:
    """From bits and NMSE by scheme, and from milliseconds both ways."""
    return codecs_page.Results(
        {
            name: {"scheme": name, **{s: {"bits": b, "nmse": e, "cosine": 0.9} for s in SETS}}
            for name, (b, e) in errors.items()
        },
        {"bound": {"bits": 7.4}, "packed": {"bits": 12.0, "encode_ns": 1.0, "decode_ns": 2.0}},
        {
            (name, "native" if SCHEMES[name].kind == "ours" else ""): {
                "encode": figures(ms),
                "decode": figures(ms),
            }
            for name, ms in times.items()
        },
    )


@pytest.mark.parametrize(
    ("mine", "time", "words"),
    [
        ((4.06, 0.01), 1.0, "met: ahead of piquant 4 bit"),
        ((4.06, 0.03), 1.0, "missed: ahead of piquant 4 bit"),  # errs more
        ((4.06, 0.01), 3.0, "missed: ahead of piquant 4 bit"),  # slower
        ((4.50, 0.01), 1.0, "missed: nothing of ours has 4.000 bits"),
    ],
)
def test_ahead_means_faster_and_closer_with_no_more_bits(
    mine: tuple[float, float], time: float, words: str
) -> None:
    found = results(
        {"int4": mine, "piquant 4 bit": (4.0, 0.02)}, {"int4": time, "piquant 4 bit": 2}
    )
    lines = [line for line in codecs_page.goals(found) if "piquant" in line]
    assert len(lines) == len(SETS)
    assert all(line.startswith(words) for line in lines)


@pytest.mark.parametrize(("ms", "word"), [(1.0, "met"), (100.0, "missed")])
def test_speeds_are_held_against_their_goals(ms: float, word: str) -> None:
    lines = codecs_page.goals(results({}, {"int8": ms, "int4-rotated": ms}))
    assert len(lines) == 4
    assert all(line.startswith(f"{word}: ") for line in lines)


def test_dither_may_cost_half_as_much_again() -> None:
    for ms, word in ((1.5, "met"), (1.6, "missed")):
        lines = codecs_page.goals(results({}, {"int4": 1.0, "int4 dithered": ms}))
        assert next(line for line in lines if "dithered" in line).startswith(word)


def test_a_run_writes_rows_a_page_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The measurements of the other tests, here, of one small snapshot.
    monkeypatch.setattr(codecs_errors, "load", lambda name, count: [SNAPSHOT])
    small = {
        codecs_errors.measure: lambda names, count: codecs_errors.measure(names, 1),
        codecs_errors.positions: lambda numel: codecs_errors.positions(1 << 14),
        codecs_speed.measure: lambda names, n, rounds: codecs_speed.measure(names, 1 << 14, 1),
    }
    monkeypatch.setattr(codecs, "apart", lambda function, *args: small[function](*args))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = Options(tmp_path, quick=True, schemes=("int4", "int8", "int4-rotated, EF"))
    assert codecs.main(options) == []
    written = rows.read(tmp_path / "codecs.jsonl")
    assert {row["config"]["part"] for row in written} == {"error", "positions", "speed"}
    # What remembers is timed, and its error is that of what it does not remember.
    assert "int4-rotated, EF" not in {
        r["scheme"] for r in written if r["config"]["part"] == "error"
    }
    assert all({"versions", "commit", "machine", "seed", "load"} <= set(row) for row in written)
    assert "| int4 |" in (tmp_path / "codecs.md").read_text()
    assert (tmp_path / "codecs.png").stat().st_size > 10_000
    assert "Speed on one core" in capsys.readouterr().out


def test_the_page_is_of_the_last_measurement(tmp_path: Path) -> None:
    path = tmp_path / "codecs.jsonl"
    sets = {s: {"bits": 4.0, "nmse": 0.01, "cosine": 0.9} for s in SETS}
    for snapshots, names in ((1, ("int4", "int8")), (4, ("int4",))):
        for name in names:
            asked = {"part": "error", "snapshots": snapshots, "impl": ""}
            rows.append(path, {**rows.stamp("codecs", name, 0, asked), **sets})
    assert set(codecs_page.load(path).error) == {"int4"}


def test_unknown_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zip"):
        codecs.main(Options(tmp_path, schemes=("zip",)))
