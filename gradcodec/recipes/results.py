"""From rounds to ``summary.json``: totals, ratios against fp32, versions."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcodec import describe
from gradcodec.errors import ConfigError
from gradcodec.federated.loop import RoundReport
from gradcodec.recipes.schemes import Scheme
from gradcodec.recipes.settings import Settings

SUMMARY_SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """One scheme's outcome.

    Attributes:
        scheme: what was run.
        start_loss: held-out loss before the first round.
        reports: one per finished round; fewer than the settings' rounds if it diverged.
        accuracy: share of multiple-choice questions answered right at the end.
        codec_bytes: size of the trained codec's files, which each participant fetches once.
        participants: how many different clients took part.
    """

    scheme: Scheme
    start_loss: float
    reports: list[RoundReport]
    accuracy: float
    codec_bytes: int
    participants: int

    @property
    def losses(self) -> list[float]:
        """Held-out loss after each round."""
        return [r.loss for r in self.reports]

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end."""
        return self.losses[-1] if self.reports else self.start_loss

    def total(self, name: str, rounds: int | None = None) -> float:
        """Sum of the reports' figure ``name`` over all rounds, or over the first ``rounds``."""
        return float(sum(getattr(r, name) for r in self.reports[:rounds]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the scheme by its name."""
        return {
            "scheme": self.scheme.name,
            "start_loss": self.start_loss,
            "reports": [r.to_dict() for r in self.reports],
            "accuracy": self.accuracy,
            "codec_bytes": self.codec_bytes,
            "participants": self.participants,
        }

    @classmethod
    def from_dict(cls, scheme: Scheme, row: Mapping[str, Any]) -> Result:
        """Inverse of ``to_dict``.

        Raises:
            ConfigError: the row has other fields.
        """
        try:
            reports = [RoundReport.from_dict(r) for r in row["reports"]]
            rest = {k: row[k] for k in ("start_loss", "accuracy", "codec_bytes", "participants")}
            return cls(scheme, reports=reports, **rest)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ConfigError(
                f"schemes/{scheme.name}.json is not of this version: {err!r}; delete it and resume"
            ) from err


def summarise(
    settings: Settings, results: Sequence[Result], tgap: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The run's ``summary.json``.

    ``uplink_ratio`` and ``total_ratio`` divide the fp32 scheme's wire bytes by this scheme's, on
    the uplink and in both directions, summed over the rounds that both finished;
    ``total_ratio_with_codec`` adds one codec download per participant. ``gain_kept`` divides this
    scheme's decrease of the held-out loss by that of fp32. Figures that are not finite are
    ``null``, because JSON cannot hold them.
    """
    reference = results[0]
    rows = []
    for r in results:
        one_time = r.codec_bytes * r.participants
        both = min(len(r.reports), len(reference.reports))
        up, down = r.total("uplink_bytes", both), r.total("downlink_bytes", both)
        whole_up = reference.total("uplink_bytes", both)
        whole = whole_up + reference.total("downlink_bytes", both)
        gain = reference.start_loss - reference.final_loss
        rows.append(
            {
                "name": r.scheme.name,
                "title": r.scheme.title,
                "start_loss": r.start_loss,
                "final_loss": _finite(r.final_loss),
                "losses": [_finite(loss) for loss in r.losses],
                "gain_kept": _finite((r.start_loss - r.final_loss) / gain) if gain else None,
                "accuracy": r.accuracy,
                "uplink_payload_bytes": int(r.total("uplink_payload_bytes")),
                "downlink_payload_bytes": int(r.total("downlink_payload_bytes")),
                "uplink_bytes": int(r.total("uplink_bytes")),
                "downlink_bytes": int(r.total("downlink_bytes")),
                "codec_bytes": r.codec_bytes,
                "participants": r.participants,
                "uplink_ratio": whole_up / up if up else None,
                "total_ratio": whole / (up + down) if up else None,
                "total_ratio_with_codec": whole / (up + down + one_time) if up else None,
                "snr_db": [_finite(x.snr_db) for x in r.reports],
                "mean_snr_db": [_finite(x.mean_snr_db) for x in r.reports],
                "cumulative_bytes": _cumulative(r.reports),
                "rejected": int(sum(len(x.rejected) for x in r.reports)),
                "rounds": len(r.reports),
                "encode_s": r.total("encode_s"),
                "decode_s": r.total("decode_s"),
                "seconds": r.total("seconds"),
                "seed": settings.seed,
            }
        )
    return {
        "schema": SUMMARY_SCHEMA,
        "config": settings.to_dict(),
        "versions": run_versions(),
        "tgap": tgap,
        "schemes": rows,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cumulative(reports: Sequence[RoundReport]) -> list[int]:
    total, out = 0, []
    for r in reports:
        total += r.uplink_bytes + r.downlink_bytes
        out.append(total)
    return out


def run_versions() -> dict[str, str | None]:
    """The versions, the machine and the commit that produced a number."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {**describe.versions(), "commit": commit}
