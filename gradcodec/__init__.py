"""Gradient compression for PyTorch: learned and fixed codecs for federated training.

See ``README.md`` for a tour, ``WIRE.md`` for the bytes, ``docs/architecture.md`` for the map.

Importing the package does not load torch, which takes seconds: the command line answers ``--help``
without it, and a Flower node passes on messages that are not coded. The first use of a public name
loads it.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from gradcodec._version import __version__ as __version__

if TYPE_CHECKING:
    from gradcodec._public import *  # noqa: F403
else:

    def __getattr__(name):
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        if name == "__all__" or not name.startswith("_"):
            public = importlib.import_module(f"{__name__}._public")
            globals().update({key: getattr(public, key) for key in ("__all__", *public.__all__)})
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
