"""The README's table, made from committed rows.

    python -m benchmarks.llama.readme_table [--write]

A test compares the two, so the page cannot say what was not measured.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from benchmarks.federated.figures import REFERENCE, Costs, gain, load
from benchmarks.llama.schemes import SCHEMES
from benchmarks.report import times
from benchmarks.run import RESULTS, ROOT
from gradcodec.recipes.report import size

ROWS = RESULTS / "llama-gsm8k.jsonl"
PLACE = re.compile(r"<!-- llama -->\n.*?<!-- /llama -->", re.DOTALL)
SHOWN = (REFERENCE, "eden-1", "sign-ef-both", "sub-8", "sub-64-own")
HEAD = ("way of sending", "gain kept", "a reply", "fewer up", "both ways", "with its codec")


def markdown(path: Path = ROWS) -> str:
    """One row per scheme, and a line on where the numbers are from."""
    runs = load(path)
    first = next(iter(runs[REFERENCE].values()))[0]
    config = first["config"]
    lines = ["| " + " | ".join(HEAD) + " |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    for name in SHOWN:
        by_seed = runs[name]
        costs = Costs.of(list(by_seed.values()))
        reference = Costs.of([runs[REFERENCE][seed] for seed in by_seed])
        kept = [gain(run) / gain(runs[REFERENCE][seed]) for seed, run in by_seed.items()]
        fewer = len(by_seed) < len(runs[REFERENCE])
        twice = config["rounds"] * config["per_round"] // config["clients"]
        cells = (
            SCHEMES[name].title + (f" ({len(by_seed)} seeds)" if fewer else ""),
            f"{statistics.fmean(kept):.1%}",
            size(costs.up).replace(" ", "&nbsp;"),
            times(reference.up / costs.up),
            times(costs.ratio(reference)),
            times(costs.ratio(reference, twice)) if costs.codec else "",
        )
        bold = SCHEMES[name].kind == "ours"
        lines.append("| " + " | ".join(f"**{c}**" if bold and c else c for c in cells) + " |")
    seeds = ", ".join(str(s) for s in sorted(runs[REFERENCE]))
    legend = (
        "*Gain kept*: the share of fp32's progress on held-out questions that is left. *A reply*: "
        "what one client sends in a round. *Fewer up*: how many times fewer bytes clients send "
        "than with fp32. *Both ways*: the same, with what they receive. *With its codec*: the "
        "same, with one download of the codec, for a client that takes part twice, as here. Bold: "
        "ours."
    )
    note = (
        f"SmolLM2-135M, fine-tuned by LoRA on GSM8K; {config['per_round']} of {config['clients']} "
        f"clients in each of {config['rounds']} rounds; seeds {seeds}. Made by `python -m "
        "benchmarks.run llama`: [all rows, and how](benchmarks/results/llama-gsm8k.md)."
    )
    return "\n".join([*lines, "", legend, "", note])


def filled(text: str) -> str:
    """The page with the table in its place."""
    table = markdown()
    return PLACE.sub(lambda _: f"<!-- llama -->\n{table}\n<!-- /llama -->", text)


if __name__ == "__main__":
    page = ROOT / "README.md"
    if "--write" in sys.argv:
        page.write_text(filled(page.read_text()))
    print(markdown())
