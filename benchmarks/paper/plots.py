"""The plots of the page of ``paper.jsonl``: ours warm, the paper's green, controls grey."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.paper import fits as variants
from benchmarks.paper.coders import CODERS
from benchmarks.paper.recordings import OBJECTS
from benchmarks.paper.results import Results, mean, metric, over_rounds, some
from benchmarks.paper.shapes import BINS, REACH
from benchmarks.paper.trained import TRAININGS
from benchmarks.rows import Row

_CONTROLS = ("x", "+", "1", "2", "3", "4", "|", "_")
"""Markers of controls: some lie on one another, and grey lines alone do not differ enough."""


def styles(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and line style of each coder."""
    known = report.Styles()
    controls = 0
    for name in names:
        coder = CODERS[name]
        if coder.kind == "control":
            marker = _CONTROLS[controls % len(_CONTROLS)]
            controls += 1
            look = {"linestyle": (0, (1, 2)), "linewidth": 1.0, "markersize": 7.0}
            yield coder.title, {"color": "#606060", "marker": marker, **look}
        else:
            yield coder.title, known.next(coder.kind)


def _legend(ax: Any) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


_SNR = (
    ("SNR as in the paper", "update", "client", "snr_paper"),
    ("Cosine of a client's update", "update", "client", "cosine"),
    ("Cosine of the round's mean", "update", "mean", "cosine"),
    ("SNR of a client's update, dB", "update", "client", "snr_db"),
    ("Error of a client's update", "update", "client", "rse"),
    ("Error of the update in a state", "state", "innovation", "rse"),
)
"""Panels: title, object, whose, metric."""


def snr(results: Results, path: Path) -> None:
    """The paper's SNR beside honest metrics, over rounds; of states the update in them."""
    figure, axes = report.figure(2, 3, figsize=(16, 8.6))
    names = results.schemes("snr")
    looks = dict(zip(names, styles(names), strict=True))
    for ax, (title, what, whose, of) in zip(axes.flat, _SNR, strict=True):
        for name in (n for n in names if results("snr", n, what)):
            label, style = looks[name]
            numbers, values = over_rounds(results("snr", name, what), whose, of)
            if None not in values and (of != "rse" or all(values)):  # else nothing to draw
                ax.plot(numbers, values, label=label, **style)
            ax.set_xticks(some(numbers))
        ax.set(title=title, xlabel="round")
        ax.grid(alpha=0.3, linewidth=0.5)
        if of in ("rse", "snr_paper"):
            ax.set_yscale("log")
        if of in ("rse", "snr_db"):
            ax.axhline(float(of == "rse"), color="black", linewidth=0.8)
            nothing = "sending the start" if what == "state" else "sending nothing"
            ax.set_xlabel(f"round; black: what {nothing} gives")
        ax.set_visible(bool(results.schemes("snr", what)))
    size = results("size", "identity")
    if size:
        n = size[0]["numel"]
        axes[0][0].axhline(n, color="black", linewidth=0.8)
        axes[0][0].set_xlabel(f"round; black: n = {n:,}, what sending nothing scores")
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    report.save(figure, path)


def aggregation(results: Results, path: Path) -> None:
    """Error of aggregated factors against aggregated products, over rounds."""
    figure, ax = report.figure(figsize=(7.5, 4.2))
    rows = results("aggregation", "none")
    numbers = [r["number"] for r in rows[0]["rounds"]]
    lines = (
        ("mean", "mean by examples", "reference"),
        ("sum", "sum (the paper's)", "paper"),
        ("increments", "sum of increments, (sum dB)(sum dA)", "peer"),
    )
    known = report.Styles()
    for rule, label, kind in lines:
        errors = [mean(row["rounds"][at][rule] for row in rows) for at in range(len(numbers))]
        ax.plot(numbers, errors, label=label, **known.next(kind))
    ax.set(
        title="Aggregating A and B apart: error of their product",
        xlabel="round",
        ylabel="relative squared error",
        yscale="log",
        xticks=some(numbers),
    )
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.legend(fontsize=8, frameon=False)
    report.save(figure, path)


PAPER_NOISE = ((5e-5, 4.59e-7), (5e-1, 5.21e-7))
"""Standard deviation and error per element of the paper's table, at its RMS of 1.305e-3."""
PAPER_RMS = 1.305e-3


def noise(results: Results, path: Path) -> None:
    """Error against noise, and what comes through of clients and of noise."""
    figure, (left, right) = report.figure(1, 2, figsize=(14, 5.2))
    names = results.schemes("noise")
    labels: dict[tuple[int, int], tuple[tuple[float, float], list[str]]] = {}
    for name, (label, style) in zip(names, styles(names), strict=True):
        rows = results("noise", name)
        levels = [level["level"] for level in rows[0]["levels"]]
        errors = [mean(r["levels"][i]["rse"] for r in rows) for i in range(len(levels))]
        left.plot(levels, errors, label=label, **style)
        client = mean(r["client_gain"] for r in rows) or 0.0
        through = mean(r["levels"][2]["noise_gain"] for r in rows) or 0.0
        colour = style["color"]
        marker = style.get("marker", "x")
        at = (max(through, FLOOR), max(client, FLOOR))
        right.scatter(*at, color=colour, marker=marker, s=50, zorder=4)
        near = (round(2 * math.log10(at[0])), round(2 * math.log10(at[1])))
        labels.setdefault(near, (at, []))[1].append(label)
    for at, stacked in labels.values():  # points that lie on one another share a label
        text = "\n".join(stacked)
        back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        place = {"xytext": (9, -3), "textcoords": "offset points"}
        right.annotate(text, at, **place, fontsize=7, bbox=back, zorder=3)
    told = [(sigma / PAPER_RMS, error / PAPER_RMS**2) for sigma, error in PAPER_NOISE]
    left.plot(
        *zip(*told, strict=True), "*", color="black", markersize=11, label="the paper's table"
    )
    left.set(
        title="Error after decoding, against the clean update",
        xlabel="standard deviation of the noise, in RMS of the update",
        ylabel="relative squared error",
        xscale="log",
        yscale="log",
    )
    left.axhline(1, color="black", linewidth=0.8)
    left.grid(alpha=0.3, linewidth=0.5)
    left.legend(fontsize=7, frameon=False)
    right.plot([FLOOR, 100], [FLOOR, 100], color="black", linewidth=0.8)
    right.set(
        title="Denoisers are above the line, constant decoders in the corner",
        xlabel="comes through of noise of 4 RMS (energy; 1e-6 stands for less)",
        ylabel="comes through of the difference between two clients",
        xscale="log",
        yscale="log",
        xlim=(FLOOR / 2, 1e4),
        ylim=(FLOOR / 2, 1e2),
    )
    right.grid(alpha=0.3, linewidth=0.5)
    report.save(figure, path)


FLOOR = 1e-6


def shapes(results: Results, path: Path) -> None:
    """Histograms over rounds, spectra, and the surfaces of extremes."""
    import numpy as np
    from matplotlib import colormaps

    objects = [what for what in OBJECTS if results("shape", "none", what)]
    options = {"figsize": (22, 4 * len(objects)), "squeeze": False}
    figure, axes = report.figure(len(objects), 5, **options)
    for at, what in enumerate(objects):
        row = results("shape", "none", what)[0]
        rounds = row["rounds"]
        colours = colormaps["autumn"](np.linspace(0, 0.75, len(rounds)))
        for ax, factor in zip(axes[at], "AB", strict=False):
            rms = row["rms"][factor]
            centres = np.linspace(-REACH, REACH, BINS + 1)[:-1] + REACH / BINS
            for found, colour in some(list(zip(rounds, colours, strict=True))):
                counts = np.array(found[factor]["counts"], dtype=float)
                density = counts / counts.sum() / (2 * REACH / BINS)
                ax.plot(centres, density.clip(1e-5), color=colour, label=f"round {found['number']}")
            gauss = np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi)
            ax.plot(centres, gauss.clip(1e-5), "k--", linewidth=1, label="Gaussian")
            ax.set(
                title=f"{what}s: values of {factor}",
                xlabel=f"in RMS of all rounds, {rms:.2g}",
                ylabel="density",
                yscale="log",
                ylim=(1e-4, 10),
            )
            ax.grid(alpha=0.3, linewidth=0.5)
        spectra = axes[at][2]
        for factor, colour in (("A", report.OURS), ("B", "#ffb000")):
            for found, line in ((rounds[0], "--"), (rounds[-1], "-")):
                values = found[factor]["spectrum"]
                label = f"{factor}, round {found['number']}"
                spectra.plot(range(1, len(values) + 1), values, line, color=colour, label=label)
        product = results("product", "none")
        if what == "update" and product:
            values = product[0]["rounds"][-1]["spectrum"]
            label = "change of B A, last round"
            spectra.plot(range(1, len(values) + 1), values, color="black", label=label)
        spectra.set(
            title=f"{what}s: singular spectrum",
            xlabel="direction",
            ylabel="share of the energy",
            yscale="log",
            ylim=(1e-4, 1),
            xticks=range(1, 17, 3) if what == "update" and product else range(1, 9),
        )
        spectra.grid(alpha=0.3, linewidth=0.5)
        spectra.legend(fontsize=8, frameon=False)
        _surface(figure, axes[at][3], what, "highest", rounds)
        _surface(figure, axes[at][4], what, "lowest", rounds)
        axes[at][0].legend(fontsize=8, frameon=False)
    report.save(figure, path)


def _surface(figure: Any, ax: Any, what: str, which: str, rounds: Sequence[Row]) -> None:
    """The ``which`` (``"highest"``, ``"lowest"``) value by tensor and round.

    Extremes shrink over the rounds, so the round that is nearest to the eye is the last for the
    highest and the first for the lowest: neither surface hides itself.
    """
    import numpy as np

    place = ax.get_subplotspec()
    ax.remove()
    ax = figure.add_subplot(place, projection="3d")
    values = np.array([found[which] for found in rounds])
    tensor, number = np.meshgrid(*(np.arange(size) for size in values.shape[::-1]))
    high = which == "highest"
    colours = "autumn_r" if high else "winter"
    ax.plot_surface(tensor, number + 1, values, cmap=colours, rcount=50, ccount=150)
    ax.set(
        title=f"{what}s: {which} value",
        xlabel="tensor, layer by layer",
        ylabel="round",
        yticks=some(range(1, len(rounds) + 1)),
    )
    if high:
        ax.invert_yaxis()
    ax.view_init(elev=25, azim=-60)


def trained(results: Results, path: Path) -> None:
    """Singular spectra of what was trained in three ways, and the entropy of each weight."""
    figure, (left, right) = report.figure(1, 2, figsize=(13, 4.4))
    looks = {"centralised": "peer", "federation": "reference", "compressed": "paper"}
    known = report.Styles()
    for name in results.schemes("trained"):
        grey = {"color": "#606060", "linestyle": (0, (1, 2)), "marker": "x"}
        style = known.next(looks[name]) if name in looks else grey
        weights = [row["layers"] for row in results("trained", name)]
        every = [layer["spectrum"] for layers in weights for layer in layers]
        spectrum = [mean(values) for values in zip(*every, strict=True)]
        label = TRAININGS[name].title.strip("*")
        left.plot(range(1, len(spectrum) + 1), spectrum, label=label, **style)
        alike = zip(*weights, strict=True)  # a weight, by seed
        right.plot([mean(layer["entropy"] for layer in layers) for layers in alike], **style)
    left.set(
        title="Singular spectrum of B A, mean over weights",
        xlabel="direction",
        ylabel="share of the energy",
        yscale="log",
    )
    left.legend(fontsize=8, frameon=False)
    right.set(title="Matrix entropy of B A", xlabel="adapted weight, layer by layer", ylabel="nats")
    for ax in (left, right):
        ax.grid(alpha=0.3, linewidth=0.5)
    report.save(figure, path)


def fits(results: Results, titles: Mapping[str, str], path: Path) -> None:
    """Cosine of the round's mean by what a codec was fitted on."""
    readings = {"federated": "TGAP in a federation", "local": "TGAP, clients alone"}
    names = [name for name in variants.CODERS if results.has("transfer", name)]
    options = {"figsize": (6 * len(names), 3.8), "sharex": True, "squeeze": False}
    figure, axes = report.figure(1, len(names), **options)
    for ax, name in zip(axes[0], names, strict=True):
        colour = report.COLOURS.get(CODERS[name].kind, ("#404040",))[0]
        bars = {words: results("transfer", name, of) for of, words in titles.items() if of != "own"}
        bars = {words: results("reading", name, of) for of, words in readings.items()} | bars
        control = variants.CONTROLS[name]
        bars[CODERS[control].title] = results("snr", control)
        bars = {words: rows for words, rows in bars.items() if rows}
        values = [metric(rows, "mean", "all", "cosine") or 0.0 for rows in bars.values()]
        ax.barh(list(bars), values, color=[colour] * (len(bars) - 1) + ["#808080"], alpha=0.85)
        ax.invert_yaxis()
        ax.set(title=CODERS[name].title, xlabel="cosine of the round's mean update")
        ax.grid(alpha=0.3, axis="x", linewidth=0.5)
    report.save(figure, path)


def ablation(results: Results, path: Path) -> None:
    """Validation error of each variant over its training."""
    figure, ax = report.figure(figsize=(8.5, 4.6))
    known = report.Styles()
    for name in results.schemes("ablation"):
        variant = variants.VARIANTS[name]
        style = known.next("ours" if variant.smooth else "peer")
        history = results("ablation", name)[0]["history"]
        steps = [line["step"] for line in history]
        ax.plot(steps, [line["val_rse"] for line in history], label=variant.title, **style)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.annotate(
        "sending nothing",
        (1, 1),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    ax.set(
        title="Validation error of literal autoencoders",
        xlabel="training step",
        ylabel="relative squared error",
        yscale="log",
    )
    ax.grid(alpha=0.3, linewidth=0.5)
    _legend(ax)
    report.save(figure, path)
