"""Two ranks train with a framework's own loop, and are killed if the test says so.

    torchrun --nproc-per-node 2 trainer_cases.py FRAMEWORK FOLDER [MODE] [VALUE]

MODE is ``kill`` or ``resume``, or ``tensorboard`` or ``wandb``: log there, to ``FOLDER/board``, or
``options``: micro-batches, clipping by norm, bf16, and the best checkpoint at the end.
VALUE, for the Trainer: the learning rate of a run to be killed, the checkpoint to resume from, the
codec of ``options``, if any.
Rank 0 writes ``FOLDER/weights.safetensors`` and ``FOLDER/figures.json`` at the end.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

STEPS, SAVED, KILLED = 8, 4, 6
FRAMEWORK, FOLDER = sys.argv[1], Path(sys.argv[2])
MODE = sys.argv[3] if len(sys.argv) > 3 else "whole"
VALUE = sys.argv[4] if len(sys.argv) > 4 else ""
CODEC = {"codec": "int4", "min_numel": 0}
BOARD = MODE if MODE in ("tensorboard", "wandb") else None
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_DIR"] = os.environ["TENSORBOARD_LOGGING_DIR"] = str(FOLDER / "board")
if BOARD:
    (FOLDER / "board").mkdir(exist_ok=True)


class Points(Dataset):  # type: ignore[type-arg]
    """Always the same points, in the same order."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, 32, generator=g)
        self.y = self.x[:, :8].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))

    def forward(self, x: Any, labels: Any) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def die_at(step: int) -> None:
    """As if the machine had lost power."""
    if MODE == "kill" and step == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)


def finish(model: nn.Module, figures: list[dict[str, float]]) -> None:
    whole = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
    weights = torch.cat([p.detach().flatten() for p in whole])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(both[0], both[1]), "replicas differ"
    if dist.get_rank() == 0:
        save_file({"weights": weights}, FOLDER / "weights.safetensors")
        (FOLDER / "figures.json").write_text(json.dumps(figures))
        if BOARD == "wandb":
            import wandb

            wandb.finish()
    dist.barrier()
    # Gloo aborts now and then when Python ends, without gradcodec too ("terminate called without
    # an active exception"), and more rarely after destroy_process_group. All is checked by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def trainer() -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gradcodec.integrations.transformers import CompressCallback

    class Die(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            die_at(state.global_step)

    options: dict[str, Any] = {}
    if MODE == "options":
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED}
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "bf16": True, **best}
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=float(VALUE) if MODE == "kill" and VALUE else 0.3,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=BOARD or [],
        save_steps=SAVED,
        save_total_limit=1,
        logging_steps=2,
        disable_tqdm=True,
        **options,
    )
    made = Trainer(model=Net(), args=arguments, train_dataset=Points(), eval_dataset=Points())
    named = VALUE if MODE == "resume_from" else None
    codec = {**CODEC, "codec": VALUE} if MODE == "options" else CODEC
    callback = CompressCallback(made, resume_from=named, **codec)
    if codec["codec"]:
        made.add_callback(callback)
    made.add_callback(Die())
    resumed = MODE.startswith("resume")
    made.train(resume_from_checkpoint=VALUE if resumed and VALUE else resumed)
    if MODE == "options" and codec["codec"]:
        assert callback.compression is not None
        assert callback.compression.step == STEPS, "one exchange for two micro-batches"
    told = [r["step"] for r in made.state.log_history if "loss" in r]
    assert told == [2, 4, 6, 8], "the Trainer's own lines are there too"
    finish(made.model, [r for r in made.state.log_history if "gradcodec/ratio" in r])


def sft() -> None:
    from datasets import Dataset as Rows
    from trl import SFTConfig, SFTTrainer

    from gradcodec.integrations.transformers import CompressCallback
    from gradcodec.recipes.models import load_base

    model, tokenizer = load_base("embedded")
    arguments = SFTConfig(
        output_dir=str(FOLDER / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        max_length=32,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=2,
        disable_tqdm=True,
    )
    rows = Rows.from_dict({"text": ["def add(a, b): return a + b"] * 32})
    made = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    made.add_callback(CompressCallback(made, "int4"))
    made.train()
    own = [r for r in made.state.log_history if "loss" in r]
    assert len(own) == 2, made.state.log_history
    assert all("mean_token_accuracy" in r for r in own), own
    finish(made.model, [r for r in made.state.log_history if "gradcodec/ratio" in r])


def lightning(sharded: bool = False) -> None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from gradcodec.integrations.lightning import CompressCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def configure_model(self) -> None:
            if sharded:
                fully_shard(self.inner, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.inner(**batch)["loss"]

        def on_train_batch_end(self, *_: Any) -> None:
            die_at(self.trainer.global_step)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    seen: list[dict[str, float]] = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            seen.append(dict(metrics))
            super().log_metrics(metrics, step)

    loggers: list[Any] = [Logger(FOLDER / "log")]
    if BOARD == "tensorboard":
        loggers.append(TensorBoardLogger(FOLDER / "board"))
    if BOARD == "wandb":
        loggers.append(WandbLogger(save_dir=FOLDER / "board", offline=True))
    checkpoint = ModelCheckpoint(FOLDER / "out", every_n_train_steps=SAVED, save_last=True)
    strategy = DDPStrategy(process_group_backend="gloo")
    options = dict(CODEC)
    if sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
        options["error_feedback"] = True  # else a reduce-scatter has no residuals to lose
    made = lightning.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_steps=STEPS,
        callbacks=[CompressCallback(**options), checkpoint],
        logger=loggers,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumed = str(FOLDER / "out" / "last.ckpt") if MODE == "resume" else None
    # An epoch is SAVED steps: Lightning begins a DataLoader anew, it does not skip batches.
    data = DataLoader(Subset(Points(), range(2 * 8 * SAVED)), batch_size=8)
    made.fit(module := Module(), data, ckpt_path=resumed)
    finish(module, [m for m in seen if "gradcodec/ratio" in m])


def lightning_validates_first() -> None:
    """A checkpoint that was only validated says nothing about a training that starts after it."""
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    from gradcodec.integrations.lightning import CompressCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.inner(**batch)["loss"]

        def validation_step(self, batch: Any, index: int) -> None:
            self.inner(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    def made(callback: CompressCallback) -> Any:
        return lightning.Trainer(
            strategy=DDPStrategy(process_group_backend="gloo"),
            accelerator="cpu",
            devices=2,
            max_steps=SAVED,
            callbacks=[callback],
            logger=False,
            log_every_n_steps=0,  # Lightning's word for never
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    data = DataLoader(Points(), batch_size=8)
    first = made(CompressCallback(**CODEC))
    first.fit(Module(), data)
    first.save_checkpoint(FOLDER / "a.ckpt")
    then = made(callback := CompressCallback(**CODEC))
    then.validate(Module(), data, ckpt_path=FOLDER / "a.ckpt", verbose=False)
    then.fit(module := Module(), data)
    assert callback.compression is not None
    assert callback.compression.step == SAVED, callback.compression.step
    finish(module, [])


def accelerate() -> None:
    """Two models of one shape: no shape gives away a state that reaches the wrong one."""
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from gradcodec.integrations.accelerate import Log, compress

    figures: list[dict[str, float]] = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "list", False, figures

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            figures.append(values)

    trackers = [Tracker(), BOARD] if BOARD else [Tracker()]
    here = Accelerator(cpu=True, log_with=trackers, project_dir=FOLDER / "board")
    here.init_trackers("run")
    nets = nn.ModuleList([Net(), Net()])
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.3)
    model, other, optimizer, data = here.prepare(
        *nets, optimizer, DataLoader(Points(), batch_size=8)
    )
    log = Log(here, compress(here, model, **CODEC))
    compress(here, other, **CODEC)
    first = 0
    if MODE == "resume":
        here.load_state(str(FOLDER / "out"))
        first = SAVED
    batches = list(data)
    for step in range(first, STEPS):
        optimizer.zero_grad()
        x, labels = batches[step]["x"], batches[step]["labels"]
        here.backward(model(x, labels)["loss"] + other(-x, labels)["loss"])
        optimizer.step()
        if step + 1 == SAVED:
            here.save_state(str(FOLDER / "out"))
        if (step + 1) % 2 == 0:
            log(step + 1)
        die_at(step + 1)
    for tracker in here.trackers:  # `end_training` would end the process group as well
        tracker.finish()
    finish(nets, figures)


if __name__ == "__main__":
    {
        "trainer": trainer,
        "sft": sft,
        "lightning": lightning,
        "lightning-sharded": lambda: lightning(sharded=True),
        "lightning-validates-first": lightning_validates_first,
        "accelerate": accelerate,
    }[FRAMEWORK]()
