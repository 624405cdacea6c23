"""Federated learning with a codec in both directions, framework-free.

``envelope`` is what surrounds payloads in a message; ``replica`` one participant's copy of the
global state; ``server`` aggregates replies and catches late clients up; ``client`` receives and
encodes what was trained; ``loop`` is the plain loop around them; ``checkpoint`` puts it on disk;
``collect`` gathers gradients for TGAP. ``auto`` is a federation that needs no codec to begin with;
``switch`` the codec that it broadcasts.
"""

from gradcodec.federated.auto import AutoClient, AutoConfig, AutoServer, server_for
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.loop import Federation, LocalResult, LoopConfig, RoundReport, Task
from gradcodec.federated.server import Server

__all__ = [
    "AutoClient",
    "AutoConfig",
    "AutoServer",
    "Client",
    "Federation",
    "LocalResult",
    "LoopConfig",
    "RoundReport",
    "Server",
    "ServerConfig",
    "Task",
    "server_for",
]
