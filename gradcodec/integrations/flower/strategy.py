"""The server's side of a federation in code space: a strategy that runs a ``federated`` server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from gradcodec.errors import ConfigError, GradcodecError, TrainingError
from gradcodec.federated import AutoConfig, AutoServer, Server, ServerConfig
from gradcodec.federated import checkpoint as saved
from gradcodec.federated.participants import ClientId
from gradcodec.federated.schedule import Fixed
from gradcodec.federated.tensors import State, tensors_of
from gradcodec.integrations.flower import container
from gradcodec.integrations.flower.grid import CodecGrid
from gradcodec.integrations.flower.participant import (
    BROADCAST,
    FEDERATION,
    RELAYED,
    REPLY,
    START,
)
from gradcodec.integrations.messages.choice import AUTO, codec_of, plain_choice, plain_rules
from gradcodec.parameters import plain_names
from gradcodec.settings import CodecConfig

logger = logging.getLogger(__name__)

Choice = str | CodecConfig | Mapping[str, Any]


class CodecFedAvg(FedAvg):
    """FedAvg in code space: codes both ways, also of codecs that are fitted during training.

        strategy = CodecFedAvg("subspace:auto", fraction_evaluate=0.0)
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=20)

    Clients use ``Participant``. Sampling, metrics and evaluation are FedAvg's; sums are exact, so
    the order of replies does not matter, and a run gives the bits of the plain loop
    (``gradcodec.federated.Federation``) with the same clients and seeds. Every message holds one
    array, which is what crosses the wire: a tracker inside a strategy sees its real size.

    Compared with ``CodecGrid``: nodes build the initial state themselves, so not even the first
    message holds it; codes can be trained (``mode="latent"``) and added without decoding; and
    ``"subspace:auto"`` fits its codec on the first rounds' replies and sends it in the stream. The
    client's code has to use ``Participant``, and only FedAvg is there (``config`` adds server
    learning rate and momentum, robust means, and ``relay``: replies go down as they came).

    A reply that is damaged, late, or of another history costs that reply, with a log line that
    names the node. A node that has lost its state answers with an error, once, and is sent
    everything from the initial state on in the next round.

    Flower cannot resume a run. With ``checkpoint`` another run of the same app goes on where an
    ended one was: the file holds the server after its last round, and nodes are sent what they
    lack, as after any other absence.

    Args:
        codec: of replies: ``"subspace:auto"``, a codec's name, the config of one without weights, a
            folder, or a Hub id.
        downlink: of broadcasts, likewise; not with ``"subspace:auto"`` or a relay. The codec of
            replies by default.
        config: ``AutoConfig`` or ``ServerConfig``; rules name codecs by strings.
        initial: the initial state, if ``initial_arrays`` does not tell buffers from parameters: the
            same kind of module as nodes give to ``Participant``.
        number: a node's id in the federation by its Flower id; seeds of codecs depend on it.
        checkpoint: a file, written after each round. If it is there when training starts, training
            goes on from it. A full path: Flower decides where a ``ServerApp`` runs.
        options: FedAvg's own arguments.

    Attributes:
        server: the ``gradcodec.federated`` server, from the first round on.

    Raises:
        ConfigError: an argument is of another kind, or they do not go together; when training
            starts, the checkpoint is damaged or of another federation.
        OSError: after a round, the checkpoint cannot be written; the one before it is unchanged.
    """

    def __init__(
        self,
        codec: Choice,
        downlink: Choice | None = None,
        *,
        config: ServerConfig | AutoConfig | None = None,
        initial: State | None = None,
        number: Callable[[int], ClientId] = lambda node: node,
        checkpoint: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.server: Server | None = None
        self._initial = initial
        self._number = number
        self._versions: dict[int, int] = {}
        self._checkpoint = checkpoint
        self._before = 0  # rounds of earlier runs
        if codec == AUTO:
            if downlink is not None or isinstance(config, ServerConfig):
                raise ConfigError(f"{AUTO!r} takes its codecs from an AutoConfig")
            auto = config or AutoConfig()
            self._make: Callable[[Any], Server] = lambda state: AutoServer(state, auto)
            chosen: dict[str, Any] = {"auto": {"first": auto.first, "first_down": auto.first_down}}
        else:
            if isinstance(config, AutoConfig):
                raise ConfigError(f"AutoConfig is of {AUTO!r}, got codec {codec!r}")
            fixed = config or ServerConfig()
            if fixed.privacy is not None:
                raise ConfigError(
                    "nodes send their number of examples and metrics beside the code, which "
                    "ServerConfig.privacy does not cover: expected privacy None here"
                )
            ends = [plain_choice(codec), plain_choice(codec if downlink is None else downlink)]
            up, down = (codec_of(end) for end in ends)
            Fixed(up, down, fixed)  # what does not go together is refused now
            self._make = lambda state: Server(state, up, down, fixed)
            chosen = {
                "uplink": ends[0],
                "downlink": ends[1],
                "mode": fixed.mode,
                "representation": fixed.representation,
                "rules": plain_rules(cast(Any, fixed.rules)),
            }
            if fixed.relay:
                chosen["relay"] = {name: getattr(fixed, name) for name in RELAYED}
        self._settings = json.dumps(chosen, sort_keys=True, separators=(",", ":"))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As FedAvg. From a checkpoint on, those of ``num_rounds`` rounds that it lacks.

        Rounds are numbered on, for nodes, ``evaluate_fn`` and the result. A second ``start`` goes
        on from where the first one ended.

        Raises:
            ConfigError: ``grid`` is a ``CodecGrid``; ``initial_arrays`` differ from ``initial`` or,
                in a second ``start``, from where the first one ended.
        """
        if isinstance(grid, CodecGrid):
            raise ConfigError(
                "CodecFedAvg codes by itself: expected Flower's grid, got a CodecGrid"
            )
        fresh = self.server is None
        self._begin(initial_arrays)
        assert self.server is not None
        _check_equal(initial_arrays, self._initial if fresh else self.server.replica.state(), fresh)
        before = self._before = self.server.round if fresh else 0
        watch = None if evaluate_fn is None else lambda n, arrays: evaluate_fn(n + before, arrays)
        if before:
            logger.info("gradcodec: goes on after round %d of %s", before, self._checkpoint)
            initial_arrays = container.record_of(self.server.replica.state())
        left = max(0, num_rounds - before)
        configs = (train_config, evaluate_config)
        result = super().start(grid, initial_arrays, left, timeout, *configs, watch)
        if before:
            result.arrays = result.arrays or initial_arrays
            for name, by_round in vars(result).items():
                if isinstance(by_round, dict):
                    setattr(result, name, {n + before: found for n, found in by_round.items()})
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Invite FedAvg's sample, and bring each of its nodes up to date."""
        self._begin(arrays)
        assert self.server is not None
        number = server_round + self._before
        messages = list(super().configure_train(number, arrays, config, grid))
        self.server.abandon_round()
        self.server.invite(self._number(m.metadata.dst_node_id) for m in messages)
        return [self._coded(m, MessageType.TRAIN) for m in messages]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; nodes are sent what they lack of the state, and do not keep it."""
        self._begin(arrays)
        number = server_round + self._before
        messages = super().configure_evaluate(number, arrays, config, grid)
        return [self._coded(m, MessageType.EVALUATE) for m in messages]

    def _begin(self, arrays: ArrayRecord) -> None:
        if self.server is None:
            given = self._initial
            server = self._make(container.tensors_of(arrays) if given is None else given)
            if self._checkpoint is not None and Path(self._checkpoint).exists():
                saved.load_server(self._checkpoint, server, self._settings)
            self.server = server

    def _coded(self, message: Message, kind: str) -> Message:
        assert self.server is not None
        node = message.metadata.dst_node_id
        start = self._versions.get(node, 0)
        if kind == MessageType.TRAIN:
            self._versions[node] = 0  # until its reply says that it got there
        blob = self.server.broadcast(start)
        before = message.content.config_records[self.configrecord_key]
        config = ConfigRecord({**before, FEDERATION: self._settings, START: start})
        record = container.packed({BROADCAST: blob})
        content = RecordDict({self.arrayrecord_key: record, self.configrecord_key: config})
        return Message(content=content, message_type=kind, dst_node_id=node)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the good replies and close the round; without any, the state stays."""
        assert self.server is not None
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        good = [reply for reply in valid if self._received(reply)]
        if not good:
            logger.warning(
                "gradcodec: no reply of round %d can be used, and the model stays as it is; a "
                "ClientApp for CodecFedAvg uses gradcodec.integrations.flower.Participant",
                server_round + self._before,
            )
            return None, None
        try:
            self.server.close_round()
        except TrainingError as err:
            logger.warning("gradcodec: round %d was not closed: %s", server_round, err)
            return None, None
        if self._checkpoint is not None:
            saved.save_server(self._checkpoint, self.server, self._settings)
        metrics = self.train_metrics_aggr_fn(
            [RecordDict(dict(r.content.metric_records)) for r in good], self.weighted_by_key
        )
        return container.record_of(self.server.replica.state()), metrics

    def _received(self, reply: Message) -> bool:
        assert self.server is not None
        node = reply.metadata.src_node_id
        try:
            parts = container.unpacked(reply.content.array_records[self.arrayrecord_key])
            self.server.receive(parts[REPLY], sender=self._number(node))
        except (GradcodecError, KeyError) as err:
            logger.warning(
                "gradcodec: dropped the reply of node %d: %s: %s", node, type(err).__name__, err
            )
            return False
        self._versions[node] = self.server.round
        return True


def _check_equal(arrays: ArrayRecord, begins: State | None, fresh: bool) -> None:
    """Raise ``ConfigError`` if training would silently begin with other values than it is given."""
    found = {} if begins is None else container.tensors_of(arrays)
    for name, tensor in plain_names(dict(tensors_of(begins or {}))).items():
        if name in found and not torch.equal(found[name].to(tensor.dtype), tensor.detach()):
            where = "those of initial=" if fresh else "those that the last start ended with"
            raise ConfigError(
                f"{name!r}: expected initial_arrays equal to {where}, with which training begins; "
                "for others make another CodecFedAvg"
            )
