"""NVFLARE: filters that encode updates on their way up and models on their way down.

``compress`` adds them to a recipe. ``update`` has the filters of results, ``model`` those of
tasks. ``carrier`` puts bytes into a DXO and takes them out again. What makes the bytes knows
nothing of NVFLARE: ``coding``, ``feedback``, and ``copies`` of the model that increments apply to.
The page is docs/nvflare.md.
"""

from gradcodec.integrations.nvflare.model import DecodeModel, EncodeModel
from gradcodec.integrations.nvflare.recipe import compress
from gradcodec.integrations.nvflare.update import DecodeUpdate, EncodeUpdate

__all__ = ["DecodeModel", "DecodeUpdate", "EncodeModel", "EncodeUpdate", "compress"]
