"""The page of ``paper.jsonl``: a section for each analysis that has rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.federated import generalise_page
from benchmarks.federated.figures import load
from benchmarks.federated.generalise import SOURCES
from benchmarks.paper import fits, plots
from benchmarks.paper.coders import CODERS
from benchmarks.paper.recordings import OBJECTS
from benchmarks.paper.results import Form, Results, mean, metric, number, shown, some, title
from benchmarks.paper.setup import EMBEDDED, Setup
from benchmarks.paper.trained import TRAININGS
from benchmarks.report import Page, Table
from benchmarks.rows import Row

METRICS = ("snr_paper", "snr_db", "rse", "cosine")


def page(path: Path) -> Page:
    """The page of these rows."""
    results = Results(path)
    quick = " --quick" * (results.forms != [_full(results.model)])
    name, more = "the embedded LLaMA", ""
    if results.model != EMBEDDED:
        name, more = results.model, " --model FILE.gguf --data FOLDER"
    command = f"python -m benchmarks.run paper{quick}{more}"
    out = Page(f"The analyses of CG-FedLLM, rerun on {name}", command)
    _about(out, results)
    _snr(out, results)
    _size(out, results)
    _aggregation(out, results)
    _noise(out, results)
    _shapes(out, results)
    _entropy(out, results)
    _trained(out, results)
    _transfer(out, results, path)
    _ablations(out, results)
    _geometry(out, results)
    _readings(out, results)
    return out


def _full(model: str) -> Form:
    """The full form of a model."""
    setup = Setup(model=model)
    return Form(setup.rounds, setup.tgap_rounds, setup.steps, setup.rate, model)


def _about(out: Page, results: Results) -> None:
    played = "federated.md" if results.model == EMBEDDED else "llama-gsm8k.md"
    spent = []
    if results.seconds:
        spent.append(f"the rows took {results.seconds / 60:.0f} min of a core")
    out.lines(
        [
            "clients fine-tune the model by LoRA, uncompressed: codecs are fitted on rounds on one "
            "part of their data (D1) and tried on rounds on the other (D2); each section ends with "
            "how many rounds, steps of Adam and seeds; figures are means over rounds and seeds",
            "*error* is the relative squared error: 0 is perfect, 1 is what sending nothing gives",
            "*in italics*: controls; a codec that is no better than these has learned nothing",
            f"no codec takes part in the recorded training: [{played}]({played}) says what they do "
            "to a model",
            *spent,
        ]
    )


def _snr(out: Page, results: Results) -> None:
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


def _noise(out: Page, results: Results) -> None:
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
        cells += [_percent(mean(r[k] for r in rows)) for k in ("client_gain", "shuffled_gain")]
        cells += [
            _percent(mean(r["levels"][i]["noise_gain"] for r in rows)) for i in range(len(levels))
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


def _percent(value: float | None) -> str:
    """A share; small ones keep two digits, none is ``0``."""
    if value is None:
        return "inf"
    if value < 1e-9:
        return "0"
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"


def _shapes(out: Page, results: Results) -> None:
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


def _entropy(out: Page, results: Results) -> None:
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


def _trained(out: Page, results: Results) -> None:
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


def _transfer(out: Page, results: Results, path: Path) -> None:
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


def _ablations(out: Page, results: Results) -> None:
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
        cells += [_percent(mean(r["client_gain"] for r in rows)), str(best["step"])]
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


def _geometry(out: Page, results: Results) -> None:
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


def _readings(out: Page, results: Results) -> None:
    """Analysis 7."""
    titles = {"federated": "rounds of a federation", "local": "clients that train alone"}
    table = _fitted_table(results, "reading", titles, {}, "")
    if len(table) > 1:
        out.table("7. TGAP: federated against local", table)
        out.lines([results.source("reading", "local")])
