"""Flower: compression in both directions, for any strategy or in code space.

Any strategy, and client code as it is:

    app = ClientApp(mods=[CompressMod()])                                  # client
    strategy.start(grid=CodecGrid(grid, "int4"), initial_arrays=arrays)    # server
    CodecStrategy(strategy, "int4").start(grid=grid, ...)                  # the same, as a wrapper

Codes trained and added, codecs fitted on the way:

    participant = Participant(message, context, model)                     # client
    CodecFedAvg("subspace:auto").start(grid=grid, initial_arrays=arrays)   # server

``CompressMod`` does not load torch before a message is coded; the others load it when they are
imported.
"""

import importlib
from typing import TYPE_CHECKING

from gradcodec.integrations.flower.mod import CompressMod

if TYPE_CHECKING:
    from gradcodec.integrations.flower.container import to_record
    from gradcodec.integrations.flower.grid import CodecGrid
    from gradcodec.integrations.flower.participant import Participant
    from gradcodec.integrations.flower.strategy import CodecFedAvg
    from gradcodec.integrations.flower.wrapper import CodecStrategy
else:
    _FILES = {
        "CodecFedAvg": "strategy",
        "CodecGrid": "grid",
        "CodecStrategy": "wrapper",
        "Participant": "participant",
        "to_record": "container",
    }

    def __getattr__(name):
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


__all__ = ["CodecFedAvg", "CodecGrid", "CodecStrategy", "CompressMod", "Participant", "to_record"]
