"""One job in NVFLARE's simulator, and the bytes that its own statistics counted.

    python -m benchmarks.nvflare.job SCHEME FOLDER [--rounds 4] [--layers 24] [--seed 0]

prints a line of JSON. The simulator runs a server and two sites as processes on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.recipe import SimEnv

from benchmarks.nvflare.schemes import SCHEMES, Apply
from benchmarks.nvflare.work import SITES

STATISTICS = Path("job", "server", "pool_stats", "simulator_cell_stats.json")
"""What the server's process counted, where the simulator writes it."""

_CELL = "server.simulate_job"
_MB = 1 << 20  # what the statistics call one


def run(apply: Apply, folder: Path, *, rounds: int, layers: int, seed: int) -> dict[str, Any]:
    """Run a job; returns bytes, seconds and losses.

    Args:
        apply: adds filters to the recipe.
        folder: a new one, for what the simulator writes.
        rounds: of federated averaging.
        layers: of the model.
        seed: of the model, the teachers and the data.
    """
    folder.mkdir(parents=True)
    losses = folder / "losses.jsonl"
    recipe = FedAvgRecipe(
        name="job",
        model={
            "class_path": "benchmarks.nvflare.work.Adapters",
            "args": {"layers": layers, "seed": seed},
        },
        min_clients=SITES,
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("client.py")),
        train_args=f"--layers {layers} --seed {seed} --losses {losses}",
        params_transfer_type=TransferType.DIFF,
    )
    recipe._job.set_app_packages(["benchmarks"])
    apply(recipe)
    began = time.perf_counter()
    recipe.execute(SimEnv(num_clients=SITES, workspace_root=str(folder)))
    seconds = time.perf_counter() - began
    return {
        **traffic(json.loads((folder / STATISTICS).read_text())),
        "seconds": seconds,
        "losses": losses_of(losses),
    }


def traffic(statistics: dict[str, Any]) -> dict[str, int]:
    """Bytes that the server's job received and sent, everything included.

    Args:
        statistics: NVFLARE's, of the messages of its cells.
    """
    found = {}
    for name, pool in (("uplink", "received_msg_sizes"), ("downlink", "sent_msg_sizes")):
        kinds = statistics[f"{pool}@{_CELL}"]["pool"]["cat_data"].values()
        sizes = [size["total"] for bins in kinds for size in bins if isinstance(size, dict)]
        found[f"{name}_bytes"] = round(sum(sizes) * _MB)
    return found


def losses_of(path: Path) -> list[float]:
    """The loss of the model that came in each round, by the first site's evaluation."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    mine = [row for row in rows if row["site"] == "site-1"]
    return [row["loss"] for row in sorted(mine, key=lambda row: int(row["round"]))]


def main() -> int:
    """Run a job and print its line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    scheme = SCHEMES[options.pop("scheme")]
    print(json.dumps(run(scheme.apply, options.pop("folder").resolve(), **options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
