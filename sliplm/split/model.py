"""Split a checkpoint into an edge bundle and a trusted bundle, one group of matrices at a time (docs/security.md)."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import transformers

from sliplm.bundle import Q_FILE
from sliplm.errors import BundleError, UnsupportedModelError
from sliplm.naming import checked_name
from sliplm.split import writer
from sliplm.split.adapter import Adapted, Lora
from sliplm.split.again import WEIGHTS_FILE, FirstSplit, fingerprint, second_split, siblings
from sliplm.split.base import FineTuned
from sliplm.split.check import Checked, compare
from sliplm.split.files import only_adapter
from sliplm.split.groups import Group, find_groups, left_out, size
from sliplm.split.layers import is_experts
from sliplm.split.matrices import check_shape, group_layout, guard, make_plan, split_group
from sliplm.split.open import Placed, count_blocks, masked_groups, place, place_groups, take_open, write_open
from sliplm.split.origin import advice, said_base
from sliplm.split.places import Place, places
from sliplm.split.plan import GroupPlan, OpenPlan, Options, check_plan, gives_away, masked, to_settings
from sliplm.split.source import Source, continues_text, fake_mode, open_source
from sliplm.split.tensors import Layout, differ, resolve, token_table
from sliplm.split.tokenizer import check_ids, has_tokenizer, has_vocabulary, read_generation, read_tokenizer, save

logger = logging.getLogger(__name__)
GUARD = (torch.float32, (0,))
WITHOUT_SLIPLM = "this is a bundle of sliplm: `import sliplm.trusted` before you load it"
"""In a bundle's configuration in place of the weights' file: Transformers quotes it if it does not know the bundle."""
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")


class Texts(NamedTuple):
    """What a model that reads and writes text is served with: its name, tokenizer and generation settings."""

    name: str
    tokenizer: Any
    generation: transformers.GenerationConfig | None


@dataclass(frozen=True)
class Summary:
    """What a split did. Sizes in bytes; `digest` names the split (hex); `layers` counts matrices; `kept` names the
    layers that hold weights and stay on the trusted side, embedding tables apart; `open` says what the edge has in
    plain, if it has; `checked` and `error` say how far the protected model is from the original, see
    `split.check.Checked`."""

    digest: str
    groups: int
    layers: int
    protected_parameters: int
    edge_bytes: int
    trusted_bytes: int
    kept: list[str]
    open: str | None
    checked: str
    error: float | None


def split_model(
    model: str,
    out: Path,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    adapter: Path | None = None,
    name: str | None = None,
    check: bool = True,
    adjust: Callable[[list[GroupPlan]], list[GroupPlan]] | None = None,
    decide: Callable[[str, int], list[Place]] = places,
) -> Summary:
    """Split `model` (directory, .gguf file or hub id) into out/edge and out/trusted.

    Memory: a few times the largest group of matrices, for a checkpoint of safetensors. The check after it takes the
    original in float32 where there is room for that, see `split.check`.

    Args:
        progress: called with (weights done, weights in all).
        adapter: a LoRA adapter to merge into the model first. `model` may be one itself, of the model `options.base`.
        name: what the model is called where it is served; by default as its directory or file.
        check: compare the protected model with the original before it takes its place; off for benchmarks.
        adjust: given the plan that `options` make, returns the one to follow: ranks and planes of groups may differ.
        decide: given `options.plan` and the number of decoder blocks, returns the place of each.

    Raises:
        UnsupportedModelError: the model cannot be read, or layers of it cannot be protected.
        BundleError: `out` exists or cannot be written, or the protected model is not the original.
    """
    options = options or Options()
    name = _name(model, name)
    if adapter is None and options.base is not None and only_adapter(Path(model).expanduser()):
        adapter, model = Path(model).expanduser(), options.base
    source = open_source(model, adapter)  # its configuration first: Transformers reads the tokenizer by it
    # Before anything that takes long; an adapter's own tokenizer has the chat template that it was trained on.
    tuned = adapter is not None and has_vocabulary(adapter)
    if adapter is not None and not tuned and has_tokenizer(adapter):
        logger.warning("the adapter has settings of a tokenizer and no vocabulary: the model's own tokenizer is taken")
    tokenizer, generation = read_tokenizer(str(adapter) if tuned else model), read_generation(model)
    lora = None if adapter is None else Lora(adapter)
    with fake_mode():
        skeleton = source.skeleton()
        if lora is not None and (tokens := lora.vocabulary(skeleton)) is not None:
            source.config.get_text_config().vocab_size = tokens
            skeleton = source.skeleton()
        groups = find_groups(skeleton, rank=options.rank)
        placed = None
        if options.plan != "all":
            path, count = count_blocks(skeleton)
            placed = place(skeleton, decide(options.plan, count), path)
        tied = dict(getattr(skeleton, "all_tied_weights_keys", {}))
        routed = any(is_experts(module) for module in skeleton.modules())
    if tokenizer is not None and (rows := token_table(skeleton)[1]):
        check_ids(tokenizer, rows)
    if routed:
        logger.warning("this model routes tokens to experts: the edge sees how many tokens each expert gets")
    if not continues_text(source.config):
        logger.warning(
            "%s does not continue text: `slip trusted` will not serve it, Python will (docs/models.md)",
            type(skeleton).__name__,
        )
    plan = make_plan(groups, options)
    if placed is not None:
        plan = place_groups(plan, placed)
    if adjust is not None:
        plan, found = adjust(plan), [(of.members, of.kind, of.place) for of in plan]
        check_plan(plan)
        if [(of.members, of.kind, of.place) for of in plan] != found:
            raise BundleError("the plan has other groups than the model.")
        for m, of in ((m, of) for group, of in zip(groups, plan, strict=True) for m in group):
            if of.place == "masked" and min(m.rows, m.columns) <= of.rank:
                raise BundleError(f"the plan keeps rank {of.rank} of {m.name}: nothing would be left for the edge.")
    empty = guard(groups, plan)
    groups = masked_groups(groups, plan)
    plain, stored = resolve(skeleton, groups, tied, source)
    # That all names are there does not say that each is what Transformers loads under it.
    if source.renamed(skeleton) or set(stored.values()) - source.names():
        logger.info("loading the whole model: its checkpoint has other tensors than the model")
        source = source.whole()
        plain, stored = resolve(skeleton, groups, tied, source)
        if missing := set(stored.values()) - source.names():
            raise UnsupportedModelError(f"the checkpoint lacks the weight {min(missing)}.")
    if lora is not None:
        source = adapted = Adapted(source, lora, skeleton, tied)
        if options.base is not None:
            for sentence in adapted.exceeding(groups, masked(plan), options.camouflage):
                logger.warning(sentence)
    elif options.base is None and (said := said_base(Path(source.origin[0]))):
        logger.warning("%s", advice(said))
    tied = {target: origin for target, origin in tied.items() if not differ(source, target, origin)}
    plain, stored = resolve(skeleton, groups, tied, source)
    if options.base is not None:
        weights = {stored[m.weight] for group in groups for m in group}
        source = FineTuned(source, options.base, weights, set(stored.values()) - weights)
    first = None
    if options.again is not None:
        first = FirstSplit(options.again, masked(plan), options.camouflage, options.base is not None)
    with writer.new_directory(out) as partial:
        (partial / "edge").mkdir()
        (partial / "trusted").mkdir(mode=0o700)
        texts = Texts(name, tokenizer, generation)
        digest = _write(
            partial, out, source, groups, plan, placed, empty, plain, stored, options, skeleton, texts, first, progress
        )
        planes = min((group.planes for group in masked(plan)), default=2)
        checked = compare(source, groups, stored, partial, planes) if check else Checked("", None)
        edge, trusted = (sum(f.stat().st_size for f in (partial / side).iterdir()) for side in ("edge", "trusted"))
    members = [m for group in groups for m in group]
    protected = sum(m.rows * m.columns for m in members)
    kept = [name for name in left_out(skeleton, groups) if placed is None or placed.of(name) != "open"]
    runs = placed.open.runs if placed is not None and placed.open is not None else None
    said = None if runs is None else gives_away(runs)
    return Summary(digest, len(groups), len(members), protected, edge, trusted, kept, said, checked.what, checked.error)


def _name(model: str, name: str | None) -> str:
    if name is not None:
        return checked_name(name)
    path = Path(model).expanduser()
    own = path.stem if path.suffix == ".gguf" else path.resolve().name
    return own or "model"


def _write(
    directory: Path,
    out: Path,
    source: Source,
    groups: list[Group],
    plan: list[GroupPlan],
    placed: Placed | None,
    empty: str,
    plain: Layout,
    stored: dict[str, str],
    options: Options,
    skeleton: transformers.PreTrainedModel,
    texts: Texts,
    first: FirstSplit | None,
    progress: Callable[[int, int], None] | None,
) -> str:
    edge, trusted = directory / "edge", directory / "trusted"
    sizes = map(size, groups)
    shapes = [(of.planes * rows, columns) for of, (rows, columns) in zip(masked(plan), sizes, strict=True)]
    for key in sorted(m.weight for group in groups for m in group):
        if not source.dtype(stored[key]).is_floating_point:
            raise UnsupportedModelError(f"the weight {key} is stored as {source.dtype(stored[key])}, an integer type.")
    plain, given = take_open(plain, placed)
    layout: Layout = {key: (source.dtype(stored[key]), shape) for key, (_, shape) in plain.items()}
    layout[empty] = GUARD
    for group, of in zip(groups, masked(plan), strict=True):
        layout |= group_layout(group, of, options, first)
    total = sum(m.rows * m.columns for group in groups for m in group)
    done = 0
    files = [
        writer.TensorWriter(edge / Q_FILE, {str(g): (torch.int8, s) for g, s in enumerate(shapes)}),
        writer.TensorWriter(trusted / "model.safetensors", layout),
    ]
    q_file, trusted_file = files
    try:
        for key, (_, shape) in plain.items():
            check_shape(key, source.shape(stored[key]), shape)
            trusted_file.write(key, source.read(stored[key]))
        trusted_file.write(empty, torch.empty(GUARD[1], dtype=GUARD[0]))
        weights = []
        for number, (group, of) in enumerate(zip(groups, masked(plan), strict=True)):
            weights.append(fingerprint(source.read(stored[m.weight], m.part, m.parts) for m in group))
            if first:
                first.check_weights(number, group[0].name, weights[-1])
            for key, tensor in split_group(source, number, group, of, stored, options, first):
                if key == "q":
                    q_file.write(str(number), tensor)
                else:
                    trusted_file.write(key, tensor)
            done += sum(m.rows * m.columns for m in group)
            if progress:
                progress(done, total)
        if first is None and (others := siblings(out, weights)):
            logger.warning("%s", second_split(*others[0], len(groups)))
        opened = placed.open if placed is not None else None
        manifest = None
        if opened is not None:
            manifest = write_open(edge, source, opened, given, stored, type(skeleton).__name__)
        digest = writer.write_edge_manifest(edge, shapes, q_file.close(), manifest)
        trusted_file.close()
    finally:
        for file in files:
            file.abort()
    writer.write_json(trusted / WEIGHTS_FILE, weights)
    _write_checkpoint_files(trusted, source, plan, opened, options, skeleton, texts)
    writer.write_trusted_manifest(trusted, digest)
    for path in trusted.iterdir():
        path.chmod(0o600)  # the directory is private; so is each file, should it be moved
    return digest


def _write_checkpoint_files(
    trusted: Path,
    source: Source,
    plan: list[GroupPlan],
    opened: OpenPlan | None,
    options: Options,
    skeleton: transformers.PreTrainedModel,
    texts: Texts,
) -> None:
    """Make `trusted` a checkpoint that `from_pretrained` loads: configuration, generation settings, tokenizer."""
    config = source.config
    config.dtype = torch.float32  # results equal those of the float32 original
    config.architectures = [type(skeleton).__name__]
    config.quantization_config = {
        "quant_method": "slip",
        "name": texts.name,
        "blinding": options.blinding,
        "camouflage": options.camouflage,
        "based": options.base is not None,
        "plan": to_settings(plan),
        **({} if opened is None else {"open": msgspec.to_builtins(opened)}),
    }
    config.save_pretrained(trusted)
    written = json.loads((trusted / "config.json").read_text())  # `save_pretrained` leaves that one key out
    writer.write_json(trusted / "config.json", written | {"transformers_weights": WITHOUT_SLIPLM})
    if skeleton.can_generate():
        save(trusted, texts.generation or transformers.GenerationConfig.from_model_config(config))
    for file in PREPROCESSING:
        if (path := Path(source.origin[0]) / file).is_file():
            shutil.copyfile(path, trusted / file)
    if texts.tokenizer is not None:
        save(trusted, texts.tokenizer)
    elif skeleton.main_input_name == "input_ids":
        logger.warning("the model has no tokenizer, so `slip trusted` cannot serve it")
