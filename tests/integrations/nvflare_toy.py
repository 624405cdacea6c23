"""Messages of NVFLARE as filters get them, without a job around."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from torch import Tensor

Values = Mapping[str, Any]


def context(site: str = "site-1", peer: FLContext | None = None) -> FLContext:
    """The context of a site, and of the peer that sent what it looks at."""
    made = FLContext()
    made.set_prop(ReservedKey.IDENTITY_NAME, site, private=False)
    if peer is not None:
        made.set_peer_context(peer)
    return made


def update(**tensors: Any) -> DXO:
    """A ``WEIGHT_DIFF``."""
    return DXO(DataKind.WEIGHT_DIFF, tensors, {"NUM_STEPS_CURRENT_ROUND": 3})


def through(dxo: DXO, *filters: Filter, at: FLContext | None = None) -> DXO:
    """A DXO after filters, each of which NVFLARE gives the shareable."""
    shareable = dxo.to_shareable()
    for one in filters:
        shareable = one.process(shareable, at or context())
    return from_shareable(shareable)


def tensors(dxo: DXO) -> dict[str, Tensor]:
    """Its values as tensors."""
    return {name: torch.as_tensor(np.asarray(value)) for name, value in dxo.data.items()}
