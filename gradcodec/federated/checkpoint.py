"""A federation on disk after each round, so that a kill at any moment loses at most one round."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradcodec.errors import ConfigError
from gradcodec.federated.loop import Federation, RoundReport


def save(path: str | Path, federation: Federation, reports: Sequence[RoundReport]) -> None:
    """Write one safetensors file: the server's tensors, and the reports so far as metadata.

    The file appears whole or not at all (written beside, flushed, renamed over).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {
        "finished": federation.finished,
        "versions": {str(c): v for c, v in federation.versions.items()},
        "reports": [r.to_dict() for r in reports],
    }
    beside = path.with_suffix(".partial")
    tensors = {n: t.contiguous() for n, t in federation.server.state_dict().items()}
    save_file(tensors, beside, metadata={"federation": json.dumps(meta)})
    with open(beside, "rb") as f:
        os.fsync(f.fileno())
    os.replace(beside, path)


def load(path: str | Path, federation: Federation) -> list[RoundReport]:
    """Put a federation of the same settings back where ``save`` left it; returns its reports.

    Clients are rebuilt from the increments when they next take part.

    Raises:
        ConfigError: the file is not a checkpoint of this federation, which is then unchanged.
    """
    try:
        with safe_open(str(path), framework="pt") as f:
            meta = json.loads(f.metadata()["federation"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        finished = int(meta["finished"])
        versions = {int(c): int(v) for c, v in meta["versions"].items()}
        reports = [RoundReport.from_dict(row) for row in meta["reports"]]
        federation.server.load_state_dict(tensors)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, OSError) as err:
        raise ConfigError(f"{path} is not a checkpoint of this federation: {err!r}") from err
    federation.finished, federation.versions, federation.clients = finished, versions, {}
    return reports
