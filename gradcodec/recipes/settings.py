"""The settings of the federated example, and the paper's three as presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from gradcodec.errors import ConfigError
from gradcodec.federated.collect import READINGS
from gradcodec.federated.config import ServerConfig
from gradcodec.recipes import schemes
from gradcodec.recipes.pretrained import RELAY
from gradcodec.recipes.task import LocalTraining
from gradcodec.representation import RECORDED, SENT, check

_SEEDS = 1 << 62  # far enough below torch's limit to add the number of a client


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; written to its folder and compared on resume.

    Attributes:
        model, revision: ``"embedded"`` or a Hugging Face causal language model.
        dataset, limit: ``"stdlib"``, a JSON(L) file or a Hugging Face data set.
        lora_r, lora_alpha, targets: the adapter.
        dtype, device, gradient_checkpointing: how the model is held.
        max_length: tokens per example.
        clients, fraction, rounds: ``max(1, int(fraction * clients))`` clients in each round.
        dirichlet, min_client: label skew between clients, fewest examples of a client.
        d1: share of each client's data that TGAP may see.
        held_out, questions: how many examples are held out, and how many of those are asked as
            questions with four options.
        local: a client's training.
        tgap_rounds, tgap_reading, tgap_records: TGAP's rounds on D1 (``"federated"`` or
            ``"local"``), and what the subspaces are fitted on (``"auto"``: see ``records_for``).
        representation: what the autoencoders encode (the subspaces encode updates).
        aggregation, server_lr, server_momentum: the server's rule.
        ae_steps: training steps of each autoencoder.
        seed: of adapter, partition, sampling and batches.
        schemes: names from ``gradcodec.recipes.schemes``.
        codecs: more schemes, one for each of these codecs: ``rotsign`` and the like, a bundled
            name, a folder or a Hub id; with ``:relay`` behind it, its replies go down as they came.
    """

    model: str = "embedded"
    revision: str | None = None
    dataset: str = "stdlib"
    limit: int | None = None
    lora_r: int = 8
    lora_alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dtype: str = "float32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    max_length: int = 64
    clients: int = 40
    fraction: float = 0.125
    rounds: int = 8
    dirichlet: float = 0.5
    min_client: int = 16
    d1: float = 0.3
    held_out: int = 200
    questions: int = 100
    local: LocalTraining = field(default_factory=LocalTraining)
    tgap_rounds: int = 4
    tgap_reading: str = "federated"
    tgap_records: str = "auto"
    representation: str = "update"
    aggregation: str = "mean"
    server_lr: float = 1.0
    server_momentum: float = 0.0
    ae_steps: int = 300
    seed: int = 0
    schemes: tuple[str, ...] = schemes.DEFAULT
    codecs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self.tgap_records, ("auto", "signal", *RECORDED))
        check(self.representation, SENT)
        if self.tgap_reading not in READINGS:
            raise ConfigError(f"expected tgap_reading of {READINGS}, got {self.tgap_reading!r}")
        if self.tgap_records == "signal" and self.tgap_reading != "federated":
            raise ConfigError(
                "tgap_records 'signal' is what the clients of a round agree on: expected "
                f"tgap_reading 'federated', got {self.tgap_reading!r}"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"expected dtype float32, bfloat16 or float16, got {self.dtype!r}")
        counts = ("clients", "rounds", "tgap_rounds", "held_out", "questions", "lora_r")
        for name in counts:  # refused now, not after an hour of training
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.ae_steps < 0:
            raise ConfigError(f"expected ae_steps of at least 0, got {self.ae_steps}")
        if self.min_client < 0:
            raise ConfigError(f"expected min_client of at least 0, got {self.min_client}")
        if not 0 <= self.seed < _SEEDS:  # numpy and torch both accept these
            raise ConfigError(f"expected a seed of 0 to 2^62 - 1, got {self.seed}")
        if not 0 < self.lora_alpha < math.inf:
            raise ConfigError(f"expected a finite lora_alpha above 0, got {self.lora_alpha}")
        if not 0 < self.d1 < 1:
            raise ConfigError(f"expected a share d1 within (0, 1), got {self.d1}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"expected a fraction within (0, 1], got {self.fraction}")
        ServerConfig(
            representation=self.representation,
            aggregation=self.aggregation,
            lr=self.server_lr,
            momentum=self.server_momentum,
        )
        if any(name.endswith(RELAY) for name in self.codecs):
            ServerConfig(lr=self.server_lr, momentum=self.server_momentum, relay=True)
        schemes.choose(self.schemes)

    def records_for(self, ratio: float) -> str:
        """What a subspace of this ratio is fitted on, ``tgap_records`` or its ``"auto"`` rule.

        A small subspace is best spent on the directions in which clients' updates agree
        (``"signal"``), which only rounds of several clients show. For a large one gradients are
        better: they also show directions in which clients may still want to move.
        """
        if self.tgap_records != "auto":
            return self.tgap_records
        if ratio < 16:
            return "gradient"
        return "signal" if self.tgap_reading == "federated" and self.per_round > 1 else "update"

    @property
    def per_round(self) -> int:
        """Clients in each round."""
        return max(1, int(self.fraction * self.clients))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


_PAPER = Settings(
    dtype="bfloat16",
    gradient_checkpointing=True,
    max_length=512,
    min_client=1,
    tgap_rounds=20,
    ae_steps=3000,
    schemes=schemes.FULL,
)

#: The paper's three settings (its appendix; what it leaves open keeps this project's default).
PRESETS: dict[str, Settings] = {
    "dolly": dataclasses.replace(
        _PAPER,
        model="huggyllama/llama-7b",
        dataset="databricks/databricks-dolly-15k",
        clients=100,
        fraction=0.05,
        rounds=20,
        min_client=40,
        local=LocalTraining(lr=1.5e-4, batch=32, micro_batch=16, steps=0, epochs=1),
    ),
    "ceval": dataclasses.replace(
        _PAPER,
        model="huggyllama/llama-7b",
        dataset="ceval/ceval-exam:all:dev",
        lora_r=16,
        clients=3,
        fraction=1.0,
        rounds=5,
        local=LocalTraining(lr=2e-4, batch=24, micro_batch=8, steps=0, epochs=3),
    ),
    "mmlu": dataclasses.replace(
        _PAPER,
        model="Qwen/Qwen-7B",
        dataset="cais/mmlu:all:dev",
        clients=3,
        fraction=1.0,
        rounds=8,
        local=LocalTraining(lr=3.5e-4, batch=8, micro_batch=4, steps=0, epochs=2),
    ),
}
#: A small LLaMA on questions, which runs on a CPU.
_SMOLLM2 = Settings(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset="openai/gsm8k:main",
    limit=2000,
    targets=("q_proj", "v_proj"),
    max_length=160,
    clients=20,
    fraction=0.2,
    rounds=10,
    held_out=128,
    local=LocalTraining(lr=4e-3, batch=4, micro_batch=4, steps=6),
    schemes=("fp32",),
    codecs=("rotsign", "smollm2-135m-lora-r8-qv-8x", "smollm2-135m-lora-r8-qv-64x"),
)
PRESETS["smollm2-gsm8k"] = _SMOLLM2
PRESETS["smollm2-mmlu"] = dataclasses.replace(
    _SMOLLM2, dataset="cais/mmlu:all:test", limit=None, held_out=256
)
PRESETS["quick"] = Settings(
    rounds=3,
    tgap_rounds=2,
    held_out=100,
    questions=40,
    ae_steps=60,
    schemes=schemes.QUICK,
    local=LocalTraining(steps=4),
)
