"""The payload bytes of a message: without headers, digests and checksums."""

from __future__ import annotations

from benchmarks.federated.methods import Coded, Method
from benchmarks.peers.federated import envelope
from benchmarks.peers.federated.base import Peer
from gradcodec.federated.envelope import KINDS, Broadcast, Reply


def uplink(method: Method, blob: bytes) -> int | None:
    """Payload bytes of a reply; ``None`` where the method's messages are not known here."""
    if isinstance(method, Coded):
        return len(Reply.from_bytes(blob).payload.body)
    return len(envelope.Reply.from_bytes(blob).body) if isinstance(method, Peer) else None


def downlink(method: Method, blob: bytes) -> int | None:
    """Payload bytes of what a client is sent before it trains."""
    if isinstance(method, Coded):
        return Broadcast.from_bytes(blob, KINDS).payload_nbytes
    return (
        sum(map(len, envelope.Broadcast.from_bytes(blob).parts))
        if isinstance(method, Peer)
        else None
    )
