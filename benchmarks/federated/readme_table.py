"""The README's table, made from committed rows.

    python -m benchmarks.federated.readme_table [--write]

A test compares the two, so the page cannot say what was not measured.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from benchmarks.federated.case import SCHEMES
from benchmarks.federated.figures import REFERENCE, Costs, gain, load, present
from benchmarks.report import times
from benchmarks.run import RESULTS, ROOT
from gradcodec.recipes.report import size

ROWS = RESULTS / "federated.jsonl"
PLACE = re.compile(r"<!-- federated -->\n.*?<!-- /federated -->", re.DOTALL)
HEAD = ("way of sending", "gain kept", "uplink", "ratio", "both ways", "+ codec", "codec")


def markdown(path: Path = ROWS) -> str:
    """One row per scheme, and a line on where the numbers are from."""
    runs = load(path)
    first = next(iter(runs[REFERENCE].values()))[0]
    config = first["config"]
    lines = ["| " + " | ".join(HEAD) + " |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    for scheme, by_seed in present(runs, list(SCHEMES.values())):
        costs = Costs.of(list(by_seed.values()))
        reference = Costs.of([runs[REFERENCE][seed] for seed in by_seed])
        kept = [gain(run) / gain(runs[REFERENCE][seed]) for seed, run in by_seed.items()]
        failed = any(run[-1]["diverged"] for run in by_seed.values())
        fewer = set(by_seed) != set(runs[REFERENCE])
        cells = (
            scheme.title + (f" (seed {', '.join(map(str, by_seed))} only)" if fewer else ""),
            "diverged" if failed else f"{statistics.fmean(kept):.1%}",
            size(costs.up),
            times(reference.up / costs.up),
            times(costs.ratio(reference)),
            times(costs.ratio(reference, config["rounds"])) if costs.codec else "",
            size(costs.codec) if costs.codec else "-",
        )
        bold = scheme.kind == "ours"
        lines.append("| " + " | ".join(f"**{c}**" if bold and c else c for c in cells) + " |")
    rounds, seeds = config["rounds"], ", ".join(str(s) for s in sorted(runs[REFERENCE]))
    note = (
        f"*Gain kept*: decrease of the held-out loss over fp32's, after {rounds} rounds, mean of "
        f"seeds {seeds}; *uplink*: bytes of one reply on the wire; ratios: bytes of fp32 over its "
        "own, uplink, both directions, and those with the codec's download by a client "
        f"that takes part in all {rounds} rounds. Embedded LLaMA, {config['per_round']} of "
        f"{config['clients']} Dirichlet(0.5) clients a round; every scheme with a learning rate "
        "from the same grid, found on another seed. Made by `python -m benchmarks.run tune "
        f"federated` (torch {first['versions']['torch']}, CPU); rows, all figures, costs to a "
        "target: [benchmarks/results/federated.md](benchmarks/results/federated.md)."
    )
    return "\n".join([*lines, "", note])


def filled(text: str) -> str:
    """The page with the table in its place."""
    table = markdown()
    return PLACE.sub(lambda _: f"<!-- federated -->\n{table}\n<!-- /federated -->", text)


if __name__ == "__main__":
    page = ROOT / "README.md"
    if "--write" in sys.argv:
        page.write_text(filled(page.read_text()))
    print(markdown())
