"""Read a model one tensor at a time: a directory of safetensors, a .gguf file, or a hub id."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.split import dtypes
from sliplm.split.files import ADAPTER_CONFIG, checkpoint_files, has_adapter, refuse_adapter, refuse_pointer, tensors_in
from sliplm.split.renaming import renames

logger = logging.getLogger(__name__)


class Source(ABC):
    """A model to split.

    Attributes:
        config: its Transformers configuration, without any quantization.
        origin: what `from_pretrained` takes: (path or id, extra arguments).
    """

    config: transformers.PretrainedConfig
    origin: tuple[str, dict[str, Any]]

    def skeleton(self) -> transformers.PreTrainedModel:
        """The model with fake tensors: shapes and code, no memory. Call, and use the result, under `fake_mode()`.
        Raises UnsupportedModelError if the configuration makes no model."""
        return make_skeleton(self.config)

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

    @abstractmethod
    def load(self) -> Any:
        """The model as Transformers loads it, whole, in float32, ready to run; None if a package is missing for that.
        Raises UnsupportedModelError."""

    def renamed(self, model: transformers.PreTrainedModel) -> bool:
        """Whether tensors have other names here, or other contents, than in the `model` that Transformers makes of
        them. Raises UnsupportedModelError if two are for one place."""
        return False

    def whole(self) -> Source:
        """The same model, with the names that its tensors have once Transformers has loaded it."""
        return LoadedSource(self.origin[0], **self.origin[1])


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


class SafetensorsSource(Source):
    """A directory with config.json and *.safetensors. Files are opened for one tensor each: no mapping stays; none is
    opened before the first is asked for."""

    def __init__(self, directory: Path) -> None:
        self.config, self._method = _config(str(directory), {})
        self.origin = (str(directory), {})

    @cached_property
    def _where(self) -> dict[str, Path]:
        return tensors_in(checkpoint_files(Path(self.origin[0]), self.config))

    def names(self) -> set[str]:
        return set(self._where)

    def dtype(self, name: str) -> torch.dtype:
        return dtypes.torch_dtype(name, self._stored(name))

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._where[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        stored = self._stored(name)
        dtypes.torch_dtype(name, stored)  # refuses what cannot be read
        if not dtypes.is_fp8(stored):
            return _finite(name, self._read(name, part, parts))
        scale = dtypes.scale_of(name, self._where, self._method is not None, stored)
        if scale is None:
            return _finite(name, self._read(name, part, parts).float())
        whole = dtypes.dequantise(name, self._read(name), self._read(scale))
        return _finite(name, whole if parts == 1 else whole[_piece(len(whole), part, parts)].clone())

    def renamed(self, model: transformers.PreTrainedModel) -> bool:
        return renames(model, self.names())

    def load(self) -> Any:
        if self._method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
            return None
        return _load(self.origin[0], self.config, {}, self._method)

    def _stored(self, name: str) -> str:
        with safe_open(self._where[name], "pt") as file:
            stored: str = file.get_slice(name).get_dtype()
        return stored

    def _read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        path = self._where[name]
        try:
            with safe_open(path, "pt") as file:
                if parts == 1:
                    tensor: torch.Tensor = file.get_tensor(name).clone()
                else:
                    stored = file.get_slice(name)
                    tensor = stored[_piece(stored.get_shape()[0], part, parts)].clone()
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(f"{path} is damaged or incomplete ({error}).") from None
        return tensor


class LoadedSource(Source):
    """A model that Transformers has loaded whole: .gguf files, and checkpoints whose tensor names it rewrites."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self.origin = (name, arguments)
        config, method = _config(name, arguments)
        self._model = _load(name, config, arguments, method)
        self.config = _plain(copy.deepcopy(self._model.config))
        self.config.architectures = [type(self._model).__name__]
        self._tensors: dict[str, torch.Tensor] = dict(self._model.state_dict(keep_vars=False))

    def names(self) -> set[str]:
        return set(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, part: int = 0, parts: int = 1) -> torch.Tensor:
        tensor = self._tensors[name]
        return _finite(name, tensor if parts == 1 else tensor[_piece(len(tensor), part, parts)])

    def load(self) -> Any:
        return self._model

    def whole(self) -> Source:
        return self


def open_source(model: str, merged: Path | None = None) -> Source:
    """A directory, a .gguf file, or a hub id.

    Args:
        merged: the adapter that the caller merges; any other one beside the model is refused.

    Raises:
        UnsupportedModelError: it is not a model that can be read, or an adapter would be dropped.
    """
    path, arguments = locate(model)
    if merged is None or merged.resolve() != path.resolve():
        refuse_adapter(path)
    return LoadedSource(str(path), **arguments) if arguments else SafetensorsSource(path)


def load_whole(model: str) -> Any:
    """The unmodified model in float32, ready to run. Raises UnsupportedModelError."""
    path, arguments = locate(model)
    refuse_adapter(path)
    config, method = _config(str(path), arguments)
    return _load(str(path), config, arguments, method)


def make_skeleton(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """See `Source.skeleton`."""
    kind = model_class(config)
    try:
        with torch.device("meta"), unset_fake_temporarily():  # some compute with real numbers as they are made
            model = kind._from_config(config)
    except Exception as error:  # whatever the model's code raises
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise UnsupportedModelError(f"no {kind.__name__} can be made of the configuration ({why}).") from None
    skeleton: transformers.PreTrainedModel = model.to_empty(device="cpu").eval()
    return skeleton


def read_config(directory: Path, arguments: dict[str, Any]) -> transformers.PretrainedConfig:
    """The configuration of what `locate` found; no weights are read. Raises UnsupportedModelError."""
    return _config(str(directory), arguments)[0]


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


def continues_text(config: transformers.PretrainedConfig) -> bool:
    """Whether the class in which the model is stored is the one that Transformers gives for continuing text."""
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        return False
    found = mapping[type(config)]
    return model_class(config) in (found if isinstance(found, (list, tuple)) else (found,))


def refuse_other_tasks(directory: Path) -> None:
    """Raises BundleError if the bundle in `directory` is of a class that does not continue text."""
    config = transformers.AutoConfig.from_pretrained(directory)
    if not continues_text(config):
        stored = " or ".join(architectures(config) or [config.model_type])
        raise BundleError(f"{directory} holds a {stored}, which does not continue text: use it from Python instead.")


def model_class(config: transformers.PretrainedConfig) -> Any:
    """The class in which the model is stored. Raises UnsupportedModelError."""
    for name in architectures(config):
        if _fits(kind := getattr(transformers, name, None), config):
            return kind
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        kind = config.model_type
        raise UnsupportedModelError(f"the configuration names no architecture that Transformers has ({kind}).")
    return mapping[type(config)]


def architectures(config: transformers.PretrainedConfig) -> list[str]:
    """Names of classes, as the configuration has them."""
    named = config.architectures or []
    return [named] if isinstance(named, str) else [str(name) for name in named]


def _fits(kind: Any, config: transformers.PretrainedConfig) -> bool:
    """Whether `kind` is a model's class, and of models with such a configuration. Transformers goes by `model_type`,
    from which the configuration's own class comes, and does not look at the name of a class of another type."""
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return False
    if kind.config_class is not None and isinstance(config, kind.config_class):
        return True
    mappings = [m for m in vars(modeling_auto).values() if isinstance(m, _LazyAutoMapping)]
    found = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    return any(kind in (of if isinstance(of, (list, tuple)) else (of,)) for of in found)


def _note_architectures(name: str, config: transformers.PretrainedConfig) -> None:
    """Say, or refuse, that a model is split as another class than its configuration names, or without its own code."""
    named = architectures(config)
    code = getattr(config, "auto_map", None)
    if named and not any(_fits(getattr(transformers, n, None), config) for n in named):
        if code:
            raise UnsupportedModelError(f"{name} runs on code of its own ({named[0]}), which is never executed here.")
        logger.warning(
            "Transformers has no class %s for models of type %s: it is split as %s",
            named[0],
            config.model_type,
            model_class(config).__name__,
        )
    elif code:
        logger.warning(
            "the checkpoint names code of its own (auto_map), which is not executed: it is split as Transformers' %s",
            model_class(config).__name__,
        )


def _load(name: str, config: transformers.PretrainedConfig, arguments: dict[str, Any], method: str | None) -> Any:
    kind = model_class(config)
    try:
        if method == "fp8":  # where there is a GPU, Transformers would compute in fp8 on it
            stored = transformers.AutoConfig.from_pretrained(name)
            stored.quantization_config = {**_settings(stored.quantization_config), "dequantize": True}
            arguments = {**arguments, "config": stored}
        with _without_adapter(name) as where:
            model, info = kind.from_pretrained(where, dtype=torch.float32, output_loading_info=True, **arguments)
    except ImportError as error:
        raise UnsupportedModelError(f"reading this model needs another package: {_first_line(error)}") from None
    except Exception as error:  # the readers of half a dozen formats raise whatever they do
        raise UnsupportedModelError(f"Transformers cannot load {name}: {_first_line(error)}") from None
    # Transformers would fill these with random numbers and carry on.
    if missing := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise UnsupportedModelError(f"{name} lacks {missing[0]}, or has it in another shape; it is incomplete.")
    return model.eval()


@contextmanager
def _without_adapter(name: str) -> Iterator[str]:
    """The directory `name` as it is without an adapter, which Transformers would add if PEFT is installed."""
    directory = Path(name)
    if not has_adapter(directory):
        yield name
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in directory.iterdir():
            if path.name != ADAPTER_CONFIG:
                (Path(scratch) / path.name).symlink_to(path.resolve())
        yield scratch


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UnsupportedModelError(f"cannot fetch {model} from the hub: {_first_line(error)}") from None


def _config(name: str, arguments: dict[str, Any]) -> tuple[transformers.PretrainedConfig, str | None]:
    """The configuration without any quantization, and the method of the quantization that it had."""
    if not arguments:
        refuse_pointer(Path(name) / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    except Exception as error:  # Transformers raises whatever its parsers do
        raise UnsupportedModelError(f"the configuration of {name} cannot be read: {_first_line(error)}") from None
    _note_architectures(name, config)
    method = None
    if (quantization := getattr(config, "quantization_config", None)) is not None and "gguf_file" not in arguments:
        settings = _settings(quantization)
        method = settings["quant_method"]
        if not dtypes.readable(settings):
            raise UnsupportedModelError(
                f"{name} is already quantized ({method or 'its quantization_config names no method'}); "
                "split the original weights."
            )
    return _plain(config), method


def _settings(quantization: Any) -> dict[str, Any]:
    """A `quantization_config` as a dictionary, with the method's name or None as `quant_method`."""
    to_dict = getattr(quantization, "to_dict", lambda: quantization)
    settings = dict(found) if isinstance(found := to_dict(), dict) else {}
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):  # as Transformers has it
        method = "bitsandbytes"
    return settings | {"quant_method": method and str(getattr(method, "value", method))}


def _plain(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _piece(length: int, part: int, parts: int) -> slice:
    return slice(part * (length // parts), (part + 1) * (length // parts))


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UnsupportedModelError(f"the weight {name} holds values that are not finite numbers.")
    return tensor


def _first_line(error: BaseException) -> str:
    """What `error` says first, with what it announces by a colon."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
