"""Sections of the page on what arrives: SNR and errors, sizes, sums, noise."""

from __future__ import annotations

import functools

from benchmarks.paper import plots
from benchmarks.paper.recordings import OBJECTS
from benchmarks.paper.results import (
    Results,
    mean,
    metric,
    number,
    percent,
    shown,
    some,
    title,
)
from benchmarks.report import Page, Table

METRICS = ("snr_paper", "snr_db", "rse", "cosine")


def snr(out: Page, results: Results) -> None:
    """Analysis 1."""
    names = results.schemes("snr")
    head = ("what arrives of a client's update", "SNR as in the paper", "SNR, dB", "error")
    table: Table = [(*head, "cosine")]
    for name in names:
        rows = results("snr", name)
        cells = [shown(m, metric(rows, "client", "all", m)) for m in METRICS]
        table.append((title(name), *cells))
    out.table("1. The paper's SNR, and errors that can be compared", table)
    if names:
        seeds = {name: len(results("snr", name)) for name in names}
        fewer = [title(name) for name in names if seeds[name] < max(seeds.values())]
        notes = [f"of fewer seeds: {', '.join(fewer)}"] if fewer else []
        out.lines([*notes, results.source("snr")])
        _factors(out, results, "update")
    table = [("what arrives of a round's aggregate", "error of the mean", "cosine", "SNR, dB")]
    table[0] += ("error of the sum", "cosine of the sum", "cosine in A", "cosine in B")
    for name in names:
        rows = results("snr", name)
        cells = [shown(m, metric(rows, "mean", "all", m)) for m in ("rse", "cosine", "snr_db")]
        cells += [shown(m, metric(rows, "sum", "all", m)) for m in ("rse", "cosine")]
        cells += [shown("cosine", metric(rows, "mean", f, "cosine")) for f in ("A", "B")]
        table.append((title(name), *cells))
    out.table("The same after aggregation", table)
    out.plots({"-snr": functools.partial(plots.snr, results)})
    for what in OBJECTS[1:]:
        _other_object(out, results, what)


def _other_object(out: Page, results: Results, what: str) -> None:
    """SNR and errors of gradients or states."""
    names = results.schemes("snr", what)
    if not names:
        return
    state = what == "state"
    head = (f"coders fitted on {what}s", "SNR as in the paper", "SNR, dB", "error", "cosine")
    ends = ("error of the innovation", "its cosine") if state else ()
    table: Table = [(*head, *ends, "cosine of the mean")]
    for name in names:
        rows = results("snr", name, what)
        cells = [shown(m, metric(rows, "client", "all", m)) for m in METRICS]
        if state:
            cells += [shown(m, metric(rows, "innovation", "all", m)) for m in ("rse", "cosine")]
        cells.append(shown("cosine", metric(rows, "mean", "all", "cosine")))
        table.append((title(name), *cells))
    out.table(f"The same for {what}s", table)
    out.lines([results.source("snr", what)])
    _factors(out, results, what)


def _factors(out: Page, results: Results, what: str) -> None:
    """Errors of A and of B apart; of states also those of the update in them."""
    sides = {"client": ""}
    if what == "state":
        sides["innovation"] = "innovation in "
    columns = [(whose, f) for whose in sides for f in "AB"]
    head = [
        cell
        for whose, f in columns
        for cell in (f"error of {sides[whose]}{f}", f"SNR of {sides[whose]}{f}, dB")
    ]
    table: Table = [(f"LoRA's factors apart, {what}s", *head)]
    for name in results.schemes("snr", what):
        rows = results("snr", name, what)
        cells = [
            shown(m, metric(rows, whose, f, m)) for whose, f in columns for m in ("rse", "snr_db")
        ]
        table.append((title(name), *cells))
    out.table(f"By factor: {what}s", table)


def size(out: Page, results: Results) -> None:
    """Analysis 2."""
    head = ("codec", "values", "code", "code / values", "payload", "payload / fp32", "message")
    table: Table = [(*head, "message / fp32", "codec, once")]
    for name in results.schemes("size"):
        (row, *_) = results("size", name)
        if name in ("prior", "untrained"):
            continue  # as large as the codecs that they are the controls of
        fp32 = 4 * row["numel"]
        sizes = [f"{row[k]:,}" for k in ("payload_bytes", "wire_bytes")]
        ratios = [f"{row[k] / fp32:.3%}" for k in ("payload_bytes", "wire_bytes")]
        table.append(
            (
                title(name),
                f"{row['numel']:,}",
                f"{row['code_numel']:,}",
                f"{row['code_numel'] / row['numel']:.4%}",
                *(cell for pair in zip(sizes, ratios, strict=True) for cell in pair),
                f"{row['codec_bytes']:,}",
            )
        )
    if len(table) > 1:
        out.table("2. Compression rate: in values, in payload bytes, on the wire", table)


def aggregation(out: Page, results: Results) -> None:
    """The sum of clients' products beside their mean."""
    rows = results("aggregation", "none")
    if not rows:
        return
    table: Table = [
        ("round", "error of the mean", "error of the sum", "error of increments", "length")
    ]
    for at in some(range(len(rows[0]["rounds"]))):
        found = [row["rounds"][at] for row in rows]
        cells = [number(mean(r[k] for r in found)) for k in ("mean", "sum", "increments", "length")]
        table.append((str(found[0]["number"]), *cells))
    out.table("Aggregating factors instead of products, without any codec", table)
    out.lines(
        [
            "clients change a weight by the product B A; the server aggregates A and B apart. "
            "*error of the mean* and *of the sum*: of the product of aggregated factors, relative "
            "to the aggregated products",
            "*error of increments*: Algorithm 1 as written on increments, (sum dB)(sum dA)",
            "*length*: of the summed step, in those of the mean's",
            results.source("aggregation"),
        ]
    )
    out.plots({"-aggregation": functools.partial(plots.aggregation, results)})


def noise(out: Page, results: Results) -> None:
    """Analysis 3."""
    names = results.schemes("noise")
    if not names:
        return
    first = results("noise", names[0])[0]
    levels = [level["level"] for level in first["levels"]]
    head = [f"noise of {level:g} RMS" for level in levels]
    table: Table = [("error against the clean update", "no noise", *head)]
    for name in names:
        rows = results("noise", name)
        cells = [number(mean(r["rse"] for r in rows))]
        cells += [number(mean(r["levels"][i]["rse"] for r in rows)) for i in range(len(levels))]
        table.append((title(name), *cells))
    out.table("3. Noise on the update, before it is encoded", table)
    heads = ("own message", "next client's message", "of a client", "of a shuffled update")
    table = [
        ("does the output depend on the input?", *heads, *(f"of noise, {n:g}" for n in levels))
    ]
    for name in names:
        rows = results("noise", name)
        cells = [
            number(mean(r["rse"] for r in rows)),
            number(mean(r["swapped"]["rse"] for r in rows)),
        ]
        cells += [percent(mean(r[k] for r in rows)) for k in ("client_gain", "shuffled_gain")]
        cells += [
            percent(mean(r["levels"][i]["noise_gain"] for r in rows)) for i in range(len(levels))
        ]
        table.append((title(name), *cells))
    out.table("Errors of the right and of the wrong message, and gains", table)
    out.lines(
        [
            "*of a client*: energy of the difference between two clients' updates that is left "
            "after decoding; *of noise*: the same of the noise. A denoiser has much of the first "
            "and little of the second, a constant decoder nothing of both",
            "where the next client's message decodes as well as one's own, the input is ignored",
            "signs are scaled to be right on average, so a client's energy grows in them",
            f"of the first, middle and last of {results.source('noise')}",
        ]
    )
    coded = [name for name in names if "code_levels" in results("noise", name)[0]]
    table = [("error against the clean update", "no noise", *head)]
    for name in coded:
        rows = results("noise", name)
        cells = [number(mean(r["rse"] for r in rows))]
        cells += [
            number(mean(r["code_levels"][i]["rse"] for r in rows)) for i in range(len(levels))
        ]
        table.append((title(name), *cells))
    out.table("Noise on the code, relative to the code's RMS", table)
    out.plots({"-noise": functools.partial(plots.noise, results)})
