"""The trusted side's model on an accelerator: everything but the protected layers runs there, and they are reached.

No accelerator is needed: one is simulated, strictly. Tensors on it compute on the CPU, but meet others only after a
copy, as on a real device. What it cannot show is whether a real device's kernels work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading import attached
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")  # a device type that PyTorch knows and that nobody registers anything for
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Away(torch.Tensor):
    """A tensor on the simulated device; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Away:
        shape, strides = inner.shape, inner.stride()
        self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=inner.dtype, device=DEVICE)
        self.inner = inner
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While entered, `.to(DEVICE)` and `device=DEVICE` work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    away = {id(t.inner): t for t in tensors if isinstance(t, Away)}
    here = [t for t in tensors if not isinstance(t, Away) and t.dim()]  # a number may come from anywhere
    if away and here and func not in COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    goes_away = kwargs["device"] == DEVICE if kwargs.get("device") is not None else bool(away)
    if func is torch.ops.aten.copy_.default:
        goes_away = isinstance(args[0], Away)
    if goes_away and "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not goes_away:
        return out
    return tree_map(lambda t: away.get(id(t)) or Away(t) if isinstance(t, torch.Tensor) else t, out)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Away) else x


def test_the_simulated_device_refuses_what_a_real_one_refuses() -> None:
    with Accelerator():
        x = torch.ones(3).to(DEVICE)
        assert x.device == DEVICE and (x + 1).device == DEVICE and torch.zeros(2, device=DEVICE).device == DEVICE
        assert (x + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()


def test_a_protected_model_moves_to_a_device_and_gives_the_same(tiny_split: Path) -> None:
    path = tiny_split / "trusted"
    model = attached(transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval())
    ids = torch.tensor([[5, 250, 0, 17, 17, 99, 3, 128], [1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with Accelerator():
            model.to(DEVICE)
            got = model(ids.to(DEVICE), use_cache=False).logits
            assert got.device == DEVICE
            got = got.cpu()
    assert (want - got).abs().max() < 1e-3 * want.std()
