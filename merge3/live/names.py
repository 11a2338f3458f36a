"""From a checkpoint's tensor names to a live model's parameters, where transformers renames the one to the other.

Vision-language models are stored under the names of their first release, and live under today's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def parameter_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> what transformers' own loading calls it in the live model, for plain renamings alone: tensors
    that are fused or split on the way are left out. Names that loading would not touch are there too, as they are."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    live, found = model.state_dict(), {}
    for name in names:
        other, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, live)
        if converted is None:
            found[name] = other
    return found
