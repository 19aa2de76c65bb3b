"""SmolLM2-135M-Instruct out of its GGUF file: the decoder's config and weights by Hugging Face's names, and its tokenizer.

The file has most weights in four bits (Q4_1). Here they are what those bits stand for, in float32, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# llama.cpp's names → Hugging Face's, within a layer.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # llama.cpp's token type of a special token
IMAGE = "<image>"


@dataclass(frozen=True)
class Decoder:
    """
    config       text_config of config.json
    weights      float32, by Hugging Face's names: "model.…", without "lm_head.weight", as it is tied to the embeddings
    tokenizer    with IMAGE as its last token, for which the embeddings have a row: the mean of all others
    special      bos_token, eos_token, unk_token and pad_token
    """

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    special: dict[str, str]


def read_decoder(file: Path) -> Decoder:
    """The decoder in a GGUF file of the architecture "llama", with tied embeddings and GPT-2's kind of tokenizer."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    stored = {  # copied, as what is not quantised is a view of the file
        one.name: torch.from_numpy(np.array(gguf.dequantize(one.data, one.tensor_type))) for one in reader.tensors
    }
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    embeddings = stored["token_embd.weight"]
    weights = {
        "model.embed_tokens.weight": torch.cat([embeddings, embeddings.mean(0, keepdim=True)]),
        "model.norm.weight": stored["output_norm.weight"],
    }
    for layer in range(fields["llama.block_count"]):
        for theirs, ours in _LAYER.items():
            weight = stored[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = halves(weight, heads if theirs == "attn_q" else kv_heads)
            weights[f"model.layers.{layer}.{ours}.weight"] = weight.contiguous()
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {ours: fields[f"tokenizer.ggml.{theirs}_token_id"] for theirs, ours in names.items()}
    config = {
        "model_type": "llama",
        "vocab_size": len(tokens) + 1,
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "rms_norm_eps": round(
            fields["llama.attention.layer_norm_rms_epsilon"], 9
        ),  # stored as the float32 nearest to 1e-5
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **{f"{ours}_token_id": ids[ours] for ours in ("bos", "eos", "pad")},
    }
    special = {f"{ours}_token": tokens[index] for ours, index in ids.items()}
    return Decoder(config, weights, _tokenizer(fields), special)


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads · D, C] with the channels that rotary embedding turns together side by side, as llama.cpp has them → in two halves
    of a head, as Hugging Face has them."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level byte pairs, digits one by one (llama.cpp's pre-tokenizer "smollm")."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, IMAGE)])
    return tokenizer
