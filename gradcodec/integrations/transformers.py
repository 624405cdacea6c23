"""Hugging Face Trainer: compressed gradients by one callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradcodec.codec import Codec
from gradcodec.distributed.compress import compress
from gradcodec.distributed.compression import Compression
from gradcodec.errors import ConfigError
from gradcodec.integrations import training


class CompressCallback(TrainerCallback):
    """Compresses the gradients of a Trainer, or of one derived from it (trl's ``SFTTrainer``).

        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.add_callback(CompressCallback(trainer, "int4"))
        trainer.train()

    Each checkpoint gets a file per rank with the state of error feedback, which
    ``trainer.train(resume_from_checkpoint=True)`` reads. Whenever the Trainer logs, the ratio of
    bytes and the milliseconds a step of encoding, exchange and decoding are logged too, through
    the Trainer's own loggers.

    Args:
        trainer: the Trainer; its wrapped model, which callbacks are not given, is compressed.
        codec: as for ``gradcodec.compress``.
        resume_from: the folder of the checkpoint, where training is resumed from one outside
            ``output_dir``. Callbacks are not told it. If it was left out, a checkpoint of the same
            step in ``output_dir`` is not mistaken for it: the weights are compared.
        options: as for ``gradcodec.compress``.

    Attributes:
        compression: what ``gradcodec.compress`` returned; ``None`` before training, and if there
            is only one process, of which a log line tells.

    Raises, when training begins:
        ConfigError: the model cannot be compressed; the message says why and what can. Or
            ``resume_from`` was given, and training does not resume.
    """

    def __init__(
        self,
        trainer: Trainer,
        codec: Codec | str = "int4",
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._trainer, self._codec, self._options = trainer, codec, options
        self._resume_from = resume_from
        self._wrapped: Any = None
        self._figures = training.Figures()
        self.compression: Compression | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Compress what the Trainer has wrapped, and go on where its checkpoint was."""
        wrapped = self._trainer.model_wrapped
        if self._resume_from is not None and not state.global_step:
            raise ConfigError(
                f"resume_from={str(self._resume_from)!r} is where a resumed training goes on, and "
                "this one begins: train(resume_from_checkpoint=...), or leave it out"
            )
        if not training.parallel():
            return
        if wrapped is not self._wrapped:  # a second ``train`` goes on with the same one
            self.compression = compress(wrapped, self._codec, **self._options)
            self._wrapped, self._figures = wrapped, training.Figures()
        if state.global_step and self.compression is not None:
            path = training.file_in(self._resume_from or self._folder(args, state))
            weights = training.fingerprint(wrapped)
            training.load(self.compression, path, training.device_of(wrapped), weights)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Log figures beside what the Trainer has logged.

        As an entry of their own: loggers that were made before this callback have seen ``logs``
        already. Not from ``on_step_end``, where logging would take the place of the Trainer's.
        """
        if self.compression is None or (logs and "gradcodec/ratio" in logs):
            return
        figures = self._figures.since(self.compression)
        if figures:
            self._trainer.log(figures)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add this rank's file to the checkpoint."""
        if self.compression is not None:
            path = training.file_in(self._folder(args, state))
            training.save(self.compression, path, training.fingerprint(self._wrapped))

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
