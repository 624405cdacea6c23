"""The page of ``generalise.jsonl``: the gain kept by source and by rank."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks import report
from benchmarks.federated.figures import BySeed, Runs, gain, load


def page(path: Path, titles: Mapping[str, str]) -> report.Page:
    """The page of these rows.

    Args:
        path: the rows.
        titles: of the sources, by scheme.
    """
    runs = load(path)
    reference = runs.get("fp32", {})
    sources = {t: kept(runs[n], reference) for n, t in titles.items() if n in runs}
    sources = {title: values for title, values in sources.items() if values}
    ranks = {rank: values for rank, values in _by_rank(runs).items() if values}
    out = report.Page("Where a fitted codec carries over", "python -m benchmarks.run generalise")
    rows = [(title, _cell(values)) for title, values in sources.items()]
    out.table("By what it was fitted on", [("the codec was fitted on", "gain kept"), *rows])
    rows = [(f"{rank}", _cell(values)) for rank, values in ranks.items()]
    head = ("LoRA rank", "gain kept, of fp32 at that rank")
    out.table("By LoRA rank", [head, *rows])
    out.plots({"": functools.partial(_draw, sources, ranks)})
    return out


def kept(run: BySeed, reference: BySeed) -> list[float]:
    """Share of the reference's gain, for each seed that both have."""
    return [gain(run[s]) / gain(reference[s]) for s in sorted(run) if s in reference]


def _ranks(runs: Runs) -> list[int]:
    """LoRA ranks with both a reference and a codec, the benchmark's own included."""
    found = {int(n.rpartition("-r")[2]) for n in runs if n.startswith("own-r")}
    return sorted(r for r in found if f"fp32-r{r}" in runs)


def _by_rank(runs: Runs) -> dict[int, list[float]]:
    out = {r: kept(runs[f"own-r{r}"], runs[f"fp32-r{r}"]) for r in _ranks(runs)}
    if "own" in runs and "fp32" in runs:
        out[int(next(iter(runs["own"].values()))[0]["config"].get("lora_r", 8))] = kept(
            runs["own"], runs["fp32"]
        )
    return dict(sorted(out.items()))


def _cell(values: list[float]) -> str:
    spread = f" [{min(values):.1%} .. {max(values):.1%}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


def _draw(sources: Mapping[str, list[float]], ranks: Mapping[int, list[float]], path: Path) -> None:
    figure, (left, right) = report.figure(1, 2, figsize=(10, 4))
    left.barh(
        list(sources),
        [100 * statistics.mean(v) for v in sources.values()],
        color=report.OURS,
        alpha=0.8,
    )
    for at, values in enumerate(sources.values()):
        left.plot([100 * v for v in values], [at] * len(values), "k|", markersize=12)
    left.invert_yaxis()
    left.set(title="fitted on ...", xlabel="gain kept, % of fp32 (bars from 50)", xlim=(50, 101))
    right.plot(
        list(ranks), [100 * statistics.mean(v) for v in ranks.values()], "o-", color=report.OURS
    )
    for r, values in ranks.items():
        right.plot([r] * len(values), [100 * v for v in values], "k_", markersize=10)
    right.set(title="fitted on the clients' D1", xlabel="LoRA rank", ylabel="gain kept, %")
    right.set(ylim=(50, 101))
    right.set_xscale("log", base=2)
    right.set_xticks(list(ranks), [str(r) for r in ranks])
    right.grid(alpha=0.3)
    report.save(figure, path)
