"""Sections of the page on fits: other data, TGAP's readings, ablations, geometry."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.federated import generalise_page
from benchmarks.federated.figures import load
from benchmarks.federated.generalise import SOURCES
from benchmarks.paper import fits, plots
from benchmarks.paper.coders import CODERS
from benchmarks.paper.results import (
    Results,
    mean,
    metric,
    number,
    percent,
    shown,
    title,
)
from benchmarks.paper.setup import EMBEDDED
from benchmarks.report import Page, Table
from benchmarks.rows import Row


def _fitted_table(
    results: Results, kind: str, titles: dict[str, str], extra: dict[str, str], head: str
) -> Table:
    """Errors of the coders that were fitted anew, by what they were fitted on."""
    names = _fitted(results, kind)
    ends = ("error", "cosine", "cosine of the mean")
    heads = [f"{title(name)}: {what}" for name in names for what in ends]
    more = (head,) if extra else ()
    table: Table = [("fitted on", *heads, *more)]
    for of, words in titles.items():
        found = {name: results(kind, name, of) for name in names}
        if all(found[name] for name in names if CODERS[name].kind != "control"):
            cells = [cell for name in names for cell in _three(found[name])]
            table.append((words, *cells, *([extra.get(of, "-")] if extra else [])))
    return table


def _fitted(results: Results, kind: str) -> list[str]:
    """The coders of these tables: codecs, and the control if it was run."""
    return [n for n in fits.CODERS if CODERS[n].kind != "control" or results.has(kind, n)]


def _three(rows: Sequence[Row]) -> list[str]:
    where = (("client", "rse"), ("client", "cosine"), ("mean", "cosine"))
    if not rows:
        return ["-"] * len(where)
    return [shown(name, metric(rows, whose, "all", name)) for whose, name in where]


def transfer(out: Page, results: Results, path: Path) -> None:
    """Analysis 5."""
    embedded = results.model == EMBEDDED
    titles = {name: words for name, (words, _) in SOURCES.items()} if embedded else {}
    titles = titles or {"own": "D1 of the same questions", "mmlu": "D1 of MMLU's questions"}
    gains: dict[str, str] = {}
    played = path.with_name("generalise.jsonl")
    if embedded and played.exists():
        runs = load(played)
        for name in titles:
            kept = generalise_page.kept(runs.get(name, {}), runs["fp32"])
            if kept:
                gains[name] = f"{sum(kept) / len(kept):.1%}"
    head = "gain kept when played, subspace 1/17"
    table = _fitted_table(results, "transfer", titles, gains, head)
    if len(table) == 1:
        return
    names = _fitted(results, "transfer")
    seeds = {row["seed"] for row in results("transfer", fits.CODERS[0], "own")}
    cells = [
        cell
        for name in names
        for cell in _three([r for r in results("snr", fits.CONTROLS[name]) if r["seed"] in seeds])
    ]
    words = "; ".join(("noise", "random bases", "nothing")[: len(names)])
    table.append((f"*{words}*", *cells, *([gains.get("random", "-")] if gains else [])))
    out.table("5. A codec fitted on one task, applied to another", table)
    about = []
    if len(names) == len(fits.CODERS):
        about.append("a codec carries over as far as it beats the mean of the same updates")
    if gains:
        about.append("the last column is from [generalise.md](generalise.md): a whole training")
    out.lines([*about, results.source("transfer", "own")])
    out.plots({"-fits": functools.partial(plots.fits, results, titles)})


def ablations(out: Page, results: Results) -> None:
    """Analysis 6."""
    names = results.schemes("ablation")
    if not names:
        return
    head = ("literal autoencoder", "parameters", "MACs, encoder", "decoder", "error on D2")
    table: Table = [(*head, "error of the training mean", "comes through of a client", "best step")]
    for name in names:
        rows = results("ablation", name)
        row = rows[0]
        best = min(row["history"], key=lambda line: line["val_rse"])
        cells = [f"{sum(row['parameters'].values()):,}"]
        cells += [f"{row['macs'][half] / 1e6:.1f} M" for half in ("encoder", "decoder")]
        cells += [number(mean(r[k] for r in rows)) for k in ("rse", "mean_rse")]
        cells += [percent(mean(r["client_gain"] for r in rows)), str(best["step"])]
        table.append((fits.VARIANTS[name].title, *cells))
    out.table("6. Depth and upsampling of the autoencoder", table)
    out.lines(
        [
            "values are scaled into Tanh's range; the best validation step is kept",
            "smooth pictures have the updates' sizes and number: the same loop, code and networks",
            results.source("ablation"),
        ]
    )
    out.plots({"-ablation": functools.partial(plots.ablation, results)})


def geometry(out: Page, results: Results) -> None:
    """Sizes and operations of the paper's networks."""
    names = results.schemes("geometry")
    if not names:
        return
    head = ("autoencoder", "latent", "code / values", "the paper states", "payload, fp32")
    ends = ("parameters, encoder", "decoder", "MACs, encoder", "decoder", "decoder, on its output")
    table: Table = [(*head, *ends)]
    for name in names:
        row = results("geometry", name)[0]
        stated = row["stated_ratio"]
        table.append(
            (
                name,
                " x ".join(map(str, row["latent"])),
                f"{row['ratio']:.4%}",
                "-" if stated is None else f"{stated:.2%}",
                f"{row['payload_bytes']:,}",
                *(f"{row['parameters'][half]:,}" for half in ("encoder", "decoder")),
                *(f"{v / 1e9:.3f} G" for v in row["macs"].values()),
            )
        )
    out.table("The paper's picture, 4096 x 2048: LLaMA-7B, r = 8, q, k, v, o", table)
    out.lines(
        [
            "the paper states 0.81 G for ResNet-3's encoder, 1.80 G for its decoder, 0.94 MB each",
            "layers of the 1-D CNN and the U-Former are not published: interpretations",
        ]
    )


def readings(out: Page, results: Results) -> None:
    """Analysis 7."""
    titles = {"federated": "rounds of a federation", "local": "clients that train alone"}
    table = _fitted_table(results, "reading", titles, {}, "")
    if len(table) > 1:
        out.table("7. TGAP: federated against local", table)
        out.lines([results.source("reading", "local")])
