"""Jobs in NVFLARE's simulator: a server and two sites, each its own process, real messages."""

from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="pip install 'gradcodec[nvflare]'")

from benchmarks.nvflare.case import measure, run_module
from benchmarks.nvflare.schemes import SCHEMES
from benchmarks.nvflare.work import Adapters
from gradcodec.integrations.messages.coding import Coding
from gradcodec.registry import make_codec

ROUNDS, LAYERS, SITES = 3, 2, 2

#: Requests, headers and heartbeats of NVFLARE, a reply or task; measured: 4 kB.
AROUND = 8_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def message_nbytes() -> int:
    """Bytes of one encoded update of all adapters."""
    state = {n: p.detach() for n, p in Adapters(LAYERS).named_parameters()}
    return sum(map(len, Coding(make_codec("int4")).encode(state).values()))


def test_nvflares_statistics_count_our_bytes_and_the_loss_stays() -> None:
    dense, ours = (measure(SCHEMES[name], 0, ROUNDS, LAYERS) for name in ("fp32", "int4"))
    replies, model = ROUNDS * SITES, sum(p.numel() for p in Adapters(LAYERS).parameters()) * 4
    for way in ("uplink_bytes", "downlink_bytes"):
        assert replies * model < dense[way] < replies * (model + AROUND)
    up = replies * message_nbytes()
    down = SITES * model + (ROUNDS - 1) * SITES * message_nbytes()
    assert up < ours["uplink_bytes"] < up + replies * AROUND
    assert down < ours["downlink_bytes"] < down + replies * AROUND
    assert len(ours["losses"]) == len(dense["losses"]) == ROUNDS
    assert ours["losses"][0] == dense["losses"][0]
    gains = [run["losses"][0] - run["losses"][-1] for run in (ours, dense)]
    assert gains[0] > 0.95 * gains[1] > 0


def test_a_damaged_reply_costs_that_reply_and_the_job_goes_on(tmp_path: Path) -> None:
    line, printed = run_module(["integrations.nvflare_damaged", str(tmp_path / "run")])
    assert "dropped the reply of site-1: ChecksumError" in printed
    log = (tmp_path / "run" / "job" / "server" / "log.txt").read_text()
    assert log.count("dropped the reply of") == 1
    assert "Empty result from client site-1" in log
    losses = line["losses"]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
