"""A tiny LLaMA with its tokenizer in a GGUF file, written as llama.cpp's converter writes it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENS = ["<s>", "Ġ", *(chr(c) for c in range(33, 127)), "ab"]
MAPS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiny_llama() -> Any:
    """Seeded, two layers, two key-value heads for four heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
        )
    )


def write(path: Path, model: Any) -> None:
    """The model in fp32."""
    import gguf

    c, w = model.config, gguf.GGUFWriter(str(path), "llama")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_token_list(TOKENS)
    w.add_token_merges(["a b"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        w.add_tensor(*_stored(name, tensor.numpy(), c))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _stored(name: str, values: Any, config: Any) -> tuple[str, Any]:
    if name in OUTSIDE:
        return OUTSIDE[name], values
    _, _, layer, rest = name.split(".", 3)
    kind = rest.removesuffix(".weight")
    if kind in ("self_attn.q_proj", "self_attn.k_proj"):
        # llama.cpp rotates neighbours, transformers halves: the rows of a head change places.
        query = kind.endswith("q_proj")
        heads = config.num_attention_heads if query else config.num_key_value_heads
        rows = values.reshape(heads, 2, -1, values.shape[1])
        values = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
    return f"blk.{layer}.{MAPS[kind]}.weight", values
