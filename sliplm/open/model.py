"""A run of open blocks as Transformers computes it, in a model of the original's class of which no other part has
weights: what it does before the first block of the run is overridden there, what it does after the last is dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from sliplm.bundle import CONFIG_FILE, OPEN_FILE, EdgeBundle
from sliplm.errors import BundleError, LinkError, locate
from sliplm.open.blocks import Elsewhere

TOKENS = 8  # rows of the table of embeddings, which is not used


class Run:
    """The blocks `first` to `last`, in float32, on a GPU if there is one.

    Attributes:
        width: of hidden states.
        row_bytes: what a position takes in a cache.
    """

    def __init__(self, bundle: EdgeBundle, config: Any, path: str, first: int, last: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config = config.get_text_config(decoder=True)
        model = _hollow(config)
        blocks: Any = model.get_submodule(path)
        for index, block in enumerate(blocks):
            if not first <= index <= last:
                blocks[index] = Elsewhere(block, index)
        prefixes = tuple(f"{path}.{index}." for index in range(first, last + 1))
        names = set(model.state_dict())
        with safe_open(bundle.directory / OPEN_FILE, "pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
        if missing := {name for name in names if name.startswith(prefixes)} - state.keys():
            raise BundleError(f"{bundle.directory / OPEN_FILE} lacks {min(missing)}.")
        model.load_state_dict(state, strict=False, assign=True)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"), False)
        self._embedded = model.get_input_embeddings().embedding_dim
        self._decoder = model.get_submodule(path.rpartition(".")[0]).to(self._device).eval()
        self._rows = self._out = torch.empty(0)
        blocks[first].register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[last].register_forward_hook(self._leave)
        self.width = int(self._config.hidden_size)
        cache = self.new_cache()
        self.compute(np.zeros((1, self.width), np.float32), cache)
        self.row_bytes = self.size(cache)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((self._rows, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": self._rows})

    def _leave(self, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._out = out if isinstance(out, torch.Tensor) else out[0]

    def new_cache(self) -> Cache:
        return DynamicCache(config=self._config)

    @staticmethod
    def length(cache: Cache) -> int:
        """Positions in it."""
        return int(cache.get_seq_length())

    @staticmethod
    def cut(cache: Cache, length: int) -> bool:
        """Forget all positions from `length` on; whether that can be done."""
        if not cache.is_croppable:
            return False
        cache.crop(length - int(cache.get_seq_length()))
        return True

    @staticmethod
    def size(cache: Cache) -> int:
        """Its bytes."""
        layers: Any = cache.layers
        held = (t for layer in layers if layer.is_initialized for t in (layer.keys, layer.values))
        return sum(t.numel() * t.element_size() for t in held)

    @torch.inference_mode()
    def compute(self, x: NDArray[Any], cache: Cache | None) -> NDArray[Any]:
        """Hidden states (T, H) after the run, for those before it: float32, or bfloat16 as uint16, which come back as
        they came. Those of the positions before are in `cache`, which gets these. Raises MemoryError, LinkError."""
        half = x.dtype == np.uint16
        try:
            rows = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(x)
            self._rows = rows[None].to(self._device, torch.float32)
            embedded = torch.zeros(1, len(x), self._embedded, device=self._device)
            self._decoder(inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None)
            out = self._out[0].cpu()
        except torch.OutOfMemoryError:
            raise MemoryError from None
        except Exception as error:  # whatever the model's code raises; its text might quote anything
            raise LinkError(f"the open blocks failed: {locate(error)}.") from None
        finally:
            self._rows = self._out = torch.empty(0)
        return out.bfloat16().view(torch.int16).numpy().view(np.uint16) if half else out.contiguous().numpy()


def load(bundle: EdgeBundle) -> list[Run]:
    """The runs of open blocks of `bundle`, ready to compute. Raises BundleError, after `bundle.check`."""
    bundle.check()
    opened = bundle.opened
    assert opened is not None
    try:
        config = transformers.AutoConfig.from_pretrained(bundle.directory / CONFIG_FILE, trust_remote_code=False)
        return [Run(bundle, config, opened.path, first, last) for first, last in opened.runs]
    except BundleError:
        raise
    except Exception as error:  # whatever Transformers raises, of another release than the split's for example
        raise BundleError(f"the open blocks in {bundle.directory} cannot be run ({locate(error)}).") from None


def _hollow(config: Any) -> Any:
    """The model of `config` in float32, its parameters without memory, its tables of tokens nearly empty."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for part in {id(part): part for part in (config, text)}.values():
        part.vocab_size, part.pad_token_id = TOKENS, None
    kind = getattr(transformers, config.architectures[0])
    with _without_weights():
        return kind._from_config(config, dtype=torch.float32).eval()


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters that are made here have no memory. Buffers have: they hold constants that code computes."""
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.detach().to("meta"), False))

    nn.Module.register_parameter = without  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
