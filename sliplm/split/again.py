"""Split the same weights a second time with the camouflage of the first.

Every split draws its camouflage afresh: W = A B + W_edge, with another A B each time. Whoever holds the edge bundles of
two such splits, and found a common basis for them, would see the protected subspace of W in their difference, exactly.
So a second split takes A B from the first one's trusted bundle, and draws nothing but its blinding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sliplm import bundle
from sliplm.errors import BundleError
from sliplm.split.plan import GroupPlan, masked, read_plan
from sliplm.split.planes import dequantise

WEIGHTS_FILE = "weights.json"
_ROUNDING = {1: 1e-2, 2: 4e-5}  # of a matrix to so many planes, at most, relative to its length


class FirstSplit:
    """The trusted side of an earlier split, of this or the last format.

    Args:
        trusted: DIR/trusted. plan (of the masked groups), camouflage, based (on a public model): of the new split; but
            for planes, they must be those of the first.

    Raises:
        BundleError: it is no trusted bundle, a damaged one, or one of another model or rank.
    """

    def __init__(self, trusted: Path, plan: list[GroupPlan], camouflage: bool, based: bool) -> None:
        self._path = trusted
        # Its factors are all that this split protects: damaged ones would give an edge bundle with everything in it.
        bundle.open_trusted(trusted, bundle.LAST_FORMAT)
        try:
            config = json.loads((trusted / "config.json").read_text())["quantization_config"]
            self._plan = masked(read_plan(config))
            self._file = safe_open(trusted / "model.safetensors", "pt")
            planted = bool(config["camouflage"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, BundleError):
            raise BundleError(f"{trusted} is not the trusted bundle of an earlier split.") from None
        if [group.members for group in self._plan] != [group.members for group in plan]:
            raise BundleError(f"{trusted} protects other layers: it is not a split of this model with this plan.")
        if planted != camouflage or [group.rank for group in self._plan] != [group.rank for group in plan]:
            ranks = sorted({group.rank for group in self._plan})
            shown = f"--rank {', '.join(map(str, ranks))} and {'--camouflage' if planted else '--no-camouflage'}"
            raise BundleError(f"{trusted} was split with {shown}: its camouflage cannot serve another choice.")
        # With a base the edge's part of a LoRA is the base's matrix; without, it would have the rounding of the merge.
        if config.get("based", based) != based:
            raise BundleError(f"{trusted} was split {'without' if based else 'with'} --base: so must this split be.")
        self._known = read_weights(trusted)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (N, r) and B (r, K) of the matrix `name`, float32."""
        a, b = self._stored(name)
        return a.float(), b.float()

    def dtype(self, name: str) -> torch.dtype:
        """In which the factors of the matrix `name` are stored."""
        return self._stored(name)[0].dtype

    def check_weights(self, number: int, leader: str, weights: str) -> None:
        """Refuse a group whose `fingerprint` is not that of the first split's group `number` (before format 3: none).

        Raises:
            BundleError: the group, led by `leader`, has other weights.
        """
        if self._known is not None and self._known[number : number + 1] != [weights]:
            raise self._other(leader)

    def check_length(self, number: int, leader: str, rest: torch.Tensor) -> None:
        """The same for formats before 3, by `rest`, W - A B of the group (N, K): their blinding was orthogonal, so the
        edge's part has kept the sum of its squares, but for rounding."""
        if self._known is not None:
            return
        try:
            with safe_open(self._path / bundle.Q_FILE, "pt") as q:  # trusted bundles had one
                edge = dequantise(q.get_tensor(str(number)), self._file.get_tensor(f"{leader}.scales"))
        except (OSError, SafetensorError):
            raise BundleError(f"{self._path} lacks the matrices of {leader}.") from None
        here, there = (float(part.double().square().sum()) for part in (rest, edge))
        noise = _ROUNDING[self._plan[number].planes]
        # What rounding adds: its own square, and twice its product with the matrix, whose entries it does not know.
        if abs(there - here) > (noise**2 + 12 * noise / rest.numel() ** 0.5) * here:
            raise self._other(leader)

    def _stored(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return tuple(self._file.get_tensor(f"{name}.factor_{side}") for side in "ab")  # type: ignore[return-value]
        except SafetensorError:
            raise BundleError(f"{self._path} lacks the factors of {name}.") from None

    def _other(self, leader: str) -> BundleError:
        return BundleError(
            f"{self._path} is a split of other weights ({leader} differs): a new version of a model is split without "
            "--again; docs/security.md says what its old version is worth to a thief."
        )


def fingerprint(parts: Iterable[torch.Tensor]) -> str:
    """SHA-256 (hex) of the float32 values of a group's matrices, whatever type they are stored in."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.float().contiguous().numpy().data)
    return digest.hexdigest()


def read_weights(trusted: Path) -> list[str] | None:
    """The fingerprints in DIR/trusted, a group each; None if there are none, as before format 3."""
    try:
        found = json.loads((trusted / WEIGHTS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return [str(weights) for weights in found] if isinstance(found, list) else None


def siblings(out: Path, weights: list[str]) -> list[tuple[Path, bool, int]]:
    """Trusted bundles beside `out` of which some group has a fingerprint of `weights`: each with whether all agree, and
    how many of `weights` it has; first those that have most."""
    own, found = set(weights), []
    for path in sorted(out.resolve().parent.glob(f"*/trusted/{WEIGHTS_FILE}")):
        theirs = set(read_weights(path.parent) or ())
        if path.parents[1] != out.resolve() and own & theirs:
            found.append((path.parent, own == theirs, sum(w in theirs for w in weights)))
    return sorted(found, key=lambda sibling: (not sibling[1], -sibling[2]))


def second_split(first: Path, same: bool, shared: int, groups: int) -> str:
    """What to tell an owner who splits once more weights that `first`, DIR/trusted, has: the same, or some of them."""
    if same:
        return (
            f"{first} is a split of the same weights. Whoever gets both edge bundles may find what they hide by "
            f"comparing them: remove this one, and split with --again {first}."
        )
    return (
        f"{first} is a split of another model with some of the same weights: {shared} of {groups} groups of matrices. "
        "Whoever gets both edge bundles may find what they hide of these by comparing them (docs/security.md, Pooled "
        "bundles)."
    )
