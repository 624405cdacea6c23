"""Other projects' code, imported where it is used and never required."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

OPENFL = (
    "EDEN is OpenFL's code, which is not installed: pip install 'gradcodec[bench]', or without the "
    "dependencies of its servers: pip install --no-deps openfl==1.9"
)
BITSANDBYTES = (
    "the 4- and 8-bit casts are bitsandbytes' code, which is not installed: "
    "pip install 'gradcodec[bench]', or pip install bitsandbytes"
)


def openfl_eden() -> Any:
    """OpenFL's ``Eden`` class.

    Its package imports k-means pipelines beside EDEN, hence scikit-learn. Only EDEN's module and
    the one it needs are imported here, under a package of the same name that imports nothing.

    Raises:
        ImportError: OpenFL is not installed.
    """
    try:
        found = importlib.util.find_spec("openfl")
    except ValueError:  # a module without a spec stands in for it
        found = None
    if found is None or not found.submodule_search_locations:
        raise ImportError(OPENFL)
    name = "openfl.pipelines"
    if name in sys.modules:
        return importlib.import_module(f"{name}.eden_pipeline").Eden
    bare = ModuleType(name)
    bare.__path__ = [str(Path(found.submodule_search_locations[0]) / "pipelines")]
    sys.modules[name] = bare
    try:
        return importlib.import_module(f"{name}.eden_pipeline").Eden
    finally:
        # Whoever imports OpenFL's own package later must get all of it.
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]


def bitsandbytes_functional() -> Any:
    """The module ``bitsandbytes.functional``.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(BITSANDBYTES)
    return importlib.import_module("bitsandbytes.functional")
