"""The client's side of ``CodecFedAvg``: receive a round's state, train, reply in few bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from gradcodec.errors import CodecMismatchError, ConfigError, MalformedBodyError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import AutoClient, AutoConfig, Client, ServerConfig
from gradcodec.federated.participants import ClientId
from gradcodec.federated.tensors import State, tensors_of
from gradcodec.integrations.flower import container
from gradcodec.integrations.messages.choice import codec_of
from gradcodec.parameters import named_parameters, plain_names

FEDERATION, START = "gradcodec.federation", "gradcodec.start"
"""Entries of a message's ``ConfigRecord``: how to make the client, in JSON, and the round from
which the broadcast leads on."""

BROADCAST, REPLY = "broadcast", "reply"

RELAYED = ("aggregation", "lr", "max_norm", "trim")
"""Settings of the server that its nodes need too where replies are relayed."""

STATE = "gradcodec.participant"
"""The record in ``context.state`` that holds what this node knows, from round to round."""


class Participant:
    """One node in one round of a federation whose strategy is ``CodecFedAvg``.

        @app.train()
        def train(message, context):
            model = build_model()                            # the same at every node and the server
            participant = Participant(message, context, model)      # loads the round's state
            optimizer = participant.optimizer(torch.optim.AdamW, lr=1e-3)
            ...                                              # train as always
            return participant.reply({"num-examples": len(data), "train-loss": loss})

        @app.evaluate()
        def evaluate(message, context):
            model = build_model()
            participant = Participant(message, context, model)
            return participant.reply({"num-examples": len(data), "loss": ...})

    What travels never holds the initial state: every node builds it, from a seed or a base model,
    and a node with another one is refused. What a node keeps between rounds, its replica of the
    state, is in ``context.state``. It belongs to one run and one choice of codecs.

    Args:
        message: what came from the server.
        context: of the app.
        model: the module (its trainable parameters and buffers take part), or parameters by name,
            with their initial values. It holds the round's state afterwards.
        number: this node's id in the federation, as ``CodecFedAvg.number`` says; the node's id by
            default.

    Attributes:
        client: the ``gradcodec.federated.Client`` that does the work.

    Raises, which Flower turns into an error reply:
        ConfigError: the message does not come from a ``CodecFedAvg``.
        CodecMismatchError: the initial state is another one than the server's, or this node has
            lost its state: the server's next message then starts from the initial state.
        WireError: the message is damaged.
    """

    def __init__(
        self,
        message: Message,
        context: Context,
        model: nn.Module | Mapping[str, nn.Parameter],
        *,
        number: ClientId | None = None,
    ) -> None:
        self._message, self._context, self._model = message, context, model
        self._key, record = _record(message)
        self._settings, start = _offer(message)
        self._optimizer: torch.optim.Optimizer | None = None
        self.client = client_of(
            self._settings, context.node_id if number is None else number, model
        )
        parts = container.unpacked(record)
        if set(parts) != {BROADCAST}:
            raise MalformedBodyError(f"expected a {BROADCAST!r}, got parts {sorted(parts)[:5]}")
        if start:
            self._recall()
        if start != self.client.version:
            raise CodecMismatchError(
                f"expected a broadcast from round {self.client.version} on, where this node is, "
                f"got one from round {start}"
            )
        _load(model, self.client.receive(parts[BROADCAST]))

    def _recall(self) -> None:
        """Go to where this node was after its last reply, if that was in this federation."""
        if STATE not in self._context.state:
            return
        kept = container.unpacked(self._context.state.array_records[STATE])
        if kept["run"] == _run(self._context) and kept["settings"] == self._settings.encode():
            self.client.receive(kept["state"])

    def optimizer(
        self, optimizer: type[torch.optim.Optimizer], **settings: Any
    ) -> torch.optim.Optimizer:
        """The optimiser of this round: of parameters, or, in latent mode, of their code.

        Args:
            optimizer: a torch optimiser class.
            settings: its own settings, ``lr`` and so on.
        """
        if self.client.config.mode == "latent":
            self._optimizer = LatentOptimizer(self._model, self.client.codec, optimizer, **settings)
        else:
            self._optimizer = optimizer(list(named_parameters(self._model).values()), **settings)
        return self._optimizer

    def reply(self, metrics: Mapping[str, Any], *, examples: str = "num-examples") -> Message:
        """The reply to the message: what was trained, coded, and the metrics.

        Only a reply to a train message holds an update, and moves what this node keeps.

        Args:
            metrics: numbers for the strategy.
            examples: which of them says how many examples were used, the weight of this reply.

        Raises:
            ConfigError: the metrics do not have it, or in latent mode nobody called ``optimizer``.
            EmptyClientError, NonFiniteError: no examples, or training left NaN or Inf.
        """
        content = RecordDict({"metrics": MetricRecord(dict(metrics))})
        if self._message.metadata.message_type.startswith("train"):
            if examples not in metrics:
                raise ConfigError(f"expected {examples!r} in the metrics, got {sorted(metrics)}")
            blob = self._encoded(cast(int, metrics[examples]))
            content[self._key] = container.packed({REPLY: blob})
            self._keep()
        return Message(content, reply_to=self._message)

    def _encoded(self, examples: int) -> bytes:
        if self.client.config.mode != "latent":
            return self.client.reply(self._model, examples)
        if not isinstance(self._optimizer, LatentOptimizer):
            raise ConfigError(
                "in this round codes are trained: expected the loop to use the optimiser that "
                "Participant.optimizer makes, which nobody has called"
            )
        buffers = self._model if self.client.replica.kept else None
        return self.client.reply(self._optimizer, examples, buffers=buffers)

    def _keep(self) -> None:
        self._context.state[STATE] = container.packed(
            {
                "run": _run(self._context),
                "settings": self._settings.encode(),
                "state": self.client.snapshot(),
            }
        )


def client_of(settings: str, number: ClientId, initial: State) -> Client:
    """The client that the server's settings describe.

    Raises:
        ConfigError: they are not settings of this version.
    """
    try:
        found = json.loads(settings)
        if "auto" in found:
            return AutoClient(number, initial, AutoConfig(**found["auto"]))
        up, down = (codec_of(found[end]) for end in ("uplink", "downlink"))
        rules = tuple((pattern, name) for pattern, name in found["rules"])
        config = ServerConfig(
            mode=found["mode"], representation=found["representation"], rules=rules
        )
        if "relay" in found:
            server = {name: found["relay"][name] for name in RELAYED}
            config = replace(config, relay=True, **server)
    except (KeyError, TypeError, ValueError, RecursionError) as err:
        if isinstance(err, UpdateError | ConfigError):
            raise
        raise ConfigError(f"expected settings of a federation, got {settings[:80]!r}") from err
    return Client(number, initial, up, down, config)


def _record(message: Message) -> tuple[str, ArrayRecord]:
    for key, record in message.content.array_records.items():
        if container.is_packed(record):
            return key, record
    raise ConfigError("expected a message of CodecFedAvg, got one without a broadcast")


def _offer(message: Message) -> tuple[str, int]:
    for record in message.content.config_records.values():
        if FEDERATION in record and START in record:
            return str(record[FEDERATION]), int(cast(int, record[START]))
    raise ConfigError("expected a message of CodecFedAvg, got one without its settings")


def _run(context: Context) -> bytes:
    return str(context.run_id).encode()


@torch.no_grad()
def _load(model: nn.Module | Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in plain_names(dict(tensors_of(model))).items():
        tensor.copy_(state[name])
