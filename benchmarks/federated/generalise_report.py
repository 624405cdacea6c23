"""Table and plot of ``generalise``: the retained gain by source and by rank."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.federated.figures import BySeed, Runs, gain, load
from gradcodec.errors import ConfigError


def write(path: Path, titles: Mapping[str, str]) -> str:
    """Write ``<path>.md`` and ``.png`` beside the rows; returns the table.

    Args:
        path: the rows.
        titles: of the sources, by scheme.
    """
    runs = load(path)
    table = _table(runs, titles)
    path.with_suffix(".md").write_text(table + "\n")
    _draw(runs, titles, path.with_suffix(".png"))
    return table


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


def _table(runs: Runs, titles: Mapping[str, str]) -> str:
    reference = runs.get("fp32", {})
    lines = ["| the codec was fitted on | gain kept |", "|---|--:|"]
    lines += [
        f"| {title} | {_cell(kept(runs[name], reference))} |"
        for name, title in titles.items()
        if name in runs and kept(runs[name], reference)
    ]
    lines += ["", "| LoRA rank | gain kept, of fp32 at that rank |", "|--:|--:|"]
    lines += [f"| {r} | {_cell(values)} |" for r, values in _by_rank(runs).items() if values]
    return "\n".join(lines)


def _draw(runs: Runs, titles: Mapping[str, str], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError as err:
        raise ConfigError("plots need matplotlib: pip install 'gradcodec[examples]'") from err
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    reference = runs.get("fp32", {})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bars = {t: kept(runs[n], reference) for n, t in titles.items() if n in runs}
    bars = {t: v for t, v in bars.items() if v}
    left.barh(
        list(bars), [100 * statistics.mean(v) for v in bars.values()], color="#d7191c", alpha=0.8
    )
    for at, values in enumerate(bars.values()):
        left.plot([100 * v for v in values], [at] * len(values), "k|", markersize=12)
    left.invert_yaxis()
    left.set(title="fitted on ...", xlabel="gain kept, % of fp32 (bars from 50)", xlim=(50, 101))
    ranks = {r: v for r, v in _by_rank(runs).items() if v}
    right.plot(
        list(ranks), [100 * statistics.mean(v) for v in ranks.values()], "o-", color="#d7191c"
    )
    for r, values in ranks.items():
        right.plot([r] * len(values), [100 * v for v in values], "k_", markersize=10)
    right.set(title="fitted on the clients' D1", xlabel="LoRA rank", ylabel="gain kept, %")
    right.set(ylim=(50, 101))
    right.set_xscale("log", base=2)
    right.set_xticks(list(ranks), [str(r) for r in ranks])
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
