"""The page of the codecs benchmark: tables, and which goals are met by these very rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.codecs import plots
from benchmarks.codecs.coders import OURS, PEERS, SCHEMES
from benchmarks.codecs.data import SETS, SHORT
from benchmarks.report import Page, Table

PLAIN = ("int8", "int4", "sign", "int8 of 4096", "int4 of 4096", "int2 rms of 64")
DITHERED = (("int8 dithered", "int8"), ("int4 dithered", "int4"))
TURNED = (
    *("int8-rotated", "int4-rotated", "int2-rotated", "sign-rotated", "int8-unbiased"),
    *("int4-unbiased", "int2-unbiased", "int4-rotated, EF", "int4-unbiased, EF"),
    *("gauss4", "gauss4-64", "gauss4 of 32"),
)
SLACK = 1.02
"""Equal bits: ours may have 2 % more than a peer's, for scales that the peer has none of."""


@dataclass(frozen=True)
class Results:
    """The last measurement of each part, by scheme; speeds by scheme and implementation."""

    error: dict[str, rows.Row]
    positions: dict[str, rows.Row]
    speed: dict[tuple[str, str], rows.Row]

    @property
    def default(self) -> str:
        """The implementation that computed ours unless another was asked for."""
        ours = [impl for name, impl in self.speed if name in SCHEMES and impl]
        return ours[0] if ours else "reference"

    def time(self, name: str, what: str) -> rows.Row | None:
        """Encode or decode figures of a scheme: ours by default, a peer's, or the copy's."""
        for impl in (self.default, ""):
            if (name, impl) in self.speed:
                figures: rows.Row = self.speed[name, impl][what]
                return figures
        return None


def load(path: Path) -> Results:
    """The rows that were measured together with the last one of their part."""
    parts: dict[str, list[rows.Row]] = {"error": [], "positions": [], "speed": []}
    for row in rows.read(path):
        parts[row["config"]["part"]].append(row)
    last = {part: list(_alike(found)) for part, found in parts.items()}
    return Results(
        {row["scheme"]: row for row in last["error"]},
        {row["scheme"]: row for row in last["positions"]},
        {(row["scheme"], row["impl"]): row for row in last["speed"]},
    )


def _alike(found: Sequence[rows.Row]) -> Iterator[rows.Row]:
    def key(row: rows.Row) -> object:
        config = {k: v for k, v in row["config"].items() if k != "impl"}
        return config, row["commit"], row["machine"]

    yield from (row for row in found if key(row) == key(found[-1]))


def page(path: Path) -> Page:
    """The page of these rows."""
    results = load(path)
    out = Page("Codecs benchmark", "python -m benchmarks.run codecs")
    out.table("Error at so many bits a value", error_table(results))
    out.table("Positions of the 64 largest of 4096", positions_table(results))
    out.table("Speed on one core", speed_table(results))
    out.lines(goals(results), "Goals")
    out.lines(_notes(results))
    out.plots({"": functools.partial(plots.draw, results.error, _bars(results))})
    return out


def error_table(results: Results) -> Table:
    """NMSE and cosine on each set, by bits."""
    heads = [f"{SHORT[s]}: {what}" for s in SETS for what in ("NMSE", "cosine")]
    out: Table = [("scheme", "bits", *heads)]
    for name, row in sorted(results.error.items(), key=lambda item: -item[1]["gradient"]["bits"]):
        cells = []
        for s in SETS:
            # PowerSGD's bits depend on shapes.
            other = row[s]["bits"] > SLACK * row["gradient"]["bits"]
            at = f" at {row[s]['bits']:.2f}" if other else ""
            cells += [f"{row[s]['nmse']:.3g}{at}", f"{row[s]['cosine']:.4f}"]
        out.append((_shown(name), f"{row['gradient']['bits']:.3f}", *cells))
    return out


def positions_table(results: Results) -> Table:
    """Bits and nanoseconds of a position, and what that makes of a kept value of 4 bits."""
    out: Table = [("code", "bits", "with 4-bit values", "known before", "encode ns", "decode ns")]
    for name, row in results.positions.items():
        fixed = {"packed": "yes", "elias-fano": "yes", "bound": "-"}.get(name, "no")
        spent = f"{row['bits'] + 4.25:.2f}"
        times = [f"{row[w]:.1f}" if w in row else "-" for w in ("encode_ns", "decode_ns")]
        out.append((name, f"{row['bits']:.2f}", spent, fixed, *times))
    return out


def speed_table(results: Results) -> Table:
    """GB of fp32 a second and its ratio to the copy, both ways."""
    head = [f"{w}{u}" for w in ("encode", "decode") for u in (" GB/s", " / copy", " peak")]
    out: Table = [("scheme", "by", "bits", *head)]
    for (name, impl), row in results.speed.items():
        cells: list[str] = []
        for what in ("encode", "decode"):
            peak = row[what].get("peak_of_input")
            cells += [f"{row[what]['gb_s']:.2f}", f"{row[what]['of_copy']:.3f}"]
            cells += ["-" if peak is None else f"{peak:.2f}x"]
        bits = f"{row['bits']:.3f}" if "bits" in row else "32"
        out.append((_shown(name), impl or "-", bits, *cells))
    return out


def _shown(name: str) -> str:
    return f"{name} (peer)" if name in {s.name for s in PEERS} else name


# -- goals -----------------------------------------------------------------------------------------


def goals(results: Results) -> list[str]:
    """Each goal as a line that begins with ``met`` or ``missed``."""
    out = [
        *_fast_enough(results, PLAIN, 1.0, "without rotation"),
        *_fast_enough(results, TURNED, 0.5, "with rotation"),
    ]
    for dithered, nearest in DITHERED:
        pair = [results.time(name, "encode") for name in (dithered, nearest)]
        if pair[0] and pair[1]:
            times = pair[0]["ms"][1] / pair[1]["ms"][1]
            out.append(
                f"{_word(times <= 1.5)}: {dithered} takes {times:.2f}x the time of {nearest}"
            )
    out += [line for peer in PEERS for line in _ahead(results, peer.name)]
    return out


def _fast_enough(results: Results, names: Sequence[str], least: float, how: str) -> list[str]:
    out = []
    for what in ("encode", "decode"):
        speeds = {n: t["gb_s"] for n in names if (t := results.time(n, what)) is not None}
        slow = {n: s for n, s in speeds.items() if s < least}
        told = slow or {n: s for n, s in speeds.items() if s == min(speeds.values())}
        if speeds:
            words = "; ".join(f"{n} {s:.2f}" for n, s in told.items())
            title = f"{what} {how} at least {least:g} GB/s"
            out.append(f"{_word(not slow)}: {title}, {'below it' if slow else 'slowest'}: {words}")
    return out


def _ahead(results: Results, peer: str) -> Iterator[str]:
    """On each set, whether a scheme of ours with no more bits is faster and errs less."""
    theirs, took = results.error.get(peer), _both_ways(results, peer)
    if theirs is None or took is None:
        return
    for s in SETS:
        ours = [
            (
                time < took and row[s]["nmse"] < theirs[s]["nmse"],
                -row[s]["nmse"],
                time,
                scheme.name,
            )
            for scheme in OURS
            if (row := results.error.get(scheme.name)) is not None
            and (time := _both_ways(results, scheme.name)) is not None
            and row[s]["bits"] <= SLACK * theirs[s]["bits"]
        ]
        if not ours:
            bits = f"{theirs[s]['bits']:.3f} bits, as {peer} on {SHORT[s]}"
            yield f"missed: nothing of ours has {bits}"
            continue
        ahead, lost, time, name = max(ours)
        less = -lost / theirs[s]["nmse"]
        bits = f"{results.error[name][s]['bits']:.3g} bits for {theirs[s]['bits']:.3g}"
        yield (
            f"{_word(ahead)}: ahead of {peer} on {SHORT[s]} by {name}, {bits}: "
            f"{less:.3g}x the NMSE, {took / time:.1f}x as fast"
        )


def _both_ways(results: Results, name: str) -> float | None:
    """Milliseconds to encode and decode: what some leave to the one, others do in the other."""
    found = [results.time(name, what) for what in ("encode", "decode")]
    return None if None in found else sum(f["ms"][1] for f in found if f)


def _word(good: bool) -> str:
    return "met" if good else "missed"


def _bars(results: Results) -> list[tuple[str, str, float, float]]:
    """Scheme, implementation, encode and decode over copy."""
    return [
        (name, impl, row["encode"]["of_copy"], row["decode"]["of_copy"])
        for (name, impl), row in results.speed.items()
        if name != "copy"
    ]


def _notes(results: Results) -> list[str]:
    any_row = next(iter([*results.speed.values(), *results.error.values()]), None)
    if any_row is None:
        return []
    copy = results.time("copy", "encode")
    peers = sorted({row["package"] for row in results.error.values() if "package" in row})
    out = [
        f"{any_row['machine']}, one thread, torch {any_row['versions']['torch']}, commit "
        f"{any_row['commit']}; {', '.join(p for p in peers if not p.startswith('gradcodec'))}",
        "bits: of the bytes that cross the wire, scales and positions included; GB/s: of fp32 "
        "values, median by the clock; peak: resident memory beyond what there was, over the input",
        "gradients: all parameters of the embedded LLaMA, over batches; updates: LoRA adapters "
        "after 8 local steps; noise: standard normal",
        "PowerSGD computes both of its products in what is called encode; a goal `ahead` compares "
        "encode and decode together, with the scheme of ours that errs least of those that are "
        "ahead, or of all",
    ]
    if copy:
        out.append(f"the copy: {copy['gb_s']:.1f} GB/s of values, each read and written once")
    return out
