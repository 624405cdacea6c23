"""Federations whose codec changes by plan: narrow first, wide last.

    plan  ((0, "pre"), (3, "wide"))            a fitted subspace, then rotated signs
    plan  ((0, "wide"), (2, "fit"), (6, "wide"))   the same without any preparation

``"pre"`` trains in a subspace that was fitted beforehand, ``"fit"`` in one that the server fits on
the replies of all wide rounds so far and sends in the stream, ``"wide"`` sends rotated signs of
whole updates. Every byte is in the messages, but that of ``"pre"``'s basis, which is a download.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import RotatedSign, Subspace
from gradcodec.errors import TrainingError
from gradcodec.federated import Client, Server, ServerConfig
from gradcodec.federated.envelope import KINDS, Reply
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.federated.schedule import Stage
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.registry import make_codec
from gradcodec.tgap import SignalMoments, fit_subspace
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload

Plan = tuple[tuple[int, str], ...]
"""First round and kind of each stage, in order; ``"pre:16:64"`` is ``"pre"`` at ratio 16 with 64 of
256 values."""


@dataclass
class Planned:
    """A schedule (``gradcodec.federated.schedule.Schedule``) that follows a plan.

    Attributes:
        plan: the stages.
        wide: uplink and downlink codec of wide stages.
        subspace: what to fit.
        pre: the subspace of ``"pre"``.
        lr: server learning rate of wide stages.
    """

    plan: Plan
    wide: tuple[Codec, Codec]
    subspace: SubspaceConfig
    pre: Mapping[str, Subspace] = field(default_factory=dict)
    lr: float = 1.0
    down: str = "int2"

    def __post_init__(self) -> None:
        self._heard: dict[ClientId, Reply] = {}
        self._rounds: list[list[Payload]] = []
        self.first = self._stage(self.plan[0][1], None)

    def config(self, mode: str) -> ServerConfig:
        """Mean of updates, or of codes."""
        return ServerConfig(mode=mode, lr=self.lr if mode == "post" else 1.0)

    def check(self, spec: UpdateSpec) -> None:
        """A fit that fails leaves the stage as it is."""

    def hear(self, reply: Reply, value: Tensor) -> None:
        """Keep it for a fit."""
        self._heard[reply.client] = reply

    def next(
        self, round: int, spec: UpdateSpec, mode: str, counted: Container[ClientId]
    ) -> Stage | None:
        """The stage that the plan begins in this round."""
        heard = sorted(self._heard.values(), key=lambda r: in_order(r.client))
        self._heard = {}
        if mode == "post":
            self._rounds.append([r.payload for r in heard if r.client in counted])
        kind = dict(self.plan).get(round)
        return None if kind is None else self._stage(kind, spec)

    def _stage(self, kind: str, spec: UpdateSpec | None) -> Stage | None:
        if kind == "wide":
            return Stage(*self.wide, self.config("post"))
        transform = self.pre[kind] if kind.startswith("pre") else self._fitted(spec)
        if transform is None:
            return None
        kept = int(kind.split(":")[2]) if kind.count(":") == 2 else 256
        up, down = RotatedSign(RotatedSignConfig(kept=kept)), make_codec(self.down)
        return Stage(Chain(transform, up), Chain(transform, down), self.config("latent"))

    def _fitted(self, spec: UpdateSpec) -> Subspace | None:
        moments = SignalMoments(spec, self.subspace)
        reader = self.wide[0].bind(spec).decoder
        for payloads in self._rounds:
            if len(payloads) >= 2:
                moments.add_round([reader.decode(p) for p in payloads])
        try:
            return fit_subspace(moments, self.subspace)
        except TrainingError:
            return None

    def state_dict(self) -> dict[str, Tensor]:
        """Runs of the benchmark are not resumed in the middle."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], spec: UpdateSpec, fits: int) -> None:
        """Nothing."""


class PlannedServer(Server):
    """The server of a planned federation; ``client`` makes its clients."""

    def __init__(self, initial: Update, schedule: Planned) -> None:
        self._start(initial, schedule)

    def _new_client(self, number: ClientId) -> Client:
        client = Client.__new__(Client)
        client._start(number, self._first.first, self.schedule, KINDS)
        return client
