"""merge3: evolve merges of fine-tuned language models.

Public names are imported on first use, so that `import merge3` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "merge3.recipe",
    "Pool": "merge3.pool",
    "Slot": "merge3.live.slot",
    "Space": "merge3.space",
    "SpaceDefinition": "merge3.space",
    "LocalEngine": "merge3.engine",
    "Registration": "merge3.registration",
    "Varied": "merge3.protocol",
    "Variants": "merge3.variants",
    "Item": "merge3.tasks",
    "read_items": "merge3.tasks",
    "merge_to_disk": "merge3.export",
    "METHODS": "merge3.methods",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'merge3' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES])
