"""Where a peer's clone is, and what to say when it is not there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

VARIABLE = "GRADCODEC_PEERS"


@dataclass(frozen=True)
class Checkout:
    """A repository that a peer is run from.

    Attributes:
        folder: in ``$GRADCODEC_PEERS``.
        url, commit: of the clone that was used here.
        file: one that is there if the clone is.
        needs: modules that its code imports, besides torch.
    """

    folder: str
    url: str
    commit: str
    file: str
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What is to be done before this peer can run, ``None`` if nothing."""
        root = os.environ.get(VARIABLE)
        clone = f"git clone {self.url} && git -C {self.folder} checkout {self.commit}"
        if not root:
            return f"{VARIABLE} is not set; set it to a folder in which you ran: {clone}"
        if not (Path(root) / self.folder / self.file).is_file():
            return f"no {self.folder}/{self.file} in ${VARIABLE}; there: {clone}"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"pip install {' '.join(absent)}" if absent else None

    def module(self, name: str) -> ModuleType:
        """Import a module of it.

        Raises:
            ImportError: the clone is not there, or lacks the module.
        """
        reason = self.missing()
        if reason:
            raise ImportError(reason)
        place = str(Path(os.environ[VARIABLE]) / self.folder)
        if place not in sys.path:
            sys.path.insert(0, place)
        return importlib.import_module(name)


EPFML = Checkout("powersgd", "https://github.com/epfml/powersgd", "f07be92", "powersgd/powersgd.py")
GRACE = Checkout(
    "grace", "https://github.com/sands-lab/grace", "fd3a7f4", "grace_dl/dist/__init__.py"
)
DEMO = Checkout("DeMo", "https://github.com/bloc97/DeMo", "0e48145", "demo.py", ("einops",))
