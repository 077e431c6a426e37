"""Read a model one tensor at a time: a directory of safetensors, a .gguf file, or a hub id."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from sliplm.errors import UnsupportedModelError


class Source(ABC):
    """A model to split.

    Attributes:
        config: its Transformers configuration, without any quantization.
        origin: what `AutoTokenizer.from_pretrained` and `from_pretrained` take: (path or id, extra arguments).
    """

    config: transformers.PretrainedConfig
    origin: tuple[str, dict[str, Any]]

    def skeleton(self) -> transformers.PreTrainedModel:
        """The model with fake tensors: shapes and code, no memory. Call, and use the result, under `fake_mode()`."""
        with torch.device("meta"), unset_fake_temporarily():  # some models compute with real numbers as they are made
            model = _model_class(self.config)._from_config(self.config)
        skeleton: transformers.PreTrainedModel = model.to_empty(device="cpu").eval()
        return skeleton

    @abstractmethod
    def names(self) -> set[str]:
        """Names of the stored tensors."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        """One tensor, or of its first axis, cut into `parts` equal pieces, number `part`; in memory of its own, checked
        to be finite. Raises UnsupportedModelError."""


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


class SafetensorsSource(Source):
    """A directory with config.json and *.safetensors. Files are opened for one tensor each: no mapping stays."""

    def __init__(self, directory: Path) -> None:
        self.config = _config(str(directory), {})
        self.origin = (str(directory), {})
        self._where = _index(directory)

    def names(self) -> set[str]:
        return set(self._where)

    def dtype(self, name: str) -> torch.dtype:
        with safe_open(self._where[name], "pt") as file:
            dtype: torch.dtype = getattr(torch, _TORCH_NAMES[file.get_slice(name).get_dtype()])
        return dtype

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._where[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        path = self._where[name]
        try:
            with safe_open(path, "pt") as file:
                if parts == 1:
                    tensor = file.get_tensor(name).clone()
                else:
                    stored = file.get_slice(name)
                    tensor = stored[_piece(stored.get_shape()[0], part, parts)].clone()
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(f"{path} is damaged or incomplete ({error}).") from None
        return _finite(name, tensor)


_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"} | {
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class LoadedSource(Source):
    """A model that Transformers has loaded whole: .gguf files, and checkpoints whose tensor names it rewrites."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self.origin = (name, arguments)
        model = _load(name, _config(name, arguments), arguments)
        self.config = _plain(model.config)
        self.config.architectures = [type(model).__name__]
        self._tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=False))

    def names(self) -> set[str]:
        return set(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        tensor = self._tensors[name]
        return _finite(name, tensor if parts == 1 else tensor[_piece(len(tensor), part, parts)])


def open_source(model: str) -> Source:
    """A directory, a .gguf file, or a hub id. Raises UnsupportedModelError."""
    path, arguments = locate(model)
    return LoadedSource(str(path), **arguments) if arguments else SafetensorsSource(path)


def load_whole(model: str) -> Any:
    """The unmodified model in float32, ready to run. Raises UnsupportedModelError."""
    path, arguments = locate(model)
    return _load(str(path), _config(str(path), arguments), arguments).eval()


def locate(model: str) -> tuple[Path, dict[str, Any]]:
    """What Transformers needs to load `model`: a directory, and extra arguments. Raises UnsupportedModelError."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnsupportedModelError(f"{path} does not exist.")
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise UnsupportedModelError(f"{model} is not a model: expected a directory, a .gguf file or a hub id.")
        path = _download(model)
    return path, {}


def _model_class(config: transformers.PretrainedConfig) -> Any:
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        kind = config.model_type
        raise UnsupportedModelError(f"the configuration names no architecture that Transformers has ({kind}).")
    return mapping[type(config)]


def _load(name: str, config: transformers.PretrainedConfig, arguments: dict[str, Any]) -> Any:
    kind = _model_class(config)
    try:
        model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **arguments)
    except ImportError as error:
        raise UnsupportedModelError(f"reading this model needs another package: {_first_line(error)}") from None
    except Exception as error:  # the readers of half a dozen formats raise whatever they do
        raise UnsupportedModelError(f"Transformers cannot load {name}: {_first_line(error)}") from None
    # Transformers would fill these with random numbers and carry on.
    if missing := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise UnsupportedModelError(f"{name} lacks {missing[0]}, or has it in another shape; it is incomplete.")
    return model


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UnsupportedModelError(f"cannot fetch {model} from the hub: {_first_line(error)}") from None


def _config(name: str, arguments: dict[str, Any]) -> transformers.PretrainedConfig:
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    except Exception as error:  # Transformers raises whatever its parsers do
        raise UnsupportedModelError(f"{name} is not a model that Transformers knows: {_first_line(error)}") from None
    method = getattr(config, "quantization_config", None)
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if method is not None and "gguf_file" not in arguments:
        raise UnsupportedModelError(f"{name} is already quantized ({method}); split the original weights.")
    return _plain(config)


def _plain(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _index(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor; every file that the index names must be there and open."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = {directory / str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UnsupportedModelError(f"{index} is damaged.") from None
    else:
        files = set(directory.glob("*.safetensors"))
    if not files:
        raise UnsupportedModelError(f"{directory} holds no *.safetensors (pickled checkpoints are not read).")
    where: dict[str, Path] = {}
    for path in sorted(files):
        if path.parent != directory or not path.is_file():
            raise UnsupportedModelError(f"{path} is missing; the checkpoint is incomplete.")
        try:
            with safe_open(path, "pt") as file:
                where.update((name, path) for name in file.keys())  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(f"{path} is damaged or incomplete ({_first_line(error)}).") from None
    return where


def _piece(length: int, part: int, parts: int) -> slice:
    return slice(part * (length // parts), (part + 1) * (length // parts))


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UnsupportedModelError(f"the weight {name} holds values that are not finite numbers.")
    return tensor


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
