"""Federated learning with a codec in both directions, framework-free.

``envelope`` is what surrounds payloads in a message; ``replica`` one participant's copy of the
global state; ``client`` receives it and encodes what was trained; ``server`` collects replies
(``rounds``, ``exact``), closes rounds and catches late clients up (``history``). ``schedule`` says
which codecs a federation uses when, ``switch`` is a codec in a broadcast, ``tensors`` what is not
coded at all. ``loop`` is the plain loop around them; ``checkpoint`` puts it on disk; ``collect``
gathers gradients for TGAP.
"""

from gradcodec.federated.client import AutoClient, Client
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.loop import Federation, LocalResult, LoopConfig, RoundReport, Task
from gradcodec.federated.schedule import AutoConfig
from gradcodec.federated.server import AutoServer, Server, server_for

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
