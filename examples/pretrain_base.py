"""Make the small language model that ships with the library, from the standard library alone.

    python examples/pretrain_base.py --minutes 22

Trains a byte-level BPE tokenizer (4,096 tokens) and a Llama of about 5.8 million parameters on
`gradcodec.recipes.corpus.source_text`, within a wall-clock budget. The folder given by ``--out``
is usable from the first checkpoint on; the model card is written at the end.
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gradcodec.recipes.corpus import docstring_pairs, source_text

DEFAULT_OUT = Path(__file__).parents[1] / "gradcodec" / "assets" / "stdlib-llama"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VALIDATION_SHARE = 0.02
VALIDATION_CHUNKS = 64
CARD_PAIRS = 500
CARD_PAIR_TOKENS = 128
LOG_ROWS = 300


def main() -> None:
    """Train, write the folder, and say on standard output how it goes."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    train_texts, held_out_texts = split_modules(list(source_text()), rng)
    tokenizer = train_tokenizer([text for _, text in train_texts], args.vocabulary)
    train = chunk(tokenizer, train_texts, args.length)
    held_out = chunk(tokenizer, held_out_texts, args.length)
    print(f"{train.numel():,} training tokens, {held_out.numel():,} held out", flush=True)

    model = new_model(tokenizer, args)
    untrained = copy.deepcopy(model)
    autocast = faster_with_autocast(model, train[: args.batch])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, bf16 autocast: {autocast}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    run = train_model(model, train, held_out, rng, autocast, args)
    save_model(model, args.out)

    shipped = copy.deepcopy(model).to(torch.bfloat16).float()  # what a user will load
    pairs = encoded_pairs(tokenizer, rng)
    facts = {
        "command": "python examples/pretrain_base.py " + " ".join(sys.argv[1:]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "corpus": train.numel(),
        "source": (perplexity(shipped, chunks(held_out)), perplexity(untrained, chunks(held_out))),
        "docstrings": (perplexity(shipped, pairs), perplexity(untrained, pairs)),
        **run,
    }
    (args.out / "README.md").write_text(card(facts), encoding="utf-8")
    print(json.dumps(facts, indent=2), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=22.0, help="training time, wall clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens in the tokenizer")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--checkpoint-minutes", type=float, default=2.0)
    return parser.parse_args()


def split_modules(
    modules: list[tuple[str, str]], rng: np.random.Generator
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Hold out whole modules, so that no held-out line stands next to a training line."""
    order = rng.permutation(len(modules))
    count = max(1, round(VALIDATION_SHARE * len(modules)))
    held_out = set(order[:count].tolist())
    train = [module for index, module in enumerate(modules) if index not in held_out]
    return train, [module for index, module in enumerate(modules) if index in held_out]


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Return a `transformers` fast tokenizer: byte-level BPE, so that any text can be encoded."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def chunk(tokenizer: Any, texts: list[tuple[str, str]], length: int) -> torch.Tensor:
    """Return ``(sequences, length)`` token ids: modules joined by the end token, tail dropped."""
    ids: list[int] = []
    for _, text in texts:
        ids += tokenizer.backend_tokenizer.encode(text).ids
        ids.append(tokenizer.eos_token_id)
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole]).view(-1, length)


def new_model(tokenizer: Any, args: argparse.Namespace) -> Any:
    """Return the freshly initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def loss_of(model: Any, batch: torch.Tensor, labels: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Return the mean next-token loss of `batch`, nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss: torch.Tensor = model(input_ids=batch, labels=labels).loss
    return loss


def faster_with_autocast(model: Any, batch: torch.Tensor) -> bool:
    """Return whether one training step is faster in bf16 autocast than in fp32, here and now."""
    seconds = {}
    for autocast in (False, True):
        for repeat in range(4):
            if repeat == 1:  # the first one warms up
                begin = time.perf_counter()
            loss_of(model, batch, batch, autocast).backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
        seconds[autocast] = (time.perf_counter() - begin) / 3
        rate = batch.numel() / seconds[autocast]
        print(f"autocast {autocast}: {rate:,.0f} tokens/s", flush=True)
    return seconds[True] < seconds[False]


def train_model(
    model: Any,
    train: torch.Tensor,
    held_out: torch.Tensor,
    rng: np.random.Generator,
    autocast: bool,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train `model` in place until the time is up; log and checkpoint on the way."""
    optimizer = optimizer_for(model, args.rate)
    log: list[dict[str, float]] = []
    begin = time.monotonic()
    budget = 60.0 * args.minutes
    next_log = next_checkpoint = 0.0
    step = tokens = 0
    running: list[float] = []
    model.train()
    for batch in batches(train, args.batch, rng):
        elapsed = time.monotonic() - begin
        if elapsed >= budget:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(elapsed / budget)
        loss = loss_of(model, batch, batch, autocast)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch.numel()
        running.append(loss.item())
        if elapsed >= next_log:
            row: dict[str, float] = {
                "step": step,
                "tokens": tokens,
                "seconds": round(elapsed, 1),
                "train_loss": round(float(np.mean(running)), 4),
            }
            if elapsed >= next_checkpoint:
                row["val_loss"] = round(mean_loss(model, chunks(held_out)), 4)
                save_model(model, args.out)
                next_checkpoint += 60.0 * args.checkpoint_minutes
            log.append(row)
            write_log(log, args.out)
            print(json.dumps(row), flush=True)
            running.clear()
            next_log += budget / LOG_ROWS
    seconds = time.monotonic() - begin
    log.append(
        {
            "step": step,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "train_loss": round(float(np.mean(running)) if running else log[-1]["train_loss"], 4),
            "val_loss": round(mean_loss(model, chunks(held_out)), 4),
        }
    )
    write_log(log, args.out)
    return {**log[-1], "tokens_per_second": tokens / seconds}


def schedule(progress: float) -> float:
    """Return the share of the peak rate at `progress` in [0, 1]: warm-up over 2 %, then cosine."""
    warm_up, floor = 0.02, 0.02
    if progress < warm_up:
        return max(progress / warm_up, floor)
    angle = math.pi * (progress - warm_up) / (1.0 - warm_up)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(angle))


def optimizer_for(model: Any, rate: float) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
    )


def batches(data: torch.Tensor, size: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yield shuffled batches for ever; each pass shifts the chunk borders by a random amount."""
    length = data.shape[1]
    flat = data.reshape(-1)
    while True:
        shifted = flat.roll(int(rng.integers(length))).view(-1, length)
        order = torch.from_numpy(rng.permutation(len(shifted)))
        for begin in range(0, len(order) - size + 1, size):
            yield shifted[order[begin : begin + size]]


Labelled = list[tuple[torch.Tensor, torch.Tensor]]


def chunks(held_out: torch.Tensor, size: int = 16) -> Labelled:
    """Return the validation batches ``(input ids, labels)``, a fixed sample of the chunks."""
    picked = held_out[:: max(1, len(held_out) // VALIDATION_CHUNKS)][:VALIDATION_CHUNKS]
    return [(batch, batch) for batch in torch.split(picked, size)]


def encoded_pairs(tokenizer: Any, rng: np.random.Generator, size: int = 16) -> Labelled:
    """Return batches of docstring questions whose labels cover the answers only."""
    pairs = docstring_pairs()
    encode = tokenizer.backend_tokenizer.encode
    rows: Labelled = []
    for index in rng.permutation(len(pairs))[:CARD_PAIRS]:
        prompt = encode(pairs[index].prompt).ids
        answer = [*encode(pairs[index].answer).ids, tokenizer.eos_token_id]
        ids = torch.tensor([*prompt, *answer])
        labels = ids.clone()
        labels[: len(prompt)] = -100
        rows.append((ids[:CARD_PAIR_TOKENS], labels[:CARD_PAIR_TOKENS]))
    rows = [row for row in rows if (row[1] >= 0).any()]

    def pad(values: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    # Padding is on the right and unlabelled, so causal attention never sees it.
    return [
        (
            pad([ids for ids, _ in rows[begin : begin + size]], tokenizer.pad_token_id),
            pad([labels for _, labels in rows[begin : begin + size]], -100),
        )
        for begin in range(0, len(rows), size)
    ]


@torch.no_grad()
def mean_loss(model: Any, data: Labelled) -> float:
    """Return the token-weighted mean loss, nats per labelled token."""
    model.eval()
    total = weight = 0.0
    for batch, labels in data:
        count = int((labels[:, 1:] >= 0).sum())
        total += loss_of(model, batch, labels, autocast=False).item() * count
        weight += count
    model.train()
    return total / weight


def perplexity(model: Any, data: Labelled) -> float:
    """Return exp of the mean loss."""
    return math.exp(mean_loss(model, data))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make `path` in one atomic step: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    temporary.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(temporary, path)


def save_model(model: Any, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` in bf16; the tied head is not repeated."""
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    replace_file(
        out / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    config = copy.deepcopy(model.config)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    text = config.to_json_string()
    replace_file(out / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write the tokenizer files under the class name that every `transformers` release knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_log(rows: list[dict[str, float]], out: Path) -> None:
    """Write the training log, one JSON object per line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(out / "training_log.jsonl", lambda path: path.write_text(text, encoding="utf-8"))


def card(facts: dict[str, Any]) -> str:
    """Return the model card."""
    source, docstrings = facts["source"], facts["docstrings"]
    epochs = facts["tokens"] / facts["corpus"]
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: [en, code]
library_name: transformers
---

# stdlib-llama

A toy Llama of {facts["parameters"] / 1e6:.1f} M parameters, made so that federated fine-tuning
can be tested and demonstrated without a download. It is not useful as a language model.

| | |
|---|---|
| Architecture | `LlamaForCausalLM`: 6 layers, width 256, 8 heads, feed-forward 688, \
tied embeddings |
| Tokenizer | byte-level BPE, 4,096 tokens, trained on the same text |
| Weights | bf16 safetensors |
| Command | `{facts["command"].strip()}` |
| Made with | Python {facts["python"]}, torch {facts["torch"]}, \
{facts["threads"]} CPU threads, AdamW |
| Tokens seen | {facts["tokens"]:,} ({epochs:.1f} passes over {facts["corpus"]:,}) |
| Steps, seconds | {facts["step"]:,}, {facts["seconds"]:,.0f} \
({facts["tokens_per_second"]:,.0f} tokens/s) |
| Last losses (nats/token) | training {facts["train_loss"]:.3f}, held out {facts["val_loss"]:.3f} |

## Data

The Python standard library of the interpreter named above - source code and comments, **with
every docstring removed** - and the help topics of `pydoc_data`. Copyright Python Software
Foundation and contributors, under the PSF licence agreement, version 2
(<https://docs.python.org/3/license.html>). Lines that repeat a docstring were dropped as well:
docstrings are the fine-tuning task. {VALIDATION_SHARE:.0%} of the modules were held out.

## Perplexity per token, held out

| Text | Trained | Untrained |
|---|---|---|
| Source of held-out modules | {source[0]:.1f} | {source[1]:,.0f} |
| Docstrings given `Q: What does f(x) do?` ({CARD_PAIRS} pairs) | {docstrings[0]:.1f} | \
{docstrings[1]:,.0f} |

Docstrings were never seen in pretraining; the two columns measure the start of fine-tuning.

## Limits

It knows the style of one code base and a little English. It answers no question correctly, was
aligned with nothing, and says nothing about how a compressor behaves on a large model beyond
what a 256-wide transformer can say. Positions beyond 256 were not trained. A time budget sets
the number of steps, so a second run on another machine gives other weights.
"""


if __name__ == "__main__":
    main()
