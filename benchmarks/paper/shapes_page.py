"""Sections of the page on shapes: histograms, spectra, entropy, what trainings end with."""

from __future__ import annotations

import functools
import math

from benchmarks.paper import plots
from benchmarks.paper.recordings import OBJECTS
from benchmarks.paper.results import Results, mean, number, some, title
from benchmarks.paper.trained import TRAININGS
from benchmarks.report import Page, Table


def shapes(out: Page, results: Results) -> None:
    """Analysis 4, without codecs."""
    objects = [what for what in OBJECTS if results("shape", "none", what)]
    if not objects:
        return
    head = ("object, round", "RMS of A", "RMS of B", "largest value", "within 0.01")
    ends = ("kurtosis less 3, A", "B", "effective rank, A", "B", "in the first direction, A", "B")
    table: Table = [(*head, *ends)]
    for what in objects:
        rows = results("shape", "none", what)
        for at in some(range(len(rows[0]["rounds"]))):
            found = [row["rounds"][at] for row in rows]
            largest = mean(max(max(r["highest"]), -min(r["lowest"])) for r in found)
            inside = mean((r["A"]["inside_001"] + r["B"]["inside_001"]) / 2 for r in found)
            cells = [number(mean(r[f]["rms"] for r in found)) for f in "AB"]
            cells += [number(largest), f"{inside:.1%}"]
            cells += [number(mean(r[f]["excess"] for r in found)) for f in "AB"]
            cells += [number(mean(math.exp(r[f]["entropy"]) for r in found)) for f in "AB"]
            cells += [f"{mean(r[f]['spectrum'][0] for r in found):.0%}" for f in "AB"]
            table.append((f"{what}s, {found[0]['number']}", *cells))
    out.table("4. What gradients and updates look like", table)
    product = results("product", "none")
    if product:
        rounds = product[0]["rounds"]
        half = len(rounds[0]["spectrum"]) // 2
        kept = [sum(r["spectrum"][:half]) for r in rounds]
        shares = [sum(r["spectrum"][: half // 2]) for r in rounds]
        out.lines(
            [
                f"what a client changes in a weight has rank {2 * half} at most; its first {half} "
                f"directions hold {min(kept):.1%} to {max(kept):.1%} of the energy, the first "
                f"{half // 2} hold {min(shares):.1%} to {max(shares):.1%}",
                "largest change of a weight, without LoRA's scale, in "
                f"round {', '.join(str(r['number']) for r in some(rounds))}: "
                + ", ".join(number(r["largest"]) for r in some(rounds)),
            ]
        )
    out.lines([results.source("shape", objects[0])])
    out.plots({"-shapes": functools.partial(plots.shapes, results)})


def entropy(out: Page, results: Results) -> None:
    """Analysis 4, of what coders make of updates."""
    names = results.schemes("entropy")
    if not names:
        return
    most = results("entropy", names[0])[0]["most"]
    head = ("what arrives", "entropy of all snapshots", "directions", "entropy of A", "of B")
    table: Table = [head]
    for name in names:
        rows = results("entropy", name)
        together = mean(r["ensemble"] for r in rows) or 0.0
        cells = [f"{together:.3f}", f"{math.exp(together):.1f}"]
        cells += [f"{mean(r[f] for r in rows) or 0.0:.3f}" for f in "AB"]
        table.append((title(name), *cells))
    out.table("Matrix entropy of what arrives", table)
    out.lines(
        [
            f"in nats; of {round(math.exp(most))} snapshots at most {most:.3f}. A decoder that "
            "always says the same has 0, noise has the most",
            results.source("entropy"),
        ]
    )


def trained(out: Page, results: Results) -> None:
    """Analysis 4, of what three trainings end with."""
    names = results.schemes("trained")
    if not names:
        return
    head = ("the adapter after", "held-out loss", "matrix entropy of B A", "effective rank")
    table: Table = [(*head, "in the first direction", "in the first half", "norm")]
    for name in names:
        rows = results("trained", name)
        layers = [layer for row in rows for layer in row["layers"]]
        half = len(layers[0]["spectrum"]) // 2
        shares = (mean(sum(x["spectrum"][:k]) for x in layers) or 0.0 for k in (1, half))
        table.append(
            (
                TRAININGS[name].title,
                f"{mean(row['held_out'] for row in rows):.3f}",
                f"{mean(x['entropy'] for x in layers):.3f}",
                number(mean(math.exp(x["entropy"]) for x in layers)),
                *(f"{share:.0%}" for share in shares),
                number(mean(x["norm"] for x in layers)),
            )
        )
    out.table("What is trained in three ways", table)
    out.lines(
        [
            "means over the adapted weights; in nats, of rank "
            f"{2 * half} at most {math.log(2 * half):.3f}. Equal entropies do not say that the "
            "same was learned: factors of noise, of the same norms, have one as well, the highest",
            results.source("trained"),
        ]
    )
    out.plots({"-trained": functools.partial(plots.trained, results)})
