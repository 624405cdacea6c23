"""Training curves of the paper's ResNet-3 on recorded updates, literal and working.

    python -m benchmarks.federated.autoencoder_curves --run runs/demo-full --steps 3000

Uses the snapshots that a federated run left behind (``runs/<name>/snapshots``). Writes one row per
evaluation to ``benchmarks/results/autoencoder_curves.jsonl`` and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.run import RESULTS
from gradcodec import AutoencoderConfig, SnapshotStore, UpdateSpec, fit_autoencoder
from gradcodec.recipes.report import plot_training
from gradcodec.recipes.results import run_versions

#: The ladder: what the paper says, then one thing changed at a time.
LADDER = {
    "literal, none (the paper)": AutoencoderConfig(variant="literal", normalise="none"),
    "literal, factor_rms": AutoencoderConfig(variant="literal", normalise="factor_rms"),
    "literal, tensor_rms": AutoencoderConfig(variant="literal", normalise="tensor_rms"),
    "working, tensor_rms": AutoencoderConfig(variant="working", normalise="tensor_rms"),
}


def main() -> None:
    """Fit every rung, write rows and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished federated run")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    store = SnapshotStore(options.run / "snapshots")
    spec = UpdateSpec.of(store[0])
    # A few MB: from memory the small networks are not kept waiting for the disk.
    snapshots = store[:]
    path = RESULTS / "autoencoder_curves.jsonl"
    curves: dict[str, list[dict[str, float]]] = {}
    with path.open("w") as file:
        for name, config in LADDER.items():
            fit = fit_autoencoder(
                snapshots, config, spec, steps=options.steps, seed=options.seed, evaluations=30
            )
            curves[name] = [vars(row) for row in fit.history]
            for row in curves[name]:
                about = {"case": name, "snapshots": len(snapshots), "seed": options.seed}
                about |= {"threads": torch.get_num_threads(), "versions": run_versions()}
                file.write(json.dumps({**about, **row}) + "\n")
            first, last = curves[name][0]["val_rse"], curves[name][-1]["val_rse"]
            print(f"{name:28} RSE {first:9.3f} -> {last:.3f}")
    plot_training(curves, RESULTS / "autoencoder_curves.png")


if __name__ == "__main__":
    main()
