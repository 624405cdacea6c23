"""The worlds of the ``llama`` benchmark: a pretrained model and one of two sets of questions.

``--model`` and ``--data`` say where both are; without them they come from the Hugging Face Hub. The
places are no part of a run's id, so that rows made from files and from the Hub are the same runs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.federated.methods import State
from benchmarks.federated.world import World
from gradcodec.recipes import data
from gradcodec.recipes.settings import PRESETS, Settings

MODEL = "SmolLM2-135M-Instruct"
PLACES = ("GRADCODEC_BENCH_MODEL", "GRADCODEC_BENCH_DATA")
"""Environment variables that tell worker processes where model and data are."""


@dataclass(frozen=True)
class Task:
    """What is played.

    Attributes:
        preset: its settings.
        file: its rows, below ``--data``.
        rounds: how many.
        changes: what differs from the preset.
        tuned: the task whose learning rates are taken, its own by default.
    """

    preset: str
    file: str
    rounds: int = 10
    changes: Mapping[str, Any] = field(default_factory=dict)
    tuned: str = ""


_GSM8K = Task("smollm2-gsm8k", "gsm8k-train.jsonl")

TASKS: Mapping[str, Task] = MappingProxyType(
    {"gsm8k": _GSM8K, "mmlu": Task("smollm2-mmlu", "mmlu-test.jsonl", tuned="gsm8k")}
)

#: All examples and more rounds, and other adapters; on a GPU.
MORE: Mapping[str, Task] = MappingProxyType(
    {
        "gsm8k-all": dataclasses.replace(_GSM8K, rounds=20, changes={"limit": None}),
        "gsm8k-r16": dataclasses.replace(
            _GSM8K, changes={"lora_r": 16, "lora_alpha": 32.0}, tuned="gsm8k"
        ),
        "gsm8k-qkvo": dataclasses.replace(
            _GSM8K,
            changes={"targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
            tuned="gsm8k",
        ),
    }
)


def settings(task: str, seed: int, rounds: int) -> Settings:
    """The preset of a task, from the places that were given."""
    asked = {**TASKS, **MORE}[task]
    found = dataclasses.replace(PRESETS[asked.preset], **asked.changes, seed=seed, rounds=rounds)
    model, folder = (os.environ.get(place) for place in PLACES)
    if model:
        found = dataclasses.replace(found, model=model)
    if folder:
        found = dataclasses.replace(found, dataset=str(Path(folder) / asked.file))
    return found


@torch.no_grad()
def accuracy(world: World, state: State, at_once: int = 16) -> float | None:
    """Share of held-out questions whose right option is the likeliest; ``None`` without options.

    As lm-eval scores multiple choice: each option is an answer with a loss of its own.
    """
    s = world.settings
    kept, held = data.held_out(data.load_examples(s.dataset, limit=s.limit), s.held_out, s.seed)
    questions = data.multiple_choice(held, kept, len(held), seed=s.seed) if held[0].options else []
    if not questions:
        return None
    there = {n: t.to(world.device) for n, t in state.items()}
    right = 0
    for start in range(0, len(questions), at_once):
        some = questions[start : start + at_once]
        batches = [
            [data.encode_example(world.tokenizer, data.Example(q.prompt, option), s.max_length)]
            for q in some
            for option in q.options
        ]
        losses = world.net([there] * len(batches), batches).view(len(some), -1)
        right += sum(int(row.argmin()) == q.correct for row, q in zip(losses, some, strict=True))
    return right / len(questions)
