"""What server and clients agree on: the settings, and the codecs that follow from them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from gradcodec.codec import Codec
from gradcodec.errors import ConfigError
from gradcodec.federated.aggregation import Averager
from gradcodec.federated.replica import Space, for_state
from gradcodec.federated.tensors import Rules, with_rules
from gradcodec.privacy.mechanism import ClientPrivacy
from gradcodec.representation import SENT, check
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import DIGEST_BYTES

ROBUST = ("trimmed", "median")
TRIM = 0.1
AGGREGATIONS = ("mean", "sum", *ROBUST)


@dataclass(frozen=True)
class ServerConfig:
    """How replies become the next global state.

    Attributes:
        mode: ``"post"`` (finished updates are encoded) or ``"latent"`` (codes were trained).
        representation: what clients send (see ``gradcodec.representation``); ``latent`` needs
            ``"update"``.
        aggregation: ``"mean"``, weighted by examples (McMahan et al., arXiv 1602.05629), or
            ``"sum"``, the literal reading of CG-FedLLM's Algorithm 1. ``"trimmed"`` and
            ``"median"`` withstand bad clients (``gradcodec.federated.robust``): every client
            counts once, whatever number of examples it claims, and a round holds all replies, up
            to ``hold_bytes``.
        trim: only with ``"trimmed"``: share of the replies that are left out at each end of a
            coordinate; below 1/2, and at least the share of bad clients. ``None``: 0.1.
        lr: server learning rate on the aggregated update (the paper's eta).
        momentum: server momentum (FedAvgM, Hsu et al., arXiv 1909.06335); costs no bytes.
        feedback: keep what a broadcast's quantisation lost and add it to the next broadcast.
        rules: ``(pattern, codec)`` by tensor name, the first match wins, in both directions:
            ``(("*.bias", "fp32"), ("*embed*", "int8"))``. Integers and buffers need no rule: they
            travel bit for bit (``gradcodec.federated.tensors``).
        max_norm: most that a reply may weigh, by the L2 norm of what is averaged: its code, or its
            decoded update. A longer one is scaled down to it, so that one client of ``n`` equal
            ones moves the model by ``lr * max_norm / n`` at most, whatever it sends. Kept tensors
            are not bounded, and neither is the number of examples, which is its own claim.
            ``None``: no bound.
        privacy: clip and noise each reply at the client (``gradcodec.privacy.ClientPrivacy``).
            Every client counts once then and the number of examples, which is private, is not
            sent; tensors that travel bit for bit are refused.
        max_replies: most replies that a round accepts.
        hold_bytes: most bytes of replies that a round keeps out of its running sum. These are the
            loudest replies, which may have to be dropped (``Server.close_round``).
        relay: replies go down as they came: a broadcast holds the replies of each round that its
            client missed, and the client decodes and averages them as the server did. Nothing is
            coded twice, so nothing more is lost, and where few clients reply below one bit a value
            this is the smallest way down. There is no downlink codec, both ends need the same
            settings, and ``hold_bytes`` must fit all replies of a round. **Every client reads every
            reply** and its number of examples, and can often tell whose it is. A server keeps the
            replies of all rounds, as it keeps other increments.
    """

    mode: str = "post"
    representation: str = "update"
    aggregation: str = "mean"
    lr: float = 1.0
    momentum: float = 0.0
    feedback: bool = True
    rules: Rules = ()
    max_norm: float | None = None
    trim: float | None = None
    privacy: ClientPrivacy | None = None
    max_replies: int = 1_000_000
    hold_bytes: int = 64 << 20
    relay: bool = False

    def __post_init__(self) -> None:
        check(self.representation, SENT)
        if self.mode not in ("post", "latent"):
            raise ConfigError(f"expected mode 'post' or 'latent', got {self.mode!r}")
        if self.mode == "latent" and self.representation != "update":
            raise ConfigError(f"latent mode sends updates, got {self.representation!r}")
        if self.aggregation not in AGGREGATIONS:
            raise ConfigError(f"expected aggregation of {AGGREGATIONS}, got {self.aggregation!r}")
        if not (0 < self.lr < math.inf and 0 <= self.momentum < 1):
            raise ConfigError(
                f"expected a finite lr > 0 and momentum in [0, 1), got {self.lr}, {self.momentum}"
            )
        plain = self.lr == 1.0 and self.momentum == 0.0
        if self.representation != "update" and not plain:
            raise ConfigError("server lr and momentum act on updates, not on states")
        if self.max_norm is not None and not 0 < self.max_norm < math.inf:
            raise ConfigError(f"expected a finite max_norm > 0 or None, got {self.max_norm!r}")
        if self.max_norm is not None and self.representation != "update":
            raise ConfigError("max_norm bounds updates, not states")
        if self.trim is not None and not 0 < self.trim < 0.5:
            raise ConfigError(f"expected a trim within (0, 1/2), got {self.trim!r}")
        if self.trim is not None and self.aggregation != "trimmed":
            raise ConfigError(
                f"trim={self.trim} is of aggregation 'trimmed', got {self.aggregation!r}"
            )
        if self.robust and self.representation != "update":
            raise ConfigError(f"{self.aggregation!r} is of updates, not of states")
        self._check_privacy()
        self._check_relay()
        for name, least in (("max_replies", 1), ("hold_bytes", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"expected {name} of at least {least}, got {value!r}")
        if (self.relay or self.robust) and not self.hold_bytes:
            raise ConfigError(
                "a relay and a robust aggregation hold all replies of a round: expected hold_bytes "
                "above 0"
            )
        for rule in self.rules:
            pair = isinstance(rule, tuple) and len(rule) == 2
            if not pair or not (isinstance(rule[0], str) and isinstance(rule[1], str | Codec)):
                raise ConfigError(f"expected rules as (pattern, codec) pairs, got {rule!r}")

    @property
    def robust(self) -> bool:
        """Whether a few bad replies cannot move the aggregate far."""
        return self.aggregation in ROBUST

    @property
    def cut(self) -> float | None:
        """Share of the replies that is left out at each end; ``None`` leaves the median."""
        if self.aggregation == "median":
            return None
        return TRIM if self.trim is None else self.trim

    @property
    def equal(self) -> bool:
        """Whether every reply has the same weight."""
        return self.aggregation != "mean" or self.privacy is not None

    @property
    def rule(self) -> bytes:
        """8 bytes that pin how replies become a step: SHA-256 of the settings that decide it."""
        numbers = (self.cut if self.robust else None, self.lr, self.max_norm)
        cut, lr, most = (None if n is None else float(n) for n in numbers)  # 1 is 1.0
        settings = (self.mode, self.aggregation, cut, self.equal, lr, most)
        return hashlib.sha256(repr(settings).encode()).digest()[:DIGEST_BYTES]

    def _check_relay(self) -> None:
        if type(self.relay) is not bool:
            raise ConfigError(f"expected relay of True or False, got {self.relay!r}")
        if not self.relay:
            return
        if self.representation != "update":
            raise ConfigError(f"a relay sends updates on, not {self.representation!r}")
        if self.momentum:
            raise ConfigError(
                "clients of a relay take the server's step from a round's replies alone: expected "
                f"momentum 0, got {self.momentum}"
            )
        if self.privacy is not None and self.privacy.shares > 1:
            raise ConfigError(
                f"each reply holds one of {self.privacy.shares} shares of the noise, and a relay "
                "shows each reply to every client: expected shares=1, or no relay"
            )

    def _check_privacy(self) -> None:
        privacy = self.privacy
        if privacy is None:
            return
        if not isinstance(privacy, ClientPrivacy):
            raise ConfigError(f"expected privacy as ClientPrivacy or None, got {privacy!r}")
        if self.representation != "update":
            raise ConfigError("privacy bounds updates, not states")
        if self.mode == "latent" and privacy.place != "code":
            raise ConfigError("latent mode trains codes: expected privacy of place 'code'")
        if privacy.shares > 1 and (self.robust or self.max_norm is not None):
            raise ConfigError(
                f"the noise of {privacy.shares} replies adds up in their plain sum alone: expected "
                "aggregation 'mean' or 'sum' and no max_norm (the clients' clip is a bound)"
            )


def codecs_for(
    coded: Update, uplink: Codec, downlink: Codec | None, config: ServerConfig
) -> tuple[Codec, Codec]:
    """Uplink and downlink codec of the coded tensors, rules applied; server and clients call it.

    Raises:
        ConfigError, UpdateError: a codec or a rule does not fit the tensors.
    """
    spec = UpdateSpec.of(coded)
    up = for_state(with_rules(uplink, spec, config.rules), coded)
    if downlink is None:
        return up, up
    return up, for_state(with_rules(downlink, spec, config.rules), coded)


def space_of(uplink: Codec, downlink: Codec, config: ServerConfig) -> Space:
    """How broadcasts move a participant's replica under these settings."""
    latent, absolute = config.mode == "latent", config.representation != "update"
    if not config.relay:
        return Space(downlink, latent, absolute)
    averager = Averager(uplink, config, in_code=latent or uplink.linear)
    return Space(uplink, latent, averager=averager)
