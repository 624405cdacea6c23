"""The page of ``paper.jsonl``: a section for each analysis that has rows."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.paper import plots
from benchmarks.paper.recordings import OBJECTS
from benchmarks.paper.results import Results, mean, metric, number, title
from benchmarks.report import Page, Table

METRICS = ("snr_paper", "snr_db", "rse", "cosine")


def page(path: Path) -> Page:
    """The page of these rows."""
    results = Results(path)
    more = "" if results.setup.get("model") == "embedded" else " --model FILE.gguf --data FOLDER"
    out = Page("The analyses of CG-FedLLM, rerun", f"python -m benchmarks.run paper --quick{more}")
    _about(out, results)
    _snr(out, results)
    _size(out, results)
    _aggregation(out, results)
    return out


def _about(out: Page, results: Results) -> None:
    s = results.setup
    out.lines(
        [
            f"model {s['model']}, LoRA; {s['tgap_rounds']} rounds on D1 are what codecs are fitted "
            f"on, {s['played']} on D2 what they are tried on; autoencoders train {s['steps']} "
            f"steps; seeds {', '.join(map(str, results.seeds))}",
            "*error* is the relative squared error: 0 is perfect, 1 is what sending nothing gives",
            "*in italics*: controls; a codec that is no better than these has learned nothing",
            "no codec takes part in the training here: [federated.md](federated.md) says what "
            "they do to a model",
        ]
    )


def _snr(out: Page, results: Results) -> None:
    """Analysis 1."""
    names = results.schemes("snr")
    head = ("what arrives of a client's update", "SNR as in the paper", "SNR, dB", "error")
    table: Table = [(*head, "cosine", "error of A", "error of B")]
    for name in names:
        rows = results("snr", name)
        cells = [number(metric(rows, "client", "all", m)) for m in METRICS]
        cells += [number(metric(rows, "client", f, "rse")) for f in ("A", "B")]
        table.append((title(name), *cells))
    out.table("1. The paper's SNR, and errors that can be compared", table)
    table = [("what arrives of a round's aggregate", "error of the mean", "cosine", "SNR, dB")]
    table[0] += ("error of the sum", "cosine of the sum", "cosine in A", "cosine in B")
    for name in names:
        rows = results("snr", name)
        cells = [number(metric(rows, "mean", "all", m)) for m in ("rse", "cosine", "snr_db")]
        cells += [number(metric(rows, "sum", "all", m)) for m in ("rse", "cosine")]
        cells += [number(metric(rows, "mean", f, "cosine")) for f in ("A", "B")]
        table.append((title(name), *cells))
    out.table("The same after aggregation", table)
    out.plots({"-snr": functools.partial(plots.snr, results)})
    for what in OBJECTS[1:]:
        _other_object(out, results, what)


def _other_object(out: Page, results: Results, what: str) -> None:
    names = results.schemes("snr", what)
    if not names:
        return
    state = what == "state"
    head = (f"coders fitted on {what}s", "SNR as in the paper", "SNR, dB", "error", "cosine")
    ends = ("error of the innovation", "its cosine") if state else ()
    table: Table = [(*head, *ends, "cosine of the mean")]
    for name in names:
        rows = results("snr", name, what)
        cells = [number(metric(rows, "client", "all", m)) for m in METRICS]
        if state:
            cells += [number(metric(rows, "innovation", "all", m)) for m in ("rse", "cosine")]
        cells.append(number(metric(rows, "mean", "all", "cosine")))
        table.append((title(name), *cells))
    out.table(f"The same for {what}s", table)


def _size(out: Page, results: Results) -> None:
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


def _aggregation(out: Page, results: Results) -> None:
    rows = results("aggregation", "none")
    if not rows:
        return
    table: Table = [
        ("round", "error of the mean", "error of the sum", "error of increments", "length")
    ]
    for at in range(len(rows[0]["rounds"])):
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
        ]
    )
