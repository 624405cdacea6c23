"""Which replies the open round takes, and what they decode to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradcodec.errors import CodecMismatchError, UnexpectedReplyError
from gradcodec.federated.aggregation import bounded, check_values, decoded
from gradcodec.federated.envelope import Reply
from gradcodec.federated.participants import ClientId, client_id
from gradcodec.federated.replica import WAY_BACK
from gradcodec.federated.rounds import Values
from gradcodec.federated.tensors import check_kept

if TYPE_CHECKING:
    from gradcodec.federated.server import Server


def admitted(server: Server, blob: bytes, sender: ClientId | None) -> tuple[Reply, Values]:
    """The reply in ``blob`` and its finite values; raises as ``Server.receive``."""
    reply = Reply.from_bytes(blob)
    _check_expected(server, reply, sender)
    reply = _rebased(server, reply)
    value, kept = values_of(server, reply)
    check_values(value, f"client {reply.client!r}")
    if kept is not None:
        check_kept(kept, server.replica.kept, f"client {reply.client!r}")
    return reply, (value, kept)


def values_of(server: Server, reply: Reply) -> Values:
    """What a reply decodes to: a code or an update, and the kept tensors if they changed."""
    kept = None if reply.values is None else server.replica.read_kept(reply.values)
    value = decoded(server.uplink, reply.payload, server.codes_cross)
    return bounded(value, server.config.max_norm), kept


def _check_expected(server: Server, reply: Reply, sender: ClientId | None) -> None:
    who = f"client {reply.client!r}"
    if sender is not None and client_id(sender) != reply.client:
        raise UnexpectedReplyError(f"{who}: a reply that {sender!r} sent in its name")
    if reply.round != server.round:
        raise UnexpectedReplyError(
            f"{who}: expected a reply to round {server.round}, got {reply.round}"
        )
    if server._invited is not None and reply.client not in server._invited:
        raise UnexpectedReplyError(f"{who} was not invited to round {server.round}")
    if reply.client in server._replies:
        raise UnexpectedReplyError(f"{who}: a second reply in one round")
    if len(server._replies) >= server.config.max_replies:
        raise UnexpectedReplyError(
            f"{who}: this round has {len(server._replies)} replies already, "
            "ServerConfig.max_replies of them"
        )


def _rebased(server: Server, reply: Reply) -> Reply:
    """The reply with the base that the codec expects, once its own has been checked."""
    expected = server.uplink.base if reply.version == 1 else server.replica.digest
    came = reply.payload.base
    if came != expected:
        raise CodecMismatchError(
            f"client {reply.client!r}: expected an update of the base "
            f"{expected.hex() if expected else None}, the state of round {server.round}, got "
            f"{came.hex() if came else None}: it has another history, or codecs for another "
            f"initial state; {WAY_BACK}"
        )
    return replace(reply, payload=replace(reply.payload, base=server.uplink.base))
