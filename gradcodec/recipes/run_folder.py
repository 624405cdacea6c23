"""A run on disk: what is there after a kill is whole; a resumed run adds what is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gradcodec.errors import ConfigError


class RunFolder:
    """``config.json``, ``events.jsonl``, codecs, checkpoints and results of one run.

    Args:
        path: the folder.
        config: the run's settings as plain JSON values.
        resume: go on with what is there; without it a folder that holds a run is refused. One that
            was refused or killed before it had anything to lose is no run.

    Raises:
        ConfigError: the folder holds a run and ``resume`` is not set, or one of other settings, or
            something else.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        settings = self.path / "config.json"
        config = json.loads(json.dumps(config))
        if settings.exists() and self._holds_results():
            if not resume:
                raise ConfigError(
                    f"{self.path} already holds a run; resume it (--resume) or choose another"
                )
            before = self._read_settings(settings)
            differ = sorted(k for k in {*before, *config} if before.get(k) != config.get(k))
            if differ:
                pairs = {k: (before.get(k), config.get(k)) for k in differ}
                raise ConfigError(f"{self.path} holds a run of other settings (was, is): {pairs}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)
        self._events = self.path / "events.jsonl"
        self._logged = set()
        rows = []
        if self._events.exists():
            for line in self._events.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break  # the line that a kill cut off; it will be written again
        self._logged = {_key(row) for row in rows}
        self._write("events.jsonl", "".join(json.dumps(r) + "\n" for r in rows))

    def _holds_results(self) -> bool:
        known = {"config.json", "config.json.partial", "events.jsonl", "events.jsonl.partial"}
        others = {p.name for p in self.path.iterdir()} - known - {"snapshots"}
        events = self.path / "events.jsonl"
        return bool(others) or (events.exists() and events.stat().st_size > 0)

    def _read_settings(self, path: Path) -> dict[str, Any]:
        try:
            before = json.loads(path.read_text())
        except ValueError as err:
            raise ConfigError(f"{path} is not the settings of a run: {err}") from err
        if not isinstance(before, dict):
            raise ConfigError(f"{path} is not the settings of a run")
        return before

    def log(self, event: str, **values: Any) -> None:
        """Append one event; one that a killed run has already written is not repeated."""
        row = {"event": event, **values}
        if _key(row) in self._logged:
            return
        self._logged.add(_key(row))
        with self._events.open("a") as f:
            f.write(json.dumps(row) + "\n")

    def fresh(self, name: str) -> Path:
        """A sub-folder without what an interrupted attempt may have left in it."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all."""
        return self._write(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any | None:
        """Content of a JSON file, or ``None`` if it is not there."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def _write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".partial")
        beside.write_text(text)
        os.replace(beside, path)
        return path


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("event"), row.get("scheme"), row.get("phase"), row.get("round")
