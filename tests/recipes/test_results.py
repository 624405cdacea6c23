"""Laws of the summary: its keys are a promise, its figures can be worked out by hand."""

import json
import math
from typing import Any

import pytest

from gradcodec.federated.loop import RoundReport
from gradcodec.recipes.results import Result, summarise
from gradcodec.recipes.schemes import SCHEMES
from gradcodec.recipes.settings import Settings

#: What the issue asks for; tools read these.
PROMISED = {
    "name",
    "start_loss",
    "final_loss",
    "losses",
    "accuracy",
    "uplink_bytes",
    "downlink_bytes",
    "codec_bytes",
    "uplink_ratio",
    "total_ratio",
    "encode_s",
    "decode_s",
    "seed",
}
OURS = {
    "title",
    "gain_kept",
    "uplink_payload_bytes",
    "downlink_payload_bytes",
    "participants",
    "total_ratio_with_codec",
    "snr_db",
    "mean_snr_db",
    "cumulative_bytes",
    "rejected",
    "rounds",
    "seconds",
}


def report(number: int, loss: float, up: int, down: int, **others: Any) -> RoundReport:
    options = {"snr_db": 10.0, "mean_snr_db": 11.0, "encode_s": 0.5, "decode_s": 0.25, **others}
    return RoundReport(
        number,
        loss,
        loss + 0.1,
        [0, 1],
        options.pop("rejected", {}),
        uplink_payload_bytes=up - 40,
        uplink_bytes=up,
        downlink_payload_bytes=max(down - 40, 0),
        downlink_bytes=down,
        seconds=2.0,
        **options,
    )


def result(name: str, losses: list[float], up: int, down: int, codec: int = 0) -> Result:
    reports = [report(i, loss, up, down) for i, loss in enumerate(losses)]
    return Result(SCHEMES[name], 4.0, reports, 0.5, codec, 7)


def summary(*results: Result) -> dict[str, Any]:
    return summarise(Settings(rounds=3, seed=5), results, {"uplink_bytes": 1, "downlink_bytes": 2})


FP32 = result("fp32", [3.5, 3.2, 3.0], 8000, 6000)
CODED = result("subspace-32", [3.7, 3.4, 3.1], 100, 200, codec=5000)


def test_the_schema_is_the_promised_one() -> None:
    found = summary(FP32, CODED)
    assert set(found) == {"schema", "config", "versions", "tgap", "schemes"}
    assert found["schema"] == 1
    assert all(set(row) == PROMISED | OURS for row in found["schemes"])
    assert found["config"] == Settings(rounds=3, seed=5).to_dict()
    assert {"gradcodec", "torch", "python", "commit"} <= set(found["versions"])


def test_totals_and_ratios_by_hand() -> None:
    reference, coded = summary(FP32, CODED)["schemes"]
    assert (coded["uplink_bytes"], coded["downlink_bytes"]) == (300, 600)
    assert (coded["uplink_payload_bytes"], coded["downlink_payload_bytes"]) == (180, 480)
    assert coded["uplink_ratio"] == 24000 / 300
    assert coded["total_ratio"] == 42000 / 900
    assert coded["total_ratio_with_codec"] == 42000 / (900 + 7 * 5000)
    assert coded["cumulative_bytes"] == [300, 600, 900]
    assert coded["gain_kept"] == pytest.approx(0.9)
    assert coded["losses"] == [3.7, 3.4, 3.1]
    assert (coded["start_loss"], coded["final_loss"]) == (4.0, 3.1)
    assert (coded["encode_s"], coded["decode_s"], coded["seconds"]) == (1.5, 0.75, 6.0)
    assert (coded["seed"], coded["rounds"], coded["rejected"]) == (5, 3, 0)
    assert reference["uplink_ratio"] == reference["total_ratio"] == 1
    assert reference["total_ratio_with_codec"] == reference["gain_kept"] == 1


def test_a_scheme_that_stopped_early_is_compared_over_its_own_rounds() -> None:
    stopped = result("paper-literal", [5.0], 100, 200)
    row = summary(FP32, stopped)["schemes"][1]
    assert (row["rounds"], row["uplink_bytes"]) == (1, 100)
    assert row["uplink_ratio"] == 80
    assert row["total_ratio"] == 14000 / 300


def test_a_scheme_without_a_round_has_no_ratio_and_its_starting_loss() -> None:
    for name in ("base", "paper-literal"):
        row = summary(FP32, result(name, [], 0, 0))["schemes"][1]
        ratios = (row["uplink_ratio"], row["total_ratio"], row["total_ratio_with_codec"])
        assert ratios == (None, None, None)
        assert (row["final_loss"], row["gain_kept"], row["losses"]) == (4.0, 0.0, [])


def test_a_reference_that_gained_nothing_leaves_the_share_open() -> None:
    flat = result("fp32", [4.0], 10, 10)
    assert summary(flat)["schemes"][0]["gain_kept"] is None


def test_rejected_replies_are_counted() -> None:
    reports = [report(0, 3.0, 10, 10, rejected={3: "a", 4: "b"}), report(1, 3.0, 10, 10)]
    row = summary(Result(SCHEMES["fp32"], 4.0, reports, 0.5, 0, 2))["schemes"][0]
    assert row["rejected"] == 2


def test_the_summary_is_strict_json_whatever_happened() -> None:
    wild = [
        report(0, math.nan, 10, 10, snr_db=math.inf, mean_snr_db=-math.inf),
        report(1, math.inf, 10, 10, snr_db=math.nan, mean_snr_db=math.nan),
    ]
    bad = Result(SCHEMES["topk"], 4.0, wild, 0.25, 0, 2)
    found = summary(FP32, bad)
    text = json.dumps(found, allow_nan=False)
    row = json.loads(text)["schemes"][1]
    assert row["losses"] == row["snr_db"] == row["mean_snr_db"] == [None, None]
    assert row["final_loss"] is row["gain_kept"] is None


def test_a_result_survives_its_file() -> None:
    reports = [report(0, 3.0, 10, 10, rejected={3: "a"}, snr_db=math.inf)]
    before = Result(SCHEMES["topk"], 4.0, reports, 0.5, 9, 2)
    row = json.loads(json.dumps(before.to_dict()))
    assert Result.from_dict(SCHEMES["topk"], row) == before
