"""The page of ``growth.jsonl``: what grows with values, with clients, and with ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report, rows
from benchmarks.ddp.schemes import SCHEMES
from benchmarks.growth import ranks
from benchmarks.report import Page, Table
from gradcodec.recipes.report import size

SERVER = "server"
Sizes = Mapping[str, Mapping[int, rows.Row]]
"""Rows by codec and by the number of values that was asked for."""


def load(path: Path) -> tuple[Sizes, dict[int, rows.Row]]:
    """The last row of every codec and size, and of every number of replies."""
    coded: dict[str, dict[int, rows.Row]] = {}
    served: dict[int, rows.Row] = {}
    for row in rows.read(path):
        if row["scheme"] == SERVER:
            served[row["config"]["replies"]] = row
        else:
            coded.setdefault(row["scheme"], {})[row["config"]["numel"]] = row
    return {n: dict(sorted(s.items())) for n, s in coded.items()}, dict(sorted(served.items()))


def growth_rows(coded: Sizes) -> Table:
    """By codec: its largest size, time over a copy's at a hundredth of it and at it, memory."""
    times = [f"{what} / copy, {at}" for what in ("encode", "decode") for at in ("1/100", "all")]
    out: Table = [("codec", "values", *times, "encode peak", "decode peak")]
    for name, sizes in coded.items():
        last = max(sizes)
        pair = (sizes.get(last // 100), sizes[last])
        cells = [_of_copy(row, f"{what}_s") for what in ("encode", "decode") for row in pair]
        peaks = [_peak(sizes[last], what) for what in ("encode", "decode")]
        out.append((name, _count(last), *cells, *peaks))
    return out


def size_rows(coded: Sizes, what: str) -> Table:
    """Time over that of a copy, by codec and size."""
    numels = sorted({numel for sizes in coded.values() for numel in sizes})
    out: Table = [("codec", *map(_count, numels))]
    out += [(name, *(_of_copy(s.get(n), what) for n in numels)) for name, s in coded.items()]
    return out


def peak_rows(coded: Sizes, what: str) -> Table:
    """Peak memory over the bytes of the update, by codec and size."""
    numels = sorted({numel for sizes in coded.values() for numel in sizes})
    out: Table = [("codec", *map(_count, numels))]
    for name, sizes in coded.items():
        out.append((name, *(_peak(sizes[n], what) if n in sizes else "-" for n in numels)))
    return out


def server_rows(served: Mapping[int, rows.Row]) -> Table:
    """What a round's replies add to a server's memory."""
    out: Table = [("replies", "their bytes", "memory grows by", "of one decoded reply")]
    for replies, row in served.items():
        state = 4 * row["config"]["numel"]
        grown = row["grown_bytes"]
        cells = (size(row["sent_bytes"]), size(grown), f"{grown / state:.1f}x")
        out.append((f"{replies:,}", *cells))
    return out


def rank_rows(works: Mapping[str, ranks.Work]) -> Table:
    """Plain DDP's step over each scheme's, by link and number of ranks; computed."""
    out: Table = [("link", "scheme", *(f"{world:,} ranks" for world in ranks.RANKS))]
    dense = works[ranks.DENSE]
    for link, alpha in ranks.LINKS.items():
        beta = link.bytes_per_second
        assert beta is not None
        for name, work in works.items():
            steps = [work.step(w, beta, alpha) for w in ranks.RANKS]
            if name == ranks.DENSE:
                cells = [f"{seconds:.2f} s" for seconds in steps]
            else:
                cells = [
                    f"{dense.step(w, beta, alpha) / seconds:.2f}x"
                    for w, seconds in zip(ranks.RANKS, steps, strict=True)
                ]
            out.append((link.name, SCHEMES[name].title, *cells))
    return out


def check_rows(path: Path, works: Mapping[str, ranks.Work]) -> Table:
    """The model beside what was measured: steps of plain DDP over those of a scheme."""
    out: Table = [("ranks", "link", "scheme", "computed", "measured")]
    dense = works[ranks.DENSE]
    for world in (2, 4):
        for name, mbit in (("100mbit", 100), ("1gbit", 1000)):
            found = ranks.measured(path, world, name)
            beta, alpha = mbit * 1e6 / 8, 1e-4
            for scheme in (s for s in works if s != ranks.DENSE and s in found):
                computed = dense.step(world, beta, alpha) / works[scheme].step(world, beta, alpha)
                measured = found[ranks.DENSE] / found[scheme]
                cells = (SCHEMES[scheme].title, f"{computed:.2f}x", f"{measured:.2f}x")
                out.append((str(world), name, *cells))
    return out


def page(path: Path) -> Page | None:
    """The page of these rows; ``None`` while no codec was measured."""
    coded, served = load(path)
    if not coded:
        return None
    last = next(reversed(next(iter(coded.values())).values()))
    made = Page("How it grows", "python -m benchmarks.run growth")
    made.table("By the largest update of each codec", growth_rows(coded))
    made.table("Encoding: time, of a copy of the update", size_rows(coded, "encode_s"))
    made.table("Decoding: time, of a copy of the update", size_rows(coded, "decode_s"))
    made.table("Encoding: peak memory, of the update", peak_rows(coded, "encode"))
    made.table("Decoding: peak memory, of the update", peak_rows(coded, "decode"))
    plots: dict[str, report.Draw] = {"-values": partial(draw_values, coded)}
    if served:
        made.table("Clients: memory of a server's round", server_rows(served))
    works = ranks.works(path.with_name("ddp.jsonl"))
    if works:
        made.table(
            "Ranks: plain DDP's step, and how many times faster others are", rank_rows(works)
        )
        made.table("The model beside measurements", check_rows(path.with_name("ddp.jsonl"), works))
        plots["-ranks"] = partial(draw_ranks, works)
        made.lines(_assumptions(), "The model: seconds of a step with W ranks, computed")
    made.lines(notes(last, served), "How to read this")
    made.plots(plots)
    return made


def notes(row: rows.Row, served: Mapping[int, rows.Row]) -> list[str]:
    """Where the numbers are from."""
    out = [
        f"torch {row['versions']['torch']}, {row['machine']}, one thread; commit "
        f"{row['commit'][:7]}; a LoRA adapter (r = 8; q, k, v, o) of noise, to and from bytes",
        "time is the processor's, not the clock's, over that of a copy of the update of the same "
        "size, in turns with it: what is as many copies at every size grows like the update; a "
        "small update fits into caches, and each call has a cost of its own",
        "peak: resident memory beyond what there was, the result included, over the bytes of the "
        "update; below a megabyte it is mostly the allocator's",
    ]
    if served:
        config = next(iter(served.values()))["config"]
        out.append(
            f"clients: replies of {config['numel']:,} values in {config['codec']}, received and "
            f"added up one by one; the server holds up to {size(config['hold_bytes'])} of the "
            "loudest as bytes; memory is that of the process beyond one reply's"
        )
    return out


def _assumptions() -> list[str]:
    """The list in the docstring of ``ranks``, which is where the model is."""
    text = (ranks.__doc__ or "").partition("assumptions:\n\n")[2].replace("``", "`")
    return [" ".join(item.split()) for item in text.removeprefix("- ").split("\n- ")]


def _of_copy(row: rows.Row | None, what: str) -> str:
    return "-" if row is None else f"{row[what] / row['copy_s']:.1f}"


def _peak(row: rows.Row, what: str) -> str:
    return "-" if row[f"{what}_peak_bytes"] is None else f"{_share(row, what):.2f}x"


def _count(numel: int) -> str:
    return f"1e{round(math.log10(numel))}" if math.log10(numel) % 1 == 0 else f"{numel:,}"


# -- plots -----------------------------------------------------------------------------------------


def draw_values(coded: Sizes, to: Path) -> None:
    """Time and memory of encoding and decoding against the number of values."""
    figure, axes = report.figure(2, 2, figsize=(12, 8), sharex=True)
    for column, what in enumerate(("encode", "decode")):
        _lines(axes[0][column], coded, lambda r, w=what: r[f"{w}_s"] / r["copy_s"])
        _lines(axes[1][column], coded, lambda r, w=what: _share(r, w))
        axes[0][column].set_title(what)
        axes[1][column].set_xlabel("values")
    axes[0][0].set_ylabel("time / time of a copy")
    axes[1][0].set_ylabel("peak memory / bytes of the update")
    axes[0][1].legend(frameon=False, fontsize=7, ncols=2)
    report.save(figure, to)


def _share(row: rows.Row, what: str) -> float:
    return (row[f"{what}_peak_bytes"] or 0) / row["update_bytes"]


def _lines(axes: Any, coded: Sizes, figure_of: Any) -> None:
    for i, (name, sizes) in enumerate(coded.items()):
        points = [(r["numel"], figure_of(r)) for r in sizes.values()]
        kept = [(x, y) for x, y in points if y > 0]
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10 % 2]}
        axes.plot([x for x, _ in kept], [y for _, y in kept], marker=".", label=name, **style)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)


def draw_ranks(works: Mapping[str, ranks.Work], to: Path) -> None:
    """Plain DDP's step over each scheme's against the number of ranks, a panel for each link."""
    figure, panels = report.figure(1, len(ranks.LINKS), figsize=(14, 4.5), sharey=True)
    for axes, (link, alpha) in zip(panels, ranks.LINKS.items(), strict=True):
        beta = link.bytes_per_second
        assert beta is not None
        _ratios(axes, works, ranks.RANKS, beta, alpha)
        axes.set_title(link.name)
        axes.set_xlabel("ranks")
    panels[0].set_ylabel("plain DDP's step / the scheme's, computed")
    panels[-1].legend(frameon=False, fontsize=7)
    report.save(figure, to)


def _ratios(
    axes: Any, works: Mapping[str, ranks.Work], worlds: Sequence[int], beta: float, alpha: float
) -> None:
    styles = report.Styles()
    dense = works[ranks.DENSE]
    for name, work in works.items():
        kind = "reference" if name == ranks.DENSE else SCHEMES[name].kind
        ratio = [dense.step(w, beta, alpha) / work.step(w, beta, alpha) for w in worlds]
        axes.plot(worlds, ratio, label=SCHEMES[name].title, **styles.next(kind))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
