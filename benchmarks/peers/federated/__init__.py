"""Published competitors, each a ``federated.methods.Method`` whose messages really are bytes.

| peer              | paper                  | up                       | down                    |
|-------------------|------------------------|--------------------------|-------------------------|
| `Peer`            | FedAvg, 1602.05629     | fp32                     | fp32 state              |
| `EDEN`            | 2108.08842, OpenFL 1.9 | rotated, 1-8 bits        | fp32 state, or the same |
| `FLASC`           | 2406.05233             | top-k, fp32              | top-k state, fp32       |
| `EcoLoRA`         | 2506.02001             | one segment, top-k, fp16 | top-k increments, fp16  |
| `SparseLoCo`      | 2508.15706             | chunk top-k, 2 bits, EF  | fp32 state              |
| `SignEF`          | 1901.09847             | signs, EF                | fp32 state, or the same |
| `FFALoRA`         | 2403.12313             | B alone, fp32            | B alone, fp32           |
| `FedSB`           | 2502.15436             | r x r cores, fp32        | cores, fp32             |
| `FedKSeed`        | 2312.06353             | seeds' scalars, fp32     | the same, increments    |
| `Ferret`          | 2409.06277             | random directions, fp32  | fp32 state              |
| `Cast`            | NVFLARE, 2305.14314    | fp16, int8, fp4 or nf4   | the same, of the state  |
| `random_subspace` | 1804.08838             | random subspace, 2 bits  | the same, increments    |

Each class says what it takes from its paper, and every choice and deviation. Where a reading is
open the one kinder to the peer is the default. The rules are the same for all: the initial state
and the tensor table are known to everyone, constants are public, and whatever else the other end
uses was in a counted message. Around a body there are 16 bytes up and 10 bytes down (``envelope``);
nothing but those 10 is sent before the first round is closed. Means are weighted by examples.

EDEN needs OpenFL and the 4- and 8-bit casts need bitsandbytes; both are imported when one is made.
"""

from benchmarks.peers.federated.base import Peer
from benchmarks.peers.federated.cast import Cast
from benchmarks.peers.federated.ecolora import EcoLoRA
from benchmarks.peers.federated.eden import EDEN
from benchmarks.peers.federated.fed_sb import FedSB
from benchmarks.peers.federated.fedkseed import FedKSeed
from benchmarks.peers.federated.ferret import Ferret
from benchmarks.peers.federated.ffa import FFALoRA
from benchmarks.peers.federated.flasc import FLASC
from benchmarks.peers.federated.random_subspace import random_subspace
from benchmarks.peers.federated.sign_ef import SignEF
from benchmarks.peers.federated.sparseloco import SparseLoCo

__all__ = [
    "EDEN",
    "FLASC",
    "Cast",
    "EcoLoRA",
    "FFALoRA",
    "FedKSeed",
    "FedSB",
    "Ferret",
    "Peer",
    "SignEF",
    "SparseLoCo",
    "random_subspace",
]
