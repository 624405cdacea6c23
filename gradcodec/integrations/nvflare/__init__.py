"""NVFLARE: filters that encode updates on their way up and models on their way down.

``compress`` adds them to a recipe. ``update`` has the filters of results, ``model`` those of
tasks. ``carrier`` puts bytes into a DXO and takes them out again. Four modules know nothing of
NVFLARE: ``coding``, ``tables`` and ``feedback`` make the bytes, ``copies`` has the copies of the
model that increments apply to. The page is docs/nvflare.md.
"""

from gradcodec.integrations.nvflare.model import DecodeModel, EncodeModel
from gradcodec.integrations.nvflare.recipe import compress
from gradcodec.integrations.nvflare.update import DecodeUpdate, EncodeUpdate

__all__ = ["DecodeModel", "DecodeUpdate", "EncodeModel", "EncodeUpdate", "compress"]
