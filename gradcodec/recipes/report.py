"""What a person looks at: the table and the plots of a run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradcodec.errors import ConfigError


def table(summary: Mapping[str, Any]) -> str:
    """The comparison as aligned text, one scheme a row; readable without the plots."""
    head = (
        "scheme",
        "loss",
        "gain kept",
        "accuracy",
        "uplink",
        "ratio",
        "both ways",
        "+ codec",
        "codec",
        "SNR dB",
        "enc+dec s",
    )
    rows = [head]
    for s in summary["schemes"]:
        coded = s["uplink_ratio"] is not None
        snr = [x for x in s["mean_snr_db"] if _finite(x)]
        failed = s["rounds"] < summary["config"]["rounds"] and s["name"] != "base"
        rows.append(
            (
                s["title"] + (f" (stopped after round {s['rounds']})" if failed else ""),
                f"{s['final_loss']:.3f}" if _finite(s["final_loss"]) else "diverged",
                "" if s["gain_kept"] is None else f"{s['gain_kept']:.1%}",
                f"{s['accuracy']:.0%}",
                size(s["uplink_bytes"]) if coded else "-",
                f"{s['uplink_ratio']:.0f}x" if coded else "-",
                f"{s['total_ratio']:.0f}x" if coded else "-",
                f"{s['total_ratio_with_codec']:.0f}x" if coded else "-",
                size(s["codec_bytes"]) if s["codec_bytes"] else "-",
                f"{sum(snr) / len(snr):.1f}" if coded and snr else "-",
                f"{s['encode_s'] + s['decode_s']:.2f}" if coded else "-",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    start = summary["schemes"][0]["start_loss"]
    config = summary["config"]
    lines.append("")
    lines.append(
        f"held-out loss before: {start:.3f}; {config['rounds']} rounds, "
        f"{config['clients']} clients; ratios: wire bytes of fp32 / wire bytes"
    )
    if summary["tgap"]:
        gathered = summary["tgap"]["uplink_bytes"] + summary["tgap"]["downlink_bytes"]
        lines.append(
            f"TGAP on D1: {size(gathered)} sent uncompressed, once, for all codecs; not in ratios"
        )
        statistics = summary["tgap"].get("statistics_bytes_per_client")
        if statistics:
            lines.append(f"and {size(statistics)} of gradient statistics from each client in it")
    return "\n".join(lines)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def size(count: float) -> str:
    """A number of bytes for people: ``4.10 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def require_matplotlib() -> None:
    """Raises ``ConfigError`` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'gradcodec[examples]'")


def plot(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw loss against rounds and bytes, SNR per round, and the autoencoders' training.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # A curve ends where its scheme stopped; values that are not finite cannot be drawn.
    schemes = [
        {**s, "losses": [x if _finite(x) else math.nan for x in s["losses"]]}
        for s in summary["schemes"]
        if any(_finite(x) for x in s["losses"])
    ]
    colours = {
        s["name"]: plt.get_cmap("tab20")(2 * i % 20 + (i >= 10)) for i, s in enumerate(schemes)
    }
    top = summary["schemes"][0]["start_loss"]
    written = []

    def draw(
        name: str, title: str, x_label: str, y_label: str, lines: Sequence[Any], **axes: Any
    ) -> None:
        figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for s, xs, ys in lines:
            style = "--" if s["name"] == "fp32" else "o-"
            colour = "black" if s["name"] == "fp32" else colours[s["name"]]
            above = "ylim" in axes and min(ys) > axes["ylim"][1]
            label = s["title"] + (" (above the chart)" if above else "")
            ax.plot(xs, ys, style, label=label, markersize=3.5, linewidth=1.6, color=colour)
        ax.set(title=title, xlabel=x_label, ylabel=y_label, **axes)
        if "xscale" not in axes:
            ax.locator_params(axis="x", integer=True)  # rounds
        ax.grid(alpha=0.3)
        if lines:
            ax.legend(fontsize=8)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)

    # The first round does most of the work, and a codec may destroy the model: neither
    # may flatten the curves that are to be compared.
    low = min([top, *(x for s in schemes for x in s["losses"] if math.isfinite(x))])
    fall = max(top - low, 0.01)
    span = {"ylim": (low - 0.02 * fall, low + 0.4 * fall)}
    rounds = [(s, range(1, len(s["losses"]) + 1), s["losses"]) for s in schemes]
    draw("loss_rounds", "Held-out loss", "round", "nats per token", rounds, **span)
    sent = [s for s in schemes if s["uplink_bytes"]]
    draw(
        "loss_bytes",
        "Held-out loss against bytes",
        "cumulative wire bytes, both directions",
        "nats per token",
        [(s, s["cumulative_bytes"], s["losses"]) for s in sent],
        xscale="log",
        **span,
    )
    finite = [
        (
            s,
            [i + 1 for i, v in enumerate(s["mean_snr_db"]) if _finite(v)],
            [v for v in s["mean_snr_db"] if _finite(v)],
        )
        for s in sent
    ]
    draw(
        "snr",
        "What arrives of the mean update",
        "round",
        "SNR in dB (0 = nothing)",
        [line for line in finite if line[1]],
    )
    return written


def plot_training(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """The autoencoders' training curves: relative squared error on held-out snapshots, per step."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for name, rows in histories.items():
        ax.plot(
            [r["step"] for r in rows], [r["val_rse"] for r in rows], "o-", label=name, markersize=3
        )
    ax.axhline(1.0, color="grey", linewidth=1, linestyle=":", label="sending nothing")
    ax.set(
        title="TGAP: autoencoder training",
        xlabel="step",
        ylabel="relative squared error",
        yscale="log",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
