"""A run on disk: finished files are whole even after a kill, and a resumed run adds the rest."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.recipes.lock import NAME as LOCK
from gradcodec.recipes.lock import FolderLock

CONFIG, EVENTS = "config.json", "events.jsonl"

SNAPSHOTS = "snapshots"

#: A folder for each finished scheme, which ``peft`` can read.
ADAPTERS = "adapters"

#: What a run writes besides these and other JSON files; a folder with any of them holds a run.
PARTS = (
    ADAPTERS,
    "checkpoints",
    "codecs",
    "schemes",
    "tgap.safetensors",
    "tgap.json",
    "summary.json",
)

_log = logging.getLogger(__name__)


class RunFolder:
    """``config.json``, ``events.jsonl``, codecs, adapters, checkpoints and results of one run.

    One process at a time may use the folder: it is locked until ``close``, or the end of the
    process. Files that are read back are sealed with a SHA-256 (``gradcodec.files``), each event
    with a CRC-32.

    Args:
        path: the folder.
        config: the run's settings as plain JSON values.
        resume: go on with the run in the folder; without ``resume`` a folder that holds a run is
            refused. A run that was refused or killed before it had any results does not count.

    Raises:
        ConfigError: the folder is in use or cannot be written to; it holds a run and ``resume`` is
            not set; it holds a run with other settings; or it holds something else.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        config = json.loads(json.dumps(config))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
        except OSError as err:
            raise ConfigError(
                f"expected a folder that can be written to, got {self.path}: {_reason(err)}; "
                "choose another (--out)"
            ) from err
        try:
            self._open(config, resume)
        except OSError as err:
            self.close()
            raise ConfigError(f"{self.path} cannot be used as a run's folder: {err}") from err
        except BaseException:
            self.close()
            raise

    def _open(self, config: dict[str, Any], resume: bool) -> None:
        settings = self.path / CONFIG
        if settings.exists() and not files.is_sealed(settings.read_bytes()):
            raise ConfigError(
                f"{settings} is not the settings of a run (of this version of gradcodec); "
                "choose another folder (--out)"
            )
        if self._holds_results():
            if not resume:
                raise ConfigError(
                    f"{self.path} already holds a run; resume it (--resume) or choose another "
                    "folder (--out)"
                )
            self._compare(config)
        if settings.exists():
            files.remove_temporaries(self.path)
        files.save_json(self.path / CONFIG, config)
        self._events = self.path / EVENTS
        rows = {_key(row): row for row in reversed(self._read_events())}  # the first of each
        self._logged = set(rows)
        files.write_text(self._events, "".join(map(_line, reversed(rows.values()))))

    def _holds_results(self) -> bool:
        there = {p.name for p in self.path.iterdir() if not files.is_temporary(p.name)}
        events = self.path / EVENTS
        if there.intersection(PARTS) or (events.exists() and events.stat().st_size > 0):
            return True
        if CONFIG in there:
            return bool(there - {CONFIG, EVENTS, LOCK, SNAPSHOTS})
        return SNAPSHOTS in there  # not from a run, and a run would delete them

    def _compare(self, config: dict[str, Any]) -> None:
        """Raise ``ConfigError`` unless the run in the folder has these settings."""
        path = self.path / CONFIG
        if not path.exists():
            raise ConfigError(
                f"{self.path} holds parts of a run without its settings, {CONFIG}; put that file "
                "back or choose another folder (--out)"
            )
        before = files.load_json(path, f"put a copy of it back, or {_ANEW}")
        differ = sorted(k for k in {*before, *config} if before.get(k) != config.get(k))
        if differ:
            pairs = {k: (before.get(k), config.get(k)) for k in differ}
            raise ConfigError(
                f"{self.path} holds a run of other settings (was, is): {pairs}; give those it was "
                "started with, or choose another folder (--out)"
            )

    def _read_events(self) -> list[dict[str, Any]]:
        """The whole lines; those cut by a kill or damaged on disk will be written again."""
        if not self._events.exists():
            return []
        rows, bad = [], []
        lines = self._events.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                del row["crc32"]
                if _line(row).encode() == line + b"\n":
                    rows.append(row)
                    continue
            except (ValueError, TypeError, KeyError, RecursionError):
                pass  # UnicodeDecodeError is a ValueError
            if number < len(lines):  # the last one is empty, or was cut off
                bad.append(number)
        if bad:
            _log.warning(
                "%s: lines %s are damaged; they are left out and, where the run still has their "
                "figures, written again",
                self._events,
                bad,
            )
        return rows

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder for other processes; nothing may be written afterwards."""
        self._lock.release()

    def log(self, event: str, **values: Any) -> None:
        """Append one event, unless it is there already, for example from a killed run."""
        row = {"event": event, **values}
        if _key(row) in self._logged:
            return
        self._logged.add(_key(row))
        with self._events.open("ab") as f:
            f.write(_line(row).encode())

    def fresh(self, name: str) -> Path:
        """The path of a sub-folder, after deleting what an interrupted attempt left there."""
        path = self.path / name
        if path.exists():
            shutil.rmtree(path)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file for people, whole or not at all; it is not read back."""
        path = self.path / name
        files.write_text(path, json.dumps(value, indent=1) + "\n")
        return path

    def save(self, name: str, value: dict[str, Any]) -> None:
        """Write an object as sealed JSON, for ``load``."""
        files.save_json(self.path / name, value)

    def load(self, name: str) -> dict[str, Any] | None:
        """What ``save`` wrote, or ``None`` if it is not there.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.path / name
        if not path.exists():
            return None
        return files.load_json(path, f"delete it and resume, or {_ANEW}")


_ANEW = "start anew in another folder (--out)"


def _reason(err: OSError) -> str:
    """Why a folder cannot be used, in words for the person who typed its name."""
    path = Path(err.filename or "")
    if isinstance(err, FileExistsError) and not path.is_dir():
        return "it is a file" if path.exists() else "it is a link to nothing"
    return err.strerror or str(err)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("event"), row.get("scheme"), row.get("phase"), row.get("round")


def _line(row: dict[str, Any]) -> str:
    """One event as text, with a checksum over what stands before it."""
    text = json.dumps(row)
    return json.dumps({**row, "crc32": f"{zlib.crc32(text.encode()):08x}"}) + "\n"
