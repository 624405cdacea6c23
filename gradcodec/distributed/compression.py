"""What ``compress`` returns, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from gradcodec.distributed.meter import Traffic
from gradcodec.errors import TrainingError

State = dict[str, Tensor | int]
"""What ``state_dict`` returns: a flat dictionary of CPU tensors and whole numbers only."""

Self = TypeVar("Self", bound="Closing")


@runtime_checkable
class Compression(Protocol):
    """The compressed gradients of one model on one rank.

    ``compress`` returns one for DDP, FSDP1, FSDP2, HSDP and groups over a compressed backend. They
    differ in what they name: DDP compresses *parameters*, FSDP its *units* (the modules that it
    shards one by one), and a compressed group knows no names.

        with compress(model, "int4") as compression:
            train(model)
            print(compression.stats()["wire_bytes"])
    """

    @property
    def step(self) -> int:
        """Steps so far: backward passes that exchanged gradients; for a group, its all-reduces."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds so far, of this rank."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters since ``compress``, of this rank; plain numbers and texts.

        Every compression has all of these keys:

        - ``steps``: as ``step``.
        - ``dense_bytes``: bytes of the gradients before coding.
        - ``dense_wire_bytes``: bytes that this rank would have sent without compression, in a ring.
        - ``wire_bytes``: bytes that this rank has sent.
        - ``residual_bytes``: memory of error feedback.
        - ``encode_seconds``, ``exchange_seconds``, ``decode_seconds``: time of each, summed
          over threads; waiting for slower ranks is part of the exchange.
        - ``codecs``: the codec that is used, by parameter, unit or group.
        - ``substituted``: names of codecs that were asked for, mapped to the codecs used instead:
          in a reduce-scatter ``"int4"`` becomes ``"int4-unbiased"`` (see ``plan.scattered_codec``).
        - ``nmse``: relative squared error of the coding, by parameter or unit, where it was
          measured.
        - ``partial``: reductions that lacked some parameters of a unit, so that its error feedback
          paused.
        - ``auto``: what ``codec="auto"`` has decided and why, else ``None``.
        """
        ...

    def state_dict(self) -> State:
        """What a resumed run needs to continue with equal bits; every rank has its own."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor | int], *, strict: bool = True) -> None:
        """Go on where ``state_dict`` was taken. All ranks load, between the same two steps.

        Args:
            state: what ``state_dict`` returned on the rank with this number.
            strict: ``False`` is for a model that has changed since. The state of names that are
                gone, or that have another shape now, is dropped with a log line, and new names
                start at zero.

        Raises:
            ConfigError: a value is not what ``state_dict`` returns or, if ``strict``, belongs to
                another model.
        """
        ...

    def close(self) -> None:
        """End the compression. A backward pass that comes after it raises ``TrainingError``."""
        ...

    def __enter__(self) -> Compression: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        ...


def closed_error() -> TrainingError:
    """What a backward pass of a closed compression raises."""
    return TrainingError(
        "the compression of this model was closed; to train on, wrap the model anew and compress "
        "that"
    )


class Closing:
    """The part of ``Compression`` that is the same for all: it can be closed, once and for good.

    Attributes:
        closed: whether ``close`` was called.
    """

    closed = False

    def close(self) -> None:
        """End the compression. A backward pass that comes after it raises ``TrainingError``."""
        self.closed = True

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
