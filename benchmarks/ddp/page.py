"""The page of ``ddp.jsonl``: its tables, its goals, its plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ddp import plots
from benchmarks.ddp.figures import (
    NEAR,
    Group,
    Trained,
    beside,
    excess,
    failures,
    goals,
    load,
    ratio,
    speed_up,
    step_ratio,
    target,
)
from benchmarks.ddp.schemes import REFERENCE, SCHEMES, GradientScheme
from benchmarks.ddp.work import WORKS
from benchmarks.links.link import LINKS
from benchmarks.report import Page, Table, goal_rows, spread, times
from gradcodec.recipes.report import size


def loss_rows(by_seed: dict[int, Group]) -> Table:
    """Quality and bytes: a row per scheme, means over seeds."""
    out: Table = [("scheme", "lr", "loss", "against plain DDP", "bytes per step", "ratio", "equal")]
    for name, groups in _present(by_seed):
        rows = [g[name].base for g in groups]
        above = [excess(g, name) for g in groups]
        sent = [s[1] for g in groups if (s := g[name].sent()) is not None]
        ratios = [r for g in groups if (r := ratio(g, name)) is not None]
        bad = sum(r["diverged"] for r in rows)
        out.append(
            (
                SCHEMES[name].title,
                f"{rows[0]['config']['lr']:g}",
                f"diverged ({bad} of {len(rows)})"
                if bad
                else spread([g[name].loss() for g in groups]),
                "-" if bad else f"{statistics.fmean(above):+.2%}",
                size(statistics.fmean(sent)) if sent else "-",
                times(statistics.fmean(ratios)) if ratios else "-",
                "yes" if all(r["replicas_equal"] for r in _all_rows(groups, name)) else "NO",
            )
        )
    return out


def _all_rows(groups: Sequence[Group], name: str) -> list[dict[str, object]]:
    return [row for g in groups for row in g[name].links.values()]


def time_rows(group: Group) -> Table:
    """Median step and time to the target on each link; ratios are plain DDP's over the scheme's."""
    links = [link for link in reversed(LINKS) if link in group[REFERENCE].links]
    head = [cell for link in links for cell in (f"{link} step", "faster", "to loss")]
    out: Table = [("scheme", *head)]
    for name in _names(group):
        cells: list[str] = []
        for link in links:
            row = group[name].links.get(link)
            if row is None:
                cells += ["-", "-", "-"]
                continue
            faster, sooner = step_ratio(group, name, link), speed_up(group, name, link)
            cells += [
                f"{1000 * row['p50_s']:.0f} ms",
                f"{faster:.2f}x" if faster else "-",
                f"{sooner:.2f}x" if sooner else "not reached",
            ]
        out.append((SCHEMES[name].title, *cells))
    return out


def part_rows(group: Group, link: str) -> Table:
    """Where a step's time goes on a link, in ms; empty where a scheme does not tell.

    Hidden is what of the parts goes on beside the backward pass, or beside each other.
    """
    parts = ("encode", "exchange", "decode", "coding")
    out: Table = [("scheme", "step", "compute", *parts, "step - compute", "hidden")]
    for name in _names(group):
        row = group[name].links.get(link)
        if row is None:
            continue
        told = [f"{1000 * row[f'{p}_s']:.1f}" if f"{p}_s" in row else "" for p in parts]
        step, compute = 1000 * row["p50_s"], 1000 * row["compute_s"]
        rest = step - compute
        of_parts = sum(float(t) for t in told if t)
        hidden = f"{of_parts - rest:.1f}" if of_parts else ""
        title = SCHEMES[name].title
        out.append((title, f"{step:.1f}", f"{compute:.1f}", *told, f"{rest:.1f}", hidden))
    return out


def slower(group: Group) -> list[str]:
    """Per link, who lost time: the schemes whose step is longer than plain DDP's."""
    out = []
    for link in reversed(LINKS):
        ratios = [
            (r, SCHEMES[name].title)
            for name in _names(group)
            if name != REFERENCE and (r := step_ratio(group, name, link)) is not None
        ]
        lost = [f"{title} {1 / r:.2f}x" for r, title in sorted(ratios) if r < 1]
        if ratios:
            which = f": {', '.join(lost)}" if lost else ""
            out.append(
                f"{link}: {len(lost)} of {len(ratios)} have longer steps than plain DDP{which}"
            )
    return out


def page(path: Path) -> Page | None:
    """The page of these rows; ``None`` while no run of plain DDP is finished."""
    loaded = load(path)
    if not loaded:
        return None
    turns = beside(path)
    out = Page("DDP benchmark", "python -m benchmarks.run ddp")
    first = next(iter(loaded))
    head = ("llama", 2) if ("llama", 2) in loaded else first
    seed = min(loaded[head])
    out.table(f"Goals, on {_where(*head)}", goal_rows(goals(loaded[head][seed], turns)))
    for (work, world), by_seed in loaded.items():
        where = _where(work, world)
        group = by_seed[min(by_seed)]
        out.table(f"Loss and bytes: {where}", loss_rows(by_seed))
        near = f"{target(group):.4f}, {NEAR:.0%} above plain DDP's last"
        out.table(f"Time: {where}; to a loss of {near}", time_rows(group))
        slow = next((link for link in reversed(LINKS) if link in group[REFERENCE].links), "")
        out.table(f"A step at {slow}, ms: {where}", part_rows(group, slow))
    if turns:
        out.table("Taking turns with plain DDP, llama, 2 ranks", _turn_rows(turns))
    losing = [f"{_where(*key)}, {line}" for key, g in loaded.items() for line in slower(g[min(g)])]
    out.lines(losing, "Where compression loses time")
    out.lines(_notes(path, loaded), "How to read this")
    out.plots(plots.drawings(loaded))
    cites = {s.title: s.cite for g in loaded.values() for s in _schemes(g) if s.cite}
    out.sources(f"{title}: {cite}" for title, cite in cites.items())
    return out


def _turn_rows(turns: dict[str, dict[str, list[float]]]) -> Table:
    out: Table = [("link", "scheme", "step / plain DDP's: median", "quartiles", "turns")]
    for link, by_scheme in turns.items():
        for name, ratios in by_scheme.items():
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            middle = statistics.median(ratios)
            quartiles = f"{low:.3f}..{high:.3f}"
            row = (link, SCHEMES[name].title, f"{middle:.3f}", quartiles, f"{len(ratios)}")
            out.append(row)
    return out


def _notes(path: Path, loaded: dict[tuple[str, int], dict[int, Group]]) -> list[str]:
    """Where the numbers are from."""
    some = next(iter(next(iter(loaded.values())).values()))[REFERENCE].base
    every = [
        (t, link, row)
        for by_seed in loaded.values()
        for group in by_seed.values()
        for t in group.values()
        for link, row in t.links.items()
    ]
    kinds = sorted({row["network"] for _, _, row in every})
    out = [
        f"torch {some['versions']['torch']}, {some['machine']}, one thread per rank; commits "
        f"{', '.join(sorted({str(row['commit'])[:7] for _, _, row in every}))}; links by "
        f"{' and '.join(kinds)} (benchmarks/links.py); only ratios within a run mean anything",
        "losses are held-out; `to loss` is plain DDP's time to the target over the scheme's, "
        "`faster` its median step over the scheme's; `equal`: all replicas equal to the bit",
        "a link on which a scheme was not trained to the end has the losses of the unshaped link "
        "and the step times of its own",
        "hidden: all parts less what a step takes beyond compute; negative where compute takes "
        "longer beside them; DDP's buckets of 25 MB hold this whole model, so little can be hidden "
        "(`ddp_buckets` has smaller ones)",
        "compute is a step without any exchange, all ranks at it; parts may overlap with it and "
        "with each other, so they need not add up; plain DDP and torch's hooks do not tell theirs",
    ]
    short = [(t, link) for t, link, row in every if SCHEMES[t.scheme].alike and link != "unshaped"]
    same = sum(t.same_path(link) for t, link in short)
    if short:
        out.append(f"first losses equal to the unshaped link's to the bit: {same} of {len(short)}")
    out += [_confirmation(t) for t, link, row in every if link == "100mbit" and _confirms(t)]
    out += [
        f"`{t.scheme}`, {row['config']['work']} x{row['config']['world']}, {link}: "
        f"{row['notes']['auto']}"
        for t, link, row in every
        if row["notes"].get("auto")
    ]
    return out + [f"did not run: {line}" for line in failures(path)]


def _confirms(trained: Trained) -> bool:
    return SCHEMES[trained.scheme].alike and bool(trained.links["100mbit"]["whole"])


def _confirmation(trained: Trained) -> str:
    """A training that was also done to the end on a slow link."""
    there, base = trained.links["100mbit"], trained.base
    same = there["evaluations"][-1][1] == base["evaluations"][-1][1]
    return (
        f"{SCHEMES[trained.scheme].title} was trained to the end at 100mbit as well "
        f"({there['evaluations'][-1][2]:.0f} s): "
        f"{'the same' if same else 'NOT the same'} last loss as unshaped"
    )


def _where(work: str, world: int) -> str:
    return f"{WORKS[work].title}, {world} ranks"


def _names(group: Group) -> list[str]:
    return [name for name in SCHEMES if name in group]


def _present(by_seed: dict[int, Group]) -> list[tuple[str, list[Group]]]:
    found = [(n, [g for g in by_seed.values() if n in g]) for n in SCHEMES]
    return [(name, groups) for name, groups in found if groups]


def _schemes(by_seed: dict[int, Group]) -> list[GradientScheme]:
    return [SCHEMES[name] for name, _ in _present(by_seed)]
