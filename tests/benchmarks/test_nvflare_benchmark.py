"""The NVFLARE benchmark: what it reads, what its page says. Jobs are in tests/integrations."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.nvflare import case
from benchmarks.nvflare.page import page
from benchmarks.nvflare.work import Adapters, loss, train


def row(scheme: str, up: int, down: int, end: float) -> dict[str, Any]:
    config = {"rounds": 10, "layers": 24, "sites": 2}
    found = {"uplink_bytes": up, "downlink_bytes": down, "losses": [1.0, end]}
    return {**rows.stamp(case.CASE, scheme, 0, config), **found}


def test_the_page_compares_each_way_with_fp32(tmp_path: Path) -> None:
    path = tmp_path / "nvflare.jsonl"
    for one in (row("fp32", 8_000_000, 8_000_000, 0.2), row("int4", 1_000_000, 3_000_000, 0.25)):
        rows.append(path, one)
    page(path).write(path)
    line = "| **int4 up, int4 down** | 1.00 MB | 8.0x | 3.00 MB | 2.7x | 4.0x | 0.2500 |"
    assert line in path.with_suffix(".md").read_text()


def test_bytes_are_the_sums_of_what_the_servers_cell_counted() -> None:
    pytest.importorskip("nvflare", reason="pip install 'gradcodec[nvflare]'")
    from benchmarks.nvflare.job import traffic

    def pool(*sizes: float) -> dict[str, Any]:
        bins = [*({"total": size, "count": 1} for size in sizes), ""]
        return {"pool": {"cat_data": {"req:a": bins, "req:b": [{"total": 1.0, "count": 2}]}}}

    statistics = {
        "received_msg_sizes@server.simulate_job": pool(2.0, 0.5),
        "sent_msg_sizes@server.simulate_job": pool(),
        "received_msg_sizes@site-1": pool(9.0),
    }
    assert traffic(statistics) == {"uplink_bytes": int(3.5 * 2**20), "downlink_bytes": 2**20}


def test_the_sites_learn_the_mean_of_their_teachers() -> None:
    model = Adapters(layers=1)
    before = loss(model)
    assert 0.9 < before < 1.1
    for number in range(4):
        train(model, number % 2, number)
    assert loss(model) < 0.7 * before
