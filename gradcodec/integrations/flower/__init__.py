"""Flower: compression in both directions, for any strategy or in code space.

Any strategy, and client code as it is:

    app = ClientApp(mods=[CompressMod()])                                  # client
    strategy.start(grid=CodecGrid(grid, "int4"), initial_arrays=arrays)    # server
    CodecStrategy(strategy, "int4").start(grid=grid, ...)                  # the same, as a wrapper

Codes trained and added, codecs fitted on the way:

    participant = Participant(message, context, model)                     # client
    CodecFedAvg("subspace:auto").start(grid=grid, initial_arrays=arrays)   # server
"""

from gradcodec.integrations.flower.grid import CodecGrid
from gradcodec.integrations.flower.mod import CompressMod
from gradcodec.integrations.flower.participant import Participant
from gradcodec.integrations.flower.strategy import CodecFedAvg
from gradcodec.integrations.flower.wrapper import CodecStrategy

__all__ = ["CodecFedAvg", "CodecGrid", "CodecStrategy", "CompressMod", "Participant"]
