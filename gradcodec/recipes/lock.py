"""A lock that lets one process at a time use a run's folder, and that ends with the process."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import weakref
from datetime import datetime
from pathlib import Path

from gradcodec.errors import ConfigError

NAME = ".lock"

_log = logging.getLogger(__name__)

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # Lock a byte behind the text: on Windows other processes cannot read locked bytes.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Holds ``folder/.lock`` until ``release``, or until the process ends, however it ends.

    The file is not deleted: what counts is the operating system's lock on it. Its content serves
    only the error message of a second process.

    Args:
        folder: an existing folder.

    Raises:
        ConfigError: another process holds the lock, or another ``FolderLock`` of this process.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            _lock(descriptor)
        except OSError as err:
            if err.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                self.release()
                raise ConfigError(
                    f"{folder} is in use by {_holder(path)}; wait until that has ended, stop it, "
                    "or choose another folder (--out)"
                ) from None
            # ENOLCK, EOPNOTSUPP, ENOSYS: some network filesystems.
            _log.warning(
                "%s cannot be locked (%s): see to it that no other process uses it",
                folder,
                os.strerror(err.errno or 0),
            )
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(mine).encode() + b"\n")


def _holder(path: Path) -> str:
    """Who wrote the lock file, in words."""
    try:
        row = json.loads(path.read_bytes())
        return f"process {int(row['pid'])} on {row['host']} since {row['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is not written yet
        return "another process"
