"""The page of ``nvflare.jsonl``: bytes in both directions, and the loss they buy."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks import report, rows
from benchmarks.nvflare.schemes import SCHEMES


def page(path: Path) -> report.Page:
    """The page of these rows: the last row of each scheme, seeds in turn."""
    last = {(row["seed"], row["scheme"]): row for row in rows.read(path)}
    out = report.Page("NVFLARE", "python -m benchmarks.run nvflare")
    seeds = sorted({seed for seed, _ in last})
    for seed in seeds:
        runs = {name: last[seed, name] for name in SCHEMES if (seed, name) in last}
        config = next(iter(runs.values()))["config"]
        title = f"{config['rounds']} rounds, {config['sites']} sites, seed {seed}"
        out.table(title, _table(runs))
    out.lines(
        [
            "Bytes: all that the server's job received (up) and sent (down), by NVFLARE's "
            "statistics. Ours are in bold; each site gets the whole model in fp32 in the first "
            "round, and coded differences from then on.",
            "Loss: of the model that the sites got in the last round; about 1 in the first.",
            "1/4-bit signs are right on average, with an error of twice the update: too much for "
            "two sites, and left out of the plot. They are for rounds of many clients.",
            "NVFLARE's 8- and 4-bit filters call `.cuda()`; without a GPU, bitsandbytes' CPU code "
            "ran instead (`quantizers.py`), which makes the same bytes.",
        ],
        "How to read it",
    )
    first = {name: row for (seed, name), row in last.items() if seed == seeds[0]}
    out.plots({"": functools.partial(_draw, first)})
    return out


def _table(runs: dict[str, rows.Row]) -> report.Table:
    table = [("way of sending", "up", "ratio", "down", "ratio", "both", "loss")]
    base = runs.get("fp32")
    for name, row in runs.items():
        up, down = row["uplink_bytes"], row["downlink_bytes"]
        ratios = ["", "", ""]
        if base is not None:
            dense = base["uplink_bytes"], base["downlink_bytes"]
            pairs = ((dense[0], up), (dense[1], down), (sum(dense), up + down))
            ratios = [report.times(most / size) for most, size in pairs]
        sizes = f"{up / 1e6:.2f} MB", ratios[0], f"{down / 1e6:.2f} MB", ratios[1], ratios[2]
        table.append((SCHEMES[name].title, *sizes, f"{row['losses'][-1]:.4f}"))
    return table


def _draw(runs: dict[str, rows.Row], path: Path) -> None:
    """Loss against the bytes of both directions; what ends above where it began is left out."""
    figure, axes = report.figure(figsize=(7, 4.5))
    styles = report.Styles()
    for name, row in runs.items():
        both = (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6
        if row["losses"][-1] > row["losses"][0]:
            continue
        theirs = name == "fp32" or name.startswith("nvflare-")
        style = styles.next("peer" if theirs else "ours") | {"markersize": 9.0, "linestyle": ""}
        axes.plot([both], [row["losses"][-1]], label=SCHEMES[name].title.strip("*"), **style)
    axes.set(xlabel="MB in both directions, by NVFLARE's statistics", ylabel="loss")
    axes.legend(fontsize=7)
    report.save(figure, path)
