"""Both ends of a ``subspace:auto`` federation, which fits its codec during training."""

from __future__ import annotations

from gradcodec.codec import Codec
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.envelope import KINDS
from gradcodec.federated.participants import ClientId
from gradcodec.federated.schedule import AutoConfig, FitSubspace
from gradcodec.federated.server import Server
from gradcodec.federated.tensors import State


class AutoClient(Client):
    """One participant of a ``subspace:auto`` federation; see ``Client`` for its use.

    ``config.mode`` says after each ``receive`` how this round is trained: ``"post"``, with any
    optimiser, or ``"latent"``, through a ``LatentOptimizer`` with ``codec``.

    Args:
        number: this client's id.
        initial: the initial state, which every participant builds locally.
        config: as the server's; only ``first`` and ``first_down`` matter here.
    """

    def __init__(self, number: ClientId, initial: State, config: AutoConfig | None = None) -> None:
        self._start(number, initial, FitSubspace(config or AutoConfig()), KINDS)


class AutoServer(Server):
    """The server of a ``subspace:auto`` federation: it fits a subspace during training.

    It begins with a codec that needs no training. From the replies of the first rounds it fits a
    subspace and broadcasts it once to each client, as a part of the stream; from then on all
    clients train in it. A refresh goes back to the first codec for a round and fits again.

        round        0 .. warmup_rounds - 1    warmup_rounds ..    refresh   ..
        replies      first codec, post         codes, latent       post      codes, latent
        broadcasts   first codec               CODEC, codes        CODEC     CODEC, codes

    At a switch the state of the round becomes the origin that codes are relative to. The codecs are
    bound to the digest of that state, which proves that all replicas agree to the bit. Clients
    only need to know the first codec; the stream tells them every later one.

        server = AutoServer(initial)
        client = AutoClient(7, initial)
        state = client.receive(server.broadcast(client.version))
        ...                               # client.config.mode: "post" or "latent" in this round
        server.receive(client.reply(trained, examples))
        server.close_round()              # fits and switches when the rounds for it are over

    ``uplink``, ``downlink``, ``config``, ``increments``, ``momentum`` and ``residual`` are those of
    the current codec.

    Args:
        initial: the initial state, which every participant builds locally.
        config: when to switch, and to what.

    Raises:
        ConfigError: the subspace's settings cannot be met by these tensors.
    """

    def __init__(self, initial: State, config: AutoConfig | None = None) -> None:
        self.auto = config or AutoConfig()
        self._start(initial, FitSubspace(self.auto))

    @property
    def fits(self) -> int:
        """How often a subspace was fitted and sent."""
        return sum(p.switch is not None and p.switch.mode == "latent" for p in self.history.phases)

    def _new_client(self, number: ClientId) -> AutoClient:
        return AutoClient(number, self._first.first, self.auto)


def server_for(
    codec: str | Codec,
    initial: State,
    config: ServerConfig | AutoConfig | None = None,
    *,
    downlink: str | Codec | None = None,
) -> Server:
    """Make a server by the name of its codec; ``server.client(number)`` makes matching clients.

    Args:
        codec: ``"subspace:auto"``, a name that ``make_codec`` knows, or a codec.
        initial: the initial state, which every participant builds locally.
        config: an ``AutoConfig`` for ``"subspace:auto"``, else a ``ServerConfig``.
        downlink: codec of broadcasts, ``codec`` by default; ``"subspace:auto"`` takes none.

    Raises:
        ConfigError: an unknown name, a ``config`` of the wrong class, or a ``downlink`` beside
            ``"subspace:auto"``.
    """
    if codec == "subspace:auto":
        if downlink is not None or isinstance(config, ServerConfig):
            raise ConfigError(
                f"{codec!r} takes its codecs from an AutoConfig, not a ServerConfig or downlink"
            )
        return AutoServer(initial, config)
    if isinstance(config, AutoConfig):
        raise ConfigError(f"AutoConfig is of 'subspace:auto', got codec {shown(str(codec))}")
    return Server(initial, codec, downlink, config)
