"""A strategy around another one, for code that is given a strategy and starts it itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from gradcodec.errors import ConfigError
from gradcodec.integrations.flower.grid import CodecGrid
from gradcodec.settings import CodecConfig


class CodecStrategy(Strategy):
    """Compresses both directions of any strategy: ``CodecGrid`` in the form of a wrapper.

        strategy = CodecStrategy(FedAdam(), "int4")
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=10)

    ``start`` is the inner strategy's own, over a ``CodecGrid``; its messages, state and limits are
    described there. So it has to be the outermost wrapper: one around it would send by itself.

    Args:
        strategy: any strategy but ``CodecFedAvg``, which codes by itself; wrappers too.
        codec, downlink, error_feedback, rules, per_node: as for ``CodecGrid``.

    Raises:
        ConfigError: when training starts, as ``CodecGrid``; or another strategy wraps this one.
    """

    def __init__(
        self,
        strategy: Strategy,
        codec: str | CodecConfig | Mapping[str, Any],
        downlink: str | CodecConfig | Mapping[str, Any] = "int4",
        *,
        error_feedback: bool | None = None,
        rules: Sequence[Sequence[str]] = (),
        per_node: bool = False,
    ) -> None:
        self.strategy = strategy
        self._choice = codec, downlink
        self._options: dict[str, Any] = {
            "error_feedback": error_feedback,
            "rules": rules,
            "per_node": per_node,
        }

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **options: Any) -> Result:
        """As the inner strategy."""
        coded = CodecGrid(grid, *self._choice, **self._options)
        return self.strategy.start(coded, initial_arrays, *args, **options)

    def summary(self) -> None:
        """As the inner strategy."""
        self.strategy.summary()

    def _outermost(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            "expected CodecStrategy around all other strategies, got another one around it, whose "
            "messages it cannot reach: CodecStrategy(Wrapper(strategy), ...)"
        )

    configure_train = aggregate_train = configure_evaluate = aggregate_evaluate = _outermost
