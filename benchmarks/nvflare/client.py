"""The training script of a site; NVFLARE runs it once per site. It knows nothing of codecs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nvflare.client as flare
import torch
from nvflare.app_common.abstract.fl_model import FLModel

from benchmarks.nvflare.work import Adapters, loss, train


def main() -> None:
    """Train in every round; write the loss of each model that comes to ``--losses``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--losses", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flare.init()
    name = flare.get_site_name()
    site = int(name.rpartition("-")[2]) - 1
    model = Adapters(options.layers, options.seed)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        model.load_state_dict({n: torch.as_tensor(t) for n, t in received.params.items()})
        row = {"site": name, "round": received.current_round, "loss": loss(model)}
        with options.losses.open("a") as file:
            file.write(json.dumps(row) + "\n")
        train(model, site, received.current_round)
        flare.send(FLModel(params=model.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
