"""The page of ``federated.jsonl``: its tables, its notes, its plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.federated import plots
from benchmarks.federated.figures import (
    REFERENCE,
    TARGETS,
    WAYS,
    BySeed,
    Costs,
    Runs,
    cost,
    gain,
    load,
    present,
    reached,
)
from benchmarks.federated.scheme import Scheme
from benchmarks.report import Page, Table, times
from gradcodec.recipes.report import size

OFTEN = (1, 5)  # rounds that a client takes part in, besides all of them


def summary_rows(runs: Runs, schemes: Sequence[Scheme]) -> Table:
    """The first table: heading, then a row per scheme."""
    rounds = runs[REFERENCE][min(runs[REFERENCE])][0]["config"]["rounds"]
    head = ("scheme", "lr", "loss", "gain kept", "payload", "up", "down", "up ratio", "both ways")
    out = [(*head, *(f"+ codec, {n}x" for n in (*OFTEN, rounds)), "codec", "payback")]
    for scheme, by_seed in present(runs, schemes):
        costs = Costs.of(list(by_seed.values()))
        reference = Costs.of([runs[REFERENCE][seed] for seed in by_seed])
        payback = costs.payback(reference)
        out.append(
            (
                scheme.title,
                "/".join(sorted({f"{run[0]['config']['lr']:g}" for run in by_seed.values()})),
                *_quality(by_seed, runs[REFERENCE]),
                "" if costs.payload is None else size(costs.payload),
                size(costs.up),
                size(costs.down),
                times(reference.up / costs.up) if costs.up else "-",
                times(costs.ratio(reference)),
                *(times(costs.ratio(reference, n)) for n in (*OFTEN, rounds)),
                size(costs.codec) if costs.codec else "-",
                "-" if not costs.codec else "never" if payback is None else f"{payback}",
            )
        )
    return out


def _quality(by_seed: BySeed, reference: BySeed) -> tuple[str, str]:
    """Final loss and gain kept, over seeds."""
    failed = sum(run[-1]["diverged"] for run in by_seed.values())
    if failed:
        return f"diverged ({failed} of {len(by_seed)})", "-"
    losses = [run[-1]["loss"] for run in by_seed.values()]
    kept = [gain(run) / gain(reference[seed]) for seed, run in by_seed.items()]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    between = f" [{min(kept):.1%}..{max(kept):.1%}]" if len(kept) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}", f"{statistics.fmean(kept):.1%}{between}"


def target_rows(runs: Runs, schemes: Sequence[Scheme], way: str) -> Table:
    """The other tables: mean bytes to each target, and the ratio to fp32's with the same seeds."""
    out: Table = [("scheme", *(f"{share:.0%}" for share in TARGETS))]
    for scheme, by_seed in present(runs, schemes):
        reference = {seed: runs[REFERENCE][seed] for seed in by_seed}
        cells = []
        for share in TARGETS:
            ours, theirs = (cost(r, reference, share, way) for r in (by_seed, reference))
            if ours is None or theirs is None:
                some = [reached(run, reference[seed], share) for seed, run in by_seed.items()]
                count = sum(r is not None for r in some)
                cells.append(f"- ({count} of {len(some)} seeds)" if count else "-")
            else:
                ratio = times(sum(theirs) / sum(ours))
                cells.append(f"{size(statistics.fmean(ours))} ({ratio})")
        out.append((scheme.title, *cells))
    return out


def page(
    path: Path,
    schemes: Sequence[Scheme],
    title: str = "Federated benchmark",
    case: str = "federated",
) -> Page | None:
    """The page of these rows; ``None`` while no reference run is finished."""
    runs = load(path)
    if REFERENCE not in runs:
        return None
    out = Page(title, f"python -m benchmarks.run {case}")
    out.table("Quality, and bytes of one participation of one client", summary_rows(runs, schemes))
    for way, words in WAYS.items():
        title = f"Wire bytes of all clients to a share of fp32's gain: {words}"
        out.table(title, target_rows(runs, schemes, way))
    out.lines(_notes(runs, schemes))
    shown = present(runs, schemes)
    out.plots(plots.drawings(shown, runs[REFERENCE]))
    out.sources(f"{s.title}: {s.cite}" for s, _ in shown if s.cite)
    return out


def _notes(runs: Runs, schemes: Sequence[Scheme]) -> list[str]:
    """Where the numbers are from and how to read them."""
    first = next(iter(runs[REFERENCE].values()))[0]
    config, versions = first["config"], first["versions"]
    seeds = ", ".join(str(s) for s in sorted(runs[REFERENCE]))
    out = [
        f"{config['rounds']} rounds, {config['per_round']} of {config['clients']} clients in each, "
        f"seeds {seeds}; torch {versions['torch']}, {first['machine']}",
        "gain kept: share of fp32's decrease of the held-out loss, mean [min..max] of the seeds; "
        'ratios: bytes of fp32 / bytes of the scheme; "+ codec, nx": both ways, with the codec\'s '
        "download by a client that takes part n times; payback: participations after which that "
        "download has paid for itself; a target counts from the first round that reaches it",
    ]
    edges = []
    for scheme, by_seed in present(runs, schemes):
        rates = {run[0]["config"]["lr"] for run in by_seed.values()}
        if len(scheme.grid) > 1 and rates & {min(scheme.grid), max(scheme.grid)}:
            edges.append(scheme.title)
    if edges:
        out.append(f"learning rate at an end of the grid: {'; '.join(edges)}")
    return out
