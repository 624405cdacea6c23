"""Client-level differential privacy of replies, and sums that hide their terms.

``mechanism`` bounds a client's update or code and adds noise; ``accounting`` says what that
guarantees (extra ``privacy``); ``masks`` turns codes into integers whose sum is all that a server
needs. ``gradcodec.federated`` uses the mechanism (``ServerConfig(privacy=...)``).
"""

from gradcodec.privacy.accounting import EPSILONS, Spent, calibrate, presets, spend
from gradcodec.privacy.masks import FixedPoint, pairwise_mask
from gradcodec.privacy.mechanism import ClientPrivacy

__all__ = [
    "EPSILONS",
    "ClientPrivacy",
    "FixedPoint",
    "Spent",
    "calibrate",
    "pairwise_mask",
    "presets",
    "spend",
]
