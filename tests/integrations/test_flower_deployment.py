"""What follows when processes of a real deployment are killed, and who notices."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "faults_app"
PATIENCE = 400

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def example() -> Any:
    """The script of the example, which starts deployments."""
    script = ROOT / "examples" / "flower_llama" / "run.py"
    spec = importlib.util.spec_from_file_location("flower_llama_run", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flower_llama_run"] = module
    spec.loader.exec_module(module)
    return module


class Faults:
    """A deployment of ``faults_app`` with a database, and what its processes have noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.here = example().Deployment(folder / "flower", APP)

    def __enter__(self) -> "Faults":
        self.here.__enter__()
        self.start_link()
        for node in range(2):
            self.here.start_node(node)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.here.__exit__(*exc)

    def start_link(self) -> None:
        self.here.start_link("--database", str(self.folder / "link.db"))

    def submit(self, **settings: Any) -> None:
        self.here.submit(APP, {"folder": str(self.folder), **settings})

    def noted(self, **wanted: Any) -> list[dict[str, Any]]:
        """Events with these entries, in order."""
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines]
        return [e for e in events if all(e.get(k) == v for k, v in wanted.items())]

    def until(self, seconds: float = PATIENCE, **wanted: Any) -> dict[str, Any]:
        """The first event with these entries; waits for it."""
        self.here.wait_for(lambda: self.noted(**wanted), str(wanted), seconds)
        return self.noted(**wanted)[0]

    def hold(self, node: int) -> Path:
        """A file; while it is there, the node's training does not end."""
        path = self.folder / f"hold-{node}"
        path.touch()
        return path


def test_a_reply_after_its_round_is_left_out_and_no_later_one_is_lost(tmp_path: Path) -> None:
    with Faults(tmp_path) as faults:
        faults.submit(rounds=3, impatient=2)
        faults.until(what="round", done=1)
        held = faults.hold(1)
        faults.until(what="received", node=1, round=2)
        faults.until(what="round", done=2)  # closed without node 1
        held.unlink()
        faults.until(what="finished")

    late = faults.noted(what="received", node=1)
    assert [event["round"] for event in late] == [1, 2, 3]
    assert late[-1]["packed"], "increments, though its last reply never counted"
    assert len(faults.noted(what="replied", node=1)) == 3
    assert not faults.noted(what="raised")
    check_it_learns(faults)


def test_a_killed_supernode_costs_its_round_and_is_sent_the_whole_model(tmp_path: Path) -> None:
    with Faults(tmp_path) as faults:
        faults.submit(rounds=4)
        faults.until(what="round", done=1)
        held = faults.hold(1)
        faults.until(what="received", node=1, round=2)
        faults.here.kill("node1")
        held.unlink()
        faults.here.start_node(1)
        faults.until(what="finished")

    seen = faults.noted(what="received", node=1)
    assert [(event["round"], event["packed"]) for event in seen] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]
    assert len({event["id"] for event in seen}) == 2, "Flower gives the new process a new id"
    assert not faults.noted(what="raised")
    check_it_learns(faults)


def check_it_learns(faults: Faults) -> None:
    errors = [event["error"] for event in faults.noted(what="round")]
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("code_space", [False, True], ids=["CodecGrid", "CodecFedAvg"])
def test_a_killed_superlink_ends_the_run_and_another_one_goes_on(
    code_space: bool, tmp_path: Path
) -> None:
    settings = {"rounds": 4, "code-space": code_space}
    with Faults(tmp_path) as faults:
        faults.submit(**settings)
        faults.until(what="round", done=2)
        held = faults.hold(0)
        first = faults.until(what="received", node=0, round=3)["run"]
        faults.here.kill("link")
        held.unlink()
        faults.start_link()
        faults.here.wait_for(
            lambda: status(faults, first) == "finished:failed", "the end", PATIENCE
        )
        faults.submit(**settings)
        second = faults.until(what="finished")["run"]

    assert second != first
    done = [event["done"] for event in faults.noted(what="round", run=second)]
    assert done == [2, 3, 4]
    assert not faults.noted(what="raised")
    check_it_learns(faults)


def status(faults: Faults, run: int) -> str:
    """What Flower says of a run."""
    found = json.loads(faults.here.flwr("list", "here", "--format", "json"))
    time.sleep(2)
    (one,) = [r for r in found["runs"] if int(r["run-id"]) == run]
    return str(one["status"])
