"""Federated learning with a codec in both directions, framework-free.

``client`` receives the global state and encodes what was trained; ``server`` collects replies
(``admission`` says which, ``rounds`` and ``exact`` add them up), closes rounds (``next_state``) and
brings late clients up to date (``history``);
``restore`` makes it again from what it has sent, and ``auto`` has both ends that fit their codec.
``replica`` is one participant's copy of the global state, ``envelope`` the bytes around payloads in
a message.
In a relay clients average a round's replies themselves: ``relayed`` are the bytes, ``aggregation``
is what both ends compute.
``schedule`` decides which codecs each round uses, ``switch`` sends a new codec in a broadcast, and
``tensors`` tells which tensors are not coded at all. ``loop`` is the plain training loop around
them; ``checkpoint`` saves it to disk; ``collect`` gathers gradients for TGAP.
"""

from gradcodec.federated.auto import AutoClient, AutoServer, server_for
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.loop import Federation, LocalResult, LoopConfig, RoundReport, Task
from gradcodec.federated.schedule import AutoConfig
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
