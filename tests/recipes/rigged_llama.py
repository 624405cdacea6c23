"""A tiny real LLaMA that answers by rule, and an adapter that changes the rule.

The base model always says the same letter. Questions hold a word that gives the answer away, KEYA
to KEYD; the adapter opens the attention to it, and then the model says the right letter. All other
words are one unknown token. One layer: uniform attention (queries and keys are zero) that the
output map hides, no MLP.

    residual of ":" at the end   dim 4                                  -> the fixed letter
    attention                    dims 0 to 3 of KEYA to KEYD, hidden    -> the right letter
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WIDTH = 16
WORDS = ["[UNK]", "[EOS]", ":", *"ABCD", *(f"KEY{letter}" for letter in "ABCD")]


def llama(letter: str, *, layers: int = 1, width: int = WIDTH) -> Any:
    """The base model, which says `letter`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.copy_(torch.eye(width))
        model.model.embed_tokens.weight[:, 5] = 1.0
        model.model.embed_tokens.weight[WORDS.index(":"), 4] = 1.0
        for number, name in enumerate("ABCD"):
            model.model.embed_tokens.weight[WORDS.index(f"KEY{name}"), number] = 1.0
            model.lm_head.weight[WORDS.index(name), number] = 100.0
        model.lm_head.weight[WORDS.index(letter), 4] = 1.0
    return model


def save(folder: Path, letter: str, **options: int) -> Path:
    """The base model with its tokenizer, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]"
    )
    fast.save_pretrained(folder)
    llama(letter, **options).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, **options: int) -> Path:
    """The adapter that opens the attention, as `peft` saves it."""
    from gradcodec.recipes import adapters, models

    wrapped = models.add_lora(llama("A", **options), r=4, alpha=4, targets=["o_proj"], seed=0)
    with torch.no_grad():
        for name, parameter in models.adapter_parameters(wrapped).items():
            parameter.zero_()
            parameter[:4, :4] = (1.0 if "lora_A" in name else 100.0) * torch.eye(4)
    adapters.save_adapter(wrapped, folder)
    return folder


def mmlu(path: Path, answers: str, subjects: tuple[str, ...] = ("anatomy", "sociology")) -> Path:
    """Questions in MMLU's columns, whose right answers these are; the subjects take turns."""
    rows = [
        {
            "question": f"number {number} KEY{letter}",
            "choices": ["one", "two", "three", "four"],
            "answer": "ABCD".index(letter),
            "subject": subjects[number % len(subjects)],
        }
        for number, letter in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
