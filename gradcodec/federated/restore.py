"""A server as plain tensors: what it has sent, from which it is made again to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.federated.envelope import INCREMENT
from gradcodec.federated.history import as_bytes, as_tensor, recorded
from gradcodec.federated.replica import Replica
from gradcodec.federated.switch import Switch
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.federated.server import Server

STATE_FORMAT = 2

_NAMED = ("increment.", "codec.", "seen.")

RESTORED = (
    *("config", "uplink", "downlink", "space", "codes_cross", "replica"),
    *("history", "momentum", "residual", "kept_since", "dropped"),
)
"""What ``replay`` sets in a server, besides its schedule's state."""


def state_of(server: Server) -> dict[str, Tensor]:
    """Everything that a resumed run needs; replies of the open round are not part of it."""
    out = {
        "momentum": server.momentum,
        "residual": server.residual,
        "format": torch.tensor([STATE_FORMAT, server.kept_since]),
        **server.history.state_dict(),
        **server.schedule.state_dict(),
    }
    if server.replica.kept:
        out["kept"] = as_tensor(server.replica.pack_kept(server.replica.kept).to_bytes())
    return out


def replay(server: Server, state: Mapping[str, Tensor]) -> None:
    """Bring a server at round 0 to where ``state_of`` was taken.

    Raises:
        ConfigError, WireError: the state is another federation's; the schedule is unchanged then.
    """
    known = {"momentum", "residual", "format", "kept"}
    strange = [n for n in state if n not in known and not n.startswith(_NAMED)]
    if strange:
        raise ConfigError(f"server state: not expected: {sorted(strange)[:3]}")
    for kind, blob in recorded(state):
        if kind == INCREMENT:
            blob = blob if "format" in state else server.replica.of_version_1(blob)
            server.replica.advance(blob)
            server.history.add(blob)
        else:
            server._enter(Switch.from_bytes(blob))
    server.kept_since = _load_kept(state, server.replica)
    for name, mine in (("momentum", server.momentum), ("residual", server.residual)):
        came = state.get(name, torch.empty(0)).shape
        if came != mine.shape:
            raise ConfigError(f"server state: expected {name} {list(mine.shape)}, got {list(came)}")
    server.momentum, server.residual = state["momentum"].clone(), state["residual"].clone()
    latent = [p for p in server.history.phases if p.switch and p.switch.mode == "latent"]
    server.schedule.load_state_dict(state, server.replica.spec, len(latent))


def _load_kept(state: Mapping[str, Tensor], replica: Replica) -> int:
    """Put saved kept tensors into a replica at the saved round; returns ``kept_since``."""
    if "format" not in state:  # written before tensors were kept
        return 0
    number, since = (int(n) for n in state["format"].tolist())
    if number != STATE_FORMAT or not 0 <= since <= replica.version:
        raise ConfigError(
            f"server state: expected format {STATE_FORMAT} and a round of "
            f"0..{replica.version}, got {number} and {since}"
        )
    if replica.kept:
        if "kept" not in state:
            raise ConfigError("server state: the kept tensors are missing")
        replica.kept = replica.read_kept(Payload.from_bytes(as_bytes("kept", state["kept"])))
    return since
