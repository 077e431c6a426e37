"""After a split: is the protected model the original? A few tokens through both, compared before anybody gets either.

The original is what Transformers itself loads from the owner's files, so this also shows a split that read other
tensors than Transformers does. Where there is no room for the whole original in float32, or a package is missing to
load it, every protected matrix is compared with the weight it stands for, on random inputs, and the protected model has
to run at least.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

from sliplm.errors import BundleError, SlipError, locate
from sliplm.split.base import FineTuned
from sliplm.split.example import example_inputs
from sliplm.split.source import LoadedSource, Source, fake_mode, model_class

if TYPE_CHECKING:
    from sliplm.split.groups import Group

logger = logging.getLogger(__name__)
TOKENS = 16
FIRST_IDS = 1000  # tokens are drawn from these: what stands for pictures and the like comes later
LIMITS = {2: 5e-3, 1: 0.3}
"""By planes: the largest error that the split itself explains, relative to the spread of the outputs. Measured: see
docs/models.md. A plane leaves the weights about 8 bits, so one plane's errors are some 250 times those of two. A LoRA
that is split with its base may lose the rounding of its merging to 16 bits (`split.base.divide`): one plane's, too."""


@dataclass(frozen=True)
class Checked:
    """How far the protected model is from the original.

    Attributes:
        what: "logits" (or what the model gives instead), "products" of the matrices, or "" for nothing.
        error: root-mean-square difference, relative to the standard deviation of the original's values; of products,
            the largest of all matrices.
    """

    what: str
    error: float | None


def compare(source: Source, groups: list[Group], stored: dict[str, str], directory: Path, planes: int) -> Checked:
    """Compare the bundles in `directory` with `source`; `stored` says what the source calls a tensor.

    Memory: the original in float32, then the protected model, one after the other, if that much is available; else the
    protected model and one matrix.

    Raises:
        BundleError: they differ by more than `planes` explain, or the protected one does not run and the original does.
        UnsupportedModelError: the model's code wants the values of a protected weight.
    """
    whole, protected = _sizes(source, stored, directory)
    room = available_memory()
    with torch.no_grad(), _quiet():
        if room is not None and protected > room:
            logger.warning("the split was not checked: there is no memory to load the protected model")
            return Checked("", None)
        if room is not None and whole > room:
            logger.warning("there is no memory to load the original: each matrix is checked by itself")
            original = None
        elif (original := source.load()) is None:
            logger.warning("a package is missing to load the original: each matrix is checked by itself")
        answer = None if original is None else _original_answer(original)
        without, original = original is None, None
        gc.collect()
        model = _protected(source, directory)
        if answer is not None:
            what, error = "logits", relative_error(answer.value, _protected_answer(model, answer.inputs))
        else:
            what, error = "products", _products(model, source, groups, stored)
            if without:
                _try(model, source)
    limit = LIMITS[1 if isinstance(source, FineTuned) else planes]
    if not error <= limit:
        raise BundleError(
            f"the protected model is not the original: its {what} differ by {error:.1e} of their spread, and a split "
            f"with planes={planes} explains at most {limit:.0e}; nothing was kept."
        )
    return Checked(what, error)


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take, of the machine and of its control group; None if nobody says."""
    rooms = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024)
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(used["active_file"]) + int(used["inactive_file"])  # files that were read: given back when needed
        rooms.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + cache)
    except (OSError, ValueError, KeyError):  # "max": no limit
        pass
    return min(rooms, default=None)


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Root-mean-square difference over the standard deviation of `want`; infinite if either is not finite."""
    want, got = want.double(), got.double()
    if want.shape != got.shape or not bool(torch.isfinite(want).all() and torch.isfinite(got).all()):
        return float("inf")
    difference = float((want - got).square().mean().sqrt())
    spread = float(want.std()) if want.numel() > 1 else float(want.abs())
    return difference / spread if spread > 0 else float(difference > 1e-6)


def _sizes(source: Source, stored: dict[str, str], directory: Path) -> tuple[int, int]:
    """Bytes that loading the original and the protected model takes, generously."""
    count = sum(torch.Size(source.shape(name)).numel() for name in set(stored.values()))
    held = sum(path.stat().st_size for path in directory.glob("*/*.safetensors"))
    return 0 if isinstance(source, LoadedSource) else int(4 * count * 1.2), 2 * held


class _Answer(NamedTuple):
    inputs: dict[str, Any]
    value: torch.Tensor


def _original_answer(original: Any) -> _Answer | None:
    """What the original makes of a few inputs; None if it cannot be run on such."""
    try:
        inputs = _inputs(original)
        return _Answer(inputs, _first(original(**inputs)))
    except Exception as error:  # whatever the model's code raises
        logger.warning("the original cannot be tried (%s): each matrix is checked by itself", type(error).__name__)
        return None


def _protected_answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Raises BundleError if the model does not run: its code does more with a layer than to call it."""
    try:
        return _first(model(**inputs))
    except SlipError:
        raise
    except Exception as error:  # as above
        raise BundleError(
            f"the protected model does not run ({locate(error)}): its code uses a protected layer in a way that only "
            "the original allows; nothing was kept."
        ) from None


def _try(model: Any, source: Source) -> None:
    """Run the protected model, if the original's code runs on such inputs, which its skeleton shows without memory."""
    try:
        inputs = _inputs(model)
        with fake_mode():
            source.skeleton()(**inputs)
    except Exception as error:  # as above; of experts, too, for which tokens without values find none
        logger.warning("the protected model was not tried (%s)", type(error).__name__)
        return
    _protected_answer(model, inputs)


def _products(model: Any, source: Source, groups: list[Group], stored: dict[str, str]) -> float:
    """The largest error of a protected matrix's product with random vectors."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for group in groups:
        inputs: dict[int, torch.Tensor] = {}
        for m in group:
            x = inputs.setdefault(m.columns, torch.randn(TOKENS, m.columns, generator=generator))
            want = x @ m.matrix(source.read(stored[m.weight], m.part, m.parts).float()).T
            if m.bias:
                want = want + source.read(stored[m.bias], m.part, m.parts).float().reshape(m.rows)
            worst = max(worst, relative_error(want, model.get_submodule(m.name)(x) * 1.0))
    return worst


def _protected(source: Source, directory: Path) -> Any:
    import sliplm.trusted  # noqa: F401 - teaches Transformers to load the bundle; it imports the split

    model = model_class(source.config).from_pretrained(directory / "trusted").eval()
    model.slip.attach(directory / "edge")
    return model


def _inputs(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(like: torch.Tensor) -> torch.Tensor:
        if like.is_floating_point():
            return torch.randn(like.shape, generator=generator)
        known = getattr(model.get_input_embeddings(), "num_embeddings", FIRST_IDS)
        return torch.randint(0, min(known, FIRST_IDS), (1, TOKENS), generator=generator)

    return {key: random(value) for key, value in example_inputs(model).items()}


def _first(outputs: Any) -> torch.Tensor:
    """The logits, or else the first tensor of a model's outputs."""
    found = outputs.logits if getattr(outputs, "logits", None) is not None else outputs[0]
    tensor: torch.Tensor = found.detach()
    return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' progress bars and reports on what it loads."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
