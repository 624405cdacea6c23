"""Bytes on TCP, losses and seconds of a Flower deployment, with and without compression.

    python -m benchmarks.run flower [--quick]

A SuperLink and two SuperNodes on this machine run two apps, the second only for its bytes:

    embedded   ``examples/flower_llama``: the embedded LLaMA with LoRA, 98,304 values in 48 tensors
    lora-1b    ``benchmarks/flower/lora_1b``: factors of the sizes of Llama-3.2-1B's (r = 16 on q
               and v), 1,703,936 values in 64 tensors, moved without a model

Nodes reach the SuperLink through a proxy that counts bytes, requests and headers included. Seconds
are those from ``flwr run`` to the end of the last round; most of them go into starting a process
for each message.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import report, rows
from benchmarks.report import Page, Table, times
from benchmarks.run import ROOT, Options, check_names

CASE = "flower"
REFERENCE = "fp32"

#: Folder, local steps and rounds (in a quick run) of each app.
APPS: Mapping[str, tuple[Path, int, int, int]] = MappingProxyType(
    {
        "embedded": (ROOT / "examples" / "flower_llama", 4, 8, 3),
        "lora-1b": (Path(__file__).parent / "lora_1b", 1, 10, 3),
    }
)

#: Codecs up and down, by scheme; empty: Flower alone. ``subspace:auto`` is ``CodecFedAvg``'s, the
#: others are ``CodecGrid``'s.
SCHEMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        REFERENCE: ("", ""),
        "int8": ("int8", "int8"),
        "int4": ("int4", "int4"),
        "sign-rotated": ("sign-rotated", "int4-rotated"),
        "subspace:auto": ("subspace:auto", ""),
    }
)
QUICK = (REFERENCE, "int4", "subspace:auto")


def main(options: Options) -> list[str]:
    """Run what has no row yet; print the tables."""
    names = options.schemes or (QUICK if options.quick else tuple(SCHEMES))
    check_names(names, SCHEMES)
    path = options.out / f"{CASE}.jsonl"
    known = {row["run"] for row in rows.read(path)}
    for app, (folder, steps, whole, quick) in APPS.items():
        rounds = options.rounds or (quick if options.quick else whole)
        for name in names:
            up, down = SCHEMES[name]
            settings = {"rounds": rounds, "steps": steps, "codec": up, "downlink": down}
            stamp = rows.stamp(CASE, name, 0, {"app": app, "nodes": 2, **settings})
            if stamp["run"] in known and not options.again:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                found = _example().run(settings, Path(scratch), folder)
            rows.append(path, {**stamp, **found})
            print(app, name, found, flush=True)
    made = page(path)
    print("no row of fp32 yet" if made is None else made.write(path))
    return []


def _example() -> Any:
    """The script of the example, which starts deployments."""
    script = APPS["embedded"][0] / "run.py"
    spec = importlib.util.spec_from_file_location("flower_llama_run", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(path: Path) -> Page | None:
    """The page of each app's rows with as many rounds as its longest run."""
    made = report.Page("Flower, deployed on one machine", f"python -m benchmarks.run {CASE}")
    plots = {}
    for app in APPS:
        found = [row for row in rows.read(path) if row["config"]["app"] == app]
        longest = max((row["config"]["rounds"] for row in found), default=0)
        last = {row["scheme"]: row for row in found if row["config"]["rounds"] == longest}
        if REFERENCE not in last:
            continue
        reference = last[REFERENCE]
        title = f"{app}: TCP bytes of two nodes in {longest} rounds"
        made.table(title, _table(list(last.values()), reference))
        made.lines(
            [
                f"torch {reference['versions']['torch']}, {reference['machine']}; "
                f"loss before the first round {reference['losses'][0]:.4f}"
            ]
        )
        plots[f"-{app}"] = partial(_plot, list(last.values()), title)
    if not plots:
        return None
    made.lines(
        [
            "the first message to each node holds the whole model, but with `subspace:auto`, where "
            "nodes build it themselves",
            "the loss of lora-1b is the distance to a point, and says nothing about models",
        ],
        "Notes",
    )
    made.plots(plots)
    return made


def _plot(found: Sequence[rows.Row], title: str, path: Path) -> None:
    """Bars of megabytes up and down, on a logarithmic axis."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.7 * len(found) + 1.2), layout="constrained")
    places = range(len(found))
    for way, shift in (("up", -0.2), ("down", 0.2)):
        values = [row[way] / 1e6 for row in found]
        bars = axes.barh([p + shift for p in places], values, 0.38, label=way)
        axes.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_yticks(places, [row["scheme"] for row in found])
    axes.invert_yaxis()
    axes.set_xlabel("MB on TCP")
    axes.set_title(title, fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(found: Sequence[rows.Row], reference: rows.Row) -> Table:
    out: Table = [("scheme", "up", "down", "up ratio", "both ways", "loss", "seconds")]
    whole = reference["up"] + reference["down"]
    out += [
        (
            row["scheme"],
            f"{row['up']:,}",
            f"{row['down']:,}",
            times(reference["up"] / row["up"]),
            times(whole / (row["up"] + row["down"])),
            f"{row['losses'][-1]:.4f}",
            f"{row['seconds']:.0f}",
        )
        for row in found
    ]
    return out
