"""The page of ``local.jsonl``: its goals, its tables, its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.ddp.work import work_named
from benchmarks.local import plots
from benchmarks.local.figures import (
    LINKS,
    NEAR,
    Figures,
    Group,
    compute_seconds,
    figures,
    goals,
    load,
    mean_seconds,
)
from benchmarks.local.schemes import REFERENCE, SCHEMES
from benchmarks.report import Page, Table, goal_rows, spread, times
from gradcodec.recipes.report import size


def page(path: Path) -> Page | None:
    """The page of these rows; ``None`` while no run of plain DDP is finished."""
    by_seed = load(path)
    if not by_seed:
        return None
    known = figures(by_seed)
    out = Page("Local steps benchmark", "python -m benchmarks.run local-tune local")
    out.table("Goals", goal_rows(goals(known)))
    out.table("Loss and bytes, the fewest bytes last", _loss_rows(known))
    title = f"Seconds to within {NEAR:.0%} of plain DDP's loss, computed from bytes and steps"
    out.table(title, _time_rows(by_seed, known))
    out.lines(_notes(by_seed), "How to read this")
    out.plots(plots.drawings(by_seed))
    cites = {SCHEMES[name].cite: None for name in known if SCHEMES[name].cite}
    out.sources(cites)
    return out


def _loss_rows(known: Mapping[str, Figures]) -> Table:
    head = ("scheme", "rates", "seeds", "loss", "against plain DDP", "bytes", "ratio", "equal")
    out: Table = [head]
    for f in sorted(known.values(), key=lambda f: f.ratio):
        rates = f"{f.lr:g}" if f.outer is None else f"{f.lr:g}, {f.outer:g}"
        out.append(
            (
                f"{SCHEMES[f.name].title} ({SCHEMES[f.name].kind})",
                rates,
                f"{len(f.losses)}",
                f"diverged ({f.diverged})" if f.diverged else spread(f.losses),
                "-" if f.diverged else f"{f.excess:+.2%}",
                size(f.nbytes),
                times(f.ratio),
                "yes" if f.equal else "NO",
            )
        )
    return out


def _time_rows(by_seed: Mapping[int, Group], known: Mapping[str, Figures]) -> Table:
    out: Table = [("scheme", *(c for m in LINKS for c in (f"{m} Mbit/s", "faster")))]
    plain = {mbit: mean_seconds(by_seed, REFERENCE, mbit) for mbit in LINKS}
    for name in known:
        cells: list[str] = []
        for mbit in LINKS:
            mine, theirs = mean_seconds(by_seed, name, mbit), plain[mbit]
            if mine is None or theirs is None:
                cells += ["not reached", "-"]
            else:
                cells += [f"{mine:,.0f} s", times(theirs / mine)]
        out.append((SCHEMES[name].title, *cells))
    return out


def _notes(by_seed: Mapping[int, Group]) -> list[str]:
    every = [row for group in by_seed.values() for row in group.values()]
    some = every[0]
    work = work_named(some["config"]["work"])
    machines = sorted({f"torch {r['versions']['torch']}, {r['machine']}" for r in every})
    commits = sorted({str(r["commit"])[:7] for r in every})
    asked = some["config"]
    return [
        f"{work.title}, {asked['world']} gloo ranks of one thread, {some['steps']} steps of "
        f"{asked['batch']} sequences of 64 tokens, alike for all; seeds "
        f"{', '.join(map(str, by_seed))} deal the text, the first weights are the same",
        f"{' and '.join(machines)}; commits {', '.join(commits)}",
        "rates: inner, outer; the best of a grid on seed 100 (`local-tune.jsonl`); schemes that "
        "differ in H or bits alone share them",
        "losses are held-out, of the one model that all ranks end with; `equal`: to the bit",
        "bytes: what TCP sent for a rank in the whole training, its last exchange and agreements "
        "among them, evaluations not",
        f"seconds are computed, not measured: {compute_seconds(by_seed):.3f} s for a step without "
        "exchange (the median of all rows), the scheme's coding, and bytes over the rate; nothing "
        "overlaps. Evaluations are every 32 steps; with H over 32 some are of models that are "
        "apart",
    ]
