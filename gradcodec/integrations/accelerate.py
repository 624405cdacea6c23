"""Accelerate: compressed gradients by one call after ``prepare``."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from accelerate import Accelerator
from torch import nn

from gradcodec.codec import Codec
from gradcodec.distributed.compress import compress as compress_gradients
from gradcodec.distributed.compression import Compression
from gradcodec.integrations import training

_models: WeakKeyDictionary[Accelerator, int] = WeakKeyDictionary()
"""How many models of each accelerator are compressed; every one has files of its own."""


def compress(
    accelerator: Accelerator, model: nn.Module, codec: Codec | str = "int4", **options: Any
) -> Compression | None:
    """Compress a model's gradients, and their state in the accelerator's checkpoints.

        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        compression = compress(accelerator, model, "int4")

    ``accelerator.save_state`` writes a file per rank beside its own, ``load_state`` reads it. For
    several models call it once for each, in the same order in every run.

    Args:
        accelerator: the accelerator that has prepared the model.
        model: what ``accelerator.prepare`` returned. Do not set ``comm_hook`` in
            ``DistributedDataParallelKwargs`` as well: DDP has room for one hook.
        codec: as for ``gradcodec.compress``.
        options: likewise.

    Returns:
        What ``gradcodec.compress`` returns; ``None`` if there is only one process, of which a log
        line tells.

    Raises:
        ConfigError: the model cannot be compressed; the message says why and what can.
    """
    if not training.parallel():
        return None
    compression = compress_gradients(model, codec, **options)
    device = training.device_of(model)
    which = _models.get(accelerator, 0)
    _models[accelerator] = which + 1
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: training.save(compression, training.file_in(folder, which))
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: training.load(compression, training.file_in(folder, which), device)
    )
    return compression


class Log:
    """What steps cost, for ``accelerator.log``.

        figures = Log(accelerator, compression)
        ...
        figures(step)          # as often as you like

    It logs the ratio, and milliseconds a step, since it was called last.
    """

    def __init__(self, accelerator: Accelerator, compression: Compression | None) -> None:
        self._accelerator, self._compression = accelerator, compression
        self._figures = training.Figures()

    def __call__(self, step: int) -> None:
        """Log what the steps since the last call cost; nothing if nothing is compressed."""
        if self._compression is not None:
            figures = self._figures.since(self._compression)
            if figures:
                self._accelerator.log(figures, step=step)
