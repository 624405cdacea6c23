"""The README's table, made from committed results: ``python -m benchmarks.readme_table [--write]``.

A test compares the two, so the page cannot say what was not measured.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from gradcodec.recipes.report import size

ROOT = Path(__file__).parents[1]
SUMMARY = ROOT / "benchmarks" / "results" / "demo-full" / "summary.json"
PLACE = re.compile(r"<!-- demo-full -->\n.*?<!-- /demo-full -->", re.DOTALL)


def markdown(summary: dict[str, Any]) -> str:
    """One row per scheme that sends something, and a line on where the numbers are from."""
    config, versions = summary["config"], summary["versions"]
    rows = [
        "| way of sending | loss | gain kept | uplink | ratio | both ways | + codec | codec |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for s in summary["schemes"]:
        sent = s["uplink_bytes"] > 0
        cells = (
            s["title"],
            f"{s['final_loss']:.3f}",
            f"{s['gain_kept']:.1%}" if s["gain_kept"] is not None else "",
            size(s["uplink_bytes"]) if sent else "-",
            _times(s["uplink_ratio"]) if sent else "-",
            _times(s["total_ratio"]) if sent else "-",
            _times(s["total_ratio_with_codec"]) if sent else "-",
            size(s["codec_bytes"]) if s["codec_bytes"] else "-",
        )
        bold = s["name"] in ("subspace-7", "subspace-32")
        rows.append("| " + " | ".join(f"**{c}**" if bold else c for c in cells) + " |")
    start = summary["schemes"][0]["start_loss"]
    note = (
        f"Held-out loss of the embedded LLaMA (before: {start:.3f}), {config['rounds']} rounds, "
        f"{round(config['fraction'] * config['clients'])} of {config['clients']} clients a round; "
        "*gain kept*: share of the fp32 run's loss decrease; ratios: wire bytes of fp32 over wire "
        "bytes, uplink, both directions, and with the codec's download by every participant. "
        f"Made by `make demo-full` (seed {config['seed']}, torch {versions['torch']}, CPU); rows: "
        "[benchmarks/results/demo-full](benchmarks/results/demo-full)."
    )
    return "\n".join([*rows, "", note])


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def filled(text: str) -> str:
    """The page with the table in its place."""
    table = markdown(json.loads(SUMMARY.read_text()))
    return PLACE.sub(lambda _: f"<!-- demo-full -->\n{table}\n<!-- /demo-full -->", text)


if __name__ == "__main__":
    page = ROOT / "README.md"
    if "--write" in sys.argv:
        page.write_text(filled(page.read_text()))
    print(markdown(json.loads(SUMMARY.read_text())))
