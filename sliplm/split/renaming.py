"""Into which parameter Transformers loads a stored tensor: it adds and drops prefixes, renames, fuses and permutes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from sliplm.errors import UnsupportedModelError


def renames(model: transformers.PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether Transformers would load any of the tensors `names` into `model` otherwise than as it is, under its name.

    Raises:
        UnsupportedModelError: two of them would be loaded into one parameter: nobody knows which of them is meant.
    """
    changes = get_model_conversion_mapping(model, None, None)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    known = model.state_dict()
    plain: dict[str, list[str]] = defaultdict(list)  # by parameter, the tensors that are loaded into it
    converted: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:  # as Transformers does
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if target in known:
            (plain if pattern is None else converted)[target].append(name)
    for target, found in plain.items():
        if len(found := found + converted[target]) > 1:
            raise UnsupportedModelError(
                f"the checkpoint holds {' and '.join(found[:2])}, which are both loaded as {target}: remove the one "
                "that does not belong to the model."
            )
    return any(converted.values()) or any(found != [target] for target, found in plain.items())
