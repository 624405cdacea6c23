"""TGAP, Temporal-ensemble Gradient-Aware Pre-training (CG-FedLLM, arXiv 2405.13746).

Gather gradients of a model over clients and time, then fit the Encoder and Decoder on them:

    recorder   attaches to any training loop; streams second moments, stores snapshots
    moments    second moments in memory that does not grow with the number of steps
    signal     second moments of what clients agree on, gathered by a server
    snapshots  bounded store of whole updates on disk
    fit_*      from statistics to a codec
"""

from gradcodec.tgap.fit_autoencoder import fit_autoencoder
from gradcodec.tgap.fit_subspace import fit_subspace
from gradcodec.tgap.moments import SecondMoments
from gradcodec.tgap.recorder import GradientRecorder
from gradcodec.tgap.signal import SignalMoments
from gradcodec.tgap.snapshots import SnapshotStore

__all__ = [
    "GradientRecorder",
    "SecondMoments",
    "SignalMoments",
    "SnapshotStore",
    "fit_autoencoder",
    "fit_subspace",
]
