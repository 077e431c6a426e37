"""Open blocks, where the trusted side calls them: a run of them is one question to the edge, which has their cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from sliplm.errors import BundleError, NumericsError, UnsupportedModelError
from sliplm.open.blocks import Elsewhere, find_cache
from sliplm.split.plan import OpenPlan

if TYPE_CHECKING:
    from sliplm.trusted.runtime import Request, Runtime


class OpenRun(Elsewhere):
    """In the place of the first block of the run number `run`; those after it let hidden states through."""

    def __init__(self, block: nn.Module, index: int, run: int) -> None:
        super().__init__(block, index)
        self.run = run
        self._runtime: Runtime | None = None

    def bind(self, runtime: Runtime) -> None:
        """Ask over the links of `runtime`."""
        self._runtime = runtime

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The hidden states (B, T, H) after the run. Raises LinkError, NumericsError; UnsupportedModelError: the cache
        is one of other sequences."""
        runtime = self._runtime
        if runtime is None:
            raise RuntimeError("these open blocks are not bound to an edge")
        if runtime.is_rehearsing:
            return super().forward(hidden_states, *args, **kwargs)
        cache = find_cache(args, kwargs)
        if cache is None:
            requests, start = [runtime.new_request() for _ in hidden_states], 0
        else:
            requests, start = _requests(cache, runtime, len(hidden_states)), cache.get_seq_length(self.index)
            layer: Any = cache.layers[self.index]
            if start and layer.keys[:, 0, -1, 0].tolist() != list(range(len(requests))):
                raise UnsupportedModelError("the sequences of a cache cannot be reordered where blocks are open.")
        half = hidden_states.dtype == torch.bfloat16
        out = []
        for request, x in zip(requests, hidden_states.detach().cpu(), strict=True):
            rows = x.contiguous().view(torch.int16).numpy().view(np.uint16) if half else x.float().contiguous().numpy()
            y = torch.from_numpy(runtime.compute(self.run, request, start, rows, cache is not None))
            out.append(y.view(torch.bfloat16) if half else y)
        states = torch.stack(out)
        if not bool(torch.isfinite(states).all()):
            raise NumericsError(f"the edge's hidden states after open blocks (run {self.run}) are not finite.")
        if cache is not None:
            self.note(cache, hidden_states)
        return states.to(hidden_states.device, hidden_states.dtype)


def _requests(cache: Cache, runtime: Runtime, count: int) -> list[Request]:
    """By what the edge knows the `count` sequences of `cache`, which keeps it. Raises UnsupportedModelError."""
    requests: list[Request] | None = getattr(cache, "slip_requests", None)
    if requests is None:
        requests = cache.slip_requests = [runtime.new_request() for _ in range(count)]  # type: ignore[attr-defined]
    if len(requests) != count:
        raise UnsupportedModelError("the sequences of a cache cannot become more or fewer where blocks are open.")
    return requests


def place_runs(model: Any, plan: OpenPlan | None) -> list[OpenRun]:
    """Put `OpenRun` and `Elsewhere` in the places of the open blocks of `model`. Raises BundleError: it has no such."""
    if plan is None:
        return []
    try:
        blocks: Any = model.get_submodule(plan.path)
        for run, (first, last) in enumerate(plan.runs):
            for index in range(first, last + 1):
                block = blocks[index]
                blocks[index] = OpenRun(block, index, run) if index == first else Elsewhere(block, index)
        owner = model.get_submodule(plan.path.rpartition(".")[0])
    except (AttributeError, IndexError, TypeError):
        raise BundleError(f"{type(model).__name__} has no such blocks as the bundle says are open.") from None
    owner.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
    return [blocks[first] for first, _ in plan.runs]


def _refuse_padding(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The edge masks by position alone. Raises UnsupportedModelError."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all())):
        raise UnsupportedModelError("texts cannot be padded, nor attention masked, where blocks are open.")
