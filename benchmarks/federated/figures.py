"""The figures in the federated benchmark's tables and plots: gains, targets, bytes.

*Gain kept* is a run's decrease of the held-out loss over that of fp32 with the same seed. *Cost to
a target* is what had crossed the wire after the first round at whose end that share of fp32's
final gain was reached; nothing is interpolated. Ratios are bytes of fp32 over bytes of the scheme.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.federated.scheme import Scheme

REFERENCE = "fp32"
TARGETS = (0.80, 0.90, 0.95, 0.98, 1.00)

#: What is counted, cumulative over all clients; the last with the codec's download by each of them.
WAYS = {
    "uplink": "uplink",
    "both": "both directions",
    "codec": "both directions, with codec downloads",
}


BySeed = Mapping[int, list[rows.Row]]
"""Rows of one scheme in the order of rounds, by seed."""
Runs = dict[str, dict[int, list[rows.Row]]]
"""The same, by the name of the scheme."""


def load(path: Path) -> Runs:
    """The finished runs; of a scheme and seed with several (other rates) the last one begun.

    Only those of the longest number of rounds count, so that trials do no harm.
    """
    ended = [run for run in rows.runs(path).values() if rows.finished(run)]
    rounds = max((run[0]["config"]["rounds"] for run in ended), default=0)
    out: Runs = {}
    for run in ended:
        if run[0]["config"]["rounds"] == rounds:
            out.setdefault(run[0]["scheme"], {})[run[0]["seed"]] = run
    return out


def gain(run: Sequence[rows.Row]) -> float:
    """Decrease of the held-out loss; NaN where training diverged."""
    last = run[-1]
    return math.nan if last["diverged"] else last["start_loss"] - last["loss"]


def reached(
    run: Sequence[rows.Row], reference: Sequence[rows.Row], share: float
) -> rows.Row | None:
    """The first round of ``run`` at whose end ``share`` of the reference's final gain is there."""
    wanted = reference[-1]["loss"] + (1 - share) * gain(reference)
    return next((r for r in run if not r["diverged"] and r["loss"] <= wanted), None)


def sent(row: rows.Row, way: str) -> int:
    """Bytes of all clients until the end of a row's round; ``way`` is a key of ``WAYS``."""
    up, down = row["uplink_bytes"], row["downlink_bytes"]
    downloads = row["clients_seen"] * row["codec_bytes"]
    return int({"uplink": up, "both": up + down, "codec": up + down + downloads}[way])


def cost(by_seed: BySeed, reference: BySeed, share: float, way: str) -> list[int] | None:
    """Bytes of all clients to a target, for each seed; ``None`` if a seed does not reach it."""
    found = [reached(run, reference[seed], share) for seed, run in sorted(by_seed.items())]
    return None if None in found else [sent(row, way) for row in found if row]


@dataclass(frozen=True)
class Costs:
    """Mean bytes of one participation of one client, over seeds.

    Attributes:
        up, down: wire bytes of a reply and of what a client is sent before it.
        payload: bytes of a reply without headers, where the scheme tells them.
        codec: what a client downloads once.
    """

    up: float
    down: float
    payload: float | None
    codec: float

    @classmethod
    def of(cls, runs: Sequence[Sequence[rows.Row]]) -> Costs:
        """From the last rows of a scheme's runs."""
        last = [run[-1] for run in runs]

        def each(name: str) -> float:
            return statistics.fmean(r[name] / r["participations"] for r in last)

        told = all(r["uplink_payload_bytes"] is not None for r in last)
        return cls(
            each("uplink_bytes"),
            each("downlink_bytes"),
            each("uplink_payload_bytes") if told else None,
            statistics.fmean(r["codec_bytes"] for r in last),
        )

    def ratio(self, reference: Costs, times: int | None = None) -> float:
        """Bytes in both directions of the reference over ours, with the codec's download.

        Args:
            reference: uncompressed.
            times: rounds that a client takes part in; ``None`` leaves the codec out.
        """
        theirs, ours = reference.up + reference.down, self.up + self.down
        return theirs / ours if times is None else times * theirs / (times * ours + self.codec)

    def payback(self, reference: Costs) -> int | None:
        """After how many of a client's rounds the codec's download has paid for itself."""
        saved = reference.up + reference.down - self.up - self.down
        if self.codec == 0:
            return 0
        return math.ceil(self.codec / saved) if saved > 0 else None


def present(
    runs: Runs, schemes: Sequence[Scheme]
) -> list[tuple[Scheme, dict[int, list[rows.Row]]]]:
    """Schemes in order, with the seeds that fp32 has as well."""
    out = []
    for scheme in schemes:
        both = {s: run for s, run in runs.get(scheme.name, {}).items() if s in runs[REFERENCE]}
        if both:
            out.append((scheme, dict(sorted(both.items()))))
    return out
