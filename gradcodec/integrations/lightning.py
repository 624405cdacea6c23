"""Lightning: compressed gradients by one callback."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from gradcodec.codec import Codec
from gradcodec.distributed.compress import compress
from gradcodec.distributed.compression import Compression
from gradcodec.errors import ConfigError
from gradcodec.integrations import training

KEY = "gradcodec"
"""The entry of Lightning's checkpoint."""


class CompressCallback(Callback):
    """Compresses the gradients of a Lightning Trainer, on any device.

        trainer = lightning.Trainer(strategy="ddp", callbacks=[CompressCallback("int4")])
        trainer.fit(module, data)

    Lightning's checkpoint holds the state of error feedback of every rank, as bytes, and
    ``trainer.fit(..., ckpt_path=...)`` takes it from there. Every ``log_every_n_steps`` the ratio
    of bytes and the milliseconds a step of encoding, exchange and decoding go to Lightning's
    loggers.

    Args:
        codec: as for ``gradcodec.compress``.
        options: likewise.

    Attributes:
        compression: what ``gradcodec.compress`` returned; ``None`` before training, and if there
            is only one process, of which a log line tells.

    Raises, when training begins:
        ConfigError: the model cannot be compressed, or the checkpoint's state is damaged.
    """

    def __init__(self, codec: Codec | str = "int4", **options: Any) -> None:
        self._codec, self._options = codec, options
        self._saved: Any = None
        self._figures = training.Figures()
        self.compression: Compression | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress what the strategy has wrapped, and go on where the checkpoint was."""
        if not training.parallel():
            return
        wrapped = trainer.strategy.model
        if not isinstance(wrapped, nn.Module):
            raise ConfigError(f"expected a wrapped module, got {type(wrapped).__name__}")
        self.compression = compress(wrapped, self._codec, **self._options)
        self._figures = training.Figures()
        rows, self._saved = self._saved, None
        if rows is None:
            return
        rank = dist.get_rank()
        if training.everywhere(rank < len(rows), training.device_of(wrapped)):
            # All rows, so that damage in one is an error on every rank: none waits for another.
            states = [training.state_from(row) for row in rows]
            self.compression.load_state_dict(states[rank])
        else:
            training.logger.warning(
                "gradcodec: the checkpoint is of %d ranks: error feedback starts anew", len(rows)
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log, as often as the Trainer does."""
        every = int(getattr(trainer, "log_every_n_steps", 50))  # set where mypy does not look
        if self.compression is None or not every or trainer.global_step % every:
            return
        figures = self._figures.since(self.compression)
        for logger in trainer.loggers if figures else ():
            logger.log_metrics(figures, step=trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the states of all ranks; all of them come here, rank 0 writes."""
        if self.compression is not None:
            device = training.device_of(pl_module)
            checkpoint[KEY] = training.gathered(self.compression.state_dict(), device)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the states until the model is wrapped, if it will be trained."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._saved = checkpoint.get(KEY) if fitting else None
