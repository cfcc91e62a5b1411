"""Writes the text part of a checkpoint as a GGUF file, without torch.

Llama and Qwen2 text models. Prompts are sent as token ids, so the tokenizer is written only because
the format wants one.
"""

import json
import mmap
import re
from pathlib import Path

import numpy as np

LAYER = re.compile(r"(?:^|\.)((?:layers\.\d+\.|embed_tokens\.|norm\.).*)$")
FOREIGN = re.compile(r"vision|visual|projector|connector|image_newline")
FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def read_text_config(checkpoint):
    """The configuration of the text model."""
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    return {**config, **config.get("text_config", {})}


def write_text_part(checkpoint, dtype, target):
    """Write the GGUF file; its matrices have the given dtype, its vectors float32."""
    import gguf

    config = read_text_config(checkpoint)
    kind = config["model_type"]
    names = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2"}
    if kind not in names:
        raise ValueError(f"a '{kind}' text model is not converted, only {', '.join(names)}")
    arch = gguf.MODEL_ARCH[names[kind]]
    scratch = target.with_suffix(".part")
    writer = gguf.GGUFWriter(str(scratch), gguf.MODEL_ARCH_NAMES[arch])
    add_sizes(writer, config)
    add_vocabulary(writer, checkpoint, config["vocab_size"])
    quantisation = gguf.GGMLQuantizationType[FORMATS[dtype]]
    mapping = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in read_text_tensors(checkpoint):
        if arch == gguf.MODEL_ARCH.LLAMA:
            tensor = reorder_heads(name, tensor, config)
        wanted = quantisation if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(tensor, wanted)
        mapped = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(mapped, packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scratch.rename(target)


def add_sizes(writer, config):
    """The architecture."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config.get("max_position_embeddings", 4096))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer, checkpoint, size):
    """The tokens by id, with fillers where the embedding has more rows."""
    import gguf

    content = json.loads((Path(checkpoint) / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for entry in content["added_tokens"]:
        if entry["id"] < size:
            tokens[entry["id"]] = entry["content"]
            types[entry["id"]] = int(gguf.TokenType.CONTROL)
    merges = content["model"].get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)


def read_text_tensors(checkpoint):
    """Name and float32 values of the text model's tensors, named as a bare text model's are."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    if not files:
        raise ValueError(f"no .safetensors in {checkpoint}")
    for file in files:
        for name, tensor in read_tensors(file):
            if FOREIGN.search(name):
                continue
            found = LAYER.search(name)
            if name.endswith("lm_head.weight"):
                yield "lm_head.weight", tensor()
            elif found:
                yield f"model.{found.group(1)}", tensor()


def read_tensors(file):
    """Names of a safetensors file, each with a function that reads its values as float32."""
    with open(file, "rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])

        def read(first=first, last=last, entry=entry):
            return widen(data[first:last], entry["dtype"]).reshape(entry["shape"])

        yield name, read


def widen(raw, dtype):
    """Stored numbers as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"F32": np.float32, "F16": np.float16}
    return np.frombuffer(raw, kinds[dtype]).astype(np.float32)


def reorder_heads(name, tensor, config):
    """Rotate neighbours, as GGUF's Llama does, instead of halves, as the checkpoint's does."""
    heads = config["num_attention_heads"]
    if name.endswith("k_proj.weight"):
        heads = config.get("num_key_value_heads") or heads
    elif not name.endswith("q_proj.weight"):
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
