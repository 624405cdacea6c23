"""The page of ``kernels.jsonl``: what a GPU measured, and how far that is from its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report, rows
from benchmarks.report import Page, Table

#: Instructions of a lane per second, in 1e9: multiprocessors, lanes that issue in a clock, GHz.
ISSUE = {"NVIDIA H100 80GB HBM3": 132 * 128 * 1.755, "NVIDIA H200": 132 * 128 * 1.755}

Rows = Mapping[str, rows.Row]


def load(path: Path) -> tuple[Rows, Rows]:
    """The last measured row of every kernel on the last device, and the last computed one."""
    found = rows.read(path)
    measured = [row for row in found if row["measured"]]
    device = measured[-1]["config"]["device"] if measured else None
    return (
        {row["scheme"]: row for row in measured if row["config"]["device"] == device},
        {row["scheme"]: row for row in found if not row["measured"]},
    )


def speeds(measured: Sequence[rows.Row]) -> Table:
    """Heading, then a row per kernel or peer."""
    out: Table = [("kernel", "ms", "bytes per value", "1e9 values/s", "GB/s", "of copy")]
    out += [
        (
            row["scheme"],
            f"{row['ms']:.3f}",
            f"{row['moved_bytes']:.2f}",
            f"{row['gel_s']:.0f}",
            f"{row['gb_s']:.0f}",
            f"{row['of_copy']:.1%}",
        )
        for row in measured
    ]
    return out


def page(path: Path) -> Page | None:
    """The page of these rows; ``None`` while no GPU has measured any."""
    measured, computed = load(path)
    if not measured:
        return None
    last = next(reversed(measured.values()))
    config, versions = last["config"], last["versions"]
    made = Page("Kernels on a GPU", "python -m benchmarks.run kernels")
    made.lines(
        [
            f"{config['device']}, torch {versions['torch']}, Triton {config['triton']}, commit "
            f"{last['commit'][:7]}; {config['numel']:,} random values, median of a cold cache",
            f"a copy on the device moves {config['copy_gb_s']:,.0f} GB/s, read and written",
            "of copy: bytes that must move, over the time, over the bandwidth of the copy",
        ]
    )
    made.table("Speed", speeds(list(measured.values())))
    points = {
        name: (computed[name]["instructions"] / row["moved_bytes"], row["gb_s"])
        for name, row in measured.items()
        if name in computed
    }
    if points and config["device"] in ISSUE:
        title = f"{config['device']}: measured, under the roofs of copy and of issue"
        roofs = config["copy_gb_s"], ISSUE[config["device"]]
        made.plots({"": lambda to: roofline(points, *roofs, title, to)})
        made.lines(
            [
                "instructions: counted in binaries for the architecture "
                "(`python -m benchmarks.kernels.aot_gate`); of kernels with a loop, one turn of it"
            ]
        )
    return made


def roofline(
    points: Mapping[str, tuple[float, float]], bandwidth: float, issue: float, title: str, to: Path
) -> None:
    """GB/s against instructions per byte, under the two roofs."""
    figure, axes = report.figure(figsize=(9, 5.5))
    xs = [1, issue / bandwidth, 128]
    axes.plot(xs, [min(bandwidth, issue / x) for x in xs], color="black", linewidth=1)
    groups = sorted({name.partition(" ")[0].rstrip(",") for name in points})
    for i, group in enumerate(groups):
        mine = [p for name, p in points.items() if name.partition(" ")[0].rstrip(",") == group]
        axes.scatter([x for x, _ in mine], [y for _, y in mine], label=group, color=f"C{i}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("instructions per byte that must move")
    axes.set_ylabel("GB/s")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    report.save(figure, to)
