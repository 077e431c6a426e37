"""What a bundle says of itself: what is protected and how, what stays where, and how large either side is.

Manifests, the configuration and the headers of files are read, not the tensors: it takes no time, and proves nothing
(loading a bundle checks every digest).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from sliplm.bundle import MANIFEST, OPEN_FILE, read_edge_manifest, read_trusted_manifest, tensor_sizes
from sliplm.errors import BundleError
from sliplm.split.plan import GroupPlan, gives_away, masked, read_open, read_plan


def inspect(directory: Path) -> dict[str, Any]:
    """What is known of the split in `directory`: DIR with both halves or one, or DIR/edge or DIR/trusted itself.

    Keys: `split`, its digest; `edge_bytes` and `trusted_bytes` on disk, of the halves that are there; `open`, if blocks
    are: the first and the last of all `runs`, and a `note` on what that gives away; `groups`, each with its `number` on
    the edge, if it is masked, and what the edge and the trusted side hold of it, in bytes, and, with the trusted half,
    its plan; `kept`, the original's tensors that the trusted side has whole; `model`, `architecture`, `blinding`,
    `camouflage`, `based`.

    Raises BundleError: there is no bundle, a damaged one, or two that do not belong together.
    """
    edge, trusted = _halves(directory)
    result: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []  # the masked ones, then all
    given: dict[str, int] = {}
    if edge is not None:
        manifest, digest = read_edge_manifest(edge)
        result |= {"split": digest.hex(), "edge_bytes": _size(edge)}
        groups = [{"edge": {"shape": list(shape), "bytes": shape[0] * shape[1]}} for shape in manifest.shapes]
        if (opened := manifest.open) is not None:
            result["open"] = {"runs": [list(run) for run in opened.runs], "note": opened.note}
            given = tensor_sizes(edge / OPEN_FILE)
    if trusted is not None:
        ours = read_trusted_manifest(trusted)
        if result.setdefault("split", ours.edge_digest) != ours.edge_digest:
            raise BundleError(f"{edge} and {trusted} come from two different splits.")
        config, plan = _config(trusted)
        tensors = tensor_sizes(trusted / "model.safetensors")
        hidden = masked(plan)
        if edge is not None and len(groups) != len(hidden):
            raise BundleError(f"{trusted} has a plan for {len(hidden)} groups, and the edge has {len(groups)}.")
        result |= config | {"trusted_bytes": _size(trusted)}
        theirs = iter(groups)
        groups = [next(theirs, {}) if of.place == "masked" else {} for of in plan]
        for of, group in zip(plan, groups, strict=True):
            group |= _planned(of) | {"trusted": {"bytes": _held(of.members, tensors)}}
            if of.place == "open" and edge is not None:
                group["edge"] = {"bytes": _held(of.members, given)}
        members = {name for of in plan for name in of.members}
        kept = {name: size for name, size in tensors.items() if size and name.rpartition(".")[0] not in members}
        result["kept"] = kept
    numbers = count()
    result["groups"] = [
        ({"number": next(numbers)} if group.get("place", "masked") == "masked" else {}) | group for group in groups
    ]
    return result


def summarise(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that differ in the number of their block only, as one row with their `count` and their sizes added up."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        row = {key: group.get(key) for key in ("kind", "rank", "planes", "place")}
        row["members"] = " ".join(_pattern(name) for name in group.get("members", ())) or "unknown"
        row["shape"] = tuple(group["edge"]["shape"]) if "shape" in group.get("edge", {}) else None
        found = rows.setdefault(tuple(row.values()), row | {"count": 0, "edge": 0, "trusted": 0})
        found["count"] += 1
        for side in ("edge", "trusted"):
            found[side] += group.get(side, {}).get("bytes", 0)
    return list(rows.values())


def summarise_kept(kept: dict[str, int]) -> list[tuple[str, int, int]]:
    """Tensors that differ in the number of their block only: name, how many, bytes in all; the largest first."""
    count, size = Counter[str](), Counter[str]()
    for name, bytes_ in kept.items():
        count[_pattern(name)] += 1
        size[_pattern(name)] += bytes_
    return [(name, count[name], total) for name, total in size.most_common()]


def _halves(directory: Path) -> tuple[Path | None, Path | None]:
    halves = [path if (path / MANIFEST).is_file() else None for path in (directory / "edge", directory / "trusted")]
    if halves == [None, None] and (directory / MANIFEST).is_file():
        halves = [None, directory] if (directory / "model.safetensors").is_file() else [directory, None]
    if halves == [None, None]:
        raise BundleError(f"{directory} holds no bundle: neither an edge's nor a trusted side's {MANIFEST}.")
    return halves[0], halves[1]


def _config(trusted: Path) -> tuple[dict[str, Any], list[GroupPlan]]:
    try:
        config = json.loads((trusted / "config.json").read_bytes())
        settings = config["quantization_config"]
        known = {key: settings[key] for key in ("blinding", "camouflage", "based")}
        if (opened := read_open(settings)) is not None:
            known["open"] = {"runs": [list(run) for run in opened.runs], "note": gives_away(opened.runs)}
        return {"model": settings["name"], "architecture": config["architectures"][0]} | known, read_plan(settings)
    except (OSError, ValueError, LookupError, TypeError):
        raise BundleError(f"{trusted / 'config.json'} is damaged, or not of a trusted bundle.") from None


def _planned(of: GroupPlan) -> dict[str, Any]:
    sizes = {"rank": of.rank, "planes": of.planes} if of.place == "masked" else {}
    return {"members": list(of.members), "kind": of.kind, **sizes, "place": of.place}


def _held(members: tuple[str, ...], tensors: dict[str, int]) -> int:
    return sum(size for name, size in tensors.items() if name.rpartition(".")[0] in members)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
