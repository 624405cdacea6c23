"""LLaMA with LoRA adapters for a cohort: what several clients compute, in one forward pass.

    batches of C clients --pack--> ids [C, N], no padding between sequences
    base maps             one matrix product over all clients' tokens, in ``compute``
    adapters              one batched product, each client's own, in fp32
    attention             sequences side by side, [S, heads, T, head]
    loss                  mean over each client's answer tokens, [C]

A federated benchmark trains hundreds of clients for a few steps each, on a small model: on a CPU
most of that time goes into many small operations and into padding. This computes the same as
`transformers` with `peft` (``tests/benchmarks/test_cohort.py``: equal in fp32), about three times
as fast. Only the products with frozen weights are rounded to bf16; weights that are stored in bf16
lose nothing by that, activations do (losses differ by far less than 1 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.data import IGNORED, Encoded

Adapters = Mapping[str, Tensor]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
_STATIC_ROPE = ("default", "linear", "llama3")  # angles that do not depend on the length


class CohortLlama:
    """Losses of many clients' adapters on their own batches, differentiable.

    Args:
        model: a `transformers` LLaMA without adapters; its weights are copied.
        scale: LoRA's alpha / r.
        compute: type of the products with frozen weights; everything else is fp32.

    Raises:
        ConfigError: the model is not a LLaMA, or one with biases or length-dependent rotations.
    """

    def __init__(
        self, model: nn.Module, *, scale: float, compute: torch.dtype = torch.bfloat16
    ) -> None:
        whole: Any = model
        config = whole.config
        inner = whole.model
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise ConfigError(f"expected a LLaMA without biases, got {config.model_type!r}")
        if inner.rotary_emb.rope_type not in _STATIC_ROPE:
            raise ConfigError(f"expected a rope of {_STATIC_ROPE}, got a length-dependent one")
        self.scale, self.compute = scale, compute
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head = inner.layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        self.embedding = inner.embed_tokens.weight.detach().float()
        self.device = self.embedding.device
        self.frequencies = inner.rotary_emb.inv_freq.detach().float()
        self.rope_scale = float(inner.rotary_emb.attention_scaling)
        self.layers = [
            _Layer.of(layer, f"model.layers.{i}.", compute) for i, layer in enumerate(inner.layers)
        ]
        self.norm = inner.norm.weight.detach().float()
        self.unembedding = whole.lm_head.weight.detach().to(compute)

    def __call__(
        self, adapters: Sequence[Adapters], batches: Sequence[Sequence[Encoded]]
    ) -> Tensor:
        """Mean loss per answer token of each client, ``[C]``.

        Args:
            adapters: one per client; tensors by name as ``models.adapter_parameters`` names them.
                All clients' have the same names and shapes; maps without an adapter are plain.
            batches: each client's examples.

        Raises:
            ConfigError: no clients, an empty batch, or one without a token to learn from.
        """
        if not batches or len(adapters) != len(batches):
            raise ConfigError(f"expected as many adapters as batches, got {len(adapters)}")
        packed = _Packed.of(batches, self.device)
        stacked = {n: torch.stack([a[n] for a in adapters]) for n in adapters[0]}
        cos, sin = self._angles(packed.positions)
        hidden = self.embedding[packed.ids]
        for layer in self.layers:
            q, k, v = self._maps(self._rms(hidden, layer.norm_in), layer.qkv, stacked)
            q, k = self._rotated(q, cos, sin), self._rotated(k, cos, sin)
            mixed = self._attention(q, k, v, packed)
            hidden = hidden + self._maps(mixed, layer.out, stacked)[0]
            gate, up = self._maps(self._rms(hidden, layer.norm_mid), layer.gate_up, stacked)
            hidden = hidden + self._maps(F.silu(gate) * up, layer.down, stacked)[0]
        # Only positions whose next token counts are turned into logits: those are large.
        rows = self._rms(hidden.flatten(0, 1)[packed.asked], self.norm)
        logits = F.linear(rows.to(self.compute), self.unembedding).float()
        nll = F.cross_entropy(logits, packed.answers, reduction="none")
        sums = nll.new_zeros(len(batches)).index_add(0, packed.owners, nll)
        return sums / packed.counts

    def _maps(self, x: Tensor, maps: _Maps, adapters: Adapters) -> list[Tensor]:
        """Several linear maps of one input ``[C, N, in]``, with the adapters that there are."""
        plain = F.linear(x.to(self.compute), maps.weight).float()
        out = list(torch.split(plain, list(maps.sizes), -1))
        held = [j for j, name in enumerate(maps.names) if f"{name}.lora_A.weight" in adapters]
        if held:
            downs = [adapters[f"{maps.names[j]}.lora_A.weight"] for j in held]
            codes = torch.bmm(x, torch.cat(downs, 1).mT) * self.scale
            for j, code in zip(
                held, torch.split(codes, [d.shape[1] for d in downs], -1), strict=True
            ):
                up = adapters[f"{maps.names[j]}.lora_B.weight"]
                out[j] = out[j] + torch.bmm(code, up.mT)
        return out

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, packed: _Packed) -> Tensor:
        """Causal attention within each sequence: unpacked to ``[S, heads, T, head]`` and back."""
        clients, length, width = q.shape
        widths = [q.shape[-1], k.shape[-1], v.shape[-1]]
        tokens = torch.cat([q, k, v], -1).flatten(0, 1)[packed.tokens]
        sequences, longest = packed.grid
        grid = tokens.new_zeros(sequences * longest, sum(widths))
        grid = grid.index_copy(0, packed.slots, tokens)
        q, k, v = (
            part.reshape(sequences, longest, -1, self.head).transpose(1, 2)
            for part in torch.split(grid, widths, -1)
        )
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        # Causal, so the padding at the end of a sequence is seen by padding only.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(sequences * longest, width)[packed.slots]
        out = mixed.new_zeros(clients * length, width).index_copy(0, packed.tokens, mixed)
        return out.view(clients, length, width)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, :, None]
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.view(*x.shape[:-1], -1, self.head)
        first, second = heads.chunk(2, -1)
        return (heads * cos + torch.cat([-second, first], -1) * sin).flatten(2)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        return out


@dataclass(frozen=True)
class _Maps:
    """Linear maps that share their input, as one: names, output sizes, weight ``[sum, in]``."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weight: Tensor

    @classmethod
    def of(cls, layer: Any, prefix: str, names: Sequence[str], compute: torch.dtype) -> _Maps:
        weights = [layer.get_submodule(name).weight.detach().to(compute) for name in names]
        sizes = tuple(len(w) for w in weights)
        return cls(tuple(prefix + n for n in names), sizes, torch.cat(weights))


@dataclass(frozen=True)
class _Layer:
    """The frozen weights of one block."""

    norm_in: Tensor
    qkv: _Maps
    out: _Maps
    norm_mid: Tensor
    gate_up: _Maps
    down: _Maps

    @classmethod
    def of(cls, layer: Any, prefix: str, compute: torch.dtype) -> _Layer:
        return cls(
            layer.input_layernorm.weight.detach().float(),
            _Maps.of(layer, prefix, _QKV, compute),
            _Maps.of(layer, prefix, _OUT, compute),
            layer.post_attention_layernorm.weight.detach().float(),
            _Maps.of(layer, prefix, _GATE_UP, compute),
            _Maps.of(layer, prefix, _DOWN, compute),
        )


@dataclass(frozen=True)
class _Packed:
    """The tokens of C clients, each client's sequences one after another.

    Attributes:
        ids, positions: ``[C, N]`` token ids and places in their sequences; N is the longest row.
        grid: number S and longest length T of the sequences.
        tokens, slots: where each real token is, in ``[C * N]`` and in ``[S * T]``.
        asked, answers, owners: where in ``[C * N]`` a loss is taken, on which token, by whom.
        counts: answer tokens of each client, ``[C]``.
    """

    ids: Tensor
    positions: Tensor
    grid: tuple[int, int]
    tokens: Tensor
    slots: Tensor
    asked: Tensor
    answers: Tensor
    owners: Tensor
    counts: Tensor

    @classmethod
    def of(cls, batches: Sequence[Sequence[Encoded]], device: torch.device) -> _Packed:
        lengths = [sum(len(e.input_ids) for e in batch) for batch in batches]
        clients, length = len(batches), max(lengths)
        sequences = sum(len(batch) for batch in batches)
        longest = max((len(e.input_ids) for batch in batches for e in batch), default=0)
        ids, positions = np.zeros((2, clients, length), np.int64)
        tokens, slots, asked, answers, owners = ([] for _ in range(5))
        sequence = 0
        for client, batch in enumerate(batches):
            at = 0
            for example in batch:
                size = len(example.input_ids)
                place = client * length + at
                ids[client, at : at + size] = example.input_ids
                positions[client, at : at + size] = np.arange(size)
                tokens.append(np.arange(place, place + size))
                slots.append(np.arange(sequence * longest, sequence * longest + size))
                following = np.asarray(example.labels[1:])  # position t predicts token t + 1
                counted = np.flatnonzero(following != IGNORED)
                asked.append(place + counted)
                answers.append(following[counted])
                owners.append(np.full(len(counted), client))
                at, sequence = at + size, sequence + 1

        def joined(pieces: list[Any]) -> Tensor:
            return torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(device)

        counts = torch.bincount(joined(owners), minlength=clients)
        if not int(counts.min()):
            raise ConfigError("a client's batch has no token to learn from")
        return cls(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            (sequences, longest),
            joined(tokens),
            joined(slots),
            joined(asked),
            joined(answers),
            joined(owners),
            counts,
        )
