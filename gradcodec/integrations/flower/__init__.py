"""Flower: a client mod and a wrapper of the server's grid that compress both directions.

app = ClientApp(mods=[CompressMod()])                                  # client
strategy.start(grid=CodecGrid(grid, "int4"), initial_arrays=arrays)    # server
"""

from gradcodec.integrations.flower.grid import CodecGrid
from gradcodec.integrations.flower.mod import CompressMod

__all__ = ["CodecGrid", "CompressMod"]
