"""The benchmark of growth: its model of ranks, its sizes, and what its page makes of rows."""

import json
from pathlib import Path

import pytest

from benchmarks.growth import case, page, ranks
from benchmarks.growth.ranks import Work
from benchmarks.run import RESULTS, Options


@pytest.mark.parametrize("numel", case.NUMELS)
def test_an_adapter_has_about_the_values_that_were_asked_for(numel: int) -> None:
    assert case.spec_of(numel).numel == pytest.approx(numel, rel=1e-3)


def test_a_dense_step_is_a_ring() -> None:
    work = Work(numel=1000, compute=1.0)
    # 6 messages of 1,000 bytes at 500 bytes/s, each 3 s late
    assert work.step(4, beta=500, alpha=3) == pytest.approx(1 + 6 * (3 + 2))


def test_a_coded_step_counts_the_code_on_the_wire_and_the_coding() -> None:
    work = Work(numel=1000, compute=1.0, encode=0.01, decode=0.001, code_bytes=100)
    coding = 1000 * (0.01 * 1.25 + 0.001 * 2)
    assert work.step(4, beta=500, alpha=3) == pytest.approx(1 + coding + 6 * (3 + 0.05))


def test_latency_alone_leaves_nothing_to_gain() -> None:
    dense, coded = Work(1000, 0.0), Work(1000, 0.0, code_bytes=100)
    assert dense.step(1024, 1e9, 1.0) / coded.step(1024, 1e9, 1.0) == pytest.approx(1, rel=1e-6)


def test_works_are_what_ddp_measured_with_two_ranks(tmp_path: Path) -> None:
    config = {"work": "llama", "world": 2}
    common = {"config": config, "link": "unshaped", "p50_s": 9.0, "compute_s": 2.0}
    rows = [
        {**common, "scheme": "ddp", "sent": 4000},
        {**common, "scheme": "int4", "sent": 500, "encode_s": 1.5, "decode_s": 2.0},
    ]
    path = tmp_path / "ddp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    works = ranks.works(path)
    assert works["int4"] == Work(1000, 2.0, encode=1e-3, decode=1e-3, code_bytes=500)
    # With two ranks, a step without a link to wait for takes what was measured.
    assert works["int4"].step(2, 1e18, 0.0) == pytest.approx(2.0 + 1.5 + 2.0)


def test_time_is_told_in_copies_at_two_sizes_and_memory_at_the_larger() -> None:
    def row(numel: int, copies: float) -> dict[str, float]:
        peaks = {"encode_peak_bytes": 2 * numel, "decode_peak_bytes": 6 * numel}
        times = {"encode_s": 2.0 * copies, "decode_s": 4.0 * copies, "copy_s": 2.0}
        return {"numel": numel, "update_bytes": 4 * numel, **times, **peaks}

    coded = {"int4": {100: row(100, 9.0), 1_000: row(1_000, 1.0), 100_000: row(100_000, 3.0)}}
    head, cells = page.growth_rows(coded)
    assert head[1:4] == ("values", "encode / copy, 1/100", "encode / copy, all")
    assert cells == ("int4", "1e5", "1.0", "3.0", "2.0", "6.0", "0.50x", "1.50x")


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    rows = (RESULTS / "growth.jsonl").read_text()
    (tmp_path / "growth.jsonl").write_text(rows)
    case.main(Options(tmp_path, quick=True))
    assert (tmp_path / "growth.jsonl").read_text() == rows


@pytest.mark.slow
def test_a_codec_is_measured() -> None:
    row = case.code("int4", 100_000)
    assert row["numel"] == 99_968
    assert row["message_bytes"] < row["update_bytes"] / 7
    assert min(row["copy_s"], row["encode_s"], row["decode_s"]) > 0
