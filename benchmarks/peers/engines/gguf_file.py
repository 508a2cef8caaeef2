"""Writes a checkpoint of the Llama or Qwen2 architecture as a bfloat16 GGUF file, which llama.cpp then quantises.

What llama.cpp's own convert_hf_to_gguf.py does for these two, which its Python packages do not ship. Weights are copied
as they are, but for the rows of query and key of Llama, which GGUF holds in another order.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Write ``checkpoint`` to ``file``."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), config["model_type"])
    _write_sizes(writer, config)
    _write_vocabulary(writer, checkpoint, gguf.TokenType)
    for name, bits in _tensors(checkpoint / "model.safetensors"):
        target = _target(name)
        if config["model_type"] == "llama" and ".attn_q.w" in target:
            bits = _reordered(bits, config["num_attention_heads"])
        if config["model_type"] == "llama" and ".attn_k.w" in target:
            bits = _reordered(bits, config["num_key_value_heads"])
        if bits.ndim == 1:
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(target, wide)
        else:
            data = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def _write_vocabulary(writer: Any, checkpoint: Path, kinds: Any) -> None:
    words = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    ordered = sorted(words, key=words.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(ordered)
    writer.add_token_types([kinds.CONTROL if i < 2 else kinds.NORMAL for i in range(len(ordered))])
    writer.add_token_merges([f"{ordered[2]} {ordered[3]}"])  # llama.cpp refuses a list of none
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _tensors(file: Path) -> Any:
    """Name and bfloat16 bits (uint16) of each tensor; the format is eight bytes of length, a JSON header, data."""
    data = np.memmap(file, np.uint8, "r")
    length = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] != "BF16":
            raise ValueError(f"{file}: {name} is {about['dtype']}, not BF16")
        start, end = about["data_offsets"]
        yield name, data[8 + length + start : 8 + length + end].view(np.uint16).reshape(about["shape"])


def _target(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}.{kind}"


def _reordered(bits: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from halves to pairs, which is how GGUF's Llama rotates."""
    rows = bits.shape[0] // heads // 2
    return bits.reshape(heads, 2, rows, *bits.shape[1:]).swapaxes(1, 2).reshape(bits.shape)
