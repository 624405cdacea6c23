"""From a codec's name to its folder: a bundled codec, a folder on disk or a Hub repository."""

from __future__ import annotations

from pathlib import Path

from gradcodec.encodable import shown
from gradcodec.errors import ConfigError, HubError
from gradcodec.hub.folder import HALVES, Folder
from gradcodec.hub.local import bundled, bundled_path, read_folder
from gradcodec.hub.remote import REPO_ID, download
from gradcodec.names import wrong_name

_SHOWN_OF_A_PATH = 200


def read(name: str | Path, *, revision: str | None = None, half: str | None = None) -> Folder:
    """Read a codec by name.

    Args:
        name: tried in this order: a bundled name, an existing folder, a Hub id ``user/name``.
        revision: branch, tag or commit; only a Hub repository has one.
        half: ``"encoder"`` or ``"decoder"`` reads only the weights of that half. The digests of
            all weights are always read, so the codec's identity does not depend on ``half``.

    Raises:
        HubError: the codec is missing, unreachable, incomplete or altered.
        ConfigError: ``config.json`` is of a newer schema, or has unknown, missing or bad entries.
    """
    if half is not None and half not in HALVES:
        raise ConfigError(f"expected half of {sorted(HALVES)} or None, got {half!r}")
    if not isinstance(name, str | Path):
        raise ConfigError(f"expected a codec's name or folder, got {shown(name)}")
    local = bundled_path(name) if isinstance(name, str) and name in bundled() else Path(name)
    try:
        here = local.is_dir()
    except OSError as err:  # a name too long for a file system
        raise HubError(_wrong_name(str(name))) from err
    if here and str(name):
        if revision is not None:
            raise HubError(f"{name} is the folder {local}; only a Hub repository has a {revision=}")
        return read_folder(local, str(name), half)
    if isinstance(name, Path) or local.exists() or not REPO_ID.fullmatch(name):
        raise HubError(_wrong_name(str(name)))
    return read_folder(download(name, revision), name, half)


def _wrong_name(name: str) -> str:
    text = wrong_name(
        "a bundled codec, a codec's folder, or a Hub id 'user/name'",
        name,
        bundled(),
        "`gradcodec info` lists the bundled ones; make_codec makes those that need no fitting",
    )
    # The end of a path says which it is, and the text above shows its beginning.
    return f"{text}; no such folder is here: {name[-_SHOWN_OF_A_PATH:]}" if "/" in name else text
