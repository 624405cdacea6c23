"""The client's side: receive the global state, train however you like, reply in few bytes."""

from __future__ import annotations

import struct
import zlib

from gradcodec import layout
from gradcodec.codecs.base import Codec
from gradcodec.errors import EmptyClientError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated.envelope import Reply
from gradcodec.federated.replica import Replica, for_state
from gradcodec.federated.server import ServerConfig, space_of
from gradcodec.representation import represent
from gradcodec.types import Update


class Client:
    """One participant; the same arguments as the server's make the same codecs.

    .. code-block:: python

        client = Client(7, initial, uplink, downlink, config)
        state = client.receive(server.broadcast(client.version))     # bytes -> named tensors
        ...                                                          # load them, train, any loop
        blob = client.reply(model_tensors, examples=len(data))       # what to send back

    In latent mode make a ``LatentOptimizer(model, client.codec, ...)`` for the round and reply with
    it instead of with tensors.

    Args:
        number: this client's id.
        initial: the state that every participant derives by itself.
        uplink, downlink, config: as the server's.
        version: the round that this client's state is of; ``receive`` brings it up to date.
    """

    def __init__(
        self,
        number: int,
        initial: Update,
        uplink: Codec,
        downlink: Codec | None = None,
        config: ServerConfig | None = None,
    ) -> None:
        self.number = number
        self.config = config or ServerConfig()
        self.codec = for_state(uplink, initial)
        broadcasts = self.codec if downlink is None else for_state(downlink, initial)
        self.replica = Replica(initial, space_of(broadcasts, self.config))

    @property
    def version(self) -> int:
        """The round whose global state this client holds."""
        return self.replica.version

    def receive(self, blob: bytes) -> Update:
        """Move to the round of a broadcast; returns the global state.

        Raises:
            WireError: the bytes are damaged or belong to other codecs; the state is then as before.
        """
        self.replica.receive(blob)
        return self.replica.state()

    def reply(self, trained: Update | LatentOptimizer, examples: int) -> bytes:
        """The bytes of this round's reply.

        Args:
            trained: the tensors after local training, or the latent optimiser that trained them.
            examples: how many examples they were trained on; the weight of this reply.

        Raises:
            EmptyClientError: no examples.
            NonFiniteError: training diverged to NaN or Inf.
            UpdateError: names, shapes or dtypes are not the state's.
        """
        if examples < 1:
            raise EmptyClientError(f"client {self.number}: expected at least one example, got none")
        if isinstance(trained, LatentOptimizer):
            payload = trained.payload(seed=self._seed)
        else:
            self.replica.spec.check(trained)
            update = represent(self.config.representation, trained, self.replica.state())
            for name, t in update.items():
                layout.check_finite(t, f"client {self.number}, {name}")
            payload = self.codec.encoder.encode(update, seed=self._seed)
        return Reply(self.number, self.version, examples, payload).to_bytes()

    @property
    def _seed(self) -> int:
        """Of a stochastic codec: another one for each client, so that their errors average out."""
        return zlib.crc32(struct.pack("<QQ", self.number, self.version))
