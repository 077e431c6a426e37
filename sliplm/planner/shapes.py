"""The shapes of a model: all that a plan's cost depends on.

The layout of Llama is read from `config.json` itself, so that planning a model of any size needs neither torch nor
time; of any other architecture Transformers makes a model without weights (`planner.traced`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sliplm.errors import UnsupportedModelError

LAYOUT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MOST = 1 << 24  # of any number in a configuration
_MOST_BLOCKS = 1 << 12


@dataclass(frozen=True)
class Group:
    """Matrices that share a round trip, each (rows, columns): one above the other, or side by side if `summed`.

    `used` is the share of all tokens that reach them: 1, but for experts.
    """

    members: tuple[tuple[int, int], ...]
    summed: bool = False
    used: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the group's matrix, before it is cut into planes."""
        rows, columns = zip(*self.members, strict=True)
        return (rows[0], sum(columns)) if self.summed else (sum(rows), columns[0])

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.members)


@dataclass(frozen=True)
class Block:
    """A decoder block. `cache`: numbers that it keeps of a token, keys and values; `scores`: the width of all queries,
    so that attending to one earlier token takes twice as many multiply-adds."""

    groups: tuple[Group, ...]
    cache: int
    scores: int

    @property
    def weights(self) -> int:
        return sum(group.weights for group in self.groups)


@dataclass(frozen=True)
class Model:
    """A model that continues text. Norms and biases, a thousandth of its weights, are left out.

    Attributes:
        blocks: in order. around: the groups that are in none, such as the head.
        hidden: numbers of a hidden state.
        table: weights of the embedding, which no one multiplies. tied: the head is the same weights.
        stored: bytes of a weight in the checkpoint.
    """

    name: str
    blocks: tuple[Block, ...]
    around: tuple[Group, ...]
    hidden: int
    table: int
    tied: bool
    stored: int

    @property
    def multiply_adds(self) -> float:
        """Of one token, attention apart."""
        inside = (group for block in self.blocks for group in block.groups)
        return sum(group.used * group.weights for group in (*inside, *self.around))

    @property
    def parameters(self) -> int:
        around = sum(group.weights for group in self.around)
        return sum(block.weights for block in self.blocks) + self.table + (0 if self.tied else around)


def read(model: str) -> Model:
    """The shapes of `model`: a config.json, a directory with one, a .gguf file, or a hub id. No weights are read.

    Raises UnsupportedModelError: there is no configuration, or none of a model that continues text.
    """
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json":
        try:
            config = json.loads(file.read_text("utf-8"))
        except OSError as error:
            raise UnsupportedModelError(f"cannot read {file}: {error.strerror}.") from None
        except ValueError:
            raise UnsupportedModelError(f"{file} is not JSON.") from None
        if not isinstance(config, dict):
            raise UnsupportedModelError(f"{file} is no model's configuration.")
        name = str(config.get("_name_or_path") or file.resolve().parent.name)
        if (found := of_llama_layout(config, name)) is not None:
            return found
    from sliplm.planner.traced import trace

    return trace(str(file) if file.suffix == ".json" else model)


def of_llama_layout(config: dict[str, Any], name: str = "model") -> Model | None:
    """The shapes in a `config.json` of a model of the Llama layout; None if it is of another, is quantized, or leaves
    something to defaults. Raises UnsupportedModelError for numbers that cannot be."""
    kind = config.get("model_type")
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if kind not in LAYOUT or config.get("architectures") != [LAYOUT[kind]] or "quantization_config" in config:
        return None
    if any(config.get(key) is None for key in (*wanted, "num_key_value_heads")):
        return None
    vocabulary, hidden, inner, count, heads = (_number(config, key) for key in wanted)
    shared = _number(config, "num_key_value_heads")
    if config.get("head_dim") is None and kind == "qwen3":  # whose default is its own
        return None
    size = hidden // heads if config.get("head_dim") is None else _number(config, "head_dim")
    if count > _MOST_BLOCKS or not size:
        raise UnsupportedModelError(f"{name} has {count} blocks of {heads} heads of {size} numbers, which cannot be.")
    queries, keys = heads * size, shared * size
    groups = (
        Group(((queries, hidden), (keys, hidden), (keys, hidden))),
        Group(((hidden, queries),)),
        Group(((inner, hidden), (inner, hidden))),
        Group(((hidden, inner),)),
    )
    tied = bool(config.get("tie_word_embeddings", False))
    return Model(
        name=name,
        blocks=(Block(groups, 2 * keys, queries),) * count,
        around=(Group(((vocabulary, hidden),)),),
        hidden=hidden,
        table=vocabulary * hidden,
        tied=tied,
        stored=4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2,
    )


def _number(config: dict[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or not 0 < value <= _MOST:
        raise UnsupportedModelError(f"the configuration has {key} {str(value)[:40]!a}, which cannot be.")
    return value
